"""A name -> the `jmp.Policy` of every program of a run, and the loss scale that goes with it."""

import dataclasses
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt
from flax import struct
import jax
import jax.numpy as jnp
import jmp

from jaxrl_fp16.config import Doc

POLICIES = {
    "fp16": "params=float32,compute=float16,output=float32",
    "bf16": "params=float32,compute=bfloat16,output=float32",
    "fp32": "params=float32,compute=float32,output=float32",
}
COMPUTE_DTYPES = ("float16", "bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class LossScaleConfig:
    """Dynamic loss scaling. It acts only where the policy computes in float16."""

    initial: Annotated[float, Gt(0), Doc("loss scale at the start")] = 2.0**15
    growth: Annotated[float, Gt(1), Doc("factor by which the loss scale grows")] = 2.0
    growth_interval: Annotated[int, Ge(1), Doc("finite steps in a row after which the loss scale grows")] = 400
    backoff: Annotated[float, Gt(0), Lt(1), Doc("factor that the loss scale is multiplied by when it falls")] = 0.5
    hysteresis: Annotated[int, Ge(1), Doc("steps with non-finite gradients after which the loss scale falls")] = 1
    minimum: Annotated[float, Gt(0), Doc("lowest value of the loss scale")] = 1.0
    maximum: Annotated[float, Gt(0), Le(2.0**126), Doc("highest value of the loss scale")] = 2.0**24

    def __post_init__(self):
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"loss_scale.initial is {self.initial:g}; allowed: minimum <= initial <= maximum, "
                f"here {self.minimum:g} to {self.maximum:g}"
            )


@struct.dataclass
class LossScale:
    """jmp's loss-scale protocol as a pytree of arrays, so that jit, orbax and `tree.map` take it as it is.

    `dynamic=False` (bf16, fp32) keeps the scale as it is and still counts.
    The defaults and the rule of `adjust` are those of mixed-precision training
    (arXiv 1710.03740, section 3.2) with growth, bounds and hysteresis.
    """

    loss_scale: jax.Array  # float32 []: the loss is multiplied by it
    good: jax.Array        # int32 []: finite steps since the scale last changed or a step was skipped
    bad: jax.Array         # int32 []: steps that were not finite since the scale last changed
    skipped: jax.Array     # int32 []: steps that were not finite, since the run began
    config: LossScaleConfig = struct.field(pytree_node=False, default=LossScaleConfig())
    dynamic: bool = struct.field(pytree_node=False, default=True)

    def scale(self, tree):
        """Every leaf times the scale, multiplied in float32 and given back in the leaf's dtype."""
        def scaled(x):
            return (jnp.asarray(x, jnp.float32) * self.loss_scale).astype(jnp.result_type(x))

        return jax.tree.map(scaled, tree)

    def unscale(self, tree):
        """Every leaf divided by the scale, in float32: a float16 leaf would underflow again."""
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) / self.loss_scale, tree)

    def adjust(self, finite):
        """The next loss scale, given whether this step's gradients were finite (bool [])."""
        c = self.config
        finite = jnp.asarray(finite)
        good = jnp.where(finite, self.good + 1, 0)
        bad = jnp.where(finite, self.bad, self.bad + 1)
        grows, falls = good >= c.growth_interval, bad >= c.hysteresis
        scale = self.loss_scale
        if self.dynamic:
            scale = jnp.where(finite & grows, jnp.minimum(scale * c.growth, c.maximum), scale)
            scale = jnp.where(~finite & falls, jnp.maximum(scale * c.backoff, c.minimum), scale)
        return self.replace(
            loss_scale=scale,
            good=jnp.where(grows, 0, good),
            bad=jnp.where((finite & grows) | (~finite & falls), 0, bad),
            skipped=self.skipped + jnp.where(finite, 0, 1),
        )

    @property
    def at_minimum(self):
        """bool []: a dynamic scale that can fall no further."""
        return jnp.asarray(self.dynamic) & (self.loss_scale <= self.config.minimum)


def make_loss_scale(config=LossScaleConfig(), dynamic=True):
    """A fresh `LossScale`; 1 and constant where `dynamic` is false."""
    first = config.initial if dynamic else 1.0
    # A buffer each: the state is donated, and a buffer can be donated once.
    counters = (jnp.zeros((), jnp.int32) for _ in range(3))
    return LossScale(jnp.asarray(first, jnp.float32), *counters, config, dynamic)


@dataclasses.dataclass(frozen=True)
class Precision:
    """What one flag decides: the policy of sampler, scorer and update, and how the loss is scaled."""

    name: str
    policy: jmp.Policy
    loss_scale: LossScale


def get_precision(name, loss_scale=LossScaleConfig()):
    """`"fp16"`, `"bf16"`, `"fp32"`, or free-form `"params=float32,compute=float16,output=float32"`.

    Scaling is dynamic exactly when the policy computes in float16; `loss_scale`
    is its config. Raises ValueError as `get_policy` does.
    """
    policy = get_policy(name)
    dynamic = policy.compute_dtype == jnp.float16
    return Precision(name, policy, make_loss_scale(loss_scale, dynamic))


def get_policy(name):
    """The `jmp.Policy` of a precision's name; makes no array.

    Raises ValueError on any other name or dtype, and on parameters that are not
    float32: those are the masters that Adam adds small steps to.
    """
    if not isinstance(name, str) or (name not in POLICIES and "=" not in name):
        raise ValueError(
            f"precision {name!r} is unknown; allowed: {', '.join(POLICIES)}, or "
            "'params=float32,compute=DTYPE,output=DTYPE'"
        )
    return _parse_policy(name, POLICIES.get(name, name))


def _parse_policy(name, text):
    parts = [part.strip().partition("=") for part in text.split(",")]
    given = {key.strip(): value.strip() for key, _, value in parts}
    if len(given) != len(parts) or set(given) != {"params", "compute", "output"}:
        raise ValueError(f"precision {name!r} must give each of params, compute and output once")
    allowed = {"params": ("float32",), "compute": COMPUTE_DTYPES, "output": COMPUTE_DTYPES}
    for key, value in given.items():
        if value not in allowed[key]:
            raise ValueError(f"precision {name!r}: {key} is {value!r}; allowed: {', '.join(allowed[key])}")
    dtypes = {key: jnp.dtype(value) for key, value in given.items()}
    return jmp.Policy(dtypes["params"], dtypes["compute"], dtypes["output"])


def get_precision_on(platform, name, loss_scale=LossScaleConfig()):
    """`get_precision` of a name that may be `"auto"`, on `cpu`, `gpu` or `tpu`; its `name` is the resolved one."""
    return get_precision(resolve_precision(name, platform), loss_scale)


def resolve_precision(name, platform):
    """`"auto"` -> fp16 on GPU and CPU, bf16 on TPU. Raises ValueError for float16 on a TPU."""
    if name == "auto":
        return "bf16" if platform == "tpu" else "fp16"
    if platform == "tpu" and get_precision(name).policy.compute_dtype == jnp.float16:
        raise ValueError(
            f"precision {name!r} computes in float16, which a TPU's matrix units do not; "
            "allowed on TPU: bf16, fp32"
        )
    return name
