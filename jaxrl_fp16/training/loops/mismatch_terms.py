"""What separates the sampler from what is trained, in four terms that are measured separately.

numerics: two programs round differently. staleness: the weights have moved since. truncation: top-k and top-p
sample another distribution. tokenisation: the text has other ids than those that were sampled.

B: rows.  T: columns.  n: rows that are looked at.
"""

from functools import lru_cache

import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.masking import masked_mean, masked_sum
from jaxrl_fp16.objectives import k3
from jaxrl_fp16.tokenizer import encode, token_bytes


def summed_kl(log_mu, log_pi, mask):
    """`(sum, tokens)` of k3 of `log_pi - log_mu` [B,T] where `mask` is 1: the pieces of KL(mu || pi), nats."""
    log_ratio = jnp.where(mask, log_pi - log_mu, 0.0)
    return masked_sum(k3(log_ratio), mask), jnp.sum(mask.astype(bool))


def staleness_terms(parts):
    """The policy's way from the weights that sampled, out of an iteration's `summed_kl`s, host numbers in order.

    Each compares the old log-probs with the gradient program's own of one minibatch. At
    the first the weights are still the same: `terms/numerics_update` is rounding alone,
    and is taken off what the later ones show. `terms/staleness` is their mean a token,
    `terms/staleness_last` that of the last one; without a later one both are 0.
    """
    if not parts:  # the critic alone has learned
        return {"terms/staleness": 0.0, "terms/staleness_last": 0.0}
    first, later = _mean(parts[:1]), parts[1:]
    return {
        "terms/numerics_update": first,
        "terms/staleness": _mean(later) - first if later else 0.0,
        "terms/staleness_last": _mean(later[-1:]) - first if later else 0.0,
    }


def _mean(parts):
    sums, counts = zip(*parts)
    return float(sum(sums)) / max(float(sum(counts)), 1.0)


def truncation_term(rollout):
    """float32 []: KL(sampled || whole distribution at that temperature), nats a token; 0 without top-k and top-p.

    A token's log-prob under the kept ids is that under all of them less the log of the
    mass that they keep, whichever token it is: their difference is the KL itself, without
    sampling noise. (k3 would be wrong: the whole distribution has mass where the other has none.)
    """
    if rollout.full_logprobs is None:
        return jnp.zeros(())
    return masked_mean(rollout.logprobs - rollout.full_logprobs, rollout.response_mask)


def tokenisation_terms(tokenizer, tokens, mask, response_mask, ends, rows):
    """What decoding and encoding again does to at most `rows`, evenly spread, of the rows of host arrays [B,T].

    `terms/tokenisation` is the share of responses, `terms/tokenisation_tokens` of their
    tokens, that come back as other ids. Prompt and response are one text, as for a server
    that is given a conversation: a merge across their border counts. The end of text, one
    of `ends`, does not, nor does padding.
    """
    chosen = np.unique(np.linspace(0, len(tokens) - 1, min(rows, len(tokens))).round().astype(int))
    tokens, mask, response_mask = tokens[chosen], mask[chosen].astype(bool), response_mask[chosen].astype(bool)
    kept = mask & ~(response_mask & np.isin(tokens, [*ends]))
    before = [row[keep] for row, keep in zip(tokens, kept)]
    exact = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    texts = [tokenizer.decode(row.tolist(), **exact) for row in before]
    after = [np.asarray(ids, tokens.dtype) for ids in encode(tokenizer, texts)]
    differs = [not np.array_equal(old, new) for old, new in zip(before, after)]
    lost = sum(
        int((_lost(before[row], after[row], _byte_lengths(tokenizer)) & response_mask[row][kept[row]]).sum())
        for row in np.flatnonzero(differs)
    )
    return {
        "terms/tokenisation": float(np.mean(differs)),
        "terms/tokenisation_tokens": lost / max(int((kept & response_mask).sum()), 1),
    }


def _lost(before, after, lengths):
    """bool [len(before)]: ids that `after` does not have at the same bytes, counted from the start or from the end.

    From both, since a byte sequence that is no UTF-8 comes back longer and shifts what follows.
    """
    # A model's vocabulary may have more rows than its tokenizer has ids; those add nothing to the text.
    size = max(len(lengths), 1 + max(before.max(initial=0), after.max(initial=0)))
    lengths = np.pad(lengths, (0, size - len(lengths)))

    def places(ids):
        ends = np.cumsum(lengths[ids])
        starts = ends - lengths[ids]
        return starts * size + ids, (ends[-1:] - ends) * size + ids

    return ~np.logical_or(*(np.isin(old, new) for old, new in zip(places(before), places(after))))


@lru_cache(maxsize=1)
def _byte_lengths(tokenizer):
    """int64 [ids]: how many bytes each id adds to the text."""
    return np.array([len(piece) for piece in token_bytes(tokenizer)])
