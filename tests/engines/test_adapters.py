"""A model with adapters: an engine gets its weights once and then the adapters alone, a name for each version."""

import contextlib
import os
from pathlib import Path
import signal
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.cli import main
from jaxrl_fp16.engines import (
    KINDS, Engine, EngineError, EngineRefused, RolloutConfig, check_rank, child, find_python, make_rollout,
    pipe,
)
from jaxrl_fp16.engines import weights as exchange
from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.logs import read_metrics
from jaxrl_fp16.models import Decoder, DecoderConfig, LoraConfig, init_lora, init_params, save_adapter, save_pretrained
from jaxrl_fp16.models.frozen import BASE, LORA
from jaxrl_fp16.models.init import adapter_table, at
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.sampling import SamplingConfig

PROMPTS, SAMPLING = [[1, 2, 3], [4], [5, 6]], SamplingConfig(max_new_tokens=6, group_size=2)
FAKE = Path(__file__).with_name("fake_child.py")
FILES = "['adapter_config.json', 'adapter_model.safetensors']"
POLICY = get_precision("fp32").policy


def draw(engine, params, sampling=SAMPLING):
    return engine.draw(params, PROMPTS, sampling, 7, (0,))


def sent(found):
    """What the child was sent: `load -1`, `adapt 2`, ..."""
    lines = [line.split() for kind in ("load", "adapt") for line in found.notes(kind)]
    return [f"{kind} {name.removeprefix('version-')}" for kind, name, *_ in lines]


# -- the protocol ----------------------------------------------------------------------------------------


def test_weights_are_sent_once_and_adapters_alone_afterwards(fake, adapted):
    model, versions = adapted
    found = fake(model=model)
    draws = [draw(found.engine, params) for params in (*versions, versions[-1], versions[1])]
    assert sent(found) == ["load 0", "load -1", *(f"adapt {version}" for version in range(6))]
    assert all(FILES in line for line in found.notes("adapt")) and found.engine.version == 5
    assert not list(found.engine._place.iterdir())
    assert len({one.logprobs.tobytes() for one in draws}) == 4 and (draws[1].logprobs == draws[5].logprobs).all()
    draw(found.engine, {**versions[1], BASE: jax.tree.map(lambda x: x + 1, versions[1][BASE])})
    assert [line.split()[1] for line in found.notes("load")] == ["version-0", "version--1", "version--1"]


def test_a_run_sends_its_weights_once(tiny, tmp_path, monkeypatch):
    """An update gives new adapters beside the same arrays."""
    monkeypatch.setattr(pipe, "CHILD", FAKE)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "fake.log"))
    without_peft = {**vars(KINDS["transformers"]), "adapting": ()}
    monkeypatch.setitem(KINDS, "transformers", types.SimpleNamespace(**without_peft))
    own = ["--lora.rank", "2", "--rollout.engine", "transformers", "--rollout.stop_above", "99"]
    assert main(["train", str(tiny), *own, "--run.dir", str(tmp_path / "runs")]) == 0
    lines = [line.split()[:2] for line in (tmp_path / "fake.log").read_text().splitlines()]
    assert [line for line in lines if line[0] in ("load", "adapt")] == [
        ["load", "version-0"], ["load", "version--1"], *(["adapt", str(version)] for version in range(4))]
    steps = read_metrics(next((tmp_path / "runs").iterdir()))[1:]
    assert [step["rollout/version"] for step in steps] == [2, 3] and all(step["seconds/weights"] > 0 for step in steps)


@pytest.mark.fault(36)
def test_a_child_that_is_killed_comes_back_with_the_adapters_of_then(fake, adapted):
    model, versions = adapted
    found = fake(model=model)
    draw(found.engine, versions[0])
    before = draw(found.engine, versions[1])
    os.kill(found.engine._pipe.pid, signal.SIGKILL)
    after = draw(found.engine, versions[1])
    assert found.engine.restarts == 1 and found.engine.version == 2
    assert (before.tokens == after.tokens).all() and (before.logprobs == after.logprobs).all()
    assert sorted(sent(found)) == ["adapt 0", "adapt 1", "adapt 2", "adapt 2", "load -1", "load -1", "load 0"]


@pytest.mark.fault(37)
@pytest.mark.parametrize("fault, says", [("stale", "weights that differ by a fifth"),
                                         ("stale adapters", "adapters that differ")])
def test_what_does_not_act_is_refused_at_the_start(fake, adapted, fault, says):
    found = fake(fault, model=adapted[0])
    with pytest.raises(EngineRefused, match=f"answers alike, to 0, with {says}"):
        found.engine.begin(adapted[1][0])
    assert not found.living()


def test_damaged_adapters_and_those_beyond_the_dtype_are_errors(fake, adapted, monkeypatch):
    model, versions = adapted
    found = fake(model=model, dtype="float16")
    found.engine.begin(versions[0])
    large = {**versions[1], LORA: jax.tree.map(lambda x: x * 1e6, versions[1][LORA])}
    with pytest.raises(EngineError, match="the weights cannot be sent: .*proj.lora_A.weight holds"):
        draw(found.engine, large)
    draw(found.engine, versions[0])
    monkeypatch.setattr(exchange, "checksum", lambda path: "0")
    with pytest.raises(EngineError, match="failed twice: .*are not those that were written"):
        draw(found.engine, versions[2])


def test_adapters_without_weights_are_an_error(tmp_path):
    server = child._Server({})
    asked = {"op": "adapt", "version": 1, "folder": str(tmp_path), "files": {}}
    header, _ = child.unpack(server.answer(asked, {})[1], b"")
    assert "no weights are loaded that adapters belong to" in header["error"] and header["version"] is None


def test_changed_adapters_are_a_fifth_of_each_kernel(adapted):
    model, versions = adapted
    size = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))
    for down, up in zip(*[iter(adapter_table(model))] * 2):
        a, b = (np.asarray(at(versions[1][LORA], each.path)) for each in (down, up))
        kernel = at(versions[1][BASE], (*down.path[:-1], "kernel"))
        product = np.einsum("lir,lro->lio", a.reshape(2, -1, 4), b.reshape(2, 4, -1)) * model.lora.scale
        assert 0.1 < size(product) / size(kernel) < 0.3
    assert versions[1][BASE] is versions[0][BASE]


def test_what_an_engine_lacks_for_adapters_is_refused_before_the_start(tiny, tmp_path, monkeypatch, capsys):
    check_rank("jit", 1000), check_rank("vllm", 512), check_rank("vllm", None)
    assert main(["train", str(tiny), "--lora.rank", "600", "--rollout.engine", "vllm", "--run.dir", str(tmp_path)]) == 2
    assert "lora.rank is 600 with rollout.engine vllm; allowed: at most 512" in capsys.readouterr().err
    kind = KINDS["transformers"]
    monkeypatch.setitem(KINDS, "transformers", types.SimpleNamespace(**{**vars(kind), "adapting": ("absent_module",)}))
    config = RolloutConfig(engine="transformers", deadline_seconds=12.5)    # of which nothing is remembered
    find_python(config)
    with pytest.raises(ValueError, match="which lacks absent_module; .* needs for adapters an interpreter with: pip "
                                         "install torch transformers absent_module"):
        find_python(config, True)


# -- PEFT in this process ----------------------------------------------------------------------------------


@pytest.fixture
def backend(small, adapted, tmp_path, one_torch_thread):
    """backend(dtype) -> a Transformers with the small model; folders of its adapters beside it, "0" to "3"."""
    pytest.importorskip("torch")
    pytest.importorskip("peft", reason="no PEFT in this interpreter")
    save_pretrained(tmp_path / "small", *small, dtype="float32")
    for number, params in enumerate(adapted[1]):
        save_adapter(tmp_path / str(number), adapted[0], params)

    def made(dtype="float32"):
        found = child.Transformers({"dtype": dtype, "device": "cpu", "memory_fraction": 0.5, "seed": 0, "rank": 4,
                                    "max_length": 11})
        found.load(str(tmp_path / "small"))
        return found

    return made


# PEFT 0.21 asks Transformers 5 by a deprecated name, and warns of what it does not find.
quiet = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@quiet
def test_adapters_are_not_merged_and_leave_with_the_next(backend, tmp_path):
    engine = backend("float16")
    plain = {name: value.clone() for name, value in engine.model.state_dict().items()}
    for version in range(3):
        facts = engine.adapt(str(tmp_path / str(version)), version)
        assert facts["dtype"] == "float16" and facts["peft"]
        assert list(engine.model.peft_config) == [f"version-{version}"]
    found = engine.model.get_base_model().state_dict()
    assert all(value.equal(found[name] if name in found else found[name.replace("_proj.", "_proj.base_layer.")])
               for name, value in plain.items())
    assert {"lora_A.version-2", "lora_B.version-2"} == {
        ".".join(name.split(".")[-3:-1]) for name in found if "lora_" in name}
    engine.load(str(tmp_path / "small"))
    assert not hasattr(engine.model, "peft_config")


@quiet
def test_adapters_that_are_not_taken_whole_are_an_error(backend, tmp_path):
    from safetensors.numpy import load_file, save_file

    engine, path = backend(), tmp_path / "0" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({"base_model.model.model.layers.7.lora_A.weight": tensors[name], **tensors}, path)
    with pytest.raises(ValueError, match="did not take the adapters of .*layers.7.lora_A.weight"):
        engine.adapt(str(tmp_path / "0"), 1)


# -- whole engines -----------------------------------------------------------------------------------------

LONG = [[3, 4, 5], list(range(100, 110)), [1 + place % 99 for place in range(300)]]  # the last: beyond a vLLM block
# Heads of 32: the smallest that vLLM's attention on a CPU knows.
CONFIG = DecoderConfig(family="qwen2", vocab_size=128, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2,
                       num_kv_heads=1, head_dim=32, tie_embeddings=True, max_positions=512)


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def started(request):
    """started(model) -> an Engine in float32, closed afterwards."""
    python = os.environ.get("JAXRL_FP16_VLLM_PYTHON") if request.param == "vllm" else sys.executable
    config = RolloutConfig(engine=request.param, python=python, deadline_seconds=600)
    if request.param != "vllm":
        try:
            find_python(config, True)
        except ValueError as error:
            pytest.skip(str(error))
    settings = {"dtype": "float32", "device": "cpu", "memory_fraction": 0.3, "seed": 5, "max_length": 320,
                "max_rows": 4}
    with contextlib.ExitStack() as stack:
        yield lambda model: stack.enter_context(
            contextlib.closing(Engine(config, find_python(config, True), model, settings, print)))


def scored(model, params, temperature, found):
    """The engine's log-probs and our scorer's, of the responses' tokens."""
    width = max(map(len, LONG))
    tokens = np.array([[0] * (width - len(ids)) + ids for ids in LONG], np.int32)
    rollout = make_rollout(tokens, tokens > 0, found, 0)
    mine = token_logprobs(model, params, jnp.asarray(rollout.tokens), jnp.asarray(rollout.mask), policy=POLICY,
                          temperature=temperature)
    return rollout.logprobs[rollout.response_mask], np.asarray(mine)[rollout.response_mask]


def test_each_version_draws_by_its_own_adapters(started):
    """With the scorer's log-probs, of the same tree; over a prompt that a prefix cache would keep; after a kill too."""
    model = Decoder(CONFIG, lora=LoraConfig(rank=4, alpha=6.0, targets=("q_proj", "o_proj", "up_proj", "down_proj")))
    first = init_lora(model, init_params(model, jax.random.key(0)), jax.random.key(1), policy=POLICY)
    versions = [first, *(exchange.changed_adapters(model, first, seed) for seed in (5, 6))]
    engine, found = started(model), []
    for place in (0, 1, 2, 1, 1):
        if len(found) == 4:
            os.kill(engine._pipe.pid, signal.SIGKILL)
        found.append(engine.draw(versions[place], LONG, SamplingConfig(8, temperature=0.7, group_size=2), 9, ()))
        theirs, mine = scored(model, versions[place], 0.7, found[-1])
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=1e-4)
    assert engine.version == 4 and engine.restarts == 1
    assert np.abs(np.subtract(*scored(model, versions[2], 0.7, found[1]))).max() > 0.1, "these differ"
    assert all((found[1].tokens == other.tokens).all() and (found[1].logprobs == other.logprobs).all()
               for other in found[3:])
