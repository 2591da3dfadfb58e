"""What learns: the states of policy and critic, the reference, and how a run makes or finds them.

Four sets of weights have names of their own, whatever they are made of: what is trained and what sampler and
scorer compute with (`TrainState.trained_params`, `sampling_params`), what a checkpoint keeps (`Learner.saved`), and
what a KL term refers to (`Learner.reference_params`).
"""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_fp16.config import naming
from jaxrl_fp16.models import Critic, Decoder, critic_params, init_lora, load_pretrained, param_shardings, read_config
from jaxrl_fp16.models.frozen import is_adapted, without_adapters
from jaxrl_fp16.objectives import needs_critic, needs_reference
from jaxrl_fp16.parallel import to_device_memory, to_host_memory
from jaxrl_fp16.tokenizer import check_vocabulary
from jaxrl_fp16.training.updates.optimizer import make_optimizer
from jaxrl_fp16.training.updates.state import TrainState, create_train_state


@struct.dataclass
class Learner:
    """Everything that learning changes, and what it is held against."""

    actor: TrainState                 # of the policy
    critic: TrainState | None = None  # with PPO
    reference: Any | None = None      # float32 parameters, with a KL term; in device or host memory. None with adapters

    @property
    def sampling_params(self):
        """What sampler, scorer and evaluation compute with, and an export writes."""
        return self.actor.sampling_params

    @property
    def reference_params(self):
        """What a KL term refers to, in device memory: with adapters the policy without them, no copy."""
        if self.reference is None:
            return without_adapters(self.actor.params)
        return to_device_memory(self.reference)

    def saved(self):
        """What a checkpoint keeps, by its names on the disk."""
        return {"policy": self.actor, "critic": self.critic, "reference": self.reference}

    @classmethod
    def of_saved(cls, found):
        """The Learner of what a checkpoint kept."""
        return cls(found["policy"], found["critic"], found["reference"])


def make_learner(run, algorithm, params):
    """Fresh states of policy and critic, and the reference where a KL term needs one. Takes `params` over.

    With adapters policy, critic and reference share what is frozen; the critic has adapters and a head of its own.
    """
    config, mesh = run.config, run.setup.mesh
    reference = critic = None
    if needs_reference(algorithm) and not is_adapted(params):
        reference = jax.tree.map(jnp.copy, params)
        if config.training.reference == "host":
            reference = to_host_memory(reference)
    if needs_critic(algorithm):
        body = params if config.critic.path is None else _critic_body(config, run.setup, run.model)
        critic = create_train_state(
            critic_params(body), make_optimizer(config.critic.optimizer), run.setup.critic_precision.loss_scale,
            run.setup.keys.learning, param_shardings(critic_model(config, run.model), mesh),
        )
    actor = create_train_state(
        params, make_optimizer(config.optimizer), run.setup.precision.loss_scale, run.setup.keys.learning,
        param_shardings(run.model, mesh),
    )
    return Learner(actor, critic, reference)


def critic_model(config, model):
    """The critic's module: of the policy `model`'s shape, or of `critic.path`'s. Reads no weights."""
    if config.critic.path is None:
        return Critic(model)
    with naming("critic"):
        shape = read_config(config.critic.path)
    others = dict(attention=model.attention, remat=model.remat, numerics=model.numerics, lora=model.lora)
    return Critic(Decoder(shape, **others))


def check_critic(setup):
    """Refuses a critic's folder that does not go with the tokenizer, before anything is loaded."""
    path = setup.config.critic.path
    if path is not None:
        with naming("critic"):
            check_vocabulary(setup.tokenizer, read_config(path).vocab_size)


def _critic_body(config, setup, model):
    policy, adapted = setup.critic_precision.policy, model.lora is not None
    compute = policy.compute_dtype.name
    with naming("critic"):
        _, body = load_pretrained(config.critic.path, mesh=setup.mesh, compute_dtype=compute,
                                  dtype=compute if adapted else "float32")
        if not adapted:
            return body
        key = jax.random.fold_in(setup.keys.weights, 2)
        return init_lora(critic_model(config, model).body, body, key, policy=policy)
