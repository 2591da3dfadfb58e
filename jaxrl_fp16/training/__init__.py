"""Updates, and the loop around them."""

from jaxrl_fp16.training.dpo import PreferencePairs, make_dpo_update, make_pair_scorer
from jaxrl_fp16.training.reward_update import RewardPairs, make_reward_update
from jaxrl_fp16.training.state import TrainState, init_train_state
from jaxrl_fp16.training.update import make_update
from jaxrl_fp16.training.value import make_value_update

__all__ = [
    "PreferencePairs", "RewardPairs", "TrainState", "init_train_state", "make_dpo_update", "make_pair_scorer",
    "make_reward_update", "make_update", "make_value_update",
]
