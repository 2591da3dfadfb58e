"""The commands beside `train`: each an exit code, on the same setup, forward and guarded step."""

from __future__ import annotations

import json

from jaxrl_fp16.config import ConfigError
from jaxrl_fp16.console import Console
from jaxrl_fp16.parallel import row_shards
from jaxrl_fp16.rl import needs_critic, needs_reference
from jaxrl_fp16.tasks import Example, render
from jaxrl_fp16.tokenizer import encode_prompts
from jaxrl_fp16.training.collect import PromptBatch, sample_and_grade
from jaxrl_fp16.training.engine import make_engine
from jaxrl_fp16.training.evaluate import evaluate, make_evaluators
from jaxrl_fp16.training.follow import follow
from jaxrl_fp16.training.learner import Learner, make_learner
from jaxrl_fp16.training.pairs import check_preferences, make_held_out, optimize, preference_learner
from jaxrl_fp16.training.run import open_run
from jaxrl_fp16.training.run_config import resolve_algorithm
from jaxrl_fp16.training.setup import naming, opened, set_up_alone
from jaxrl_fp16.training.supervised import check_pairs, fresh_state, supervise
from jaxrl_fp16.training.warm_start import Start, begin, drop_warm_start, log_start, restored, warm_start

SFT_LINE = (("loss", "loss", ".4f"), ("gradient norm", "grad_norm", ".2f"), ("scale", "loss_scale", ",g"))
DPO_LINE = (
    ("loss", "loss", ".4f"), ("accuracy", "accuracy", ".3f"), ("margin", "reward_margin", ".3f"),
    ("gradient norm", "grad_norm", ".2f"), ("scale", "loss_scale", ",g"),
)


def run_sft(config):
    """Supervised training; evaluations, checkpoints, resume, signals and export as in `train`."""
    steps = config.sft.steps
    if not steps:
        raise ConfigError("sft.steps is 0; allowed: 1 or more")
    with open_run(config, "sft", check=check_pairs) as (run, params):
        learner = Learner(fresh_state(run, params))
        start = Start(learner) if run.starts_anew() else restored(run, learner)
        run.start_log(start.step, steps, line=SFT_LINE)
        run.log.say(f"supervised: {steps} steps of {config.sft.batch_size} rows")
        taken = supervise(run, start.learner.actor, start.position, start.step)
        evaluate = lambda learner: run.evaluate(learner.sampling_params)
        return follow(run, start.learner, taken, steps, config.sft.optimizer, evaluate)


def run_warmup(config):
    """The warm start of `train` alone, as the model folder that runs of any precision may begin from."""
    if not config.sft.steps:
        raise ConfigError("sft.steps is 0; allowed: 1 or more")
    with open_run(config, "warmup", check=check_pairs) as (run, params):
        params, metrics, code = warm_start(run, params)
        if code:
            return code
        run.start_log(0, config.sft.steps, line=(("loss", "sft/loss", ".4f"),))
        run.log.metrics(metrics["sft/steps"], metrics)
        run.export(params)
        drop_warm_start(run)
    return 0


def run_dpo(config):
    """Preference optimization, after a warm start where `sft.steps` asks for one; all else as in `run_sft`."""
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


def run_eval(config):
    """Prints a table of `evaluation.sets`, and the same as one JSON line."""
    setup = set_up_alone("eval", config)
    config, log = setup.config, Console()
    if not config.evaluation.sets:
        raise ConfigError("evaluation.sets is empty; allowed: one set or more")
    with opened(setup) as bench:
        with naming("evaluation"):
            evaluators = make_evaluators(bench)
        params, key, metrics = bench.load_params(), setup.keys.evaluation, {}
        for evaluator in evaluators:
            with log.announce(f"evaluating {evaluator.name}"):
                metrics |= evaluate(evaluator, params, setup, config.training.max_prompt_tokens, key)
    rows = [(name.removeprefix("eval/"), f"{value:.4g}") for name, value in metrics.items()]
    log.table(f"{config.model.path or 'random weights'} in {setup.precision.name}", ("", "value"), rows)
    log.say(json.dumps(metrics))
    return 0


def run_generate(config):
    """Prints a group of responses to each prompt, with rewards where the problem has an answer."""
    setup = set_up_alone("generate", config)
    config, log = setup.config, Console()
    with opened(setup) as bench:
        task = bench.task
        known = (task.heldout or task.train)[: config.generate.count]
        examples = [Example(text, "") for text in config.generate.prompts] or list(known)
        prompts = _prompts(config, setup, task, examples)
        engine, params = make_engine(setup, bench.model), bench.load_params()
        with log.announce("compiling the sampler"):
            graded = sample_and_grade(engine, params, prompts, task, setup, setup.keys.evaluation)
    for text, example, responses, rewards in zip(prompts.texts, examples, graded.responses, graded.rewards.values):
        log.say(f"> {text}")
        for response, reward in zip(responses, rewards):
            log.say(f"{response}   [{reward:g}]" if example.answer else response)
    return 0


def _prompts(config, setup, task, examples):
    length = config.training.max_prompt_tokens
    examples = [*examples, *examples[:1] * (-len(examples) % row_shards(setup.mesh))]  # the caller drops the surplus
    texts = [render(task.template, example, setup.tokenizer) for example in examples]
    tokens, mask, kept = encode_prompts(setup.tokenizer, texts, length)
    if not kept.all():
        raise ConfigError(
            f"generate: prompt {texts[int(kept.argmin())][:60]!r} is longer than training.max_prompt_tokens = {length}"
        )
    return PromptBatch(examples, texts, tokens, mask, 0, 0)


def run_export(config):
    """Writes the newest sound checkpoint of `resume` as RUN_FOLDER/model."""
    if config.resume is None:
        raise ConfigError("export needs --resume RUN_FOLDER, the run whose checkpoint is to be exported")
    algorithm = resolve_algorithm(config)
    others = dict(reference=needs_reference(algorithm), critic=needs_critic(algorithm))
    with open_run(config, None, **others) as (run, params):
        template = make_learner(run, algorithm, params)
        # What was saved depends on the command too: `sft` keeps the policy alone, and `dpo` always a reference.
        saved = template.replace(reference=template.sampling_params).saved()
        kept = {name: part if name == "policy" or run.checkpoints.holds(name) else None for name, part in saved.items()}
        found, _, step = run.checkpoints.restore(kept, _chosen(run))
        run.log.say(f"the checkpoint of step {step}")
        run.export(Learner.of_saved(found).sampling_params)
    return 0


def _chosen(run):
    """The step that `checkpoint.export` asks for; None: the newest sound one."""
    section = run.config.checkpoint
    if section.export == "latest":
        return None
    best = run.checkpoints.best()
    if best is None:
        raise ConfigError(f"checkpoint.export is 'best' and no checkpoint of {run.folder} has a {section.best!r}; "
                          "allowed: latest")
    return best
