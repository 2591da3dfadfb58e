"""From the data to graded rollouts: what an iteration learns from.

n: prompts.  G: group size.  B = n * G rows.  P: prompt columns.  T: columns.
"""

from collections import Counter
from collections.abc import Sequence
import dataclasses
from functools import lru_cache
from itertools import islice

import numpy as np

from jaxrl_fp16.parallel import to_host
from jaxrl_fp16.tasks import Example, Rewards, flaw_of, render
from jaxrl_fp16.tokenizer import decode_responses, encode_prompts
from jaxrl_fp16.types import Rollout


@dataclasses.dataclass(frozen=True)
class PromptBatch:
    """The prompts of one iteration."""

    examples: list[Example]
    texts: list[str]
    tokens: np.ndarray     # int32 [n,P], left-padded
    mask: np.ndarray       # bool [n,P]
    position: int          # in the data, after these
    set_aside: int         # prompts passed over: longer than P, or without what they should ask


@lru_cache(maxsize=2)
def _permutation(seed, epoch, size):
    return np.random.default_rng([seed, epoch]).permutation(size)


def data_order(seed, size, places):
    """Indices of the rows at `places` of an endless pass over `size` rows, shuffled anew each epoch."""
    return [int(_permutation(seed, place // size, size)[place % size]) for place in places]


def fitting_rows(task, position, chunk, seed, encode, nothing):
    """Endless `(place, row)` from `position` on: the examples of `task.train` that fit, in the order of `data_order`.

    encode: `examples -> one row each, or as text why one is set aside`, called for `chunk`
    of them at a time. Raises ValueError when a whole epoch holds none: `nothing`, or where
    length is not all that is wrong, what is.
    """
    size, start, found, reasons = len(task.train), position, False, Counter()
    # From one multiple of the size up to another lies an epoch, and with it every example.
    while found or position // size <= -(-start // size):
        places = range(position, position + chunk)
        examples = [task.train[index] for index in data_order(seed, size, places)]
        for place, row in zip(places, encode(examples), strict=True):
            if isinstance(row, str):
                reasons[row] += not found and place < start + size
            else:
                found = True
                yield place, row
        position = places.stop
    if reasons.keys() & ASK_NOTHING:
        nothing = (f"none of the {size} problems makes a prompt: {_counted(reasons)}; allowed: problems with a text, "
                   "and a template that shows it")
    if set(reasons) == {NO_SOLUTION}:
        nothing = f"none of the {size} problems has a solution; allowed: data with one in the field task.solution_field"
    raise ValueError(nothing)


# What `flaw_of` finds.
ASK_NOTHING = {"without a token", "without the problem's text"}
NO_SOLUTION = "without a solution"
LOOKED_AT = 1000  # of generated problems, which are alike


def set_aside(task, encode, what):
    """What is set aside of `task.train`, as lines to say at the start: one, or none where nothing is.

    encode: as for `fitting_rows`. Of generated problems the first `LOOKED_AT` are looked at.
    """
    generated = not isinstance(task.train, (list, tuple))
    size, reasons = min(len(task.train), LOOKED_AT) if generated else len(task.train), Counter()
    for start in range(0, size, 64):
        reasons.update(row for row in encode(task.train[start:min(start + 64, size)]) if isinstance(row, str))
    of = f"the first {size:,}" if size < len(task.train) else f"{size:,}"
    return [f"{reasons.total():,} of {of} {what} are set aside: {_counted(reasons)}"] if reasons else []


def _counted(reasons):
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def rendered(task, examples, tokenizer):
    """`(texts, flaws)`: each prompt, and why it asks nothing, or None."""
    texts = [render(task.template, example, tokenizer) for example in examples]
    return texts, [flaw_of(text, example) for text, example in zip(texts, examples)]


def prompt_encoder(task, tokenizer, length):
    """`examples -> (example, text, tokens [P], mask [P]) or why it is set aside`, of each; P is `length`."""
    def encode(examples):
        texts, flaws = rendered(task, examples, tokenizer)
        tokens, mask, kept = encode_prompts(tokenizer, texts, length)
        too_long = f"longer than training.max_prompt_tokens = {length}"
        return [flaw or (row if keep else too_long)
                for flaw, keep, row in zip(flaws, kept, zip(examples, texts, tokens, mask))]

    return encode


def next_prompts(task, tokenizer, position, count, length, seed):
    """`count` prompts of `task.train` from `position` on, in an order that depends on `seed` and the epoch alone.

    A prompt longer than `length` tokens is set aside, never cut, and so is one without its problem's text. Raises
    ValueError when a whole epoch holds none that fits.
    """
    encode = prompt_encoder(task, tokenizer, length)
    nothing = (f"none of the {len(task.train)} prompts fits into training.max_prompt_tokens = {length}; "
               "allowed: a larger limit")
    places, rows = zip(*islice(fitting_rows(task, position, count, seed, encode, nothing), count))
    examples, texts, tokens, mask = zip(*rows)
    end = places[-1] + 1
    return PromptBatch(list(examples), list(texts), np.stack(tokens), np.stack(mask), end, end - position - count)


@dataclasses.dataclass(frozen=True)
class Graded:
    """A rollout with its texts and what they earned."""

    rollout: Rollout       # on the devices
    responses: list[list[str]]   # [n][G]
    rewards: Rewards             # as graded, [n,G]
    finished: np.ndarray         # bool [B]
    lengths: np.ndarray          # int [B]: response tokens
    unknown_tokens: int = 0      # of them, ids that the tokenizer has no token for: rows that pad the embedding


def sample_and_grade(engine, params, prompts, task, setup, key, watch=None):
    """Samples a group for each prompt, decodes the responses and grades them. watch: as for `make_engine`."""
    rollout = engine(params, prompts.tokens, prompts.mask, key, watch)
    tokens, mask, finished = (to_host(x) for x in (rollout.tokens, rollout.response_mask, rollout.finished))
    texts = decode_responses(setup.tokenizer, tokens, mask, setup.eos_ids)
    group = len(texts) // len(prompts.texts)
    responses = in_groups(texts, group)
    rewards = task.rewards(prompts.texts, responses, prompts.examples)
    unknown = int((~np.isin(tokens, _ids(setup.tokenizer)) & mask.astype(bool)).sum())
    return Graded(rollout, responses, rewards, finished, mask.sum(axis=1), unknown)


@lru_cache(maxsize=2)
def _ids(tokenizer):
    return np.fromiter(tokenizer.get_vocab().values(), np.int32)


def in_groups(rows: Sequence, group: int) -> list[list]:
    """A list of B entries as n lists of `group`."""
    return [list(rows[start:start + group]) for start in range(0, len(rows), group)]


def truncation_rule(rule, graded):
    """What `training.truncated` makes of responses cut by the limit: `(rewards float32 [B], counts bool [B])`.

    `zero` gives them `cut_reward`; `mask` takes them out of the loss and leaves their
    reward in the baseline; `keep` does nothing.
    """
    rewards = graded.rewards.values.reshape(-1)
    cut = ~graded.finished
    if rule == "zero":
        rewards = np.where(cut, cut_reward(graded), rewards).astype(np.float32)
    return rewards, ~cut if rule == "mask" else np.ones_like(cut)


def cut_reward(graded):
    """What a cut response earns under `zero`: 0, or the least known reward of the batch where that is below 0."""
    known = graded.rewards.values[graded.rewards.valid]
    return min(0.0, float(known.min())) if known.size else 0.0
