"""The tasks by name, their configuration, and how one is opened."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from typing import Annotated, Any, Callable, ContextManager, Iterator, Literal, Sequence

from annotated_types import Ge, Gt

from jaxrl_fp16.config import Doc
from jaxrl_fp16.tasks import arithmetic, math
from jaxrl_fp16.tasks.arithmetic import ArithmeticConfig
from jaxrl_fp16.tasks.examples import Example, load_examples, load_hub_examples
from jaxrl_fp16.tasks.generated import Generator, held_out_problems, train_problems
from jaxrl_fp16.tasks.preference import PreferenceFields, load_hub_preferences, load_preferences
from jaxrl_fp16.tasks.reward_text import RewardModelConfig
from jaxrl_fp16.tasks.rewards import Grade, Rewards, gather, inline_grader, open_custom_grader
from jaxrl_fp16.tasks.templates import Template, get_template, needs_tokenizer, render


@dataclasses.dataclass(frozen=True)
class TaskKind:
    """What makes a task: one of these, in a row of TASKS."""

    about: str                  # in a line
    template: str               # where the config names none
    answer_from: str | None     # likewise; None: as the template says
    problems: Callable[[TaskConfig], tuple[Sequence[Example], Sequence[Example]]]  # train, held out
    grader: Callable[[TaskConfig], ContextManager[Grade]]
    alphabet: str               # of the tokenizer of a model without a folder


def _generated(about: str, generator: Callable[[TaskConfig], Generator], reward, alphabet: str) -> TaskKind:
    """A kind whose problems are drawn, and graded in this process."""
    def problems(config: TaskConfig):
        held_out = 256 if config.heldout_size is None else config.heldout_size
        return (train_problems(generator(config), config.seed, config.train_size or 100_000),
                held_out_problems(generator(config), config.seed, held_out))

    grader = lambda config: contextlib.nullcontext(inline_grader(reward))
    return TaskKind(about, "none", "text", problems, grader, alphabet)


def _math_problems(config: TaskConfig):
    _check_source(config)
    fields = (config.problem_field, config.answer_field, config.solution_field, config.reward_file is None)
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
    "arithmetic": _generated("generated sums, with answers of several steps",
                             lambda config: arithmetic.generator(config.arithmetic), arithmetic.reward,
                             arithmetic.ALPHABET),
    "math": TaskKind("problems of a JSONL file or a Hub data set, graded by algebra", "chat", None, _math_problems,
                     _math_grader, arithmetic.ALPHABET),
    "preference": TaskKind("rows with a prompt, a chosen and a rejected response", "chat", None, _preference_problems,
                           _math_grader, arithmetic.ALPHABET),
}


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Section `task`: problems, prompts and rewards."""

    name: Annotated[Literal[*TASKS], Doc("which problems there are, and how they are graded")] = "arithmetic"
    path: Annotated[
        str | None,
        Doc("math, preference: data file of JSONL, a JSON list (both also gzipped) or, with the extra `parquet`, "
            "parquet; null: task.hub is read"),
    ] = None
    hub: Annotated[str | None, Doc("math, preference: Hub data set (extra `hub`); null: task.path is read")] = None
    split: Annotated[str, Doc("split of the Hub data set that is read")] = "train"
    problem_field: Annotated[
        str, Doc("math: the field of a row that holds the problem, text or chat messages; a.b is the field b within a")
    ] = "problem"
    answer_field: Annotated[
        str, Doc("math, preference: the field of a row that holds the answer, or a list of right ones; may be dotted")
    ] = "answer"
    solution_field: Annotated[
        str | None, Doc("math: the field of a row that holds a text to learn in supervised training; null: none")
    ] = None
    prompt_field: Annotated[str, Doc("preference: the field of a row that holds the prompt")] = "prompt"
    chosen_field: Annotated[str, Doc("preference: the field of a row that holds the preferred response")] = "chosen"
    rejected_field: Annotated[str, Doc("preference: the field of a row that holds the other response")] = "rejected"
    template: Annotated[str | None, Doc("prompt template: a name, or a text with field names; null: the task's")] = None
    system: Annotated[str | None, Doc("system text of the prompt, with template chat; null: none")] = None
    template_options: Annotated[
        dict[str, Any],
        Doc("what the tokenizer's chat template gets beside messages, such as {enable_thinking: false}; {}: nothing"),
    ] = dataclasses.field(default_factory=dict)
    date: Annotated[
        str | None,
        Doc("date, as YYYY-MM-DD, for a chat template that writes it into prompts; null: that of the run's start"),
    ] = None
    answer_from: Annotated[
        Literal["boxed", "boxed_after_think", "answer_tag", "last_number", "text"] | None,
        Doc("where the answer is in a response; null: as the template says; for generated problems, text"),
    ] = None
    reward_file: Annotated[str | None, Doc("Python file with your own reward function; null: the task's reward")] = None
    reward_function: Annotated[str, Doc("the name of the reward function in reward_file")] = "reward"
    reward_model: RewardModelConfig = RewardModelConfig()
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    seed: Annotated[int, Doc("seed of generated problems")] = 0
    train_size: Annotated[int | None, Ge(1), Doc("problems to train on; null: all rows, or 100,000 generated")] = None
    heldout_size: Annotated[int | None, Ge(0), Doc("problems held out; null: none of a file, or 256 generated")] = None
    deadline_seconds: Annotated[float, Gt(0), Doc("seconds to grade one answer, or one group with reward_file")] = 10.0
    batch_seconds: Annotated[
        float, Gt(0), Doc("seconds for grading all answers of a batch; longer grading stops the run")
    ] = 1800.0
    workers: Annotated[int, Ge(1), Doc("most grading processes at once")] = 4
    memory_mb: Annotated[int, Ge(256), Doc("address space of each grading process, MiB")] = 2048
    max_response_chars: Annotated[
        int, Ge(1), Doc("math, preference: longest response that is graded, in characters; longer ones score 0")
    ] = math.MAX_RESPONSE_CHARS

    def __post_init__(self):
        with contextlib.suppress(ValueError):
            if self.date is None or datetime.date.fromisoformat(self.date).isoformat() == self.date:
                return
        raise ValueError(f"date is {self.date!r}; allowed: a day as YYYY-MM-DD, or null")


@dataclasses.dataclass(frozen=True)
class Task:
    """An open task. `dataclasses.replace(task, heldout=..., template=...)` shares its grader."""

    name: str
    train: Sequence[Example]        # may be made when looked at
    heldout: Sequence[Example]
    template: Template
    grade: Grade
    note: str = ""                  # a line to say of the grader; "" for none

    def rewards(self, prompts: Sequence[str], responses: Sequence[Sequence[str]],
                examples: Sequence[Example]) -> Rewards:
        """Rewards of groups: prompts [n], responses [n][group], examples [n]."""
        return self.grade(self.template, prompts, responses, examples)


@contextlib.contextmanager
def open_task(config: TaskConfig, problems: Sequence[Example] | None = None) -> Iterator[Task]:
    """Gives a `Task`, with its grading processes if it needs any; they end with the context.

    problems: examples without answers in place of the task's own, which are not read; their rewards are 0.
    Raises `ValueError`, before any process starts, for an unknown task or template and for data at fault, and
    for a reward file that cannot be loaded.
    """
    if config.name not in TASKS:
        raise ValueError(f"task.name is {config.name!r}; allowed: {', '.join(sorted(TASKS))}")
    kind = TASKS[config.name]
    template = get_template(config.template or kind.template, config.system,
                            config.answer_from or kind.answer_from, config.template_options, config.date)
    train, heldout = kind.problems(config) if problems is None else (problems, [])
    if not needs_tokenizer(template, train[0]):
        render(template, train[0])  # an unknown field name is refused here
    with _open_grader(config, kind, train[0]) if problems is None else _ungraded() as (grade, note):
        yield Task(config.name, train, heldout, template, grade, note)


@contextlib.contextmanager
def _ungraded() -> Iterator[tuple[Grade, str]]:
    yield lambda template, prompts, responses, examples: gather([[0.0] * len(group) for group in responses]), ""


@contextlib.contextmanager
def _open_grader(config: TaskConfig, kind: TaskKind, example: Example) -> Iterator[tuple[Grade, str]]:
    if config.reward_file is None:
        with kind.grader(config) as grade:
            yield grade, ""
    else:
        columns = {name: name for name in example.for_reward()} | {config.answer_field: "answer"}
        columns |= {config.solution_field: "solution"} if config.solution_field else {}
        with open_custom_grader(config.reward_file, config.reward_function, columns, _limits(config)) as opened:
            yield opened
