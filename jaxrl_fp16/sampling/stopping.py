"""Stop strings as a table, so that a compiled decode loop finds them without leaving the device.

A stop string may begin inside one token and end inside another, and one text has many tokenizations. An
automaton over bytes (Aho and Corasick, 1975) reads them all: its state is how much of a stop string the text
so far ends in. Running each token's bytes from each state gives one table; a decode step is then one gather,
`state = table[state, token]`.

S: states.  V: vocabulary.
"""

import collections
from typing import Sequence

import numpy as np

MAX_STATES = 1024  # the table has S x V entries of two bytes: 0.3 GB at a vocabulary of 152,000


def stop_table(stop_strings: Sequence[str], token_bytes: Sequence[bytes]) -> tuple[np.ndarray, int]:
    """`(table, accept)`: uint16 [S,V] next states, and the absorbing state once a stop string is complete.

    A response starts in state 0; `token_bytes` [V] says what each id adds to the text. Raises `ValueError`
    without stop strings, for an empty one, and for more than MAX_STATES states.
    """
    if isinstance(stop_strings, str) or not stop_strings or "" in stop_strings:
        raise ValueError(f"stop is {stop_strings!r}; a list of texts is needed, none of them empty")
    step, accept = _byte_automaton([text.encode() for text in stop_strings])
    return _run_tokens(step, token_bytes), accept


def _byte_automaton(patterns: Sequence[bytes]) -> tuple[np.ndarray, int]:
    """uint16 [S,256] next states, and the accepting one; the others are the patterns' proper prefixes."""
    children, complete = [{}], -1
    for pattern in patterns:
        state = 0
        for byte in pattern[:-1]:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
            state = children[state][byte]
            if state == complete:  # a shorter stop string begins this one, and wins
                break
        else:
            children[state][pattern[-1]] = complete
    if len(children) >= MAX_STATES:
        raise ValueError(f"the stop strings have {len(children)} prefixes; allowed: {MAX_STATES - 1}")
    accept = len(children)
    step = np.zeros((accept + 1, 256), np.uint16)
    step[accept] = accept
    _fill_breadth_first(children, step, accept)
    return step, accept


def _fill_breadth_first(children: list[dict[int, int]], step: np.ndarray, accept: int) -> None:
    """Where a state has no child for a byte, it does what its longest proper suffix among the states does."""
    queue = collections.deque([(0, 0)])  # a state with that suffix; the suffix's row is complete before
    while queue:
        state, suffix = queue.popleft()
        if state:
            step[state] = step[suffix]
        for byte, child in children[state].items():
            if child < 0:
                step[state, byte] = accept
                continue
            fallback = step[suffix, byte] if state else 0
            if fallback == accept:  # a shorter stop string is complete here already
                step[state, byte] = accept
                continue
            step[state, byte] = child
            queue.append((child, int(fallback)))


def _run_tokens(step: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """uint16 [S,V]: the state after each token, from each state; the k-th bytes of all tokens at once."""
    lengths = np.array([len(piece) for piece in token_bytes])
    order = np.argsort(-lengths, kind="stable")  # so that the tokens that have a k-th byte come first
    joined = np.frombuffer(b"".join(token_bytes), np.uint8)
    starts = (np.cumsum(lengths) - lengths)[order]
    states = np.repeat(np.arange(len(step), dtype=np.uint16)[:, None], len(token_bytes), axis=1)
    for column in range(lengths.max(initial=0)):
        active = int((lengths > column).sum())
        states[:, :active] = step[states[:, :active], joined[starts[:active] + column]]
    table = np.empty_like(states)
    table[:, order] = states
    return table
