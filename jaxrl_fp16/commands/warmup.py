"""`warmup`: the warm start of `train` alone."""

from jaxrl_fp16.config import ConfigError
from jaxrl_fp16.training.loops.supervised import check_solutions
from jaxrl_fp16.training.loops.warm_start import drop_warm_start, warm_start
from jaxrl_fp16.training.runs.run import open_run


def run_warmup(config):
    """The warm start of `train` alone, as the model folder that runs of any precision may begin from."""
    if not config.sft.steps:
        raise ConfigError("sft.steps is 0; allowed: 1 or more")
    with open_run(config, "warmup", check=check_solutions) as (run, params):
        params, metrics, code = warm_start(run, params)
        if code:
            return code
        run.start_log(0, config.sft.steps, line=(("loss", "sft/loss", ".4f"),))
        run.log.metrics(metrics["sft/steps"], metrics)
        run.export(params)
        drop_warm_start(run)
    return 0
