"""What a model's training carries from step to step."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from jaxrl_fp16.models.frozen import (
    DROPOUT, frozen_apart, frozen_back, is_adapted, trained_of, with_trained,
)
from jaxrl_fp16.parallel import state_shardings
from jaxrl_fp16.precision import LossScale


@struct.dataclass
class TrainState:
    """One trained model: the policy's, or the critic's. Updates donate it, but for a frozen part of the parameters."""

    params: Any            # float32 tree: the masters; or {"base", "lora"}, of which the adapters alone are
    opt_state: Any         # optax's state; moments float32
    loss_scale: LossScale
    step: jax.Array        # int32 []: optimizer steps that were taken
    key: jax.Array         # PRNG key; whoever draws from it splits it

    @property
    def trained_params(self):
        """What gradients are taken of and the optimizer moves; its moments mirror this tree."""
        return trained_of(self.params)

    def with_trained(self, params):
        """The state with other `trained_params`."""
        return self.replace(params=with_trained(self.params, params))

    @property
    def sampling_params(self):
        """What a forward computes with: sampler's, scorer's and gradient program's."""
        return self.params

    @property
    def learning_params(self):
        """`sampling_params` as the gradient program takes them: with the key for what adapters drop."""
        if not is_adapted(self.params):
            return self.params
        return {**self.params, DROPOUT: jax.random.fold_in(self.key, self.step)}

    def frozen_apart(self):
        """`(the state without the frozen part of its parameters, that part or None)`; `frozen_back` joins the two."""
        params, frozen = frozen_apart(self.params)
        return self.replace(params=params), frozen

    def frozen_back(self, frozen):
        return self.replace(params=frozen_back(self.params, frozen))


def init_train_state(params, optimizer, loss_scale, key, *, copy=True):
    """A fresh `TrainState` for `optimizer`, an `optax.GradientTransformation`.

    An update deletes the arrays of the state that it is given. With `copy` the
    caller's `params`, `loss_scale` and `key` stay usable; without it they are
    handed over, which saves one copy of the parameters. A frozen part of the parameters, the "base" of `init_lora`,
    is neither copied nor deleted, and has no moments.
    """
    params, frozen = frozen_apart(params)
    if copy:
        params = jax.tree.map(jnp.copy, params)
    loss_scale, key = jax.tree.map(jnp.copy, (loss_scale, key))
    params = frozen_back(params, frozen)
    return TrainState(params, optimizer.init(trained_of(params)), loss_scale, jnp.zeros((), jnp.int32), key)


def create_train_state(params, optimizer, loss_scale, key, param_shardings):
    """`init_train_state` with `params` handed over and every array made where the mesh wants it; a frozen part of them
    lies there already."""
    params, frozen = frozen_apart(params)

    def make(params, key):
        return init_train_state(params, optimizer, loss_scale, key, copy=False)

    shardings = state_shardings(jax.eval_shape(make, params, key), frozen_apart(param_shardings)[0])
    return jax.jit(make, donate_argnums=0, out_shardings=shardings)(params, key).frozen_back(frozen)


def shardings_of(state):
    """Where each array of `state` lies: a tree like it."""
    return jax.tree.map(lambda x: x.sharding, state)
