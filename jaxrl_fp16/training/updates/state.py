"""What a model's training carries from step to step."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_fp16.parallel import state_shardings
from jaxrl_fp16.precision import LossScale


@struct.dataclass
class TrainState:
    """One trained model: the policy's, or the critic's. Updates donate it."""

    params: Any            # float32 tree: the masters
    opt_state: Any         # optax's state; moments float32
    loss_scale: LossScale
    step: jax.Array        # int32 []: optimizer steps that were taken
    key: jax.Array         # PRNG key; whoever draws from it splits it

    @property
    def trained_params(self):
        """What gradients are taken of and the optimizer moves; its moments mirror this tree."""
        return self.params

    def with_trained(self, params):
        """The state with other `trained_params`."""
        return self.replace(params=params)

    @property
    def sampling_params(self):
        """What a forward computes with: sampler's, scorer's and gradient program's."""
        return self.params


def init_train_state(params, optimizer, loss_scale, key, *, copy=True):
    """A fresh `TrainState` for `optimizer`, an `optax.GradientTransformation`.

    An update deletes the arrays of the state that it is given. With `copy` the
    caller's `params`, `loss_scale` and `key` stay usable; without it they are
    handed over, which saves one copy of the parameters.
    """
    if copy:
        params = jax.tree.map(jnp.copy, params)
    loss_scale, key = jax.tree.map(jnp.copy, (loss_scale, key))
    return TrainState(params, optimizer.init(params), loss_scale, jnp.zeros((), jnp.int32), key)


def create_train_state(params, optimizer, loss_scale, key, param_shardings):
    """`init_train_state` with `params` handed over and every array made where the mesh wants it."""

    def make(params, key):
        return init_train_state(params, optimizer, loss_scale, key, copy=False)

    shardings = state_shardings(jax.eval_shape(make, params, key), param_shardings)
    return jax.jit(make, donate_argnums=0, out_shardings=shardings)(params, key)


def shardings_of(state):
    """Where each array of `state` lies: a tree like it."""
    return jax.tree.map(lambda x: x.sharding, state)
