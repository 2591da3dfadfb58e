"""What learning starts from: fresh states of policy and critic, and the reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_fp16.models import Critic, Decoder, critic_params, load_pretrained, param_shardings, read_config
from jaxrl_fp16.parallel import to_host_memory
from jaxrl_fp16.rl import needs_critic, needs_reference
from jaxrl_fp16.tokenizer import check_vocabulary
from jaxrl_fp16.training.learn import Learner
from jaxrl_fp16.training.optimizer import make_optimizer
from jaxrl_fp16.training.setup import naming
from jaxrl_fp16.training.state import create_train_state


def make_learner(run, algorithm, params):
    """Fresh states of policy and critic, and the reference where a KL term needs one. Takes `params` over."""
    config, mesh = run.config, run.setup.mesh
    reference = critic = None
    if needs_reference(algorithm):
        reference = jax.tree.map(jnp.copy, params)
        if config.training.reference == "host":
            reference = to_host_memory(reference)
    if needs_critic(algorithm):
        body = params if config.critic.path is None else _critic_body(config, run.setup)
        critic = create_train_state(
            critic_params(body), make_optimizer(config.critic.optimizer), run.setup.critic_precision.loss_scale,
            run.keys[2], param_shardings(critic_model(config, run.model), mesh),
        )
    policy = create_train_state(
        params, make_optimizer(config.optimizer), run.setup.precision.loss_scale, run.keys[2],
        param_shardings(run.model, mesh),
    )
    return Learner(policy, critic, reference)


def critic_model(config, model):
    """The critic's module: of the policy `model`'s shape, or of `critic.path`'s. Reads no weights."""
    if config.critic.path is None:
        return Critic(model)
    with naming("critic"):
        shape = read_config(config.critic.path)
    return Critic(Decoder(shape, attention=model.attention, remat=model.remat, numerics=model.numerics))


def check_critic(setup):
    """Refuses a critic's folder that does not go with the tokenizer, before anything is loaded."""
    path = setup.config.critic.path
    if path is not None:
        with naming("critic"):
            check_vocabulary(setup.tokenizer, read_config(path).vocab_size)


def _critic_body(config, setup):
    compute = setup.critic_precision.policy.compute_dtype
    with naming("critic"):
        _, body = load_pretrained(config.critic.path, mesh=setup.mesh, compute_dtype=compute.name)
    return body


__all__ = ["check_critic", "critic_model", "make_learner"]
