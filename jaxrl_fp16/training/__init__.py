"""Updates, and the loop around them."""

from jaxrl_fp16.training.state import TrainState, init_train_state
from jaxrl_fp16.training.update import make_update
from jaxrl_fp16.training.value import make_value_update

__all__ = ["TrainState", "init_train_state", "make_update", "make_value_update"]
