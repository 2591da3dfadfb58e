"""Weights on their way to an engine: a Hugging Face folder in memory, with the checksum of every file.

Adapters go without the weights that they belong to, as a folder in PEFT's format.
"""

import contextlib
import fcntl
import functools
import math
import os
from pathlib import Path
import shutil
import tempfile
import time
import weakref

import jax
import jax.numpy as jnp
from safetensors import SafetensorError

from jaxrl_fp16.engines.child import checksum
from jaxrl_fp16.engines.pipe import EngineError
from jaxrl_fp16.models import PretrainedError, save_adapter, save_pretrained
from jaxrl_fp16.models.frozen import BASE, LORA
from jaxrl_fp16.models.init import adapter_table, at, plain, put

MEMORY = "/dev/shm"
PREFIX = "jaxrl_fp16-engine-"
SPARE = 2       # times the weights' bytes that must be free in memory
ORPHANED = 60   # seconds after which a folder that nobody holds is taken for one of a process that was killed
# Relative, of each weight, by which an engine is shown that its weights change. Enough for the first step's canary to
# notice a part that keeps them: with a tied head that does, SmolLM2-135M has a token KL of 0.4 (of 0.09 at a tenth).
CHANGE = 0.2


@contextlib.contextmanager
def exchange_folder(fallback, needed):
    """Gives a new empty folder, removed at the end: below /dev/shm where `needed` bytes fit twice, else below
    `fallback` (None: the system's temporary folder). Those of killed processes are removed.

    Raises OSError where it cannot be made.
    """
    base = fallback or tempfile.gettempdir()
    with contextlib.suppress(OSError):
        if os.access(MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(MEMORY).free >= SPARE * needed:
            base = MEMORY
    _sweep(base)
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=base)
    with _held(folder):
        try:
            yield Path(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder):
    """Holds the folder's lock, which the system lets go with the process. Raises BlockingIOError where another has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _sweep(base):
    """Removes what killed processes of this user left below `base`."""
    for folder in Path(base).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            found = folder.stat()
            if found.st_uid == os.getuid() and found.st_mtime < time.time() - ORPHANED:
                with _held(folder):
                    shutil.rmtree(folder)


def written(place, model, params, dtype, version):
    """Gives `(folder, {file: SHA-256})` of all weights in `dtype`, below the folder `place`; removed at the end.

    params: those of the plain model. There is no `generation_config.json`: nothing in the folder says how to sample.
    Raises EngineError for weights that `dtype` does not hold, or a folder that cannot be written.
    """
    save = functools.partial(save_pretrained, model=plain(model), params=params, dtype=dtype, durable=False)
    return _exchanged(place, save, version)


def adapters_written(place, model, params, dtype, version):
    """The same of the adapters of `{"base", "lora"}` alone, in PEFT's format."""
    save = functools.partial(save_adapter, model=model, params=params, dtype=dtype, durable=False)
    return _exchanged(place, save, version)


@contextlib.contextmanager
def _exchanged(place, save, version):
    folder = place / f"version-{version}"
    try:
        try:
            save(folder)
            files = {path.name: checksum(path) for path in sorted(folder.iterdir())}
        except PretrainedError as error:
            raise EngineError(f"the weights cannot be sent: {error}") from error
        except (OSError, SafetensorError) as error:
            raise EngineError(f"the weights cannot be written to {place}: {error}") from error
        yield folder, files
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@jax.jit
def changed(params):
    """Parameters of which each entry differs by `CHANGE`, up and down in turn, so that sums hardly grow."""
    def change(x):
        signs = 1 - 2 * (jnp.arange(x.size, dtype=jnp.uint32) % 2).reshape(x.shape).astype(x.dtype)
        return x * (1 + CHANGE * signs)

    return jax.tree.map(change, params)


def changed_adapters(model, params, seed=0):
    """`params`, `{"base", "lora"}`, with adapters of noise whose product is of each kernel's size times `CHANGE`.

    Not a change of the adapters that are there: they begin as nothing, and a share of that is nothing.
    """
    lora, table = {}, adapter_table(model)
    keys = jax.random.split(jax.random.key(seed), len(table))
    for (down, up), pair in zip(zip(*[iter(table)] * 2), keys.reshape(-1, 2)):
        a, b = (at(params[LORA], each.path) for each in (down, up))
        kernel = at(params[BASE], (*down.path[:-1], "kernel"))
        for each, leaf in zip((down, up), _noise(kernel, a, b, pair, model.lora.scale)):
            put(lora, each.path, leaf)
    return {**params, LORA: lora}


@jax.jit
def _noise(kernel, a, b, keys, scale):
    """(A, B): normal, so that `A B scale` has the kernel's root mean square times `CHANGE`."""
    size = CHANGE * jnp.sqrt(jnp.mean(jnp.square(kernel.astype(jnp.float32)))) / (scale * math.sqrt(a.shape[-1]))
    inputs = math.sqrt(math.prod(a.shape[1:-1]))    # as A begins, for products of the size of one input
    return tuple(factor * jax.random.normal(key, x.shape, x.dtype) for key, x, factor in
                 zip(keys, (a, b), (1 / inputs, size * inputs)))


class Seen:
    """Which arrays a tree had, without keeping them alive."""

    def __init__(self, tree):
        self._refs = [weakref.ref(leaf) for leaf in jax.tree.leaves(tree)]

    def are(self, tree):
        """Whether a tree has the same arrays."""
        leaves = jax.tree.leaves(tree)
        return len(leaves) == len(self._refs) and all(ref() is leaf for ref, leaf in zip(self._refs, leaves))
