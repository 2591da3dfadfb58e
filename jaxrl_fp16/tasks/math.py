"""Mathematics problems of a file or a Hub data set, graded by exact, numeric and algebraic equality."""

import contextlib
from typing import Any, Callable, Iterator, Mapping, Sequence

from jaxrl_fp16.tasks.examples import Example
from jaxrl_fp16.tasks.grading.answers import gold_answers, settle
from jaxrl_fp16.tasks.grading.pool import Outcome, PoolConfig, Run, open_pool
from jaxrl_fp16.tasks.grading.readers import READERS
from jaxrl_fp16.tasks.rewards import Grade, Rewards, gather
from jaxrl_fp16.tasks.templates import Template, read_answer

VERIFIER = "jaxrl_fp16.tasks.grading.algebra:open_verifier"
MAX_RESPONSE_CHARS = 200_000


@contextlib.contextmanager
def open_math_grader(limits: Mapping[str, Any], max_response_chars: int) -> Iterator[Grade]:
    """A grader that gives 1 for each response whose answer, read as its template says, equals a gold answer.

    An answer whose grading hangs, crashes or needs too much memory scores 0 and is counted in `timeouts`; so
    every entry is valid. A response of more than `max_response_chars` scores 0. `limits` are fields of `PoolConfig`.
    """
    with open_pool(PoolConfig(VERIFIER, **limits)) as run:

        def grade(template, prompts, responses, examples) -> Rewards:
            answers = [[_answer(template, response, prompt, max_response_chars) for response in group]
                       for prompt, group in zip(prompts, responses, strict=True)]
            verdicts = _grade(run, [gold_answers(example.answer) for example in examples], answers)
            errors = [error for group in verdicts for _, error in group if error]
            return gather([[value for value, _ in group] for group in verdicts],
                          timeouts=len(errors), first_error=errors[0] if errors else None)

        yield grade


@contextlib.contextmanager
def open_grader(*, workers: int = 4, deadline_seconds: float = 10.0, batch_seconds: float = 1800.0,
                memory_mb: int = 2048) -> Iterator[Run]:
    """The worker processes of `math_reward`, kept for several calls: `with open_grader() as grader`.

    Args:
      workers: most processes at once; they start as they are needed.
      deadline_seconds: for one answer; what takes longer scores 0 and its process is replaced.
      batch_seconds: for one call; a longer one raises `BatchDeadline`.
      memory_mb: address space of a process, MiB.
    """
    config = PoolConfig(VERIFIER, workers=workers, deadline_seconds=deadline_seconds, batch_seconds=batch_seconds,
                        memory_mb=memory_mb)
    with open_pool(config) as run:
        yield run


def math_reward(responses: Sequence[str], answers: Sequence[str], reader: str = "boxed", *,
                grader: Run | None = None) -> list[float]:
    """1.0 for each response whose answer equals its gold answer by text, number or algebra, else 0.0.

    Args:
      responses: B texts; one of more than 200,000 characters scores 0.
      answers: B gold answers, one for each response.
      reader: where the answer is in a response: a value of `task.answer_from`.
      grader: of `open_grader`; None: processes are started for this call, where an answer needs algebra.

    Raises ValueError for an unknown reader, and for lists that do not go together.
    """
    if reader not in READERS:
        raise ValueError(f"reader is {reader!r}; allowed: {', '.join(READERS)}")
    for name, texts in (("responses", responses), ("answers", answers)):
        wrong = texts if isinstance(texts, str) else next((text for text in texts if not isinstance(text, str)), None)
        if wrong is not None:
            raise ValueError(f"{name} holds {wrong!r}, a {type(wrong).__name__}; allowed: a list of texts"[:300])
    if len(responses) != len(answers):
        raise ValueError(f"{len(responses)} responses and {len(answers)} answers; allowed: an answer for each response")
    template = Template("call", None, reads=reader)
    found = [[_answer(template, response, "", MAX_RESPONSE_CHARS)] for response in responses]
    verdicts = _grade(grader or _run_once, [gold_answers(answer) for answer in answers], found)
    return [value for ((value, _),) in verdicts]


def _run_once(jobs: Sequence[tuple[str, str]]) -> list[Outcome]:
    if not jobs:
        return []
    with open_grader() as run:
        return run(jobs)


def _grade(run: Callable[..., list[Outcome]], golds: Sequence[tuple[str, ...]],
           answers: Sequence[Sequence[str]]) -> list[list[tuple[float, str]]]:
    """For each answer of each group its reward, and why its grading was cut off where it was."""
    doubtful = sorted({pair for gold, group in zip(golds, answers, strict=True)
                       for answer in group for pair in _doubtful(gold, answer)})
    outcomes = dict(zip(doubtful, run(doubtful)))
    return [[_verdict(gold, answer, outcomes) for answer in group] for gold, group in zip(golds, answers)]


def _answer(template: Template, response: str, prompt: str, max_response_chars: int) -> str:
    return read_answer(template, response, prompt) if len(response) <= max_response_chars else ""


def _doubtful(golds: Sequence[str], answer: str) -> list[tuple[str, str]]:
    """The pairs that algebra must settle; none where one gold answer matches anyway."""
    settled = [settle(gold, answer) for gold in golds]
    return [] if True in settled else [(gold, answer) for gold, same in zip(golds, settled) if same is None]


def _verdict(golds: Sequence[str], answer: str,
             outcomes: dict[tuple[str, str], Outcome]) -> tuple[float, str]:
    """The reward, and why grading was cut off where it was."""
    algebra = [outcomes[pair] for pair in _doubtful(golds, answer)]
    if any(settle(gold, answer) for gold in golds) or any(outcome.value is True for outcome in algebra):
        return 1.0, ""
    return 0.0, next((outcome.error for outcome in algebra if outcome.error), "")


def split(examples: Sequence[Example], train_size: int | None,
          held_out_size: int) -> tuple[Sequence[Example], Sequence[Example]]:
    """The last `held_out_size` examples are held out; of those before, the first `train_size` train."""
    first_held_out = len(examples) - held_out_size
    if first_held_out < 1:
        raise ValueError(f"task.heldout_size is {held_out_size} and there are {len(examples)} problems; "
                         "at least one must be left to train on")
    return examples[:first_held_out][:train_size], examples[first_held_out:]
