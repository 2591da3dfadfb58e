"""Whole runs of a tiny model: what they write, how they resume. How they stop: test_stops.py."""

import json
import math
import os

import jax
import numpy as np
import pytest

from jaxrl_fp16.config import load_config
from jaxrl_fp16.logs import RunLog, read_metrics
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params, save_pretrained
from jaxrl_fp16.tasks import ALPHABET
from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointConfig, CheckpointError, Checkpoints
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.safety.folder_lock import only_writer

COMPARISONS = (
    "kl_k1", "kl_k3", "logprob_abs_diff_mean", "logprob_abs_diff_max", "prob_abs_diff_mean", "prob_diff_max",
    "prob_diff_min", "seq_log_ratio_mean", "seq_log_ratio_std", "seq_log_ratio_min", "seq_log_ratio_max", "seq_kl",
    "chi2_token", "chi2_seq", "ess_seq", "exact_fraction",
)
TERMS = ("numerics", "numerics_update", "staleness", "staleness_last", "truncation", "tokenisation",
         "tokenisation_tokens")
TIMES = ("seconds/sample", "seconds/learn", "tokens_per_second")
EVALUATED = ("--evaluation.sets", "[{name: own, samples: 4, temperature: 1}]", "--evaluation.rows", "32",
             "--evaluation.every", "2")


@pytest.fixture(scope="module")
def whole(train_command):
    """Four steps without a break, and how many programs had been compiled at each."""
    compiled, counts = [], {}
    listen = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    with pytest.MonkeyPatch.context() as patch:
        metrics = RunLog.metrics

        def counted(log, step, values):
            counts[step] = len(compiled)
            metrics(log, step, values)

        patch.setattr(RunLog, "metrics", counted)
        jax.monitoring.register_event_duration_secs_listener(listen)
        run = train_command("--run.steps", "4", *EVALUATED)
        jax.monitoring.unregister_event_duration_listener(listen)
    run.compiled = counts
    return run


def arrays(folder, step, checkpoints="checkpoints"):
    """`(every array of a checkpoint by its path, its extra values)`."""
    with Checkpoints(folder / checkpoints, CheckpointConfig()) as checkpoints:
        return checkpoints.arrays(step)


def without_times(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


# -- what a run writes ------------------------------------------------------------------------------------


def test_a_run_leaves_its_folder(whole):
    folder = whole.folder
    assert whole.code == 0 and folder.name.startswith("tiny-")
    config = load_config(Config, folder / "config.yaml")
    assert (config.precision, config.rollout_precision, config.run.platform) == ("fp16", None, "cpu")
    record = json.loads((folder / "environment.json").read_text())
    assert record["policy"] == record["rollout_policy"] == "params=float32,compute=float16,output=float32"
    assert {"versions", "device_kind", "xla_flags", "seed", "mesh"} <= set(record)
    assert record["versions"]["jax"] == jax.__version__
    assert [step.name for step in sorted((folder / "checkpoints").iterdir())] == ["1", "2", "3", "4"]
    (events,) = folder.glob("events.out.tfevents.*")
    assert b"mismatch/kl_k3" in events.read_bytes()
    assert (folder / "plot.png").stat().st_size > 10_000
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (folder / "model").iterdir()}


def test_the_console_tells_what_happens(whole):
    for text in ("0.02M parameters, in fp16 (compute float16, blockwise attention) on 1 x cpu", "memory, about: ",
                 "grpo: 4 steps of 8 prompts x 4 = 32 rows, in minibatches of 16", "step 4/4  reward", "own accuracy",
                 "effective sample size", f"{whole.folder}/model", "plot.png"):
        assert text in whole.said


def test_every_step_is_measured(whole):
    first, *steps = read_metrics(whole.folder)
    assert first["step"] == 0 and {key.rpartition("/")[2] for key in first if key.startswith("eval/own/")} == {
        "accuracy", "stderr", "pass@1", "pass@2", "pass@4", "response_length", "finished", "problems"}
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    wanted = {f"{prefix}/{name}" for prefix in ("mismatch", "mismatch_grad") for name in COMPARISONS}
    wanted |= {f"terms/{name}" for name in TERMS}
    wanted |= {"loss", "grad_norm", "loss_scale", "skipped", "empty", "reward", "entropy", "learning_rate", *TIMES}
    for record in steps:
        assert not wanted - set(record)
        assert all(math.isfinite(value) for value in record.values())
        assert record["mismatch/kl_k3"] < 1e-4 and record["mismatch/ess_seq"] > 0.999
        assert record["terms/staleness"] > 100 * record["terms/numerics"] > 0 == record["terms/truncation"]
        assert record["loss_scale"] == 2**15 and record["skipped"] == record["empty"] == 0
    assert [record["step"] for record in steps if "eval/own/accuracy" in record] == [2, 4]


def test_a_reward_of_ones_own_drives_the_run(whole):
    lines = [json.loads(line) for line in (whole.folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    for line in lines:
        assert line["reward"] == sum(character.isdigit() for character in line["response"]) / 4
        assert line["prompt"].endswith("=") and line["answer"].isdigit()
    rewards = [record["reward"] for record in read_metrics(whole.folder)[1:]]
    assert rewards[-1] > rewards[0] + 0.1


def test_each_step_draws_with_a_key_of_its_own(whole):
    keys = {arrays(whole.folder, step)[0]["policy.key"].tobytes() for step in (1, 2, 3, 4)}
    lines = [json.loads(line) for line in (whole.folder / "samples.jsonl").read_text().splitlines()]
    responses = {step: [line["response"] for line in lines if line["step"] == step] for step in (1, 2)}
    assert len(keys) == 4 and responses[1] != responses[2]


def test_nothing_is_compiled_after_the_first_iteration(whole):
    """The second may still meet small operations of its own; the third and fourth meet none, evaluations included."""
    assert whole.compiled[4] == whole.compiled[3] == whole.compiled[2]
    assert whole.compiled[2] == whole.compiled[1]


def test_transformers_loads_the_model(whole):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from jaxrl_fp16.forward import logits
    from jaxrl_fp16.models import load_pretrained
    from jaxrl_fp16.precision import get_precision

    folder = whole.folder / "model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.generation_config.eos_token_id == [1] and theirs.generation_config.temperature == 1.0
    prompts = tokenizer(["1+2=", "9+9="], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        tokens = theirs.generate(**prompts, do_sample=False, max_new_tokens=5, eos_token_id=-1)
        expected = theirs(tokens).logits.numpy()
    assert tokenizer.decode(tokens[0][:4]) == "1+2="
    model, params = load_pretrained(folder)
    tokens = tokens.numpy().astype(np.int32)
    found = jax.jit(lambda params, rows: logits(model, params, rows, rows >= 0, get_precision("fp32").policy))(
        params, tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    # Their greedy tokens are ours.
    assert (np.asarray(found).argmax(-1)[:, 3:-1] == tokens[:, 4:]).all()
    saved, _ = arrays(whole.folder, 4)
    np.testing.assert_array_equal(params["embedding"],
                                  saved["policy.params.embedding"].astype(np.float16).astype(np.float32))


# -- resuming ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resumed(train_run):
    """Two steps, then two more by another start in the same folder."""
    half = train_run("--run.steps", "2", *EVALUATED)
    names = {path.name for path in half.folder.glob("*")}
    again = train_run("--run.steps", "4", *EVALUATED, *half.flags, "--resume", str(half.folder))
    assert half.folder == again.folder and "model" in names
    return again


@pytest.mark.fault(22)
def test_a_resumed_run_is_bitwise_one_that_never_stopped(whole, resumed):
    assert "resumed after step 2" in resumed.said
    assert without_times(read_metrics(resumed.folder)) == without_times(read_metrics(whole.folder))
    texts = [(run.folder / "samples.jsonl").read_text() for run in (whole, resumed)]
    assert texts[0] == texts[1]
    (expected, place), (found, other) = arrays(whole.folder, 4), arrays(resumed.folder, 4)
    assert place == other and set(found) == set(expected)
    assert {"policy.loss_scale.loss_scale", "policy.key", "policy.step"} <= set(found)
    assert [name for name in found if found[name].tobytes() != expected[name].tobytes()] == []


@pytest.mark.fault(22)
def test_what_came_after_the_checkpoint_is_cut_off(train_run, resumed):
    """As a killed process leaves it: later metrics, half a line, and a checkpoint that is not finished."""
    folder = resumed.folder
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "reward": 1.0}\n{"step": 6, "rew')
    (folder / "checkpoints" / "5.partial").mkdir()
    again = train_run("--run.steps", "4", *EVALUATED, *resumed.flags, "--resume", str(folder))
    assert again.code == 0 and [record["step"] for record in read_metrics(folder)] == [0, 1, 2, 3, 4]


@pytest.mark.fault(22)
def test_a_run_killed_before_its_first_checkpoint_begins_again(train_run, resumed):
    """Its logs may have begun; what a manifest lost is no such run."""
    folder, records = resumed.folder, read_metrics(resumed.folder)
    kept = folder / "kept"
    (folder / "checkpoints").rename(kept)
    (folder / "checkpoints" / "1.partial").mkdir(parents=True)
    again = train_run("--run.steps", "2", *EVALUATED, *resumed.flags, "--resume", str(folder))
    assert again.code == 0 and "no iteration is in a checkpoint yet; the run begins again" in again.said
    assert without_times(read_metrics(folder)) == without_times(records[:3])
    (found, _), (expected, _) = arrays(folder, 2), arrays(folder, 2, "kept")
    assert [name for name in found if found[name].tobytes() != expected[name].tobytes()] == []
    for step in ("1", "2"):
        (folder / "checkpoints" / step / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no sound checkpoint"):
        train_run("--run.steps", "2", *EVALUATED, *resumed.flags, "--resume", str(folder))
    assert len(read_metrics(folder)) == 3


def test_resuming_under_another_config_is_refused(train_command, resumed, capsys):
    before = {path: path.stat().st_mtime_ns for path in resumed.folder.rglob("*")}
    run = train_command("--resume", str(resumed.folder), *EVALUATED, *resumed.flags,
                        "--optimizer.learning_rate", "1e-3")
    error = capsys.readouterr().err
    assert run.code == 2 and error.count("\n") == 1
    assert "optimizer.learning_rate was 0.01, is 0.001; allowed to differ: run.steps" in error
    assert {path: path.stat().st_mtime_ns for path in resumed.folder.rglob("*")} == before


@pytest.mark.fault(27)
def test_a_reward_that_changed_is_named_and_one_that_moved_is_not(train_command, tmp_path, capsys):
    place, moved = tmp_path / "reward.py", tmp_path / "elsewhere.py"
    place.write_text("def reward(prompts, responses, examples):\n    return [float(len(text)) for text in responses]\n")
    flags = ("--run.export", "false", "--logging.tensorboard", "false")
    run = train_command("--run.steps", "1", "--task.reward_file", str(place), *flags)
    about = json.loads((run.folder / "checkpoints" / "1" / "about.json").read_text())
    assert set(about["inputs"]) == {"task.reward_file", "task.template"}
    place.rename(moved)
    again = (*flags, "--task.reward_file", str(moved), "--resume", str(run.folder))
    assert train_command("--run.steps", "2", *again).code == 0
    moved.write_text(moved.read_text().replace("len(text)", "1.0"))
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    capsys.readouterr()
    assert train_command("--run.steps", "3", *again).code == 2
    assert "started with other content: content of task.reward_file has changed" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


@pytest.mark.fault(28)
def test_a_folder_that_another_run_writes_is_refused(train_command, resumed, capsys):
    with only_writer(resumed.folder):
        run = train_command("--resume", str(resumed.folder), *EVALUATED, *resumed.flags, "--run.steps", "9")
    error = capsys.readouterr().err
    assert run.code == 2 and error.count("\n") == 1 and f"is being written by process {os.getpid()}" in error
    assert [record["step"] for record in read_metrics(resumed.folder)][-1] < 9


# -- other algorithms and settings -----------------------------------------------------------------------------------


VARIANTS = {
    "ppo": ("--algorithm.preset", "ppo", "--algorithm.kl_coef", "0.1", "--algorithm.kl_in", "reward"),
    "pg_seq_is": ("--algorithm.preset", "pg_seq_is", "--sampling.top_k", "5", "--algorithm.kl_coef", "0.1",
                  "--training.minibatch_size", "32"),
    "dapo": ("--algorithm.preset", "dapo", "--algorithm.kl_coef", "0.1", "--training.reference", "host",
             "--training.max_sampling_rounds", "3"),
    "rollout": ("--training.old_logprobs", "rollout", "--training.truncated", "mask", "--training.epochs", "2"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_steps_of_another_algorithm(train_run, name):
    run = train_run(*VARIANTS[name], "--run.export", "false")
    steps = read_metrics(run.folder)[1:]
    state, _ = arrays(run.folder, 2)
    assert run.code == 0 and len(steps) == 2 and not (run.folder / "model").exists()
    for step in steps:
        assert all(math.isfinite(value) for value in step.values()) and step["skipped"] == 0
    # A minibatch whose responses are all cut teaches nothing where those are masked.
    empty = sum(step["empty"] for step in steps)
    assert state["policy.step"] == 2 * {"ppo": 2, "pg_seq_is": 1, "dapo": 2, "rollout": 4}[name] - empty
    assert empty == 0 if name != "rollout" else steps[0]["empty"] < 4
    if name == "ppo":
        assert {"critic/loss", "critic/grad_norm", "critic/loss_scale"} <= set(steps[0])
        assert state["critic.step"] == 4 and state["critic.params.value.kernel"].any()
    if name == "pg_seq_is":
        # At the first step policy and reference are one; the kept five tokens hold less than all of the mass.
        assert steps[0]["kl"] < 1e-6 < steps[1]["kl"] and steps[0]["full_logprob"] < 0
        assert steps[0]["terms/truncation"] > 0.1 > steps[0]["terms/staleness"] == 0
    if name == "dapo":
        assert all(1 <= step["sampling_rounds"] <= 3 for step in steps)
        assert all(step["groups_of_equal_reward_used"] <= step["groups_of_equal_reward"] for step in steps)
    assert ("reference.embedding" in state) == (name != "rollout")


def test_where_the_reference_waits_changes_no_bit(train_run):
    flags = ("--algorithm.kl_coef", "0.1", "--run.steps", "2", "--run.export", "false", "--checkpoint.every", "1")
    device, host = (train_run(*flags, "--training.reference", place) for place in ("device", "host"))
    expected, found = (arrays(run.folder, 2)[0] for run in (device, host))
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    resumed = train_run("--run.steps", "3", "--algorithm.kl_coef", "0.1", "--run.export", "false",
                        "--training.reference", "host", "--resume", str(device.folder))
    assert resumed.code == 0 and arrays(resumed.folder, 3)[0]["policy.step"] == 6


def test_a_critic_of_its_own_warms_up_alone(train_run, whole):
    """It has another shape, another precision and another loss scale, and the policy waits for it."""
    folder = whole.folder.parent / "critic"
    shape = DecoderConfig(family="llama", vocab_size=len(ALPHABET) + 3, hidden_size=16, intermediate_size=24,
                          num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8)
    model = Decoder(shape)
    save_pretrained(folder, model, init_params(model, jax.random.key(1)))
    flags = ("--algorithm.preset", "ppo", "--critic.path", str(folder), "--critic.precision", "bf16",
             "--critic.warmup_steps", "1", "--run.export", "false")
    run = train_run(*flags)
    warmup, learning = read_metrics(run.folder)[1:]
    state, _ = arrays(run.folder, 2)
    assert state["critic.step"] == 4 and state["policy.step"] == 2
    assert "grad_norm" not in warmup and "mismatch_grad/kl_k3" not in warmup and "mismatch/kl_k3" in warmup
    assert warmup["terms/staleness"] == 0 < learning["terms/staleness"] and "terms/numerics_update" not in warmup
    assert learning["loss_scale"] == 2**15 and learning["critic/loss_scale"] == warmup["critic/loss_scale"] == 1
    assert state["critic.params.body.embedding"].shape[1] == 16


def test_a_sampler_in_another_precision_says_so(train_run, whole):
    run = train_run("--rollout_precision", "bf16", "--run.steps", "1", "--run.export", "false")
    assert "ablation: the sampler computes in bf16, all else in fp16" in run.said
    config = load_config(Config, run.folder / "config.yaml")
    assert (config.precision, config.rollout_precision) == ("fp16", "bf16")
    record = json.loads((run.folder / "environment.json").read_text())
    assert "float16" in record["policy"] and "bfloat16" in record["rollout_policy"]
    ablated, plain = read_metrics(run.folder)[1], read_metrics(whole.folder)[1]
    assert ablated["mismatch/kl_k3"] > 10 * plain["mismatch/kl_k3"]
    assert ablated["mismatch_grad/kl_k3"] < ablated["mismatch/kl_k3"] / 10
