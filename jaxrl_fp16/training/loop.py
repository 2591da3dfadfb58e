"""`train`: sample, grade, score, update, again and again."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
import signal
import time

import jax
import numpy as np

from jaxrl_fp16.config import ConfigError, to_dict, to_yaml
from jaxrl_fp16.console import Console
from jaxrl_fp16.logs import RunLog, truncate
from jaxrl_fp16.models import Critic, critic_params, load_pretrained, param_shapes, param_shardings, save_pretrained
from jaxrl_fp16.rl import needs_critic, needs_reference
from jaxrl_fp16.sampling import make_sampler
from jaxrl_fp16.tasks import open_task
from jaxrl_fp16.training.checkpoint import Checkpoints
from jaxrl_fp16.training.collect import next_prompts, sample_and_grade, truncation_rule
from jaxrl_fp16.training.evaluate import evaluate, make_evaluators
from jaxrl_fp16.training.learn import Learner, learn, make_programs
from jaxrl_fp16.training.memory import MIB, check_fits, device_bytes, estimate
from jaxrl_fp16.training.optimizer import make_optimizer, make_schedule
from jaxrl_fp16.training.run_config import resolve_algorithm
from jaxrl_fp16.training.setup import check_resumed, load_model, new_folder, set_up, write_record
from jaxrl_fp16.training.sft import make_sft_update
from jaxrl_fp16.training.state import create_train_state
from jaxrl_fp16.training.supervised import supervised_steps


class Guard(RuntimeError):
    """A run stopped itself; one line with the cause and what to try."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    code: int       # 0, or 128 + the signal that ended it
    steps: int      # iterations done


def train(config):
    """Runs `config` to its end and returns an `Outcome`.

    Raises ConfigError for what is refused before the start, `Guard` and
    `CheckpointError` for a run that stopped itself.
    """
    setup = set_up(config)
    config, algorithm = setup.config, resolve_algorithm(config)
    with contextlib.ExitStack() as stack:
        task = stack.enter_context(refused("task", open_task, config.task))
        keys = jax.random.split(jax.random.key(config.run.seed), 4)
        model, params = load_model(setup, keys[0])
        with naming("evaluation"):
            evaluators = make_evaluators(config, model, setup, task)
        needs = check_memory(config, model, setup, algorithm)
        folder = open_folder(config)
        log = Console()  # until it is known where in the files the run goes on
        checkpoints = stack.enter_context(open_checkpoints(folder, config, lambda text: log.say(text)))
        signals = stack.enter_context(caught_signals())
        introduce(log, setup, algorithm, model, folder, needs)
        write_record(setup, folder)

        # The state: fresh after a warm start, or as a checkpoint left it.
        optimizer, critic_optimizer = make_optimizer(config.optimizer), make_optimizer(config.critic.optimizer)
        start, position, metrics = 0, 0, {}
        if config.resume is None and config.sft.steps:
            params, metrics = warm_start(config, setup, task, model, params, keys[1], log)
        learner = make_learner(config, algorithm, setup, model, params, keys, optimizer, critic_optimizer)
        if config.resume is not None:
            learner, extra, start = checkpoints.restore(learner)
            position = extra["position"]
            log.say(f"resumed after step {start}")
            truncate(folder, start)
        log = stack.enter_context(open_log(folder, config, start))

        programs = make_programs(config, algorithm, model, setup, optimizer, critic_optimizer)
        sample = make_sampler(
            model, setup.rollout_precision.policy, config.sampling,
            eos_id=setup.eos_ids, pad_id=setup.pad_id, tokenizer=setup.tokenizer,
        )
        if start == 0:
            metrics |= evaluate_all(evaluators, learner, setup, config, keys[3], log)
            log.metrics(0, metrics)

        skipped_in_a_row = 0
        for step in range(start + 1, config.run.steps + 1):
            # Prompts, and a group of graded responses to each.
            began = time.perf_counter()
            key, sample_key, order_key = jax.random.split(learner.policy.key, 3)
            learner = learner.replace(policy=learner.policy.replace(key=key))
            t = config.training
            prompts = next_prompts(
                task, setup.tokenizer, position, t.prompts_per_step, t.max_prompt_tokens, config.run.seed
            )
            position = prompts.position
            with announced(log, step == start + 1, "compiling the sampler"):
                graded = sample_and_grade(
                    sample, learner.policy.params, prompts, task, setup.tokenizer, setup.eos_ids, sample_key, setup.mesh
                )
            check_rewards(graded.rewards, t.max_failed_rewards)
            sampled = time.perf_counter()

            # Log-probs, advantages, optimizer steps.
            with announced(log, step == start + 1, "compiling scorer and update"):
                learner, metrics, skips = learn(config, algorithm, programs, learner, graded, order_key, setup.mesh)
            for skip in skips:
                skipped_in_a_row = skipped_in_a_row + 1 if skip else 0
                check_skips(skipped_in_a_row, learner.policy.loss_scale, skip, t.max_skipped_steps, checkpoints)

            # What happened.
            done = time.perf_counter()
            metrics |= rollout_metrics(config, graded, prompts)
            metrics |= {
                "learning_rate": float(make_schedule(config.optimizer)(learner.policy.step)),
                "seconds/sample": sampled - began, "seconds/learn": done - sampled,
                "tokens_per_second": float(graded.lengths.sum()) / (done - began),
            }
            last = step == config.run.steps or signals.received is not None
            if config.evaluation.every and step % config.evaluation.every == 0 or last:
                metrics |= evaluate_all(evaluators, learner, setup, config, keys[3], log)
            log.metrics(step, metrics)
            log.samples(step, sample_records(prompts, graded))
            if checkpoints.due(step) or last:
                checkpoints.save(step, learner, {"position": position})
            if signals.received is not None:
                checkpoints.wait()
                log.say(f"stopped by {signal.Signals(signals.received).name}; saved after step {step}")
                return Outcome(folder, 128 + signals.received, step)

        if config.run.export:
            export(config, setup, model, learner.policy.params, folder / "model")
            log.say(f"weights for Transformers and vLLM: {folder / 'model'}")
        return Outcome(folder, 0, config.run.steps)


# -- before the first step -----------------------------------------------------------------------


@contextlib.contextmanager
def naming(section):
    """Turns a ValueError into a refusal that names the section of the config."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(section) else f"{section}: {text}") from error


@contextlib.contextmanager
def refused(section, open_it, *arguments):
    """A context manager whose refusals at its opening, and no later ones, name the section."""
    with contextlib.ExitStack() as stack:
        with naming(section):
            opened = stack.enter_context(open_it(*arguments))
        yield opened


def check_memory(config, model, setup, algorithm):
    """The estimate, `{what: bytes}`; refuses a run that cannot fit."""
    device = setup.mesh.devices.flatten()[0]
    needs = estimate(
        config, model, setup.mesh, setup.precision.policy.compute_dtype,
        reference=needs_reference(algorithm), critic=needs_critic(algorithm),
    )
    with naming("memory"):
        check_fits(needs, device_bytes(device))
    return needs


def open_folder(config):
    """A new run folder, or the one to go on with."""
    if config.resume is None:
        return new_folder(config)
    check_resumed(config, config.resume)
    return Path(config.resume)


def open_checkpoints(folder, config, say):
    """The run's `Checkpoints`."""
    return Checkpoints(folder / "checkpoints", config.checkpoint, resolved=to_yaml(config), say=say)


def open_log(folder, config, start, **console):
    """The run's `RunLog` from step `start` on; one process of several writes."""
    primary = jax.process_index() == 0
    return RunLog(
        folder, config.logging, steps=config.run.steps, resumed=start, primary=primary, facts=to_dict(config),
        **console,
    )


def introduce(log, setup, algorithm, model, folder, needs):
    """What the run will do, and what it will take."""
    config, device = setup.config, setup.mesh.devices.flatten()[0]
    t, policy = config.training, setup.precision.policy
    rows = t.prompts_per_step * config.sampling.group_size
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(model)))
    log.say(
        f"{folder}: {algorithm.preset} in {setup.precision.name} (compute {policy.compute_dtype.name}) "
        f"on {setup.mesh.size} x {device.device_kind}"
    )
    if setup.config.rollout_precision:
        log.say(f"ablation: the sampler computes in {setup.rollout_precision.name}, the trainer in {setup.precision.name}")
    log.say(
        f"{model.config.family}, {size / 1e6:,.2f}M parameters, {config.model.attention} attention; {config.run.steps} steps "
        f"of {t.prompts_per_step} prompts x {config.sampling.group_size} = {rows} rows, minibatches of {t.minibatch_size}"
    )
    log.say("memory, about: " + ", ".join(f"{name} {value / MIB:,.1f} MiB" for name, value in needs.items()))


def warm_start(config, setup, task, model, params, key, log):
    """Supervised steps before the first iteration: `(params, {"sft/loss": of the last step})`."""
    optimizer = make_optimizer(config.sft.optimizer)
    state = create_train_state(
        params, optimizer, setup.precision.loss_scale, key, param_shardings(model, setup.mesh)
    )
    update = make_sft_update(
        model, setup.precision.policy, optimizer, microbatch_size=config.sft.microbatch_size
    )
    steps = supervised_steps(config, setup, task, update, state)
    shown = max(1, config.sft.steps // 5)
    with naming("sft"), announced(log, True, "compiling the warm start"):
        step, state, metrics, _ = next(steps)
    for step, state, metrics, _ in steps:
        if step % shown == 0:
            log.say(f"warm start {step}/{config.sft.steps}  loss {float(metrics['loss']):.3f} nats a token")
    return state.params, {"sft/loss": float(metrics["loss"])}


def make_learner(config, algorithm, setup, model, params, keys, optimizer, critic_optimizer):
    """Fresh states of policy and critic, and the reference where a KL term needs one."""
    shardings = param_shardings(model, setup.mesh)
    scale, critic = setup.precision.loss_scale, None
    reference = jax.tree.map(lambda x: x.copy(), params) if needs_reference(algorithm) else None
    if needs_critic(algorithm):
        body = params
        if config.critic.path is not None:
            with naming("critic"):
                other, body = load_pretrained(config.critic.path, mesh=setup.mesh)
                if other.config != model.config:
                    raise ValueError(f"path {config.critic.path} has another shape than the policy; allowed: the same")
        critic = create_train_state(
            critic_params(body), critic_optimizer, scale, keys[2], param_shardings(Critic(model), setup.mesh)
        )
    policy = create_train_state(params, optimizer, scale, keys[2], shardings)
    return Learner(policy, critic, reference)


# -- within a step -------------------------------------------------------------------------------


def announced(log, first, text):
    """Says what compiles, where this is the first time."""
    return log.announce(text) if first else contextlib.nullcontext()


def check_rewards(rewards, allowed):
    """Stops a run whose reward function fails too often: a wrong baseline is worse than none."""
    share = rewards.failures / rewards.values.size
    if share > allowed:
        raise Guard(
            f"{rewards.failures} of {rewards.values.size} rewards failed ({rewards.first_error}); "
            f"allowed: training.max_failed_rewards = {allowed}"
        )


def check_skips(in_a_row, scale, skipped, limit, checkpoints):
    """Stops a run whose gradients stay non-finite."""
    floored = skipped and bool(scale.at_minimum)
    if in_a_row >= limit or floored:
        latest = checkpoints.latest()
        saved = "there is no checkpoint yet" if latest is None else f"the last checkpoint is of step {latest}"
        cause = "at the loss scale's minimum" if floored else "in a row"
        raise Guard(
            f"{in_a_row} optimizer steps skipped {cause}: gradients are not finite; try precision bf16 or a lower "
            f"optimizer.learning_rate; {saved}"
        )


def rollout_metrics(config, graded, prompts):
    """Rewards, lengths and what was set aside."""
    rewards, valid = graded.rewards, graded.rewards.valid
    used, _ = truncation_rule(config.training.truncated, graded)
    known = used.reshape(valid.shape)[valid]
    spread = used.reshape(valid.shape).max(axis=1) - used.reshape(valid.shape).min(axis=1)
    return {
        "reward": float(known.mean()) if known.size else 0.0,
        "reward_std": float(known.std()) if known.size else 0.0,
        "groups_of_equal_reward": float(np.mean(spread == 0)),
        "rewards_failed": rewards.failures, "grader_timeouts": rewards.timeouts,
        "response_length": float(graded.lengths.mean()), "response_length_max": int(graded.lengths.max()),
        "truncated": float(1 - graded.finished.mean()), "prompts_set_aside": prompts.set_aside,
    }


def sample_records(prompts, graded):
    """Rollouts as text, the first response of each group before the second ones."""
    for place in range(len(graded.responses[0])):
        for prompt, example, group, values in zip(prompts.texts, prompts.examples, graded.responses, graded.rewards.values):
            yield {"prompt": prompt, "response": group[place], "answer": example.answer, "reward": float(values[place])}


def evaluate_all(evaluators, learner, setup, config, key, log):
    """Metrics of every evaluation set."""
    metrics = {}
    for evaluator in evaluators:
        with log.announce(f"evaluating {evaluator.name}"):
            metrics |= evaluate(evaluator, learner.policy.params, setup, config.training.max_prompt_tokens, key)
    return metrics


def export(config, setup, model, params, folder):
    """The weights as a Hugging Face folder, with the settings that they were trained to be sampled with."""
    s = config.sampling
    sampling = {"do_sample": True, "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p} if s.temperature else {}
    generation = {"eos_token_id": list(setup.eos_ids), "pad_token_id": setup.pad_id, **sampling}
    dtype = setup.precision.policy.compute_dtype.name
    save_pretrained(folder, model, params, dtype=dtype, tokenizer=setup.tokenizer, generation_config=generation, overwrite=True)


class Signals:
    """SIGTERM and SIGINT, remembered until the step ends; a second one stops at once."""

    received: int | None = None

    def __call__(self, number, frame):
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number


@contextlib.contextmanager
def caught_signals():
    """A `Signals` that takes both signals while the context lasts."""
    signals = Signals()
    before = {number: signal.signal(number, signals) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Guard", "Outcome", "train"]
