"""Run by test_engine_mesh.py in a process that has 4 virtual devices: a sampler that divides them otherwise."""

import numpy as np
import pytest

from jaxrl_fp16.config import parse_config
from jaxrl_fp16.models import init_params, param_shardings
from jaxrl_fp16.parallel import sampling_mesh
from jaxrl_fp16.plan.programs import lowered
from jaxrl_fp16.training.rollouts.engine import make_engine
from jaxrl_fp16.training.runs.run_config import Config
from jaxrl_fp16.training.runs.setup import make_model, set_up


def setup_with(**mesh):
    return set_up(parse_config(Config, {
        "precision": "fp32", "run": {"platform": "cpu", "compile_cache": None}, "mesh": mesh,
        "model": dict(family="qwen2", hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2,
                      head_dim=8), "task": {"name": "arithmetic"}, "sampling": {"max_new_tokens": 12, "group_size": 2},
        "training": {"prompts_per_step": 4, "minibatch_size": 8, "microbatch_size": 4, "max_prompt_tokens": 6},
    }))


@pytest.fixture(scope="module")
def rollouts():
    """By the tensor axis while sampling, what the same weights and key draw, and where it lies."""
    found = {}
    for wanted in (None, 2, 4):
        setup = setup_with(fsdp=4, rollout_tensor=wanted)
        model = make_model(setup)
        params = init_params(model, setup.keys.weights, setup.mesh)
        tokens = np.tile(np.arange(3, 9, dtype=np.int32), (4, 1))
        rollout = make_engine(setup, model)(params, tokens, np.ones((4, 6), bool), setup.keys.evaluation)
        found[wanted] = rollout, params, model, setup
    return found


def test_the_same_is_drawn(rollouts):
    own = rollouts[None][0]
    for wanted in (2, 4):
        found = rollouts[wanted][0]
        assert np.array_equal(found.tokens, own.tokens) and np.array_equal(found.mask, own.mask)
        np.testing.assert_allclose(found.logprobs, own.logprobs, atol=1e-5)


def test_rollouts_and_weights_lie_as_the_trainer_has_them(rollouts):
    for rollout, params, model, setup in rollouts.values():
        assert rollout.tokens.sharding.shard_shape(rollout.tokens.shape) == (2, 18)
        kernel = params["layers"]["mlp"]["up"]["kernel"]
        expected = param_shardings(model, setup.mesh)["layers"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.is_equivalent_to(expected, kernel.ndim)


def test_a_device_decodes_with_less_of_the_weights(rollouts):
    _, _, model, setup = rollouts[4]
    assert sampling_mesh(setup.config.mesh, setup.mesh).devices.shape == (1, 1, 4)
    args = {wanted: lowered(rollouts[wanted][3], model, "sampler").compile().memory_analysis().temp_size_in_bytes
            for wanted in (None, 4)}
    assert args[4] < args[None]
