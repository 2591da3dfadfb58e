"""What an algorithm needs of a run: a scorer, a reference, a critic, groups of responses."""

from jaxrl_fp16.objectives.algorithms import SCORER_FREE_LOSSES


def needs_scorer(algorithm):
    """Whether loss or reward reads `old`, so that every minibatch needs the scorer's log-probs."""
    in_reward = needs_reference(algorithm) and algorithm.kl_in == "reward"
    return in_reward or algorithm.loss not in SCORER_FREE_LOSSES


def needs_reference(algorithm):
    """Whether a KL term, in the loss or in the reward, reads the reference's log-probs."""
    return algorithm.kl_coef > 0


def needs_critic(algorithm):
    """Whether advantages come from a critic's values."""
    return algorithm.advantage == "gae"


def check_algorithm(algorithm, group_size, old_logprobs="recompute"):
    """Refuses what the algorithm cannot learn from.

    Args:
      algorithm: an `AlgorithmConfig`.
      group_size: responses a prompt.
      old_logprobs: `recompute` by the scorer, or `rollout` for the sampler's own.

    Raises:
      ValueError: for a group without a baseline, for dynamic sampling of single
        responses, and for an importance weight that would be 1 by construction.
    """
    if old_logprobs not in ("recompute", "rollout"):
        raise ValueError(f"old_logprobs is {old_logprobs!r}; allowed: recompute, rollout")
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}; allowed: 1 or more")
    if group_size == 1 and not needs_critic(algorithm):
        raise ValueError(f"group_size is 1; advantage {algorithm.advantage!r} allows 2 or more, gae 1")
    if group_size == 1 and algorithm.dynamic_sampling:
        raise ValueError("group_size is 1; dynamic_sampling allows 2 or more: one reward equals itself")
    weighs_old = algorithm.importance != "none" and algorithm.loss not in SCORER_FREE_LOSSES
    if old_logprobs == "rollout" and weighs_old:
        raise ValueError(
            f"old_logprobs is 'rollout'; importance {algorithm.importance!r} with loss {algorithm.loss!r} "
            "allows 'recompute': its weight would be 1 by construction"
        )
