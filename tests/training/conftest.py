"""A model of 4,000 parameters and batches for it, shared by the tests of state, step and updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.models import Critic, Decoder, DecoderConfig, critic_params, init_params
from jaxrl_fp16.precision import LossScaleConfig, get_precision
from jaxrl_fp16.rl import get_algorithm
from jaxrl_fp16.training import init_train_state, make_update, make_value_update
from jaxrl_fp16.types import Batch

VOCAB, COLUMNS = 32, 20


def build_batch(rows=8, columns=COLUMNS, seed=0, **fields):
    """Rows with ragged prompts on the left and ragged responses; `fields` replace any of the Batch."""
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, columns // 3, rows)[:, None]
    ends = generator.integers(2 * columns // 3, columns + 1, rows)[:, None]
    at = np.arange(columns)
    normal = lambda *shape: generator.normal(size=shape).astype(np.float32)
    rollout = -np.abs(normal(rows, columns))
    batch = Batch(
        tokens=generator.integers(0, VOCAB, (rows, columns)).astype(np.int32),
        mask=(at >= starts) & (at < ends),
        response_mask=(at >= columns // 2) & (at < ends),
        rollout_logprobs=rollout,
        old_logprobs=rollout + 0.01 * normal(rows, columns),
        advantages=normal(rows),
        ref_logprobs=rollout + 0.1 * normal(rows, columns),
        values=normal(rows, columns),
        returns=normal(rows, columns),
    )
    return jax.tree.map(jnp.asarray, batch.replace(**fields))


class Toy:
    """A model and its critic, with their states and updates; an update is compiled once for all tests."""

    def __init__(self):
        self.model = Decoder(DecoderConfig(
            family="qwen2", vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4,
            num_kv_heads=2, head_dim=4, tie_embeddings=True))
        self.critic = Critic(self.model)
        self.params = init_params(self.model, jax.random.key(0))
        self.critic_params = critic_params(self.params)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
        self.batch = build_batch

    def start(self, precision="fp32", params=None, **loss_scale):
        scale = get_precision(precision, LossScaleConfig(**loss_scale)).loss_scale
        return init_train_state(params or self.params, self.optimizer, scale, jax.random.key(0))

    @functools.cache
    def update(self, precision="fp32", algorithm=get_algorithm("grpo"), microbatch_size=4, **settings):
        return make_update(self.model, get_precision(precision).policy, algorithm, self.optimizer,
                           microbatch_size=microbatch_size, max_new_tokens=10, **settings)

    @functools.cache
    def value_update(self, precision="fp32", microbatch_size=4):
        policy, algorithm = get_precision(precision).policy, get_algorithm("ppo")
        return make_value_update(self.critic, policy, algorithm, self.optimizer, microbatch_size=microbatch_size)


@pytest.fixture(scope="session")
def toy():
    return Toy()
