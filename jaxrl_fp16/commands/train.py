"""`train`: RL, after a warm start where the config asks for one."""

import dataclasses
from pathlib import Path

import jax

from jaxrl_fp16.console import Console
from jaxrl_fp16.lab.probe import COLUMNS, probe_table
from jaxrl_fp16.lab.report import draw_run, summary
from jaxrl_fp16.training.loops.follow import follow
from jaxrl_fp16.training.loops.iterations import iterations, open_training
from jaxrl_fp16.training.loops.warm_start import begin, log_start
from jaxrl_fp16.training.runs.learner import make_learner
from jaxrl_fp16.training.runs.run_config import resolve_algorithm


def run_train(config):
    """`train`, and the picture and table that it ends with."""
    outcome = train(config)
    if outcome.code == 0 and jax.process_index() == 0:
        (_show_probe if outcome.probe else _show)(outcome.folder, outcome.precision)
    return outcome.code


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    precision: str  # resolved
    code: int       # 0, or 128 + the signal that ended it
    probe: bool = False


def train(config):
    """Runs `config` to its end.

    Raises ConfigError for what is refused before the start, `Guard` and
    `CheckpointError` for a run that stopped itself.
    """
    algorithm = resolve_algorithm(config)
    with open_training(config) as (run, params):
        config, t = run.config, run.config.training
        run.log.say(_plan(algorithm, config))
        start, code = begin(run, params, lambda run, params: make_learner(run, algorithm, params))
        if code:
            return Outcome(run.folder, config.precision, code)
        run.start_log(start.step, config.run.steps)
        if t.probe:
            run.log.say("probe: learning rate 0; no weight moves from here on, nothing is saved and nothing exported")
        evaluate = lambda learner: run.evaluate(learner.sampling_params)
        log_start(run, start, evaluate, kept=not t.probe)
        steps = iterations(run, algorithm, start)
        code = follow(run, start.learner, steps, config.run.steps, config.optimizer, evaluate, frozen=t.probe)
        return Outcome(run.folder, config.precision, code, t.probe)


def _plan(algorithm, config):
    t, group = config.training, config.sampling.group_size
    return (
        f"{algorithm.preset}: {config.run.steps} steps of {t.prompts_per_step} prompts x {group} = "
        f"{t.prompts_per_step * group} rows, in minibatches of {t.minibatch_size}"
    )


def _show(folder, precision):
    """The picture and the table that a run ends with."""
    console = Console()
    console.table(f"what happened, in {precision}", ("", "first", "last"), summary(folder))
    picture = draw_run(folder, f"{folder.name} in {precision}")
    if picture is not None:
        console.say(f"picture: {picture}")


def _show_probe(folder, precision):
    """The table that a probe ends with."""
    console = Console()
    console.table(f"probe in {precision}: learning rate 0, no weight moved", COLUMNS, probe_table(folder))
    console.say("a slope beyond its error comes from the data or from chance (one in twenty beyond two errors), not "
                "from the policy")
