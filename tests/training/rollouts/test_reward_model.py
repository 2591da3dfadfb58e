"""A reward model as the reward of a run: its scores, what is refused, whole runs in each precision."""

import json
from pathlib import Path
import shutil

import jax
import numpy as np
import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.config import parse_config
from jaxrl_fp16.forward import sequence_scores
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.models import (
    Critic, Decoder, DecoderConfig, init_params, load_reward_model, save_pretrained, save_reward_model,
)
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.tasks import ALPHABET, Example, open_task
from jaxrl_fp16.tokenizer import character_tokenizer, encode, save_tokenizer
from jaxrl_fp16.training.rollouts.reward_model import encode_texts, make_grader, open_reward_model
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.runs.setup import set_up
from jaxrl_fp16.training.safety.memory import estimate, parameter_count

pytestmark = pytest.mark.usefixtures("compile_cache")
TOKENIZER = character_tokenizer(ALPHABET)
DECODER = Decoder(DecoderConfig(family="llama", vocab_size=24, hidden_size=16, intermediate_size=24, num_layers=1,
                                num_heads=2, num_kv_heads=1, head_dim=8, tie_embeddings=True))
EXAMPLES = [Example("1+1=", "2"), Example("2+3=", "5")]
RESPONSES = [["2", "11,2", ""], ["5", "+++", "5<eos>"]]
PROMPTS = ["1+1=", "2+3="]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compile_cache):
    """A random reward model with scores far apart."""
    folder = tmp_path_factory.mktemp("models") / "reward"
    model = Critic(DECODER, bias=False)
    params = init_params(model, jax.random.key(3))
    params["value"]["kernel"] *= 10
    save_reward_model(folder, model, params, tokenizer=TOKENIZER)
    return folder


def score_of(folder, texts):
    """Each text alone, in float32."""
    model, params = load_reward_model(folder)
    rows = [np.array([ids], np.int32) for ids in encode(TOKENIZER, texts)]
    policy = get_precision("fp32").policy
    scores = [sequence_scores(model, params, row, np.ones(row.shape, bool), policy=policy)[0] for row in rows]
    return np.array(scores)


# -- the grader -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opened(folder):
    """opened(key=value, ...) of the section -> the reward model, its grader, and the setup."""

    def opened(**section):
        config = parse_config(Config, {
            "precision": "fp32", "training": {"truncated": "keep"},
            "task": {"train_size": 4, "reward_model": {"path": str(folder), "max_length": 12, "rows": 4} | section}})
        setup = set_up(config)
        with open_task(config.task) as task:
            judge = open_reward_model(setup, task)
        return judge, make_grader(judge, config.task.reward_model, setup.mesh), setup

    return opened


def test_each_response_gets_the_score_of_its_text(opened, folder):
    _, grade, _ = opened()
    found = grade(None, PROMPTS, RESPONSES, EXAMPLES)
    assert found.values.shape == (2, 3) and found.values.dtype == np.float32
    assert found.valid.all() and found.failures == 0 and found.first_error is None
    texts = [prompt + response for prompt, group in zip(PROMPTS, RESPONSES) for response in group]
    np.testing.assert_allclose(found.values.reshape(-1), score_of(folder, texts), atol=1e-4)
    assert found.values.std() > 0.5


def test_no_batch_compiles_again(opened):
    _, grade, _ = opened(rows=2, max_length=14)
    grade(None, PROMPTS[:1], [["1"]], EXAMPLES[:1])
    before = sequence_scores._cache_size()
    for responses in ([["1", "2", "3"]], [["123456", "", "1,1"]]):
        grade(None, PROMPTS[:1], responses, EXAMPLES[:1])
    assert sequence_scores._cache_size() == before


def test_what_cannot_be_scored_is_not_valid_and_never_cut(opened):
    _, grade, _ = opened(max_length=6)
    found = grade(None, PROMPTS, [["12", "123"], ["1234", "1"]], EXAMPLES)
    np.testing.assert_array_equal(found.valid, [[True, False], [False, True]])
    assert found.failures == 2 and not found.values[~found.valid].any()
    assert found.first_error == "a text of 7 tokens for the reward model; task.reward_model.max_length allows 1 to 6"
    _, grade, _ = opened(template="{response}")
    assert not grade(None, PROMPTS, [["", "1"], ["1", "1"]], EXAMPLES).valid[0, 0]


def test_a_score_that_is_not_finite_is_not_valid(opened, monkeypatch):
    judge, _, setup = opened()
    judge.params["value"]["kernel"] *= np.inf
    found = make_grader(judge, setup.config.task.reward_model, setup.mesh)(None, PROMPTS, RESPONSES, EXAMPLES)
    assert not found.valid.any() and found.failures == 6
    assert "try task.reward_model.precision bf16 or fp32" in found.first_error


def test_the_score_stands_on_the_last_token_that_transformers_counts(opened):
    judge, _, _ = opened()
    assert judge.pad_token_id == 0
    assert encode_texts(TOKENIZER, ["1+<pad><pad>", "<pad>1<eos>", "<pad>", ""], 0) == [[4, 13], [0, 4, 1], [], []]
    assert encode_texts(TOKENIZER, ["1<pad>"], None) == [[4, 0]]


def test_a_precision_of_its_own(opened):
    judge, _, setup = opened(precision="bf16")
    assert judge.precision.name == "bf16" and setup.precision.name == "fp32"


def test_the_estimate_counts_it(opened):
    judge, _, setup = opened()
    config = setup.config
    alone = estimate(config, DECODER, setup.mesh, np.dtype("float16"))
    more = estimate(config, DECODER, setup.mesh, np.dtype("float16"), reward_model=judge.model)
    assert more.pop("reward model") == 6 * parameter_count(judge.model) and more == alone
    assert parameter_count(judge.model) == sum(leaf.size for leaf in jax.tree.leaves(judge.params))


# -- refusals ---------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tiny, folder, compile_cache, tmp_path, monkeypatch, capsys):
    """refused(flag, ...) -> the line on stderr of a train that is refused with nothing written."""
    monkeypatch.chdir(tmp_path)

    def refused(*flags, path=folder):
        before = sorted(tmp_path.rglob("*"))
        code = cli.main(["train", str(tiny), "--run.compile_cache", compile_cache, "--task.reward_model.path",
                         str(path), *flags])
        output = capsys.readouterr()
        assert code == 2 and output.out == "" and sorted(tmp_path.rglob("*")) == before
        assert output.err.startswith("jaxrl-fp16: ") and output.err.count("\n") == 1
        return output.err

    return refused


@pytest.mark.parametrize("flags, message", [
    (["--training.truncated", "zero"], "training.truncated is 'zero' with task.reward_model: .*allowed: keep, mask"),
    (["--task.reward_model.template", "{problem}"], "task.reward_model: template is '{problem}'; allowed: a text with"),
    (["--task.reward_model.template", "{a}{response}"], "task.reward_model: template names the field 'a'; known: kind"),
    (["--task.reward_model.tokenizer", "absent"], "task.reward_model.tokenizer: tokenizer folder absent does not"),
    (["--task.reward_model.precision", "fp17"], "task.reward_model: precision 'fp17' is unknown; allowed: fp16, bf16"),
    (["--task.reward_model.max_length", "0"], "task.reward_model.max_length: 0 is not allowed; allowed: integer >= 1"),
])
def test_settings_are_refused(refused, flags, message):
    start, _, end = message.partition(".*")
    line = refused(*flags)
    assert start in line and end in line


def test_folders_are_refused(refused, folder, tmp_path):
    assert "task.reward_model.path: model folder absent does not exist" in refused(path="absent")
    save_pretrained(tmp_path / "lm", DECODER, init_params(DECODER, jax.random.key(0)), tokenizer=TOKENIZER)
    line = refused(path=tmp_path / "lm")
    assert 'architectures is ["LlamaForCausalLM"]; allowed: ["LlamaForSequenceClassification"]' in line

    several = shutil.copytree(folder, tmp_path / "several")
    config = json.loads((several / "config.json").read_text())
    (several / "config.json").write_text(json.dumps(config | {"id2label": {"0": "bad", "1": "good"}}))
    assert "task.reward_model: " in (line := refused(path=several)) and "num_labels is 2" in line

    other = shutil.copytree(folder, tmp_path / "other")
    save_tokenizer(character_tokenizer(ALPHABET + "abcdef"), other)
    assert "task.reward_model: the tokenizer has ids up to 26 and the model's embedding 24 rows" in refused(path=other)


# -- whole runs -------------------------------------------------------------------------------------------


@pytest.fixture
def start(tiny, folder, compile_cache, tmp_path, capsys):
    """start(flag, ...) -> exit code, run folder, console and stderr of a run with the reward model."""

    def start(*flags):
        code = cli.main(["train", str(tiny), "--run.dir", str(tmp_path / "runs"), "--run.compile_cache", compile_cache,
                         "--task.reward_model.path", str(folder), "--task.reward_model.max_length", "16", *flags])
        return code, next((tmp_path / "runs").iterdir()), *capsys.readouterr()

    return start


EVALUATED = ("--evaluation.sets", "[{name: own, samples: 4, temperature: 1}]", "--evaluation.rows", "32",
             "--evaluation.every", "2")


def rewards_of(run, folder):
    """The rewards in a run's samples, and the scores of their texts in float32."""
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    expected = score_of(folder, [row["prompt"] + row["response"] for row in rows])
    return np.array([row["reward"] for row in rows]), expected


def test_a_run_is_rewarded_by_the_model_and_evaluated_by_the_task(start, folder):
    before = sequence_scores._cache_size()
    code, run, said, _ = start(*EVALUATED)
    assert code == 0 and sequence_scores._cache_size() == before + 1
    assert f"rewards: by the model in {folder}, 0.00M parameters, in fp16; evaluation keeps the task's own" in said
    record = json.loads((run / "environment.json").read_text())
    assert record["reward_model"] == str(folder) and record["reward_policy"] == record["policy"]
    found, expected = rewards_of(run, folder)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())
    assert np.ptp(expected) > 1
    metrics = read_metrics(run)
    steps = [row for row in metrics if "reward" in row]
    assert len(steps) == 2 and all(row["rewards_failed"] == 0 and row["reward_std"] > 0.1 for row in steps)
    accuracies = [row["eval/own/accuracy"] for row in metrics if "eval/own/accuracy" in row]
    assert len(accuracies) == 2 and all(24 * accuracy in range(25) for accuracy in accuracies)


@pytest.mark.parametrize("precision, low, high", [("bf16", 1e-3, 0.1), ("fp32", 0.0, 1e-5)])
def test_a_reward_model_in_a_precision_of_its_own(start, folder, precision, low, high):
    code, run, said, _ = start("--task.reward_model.precision", precision, "--run.steps", "1", "--run.export", "false")
    assert code == 0 and f"parameters, in {precision}; evaluation" in said
    record = json.loads((run / "environment.json").read_text())
    assert record["reward_policy"] != record["policy"]
    found, expected = rewards_of(run, folder)
    assert low <= np.abs(found - expected).max() / np.abs(expected).max() <= high


def test_a_run_whose_texts_are_too_long_stops(start):
    code, _, _, error = start("--task.reward_model.max_length", "3")
    assert code == 3 and error.count("\n") == 1
    assert "of 32 rewards failed (a text of " in error and "task.reward_model.max_length allows 1 to 3" in error


# -- making one -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("make_reward_model", Path(__file__).parents[3] / "launch" / "make_reward_model.py")
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_script_makes_a_policy_and_a_reward_model_that_a_run_takes(script, tiny, compile_cache, tmp_path, capsys):
    out, runs = tmp_path / "made", tmp_path / "runs"
    shared = [str(tiny), "--problems", "6", "--samples", "4", "--steps", "2", "--run.compile_cache", compile_cache,
              "--run.dir", str(runs), "--run.name", "made", "--sft.steps", "2"]
    code = script.main([*shared, "--train", "--task.reward_model.path", str(out), "--task.reward_model.max_length",
                        "16", "--run.steps", "1", "--run.export", "false"])
    assert code == 0 and f"{out}: 0." in (said := capsys.readouterr().out) and "held-out pairs in order" in said
    assert load_reward_model(out)[0].body.config.hidden_size == 32
    policy, run = next(runs.glob("made_policy-*")), next(runs.glob("made-*"))
    resolved = (run / "config.yaml").read_text()
    assert f"path: {policy / 'model'}" in resolved and "steps: 0" in resolved
    assert script.main(shared) == 2
    assert "a task.reward_model.path" in capsys.readouterr().err


def test_each_different_wrong_response_is_paired_with_a_right_one(script):
    import random

    pairs = script.pairs_of(["8,5", "8,4", "5", "8,4", "x"], [1, 0, 1, 0, 0], "8,5", random.Random(0))
    assert [wrong for _, wrong in pairs] == ["8,4", "x"] and {right for right, _ in pairs} <= {"8,5", "5"}
    assert script.pairs_of(["1"], [0], "8,5", random.Random(0)) == [("8,5", "1")]
    assert script.pairs_of(["8,5"], [1], "8,5", random.Random(0)) == []


def test_the_reward_model_starts_as_the_policy_and_scores_0(script):
    params = init_params(DECODER, jax.random.key(0))
    model, start = script.reward_model_of(DECODER, params)
    assert model.body.config == DECODER.config
    jax.tree.map(np.testing.assert_array_equal, start["body"], params)
    assert not np.asarray(start["value"]["kernel"]).any()
