"""A model of 4,000 parameters and batches for it, shared by the tests of state, step and updates."""

import functools
import types

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_fp16.forward import token_logprobs
from jaxrl_fp16.models import Critic, Decoder, DecoderConfig, critic_params, init_params
from jaxrl_fp16.objectives import get_algorithm
from jaxrl_fp16.parallel import shard_batch
from jaxrl_fp16.precision import LossScaleConfig, get_precision
from jaxrl_fp16.training.updates import init_train_state, make_update, make_value_update
from jaxrl_fp16.types import Batch

VOCAB, COLUMNS = 32, 20
GRPO = get_algorithm("grpo")


class Bigram(nn.Module):
    """A table in a decoder's place: the next token depends on the current one alone. Its programs compile fast."""

    dtype: jnp.dtype = jnp.dtype("float32")
    config = types.SimpleNamespace(hidden_size=8)

    @nn.compact
    def __call__(self, tokens, segments=None):
        table = self.param("embedding", nn.initializers.normal(1.0), (VOCAB, self.config.hidden_size))
        return jnp.take(table, tokens, axis=0).astype(self.dtype)


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


def recorder():
    """An optimizer that takes no step and keeps the unscaled gradient as its state."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
    return optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(grads), grads))


class Toy:
    """A model and its critic, with their states and updates; an update is compiled once for all tests."""

    recorder = staticmethod(recorder)

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

    @functools.cache  # noqa: B019  one Toy lives as long as the session
    def update(self, precision="fp32", algorithm=GRPO, microbatch_size=4, **settings):
        return make_update(self.model, get_precision(precision).policy, algorithm, self.optimizer,
                           microbatch_size=microbatch_size, max_new_tokens=10, **settings)

    @functools.cache  # noqa: B019
    def value_update(self, precision="fp32", microbatch_size=4):
        policy, algorithm = get_precision(precision).policy, get_algorithm("ppo")
        return make_value_update(self.critic, policy, algorithm, self.optimizer, microbatch_size=microbatch_size)


@pytest.fixture(scope="session")
def toy():
    return Toy()


class Bigrams:
    """Every preset's step, and the critic's, on a `Bigram` in float32: what loss and gradient are, however split."""

    precision = get_precision("fp32")

    def __init__(self):
        self.model = Bigram()
        self.params = init_params_of(self.model)
        body = critic_params(self.params)
        self.critic_params = {**body, "value": {"kernel": 0.3 * jnp.ones((8, 1)), "bias": jnp.zeros(1)}}

    @functools.cached_property
    def batch(self):
        """Log ratios of about 0.2, some within a clip range and some beyond; a row without a token."""
        batch = build_batch(seed=3)
        batch = batch.replace(response_mask=batch.response_mask.at[3].set(False))
        logprobs = token_logprobs(self.model, self.params, batch.tokens, batch.mask, policy=self.precision.policy)
        noise = 0.2 * jax.random.normal(jax.random.key(5), (2, *logprobs.shape))
        return batch.replace(rollout_logprobs=logprobs + noise[0], old_logprobs=logprobs + noise[1])

    def batch_of(self, name):
        per_token = name == "ppo"
        return self.batch.replace(advantages=self.batch.returns) if per_token else self.batch

    def _update(self, name, size):
        shared = dict(microbatch_size=size, max_new_tokens=10)
        if name == "critic":
            critic, algorithm = Critic(self.model), get_algorithm("ppo")
            return make_value_update(critic, self.precision.policy, algorithm, recorder(), **shared)
        return make_update(self.model, self.precision.policy, get_algorithm(name), recorder(), **shared)

    @functools.cache  # noqa: B019
    def program(self, names, sizes):
        """All these updates as one program, which compiles in half the time of each alone."""
        updates = {(name, size): self._update(name, size) for name in names for size in sizes}
        return jax.jit(lambda states, batches: {
            key: update(states[key[0]], batches[key[0]]) for key, update in updates.items()})

    def steps(self, names, sizes, mesh=None, **fields):
        """(name, size) -> `(loss, gradient as one vector, steps taken)`, of presets and the `critic`; on
        `mesh` rows are spread. `fields` replace the batch's."""
        batches = {name: self.batch_of(name).replace(**fields) for name in names}
        states = {
            name: init_train_state(self.critic_params if name == "critic" else self.params, recorder(),
                                   self.precision.loss_scale, jax.random.key(0)) for name in names
        }
        if mesh is not None:
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
            states, batches = jax.device_put(states, everywhere), shard_batch(batches, mesh)
        done = self.program(tuple(names), tuple(sizes))(states, batches)
        flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        return {key: (float(metrics["loss"]), flat(state.opt_state), int(state.step))
                for key, (state, metrics) in done.items()}

    def assert_same(self, found, expected):
        """To 1e-5 of the gradient's norm, and of the loss."""
        (loss, gradient, _), (wanted, exact, _) = found, expected
        np.testing.assert_allclose(loss, wanted, rtol=1e-5)
        assert np.linalg.norm(exact) > 1e-4, "a gradient of nothing shows nothing"
        np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())
        assert np.linalg.norm(gradient - exact) <= 1e-5 * np.linalg.norm(exact)


def init_params_of(model):
    return nn.unbox(model.init(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"])


@pytest.fixture(scope="session")
def bigrams():
    return Bigrams()
