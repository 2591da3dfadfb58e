"""Algorithms as data: the policy losses of a token, the settings of all parts, and presets of them.

A new algorithm is a row of `PRESETS`; a new loss a function and a row of `LOSSES`, its settings fields of
`AlgorithmConfig`. What is added to another part's table can be named at once.

B: rows (responses).  T: columns.

`m`: mask.  `lp`, `old`: log-probs of the sampled tokens under the policy that trains, and under the scorer with
the sampling weights.  `A`: advantages.  All is float32.
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Le
from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from pydantic import FiniteFloat, TypeAdapter, ValidationError

from jaxrl_fp16.config import Doc
from jaxrl_fp16.masking import masked_sum
from jaxrl_fp16.objectives.advantages import BASELINES
from jaxrl_fp16.objectives.aggregation import AGGREGATIONS
from jaxrl_fp16.objectives.importance import IMPORTANCES, LEVELS, clamp_log_ratio
from jaxrl_fp16.objectives.kl import KL_ESTIMATORS


@struct.dataclass
class TokenLoss:
    """A policy loss before weights and aggregation."""

    loss: jax.Array                     # float32 [B,T]
    log_ratio: jax.Array | None = None  # float32 [B,T], or [B,1] for a ratio per row: lp - old, unclamped
    cut: jax.Array | None = None        # bool [B,T]: clipping took the token's gradient or bounded its weight


def _clip_ratio(algorithm, ratio):
    # lax.clamp passes the whole gradient inside and none outside.
    return lax.clamp(1.0 - algorithm.clip_low, ratio, 1.0 + algorithm.clip_high)


def _clipped_surrogate(algorithm, ratio, advantages):
    """`-min(r*A, clip(r)*A)` and where the clipped term was taken."""
    plain, clipped = ratio * advantages, _clip_ratio(algorithm, ratio) * advantages
    # Not jnp.minimum: it halves the gradient of a tie, and an unclipped ratio always ties.
    cut = clipped < plain
    return -jnp.where(cut, clipped, plain), cut


def ppo_clip(algorithm, lp, old, _, advantages):
    """PPO's clipped surrogate (arXiv 1707.06347), optionally dual-clipped (arXiv 1912.09729).

        r = exp(lp - old);  l = -min(r*A, clip(r, 1 - clip_low, 1 + clip_high)*A)
        with dual_clip c and A < 0: l = min(l, -c*A)
    """
    log_ratio = lp - old
    loss, cut = _clipped_surrogate(algorithm, jnp.exp(clamp_log_ratio(log_ratio)), advantages)
    if algorithm.dual_clip is not None:
        bound = -algorithm.dual_clip * advantages
        beyond = (advantages < 0) & (bound < loss)
        loss, cut = jnp.where(beyond, bound, loss), cut | beyond
    return TokenLoss(loss, log_ratio, cut)


def gspo(algorithm, lp, old, mask, advantages):
    """Group sequence policy optimization in its token form (arXiv 2507.18071).

        s_b = exp(sum_t m*(lp - old) / n_b);  s = sg(s_b) * exp(lp - sg(lp))
        l = -min(s*A, clip(s, 1 - clip_low, 1 + clip_high)*A)
    """
    tokens = jnp.sum(mask.astype(bool), axis=1, keepdims=True)
    log_ratio = masked_sum(lp - old, mask, axis=1)[:, None] / jnp.maximum(tokens, 1)
    # The sum of logs is the definition's product, and lets the clamp stop the gradient as it does elsewhere.
    ratio = jnp.exp(clamp_log_ratio(lax.stop_gradient(log_ratio) + (lp - lax.stop_gradient(lp))))
    loss, cut = _clipped_surrogate(algorithm, ratio, advantages)
    return TokenLoss(loss, log_ratio, cut)


def cispo(algorithm, lp, old, _, advantages):
    """Clipped importance weights on a policy gradient (arXiv 2506.13585).

        w = sg(clip(exp(lp - old), 1 - clip_low, 1 + clip_high));  l = -w*A*lp
    """
    log_ratio = lp - old
    ratio = lax.stop_gradient(jnp.exp(clamp_log_ratio(log_ratio)))
    weight = _clip_ratio(algorithm, ratio)
    return TokenLoss(-weight * advantages * lp, log_ratio, weight != ratio)


def pg(_algorithm, lp, _old, _mask, advantages):
    """The policy gradient: `l = -A*lp`; its importance weight comes from `sg(lp)` and `mu`."""
    return TokenLoss(-advantages * lp)


# name -> (algorithm, lp [B,T], old [B,T], mask [B,T], advantages [B,T]) -> TokenLoss
LOSSES = {"ppo_clip": ppo_clip, "gspo": gspo, "cispo": cispo, "pg": pg}
# These never read `old`: their importance weight is taken between the current policy and the sampler.
SCORER_FREE_LOSSES = frozenset({"pg"})


# -- settings ------------------------------------------------------------------------------------

Share = Annotated[float, Ge(0), Le(1)]
Positive = Annotated[float, Gt(0)]
AboveOne = Annotated[float, Gt(1)]
NotNegative = Annotated[FiniteFloat, Ge(0)]

# Which bounds each correction reads.
REQUIRED_BOUNDS = {"tis": ("cap",), "mis": ("cap",), "icepop": ("cap", "floor")}


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """An RL algorithm. The defaults are those of `grpo`; `get_algorithm` starts from a preset instead.

    Raises:
      ValueError: for a value or a combination of values that is not allowed.
    """

    preset: Annotated[str, Doc("label: the row of PRESETS that the algorithm started from")] = "grpo"
    advantage: Annotated[
        Literal[*BASELINES, "gae"], Doc("how advantages are made: by a group's baseline, or gae with a critic")
    ] = "group_std"
    loss: Annotated[Literal[*LOSSES], Doc("policy loss of a token")] = "ppo_clip"
    clip_low: Annotated[Positive, Doc("ppo_clip, gspo, cispo: policy ratio clipped below at 1 - clip_low")] = 0.2
    clip_high: Annotated[Positive, Doc("ppo_clip, gspo, cispo: policy ratio clipped above at 1 + clip_high")] = 0.2
    dual_clip: Annotated[
        AboveOne | None, Doc("ppo_clip: upper bound of the policy ratio where the advantage is negative; null: off")
    ] = None
    importance: Annotated[Literal[*IMPORTANCES], Doc("importance correction for the sampler's distribution")] = "none"
    level: Annotated[Literal[*LEVELS], Doc("whether an importance weight is per token or per response")] = "token"
    cap: Annotated[
        Positive | None, Doc("bound above which tis truncates importance weights and mis and icepop drop them")
    ] = None
    floor: Annotated[NotNegative | None, Doc("bound below which icepop drops importance weights")] = None
    aggregation: Annotated[Literal[*AGGREGATIONS], Doc("how losses of tokens and rows become one")] = "sequence_mean"
    kl: Annotated[Literal[*KL_ESTIMATORS], Doc("estimator of the KL term in the loss")] = "k3"
    kl_in: Annotated[Literal["loss", "reward"], Doc("what the KL term is added to")] = "loss"
    kl_coef: Annotated[NotNegative, Doc("weight of the KL term; 0: off, no reference model")] = 0.0
    entropy_coef: Annotated[FiniteFloat, Doc("weight of the entropy bonus; 0: off")] = 0.0
    value_clip: Annotated[Positive, Doc("gae: distance from the old value at which the value loss is clipped")] = 0.2
    discount: Annotated[Share, Doc("gae: discount between two response tokens")] = 1.0
    gae_lambda: Annotated[Share, Doc("gae: lambda; 1 is Monte Carlo, 0 is one-step")] = 1.0
    dynamic_sampling: Annotated[bool, Doc("replace groups of equal reward by fresh ones")] = False
    overlong_penalty: Annotated[
        NotNegative | None, Doc("zone of the length penalty: tokens, or below 1 a share of max_new_tokens; 0: off")
    ] = None

    def __post_init__(self):
        for name, check in _field_checks().items():
            try:
                check.validate_python(getattr(self, name), strict=True)
            except ValidationError as error:
                raise ValueError(f"{name} is {getattr(self, name)!r}; {error.errors()[0]['msg']}") from None
        for bound in REQUIRED_BOUNDS.get(self.importance, ()):
            if getattr(self, bound) is None:
                raise ValueError(f"{bound} is None; importance {self.importance!r} needs a number")
        if self.importance == "icepop" and self.level != "token":
            raise ValueError(f"level is {self.level!r}; importance 'icepop' allows 'token'")
        if self.importance == "icepop" and self.floor > self.cap:
            raise ValueError(f"floor is {self.floor}; allowed: at most cap {self.cap}")
        if self.dual_clip is not None and self.loss != "ppo_clip":
            raise ValueError(f"dual_clip is {self.dual_clip}; loss {self.loss!r} allows None")


@functools.cache
def _field_checks():
    """A pydantic check for each field, from its annotation."""
    hints = get_type_hints(AlgorithmConfig, include_extras=True)
    return {field.name: TypeAdapter(hints[field.name]) for field in dataclasses.fields(AlgorithmConfig)}


def _row(advantage, loss, clip, correction, aggregation, **fields):
    """A preset's fields, in the columns of the literature's tables."""
    low, high = clip
    clipping = dict(clip_low=low, clip_high=high)
    return dict(advantage=advantage, loss=loss, aggregation=aggregation, **clipping, **correction, **fields)


CLIP = (0.2, 0.2)
NONE = dict(importance="none")
TOKEN_IS = dict(importance="is", level="token")
TOKEN_TIS = dict(importance="tis", level="token", cap=2.0)
TOKEN_ICEPOP = dict(importance="icepop", level="token", cap=5.0, floor=0.5)
SEQUENCE_IS = dict(importance="is", level="sequence")
SEQUENCE_TIS = dict(importance="tis", level="sequence", cap=10.0)
SEQUENCE_MIS = dict(importance="mis", level="sequence", cap=10.0)

# name -> fields of its AlgorithmConfig; pg reads no clip range
PRESETS: dict[str, dict[str, Any]] = {
    "grpo": _row("group_std", "ppo_clip", CLIP, NONE, "sequence_mean"),
    "dr_grpo": _row("group_mean", "ppo_clip", CLIP, NONE, "fixed_length"),
    "grpo_token_tis": _row("group_mean", "ppo_clip", CLIP, TOKEN_TIS, "fixed_length"),
    "grpo_seq_mis": _row("group_mean", "ppo_clip", CLIP, SEQUENCE_MIS, "fixed_length"),
    "grpo_icepop": _row("group_mean", "ppo_clip", CLIP, TOKEN_ICEPOP, "fixed_length"),
    "gspo": _row("group_std", "gspo", (3e-4, 4e-4), NONE, "sequence_mean"),
    "pg_seq_is": _row("group_mean", "pg", CLIP, SEQUENCE_IS, "fixed_length"),
    "pg_seq_tis": _row("group_mean", "pg", CLIP, SEQUENCE_TIS, "fixed_length"),
    "pg_seq_mis": _row("group_mean", "pg", CLIP, SEQUENCE_MIS, "fixed_length"),
    "pg_token_is": _row("group_mean", "pg", CLIP, TOKEN_IS, "fixed_length"),
    "pg_token_tis": _row("group_mean", "pg", CLIP, TOKEN_TIS, "fixed_length"),
    "reinforce": _row("group_mean", "pg", CLIP, NONE, "fixed_length"),
    "rloo": _row("leave_one_out", "ppo_clip", CLIP, NONE, "fixed_length"),
    "cispo": _row("group_std", "cispo", (1.0, 4.0), NONE, "token_mean"),
    # The zone's share of the limit is the paper's: 4,096 of 20,480 tokens (arXiv 2503.14476).
    "dapo": _row(
        "group_std", "ppo_clip", (0.2, 0.28), NONE, "token_mean", dynamic_sampling=True, overlong_penalty=0.2
    ),
    "ppo": _row("gae", "ppo_clip", CLIP, NONE, "token_mean", discount=1.0, gae_lambda=1.0),
}


def get_algorithm(name, **overrides):
    """The preset `name` with some fields replaced, e.g. `get_algorithm("grpo", clip_high=0.28)`.

    Raises:
      ValueError: for an unknown preset or field, or a value that is not allowed.
    """
    if name not in PRESETS:
        raise ValueError(f"algorithm {name!r} is unknown; allowed: {', '.join(PRESETS)}")
    allowed = [field.name for field in dataclasses.fields(AlgorithmConfig) if field.name != "preset"]
    for key in overrides:
        if key not in allowed:
            raise ValueError(f"algorithm field {key!r} is unknown; allowed: {', '.join(allowed)}")
    return AlgorithmConfig(preset=name, **{**PRESETS[name], **overrides})
