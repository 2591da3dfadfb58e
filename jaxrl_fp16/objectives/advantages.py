"""Advantages: how much better a response, or a token, did than expected.

B: rows (responses).  T: columns.  G: groups of one prompt.  S: rows of a group, `B = G * S`.

Rows of one group are adjacent. Everything is float32.
"""

import jax
from jax import lax
import jax.numpy as jnp

from jaxrl_fp16.masking import zero_where_masked

# Keeps a group of almost equal rewards from dividing by nothing.
SPREAD_EPSILON = 1e-6


def _spread(centred, valid, axis=None):
    """Sample standard deviation (ddof 1) of values whose mean is 0 already."""
    count = jnp.sum(valid, axis=axis, keepdims=True)
    return jnp.sqrt(jnp.sum(centred**2, axis=axis, keepdims=True) / jnp.maximum(count - 1, 1))


def group_mean(centred, _):
    """`R - mean_group(R)` (Dr. GRPO, arXiv 2503.20783)."""
    return centred


def group_std(centred, valid):
    """`(R - mean_group(R)) / (std_group(R) + 1e-6)` (GRPO, arXiv 2402.03300)."""
    return centred / (_spread(centred, valid, axis=1) + SPREAD_EPSILON)


def leave_one_out(centred, valid):
    """`R - mean of the group's other rows` (RLOO, arXiv 2402.14740): `(R - mean) * n / (n - 1)`."""
    count = jnp.sum(valid, axis=1, keepdims=True)
    return centred * (count / jnp.maximum(count - 1, 1))


def batch_std(centred, valid):
    """`(R - mean_group(R)) / (std of that over the batch's valid rows + 1e-6)`: one scale for all."""
    return centred / (_spread(centred, valid) + SPREAD_EPSILON)


# name -> (centred [G,S], valid [G,S]) -> advantages [G,S]
BASELINES = {
    "group_mean": group_mean,
    "group_std": group_std,
    "leave_one_out": leave_one_out,
    "batch_std": batch_std,
}


def _centre(rewards, valid):
    """Rewards minus their group's mean over valid rows, 0 on the others.

    Each group is measured from its lowest reward: equal rewards are then exact
    zeros, which their float32 mean alone does not promise, and the mean loses
    nothing to a large common offset.
    """
    lowest = jnp.min(jnp.where(valid, rewards, jnp.inf), axis=1, keepdims=True)
    above = jnp.where(valid, rewards - lowest, 0.0)
    mean = jnp.sum(above, axis=1, keepdims=True) / jnp.maximum(jnp.sum(valid, axis=1, keepdims=True), 1)
    return jnp.where(valid, above - mean, 0.0)


def group_advantages(rewards, group_size, kind="group_std", valid=None):
    """One advantage per response, from its group's rewards.

    Args:
      rewards: [B], any unit; row `i` belongs to group `i // group_size`.
      group_size: rows a prompt, at least 2; static under `jit`.
      kind: a name out of `BASELINES`; static under `jit`.
      valid: [B] bool, rows whose reward is known; None for all. An invalid row
        (its reward may be NaN) gets 0 and leaves its group's baseline and
        spread; a group with fewer than two valid rows gets 0.

    Returns:
      float32 [B], without gradient. A group of equal rewards gets exactly 0.

    Raises:
      ValueError: for an unknown `kind`, a group size that has no baseline, or a
        number of rows that is not a multiple of it.
    """
    if kind not in BASELINES:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(BASELINES)}")
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; {kind!r} allows 2 or more")
    rewards = lax.stop_gradient(jnp.asarray(rewards, jnp.float32))
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(f"rewards of shape {rewards.shape}; allowed: [B] with B a multiple of {group_size}")
    valid = jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid).astype(bool)
    rewards, valid = rewards.reshape(-1, group_size), valid.reshape(-1, group_size)
    # A lone valid row is its own mean: centring makes it 0 and every baseline keeps that.
    return BASELINES[kind](_centre(rewards, valid), valid).reshape(-1)


def gae(rewards, values, mask, discount=1.0, gae_lambda=1.0):
    """Generalised advantage estimation over response tokens (arXiv 1506.02438).

        delta_t = r_t + discount * V_{t+1} - V_t
        A_t = delta_t + discount * gae_lambda * A_{t+1}

    `t + 1` is the row's next column with `mask` 1: columns with 0 are jumped.
    After the last one `V` and `A` are 0. Nothing is whitened.

    Args:
      rewards: [B,T]; an outcome reward is on the row's last response token.
      values: [B,T]; column `t` holds the value of the state in which token `t` was chosen.
      mask: [B,T], 1 on response tokens.
      discount: the factor between two response tokens.
      gae_lambda: 1 is Monte Carlo, 0 is one-step temporal difference.

    Returns:
      `(advantages, returns)`, float32 [B,T] without gradient, 0 where `mask` is 0;
      returns are `A + V`.
    """
    rewards, values = zero_where_masked(rewards, mask), zero_where_masked(values, mask)

    def step(after, column):
        next_value, next_advantage = after
        reward, value, real = column
        advantage = reward + discount * next_value - value + discount * gae_lambda * next_advantage
        after = jnp.where(real, value, next_value), jnp.where(real, advantage, next_advantage)
        return after, jnp.where(real, advantage, 0.0)

    nothing = jnp.zeros_like(rewards[:, 0])
    columns = (rewards.T, values.T, mask.astype(bool).T)
    _, advantages = lax.scan(step, (nothing, nothing), columns, reverse=True)
    return jax.tree.map(lax.stop_gradient, (advantages.T, advantages.T + values))


def rewards_on_last_token(rewards, mask):
    """float32 [B,T]: `rewards` [B] on each row's last column with `mask` 1; a row without one holds none."""
    real = mask.astype(jnp.int32)
    is_last = (real == 1) & (jnp.cumsum(real, axis=1) == jnp.sum(real, axis=1, keepdims=True))
    return zero_where_masked(jnp.asarray(rewards)[:, None], is_last)


def overlong_penalty(lengths, max_new_tokens, zone):
    """DAPO's soft punishment of length (arXiv 2503.14476), to be added to the reward.

        0 for n <= L - c;  (L - c - n) / c up to L;  -1 from L on

    Args:
      lengths: [B] response lengths `n` in tokens.
      max_new_tokens: `L`, the length limit in tokens.
      zone: `c`, in tokens, or below 1 a share of `L`.

    Returns:
      float32 [B] in [-1, 0].

    Raises:
      ValueError: for a zone that is not within `(0, L]`.
    """
    tokens = overlong_zone(zone, max_new_tokens)
    lengths = jnp.asarray(lengths, jnp.float32)
    return jnp.clip((max_new_tokens - tokens - lengths) / tokens, -1.0, 0.0)


def overlong_zone(zone, max_new_tokens):
    """`overlong_penalty`'s zone in tokens. Raises ValueError for one that is not within `(0, max_new_tokens]`."""
    tokens = zone * max_new_tokens if zone < 1 else zone
    if not 0 < tokens <= max_new_tokens:
        raise ValueError(f"overlong_penalty is {zone}; allowed: above 0, up to max_new_tokens {max_new_tokens}")
    return tokens
