"""The programs of a run's step, of shapes alone: they can be lowered and compiled for devices that are not there.

n: prompts of a step.  B = n * group size: its rows.  P: prompt columns.  T: columns.  M: rows of a minibatch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxrl_fp16.models import param_shapes, param_shardings
from jaxrl_fp16.objectives import needs_critic, needs_reference, needs_scorer
from jaxrl_fp16.parallel import batch_sharding, sampling_mesh, state_shardings
from jaxrl_fp16.sampling.support import support_size
from jaxrl_fp16.training.loops.learn import make_programs
from jaxrl_fp16.training.rollouts.engine import own_sampler
from jaxrl_fp16.training.runs.learner import Learner, critic_model
from jaxrl_fp16.training.runs.run_config import resolve_algorithm
from jaxrl_fp16.training.updates.optimizer import make_optimizer
from jaxrl_fp16.training.updates.state import init_train_state
from jaxrl_fp16.types import Batch, Decisions


def names_of(config):
    """The programs of a config's step, in the order in which they run."""
    algorithm = resolve_algorithm(config)
    own = ["sampler"] if config.rollout.engine == "jit" else []
    critic = ["values", "critic update"] if needs_critic(algorithm) else []
    return [*own, "scorer", *critic, "update"]


def scored_rows(config):
    """Rows that the scorer is given in one call: a step's, or a minibatch's where no loss reads its log-probs."""
    algorithm, t = resolve_algorithm(config), config.training
    whole = t.old_logprobs == "recompute" and needs_scorer(algorithm) or needs_reference(algorithm)
    return t.prompts_per_step * config.sampling.group_size if whole else t.minibatch_size


def with_layers(model, layers):
    """`model` with another number of layers; None: its own."""
    if layers is None:
        return model
    return model.clone(config=dataclasses.replace(model.config, num_layers=layers))


def lowered(setup, model, name):
    """The program of that name, lowered for the Setup's mesh: of all rows that a step gives it, at full width."""
    config, mesh = setup.config, setup.mesh
    t, s = config.training, config.sampling
    rows, columns = t.prompts_per_step * s.group_size, t.max_prompt_tokens + s.max_new_tokens

    if name == "sampler":
        mesh = sampling_mesh(config.mesh, mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    if name == "sampler":
        prompts = array(jnp.int32, t.prompts_per_step, t.max_prompt_tokens)
        mask, key = array(bool, *prompts.shape), jax.eval_shape(lambda: jax.random.key(0))
        return own_sampler(setup, model).lower(params_on(model, mesh, setup.precision), prompts, mask, key)
    learner = learner_on(setup, model)
    algorithm = resolve_algorithm(config)
    critic = critic_model(config, model) if needs_critic(algorithm) else None
    programs = make_programs(setup, algorithm, model, critic, learner)
    kept = support_size(s, model.config.vocab_size)

    def support(count):
        return array(jnp.int32, count, s.max_new_tokens, kept) if kept else None

    tokens, mask = array(jnp.int32, rows, columns), array(bool, rows, columns)
    if name == "scorer":
        scored = scored_rows(config)
        tokens, mask = array(jnp.int32, scored, columns), array(bool, scored, columns)
        return programs.scorer.lower(learner.actor.params, tokens, mask, Decisions(support(scored)))
    if name == "values":
        return programs.valuer.lower(learner.critic.params, tokens, mask)
    count = t.minibatch_size
    grid = array(jnp.float32, count, columns)
    batch = Batch(
        tokens=array(jnp.int32, count, columns), mask=array(bool, count, columns),
        response_mask=array(bool, count, columns), rollout_logprobs=grid, old_logprobs=grid,
        advantages=array(jnp.float32, count) if critic is None else grid,
        ref_logprobs=grid if needs_reference(algorithm) else None,
        values=None if critic is None else grid, returns=None if critic is None else grid, support=support(count),
    )
    if name == "critic update":
        return programs.value_update.lower(learner.critic, batch)
    return programs.update.lower(learner.actor, batch)


def params_on(model, mesh, precision):
    """A model's parameters as shapes that lie on the mesh, a frozen part in the compute dtype of `precision`."""
    return _placed(param_shapes(model, precision.policy.compute_dtype), param_shardings(model, mesh))


def learner_on(setup, model):
    """A run's `Learner` as shapes that lie on the mesh."""
    config, mesh = setup.config, setup.mesh
    algorithm, critic = resolve_algorithm(config), None
    if needs_critic(algorithm):
        critic = _state_on(critic_model(config, model), config.critic.optimizer, setup.critic_precision, mesh)
    apart = needs_reference(algorithm) and model.lora is None
    reference = params_on(model, mesh, setup.precision) if apart else None
    return Learner(_state_on(model, config.optimizer, setup.precision, mesh), critic, reference)


def _state_on(model, optimizer, precision, mesh):
    def make(params):
        return init_train_state(params, make_optimizer(optimizer), precision.loss_scale, jax.random.key(0))

    shapes = jax.eval_shape(make, param_shapes(model, precision.policy.compute_dtype))
    return _placed(shapes, state_shardings(shapes, param_shardings(model, mesh)))


def _placed(shapes, shardings):
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def bytes_on_a_device(tree):
    """Of a pytree of shapes with shardings, what one device holds."""
    return sum(
        jnp.dtype(jnp.uint32).itemsize * 2 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        else x.dtype.itemsize * _count(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def _count(shape):
    count = 1
    for size in shape:
        count *= size
    return count
