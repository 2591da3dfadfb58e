"""The optimizer as data: AdamW with clipping and a schedule, moments in float32."""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt
import jax
import optax

from jaxrl_fp16.config import Doc

Leaf = Literal["kernel", "embedding", "head", "bias", "scale"]  # the last name of a parameter's path


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (1711.05101). A schedule counts the steps that were taken, not those that were skipped."""

    learning_rate: Annotated[float, Ge(0), Doc("its highest value")] = 1e-6
    schedule: Annotated[Literal["constant", "linear", "cosine"], Doc("after the warm-up")] = "constant"
    warmup_steps: Annotated[int, Ge(0), Doc("optimizer steps of linear rise from 0")] = 0
    decay_steps: Annotated[int, Ge(0), Doc("optimizer steps in all, for linear and cosine")] = 0
    final_fraction: Annotated[float, Ge(0), Le(1), Doc("of learning_rate, where linear and cosine end")] = 0.0
    b1: Annotated[float, Ge(0), Lt(1), Doc("decay of the first moment")] = 0.9
    b2: Annotated[float, Ge(0), Lt(1), Doc("decay of the second moment")] = 0.999
    eps: Annotated[float, Gt(0), Doc("added to the root of the second moment")] = 1e-8
    weight_decay: Annotated[float, Ge(0), Doc("pull towards 0, times the learning rate")] = 0.0
    decayed: Annotated[
        tuple[Leaf, ...], Doc("which parameters it pulls; the weights of norms are `scale`")
    ] = ("kernel", "embedding", "head")
    max_grad_norm: Annotated[float, Gt(0), Doc("gradients are scaled down to this global norm")] = 1.0

    def __post_init__(self):
        if self.schedule != "constant" and self.decay_steps <= self.warmup_steps:
            raise ValueError(
                f"schedule {self.schedule!r} with decay_steps {self.decay_steps}; "
                f"allowed: more than warmup_steps, here {self.warmup_steps}"
            )


def make_schedule(config):
    """`step -> learning rate`, an `optax.Schedule`."""
    peak, rest = config.learning_rate, config.decay_steps - config.warmup_steps
    last = config.final_fraction
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * last, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=last),
    }[config.schedule]()
    if not config.warmup_steps:
        return after
    # The first step of a warm-up takes 1/warmup of the peak: at 0 it would be for nothing.
    rise = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1)
    return optax.join_schedules([rise, after], [config.warmup_steps])


def make_optimizer(config):
    """Clip by global norm, then AdamW."""
    adamw = optax.adamw(
        make_schedule(config), b1=config.b1, b2=config.b2, eps=config.eps,
        weight_decay=config.weight_decay, mask=lambda params: _named(config.decayed, params),
    )
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw)


def _named(names, params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)
