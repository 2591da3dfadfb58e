"""`eval`: a model's accuracy on `evaluation.sets`."""

import json

from jaxrl_fp16.config import ConfigError, naming
from jaxrl_fp16.console import Console
from jaxrl_fp16.training.rollouts.evaluate import evaluate, make_evaluators
from jaxrl_fp16.training.runs.positions import check_positions
from jaxrl_fp16.training.runs.setup import opened, set_up_alone


def run_eval(config):
    """Prints a table of `evaluation.sets`, and the same as one JSON line."""
    setup = set_up_alone("eval", config)
    config = setup.config
    if not config.evaluation.sets:
        raise ConfigError("evaluation.sets is empty; allowed: one set or more")
    with opened(setup) as bench, Console() as log:
        check_positions(config, "eval", bench.model.config.max_positions)
        with naming("evaluation"):
            evaluators = make_evaluators(bench)
        params, key, metrics = bench.load_params(), setup.keys.evaluation, {}
        for evaluator in evaluators:
            with log.announce(f"evaluating {evaluator.name}"):
                found = evaluate(evaluator, params, setup, config.training.max_prompt_tokens, key, log.status)
            metrics |= found
            log.say(_line(evaluator.name, found))
    log = Console()
    rows = [(name.removeprefix("eval/"), f"{value:.4g}") for name, value in metrics.items()]
    log.table(f"{config.model.path or 'random weights'} in {setup.precision.name}", ("", "value"), rows)
    log.say(json.dumps(metrics))
    return 0


def _line(name, found):
    """What is known of a set as soon as it is done."""
    accuracy, error, problems = (found[f"eval/{name}/{key}"] for key in ("accuracy", "stderr", "problems"))
    return f"{name}: accuracy {accuracy:.4g} +- {error:.2g} on {problems:.0f} problems"
