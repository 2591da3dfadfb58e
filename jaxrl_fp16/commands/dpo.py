"""`dpo`: preference optimization on pairs of responses."""

from jaxrl_fp16.training.loops.follow import follow
from jaxrl_fp16.training.loops.preferences import check_preferences, make_held_out, optimize, preference_learner
from jaxrl_fp16.training.loops.warm_start import begin, log_start
from jaxrl_fp16.training.runs.run import open_run

DPO_LINE = (
    ("loss", "loss", ".4f"), ("accuracy", "accuracy", ".3f"), ("margin", "reward_margin", ".3f"),
    ("gradient norm", "grad_norm", ".2f"), ("scale", "loss_scale", ",g"), ("skipped", "skipped", ".0f"),
)


def run_dpo(config):
    """Preference optimization, after a warm start where `sft.steps` asks for one; all else as in `sft`."""
    section = config.dpo
    with open_run(config, "dpo", check=check_preferences, reference=True) as (run, params):
        # A checkpoint holds the reference: a warm start leads to it, and a folder may change.
        start, code = begin(run, params, preference_learner)
        if code:
            return code
        run.start_log(start.step, section.steps, line=DPO_LINE)
        run.log.say(f"dpo ({section.loss}, beta {section.beta:g}): {section.steps} steps of {section.batch_size} pairs")
        held_out = make_held_out(run, start.learner.reference_params)
        evaluate = lambda learner: run.evaluate(learner.sampling_params) | held_out(learner.sampling_params)
        log_start(run, start, evaluate)
        taken = optimize(run, start.learner, start.position, start.step)
        return follow(run, start.learner, taken, section.steps, section.optimizer, evaluate)
