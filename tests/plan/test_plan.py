"""The command, as far as it goes without a compiler, and once with one."""

import json
import re
import sys

import pytest

from jaxrl_fp16 import cli
from jaxrl_fp16.config import to_dict
from jaxrl_fp16.models import Critic
from jaxrl_fp16.models.init import plain
from jaxrl_fp16.plan import compilers
from jaxrl_fp16.plan.compilers import CompileError, compile_program, find_compiler
from jaxrl_fp16.plan.facts import facts_of
from jaxrl_fp16.plan.programs import lowered, names_of
from jaxrl_fp16.plan.targets import get_target
from jaxrl_fp16.training.runs.run_config import load_for
from jaxrl_fp16.training.runs.setup import make_model, set_up
from jaxrl_fp16.training.safety.memory import parameter_count, trained_count

CONFIG = """
run: {name: toy}
model: {family: qwen2, hidden_size: 64, intermediate_size: 96, num_layers: 2, num_heads: 4, num_kv_heads: 2,
  head_dim: 16}
task: {name: arithmetic}
sampling: {max_new_tokens: 64, group_size: 4}
training: {prompts_per_step: 8, minibatch_size: 32, microbatch_size: 8, max_prompt_tokens: 16}
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "toy.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def without(monkeypatch, tmp_path):
    """No compiler is installed."""
    monkeypatch.setenv(compilers.FOLDER, str(tmp_path / "none"))
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(("flags", "told"), [
    ((), "plan.target is not given: --target TARGET; allowed: h100 or h200"),
    (("--target", "h100"), "plan.target: target 'h100' is unknown"),
    (("--target", "h100x8"), "the compiler for a GPU is not installed in .*none; launch/compilers.sh puts it there"),
    (("--target", "v5e-4", "--precision", "fp16"), "the compiler for a TPU is not installed"),
    (("--plan.seconds", "0"), "plan.seconds"),
])
def test_what_is_refused(config, without, capsys, flags, told):
    assert cli.main(["plan", str(config), *flags]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_compiler_is_found_in_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(compilers.FOLDER, str(tmp_path))
    (tmp_path / "tpu" / "libtpu").mkdir(parents=True)
    assert find_compiler("tpu") == [str(tmp_path / "tpu")]
    assert not compilers.has_cudnn([str(tmp_path / "tpu")])
    (tmp_path / "tpu" / "nvidia" / "cudnn").mkdir(parents=True)
    assert compilers.has_cudnn([str(tmp_path / "tpu")])


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A stand-in for the process that compiles: `child(python program)`."""
    monkeypatch.setattr(compilers, "find_compiler", lambda platform: [])
    real = compilers.subprocess.run

    def standing_in(text):
        script = tmp_path / "child.py"
        script.write_text(text)
        run = lambda command, **given: real([sys.executable, str(script)], **given)
        monkeypatch.setattr(compilers.subprocess, "run", run)
    return standing_in


@pytest.mark.parametrize(("text", "told"), [
    ("import sys; sys.exit('E0 one\\njax.errors.JaxRuntimeError: a b  c\\n  file.py:1:2 [f]')",
     "h100x8 did not take the update: jax.errors.JaxRuntimeError: a b c"),
    ("import os, sys; print('F0 algorithm.cc:5898 Check failed: x\\n  @ stack', file=sys.stderr, flush=True); "
     "os.abort()",
     "ended by SIGABRT, F0 algorithm.cc:5898 Check failed: x"),
    ("import sys; sys.exit(3)", "it said nothing"),
    ("import time; time.sleep(60)", "had not finished the update after 1 s; allowed: a larger plan.seconds"),
])
def test_a_failed_compiler_is_one_line(child, text, told):
    child(text)
    with pytest.raises(CompileError, match=told) as error:
        compile_program({}, get_target("h100x8"), "update", seconds=1)
    assert "\n" not in str(error.value)


def test_a_gpus_program_is_tried_with_the_librarys_matmuls_too(child):
    child("import os, sys\nif 'triton_gemm=false' not in os.environ['XLA_FLAGS']: sys.exit('INTERNAL: no tile')\n"
          "print('{\"dots\": []}')")
    assert compile_program({}, get_target("h100x8"), "update") == {"dots": [], "otherwise": True}


def test_a_refused_config_is_no_failure_of_the_compiler(child):
    child("print('noise'); print('{\"refused\": \"mesh of 3\"}')")
    with pytest.raises(ValueError, match="mesh of 3"):
        compile_program({}, get_target("h100x8"), "update")


def test_the_programs_of_a_step(config):
    names = lambda *flags: names_of(load_for("plan", config, flags))
    assert names() == ["sampler", "scorer", "update"]
    assert names("--algorithm.preset", "ppo") == ["sampler", "scorer", "values", "critic update", "update"]
    assert "sampler" not in names("--rollout.engine", "transformers")


@pytest.mark.parametrize("flags", [
    (), ("--algorithm.preset", "ppo", "--algorithm.kl_coef", "0.1"), ("--sampling.top_k", "4"),
    ("--sampling.max_rows", "8", "--training.microbatch_tokens", "200"), ("--training.old_logprobs", "rollout"),
])
def test_every_program_of_a_step_can_be_lowered_from_shapes(config, flags):
    given = load_for("plan", config, (*flags, "--platform", "cpu", "--run.compile_cache", "null"))
    setup = set_up(given)
    model = make_model(setup)
    for name in names_of(given):
        assert "func.func public @main" in lowered(setup, model, name).as_text(), name
    facts = facts_of(setup, model)
    assert facts["scored"] == (2 if "ppo" in flags else 1)
    assert (facts["learner"]["critic"] > 0) == ("ppo" in flags)


def test_every_program_with_adapters_can_be_lowered_and_reckoned(config):
    """PPO with a KL term: policy, critic and reference share what is frozen, which is half of float32's bytes."""
    flags = ("--platform", "cpu", "--run.compile_cache", "null", "--precision", "fp16", "--algorithm.preset", "ppo",
             "--algorithm.kl_coef", "0.1")
    facts = {}
    for rank in ("null", "4"):
        given = load_for("plan", config, (*flags, "--lora.rank", rank))
        setup = set_up(given)
        model = make_model(setup)
        facts[rank] = facts_of(setup, model)
    assert names_of(given) == ["sampler", "scorer", "values", "critic update", "update"]
    for name in names_of(given):
        assert "func.func public @main" in lowered(setup, model, name).as_text(), name
    whole, few = facts["null"], facts["4"]
    count, own = parameter_count(plain(model)), trained_count(model)
    needs, learner = few["estimate"], few["learner"]
    assert needs["frozen weights"] == 2 * count and "reference" not in needs and "reference" in whole["estimate"]
    assert needs["parameters"] == 4 * (own + trained_count(Critic(model))) < whole["estimate"]["parameters"] / 8
    assert needs["Adam's moments"] == 2 * needs["parameters"]
    assert learner["reference"] == 0 < whole["learner"]["reference"]
    assert learner["policy parameters"] == 2 * count + 4 * own
    assert few["scored"] == whole["scored"] == 2
    # Two matmuls of three remain of a frozen kernel, and the adapters add their own.
    assert 0.6 < few["flops"]["update"] / whole["flops"]["update"] < 0.95
    assert few["flops"]["decode"] > whole["flops"]["decode"]


@pytest.mark.aot
def test_a_page_for_two_gpus(config, tmp_path, capsys):
    try:
        find_compiler("gpu")
    except ValueError as error:
        pytest.skip(str(error))
    flags = ("--target", "h100x2", "--mesh.fsdp", "2", "--plan.output", str(tmp_path / "out"))
    code = cli.main(["plan", str(config), *flags])
    assert code == 0 and "It fits: the " in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["chips"] == 2 and set(found["programs"]) == {"sampler", "scorer", "update"}
    assert found["facts"]["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1} and found["facts"]["precision"] == "fp16"
    assert "NVIDIA" in (tmp_path / "out" / "plan.html").read_text()


@pytest.mark.aot
def test_what_is_wrong_with_the_config_is_said_as_in_a_run(config):
    try:
        find_compiler("gpu")
    except ValueError as error:
        pytest.skip(str(error))
    plain = to_dict(load_for("plan", config, ("--mesh.fsdp", "3")))
    with pytest.raises(ValueError, match="mesh of data .* does not fit 2 devices"):
        compile_program(plain, get_target("h100x2"), None)
