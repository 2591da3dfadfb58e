"""Which mesh axis divides which dimension of which array.

Models name the dimensions of their parameters by logical axes (`embed`,
`heads`, ...); RULES maps those to mesh axes. A dimension that its mesh axis does
not divide stays whole on every device: with 2 key-value heads and a tensor axis
of 4, each device holds both heads.
"""

import jax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

RULES = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "rows": ("data", "fsdp"),
    # Whole everywhere: they are small, or, the stacked layers, walked through by a scan.
    "head_dim": None,
    "norm": None,
    "layers": None,
    "experts": None,
}


def axes_sharding(axes, shape, mesh):
    """An array's NamedSharding; `axes` has a logical axis (a key of RULES, or None) for each dimension."""
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {tuple(axes)} for shape {tuple(shape)}; "
                         f"allowed: one for each dimension")
    found = [_mesh_axis(axis, size, mesh) for axis, size in zip(axes, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*found))


def _mesh_axis(axis, size, mesh):
    if axis is not None and axis not in RULES:
        raise ValueError(f"logical axis {axis!r} is unknown; allowed: {', '.join(RULES)}")
    names = _shared(RULES.get(axis), mesh)
    if not names or size % _count(names, mesh):
        return None
    return names[0] if len(names) == 1 else names


def _shared(rule, mesh):
    """The mesh axes of a rule that the program's arrays are spread over; inside a `shard_map` its own axes are not."""
    names = () if rule is None else (rule,) if isinstance(rule, str) else rule
    own = getattr(mesh, "manual_axes", ())
    return tuple(name for name in names if name not in own)


def _count(names, mesh):
    return int(np.prod([mesh.shape[name] for name in names]))


def constrain(x, *axes):
    """`x` of a program that is traced, kept as its logical axes say on the mesh of its arrays; as it comes without one.

    Left alone, XLA may divide an activation's width in place of its rows, and every device then works on all rows.
    """
    mesh = jax.typeof(x).sharding.mesh
    return x if mesh.empty or mesh.size == 1 else lax.with_sharding_constraint(x, axes_sharding(axes, x.shape, mesh))


def mesh_size(x):
    """Over how many devices the arrays of a program that is traced are spread, as far as `x` tells."""
    mesh = jax.typeof(x).sharding.mesh
    return _count(_shared(mesh.axis_names, mesh), mesh)


def platform_of(x):
    """`cpu`, `gpu` or `tpu`: for what a program that is traced is made, as far as `x` tells; else what JAX runs on."""
    device = jax.typeof(x).sharding.mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def rows_spread(x):
    """Over how many devices the rows of a batch are divided, as far as `x` of a program that is traced tells."""
    mesh = jax.typeof(x).sharding.mesh
    return 1 if mesh.empty else row_shards(mesh)


def copies_of(x):
    """`(mesh, count)`: over how many copies of the model, the mesh axis `data`, the rows of `x` [B,...] of a program
    that is traced are divided; 1 without a mesh, or where they do not divide."""
    mesh = jax.typeof(x).sharding.mesh
    count = 1 if mesh.empty else _count(_shared("data", mesh), mesh)
    return mesh, 1 if x.shape[0] % count else count


def tree_shardings(axes, shapes, mesh):
    """`axes_sharding` leaf by leaf; `axes` is a pytree of PartitionSpecs of logical axes."""
    return jax.tree.map(lambda axis, leaf: axes_sharding(axis, leaf.shape, mesh), axes, shapes)


def replicated(mesh):
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
    """The sharding of arrays [B,...]: their rows are divided over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["rows"]))


def row_shards(mesh):
    """Into how many parts the rows of a batch are divided."""
    return _count(_shared(RULES["rows"], mesh), mesh)


def shard_batch(tree, mesh):
    """Every array [B,...] of a pytree with its rows divided over the mesh; scalars go whole to every device.

    Each process passes the same global rows and keeps its own part. Raises
    ValueError when rows do not divide.
    """
    parts = row_shards(mesh)

    def place(x):
        if np.ndim(x) == 0:
            return _put(x, replicated(mesh))
        if x.shape[0] % parts:
            raise ValueError(f"{x.shape[0]} rows do not divide over data {mesh.shape['data']} x fsdp "
                             f"{mesh.shape['fsdp']}; allowed: multiples of {parts}")
        return _put(x, batch_sharding(mesh))

    return jax.tree.map(place, tree)


def _put(x, sharding):
    if isinstance(x, jax.Array) or sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    # `device_put` of a host array would first compare it over all processes.
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def state_shardings(state_shapes, param_shardings):
    """Shardings for a train state with `.params`, each leaf a ShapeDtypeStruct (or array).

    Parameters take `param_shardings`. So does whatever mirrors them: a leaf whose
    path ends in a parameter's path and whose shape is that parameter's, as Adam's
    moments are, wherever optax has wrapped them. Everything else is replicated.
    Of parameters {"base", "lora"} moments mirror what is below "lora".
    """
    known = {}
    leaves = jax.tree_util.tree_leaves_with_path(state_shapes.params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(param_shardings), strict=True):
        names = _names(path)
        known[names, leaf.shape] = known[names[names[0] == "lora":], leaf.shape] = sharding
    whole = replicated(next(iter(known.values())).mesh)

    def choose(path, leaf):
        names = _names(path)
        endings = (names[start:] for start in range(len(names)))  # the longest first
        return next((known[end, leaf.shape] for end in endings if (end, leaf.shape) in known), whole)

    return jax.tree_util.tree_map_with_path(choose, state_shapes)


def _names(path):
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def to_host_memory(tree):
    """The arrays of a pytree in their devices' host memory, spread as before; `to_device_memory` brings them back."""
    return _in_memory(tree, "pinned_host")


def to_device_memory(tree):
    """The arrays of a pytree in device memory; those that are there are not copied."""
    return _in_memory(tree, "device")


def _in_memory(tree, kind):
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind)), tree)


def to_host(x):
    """A NumPy array with the whole of `x`, gathered if it is spread over processes (then all must call)."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
