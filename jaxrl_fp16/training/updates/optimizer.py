"""The optimizer as data: AdamW with clipping and a schedule, moments in float32."""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
import jax
import optax

from jaxrl_fp16.config import Doc

Leaf = Literal["kernel", "embedding", "head", "bias", "scale"]  # the last name of a parameter's path
ADAPTERS = {"a": "kernel", "b": "kernel"}  # those of an adapter, as what they count


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (1711.05101). A schedule counts the steps that were taken, not those that were skipped."""

    learning_rate: Annotated[float, Ge(0), Doc("highest learning rate, after the warm-up")] = 1e-6
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], Doc("course of the learning rate after the warm-up")
    ] = "constant"
    warmup_steps: Annotated[int, Ge(0), Doc("optimizer steps of a linear rise of the learning rate; 0: no warm-up")] = 0
    decay_steps: Annotated[int, Ge(0), Doc("optimizer steps, warm-up included, of a linear or cosine schedule")] = 0
    final_fraction: Annotated[
        float, Ge(0), Le(1), Doc("share of learning_rate at which a linear or cosine schedule ends")
    ] = 0.0
    b1: Annotated[float, Ge(0), Lt(1), Doc("decay of Adam's first moment")] = 0.9
    b2: Annotated[float, Ge(0), Lt(1), Doc("decay of Adam's second moment")] = 0.999
    eps: Annotated[float, Gt(0), Doc("number added to the root of Adam's second moment")] = 1e-8
    weight_decay: Annotated[float, Ge(0), Doc("weight decay, multiplied by the learning rate; 0: off")] = 0.0
    decayed: Annotated[
        tuple[Leaf, ...],
        Doc("kinds of parameters that weight decay acts on; `scale` is a norm's, an adapter is a kernel")
    ] = ("kernel", "embedding", "head")
    max_grad_norm: Annotated[float, Gt(0), Doc("global norm that larger gradients are scaled down to")] = 1.0

    def __post_init__(self):
        if self.schedule != "constant" and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule {self.schedule!r} with decay_steps {self.decay_steps}; "
                f"allowed: more than warmup_steps, here {self.warmup_steps}"
            )


def make_schedule(config):
    """`step -> learning rate` of an `OptimizerConfig`, an `optax.Schedule`."""
    peak, rest = config.learning_rate, config.decay_steps - config.warmup_steps
    last = config.final_fraction
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * last, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=last),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    # The first step of a warm-up takes 1/warmup of the peak: at learning rate 0 it would do nothing.
    rise = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1)
    return optax.join_schedules([rise, after], [config.warmup_steps])


def make_optimizer(config):
    """The `optax.GradientTransformation` of an `OptimizerConfig`: clip by global norm, then AdamW."""
    adamw = optax.adamw(
        make_schedule(config), b1=config.b1, b2=config.b2, eps=config.eps,
        weight_decay=config.weight_decay, mask=lambda params: _named(config.decayed, params),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _named(names, params):
    kind = lambda name: ADAPTERS.get(name, name)
    return jax.tree_util.tree_map_with_path(lambda path, _: kind(path[-1].key) in names, params)
