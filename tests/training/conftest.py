"""A model of 4,000 parameters and batches for it, shared by the tests of state, step and updates."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.models import Critic, Decoder, DecoderConfig, critic_params, init_params
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


@pytest.fixture(scope="session")
def toy():
    """model, params, critic, critic_params, optimizer, and `batch(rows, columns, seed, **fields)`."""
    model = Decoder(DecoderConfig(family="qwen2", vocab_size=VOCAB, hidden_size=16, intermediate_size=24,
                                  num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, tie_embeddings=True))
    params = init_params(model, jax.random.key(0))
    return SimpleNamespace(
        model=model, params=params, critic=Critic(model), critic_params=critic_params(params), batch=build_batch,
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    )
