"""Tasks: prompts and rewards. Imports no JAX, so that a grading process starts fast."""

from jaxrl_fp16.tasks.arithmetic import ALPHABET, ArithmeticConfig
from jaxrl_fp16.tasks.examples import Example, load_examples, load_hub_examples
from jaxrl_fp16.tasks.grading.pool import BatchDeadline, Outcome, PoolConfig, WorkerStartError, open_pool
from jaxrl_fp16.tasks.math import math_reward, open_grader
from jaxrl_fp16.tasks.messages import asks_for_date
from jaxrl_fp16.tasks.preference import PreferenceFields, load_hub_preferences, load_preferences
from jaxrl_fp16.tasks.registry import TASKS, Task, TaskConfig, TaskKind, open_task
from jaxrl_fp16.tasks.reward_text import RewardModelConfig
from jaxrl_fp16.tasks.rewards import Rewards, RewardShapeError
from jaxrl_fp16.tasks.templates import (
    TEMPLATES,
    Template,
    check_template,
    flaw_of,
    get_template,
    read_answer,
    remark_on,
    render,
)

__all__ = [
    "ALPHABET", "ArithmeticConfig", "BatchDeadline", "Example", "Outcome", "PoolConfig", "PreferenceFields",
    "RewardModelConfig", "RewardShapeError", "Rewards", "TASKS", "TEMPLATES", "Task", "TaskConfig", "TaskKind",
    "Template", "WorkerStartError", "asks_for_date", "check_template", "flaw_of", "get_template", "load_examples",
    "load_hub_examples", "load_hub_preferences", "load_preferences", "math_reward", "open_grader", "open_pool",
    "open_task", "read_answer", "remark_on", "render",
]
