"""The tail that every training shares: what happens after each of its steps, and after the last."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
from functools import partial
from typing import Any

from jaxrl_fp16.training.runs.learner import Learner
from jaxrl_fp16.training.safety.deadlines import Interrupted
from jaxrl_fp16.training.safety.guards import SkipGuard, check_bounds
from jaxrl_fp16.training.updates.optimizer import make_schedule


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a training, done: what it led to, and what is to be logged of it."""

    number: int
    learner: Learner                            # donated to the next step
    metrics: dict[str, Any]                     # host numbers and texts, for the log
    position: int                               # in the data, after it
    taken: Sequence[Mapping[str, float]]        # metrics of its optimizer steps, in order
    samples: Iterable[Mapping[str, Any]] = ()   # for samples.jsonl
    # What was not finite in the latest optimizer step that was skipped, as text; None where that is not known.
    cause: Callable[[], str | None] = lambda: None


def follow(run, learner, steps, last, optimizer, evaluate, *, frozen=False):
    """Goes through `steps`, an iterator of Step: evaluates, logs, guards, saves, stops; then exports.

    Args:
      learner: from which the first step begins.
      last: the number of the last step.
      optimizer: the OptimizerConfig whose schedule the steps follow.
      evaluate: `learner -> metrics`.
      frozen: no weight moves: its weights are not evaluated again, not saved, not exported.

    Returns the exit code: 0, or 128 + the signal that ended the run. Raises `Guard`.
    """
    guard, schedule, unsaved = SkipGuard(run), make_schedule(optimizer), None
    run.stage("the first step")
    for step in _up_to_a_signal(steps):
        if isinstance(step, Interrupted):
            return _end_midway(run, step, unsaved, frozen)
        number, learner, metrics = step.number, step.learner, dict(step.metrics)
        run.stage(f"the work after step {number}")
        metrics["learning_rate"] = 0.0 if frozen else float(schedule(learner.actor.step))
        if (number == last or run.evaluation_due(number)) and not frozen:
            metrics |= evaluate(learner)
        run.stage(f"step {number}: writing")
        run.log.metrics(number, metrics)
        run.log.samples(number, step.samples)
        for optimizer_step in step.taken:
            guard.check(optimizer_step, step.cause)
        check_bounds(run, number, metrics)
        stops = run.stops()
        save = partial(run.checkpoints.save, number, learner.saved(), {"position": step.position}, metrics)
        due = number == last or stops or run.checkpoints.due(number)
        if due and not frozen:
            save()
        unsaved = None if due or frozen else save
        if stops:
            return run.end_by_signal(number, "a probe saves nothing" if frozen else None)
        if number < last:
            run.stage(f"step {number + 1}")
    if run.config.run.export and not frozen:
        run.export(learner.sampling_params)
    return 0


def _up_to_a_signal(steps):
    """The steps, and where a signal ended one midway, the Interrupted that says so as the last."""
    try:
        yield from steps
    except Interrupted as signal:
        yield signal


def _end_midway(run, step, unsaved, frozen):
    """The exit code of a run whose step a signal ended: what was done before it is saved, if it is not yet."""
    if unsaved is not None:
        unsaved()
    run.checkpoints.wait()
    run.stops()
    kept = "a probe saves nothing" if frozen else run.checkpoints.describe()
    return run.end_by_signal(0, f"in the middle of {step}; {kept}")
