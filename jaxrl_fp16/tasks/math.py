"""Mathematics problems of a file or a Hub data set, graded by exact, numeric and algebraic equality."""

import contextlib
from typing import Any, Iterator, Mapping, Sequence

from jaxrl_fp16.tasks.examples import Example
from jaxrl_fp16.tasks.grading.answers import gold_answers, settle
from jaxrl_fp16.tasks.grading.pool import Outcome, PoolConfig, open_pool
from jaxrl_fp16.tasks.rewards import Grade, Rewards, gather
from jaxrl_fp16.tasks.templates import Template, read_answer


@contextlib.contextmanager
def open_math_grader(limits: Mapping[str, Any], max_response_chars: int) -> Iterator[Grade]:
    """A grader that gives 1 for each response whose answer, read as its template says, equals a gold answer.

    An answer whose grading hangs, crashes or needs too much memory scores 0 and is counted in `timeouts`; so
    every entry is valid. A response of more than `max_response_chars` scores 0. `limits` are fields of `PoolConfig`.
    """
    config = PoolConfig("jaxrl_fp16.tasks.grading.algebra:open_verifier", **limits)
    with open_pool(config) as run:

        def grade(template, prompts, responses, examples) -> Rewards:
            answers = [[_answer(template, response, prompt, max_response_chars) for response in group]
                       for prompt, group in zip(prompts, responses, strict=True)]
            golds = [gold_answers(example.answer) for example in examples]
            doubtful = sorted({pair for gold, group in zip(golds, answers, strict=True)
                               for answer in group for pair in _doubtful(gold, answer)})
            outcomes = dict(zip(doubtful, run(doubtful)))
            verdicts = [[_verdict(gold, answer, outcomes) for answer in group]
                        for gold, group in zip(golds, answers)]
            errors = [error for group in verdicts for _, error in group if error]
            return gather([[value for value, _ in group] for group in verdicts],
                          timeouts=len(errors), first_error=errors[0] if errors else None)

        yield grade


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
