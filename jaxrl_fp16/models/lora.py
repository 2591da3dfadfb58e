"""Low-rank adapters (2106.09685): beside a frozen kernel W, `x W + (x A) B scale`, in every program alike.

W is never changed and A B never added to it: what is sampled from is what is trained, to the last bit.
"""

import dataclasses
import math
from typing import Annotated

from annotated_types import Ge, Gt, Lt
import jax

from jaxrl_fp16.config import Doc

COLLECTION = "lora"  # of linen's variables, beside `params`


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters of a Decoder's linear layers."""

    rank: Annotated[int, Ge(1), Doc("rank of the adapters")] = 16
    alpha: Annotated[
        float, Gt(0), Doc("an adapter's product is multiplied by alpha / rank; with lora.rslora by alpha / sqrt(rank)")
    ] = 32.0
    targets: Annotated[
        tuple[str, ...],
        Doc("linear layers with an adapter, as q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; []: all"),
    ] = ()
    rslora: Annotated[bool, Doc("divide alpha by the root of the rank (2312.03732)")] = False
    dropout: Annotated[
        float, Ge(0), Lt(1),
        Doc("share of an adapter's inputs that supervised and preference steps drop; RL allows 0 alone, as a policy "
            "that drops is not the one that samples"),
    ] = 0.0

    def __post_init__(self):
        if self.rank < 1 or not 0 < self.alpha < math.inf or not 0 <= self.dropout < 1:
            raise ValueError(f"rank is {self.rank}, alpha {self.alpha}, dropout {self.dropout}; allowed: rank >= 1, "
                             "0 < alpha < inf, 0 <= dropout < 1")
        given = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets or ())
        object.__setattr__(self, "targets", tuple(dict.fromkeys(name.removesuffix("_proj") for name in given)))

    @property
    def scale(self):
        """What the product of both matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts(self, name):
        """Whether the linear layer of that name, with or without `_proj`, has an adapter."""
        return not self.targets or name.removesuffix("_proj") in self.targets


def uniform_init(key, shape, dtype):
    """A's first values, as PEFT draws them: uniform within 1 / sqrt(its inputs). B begins at 0."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)
