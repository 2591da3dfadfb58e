"""The tasks by name, their configuration, and how one is opened."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Annotated, Any, Callable, ContextManager, Iterator, Literal, Sequence

from annotated_types import Ge, Gt

from jaxrl_fp16.config import Doc
from jaxrl_fp16.tasks import arithmetic, math
from jaxrl_fp16.tasks.arithmetic import ArithmeticConfig
from jaxrl_fp16.tasks.examples import Example, load_examples, load_hub_examples
from jaxrl_fp16.tasks.preference import PreferenceFields, load_hub_preferences, load_preferences
from jaxrl_fp16.tasks.reward_text import RewardModelConfig
from jaxrl_fp16.tasks.rewards import Grade, Rewards, inline_grader, open_custom_grader
from jaxrl_fp16.tasks.templates import Template, get_template, needs_tokenizer, render


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Section `task`: problems, prompts and rewards."""

    name: Annotated[str, Doc("arithmetic, math or preference")] = "arithmetic"
    path: Annotated[str | None, Doc("JSONL file of problems or preferences, for math and preference")] = None
    hub: Annotated[str | None, Doc("or a Hub data set; needs the extra `hub`")] = None
    split: Annotated[str, Doc("of the Hub data set")] = "train"
    problem_field: Annotated[str, Doc("which field of a row is the problem")] = "problem"
    answer_field: Annotated[str, Doc("which is its answer")] = "answer"
    solution_field: Annotated[str | None, Doc("which is a target text for supervised training; null: none")] = None
    prompt_field: Annotated[str, Doc("which field of a preference is the prompt")] = "prompt"
    chosen_field: Annotated[str, Doc("which is the response that is preferred")] = "chosen"
    rejected_field: Annotated[str, Doc("which is the other")] = "rejected"
    template: Annotated[str | None, Doc("a name, or a text with field names; null: the task's own")] = None
    system: Annotated[str | None, Doc("system text, with template chat")] = None
    answer_from: Annotated[
        Literal["boxed", "boxed_after_think", "answer_tag", "last_number", "text"] | None,
        Doc("where a response's answer stands; null: as the template says, or the task (arithmetic: text)"),
    ] = None
    reward_file: Annotated[str | None, Doc("Python file with a reward function of one's own; null: the task's")] = None
    reward_function: Annotated[str, Doc("its name there")] = "reward"
    reward_model: RewardModelConfig = RewardModelConfig()
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    seed: Annotated[int, Doc("of generated problems")] = 0
    train_size: Annotated[int | None, Ge(1), Doc("null: all rows; 100,000 generated problems")] = None
    heldout_size: Annotated[int | None, Ge(0), Doc("null: no row; 256 generated problems")] = None
    deadline_seconds: Annotated[float, Gt(0), Doc("for grading one answer, or one group (reward_file)")] = 10.0
    batch_seconds: Annotated[float, Gt(0), Doc("for grading all answers of a batch; beyond it the run stops")] = 1800.0
    workers: Annotated[int, Ge(1), Doc("grading processes at most")] = 4
    memory_mb: Annotated[int, Ge(256), Doc("address space of each")] = 2048
    max_response_chars: Annotated[int, Ge(1), Doc("longer responses score 0 (math)")] = 200_000


@dataclasses.dataclass(frozen=True)
class Task:
    """An open task. `dataclasses.replace(task, heldout=..., template=...)` shares its grader."""

    name: str
    train: Sequence[Example]        # may be made when looked at
    heldout: Sequence[Example]
    template: Template
    grade: Grade

    def rewards(self, prompts: Sequence[str], responses: Sequence[Sequence[str]],
                examples: Sequence[Example]) -> Rewards:
        """Rewards of groups: prompts [n], responses [n][group], examples [n]."""
        return self.grade(self.template, prompts, responses, examples)


@dataclasses.dataclass(frozen=True)
class TaskKind:
    """What makes a task: one of these, in a row of TASKS."""

    template: str               # where the config names none
    answer_from: str | None     # likewise; None: as the template says
    problems: Callable[[TaskConfig], tuple[Sequence[Example], Sequence[Example]]]  # train, held out
    grader: Callable[[TaskConfig], ContextManager[Grade]]


def _arithmetic_problems(config: TaskConfig):
    return (arithmetic.train_problems(config.arithmetic, config.seed, config.train_size or 100_000),
            arithmetic.held_out_problems(config.arithmetic, config.seed,
                                         256 if config.heldout_size is None else config.heldout_size))


def _math_problems(config: TaskConfig):
    _check_source(config)
    fields = (config.problem_field, config.answer_field, config.solution_field)
    examples = (load_hub_examples(config.hub, config.split, *fields) if config.path is None
                else load_examples(config.path, *fields))
    return math.split(examples, config.train_size, config.heldout_size or 0)


def _check_source(config: TaskConfig):
    if (config.path is None) == (config.hub is None):
        raise ValueError(f"task {config.name!r} needs either task.path, a JSONL file, or task.hub, a Hub data set; "
                         f"path is {config.path!r} and hub is {config.hub!r}")


def _preference_problems(config: TaskConfig):
    _check_source(config)
    fields = PreferenceFields(config.prompt_field, config.chosen_field, config.rejected_field, config.answer_field)
    examples = (load_hub_preferences(config.hub, config.split, fields) if config.path is None
                else load_preferences(config.path, fields))
    return math.split(examples, config.train_size, config.heldout_size or 0)


def _math_grader(config: TaskConfig):
    return math.open_math_grader(_limits(config), config.max_response_chars)


def _limits(config: TaskConfig) -> dict[str, Any]:
    """The fields of a `PoolConfig` that the user sets."""
    return {name: getattr(config, name) for name in ("workers", "deadline_seconds", "batch_seconds", "memory_mb")}


TASKS: dict[str, TaskKind] = {
    "arithmetic": TaskKind("none", "text", _arithmetic_problems,
                           lambda config: contextlib.nullcontext(inline_grader(arithmetic.reward))),
    "math": TaskKind("chat", None, _math_problems, _math_grader),
    "preference": TaskKind("chat", None, _preference_problems, _math_grader),
}


@contextlib.contextmanager
def open_task(config: TaskConfig) -> Iterator[Task]:
    """Gives a `Task`, with its grading processes if it needs any; they end with the context.

    Raises `ValueError`, before any process starts, for an unknown task or template and for data at fault, and
    for a reward file that cannot be loaded.
    """
    if config.name not in TASKS:
        raise ValueError(f"task.name is {config.name!r}; allowed: {', '.join(sorted(TASKS))}")
    kind = TASKS[config.name]
    template = get_template(config.template or kind.template, config.system,
                            config.answer_from or kind.answer_from)
    train, heldout = kind.problems(config)
    if not needs_tokenizer(template, train[0]):
        render(template, train[0])  # an unknown field name is refused here
    with _open_grader(config, kind) as grade:
        yield Task(config.name, train, heldout, template, grade)


def _open_grader(config: TaskConfig, kind: TaskKind) -> ContextManager[Grade]:
    if config.reward_file is None:
        return kind.grader(config)
    return open_custom_grader(config.reward_file, config.reward_function, _limits(config))
