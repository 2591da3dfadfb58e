"""A checkpoint saved on one mesh is restored bit by bit on each of six, on eight virtual devices.

    JAX_PLATFORMS=cpu python benchmarks/reliability/meshes.py [--count 6]

On each mesh the training state of a small decoder, laid out as training has it and filled with random numbers, is
saved; every checkpoint is then restored on every mesh, onto the layout of that one.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import time

import jax
import numpy as np
import optax

import jaxrl_fp16 as rl
from jaxrl_fp16.models import param_shardings
from jaxrl_fp16.parallel import MeshConfig, make_mesh, to_host
from jaxrl_fp16.training.checkpoints.checkpoint import Checkpoints
from jaxrl_fp16.training.updates.state import create_train_state
from runs import arguments, conclude

DEVICES = 8
MESHES = [(8, 1, 1), (1, 4, 2), (1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 1, 2)]     # data, fsdp, tensor
MODEL = rl.Decoder(rl.DecoderConfig(
    family="qwen2", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=8, num_kv_heads=8,
    head_dim=4))


def state_on(mesh):
    """A training state laid out for `mesh`, parameters and moments divided as training divides them."""
    params = rl.init_params(MODEL, jax.random.key(0), mesh)
    return create_train_state(params, optax.adamw(1e-2), rl.get_precision("fp16").loss_scale, jax.random.key(1),
                              param_shardings(MODEL, mesh))


def filled(state, seed):
    """`state` with random numbers in every array: no moment is zero, and no array is another one's."""
    generator = np.random.default_rng(seed)

    def fill(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(seed), leaf.sharding)
        whole = np.issubdtype(leaf.dtype, np.integer)
        values = generator.integers(1, 1000, leaf.shape) if whole else generator.normal(size=leaf.shape)
        return jax.device_put(np.asarray(values, leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, state)


def bits(leaf):
    data = jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return to_host(data).tobytes()


def divided(state):
    """How many arrays no device holds whole."""
    return sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


def restored_differences(folder, template, expected):
    """In what the checkpoint in `folder` differs from `expected` once it is laid out like `template`, as lines."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template)
    with Checkpoints(folder, say=lambda text: None) as checkpoints:
        state, _, _ = checkpoints.restore(shapes)
    found = []
    leaves = zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shapes), jax.tree.leaves(expected))
    for (path, leaf), wanted, saved in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if bits(leaf) != bits(saved):
            found.append(f"{name} has other values")
        if not leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim):
            found.append(f"{name} lies as {leaf.sharding}")
    return found


def main():
    parser = arguments(__doc__, len(MESHES), "meshes")
    given = parser.parse_args()
    if not 1 <= given.count <= len(MESHES):
        parser.error(f"--count is {given.count}; allowed: 1 to {len(MESHES)}")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    began, work, states = time.monotonic(), given.work.resolve(), {}
    shutil.rmtree(work, ignore_errors=True)
    for seed, shape in enumerate(MESHES[:given.count]):
        states[shape] = filled(state_on(make_mesh(MeshConfig(*shape))), given.seed + seed)
        with Checkpoints(work / "x".join(map(str, shape))) as checkpoints:
            checkpoints.save(1, states[shape])
    rows = [{"mesh": "x".join(map(str, shape)), "arrays": len(jax.tree.leaves(state)), "divided": divided(state),
             "restored_from_meshes": 0} for shape, state in states.items()]
    problems = []
    for (row, onto), saved in itertools.product(zip(rows, states), states):
        name = "x".join(map(str, saved))
        found = restored_differences(work / name, states[onto], states[saved])
        row["restored_from_meshes"] += not found
        problems += [f"saved on {name}, restored on {row['mesh']}: {text}" for text in found]
    if not any(row["divided"] for row in rows):
        problems.append("no mesh divides an array")
    facts = {"devices": jax.device_count(), "seed": given.seed, "seconds": time.monotonic() - began}
    return conclude("meshes", rows, facts, problems, given.out)


if __name__ == "__main__":
    sys.exit(main())
