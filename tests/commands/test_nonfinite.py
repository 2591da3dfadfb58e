"""Whole runs with telemetry: nothing changes; a run that skips says what was not finite, and where."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.models import Decoder, DecoderConfig, init_params, save_pretrained
from jaxrl_fp16.tasks import ALPHABET
from jaxrl_fp16.tokenizer import character_tokenizer, vocabulary_size
from jaxrl_fp16.training.loops.nonfinite import Watch

SHAPE = {"family": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2,
         "num_kv_heads": 1, "head_dim": 16, "tie_embeddings": True}  # conftest's, whose programs are compiled already
TOKENIZER = character_tokenizer(ALPHABET)
TIMES = ("seconds/sample", "seconds/learn", "tokens_per_second")
REWARD = '''
def reward(prompts, responses, examples):
    """A group's responses differ, whatever they are."""
    return [float(place % 2) for place in range(len(responses))]
'''


@pytest.fixture
def command(tiny, compile_cache, tmp_path, capsys):
    """command(name, flag, ...) -> how that command ended: `code`, `folder`, `said` and `error`."""
    (tmp_path / "reward.py").write_text(REWARD)

    def command(name, *flags):
        runs = tmp_path / f"runs{len(list(tmp_path.glob('runs*')))}"
        code = cli.main([name, str(tiny), "--run.compile_cache", compile_cache, "--run.dir", str(runs),
                         "--task.reward_file", str(tmp_path / "reward.py"), "--run.export", "false", *flags])
        (folder,), output = runs.glob("*"), capsys.readouterr()
        return SimpleNamespace(code=code, folder=folder, said=output.out, error=output.err)

    return command


@pytest.fixture
def overflowing(tmp_path):
    """Flags of a model whose second layer's MLP gives more than float16 holds, though every weight is small enough."""
    config = DecoderConfig(vocab_size=vocabulary_size(TOKENIZER), **SHAPE)
    params = init_params(Decoder(config), jax.random.key(0))
    mlp = params["layers"]["mlp"]
    for module, factor in (("up", 100.0), ("down", 2e4)):
        mlp[module]["kernel"] = mlp[module]["kernel"].at[1].multiply(factor)
    save_pretrained(tmp_path / "model", Decoder(config), params, dtype="float32", tokenizer=TOKENIZER)
    none = [text for name in SHAPE for text in (f"--model.{name}", "null")]
    return *none, "--model.path", str(tmp_path / "model")


def test_a_run_with_telemetry_is_bitwise_one_without(command, monkeypatch):
    states = []
    look = Watch.look

    def kept(watch, step, state, taken):
        states.append(jax.tree.map(np.asarray, (state.params, state.opt_state, state.loss_scale)))
        found = look(watch, step, state, taken)
        states.append(jax.tree.map(np.asarray, (state.params, state.opt_state, state.loss_scale)))
        return found

    monkeypatch.setattr(Watch, "look", kept)
    with_it, without = (command("train", "--telemetry.every", every) for every in ("1", "0"))
    assert with_it.code == without.code == 0 and len(states) == 8
    for first, second in zip(states[:4], states[4:], strict=True):
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            assert one.tobytes() == other.tobytes()
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (states[0], states[2])))]
    assert any(moved), "no weight moved: then the comparison would prove nothing"
    *_, last = looked_at = read_metrics(with_it.folder)
    plain = read_metrics(without.folder)
    own = [key for key in last if key.startswith("telemetry/")]
    assert not any(key.startswith("telemetry/") for record in plain for key in record)
    for one, other in zip(looked_at, plain, strict=True):
        assert {key: one[key] for key in one if key not in (*own, *TIMES)} == {
            key: other[key] for key in other if key not in TIMES}
    assert last["telemetry/activation_module"].split(".")[0] in ("embedding", "layers", "final_norm")
    assert 1 < last["telemetry/margin"] == 65504 / last["telemetry/activation_max"]
    assert 0 <= last["telemetry/gradient_underflow"] < 0.5 and last["telemetry/gradient_max"] > 0
    assert last["telemetry/gradient_tensor"].startswith("model.") and 0 < last["telemetry/weight_max"] < 10


def test_a_scale_that_probes_is_told_from_a_layer_that_overflows(command):
    """At 2^40 a gradient overflows: halved by 2^16 at each skip, the scale soon holds."""
    run = command("train", "--loss_scale.initial", str(2**40), "--loss_scale.maximum", str(2**40),
                  "--loss_scale.backoff", str(2.0**-16), "--run.steps", "1")
    assert run.code == 0
    _, record = read_metrics(run.folder)
    assert record["skipped"] >= 1 and record["nonfinite"].startswith("the gradient of ")
    assert record["nonfinite"].endswith("; at scale 1 all is finite")
    skipped = f"step 1: {record['skipped']:.0f} of 2 optimizer steps skipped"
    assert f"{skipped}; not finite: {record['nonfinite']}" in run.said


@pytest.mark.fault(20)
@pytest.mark.parametrize("name, flags", [
    ("train", ()),
    ("sft", ("--sft.steps", "3", "--sft.microbatch_size", "8")),
])
def test_a_run_that_cannot_go_on_names_the_layer(command, overflowing, name, flags):
    run = command(name, *overflowing, "--training.max_skipped_steps", "2", *flags)
    assert run.code == 3 and run.error.count("\n") == 1
    assert "2 optimizer steps of the policy skipped in a row: gradients are not finite, first the activation of " \
           "layers.1.mlp, " in run.error
    if name == "train":
        assert read_metrics(run.folder)[-1]["nonfinite"].startswith("the activation of layers.1.mlp, ")


def test_skips_are_looked_into_ever_more_rarely(monkeypatch):
    """After the first, second, fourth, eighth ... skip of a run; it depends on the counter that a checkpoint keeps."""
    said, asked = [], []
    watch = object.__new__(Watch)
    watch.run = SimpleNamespace(config=SimpleNamespace(telemetry=SimpleNamespace(every=0)),
                                log=SimpleNamespace(say=said.append))
    monkeypatch.setattr(Watch, "cause", lambda watch: asked.append(1) or "the loss")
    found, total = [], 0
    for step, count in enumerate((1, 1, 1, 0, 2, 1, 1, 1, 3), 1):
        total += count
        taken = [{"skipped": float(place < count), "loss_scale": 8.0} for place in range(3)]
        watch.keep(None, [np.arange(4)] * 3)
        state = SimpleNamespace(sampling_params=None, loss_scale=SimpleNamespace(skipped=np.int32(total)))
        if "nonfinite" in watch.look(step, state, taken):
            found.append(total)
    assert found == [1, 2, 5, 8] and len(asked) == len(said) == 4
