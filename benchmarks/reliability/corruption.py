"""Checkpoints damaged at random: each is noticed, and the one before is restored bit by bit.

    JAX_PLATFORMS=cpu python benchmarks/reliability/corruption.py [--count 500]

A training state of a small decoder after each of three optimizer steps is saved; then the newest checkpoint loses
a bit, an end, all of a file's bytes or a file, at random over all files that it has, the manifest too. In a quarter
of the cases the one before it is damaged as well. Each time the folder is opened anew and restored from.
"""

from __future__ import annotations

import functools
import random
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import optax

import jaxrl_fp16 as rl
from jaxrl_fp16.training.checkpoints.checkpoint import CheckpointConfig, Checkpoints
from jaxrl_fp16.types import Batch
from runs import arguments, arrays_of, conclude, same_bits

ROWS, COLUMNS, VOCAB = 4, 12, 32
STEPS = (1, 2, 3)
MODEL = rl.Decoder(rl.DecoderConfig(
    family="qwen2", vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=4, tie_embeddings=True))


def random_batch(key):
    """Rows that are all response but for four columns."""
    numbers = jax.random.normal(key, (ROWS, COLUMNS))
    ones = jnp.ones((ROWS, COLUMNS), bool)
    return Batch(
        tokens=jax.random.randint(key, (ROWS, COLUMNS), 0, VOCAB), mask=ones, response_mask=ones.at[:, :4].set(False),
        rollout_logprobs=-jnp.abs(numbers), old_logprobs=-jnp.abs(numbers), advantages=numbers[:, 0],
    )


@functools.cache
def states():
    """step -> the training state after it, in FP16."""
    precision, optimizer = rl.get_precision("fp16"), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    update = rl.make_update(MODEL, precision.policy, rl.get_algorithm("grpo"), optimizer, microbatch_size=ROWS)
    params = rl.init_params(MODEL, jax.random.key(0))
    state, found = rl.init_train_state(params, optimizer, precision.loss_scale, jax.random.key(1)), {}
    for step in STEPS:
        state, _ = update(state, random_batch(jax.random.key(step)))
        found[step] = jax.tree.map(jnp.copy, state)     # the next update deletes this one
    return found


# -- damage: what is left of a file's bytes, None for no file ----------------------------------------------


def flip(content, generator):
    place, bit = generator.randrange(len(content)), 1 << generator.randrange(8)
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1:]


def truncate(content, generator):
    return content[:generator.randrange(len(content))]


DAMAGE = {"flipped bit": flip, "truncated": truncate, "emptied": lambda *_: b"", "deleted": lambda *_: None}


def damage(checkpoint, generator):
    """Damages one file: `(what was done to which file, a function that undoes it)`."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path, kind = generator.choice(files), generator.choice(list(DAMAGE))
    content = path.read_bytes()
    if not content:
        kind = "deleted"
    left = DAMAGE[kind](content, generator)
    path.unlink() if left is None else path.write_bytes(left)
    return kind, path.relative_to(checkpoint).as_posix(), lambda: path.write_bytes(content)


def restore(folder, template):
    """`(state or None, step, what was said)` of the newest sound checkpoint, by an object that knows nothing yet."""
    said = []
    with Checkpoints(folder, CheckpointConfig(keep=len(STEPS)), say=said.append) as checkpoints:
        try:
            state, _, step = checkpoints.restore(template)
        except Exception as error:      # orbax's own, of damage that no checksum noticed, is a problem too
            return None, 0, [*said, f"{type(error).__name__}: {error}"[:300]]
    return state, step, said


def one_case(folder, expected, generator):
    """`(kind, file, problem or None)`."""
    newest = STEPS[-1]
    broken = [newest, newest - 1] if generator.random() < 0.25 else [newest]
    done = [damage(folder / str(step), generator) for step in broken]
    state, step, said = restore(folder, expected[newest])
    for _, _, undo in done:
        undo()
    kind, file, _ = done[0]
    wanted, told = newest - len(broken), [f"/{step}: " for step in broken]
    if step != wanted or not all(any(text in line for line in said) for text in told):
        return kind, file, f"{kind}, {file}: step {step} instead of {wanted} was restored; {said}"
    mine, theirs = arrays_of(state), arrays_of(expected[wanted])
    wrong = [name for name in theirs if not same_bits(mine.get(name), theirs[name])]
    return kind, file, f"{kind}, {file}: {wrong} differ" if wrong else None


def main():
    given = arguments(__doc__, 500, "corruption").parse_args()
    folder, expected, generator = given.work.resolve() / "checkpoints", states(), random.Random(given.seed)
    shutil.rmtree(folder, ignore_errors=True)
    with Checkpoints(folder, CheckpointConfig(keep=len(STEPS)), say=lambda text: None) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, expected[step], {"position": step})
    began = time.monotonic()
    cases = [one_case(folder, expected, generator) for _ in range(given.count)]
    problems = [problem for *_, problem in cases if problem]
    if restore(folder, expected[STEPS[-1]])[1] != STEPS[-1]:
        problems.append("the mended checkpoint is not restored: the damage was not what was noticed")
    rows = [
        {"damage": kind, "cases": len(found), "files": len({file for file, _ in found}),
         "manifests": sum(file == "manifest.json" for file, _ in found),
         "noticed_and_fell_back": sum(problem is None for _, problem in found)}
        for kind in DAMAGE if (found := [(file, problem) for name, file, problem in cases if name == kind])
    ]
    facts = {"cases": len(cases), "seed": given.seed, "seconds": time.monotonic() - began}
    return conclude("corruption", rows, facts, problems, given.out)


if __name__ == "__main__":
    sys.exit(main())
