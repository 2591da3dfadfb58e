"""`sft`: supervised training on the task's solutions."""

from jaxrl_fp16.config import ConfigError
from jaxrl_fp16.training.loops.follow import follow
from jaxrl_fp16.training.loops.supervised import check_solutions, fresh_state, supervise
from jaxrl_fp16.training.loops.warm_start import Start, restored
from jaxrl_fp16.training.runs.learner import Learner
from jaxrl_fp16.training.runs.run import open_run

SFT_LINE = (
    ("loss", "loss", ".4f"), ("gradient norm", "grad_norm", ".2f"), ("scale", "loss_scale", ",g"),
    ("skipped", "skipped", ".0f"),
)


def run_sft(config):
    """Supervised training; evaluations, checkpoints, resume, signals and export as in `train`."""
    steps = config.sft.steps
    if not steps:
        raise ConfigError("sft.steps is 0; allowed: 1 or more")
    with open_run(config, "sft", check=check_solutions) as (run, params):
        learner = Learner(fresh_state(run, params))
        start = Start(learner) if run.starts_anew() else restored(run, learner)
        run.start_log(start.step, steps, line=SFT_LINE)
        run.log.say(f"supervised: {steps} steps of {config.sft.batch_size} rows")
        taken = supervise(run, start.learner.actor, start.position, start.step)
        evaluate = lambda learner: run.evaluate(learner.sampling_params)
        return follow(run, start.learner, taken, steps, config.sft.optimizer, evaluate)
