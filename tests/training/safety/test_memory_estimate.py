"""The estimate of a run's memory against arrays, and the refusal of what cannot fit."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_fp16.config import parse_config
from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models import Critic, Decoder, DecoderConfig, critic_params, param_shapes
from jaxrl_fp16.precision import get_precision
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.safety.memory import MIB, check_fits, device_bytes, estimate, phases
from jaxrl_fp16.training.updates.optimizer import OptimizerConfig, make_optimizer

HALF, FULL = jnp.dtype("float16"), jnp.dtype("float32")


def needs(toy, data=1, fsdp=1, tensor=1, dtype=HALF, models=None, platform="cpu", phase=1, **sections):
    """Of sampling, phase 0, or of learning."""
    shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
    config = parse_config(Config, sections)
    mesh = SimpleNamespace(shape=shape, devices=np.array([SimpleNamespace(platform=platform)]))
    return phases(config, toy.model, mesh, dtype, **(models or {}))[phase]


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_parameters_and_moments_are_those_of_a_state(toy):
    found = needs(toy)
    opt_state = make_optimizer(OptimizerConfig()).init(toy.params)
    counters = sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state) if leaf.ndim == 0)
    assert found["parameters"] == size(toy.params) and found["gradients"] == 2 * size(toy.params)
    assert found["compute copy"] == 1.5 * size(toy.params), "half precision, and float32 beside it on a CPU"
    assert needs(toy, platform="gpu")["compute copy"] == size(toy.params) / 2
    assert found["Adam's moments"] == size(opt_state) - counters
    assert needs(toy, dtype=FULL)["compute copy"] == size(toy.params)
    assert needs(toy, platform="gpu")["gradients"] == 1.5 * size(toy.params), "those of the rows at work are half"


def test_the_phase_that_takes_more_is_told(toy):
    mesh = SimpleNamespace(shape=dict(data=1, fsdp=1, tensor=1), devices=np.array([SimpleNamespace(platform="cpu")]))
    for rows, own in ((8, "activations"), (4096, "key-value cache")):
        sizes = {"prompts_per_step": rows, "minibatch_size": 8, "microbatch_size": 8}
        config = parse_config(Config, {"training": sizes})
        assert own in estimate(config, toy.model, mesh, HALF)


def test_a_mesh_that_divides_rows_gathers_what_each_device_multiplies_by(toy):
    alone, spread = (needs(toy, fsdp=fsdp, phase=0) for fsdp in (1, 4))
    assert spread["compute copy"] == alone["compute copy"] and spread["parameters"] == alone["parameters"] // 4
    assert needs(toy, fsdp=4)["compute copy"] == needs(toy)["compute copy"] // 4
    c = toy.model.config
    assert needs(toy, fsdp=4)["head"] == 6 * c.vocab_size * c.hidden_size and "head" not in needs(toy)


def test_a_critic_and_a_reference_are_models_too(toy):
    alone, more = needs(toy), needs(toy, models={"reference": True, "critic": Critic(toy.model)})
    assert "reference" not in alone and more["reference"] == alone["parameters"]
    both = size((toy.params, critic_params(toy.params)))
    assert more["parameters"] == both and more["Adam's moments"] == 2 * both


def test_the_cache_is_keys_and_values_of_every_row_and_column(toy):
    c, rows, columns = toy.model.config, 4 * 8, 20 + 12
    sections = dict(training={"prompts_per_step": 4, "minibatch_size": 32, "max_prompt_tokens": 20},
                    sampling={"max_new_tokens": 12})
    whole = needs(toy, phase=0, **sections)["key-value cache"]
    assert whole == 2 * 2 * c.num_layers * rows * c.num_kv_heads * columns * c.head_dim
    assert "prompts' cache" not in needs(toy, phase=0, **sections)
    sections["sampling"] |= {"max_rows": 16}
    half = needs(toy, phase=0, **sections)
    assert half["key-value cache"] == whole // 2
    assert half["prompts' cache"] == whole // rows * 4 // columns * 20
    assert "prompts' cache" not in needs(toy, phase=0, **sections, data=2)


def test_a_mesh_divides_what_it_shares(toy):
    alone, spread = needs(toy), needs(toy, data=2, fsdp=2, tensor=2)
    assert spread["parameters"] == alone["parameters"] // 4
    assert alone["activations"] // 8 < spread["activations"] < alone["activations"] // 3
    alone, spread = needs(toy, phase=0), needs(toy, phase=0, data=2, fsdp=2, tensor=2)
    heads = toy.model.config.num_kv_heads
    assert spread["key-value cache"] == alone["key-value cache"] // (4 if heads % 2 else 8)


@pytest.mark.parametrize("name, dtype", [("fp16", HALF), ("fp32", FULL)])
def test_keeping_activations_takes_what_a_compiled_gradient_takes_more(name, dtype):
    shape = DecoderConfig("qwen2", 50, hidden_size=48, intermediate_size=96, num_layers=24, num_heads=4, num_kv_heads=2,
                          head_dim=16)
    rows = {"microbatch_size": 4, "max_prompt_tokens": 192}
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    policy = get_precision(name).policy

    def both(remat):
        model = Decoder(shape, remat=remat)
        run = lambda params, tokens: jnp.sum(token_logprobs(model, params, tokens, tokens > 0, policy=policy))
        program = jax.jit(jax.grad(run)).lower(param_shapes(model), tokens).compile()
        asked = needs(SimpleNamespace(model=model), dtype=dtype, training=rows, sampling={"max_new_tokens": 64})
        return np.array([asked["activations"], program.memory_analysis().temp_size_in_bytes])

    estimated, compiled = both(False) - both(True)
    assert estimated == pytest.approx(compiled, rel=0.1)


def test_what_cannot_fit_is_refused_with_what_lowers_it():
    check_fits({"parameters": 3 * MIB}, 3 * MIB)
    message = (r"needs about 8 MiB a device and 7 MiB are there \(logits 4 MiB, parameters 3 MiB, cache 1 MiB, ...\); "
               "what lowers it: sampling.max_rows, training.microbatch_size")
    with pytest.raises(ValueError, match=message):
        check_fits({"parameters": 3 * MIB, "logits": 4 * MIB, "cache": MIB, "rest": 1}, 7 * MIB)


def test_a_device_has_memory():
    assert device_bytes(jax.devices()[0]) > 64 * MIB


def test_a_command_counts_its_own_rows(toy):
    sections = dict(training={"prompts_per_step": 64, "max_prompt_tokens": 1000},
                    sft={"microbatch_size": 4, "max_length": 32}, dpo={"microbatch_size": 4, "max_length": 32})
    whole = needs(toy, **sections)
    solutions, pairs, held = (needs(toy, models={"command": command}, **sections) for command in ("sft", "dpo", None))
    waiting = needs(toy, phase=0, models={"command": "sft"}, **sections)
    assert list(held) == ["parameters", "Adam's moments"] == list(waiting)
    assert pairs["activations"] == 2 * solutions["activations"] < whole["activations"] and "reference" not in whole
    few, many = (needs(toy, phase=0, models={"command": "mismatch"}, mismatch={"prompts": 4}, **sections),
                 needs(toy, phase=0, **sections))
    assert few["key-value cache"] == many["key-value cache"] // 16
