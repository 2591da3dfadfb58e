"""Where a training begins: anew, after a warm start of supervised steps, or where a checkpoint left it."""

import dataclasses
import shutil
from typing import Any

import jax

from jaxrl_fp16.training.loops.supervised import fresh_state, supervise
from jaxrl_fp16.training.runs.learner import Learner
from jaxrl_fp16.training.safety.guards import SkipGuard

FOLDER = "warm_start"  # of its checkpoints


@dataclasses.dataclass(frozen=True)
class Start:
    """What a training's first step continues from."""

    learner: Learner
    position: int = 0                       # in the data
    step: int = 0                           # steps that were taken before
    metrics: dict[str, Any] | None = None   # of the warm start; None: a checkpoint was restored, or nothing is logged


def begin(run, params, make_learner):
    """`(Start, exit code)` of a training that a warm start may come before; the code is 0, or a signal's with no Start.

    make_learner: `(run, params) -> Learner`; takes params over.
    """
    anew, metrics, code = run.starts_anew(), {}, 0
    if run.config.sft.steps and anew:
        params, metrics, code = warm_start(run, params)
    if code:
        return None, code
    learner = make_learner(run, params)
    return (Start(learner, metrics=metrics) if anew else restored(run, learner)), 0


def restored(run, learner):
    """The Start that the newest sound checkpoint holds; `learner` is the template."""
    found, position, step = run.restore(learner.saved())
    return Start(Learner.of_saved(found), position, step)


def log_start(run, start, evaluate, kept=True):
    """Metrics before the first step, `evaluate(learner)` among them, and a checkpoint in the warm start's place, or
    with `kept` false none. Nothing for what a checkpoint restored."""
    if start.metrics is None:
        return
    run.log.metrics(0, start.metrics | evaluate(start.learner))
    if run.config.sft.steps and kept:
        run.checkpoints.save(0, start.learner.saved(), {"position": 0})
        run.checkpoints.wait()
    if run.config.sft.steps:
        drop_warm_start(run)


def warm_start(run, params):
    """Supervised steps before the first iteration: `(params, metrics of the last step, exit code after a signal or 0)`.

    They end early with `sft.until_accuracy`, so that runs whose roundings or seeds differ
    begin RL at about one accuracy. Checkpoints of their own, `warm_start/`, let a run that was cut off there continue.
    """
    section, guard = run.config.sft, SkipGuard(run)
    shown, learner, known, start = max(1, section.steps // 5), Learner(fresh_state(run, params)), {}, 0
    aside = 0.0
    with run.open_checkpoints(FOLDER, best=None, export="latest") as checkpoints:
        if run.config.resume is not None and not checkpoints.is_empty():
            found, known, start = checkpoints.restore(learner.saved())
            learner = Learner.of_saved(found)
            run.log.say(f"warm start: resumed after step {start}")
            aside = known["metrics"].get("sft/prompts_set_aside", 0.0)
            if known["done"] or start >= section.steps:
                return learner.sampling_params, known["metrics"], 0
        run.stage("warm start")
        for taken in supervise(run, learner.actor, known.get("position", 0), start):
            step, learner = taken.number, taken.learner
            run.stage(f"the work after step {step} of the warm start")
            guard.check(taken.metrics, taken.cause)
            accuracy = _accuracy_when_due(run, step, learner.sampling_params)
            done = step == section.steps or (accuracy is not None and accuracy >= section.until_accuracy)
            aside += taken.metrics["prompts_set_aside"]
            metrics = {"sft/loss": taken.metrics["loss"], "sft/steps": step, "sft/prompts_set_aside": aside}
            if step % shown == 0 or done:
                shown_accuracy = "" if accuracy is None else f"  {run.evaluators[0].name} {accuracy:.3f}"
                run.log.say(
                    f"warm start {step}/{section.steps}  loss {metrics['sft/loss']:.3f} nats a token{shown_accuracy}"
                )
            stops = run.stops()
            if done or stops or checkpoints.due(step):
                extra = {"position": taken.position, "done": done, "metrics": metrics}
                checkpoints.save(step, learner.saved(), extra)
            if done or stops:
                break
            run.stage(f"warm start, step {step + 1} of at most {section.steps}", told=True)
    code = run.end_by_signal(0, f"saved in the warm start, after step {step}") if stops else 0
    return learner.sampling_params, metrics, code


def drop_warm_start(run):
    """What it led to is saved elsewhere."""
    if jax.process_index() == 0:
        shutil.rmtree(run.folder / FOLDER)


def _accuracy_when_due(run, step, params):
    """Of the first evaluation set, in every `check_every`-th step of a warm start that ends by it; else None."""
    section = run.config.sft
    if section.until_accuracy is None or step % section.check_every:
        return None
    first = run.evaluators[0]
    return run.evaluate(params, [first])[f"eval/{first.name}/accuracy"]
