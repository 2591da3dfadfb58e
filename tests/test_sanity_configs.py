"""The sanity test's small configs: each pair of files, shrunk, from the warm start to RL."""

from pathlib import Path

import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.config import load_config
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.tasks.arithmetic import generator
from jaxrl_fp16.tasks.generated import train_problems
from jaxrl_fp16.training.runs.run_config import Config

CONFIGS = Path(__file__).parents[1] / "configs"
PAIRS = "sanity_mini", "sanity_gpu"
SHAPE = ("--model.hidden_size", "32", "--model.intermediate_size", "64", "--model.num_layers", "2",
         "--model.num_heads", "2", "--model.num_kv_heads", "2", "--model.head_dim", "16")
SHORT = ("--task.arithmetic.terms", "3", "--task.train_size", "16", "--sampling.max_new_tokens", "4",
         "--sft.batch_size", "8", "--sft.microbatch_size", "8", "--sft.max_length", "64",
         "--logging.tensorboard", "false", "--evaluation.every", "0", "--evaluation.sets", "[]")
ROWS = ("--sampling.group_size", "2", "--training.prompts_per_step", "8", "--training.minibatch_size", "4",
        "--training.microbatch_size", "4")


@pytest.mark.parametrize("name", PAIRS)
def test_it_is_the_papers_sanity_test_in_another_size(name):
    warm, config = load_config(Config, CONFIGS / f"{name}_warm.yaml"), load_config(Config, CONFIGS / f"{name}.yaml")
    t = config.training
    assert t.prompts_per_step * config.sampling.group_size == 4 * t.minibatch_size and t.epochs == 1
    assert t.truncated == "zero" and config.optimizer.schedule == "constant" and not config.algorithm.kl_coef
    assert warm.precision == "fp32" and config.precision == "auto" and config.rollout_precision is None
    # The small set is none that the warm start has seen, and no right answer is cut.
    problems = train_problems(generator(config.task.arithmetic), config.task.seed, config.task.train_size)
    seen = train_problems(generator(warm.task.arithmetic), warm.task.seed, warm.sft.steps * warm.sft.batch_size // 20)
    texts = {example.problem for example in problems}
    assert len(texts) == len(problems) and len(texts & {example.problem for example in seen}) <= 1
    assert max(map(len, texts)) <= t.max_prompt_tokens
    longest = max(len(example.solution) for example in problems)
    assert longest < config.sampling.max_new_tokens
    assert t.max_prompt_tokens + longest < warm.sft.max_length


@pytest.mark.parametrize("name", PAIRS)
def test_a_shrunk_one_runs(name, compile_cache, tmp_path):
    shared = (*SHAPE, *SHORT, "--run.dir", str(tmp_path), "--run.compile_cache", compile_cache)
    assert cli.main(["sft", str(CONFIGS / f"{name}_warm.yaml"), *shared, "--sft.steps", "1"]) == 0
    (warm,) = tmp_path.glob(f"{name}_warm-*")
    flags = ("--model.path", str(warm / "model"), "--precision", "bf16", "--rollout_precision", "fp32",
             "--run.steps", "2", "--run.export", "false")
    assert cli.main(["train", str(CONFIGS / f"{name}.yaml"), *shared, *ROWS, *flags]) == 0
    (folder,) = (path for path in tmp_path.iterdir() if path != warm)
    records = [record for record in read_metrics(folder) if "reward" in record]
    assert [record["step"] for record in records] == [1, 2] and all(record["skipped"] == 0 for record in records)
    # What the trainer rounds and the sampler does not: BF16 keeps eight bits.
    assert all(record["mismatch/prob_abs_diff_mean"] > 1e-5 for record in records)
