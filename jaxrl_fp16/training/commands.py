"""The commands beside `train`: each an exit code, on the same setup, forward and guarded step."""

from __future__ import annotations

import json

import jax

from jaxrl_fp16.config import ConfigError
from jaxrl_fp16.console import Console
from jaxrl_fp16.parallel import row_shards
from jaxrl_fp16.rl import needs_critic, needs_reference
from jaxrl_fp16.sampling import make_sampler
from jaxrl_fp16.tasks import Example, open_task, render
from jaxrl_fp16.tokenizer import encode_prompts
from jaxrl_fp16.training.collect import PromptBatch, sample_and_grade
from jaxrl_fp16.training.evaluate import evaluate, make_evaluators
from jaxrl_fp16.training.guards import SkipGuard, check_bounds
from jaxrl_fp16.training.learn import Learner
from jaxrl_fp16.training.learner import critic_model, make_learner
from jaxrl_fp16.training.optimizer import make_schedule
from jaxrl_fp16.training.pairs import check_preferences, make_held_out, optimize, preference_learner
from jaxrl_fp16.training.run import naming_at_entry, open_run
from jaxrl_fp16.training.run_config import resolve_algorithm
from jaxrl_fp16.training.setup import load_params, make_model, naming, set_up
from jaxrl_fp16.training.supervised import check_pairs, fresh_state, supervise
from jaxrl_fp16.training.warm_start import drop_warm_start, keep_warm_start, warm_start

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
        learner, place, start = Learner(fresh_state(run, params)), 0, 0
        if not run.starts_anew():
            learner, place, start = run.restore(learner)
        run.start_log(start, steps, line=SFT_LINE)
        run.log.say(f"supervised: {steps} steps of {config.sft.batch_size} rows")
        taken = supervise(run, learner.policy, place, start)
        return _follow(run, learner, taken, steps, config.sft.optimizer, run.evaluate)


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
    steps = config.dpo.steps
    with open_run(config, "dpo", check=check_preferences, reference=True) as (run, params):
        anew, metrics, code = run.starts_anew(), {}, 0
        if config.sft.steps and anew:
            params, metrics, code = warm_start(run, params)
        if code:
            return code
        # A checkpoint holds the reference: a warm start leads to it, and a folder may change.
        learner, place, start = preference_learner(run, params), 0, 0
        if not anew:
            learner, place, start = run.restore(learner)
        run.start_log(start, steps, line=DPO_LINE)
        section = config.dpo
        run.log.say(f"dpo ({section.loss}, beta {section.beta:g}): {steps} steps of {section.batch_size} pairs")
        held_out = make_held_out(run, learner.reference)

        def evaluate(params):
            return run.evaluate(params) | held_out(params)

        if anew:
            run.log.metrics(0, metrics | evaluate(learner.policy.params))
        if config.sft.steps and anew:
            keep_warm_start(run, learner)
        taken = optimize(run, learner, place, start)
        return _follow(run, learner, taken, steps, config.dpo.optimizer, evaluate)


def _follow(run, learner, taken, steps, optimizer, evaluate):
    """Goes through the steps that `taken` yields as `(step, state, metrics, position)`: logs, evaluates, saves,
    exports. Gives the exit code."""
    guard, schedule = SkipGuard(run), make_schedule(optimizer)
    run.stage("the first step")
    for step, state, metrics, position in taken:
        run.stage(f"what follows step {step}")
        learner = learner.replace(policy=state)
        metrics = {name: float(value) for name, value in metrics.items()}
        metrics["learning_rate"] = float(schedule(state.step))
        last = step == steps
        if last or run.evaluation_due(step):
            metrics |= evaluate(state.params)
        run.log.metrics(step, metrics)
        guard.check(metrics)
        check_bounds(run, step, metrics)
        stops = run.stops()
        if last or stops or run.checkpoints.due(step):
            run.checkpoints.save(step, learner, {"position": position}, metrics)
        if stops:
            return run.end_by_signal(step)
    if run.config.run.export:
        run.export(learner.policy.params)
    return 0


def run_eval(config):
    """Prints a table of `evaluation.sets`, and the same as one JSON line."""
    setup = _set_up_alone("eval", config)
    config, log = setup.config, Console()
    if not config.evaluation.sets:
        raise ConfigError("evaluation.sets is empty; allowed: one set or more")
    with naming_at_entry("task", open_task(config.task)) as task:
        keys = jax.random.split(jax.random.key(config.run.seed), 4)
        model = make_model(setup)
        with naming("evaluation"):
            evaluators = make_evaluators(config, model, setup, task)
        params = load_params(setup, model, keys[0])
        metrics = {}
        for evaluator in evaluators:
            with log.announce(f"evaluating {evaluator.name}"):
                metrics |= evaluate(evaluator, params, setup, config.training.max_prompt_tokens, keys[3])
    rows = [(name.removeprefix("eval/"), f"{value:.4g}") for name, value in metrics.items()]
    log.table(f"{config.model.path or 'random weights'} in {setup.precision.name}", ("", "value"), rows)
    log.say(json.dumps(metrics))
    return 0


def run_generate(config):
    """Prints a group of responses to each prompt, with rewards where the problem has an answer."""
    setup = _set_up_alone("generate", config)
    config, log = setup.config, Console()
    with naming_at_entry("task", open_task(config.task)) as task:
        keys = jax.random.split(jax.random.key(config.run.seed), 4)
        model = make_model(setup)
        known = (task.heldout or task.train)[: config.generate.count]
        examples = [Example(text, "") for text in config.generate.prompts] or list(known)
        prompts = _prompts(config, setup, task, examples)
        sample = make_sampler(
            model, setup.rollout_precision.policy, config.sampling,
            eos_id=setup.eos_ids, pad_id=setup.pad_id, tokenizer=setup.tokenizer,
        )
        params = load_params(setup, model, keys[0])
        with log.announce("compiling the sampler"):
            graded = sample_and_grade(sample, params, prompts, task, setup, keys[3])
    for text, example, responses, rewards in zip(prompts.texts, examples, graded.responses, graded.rewards.values):
        log.say(f"> {text}")
        for response, reward in zip(responses, rewards):
            log.say(f"{response}   [{reward:g}]" if example.answer else response)
    return 0


def _set_up_alone(command, config):
    if config.resume is not None:
        raise ConfigError(f"{command} reads no run folder; allowed: --model.path {config.resume}/model, after export")
    return set_up(config)


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
    critic = critic_model if needs_critic(algorithm) else None
    with open_run(config, None, reference=needs_reference(algorithm), critic=critic) as (run, params):
        template = make_learner(run, algorithm, params)
        # What was saved hangs on the command too: `sft` keeps the policy alone, and `dpo` always a reference.
        reference = template.policy.params if run.checkpoints.holds("reference") else None
        critic = template.critic if run.checkpoints.holds("critic") else None
        chosen = _chosen(run)
        learner, _, step = run.checkpoints.restore(template.replace(reference=reference, critic=critic), chosen)
        run.log.say(f"the checkpoint of step {step}")
        run.export(learner.policy.params)
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


__all__ = ["run_sft", "run_warmup", "run_dpo", "run_eval", "run_generate", "run_export"]
