"""One optimizer step for each kind of loss, and the scorer: pure functions, jitted."""

from jaxrl_fp16.training.updates.critic_update import make_value_update
from jaxrl_fp16.training.updates.dpo_update import PreferencePairs, make_dpo_update, make_pair_scorer
from jaxrl_fp16.training.updates.policy_update import make_update
from jaxrl_fp16.training.updates.reward_update import RewardPairs, make_reward_update
from jaxrl_fp16.training.updates.state import TrainState, init_train_state

__all__ = [
    "PreferencePairs", "RewardPairs", "TrainState", "init_train_state", "make_dpo_update", "make_pair_scorer",
    "make_reward_update", "make_update", "make_value_update",
]
