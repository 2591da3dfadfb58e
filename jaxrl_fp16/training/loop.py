"""`train`: sample, grade, score, update, again and again."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
import time

import jax

from jaxrl_fp16.parallel import to_host
from jaxrl_fp16.rl import needs_critic, needs_reference
from jaxrl_fp16.sampling import make_sampler
from jaxrl_fp16.training.collect import next_prompts, sample_and_grade, truncation_rule
from jaxrl_fp16.training.dynamic import sample_unequal
from jaxrl_fp16.training.guards import Guard, SkipGuard, check_bounds
from jaxrl_fp16.training.learn import learn, make_programs
from jaxrl_fp16.training.learner import check_critic, critic_model, make_learner
from jaxrl_fp16.training.memory import peak_bytes
from jaxrl_fp16.training.optimizer import make_schedule
from jaxrl_fp16.training.run import announced, open_run
from jaxrl_fp16.training.run_config import resolve_algorithm
from jaxrl_fp16.training.setup import naming
from jaxrl_fp16.training.supervised import check_pairs
from jaxrl_fp16.training.terms import tokenisation_terms
from jaxrl_fp16.training.warm_start import drop_warm_start, keep_warm_start, warm_start
from jaxrl_fp16.training.watch import Watch


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
    make_critic = _critic_of(algorithm)
    with open_training(config) as (run, params):
        config, setup, t = run.config, run.setup, run.config.training
        rows = t.prompts_per_step * config.sampling.group_size
        run.log.say(
            f"{algorithm.preset}: {config.run.steps} steps of {t.prompts_per_step} prompts x "
            f"{config.sampling.group_size} = {rows} rows, in minibatches of {t.minibatch_size}"
        )
        # The policy: warm-started if asked for, or as a checkpoint left it.
        anew, metrics, code = run.starts_anew(), {}, 0
        if config.sft.steps and anew:
            params, metrics, code = warm_start(run, params)
        if code:
            return Outcome(run.folder, config.precision, code)
        learner, start, position = make_learner(run, algorithm, params), 0, 0
        if not anew:
            learner, position, start = run.restore(learner)
        run.start_log(start, config.run.steps)
        if t.probe:
            run.log.say("probe: learning rate 0; no weight moves from here on, nothing is saved and nothing exported")
        if anew:
            run.log.metrics(0, metrics | run.evaluate(learner.policy.params))
        if config.sft.steps and anew:
            if t.probe:
                drop_warm_start(run)
            else:
                keep_warm_start(run, learner)

        # The programs: each compiles once.
        critic = make_critic(config, run.model) if make_critic else None
        programs = make_programs(config, algorithm, run.model, critic, setup, learner)
        sample = make_sampler(
            run.model, setup.rollout_precision.policy, config.sampling,
            eos_id=setup.eos_ids, pad_id=setup.pad_id, tokenizer=setup.tokenizer,
        )
        guard, watch = SkipGuard(run), Watch(run, algorithm)
        rounds = t.max_sampling_rounds if algorithm.dynamic_sampling else 1

        for step in range(start + 1, config.run.steps + 1):
            began, first = time.perf_counter(), step == start + 1
            key, sample_key, order_key = jax.random.split(learner.policy.key, 3)
            learner = learner.replace(policy=learner.policy.replace(key=key))

            # Prompts, a group of responses to each, and what they earn.
            run.stage(f"step {step}: sampling and grading")
            draw = partial(draw_batch, run, sample, learner.policy.params, sample_key)
            with announced(run.log, first, "compiling the sampler"):
                prompts, graded, draws = sample_unequal(draw, position, rounds, t.truncated, setup.mesh)
            position = prompts.position
            sampled = time.perf_counter()

            # Log-probs, advantages, optimizer steps.
            run.stage(f"step {step}: learning")
            with announced(run.log, first, "compiling scorer and update"):
                learner, metrics, taken = learn(
                    config, algorithm, programs, learner, graded, order_key, setup.mesh,
                    critic_alone=learner.critic is not None and step <= config.critic.warmup_steps,
                    keep=watch.keep,
                )
            done = time.perf_counter()

            # What happened, and what is kept of it.
            metrics |= rollout_metrics(config, graded, prompts, draws) | retokenised(run, graded.rollout)
            metrics |= {
                "learning_rate": 0.0 if t.probe else float(make_schedule(config.optimizer)(learner.policy.step)),
                "seconds/sample": sampled - began, "seconds/learn": done - sampled,
                "tokens_per_second": draws.tokens / (done - began),
            }
            peak = peak_bytes(setup.mesh.local_devices[0])
            metrics |= {} if peak is None else {"memory/device_peak_bytes": peak}
            metrics |= watch.look(step, learner.policy, taken)
            last = step == config.run.steps
            if (last or run.evaluation_due(step)) and not t.probe:  # its weights were evaluated at the start
                metrics |= run.evaluate(learner.policy.params)
            run.stage(f"step {step}: writing")
            run.log.metrics(step, metrics)
            run.log.samples(step, sample_records(prompts, graded))
            for step_metrics in taken:
                guard.check(step_metrics)
            check_bounds(run, step, metrics)
            stops = run.stops()
            if (last or stops or run.checkpoints.due(step)) and not t.probe:
                run.checkpoints.save(step, learner, {"position": position}, metrics)
            if stops:
                code = run.end_by_signal(step, "a probe saves nothing" if t.probe else None)
                return Outcome(run.folder, config.precision, code)

        if config.run.export and not t.probe:
            run.export(learner.policy.params)
        return Outcome(run.folder, config.precision, 0, t.probe)


# -- before the first step -----------------------------------------------------------------------


def open_training(config):
    """`open_run` as `train` needs it: with all that can be refused before the start."""
    algorithm = resolve_algorithm(config)
    return open_run(
        config, "train", check=check_data, reference=needs_reference(algorithm), critic=_critic_of(algorithm),
        rewarded=True,
    )


def _critic_of(algorithm):
    return critic_model if needs_critic(algorithm) else None


def check_data(setup, task):
    """Refuses data without a prompt, or for the warm start a solution, that fits; and a critic that does not."""
    config, t = setup.config, setup.config.training
    check_critic(setup)
    with naming("training"):
        next_prompts(task, setup.tokenizer, 0, t.prompts_per_step, t.max_prompt_tokens, config.run.seed)
    if config.sft.steps:
        check_pairs(setup, task)


# -- within a step -------------------------------------------------------------------------------


def draw_batch(run, sample, params, key, position, number):
    """`(PromptBatch, Graded)`: the prompts from `position` on, and what `params` made of them in draw `number`."""
    t, setup = run.config.training, run.setup
    prompts = next_prompts(
        run.task, setup.tokenizer, position, t.prompts_per_step, t.max_prompt_tokens, run.config.run.seed
    )
    key = jax.random.fold_in(key, number) if number else key
    graded = sample_and_grade(sample, params, prompts, run.task, setup, key)
    check_rewards(graded.rewards, t.max_failed_rewards)
    return prompts, graded


def check_rewards(rewards, allowed):
    """Stops a run whose reward function fails too often: a wrong baseline is worse than none."""
    if rewards.failures > allowed * rewards.values.size:
        raise Guard(
            f"{rewards.failures} of {rewards.values.size} rewards failed ({rewards.first_error}); "
            f"allowed: a share of training.max_failed_rewards = {allowed}"
        )


def rollout_metrics(config, graded, prompts, draws):
    """Rewards, lengths, what was set aside, and what it took to sample them."""
    rewards, valid = graded.rewards, graded.rewards.valid
    used = truncation_rule(config.training.truncated, graded)[0].reshape(valid.shape)
    known = used[valid]
    return {
        "reward": float(known.mean()) if known.size else 0.0,
        "reward_std": float(known.std()) if known.size else 0.0,
        "groups_of_equal_reward": draws.equal_groups / draws.groups,
        "groups_of_equal_reward_used": draws.equal_groups_used / len(used),
        "sampling_rounds": draws.rounds,
        "rewards_failed": rewards.failures,
        "grader_timeouts": rewards.timeouts,
        "response_length": float(graded.lengths.mean()),
        "response_length_max": int(graded.lengths.max()),
        "truncated": float(1 - graded.finished.mean()),
        "prompts_set_aside": prompts.set_aside,
    }


def retokenised(run, rollout):
    """What a server that works on text would change of `rollout`."""
    rows = run.config.training.tokenisation_rows
    if not rows:
        return {}
    arrays = (to_host(x) for x in (rollout.tokens, rollout.mask, rollout.response_mask))
    return tokenisation_terms(run.setup.tokenizer, *arrays, run.setup.eos_ids, rows)


def sample_records(prompts, graded):
    """Rollouts as text: the first response of each group before the second ones."""
    groups = list(zip(prompts.texts, prompts.examples, graded.responses, graded.rewards.values))
    for place in range(len(graded.responses[0])):
        for prompt, example, responses, rewards in groups:
            yield {
                "prompt": prompt, "response": responses[place], "answer": example.answer,
                "reward": float(rewards[place]),
            }


__all__ = ["Outcome", "open_training", "train"]
