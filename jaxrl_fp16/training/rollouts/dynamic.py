"""DAPO's dynamic sampling (2503.14476): groups of equal reward are replaced by fresh ones, within a budget.

n: prompts.  G: group size.  B = n * G rows.
"""

import dataclasses
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.parallel import batch_sharding
from jaxrl_fp16.tasks import Rewards
from jaxrl_fp16.training.rollouts.collect import Graded, PromptBatch, truncation_rule


@dataclasses.dataclass(frozen=True)
class Draws:
    """What the sampling of one iteration came to."""

    rounds: int             # batches of n prompts that were sampled
    tokens: int             # response tokens in all
    groups: int             # sampled in all
    equal_groups: int       # of those, the ones with nothing to learn from
    equal_groups_used: int  # still in the batch when the budget was spent


def equal_groups(rule, graded):
    """bool [n]: groups whose known rewards are all equal, under the rule for truncated responses.

    No length penalty is in them. A group with one known reward, or none, is equal.
    """
    valid = graded.rewards.valid
    rewards = truncation_rule(rule, graded)[0].reshape(valid.shape)
    highest = np.where(valid, rewards, -np.inf).max(axis=1)
    lowest = np.where(valid, rewards, np.inf).min(axis=1)
    return ~(highest > lowest)


def sample_unequal(draw, position, rounds, rule, mesh):
    """`(PromptBatch, Graded, Draws)` of n groups of unequal rewards, or as many as `rounds` draws gave.

    draw: `(position in the data, round) -> (PromptBatch, Graded)` of n prompts. Where
    the budget is spent, groups of the last draw that teach nothing fill the batch up.
    Unequal groups beyond n are dropped: a later step would have found them sampled by
    older weights.
    """
    prompts, graded = draw(position, 0)
    equal = equal_groups(rule, graded)
    used, tokens, found = 1, int(graded.lengths.sum()), int(equal.sum())
    while equal.any() and used < rounds:
        more, fresh = draw(prompts.position, used)
        new = equal_groups(rule, fresh)
        used, tokens, found = used + 1, tokens + int(fresh.lengths.sum()), found + int(new.sum())
        order = _order(equal, new)
        prompts, graded = _merge_prompts(prompts, more, order), _merge_graded(_merger(mesh), graded, fresh, order)
        equal = np.concatenate([equal, new])[order]
    return prompts, graded, Draws(used, tokens, used * equal.size, found, int(equal.sum()))


def _order(equal, new):
    """int [n]: which of the 2n groups, first the kept batch's and then the fresh one's, make the batch.

    Unequal ones stay in their places; each place of an equal one takes a fresh group,
    unequal ones first.
    """
    order = np.arange(equal.size)
    places = np.flatnonzero(equal)
    fresh = np.concatenate([np.flatnonzero(~new), np.flatnonzero(new)])
    order[places] = equal.size + fresh[: places.size]
    return order


def _merge_prompts(old, new, order):
    def pick(name):
        both = [*getattr(old, name), *getattr(new, name)]
        return [both[index] for index in order]

    return PromptBatch(
        examples=pick("examples"), texts=pick("texts"), tokens=np.stack(pick("tokens")), mask=np.stack(pick("mask")),
        position=new.position, set_aside=old.set_aside + new.set_aside,
    )


def _merge_graded(merge, old, new, order):
    count, group = old.rewards.values.shape
    rows = (order[:, None] * group + np.arange(group)).reshape(-1)
    responses = [*old.responses, *new.responses]
    rewards = Rewards(
        values=np.concatenate([old.rewards.values, new.rewards.values])[order],
        valid=np.concatenate([old.rewards.valid, new.rewards.valid])[order],
        timeouts=old.rewards.timeouts + new.rewards.timeouts,
        failures=old.rewards.failures + new.rewards.failures,
        first_error=old.rewards.first_error or new.rewards.first_error,
    )
    return Graded(
        rollout=merge(old.rollout, new.rollout, rows),
        responses=[responses[index] for index in order],
        rewards=rewards,
        finished=np.concatenate([old.finished, new.finished])[rows],
        lengths=np.concatenate([old.lengths, new.lengths])[rows],
        unknown_tokens=old.unknown_tokens + new.unknown_tokens,
    )


@lru_cache(maxsize=None)
def _merger(mesh):
    """A jitted `(old, new, rows int [B]) -> rollout` of those of their 2B rows; one for each mesh, compiled once."""

    def merge(old, new, rows):
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b])[rows], old, new)

    return jax.jit(merge, out_shardings=batch_sharding(mesh))
