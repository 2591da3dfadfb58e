"""From graded rollouts to optimizer steps: scoring, advantages, minibatches.

B: rows of an iteration.  T: columns.  M: rows of a minibatch.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxrl_fp16.lengths import row_lengths
from jaxrl_fp16.masking import masked_mean
from jaxrl_fp16.objectives import (
    combine_steps, gae, group_advantages, host_floats, kl_penalized_rewards, mismatch_metrics, needs_critic,
    needs_reference, needs_scorer, overlong_penalty, rewards_on_last_token,
)
from jaxrl_fp16.parallel import batch_sharding, shard_batch
from jaxrl_fp16.training.loops.mismatch_terms import staleness_terms, summed_kl, truncation_term
from jaxrl_fp16.training.rollouts.collect import truncation_rule
from jaxrl_fp16.training.safety.guards import check_canary
from jaxrl_fp16.training.updates.critic_update import make_value_update
from jaxrl_fp16.training.updates.optimizer import make_optimizer
from jaxrl_fp16.training.updates.policy_update import make_update
from jaxrl_fp16.training.updates.scorer import make_scorer, make_valuer
from jaxrl_fp16.training.updates.state import shardings_of
from jaxrl_fp16.types import Batch


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions of an iteration, and what they were made for; those of a model compile once a width."""

    config: Any
    algorithm: Any
    mesh: Any
    scorer: Any
    update: Any
    valuer: Any | None
    value_update: Any | None
    compare: Any          # (mu, pi, mask, prefix) -> mismatch metrics
    summed_kl: Any        # (mu, pi, mask) -> the pieces of one token KL
    advantages: Any
    take: Any             # rows of a tree of arrays [B,...]


def make_programs(setup, algorithm, model, critic, learner, announce=None):
    """`Programs` for a policy `model` and a `critic` or None; `learner`'s arrays stay where they lie.

    announce: a text to a context manager, which is told what compiles; None: nothing is said.
    """
    config, policy, t = setup.config, setup.precision.policy, setup.config.training
    temperature, limit = config.sampling.temperature, _limit(config)
    sizes = dict(microbatch_size=t.microbatch_size, microbatch_tokens=t.microbatch_tokens, announce=announce)
    shared = dict(max_new_tokens=limit, frozen=t.probe, **sizes)
    valuer = value_update = None
    if critic is not None:
        critic_policy = setup.critic_precision.policy
        valuer = make_valuer(critic, critic_policy, **sizes)
        value_update = make_value_update(
            critic, critic_policy, algorithm, make_optimizer(config.critic.optimizer),
            state_shardings=shardings_of(learner.critic), **shared,
        )
    rows = batch_sharding(setup.mesh)
    return Programs(
        config, algorithm, setup.mesh,
        scorer=make_scorer(model, policy, temperature=temperature, with_entropy=True, **sizes),
        update=make_update(
            model, policy, algorithm, make_optimizer(config.optimizer),
            temperature=temperature, keep_logprobs=True, state_shardings=shardings_of(learner.actor), **shared,
        ),
        valuer=valuer,
        value_update=value_update,
        compare=jax.jit(mismatch_metrics, static_argnames="prefix"),
        summed_kl=jax.jit(summed_kl),
        advantages=jax.jit(partial(_advantages, algorithm, config.sampling.group_size, limit)),
        take=jax.jit(lambda tree, index: jax.tree.map(lambda x: x[index], tree), out_shardings=rows),
    )


def _limit(config):
    return config.sampling.max_new_tokens


def _advantages(algorithm, group_size, limit, rewards, lengths, valid, mask, old, reference, values):
    """`(advantages [B] or [B,T], returns [B,T] or None)` of rewards [B] and response lengths [B]."""
    if algorithm.overlong_penalty:
        rewards = rewards + overlong_penalty(lengths, limit, algorithm.overlong_penalty)
    penalised = reference is not None and algorithm.kl_in == "reward"
    if not needs_critic(algorithm):
        if penalised:
            rewards = kl_penalized_rewards(rewards, old, reference, mask, algorithm.kl_coef)
        return group_advantages(rewards, group_size, algorithm.advantage, valid), None
    rewards = rewards_on_last_token(rewards, mask)
    if penalised:
        rewards = kl_penalized_rewards(rewards, old, reference, mask, algorithm.kl_coef)
    return gae(rewards, values, mask, algorithm.discount, algorithm.gae_lambda)


def learn(programs, learner, graded, key, critic_alone=False, keep=None):
    """An iteration's optimizer steps on `graded` rollouts; with `critic_alone` the policy takes none.

    keep: called with the iteration's batch as `rows_of(int32 [n]) -> Batch` of n rows, and with the
    rows of each optimizer step, int32 [M] in order.

    Returns `(learner, metrics, steps)`: metrics of the iteration as host floats, and
    those of each optimizer step, in order.
    """
    t, rows = programs.config.training, graded.rollout.tokens.shape[0]
    orders = [_minibatches(jax.random.fold_in(key, epoch), rows, t.minibatch_size) for epoch in range(t.epochs)]
    minibatches = [index for order in orders for index in order]
    lengths = row_lengths(graded.rollout.mask)  # looked at once: at each step it would wait for the one before
    old, first_pi, metrics = _score(programs, learner, graded.rollout, minibatches[0], lengths)
    check_canary(programs.config, metrics)
    batch = _make_batch(programs, learner, graded, old, lengths)
    if keep is not None:
        keep(partial(programs.take, batch), minibatches)
    steps, drifts = [], []
    for index in minibatches:
        minibatch = programs.take(batch, index)
        learner, step, logprobs = step_on(programs, learner, minibatch, lengths[index], critic_alone)
        steps.append(step)
        if logprobs is None:
            continue
        if not drifts:  # the weights are still those that sampled
            first_mask = graded.rollout.response_mask[index]
            metrics |= programs.compare(first_pi, logprobs, first_mask, prefix="mismatch_grad")
        drifts.append(programs.summed_kl(minibatch.old_logprobs, logprobs, minibatch.response_mask))
    steps, drifts = jax.device_get((steps, drifts))
    return learner, {**host_floats(metrics), **staleness_terms(drifts), **combine_steps(steps)}, steps


def step_on(programs, learner, minibatch, lengths, critic_alone=False):
    """`(learner, metrics, logprobs)` after one optimizer step of the critic, if there is one, and of the policy.

    lengths: int [M], on the host: real tokens of the minibatch's rows.
    logprobs float32 [M,T]: the gradient program's own, before the step; None where the critic alone learns.
    """
    metrics, logprobs = {}, None
    if learner.critic is not None:
        critic, found = programs.value_update(learner.critic, minibatch, lengths)
        learner = learner.replace(critic=critic)
        metrics |= {f"critic/{name}": value for name, value in found.items()}
    if not critic_alone:
        actor, found = programs.update(learner.actor, minibatch, lengths)
        learner = learner.replace(actor=actor)
        logprobs = found.pop("logprobs")
        metrics |= found
    return learner, metrics, logprobs


def _minibatches(key, rows, size):
    """Index arrays int32 [M] of one epoch, a fresh permutation cut into pieces."""
    return np.asarray(jax.random.permutation(key, rows)).reshape(-1, size)


def _score(programs, learner, rollout, first, lengths):
    """What the weights that sampled say of the rollout: `(old, pi of the rows `first`, metrics)`.

    old float32 [B,T]: the scorer's log-probs of all rows, or the sampler's own where no loss reads them and
    the scorer sees the first minibatch alone.
    """
    score_all = programs.config.training.old_logprobs == "recompute" and needs_scorer(programs.algorithm)
    scored = rollout if score_all else programs.take(rollout, first)
    lengths = lengths if score_all else lengths[first]
    pi, entropy = programs.scorer(learner.sampling_params, scored.tokens, scored.mask, scored.decisions, lengths)
    metrics = programs.compare(scored.logprobs, pi, scored.response_mask, prefix="mismatch")
    metrics["entropy"] = masked_mean(entropy, scored.response_mask)
    metrics |= {"terms/numerics": metrics["mismatch/kl_k3"], "terms/truncation": truncation_term(rollout)}
    if rollout.full_logprobs is not None:
        metrics["full_logprob"] = masked_mean(rollout.full_logprobs, rollout.response_mask)
    return (pi, pi[first], metrics) if score_all else (rollout.logprobs, pi, metrics)


def _make_batch(programs, learner, graded, old, lengths):
    """The iteration's rows as one `Batch`."""
    algorithm, rollout = programs.algorithm, graded.rollout
    rewards, counts = truncation_rule(programs.config.training.truncated, graded)
    valid = graded.rewards.valid.reshape(-1)
    # A group's baseline leaves out a row without a reward; a critic has no baseline, so the row itself goes.
    counts = counts & valid if needs_critic(algorithm) else counts
    rewards, lengths, valid, counts = shard_batch((rewards, graded.lengths, valid, counts), programs.mesh)
    mask = rollout.response_mask & counts[:, None]
    reference = values = None
    if needs_reference(algorithm):
        reference, _ = programs.scorer(
            learner.reference_params, rollout.tokens, rollout.mask, rollout.decisions, lengths
        )
    if learner.critic is not None:
        values = programs.valuer(learner.critic.sampling_params, rollout.tokens, rollout.mask, lengths)
    advantages, returns = programs.advantages(rewards, lengths, valid, mask, old, reference, values)
    return Batch(
        tokens=rollout.tokens, mask=rollout.mask, response_mask=mask, rollout_logprobs=rollout.logprobs,
        old_logprobs=old, advantages=advantages, ref_logprobs=reference, values=values, returns=returns,
        **vars(rollout.decisions),
    )
