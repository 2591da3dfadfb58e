"""Supervised steps before the first iteration of `train` and `dpo`, or as a command of their own."""

from __future__ import annotations

import shutil

import jax

from jaxrl_fp16.training.guards import SkipGuard
from jaxrl_fp16.training.learn import Learner
from jaxrl_fp16.training.supervised import fresh_state, supervise

FOLDER = "warm_start"  # of its checkpoints


def warm_start(run, params):
    """Supervised steps before the first iteration: `(params, metrics of the last step, exit code after a signal or 0)`.

    They end early with `sft.until_accuracy`, so that runs whose roundings or seeds differ
    begin RL at about one accuracy. Checkpoints of their own, `warm_start/`, let a run go on that was cut off within.
    """
    section, guard = run.config.sft, SkipGuard(run)
    shown, learner, known, start = max(1, section.steps // 5), Learner(fresh_state(run, params)), {}, 0
    with run.open_checkpoints(FOLDER, best=None, export="latest") as checkpoints:
        if run.config.resume is not None and not checkpoints.is_empty():
            learner, known, start = checkpoints.restore(learner)
            run.log.say(f"warm start: resumed after step {start}")
            if known["done"] or start >= section.steps:
                return learner.policy.params, known["metrics"], 0
        run.stage("warm start")
        for step, state, metrics, position in supervise(run, learner.policy, known.get("position", 0), start):
            run.stage(f"warm start, after step {step}")
            guard.check(jax.device_get(metrics))
            accuracy = _accuracy_when_due(run, step, state.params)
            done = step == section.steps or (accuracy is not None and accuracy >= section.until_accuracy)
            metrics = {"sft/loss": float(metrics["loss"]), "sft/steps": step}
            if step % shown == 0 or done:
                shown_accuracy = "" if accuracy is None else f"  {run.evaluators[0].name} {accuracy:.3f}"
                run.log.say(
                    f"warm start {step}/{section.steps}  loss {metrics['sft/loss']:.3f} nats a token{shown_accuracy}"
                )
            stops = run.stops()
            if done or stops or checkpoints.due(step):
                extra = {"position": position, "done": done, "metrics": metrics}
                checkpoints.save(step, Learner(state), extra)
            if done or stops:
                break
    code = run.end_by_signal(0, f"saved in the warm start, after step {step}") if stops else 0
    return state.params, metrics, code


def keep_warm_start(run, learner):
    """A checkpoint of step 0 takes the place of those within the warm start."""
    run.checkpoints.save(0, learner, {"position": 0})
    run.checkpoints.wait()
    drop_warm_start(run)


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


__all__ = ["drop_warm_start", "keep_warm_start", "warm_start"]
