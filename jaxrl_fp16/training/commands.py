"""The commands beside `train`: each an exit code, on the same setup, forward and guarded step."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
import signal

import jax

from jaxrl_fp16.config import ConfigError
from jaxrl_fp16.console import Console
from jaxrl_fp16.logs import truncate
from jaxrl_fp16.models import param_shardings
from jaxrl_fp16.sampling import make_sampler
from jaxrl_fp16.tasks import Example, open_task, render
from jaxrl_fp16.tokenizer import encode_prompts
from jaxrl_fp16.training.checkpoint import Checkpoints
from jaxrl_fp16.training.collect import PromptBatch, sample_and_grade
from jaxrl_fp16.training.evaluate import evaluate, make_evaluators
from jaxrl_fp16.training.learn import Learner
from jaxrl_fp16.training.loop import (
    announced, caught_signals, check_skips, export, make_learner, naming, open_checkpoints, open_folder, open_log,
    refused,
)
from jaxrl_fp16.training.optimizer import make_optimizer, make_schedule
from jaxrl_fp16.training.run_config import resolve_algorithm
from jaxrl_fp16.training.setup import load_model, set_up, write_record
from jaxrl_fp16.training.sft import make_sft_update
from jaxrl_fp16.training.state import create_train_state
from jaxrl_fp16.training.supervised import supervised_steps

SFT_LINE = (("loss", "loss", ".4f"), ("gradient norm", "grad_norm", ".2f"), ("scale", "loss_scale", ",g"))


def run_sft(config):
    """Supervised training; evaluations, checkpoints, resume and export as in `train`."""
    if not config.sft.steps:
        raise ConfigError("sft.steps is 0; allowed: 1 or more")
    setup = set_up(config)
    config, section = setup.config, setup.config.sft
    with contextlib.ExitStack() as stack:
        task = stack.enter_context(refused("task", open_task, config.task))
        keys = jax.random.split(jax.random.key(config.run.seed), 4)
        model, params = load_model(setup, keys[0])
        with naming("evaluation"):
            evaluators = make_evaluators(config, model, setup, task)
        folder = open_folder(config)
        log = Console()
        checkpoints = stack.enter_context(open_checkpoints(folder, config, lambda text: log.say(text)))
        signals = stack.enter_context(caught_signals())
        write_record(setup, folder)
        optimizer = make_optimizer(section.optimizer)
        state = create_train_state(
            params, optimizer, setup.precision.loss_scale, keys[1], param_shardings(model, setup.mesh)
        )
        start = position = 0
        if config.resume is not None:
            learner, extra, start = checkpoints.restore(Learner(state))
            state, position = learner.policy, extra["position"]
            truncate(folder, start)
        whole = dataclasses.replace(config, run=dataclasses.replace(config.run, steps=section.steps))
        log = stack.enter_context(open_log(folder, whole, start, line=SFT_LINE))
        log.say(f"{folder}: supervised, {section.steps} steps in {setup.precision.name}")

        update = make_sft_update(model, setup.precision.policy, optimizer, microbatch_size=section.microbatch_size)
        steps = supervised_steps(config, setup, task, update, state, first=start, position=position)
        skipped_in_a_row = 0
        with naming("sft"), announced(log, True, "compiling the update"):
            first = next(steps, None)
        for step, state, metrics, position in _chain(first, steps):
            metrics = {name: float(value) for name, value in metrics.items()}
            skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped"] else 0
            check_skips(
                skipped_in_a_row, state.loss_scale, metrics["skipped"], config.training.max_skipped_steps, checkpoints
            )
            metrics["learning_rate"] = float(make_schedule(section.optimizer)(state.step))
            last = step == section.steps or signals.received is not None
            if config.evaluation.every and step % config.evaluation.every == 0 or last:
                for evaluator in evaluators:
                    metrics |= evaluate(evaluator, state.params, setup, config.training.max_prompt_tokens, keys[3])
            log.metrics(step, metrics)
            if checkpoints.due(step) or last:
                checkpoints.save(step, Learner(state), {"position": position})
            if signals.received is not None:
                checkpoints.wait()
                log.say(f"stopped by {signal.Signals(signals.received).name}; saved after step {step}")
                return 128 + signals.received
        export(config, setup, model, state.params, folder / "model")
        log.say(f"weights for Transformers and vLLM: {folder / 'model'}")
        return 0


def _chain(first, rest):
    if first is not None:
        yield first
        yield from rest


def run_eval(config):
    """Prints a table of `evaluation.sets`, and the same as one JSON line."""
    setup = set_up(config)
    config, log = setup.config, Console()
    if not config.evaluation.sets:
        raise ConfigError("evaluation.sets is empty; allowed: one set or more")
    with refused("task", open_task, config.task) as task:
        keys = jax.random.split(jax.random.key(config.run.seed), 4)
        model, params = load_model(setup, keys[0])
        with naming("evaluation"):
            evaluators = make_evaluators(config, model, setup, task)
        metrics = {}
        for evaluator in evaluators:
            with log.announce(f"evaluating {evaluator.name}"):
                metrics |= evaluate(evaluator, params, setup, config.training.max_prompt_tokens, keys[3])
    rows = [(name.removeprefix("eval/"), f"{value:.4g}") for name, value in metrics.items()]
    log.table(f"{config.model.path or 'random weights'} in {setup.precision.name}", ("", "value"), rows)
    log.say(json.dumps(metrics))
    return 0


def run_generate(config):
    """Prints a group of responses to each prompt, with rewards where the task has an answer."""
    setup = set_up(config)
    config, log = setup.config, Console()
    with refused("task", open_task, config.task) as task:
        keys = jax.random.split(jax.random.key(config.run.seed), 4)
        model, params = load_model(setup, keys[0])
        known = (task.heldout or task.train)[: config.generate.count]
        examples = [Example(text, "") for text in config.generate.prompts] or list(known)
        prompts = _prompts(config, setup, task, examples)
        sample = make_sampler(
            model, setup.rollout_precision.policy, config.sampling,
            eos_id=setup.eos_ids, pad_id=setup.pad_id, tokenizer=setup.tokenizer,
        )
        with log.announce("compiling the sampler"):
            graded = sample_and_grade(
                sample, params, prompts, task, setup.tokenizer, setup.eos_ids, keys[3], setup.mesh
            )
    for text, example, group, rewards in zip(prompts.texts, examples, graded.responses, graded.rewards.values):
        log.say(f"> {text}")
        for response, reward in zip(group, rewards):
            log.say(f"{response}   [{reward:g}]" if example.answer else response)
    return 0


def _prompts(config, setup, task, examples):
    length = config.training.max_prompt_tokens
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
    setup = set_up(config)
    config, log = setup.config, Console()
    folder = open_folder(config)
    keys = jax.random.split(jax.random.key(config.run.seed), 4)
    model, params = load_model(setup, keys[0])
    optimizer, critic_optimizer = make_optimizer(config.optimizer), make_optimizer(config.critic.optimizer)
    learner = make_learner(
        config, resolve_algorithm(config), setup, model, params, keys, optimizer, critic_optimizer
    )
    with Checkpoints(Path(folder) / "checkpoints", config.checkpoint, say=log.say) as checkpoints:
        learner, _, step = checkpoints.restore(learner)
    export(config, setup, model, learner.policy.params, folder / "model")
    log.say(f"step {step} as {folder / 'model'}")
    return 0


__all__ = ["run_sft", "run_eval", "run_generate", "run_export"]
