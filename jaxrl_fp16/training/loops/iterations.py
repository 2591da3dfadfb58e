"""RL: sample, grade, score, update, again and again."""

from functools import partial
import time

import jax

from jaxrl_fp16.config import naming
from jaxrl_fp16.objectives import needs_critic, needs_reference
from jaxrl_fp16.parallel import to_host
from jaxrl_fp16.training.loops.follow import Step
from jaxrl_fp16.training.loops.learn import learn, make_programs
from jaxrl_fp16.training.loops.mismatch_terms import tokenisation_terms
from jaxrl_fp16.training.loops.nonfinite import Watch
from jaxrl_fp16.training.loops.supervised import check_solutions
from jaxrl_fp16.training.rollouts.collect import (
    cut_reward, next_prompts, prompt_encoder, sample_and_grade, set_aside, truncation_rule,
)
from jaxrl_fp16.training.rollouts.dynamic import sample_unequal
from jaxrl_fp16.training.rollouts.engine import first_batch, make_engine
from jaxrl_fp16.training.runs.learner import check_critic, critic_model
from jaxrl_fp16.training.runs.run import announced, open_run
from jaxrl_fp16.training.runs.run_config import resolve_algorithm
from jaxrl_fp16.training.runs.setup import check_no_dropout
from jaxrl_fp16.training.safety.guards import Guard
from jaxrl_fp16.training.safety.memory import peak_bytes


def iterations(run, algorithm, start):
    """The RL iterations after `start`: sample, grade, score, update. Yields a Step after each."""
    config, setup, learner, position = run.config, run.setup, start.learner, start.position
    critic = critic_model(config, run.model) if needs_critic(algorithm) else None
    programs = make_programs(setup, algorithm, run.model, critic, learner, run.log.announce)
    engine = make_engine(setup, run.model)
    watch, rounds = Watch(run, algorithm), config.training.max_sampling_rounds if algorithm.dynamic_sampling else 1
    said = False
    for step in range(start.step + 1, config.run.steps + 1):
        began, first = time.perf_counter(), step == start.step + 1
        key, sample_key, order_key = jax.random.split(learner.actor.key, 3)
        learner = learner.replace(actor=learner.actor.replace(key=key))

        # Prompts, a group of responses to each, and what they earn.
        run.stage(f"step {step}: sampling and grading", told=True)
        tell = run.tell(f"step {step}: sampling")
        draw = partial(draw_batch, run, engine, learner.sampling_params, sample_key, tell)
        with announced(run.log, first, first_batch(setup)):
            prompts, graded, draws = sample_unequal(draw, position, rounds, config.training.truncated, setup.mesh)
        position, sampled = prompts.position, time.perf_counter()
        said = said or say_cut_reward(run, step, graded)

        # Log-probs, advantages, optimizer steps.
        run.stage(f"step {step}: learning", told=True)
        critic_alone = critic is not None and step <= config.critic.warmup_steps
        with announced(run.log, first, "compiling scorer and update"):
            learner, metrics, taken = learn(programs, learner, graded, order_key, critic_alone, watch.keep)
        done = time.perf_counter()

        metrics |= rollout_metrics(config, graded, prompts, draws) | retokenised(run, graded.rollout)
        metrics |= {"seconds/sample": sampled - began, "seconds/learn": done - sampled,
                    "tokens_per_second": draws.tokens / (done - began)}
        metrics |= device_peak(setup.mesh) | setup.engines.metrics() | watch.look(step, learner.actor, taken)
        yield Step(step, learner, metrics, position, taken, sample_records(prompts, graded), watch.cause)


# -- before the first step -----------------------------------------------------------------------


def open_training(config):
    """`open_run` as `train` needs it: with all that can be refused before the start."""
    algorithm = resolve_algorithm(config)
    return open_run(
        config, "train", check=check_data, reference=needs_reference(algorithm), critic=needs_critic(algorithm),
        rewarded=True,
    )


def check_data(setup, task):
    """Refuses data without a prompt, or for the warm start a solution, that fits; and a critic that does not. Gives the
    lines that say what is set aside."""
    config, t = setup.config, setup.config.training
    check_no_dropout(config, "train")
    check_critic(setup)
    with naming("training"):
        next_prompts(task, setup.tokenizer, 0, t.prompts_per_step, t.max_prompt_tokens, config.run.seed)
        lines = set_aside(task, prompt_encoder(task, setup.tokenizer, t.max_prompt_tokens), "prompts")
    return lines + (check_solutions(setup, task) if config.sft.steps else [])


# -- within a step -------------------------------------------------------------------------------


def draw_batch(run, engine, params, key, tell, position, number):
    """`(PromptBatch, Graded)`: the prompts from `position` on, and what `params` made of them in draw `number`."""
    t, setup = run.config.training, run.setup
    prompts = next_prompts(
        run.task, setup.tokenizer, position, t.prompts_per_step, t.max_prompt_tokens, run.config.run.seed
    )
    key = jax.random.fold_in(key, number) if number else key
    graded = sample_and_grade(engine, params, prompts, run.task, setup, key, tell)
    check_rewards(graded.rewards, t.max_failed_rewards)
    return prompts, graded


def check_rewards(rewards, allowed):
    """Stops a run whose reward function fails too often: a wrong baseline is worse than none."""
    if rewards.failures > allowed * rewards.values.size:
        raise Guard(
            f"{rewards.failures} of {rewards.values.size} rewards failed ({rewards.first_error}); "
            f"allowed: a share of training.max_failed_rewards = {allowed}"
        )


def say_cut_reward(run, step, graded):
    """Says once that a cut response earns less than 0: else a response would gain by being cut."""
    if run.config.training.truncated != "zero" or graded.finished.all() or cut_reward(graded) == 0:
        return False
    run.log.say(f"step {step}: training.truncated is zero and rewards are negative: a cut response earns the least "
                f"reward of its batch, here {cut_reward(graded):g}")
    return True


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
        "unknown_tokens": graded.unknown_tokens,
    }


def device_peak(mesh):
    """The most that the first device has held so far; nothing where it does not count."""
    peak = peak_bytes(mesh.local_devices[0])
    return {} if peak is None else {"memory/device_peak_bytes": peak}


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
