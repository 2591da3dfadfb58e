"""What is optimized and measured: advantages, importance weights, losses, KL, mismatch. Pure functions, float32."""

from jaxrl_fp16.objectives.advantages import (
    BASELINES,
    gae,
    group_advantages,
    overlong_penalty,
    overlong_zone,
    rewards_on_last_token,
)
from jaxrl_fp16.objectives.aggregation import AGGREGATIONS
from jaxrl_fp16.objectives.algorithms import LOSSES, PRESETS, AlgorithmConfig, get_algorithm
from jaxrl_fp16.objectives.importance import (
    IMPORTANCES, LEVELS, LOG_RATIO_LIMIT, Importance, clamp_log_ratio, importance_weights,
)
from jaxrl_fp16.objectives.kl import KL_ESTIMATORS, k1, k2, k3, kl_penalized_rewards
from jaxrl_fp16.objectives.losses import policy_loss, value_loss
from jaxrl_fp16.objectives.metrics import (
    Normalizer, combine_steps, finish_metrics, host_floats, merge_metrics, normalizer_of, rule_of,
)
from jaxrl_fp16.objectives.mismatch import mismatch_metrics
from jaxrl_fp16.objectives.pairwise import pairwise_reward_loss
from jaxrl_fp16.objectives.preference import PREFERENCE_LOSSES, PreferenceConfig, dpo_loss, pair_normalizer
from jaxrl_fp16.objectives.requirements import check_algorithm, needs_critic, needs_reference, needs_scorer

__all__ = [
    "AGGREGATIONS",
    "BASELINES",
    "IMPORTANCES",
    "KL_ESTIMATORS",
    "LEVELS",
    "LOG_RATIO_LIMIT",
    "LOSSES",
    "PREFERENCE_LOSSES",
    "PRESETS",
    "AlgorithmConfig",
    "Importance",
    "Normalizer",
    "PreferenceConfig",
    "check_algorithm",
    "clamp_log_ratio",
    "combine_steps",
    "dpo_loss",
    "finish_metrics",
    "gae",
    "get_algorithm",
    "group_advantages",
    "host_floats",
    "importance_weights",
    "k1",
    "k2",
    "k3",
    "kl_penalized_rewards",
    "merge_metrics",
    "mismatch_metrics",
    "needs_critic",
    "needs_reference",
    "needs_scorer",
    "normalizer_of",
    "overlong_penalty",
    "overlong_zone",
    "pair_normalizer",
    "pairwise_reward_loss",
    "policy_loss",
    "rewards_on_last_token",
    "rule_of",
    "value_loss",
]
