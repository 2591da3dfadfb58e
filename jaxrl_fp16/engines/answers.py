"""From an engine's answer to a Rollout: every number checked, stop strings cut, padded and masked.

B: rows, prompt-major.  P: prompt columns.  N: max_new_tokens.  K: kept ids.  V: vocabulary.
"""

import dataclasses

import numpy as np

from jaxrl_fp16.engines.pipe import EngineError
from jaxrl_fp16.types import Rollout

ABOVE = 1e-3    # a log-prob may exceed 0 by a rounding


@dataclasses.dataclass(frozen=True)
class Responses:
    """What an engine drew, on the host. What follows a row's length is 0, in `support` -1."""

    tokens: np.ndarray                  # int32 [B,N]
    lengths: np.ndarray                 # int64 [B], at least 1
    logprobs: np.ndarray                # float32 [B,N]
    finished: np.ndarray                # bool [B]
    support: np.ndarray | None = None   # int32 [B,N,K]
    full: np.ndarray | None = None      # float32 [B,N]


def read_responses(arrays, rows, limit, vocab_size, end_ids, kept=0, finite=True):
    """`Responses` of the arrays of an answer.

    Args:
      rows, limit: B and N.
      kept: K, the most ids that may be kept; 0: nothing is truncated.
      finite: whether log-probs must be numbers.

    Raises:
      EngineError: another number of responses or values, an id that is none, a log-prob that is not finite or above 0,
        a response that goes on after its end or ends before its limit without one, kept ids without the token.
    """
    lengths, finished = (_array(arrays, name, np.int32) for name in ("lengths", "finished"))
    if len(lengths) != rows or len(finished) != rows:
        raise EngineError(f"the engine gave {len(lengths)} responses; {rows} were asked for")
    if lengths.min() < 1 or lengths.max() > limit:
        raise EngineError(f"the engine gave responses of {lengths.min()} to {lengths.max()} tokens; allowed: 1 to "
                          f"{limit}")
    lengths = lengths.astype(np.int64)
    tokens, logprobs = _array(arrays, "tokens", np.int32), _array(arrays, "logprobs", np.float32)
    total = lengths.sum()
    if len(tokens) != total or len(logprobs) != total:
        raise EngineError(f"the engine gave {len(tokens)} tokens and {len(logprobs)} log-probs of {total}")
    _check_ids("tokens", tokens, vocab_size)
    if finite:
        _check_logprobs("log-probs", logprobs)
    last = np.cumsum(lengths) - 1
    ends = np.isin(tokens, end_ids)
    if ends.sum() != ends[last].sum():
        raise EngineError("the engine gave a response that goes on after its end")
    if (ends[last] != finished.astype(bool)).any() or (lengths < limit)[~ends[last]].any():
        raise EngineError("the engine gave a response that ended neither with an end of text nor at the limit")
    place = np.repeat(np.arange(rows), lengths), np.arange(total) - np.repeat(last + 1 - lengths, lengths)
    support = full = None
    if kept:
        support, full = _read_kept(arrays, tokens, vocab_size, kept)
        support, full = _spread(support, place, (rows, limit), -1), _spread(full, place, (rows, limit), 0)
    return Responses(_spread(tokens, place, (rows, limit), 0), lengths, _spread(logprobs, place, (rows, limit), 0),
                     ends[last], support, full)


def join_responses(parts):
    """Several `Responses`, one after another."""
    fields = ([getattr(part, field.name) for part in parts] for field in dataclasses.fields(Responses))
    return Responses(*(None if values[0] is None else np.concatenate(values) for values in fields))


def cut_at_stops(responses, stops):
    """`responses` of which the token that completes a stop string is the last, as in our own sampler.

    stops: `(table uint16 [S,V], accept)` as `stop_table` gives them.
    """
    table, accept = stops
    lengths, state = responses.lengths.copy(), np.zeros(len(responses.tokens), table.dtype)
    stopped = np.zeros(len(state), bool)
    for column in range(responses.tokens.shape[1]):
        state = table[state, responses.tokens[:, column]]
        hit = (state == accept) & (column < responses.lengths) & ~stopped
        lengths[hit], stopped = column + 1, stopped | hit
    beyond = np.arange(responses.tokens.shape[1]) >= lengths[:, None]

    def cut(x, blank):
        gone = beyond if x is None or x.ndim == 2 else beyond[..., None]
        return None if x is None else np.where(gone, x.dtype.type(blank), x)

    return Responses(cut(responses.tokens, 0), lengths, cut(responses.logprobs, 0), responses.finished | stopped,
                     cut(responses.support, -1), cut(responses.full, 0))


def make_rollout(tokens, mask, responses, pad_id):
    """A Rollout on the host of prompts int32 [n,P], their mask bool [n,P], and `responses` to them."""
    group = len(responses.tokens) // len(tokens)
    inside = np.arange(responses.tokens.shape[1]) < responses.lengths[:, None]
    before = lambda x, response: np.concatenate([np.repeat(x, group, axis=0).astype(response.dtype), response], axis=1)
    nothing = np.zeros(tokens.shape, bool)
    return Rollout(
        tokens=before(tokens, np.where(inside, responses.tokens, np.int32(pad_id))),
        mask=before(mask, inside),
        response_mask=before(nothing, inside),
        logprobs=before(nothing, responses.logprobs),
        finished=responses.finished,
        support=responses.support,
        full_logprobs=None if responses.full is None else before(nothing, responses.full),
    )


def _array(arrays, name, dtype):
    if name not in arrays:
        raise EngineError(f"the engine's answer lacks {name!r}")
    found = np.asarray(arrays[name])
    if found.dtype != dtype:
        raise EngineError(f"the engine's {name!r} are of {found.dtype}; allowed: {np.dtype(dtype)}")
    return found


def _check_ids(name, ids, vocab_size):
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
        raise EngineError(f"the engine's {name} are from {ids.min()} to {ids.max()}; allowed: 0 to {vocab_size - 1}")


def _check_logprobs(name, values):
    wrong = ~(np.isfinite(values) & (values <= ABOVE))
    if wrong.any():
        raise EngineError(f"{wrong.sum()} of {len(values)} {name} of the engine are not finite or above 0, the first "
                          f"is {values[wrong][0]:g}")


def _read_kept(arrays, tokens, vocab_size, most):
    """`(kept ids int32 [t,K] filled with -1, log-probs under all ids float32 [t])` of t tokens."""
    counts, ids = _array(arrays, "kept_counts", np.int32).astype(np.int64), _array(arrays, "kept", np.int32)
    full = _array(arrays, "full_logprobs", np.float32)
    if len(counts) != len(tokens) or len(full) != len(tokens) or counts.sum() != len(ids):
        raise EngineError(f"the engine gave kept ids of {len(counts)} tokens and {len(full)} log-probs under all ids, "
                          f"of {len(tokens)} tokens")
    if counts.min() < 1 or counts.max() > most:
        raise EngineError(f"the engine kept {counts.min()} to {counts.max()} ids; allowed: 1 to {most}")
    _check_ids("kept ids", ids, vocab_size)
    _check_logprobs("log-probs under all ids", full)
    column = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = _spread(ids, (np.repeat(np.arange(len(tokens)), counts), column), (len(tokens), most), -1)
    if not (found == tokens[:, None]).any(axis=1).all():
        raise EngineError("the engine drew a token that is not among the ids that it kept")
    return found, full


def _spread(values, place, shape, blank):
    """`values` [t,...] at their `place`, the rest of an array [*shape,...] blank."""
    found = np.full((*shape, *values.shape[1:]), blank, values.dtype)
    found[place] = values
    return found

