"""Direct preference optimization: a loss on pairs of responses, without sampling and without a reward model.

B: pairs.  T: columns, of chosen and rejected rows each their own.
"""

import dataclasses
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.config import Doc
from jaxrl_fp16.masking import masked_sum
from jaxrl_fp16.objectives.metrics import mean_metric, normalizer_of


def sigmoid(config, h):
    """`-(1-e)*log sigmoid(beta*h) - e*log sigmoid(-beta*h)` (DPO, arXiv 2305.18290); e: the chance of a wrong label."""
    right, wrong = jax.nn.log_sigmoid(config.beta * h), jax.nn.log_sigmoid(-config.beta * h)
    return -(1.0 - config.label_smoothing) * right - config.label_smoothing * wrong


def ipo(config, h):
    """`(h - 1/(2*beta))^2` (IPO, arXiv 2310.12036): bounded even where the data never contradict themselves."""
    return (h - 0.5 / config.beta) ** 2


# name -> (config, h [B]) -> loss [B]
PREFERENCE_LOSSES = {"sigmoid": sigmoid, "ipo": ipo}


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
    """What `dpo_loss` computes."""

    loss: Annotated[
        Literal[*PREFERENCE_LOSSES], Doc("preference loss; sigmoid is DPO, ipo a squared distance")
    ] = "sigmoid"
    beta: Annotated[float, Gt(0), Doc("how strongly the preference loss holds the policy to the reference")] = 0.1
    label_smoothing: Annotated[
        float, Ge(0), Lt(0.5), Doc("dpo.loss sigmoid: chance that a preference is labelled the wrong way round")
    ] = 0.0

    def __post_init__(self):
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is {self.label_smoothing} with loss {self.loss!r}; allowed: 0")


def dpo_loss(
    config,
    *,
    chosen_logprobs,
    rejected_logprobs,
    ref_chosen_logprobs,
    ref_rejected_logprobs,
    chosen_mask,
    rejected_mask,
    normalizer=None,
):
    """The mean loss of a batch's pairs, or a microbatch's share of it.

        h = sum_t(lp_c - ref_c) - sum_t(lp_r - ref_r);  loss = mean_b(l(h)),  l out of `PREFERENCE_LOSSES`

    Sums run over response tokens; `ipo` too takes sums, not means over tokens. Where a
    mask is 0 every array may hold anything. A pair of which one response has no token
    counts nowhere; without any pair loss and gradient are 0.

    Args:
      config: a `PreferenceConfig`; static under `jit`.
      chosen_logprobs, rejected_logprobs: [B,T], under the policy that trains; they carry the gradient.
      ref_chosen_logprobs, ref_rejected_logprobs: [B,T], under the frozen reference; constants.
      chosen_mask, rejected_mask: [B,T], bool or 0/1: response tokens.
      normalizer: the batch's, from `pair_normalizer`, when these pairs are one of its
        microbatches: the losses then sum to the batch's. None: the pairs are a batch.

    Returns:
      `(loss, metrics)`, float32 scalars. `metrics` holds means over pairs: the implicit rewards
      `chosen_reward` and `rejected_reward`, `beta * sum_t(lp - ref)`; `reward_margin`, their
      difference; `accuracy`, the share of pairs with a margin above 0, one of exactly 0, as
      at the start, being half right; `chosen_likelier`, the share whose chosen response has
      the larger log-prob; `chosen_logprob` and `rejected_logprob`, summed over the response.
      With a `normalizer` they are shares, which add up.
    """
    counted = _counted(chosen_mask, rejected_mask)
    normalizer = pair_normalizer(chosen_mask, rejected_mask) if normalizer is None else normalizer

    def mean(x):
        return mean_metric(x[:, None], counted[:, None], normalizer)

    chosen, rejected = masked_sum(chosen_logprobs, chosen_mask, 1), masked_sum(rejected_logprobs, rejected_mask, 1)
    chosen_ratio = chosen - lax.stop_gradient(masked_sum(ref_chosen_logprobs, chosen_mask, 1))
    rejected_ratio = rejected - lax.stop_gradient(masked_sum(ref_rejected_logprobs, rejected_mask, 1))
    h = chosen_ratio - rejected_ratio
    loss = mean(PREFERENCE_LOSSES[config.loss](config, h))
    metrics = {
        "reward_margin": mean(config.beta * h),
        "accuracy": mean(0.5 * (1.0 + jnp.sign(h))),
        "chosen_reward": mean(config.beta * chosen_ratio),
        "rejected_reward": mean(config.beta * rejected_ratio),
        "chosen_likelier": mean(chosen > rejected),
        "chosen_logprob": mean(chosen),
        "rejected_logprob": mean(rejected),
    }
    return loss, jax.tree.map(lax.stop_gradient, metrics)


def pair_normalizer(chosen_mask, rejected_mask):
    """The `Normalizer` of a whole batch of pairs, masks [B,T]: its `responses` are the pairs that count."""
    return normalizer_of(_counted(chosen_mask, rejected_mask)[:, None])


def _counted(chosen_mask, rejected_mask):
    """bool [B]: both responses have a token."""
    return jnp.any(chosen_mask.astype(bool), axis=1) & jnp.any(rejected_mask.astype(bool), axis=1)
