"""Rollouts of any other engine, as a JSONL file that it writes: the format of docs/rollouts.md.

B: rows (responses).  P: columns of the longest prompt.  T: P columns and those of the longest response.
"""

import math
import re

import numpy as np

from jaxrl_fp16.lab.mismatch.rollout_files import JIT, ScoredRollout, load_rollout
from jaxrl_fp16.tasks.rows import read_rows

ENGINE_FORMAT = "jaxrl_fp16 engine rollouts 1"
HEAD = ("format", "engine", "version", "dtype", "temperature", "vocab_size", "model")   # the last may be left out
ROW = ("prompt", "response", "logprobs", "finished")                                    # likewise
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}")
ABOVE = 1e-3            # a log-prob may exceed 0 by a rounding
LARGEST = 2**31 - 1     # an id, as int32 holds it


def load_rollout_file(path, precisions):
    """The ScoredRollout of a file that an engine wrote, or of one that `save_rollout` did, by its first bytes.

    Args:
      path: of JSONL in the format of docs/rollouts.md, also gzipped, or of .npz.
      precisions: those that may have sampled, each a Precision; a file's dtype is the compute dtype of one of them.

    Raises ValueError, in one line with the file and the line in it, for a file that is none of these, empty or damaged;
    a key that is missing, unknown or of another type; ids that are none; log-probs that are as many as the response has
    ids, not finite or above 0; a dtype of none of `precisions`.
    """
    if _is_archive(path):
        rollout = load_rollout(path)
        names = [precision.name for precision in precisions]
        if rollout.precision not in names:
            raise ValueError(f"{path} was sampled in {rollout.precision!r}; allowed: mismatch.precisions, "
                             f"{', '.join(names)}")
        return rollout
    rows = read_rows(path)
    head = _read_head(*next(rows))
    by_dtype = {precision.policy.compute_dtype.name: precision.name for precision in reversed(precisions)}
    if head["dtype"] not in by_dtype:
        raise ValueError(f"{path}: dtype is {head['dtype']!r}; allowed: the compute dtypes of mismatch.precisions, "
                         f"{', '.join(by_dtype)}")
    found = [_read_row(where, row, head["vocab_size"]) for where, row in rows]
    if not found:
        raise ValueError(f"{path}: no response after its first object; allowed: one or more")
    return _assemble(found, precision=by_dtype[head["dtype"]], temperature=float(head["temperature"]),
                     engine=head["engine"], version=head["version"], vocab_size=head["vocab_size"])


def _is_archive(path):
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError:     # `read_rows` says what it is
        return False


def _read_head(where, head):
    if head.get("format") != ENGINE_FORMAT:
        raise ValueError(f"{where}: format is {head.get('format')!r}; allowed: {ENGINE_FORMAT!r}, in the first object "
                         "(docs/rollouts.md)")
    _check_keys(where, head, HEAD)
    for name in ("engine", "version", "dtype", "model"):
        if not isinstance(head.get(name, "-"), str) or not head.get(name, "-"):
            raise ValueError(f"{where}: {name} is {head[name]!r}; allowed: a text")
    if not NAME.fullmatch(head["engine"]) or head["engine"] == JIT:
        raise ValueError(f"{where}: engine is {head['engine']!r}; allowed: up to 40 letters, digits and _.+-, and "
                         f"not {JIT!r}, which is this program's own")
    temperature, size = head["temperature"], head["vocab_size"]
    if not _is_number(temperature) or not 0 < temperature < math.inf:
        raise ValueError(f"{where}: temperature is {temperature!r}; allowed: a number above 0, as what is greedy says "
                         "nothing about a distribution")
    if type(size) is not int or not 0 < size <= LARGEST:
        raise ValueError(f"{where}: vocab_size is {size!r}; allowed: a whole number above 0")
    return head


def _read_row(where, row, vocab_size):
    """`(prompt, response, logprobs, finished)` of one object."""
    _check_keys(where, row, ROW)
    for name in ("prompt", "response", "logprobs"):
        if not isinstance(row[name], list) or not row[name]:
            raise ValueError(f"{where}: {name} is {_shown(row[name])}; allowed: a list with one entry or more")
    for name in ("prompt", "response"):
        wrong = [token for token in row[name] if type(token) is not int or not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(f"{where}: {name} holds {_shown(wrong[0])}; allowed: ids, whole numbers from 0 to "
                             f"{vocab_size - 1}")
    if len(row["logprobs"]) != len(row["response"]):
        raise ValueError(f"{where}: logprobs has {len(row['logprobs'])} entries and response {len(row['response'])}; "
                         "allowed: as many")
    wrong = [value for value in row["logprobs"] if not _is_number(value) or not -math.inf < value <= ABOVE]
    if wrong:
        raise ValueError(f"{where}: logprobs holds {_shown(wrong[0])}; allowed: finite numbers up to 0, natural "
                         "logarithms of probabilities")
    finished = row.get("finished", False)
    if not isinstance(finished, bool):
        raise ValueError(f"{where}: finished is {_shown(finished)}; allowed: true or false")
    return row["prompt"], row["response"], row["logprobs"], finished


def _check_keys(where, given, known):
    missing = [name for name in known[:-1] if name not in given]
    unknown = [name for name in given if name not in known]
    if missing or unknown:
        raise ValueError(f"{where}: {', '.join([*missing, *unknown])} {'missing' if missing else 'unknown'}; allowed: "
                         f"{', '.join(known[:-1])}, and {known[-1]} where it is known")


def _is_number(value):
    return type(value) in (int, float)


def _shown(value):
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _assemble(rows, **about):
    """A ScoredRollout, prompts padded on the left and responses on the right."""
    columns = max(len(prompt) for prompt, *_ in rows)
    shape = len(rows), columns + max(len(response) for _, response, *_ in rows)
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    mask, response_mask = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (prompt, response, values, _) in enumerate(rows):
        start, end = columns - len(prompt), columns + len(response)
        tokens[row, start:end], mask[row, start:end] = prompt + response, True
        logprobs[row, columns:end], response_mask[row, columns:end] = values, True
    finished = np.array([done for *_, done in rows])
    return ScoredRollout(tokens=tokens, mask=mask, response_mask=response_mask, logprobs=logprobs, finished=finished,
                         **about)
