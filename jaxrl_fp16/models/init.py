"""A model's parameters as shapes, as logical axes, as shardings, and as fresh values."""

import dataclasses

import jax
from jax.sharding import PartitionSpec
import jax.numpy as jnp

from jaxrl_fp16.models.critic import Critic, decoder_of
from jaxrl_fp16.models.families import FAMILIES
from jaxrl_fp16.models.families.family import Tensor
from jaxrl_fp16.parallel.sharding import constrain, tree_shardings


def init_params(model, key, mesh=None):
    """Random float32 parameters of a Decoder or Critic, a nested dict.

    With a `mesh` they are created divided over it; the values depend on `key` alone, but for a last bit on a CPU.
    """
    shardings = None if mesh is None else param_shardings(model, mesh)
    return jax.jit(_initializer(model), out_shardings=shardings)(key)


def param_shapes(model):
    """The same pytree with a ShapeDtypeStruct for each array; nothing is allocated."""
    return jax.eval_shape(_initializer(model), jax.random.key(0))


def param_axes(model):
    """The same pytree with a PartitionSpec of logical axes (keys of `parallel.RULES`) for each array."""
    if isinstance(model, Critic):
        bias = {"bias": PartitionSpec(None)} if model.bias else {}
        return {"body": param_axes(model.body), "value": {"kernel": PartitionSpec("embed", None), **bias}}
    axes = {}
    for tensor in FAMILIES[model.config.family].tensors(model.config):
        stacking = (f"{each}s" for each in tensor.counted)
        put(axes, tensor.path, PartitionSpec(*stacking, *tensor.axes))
    return axes


def param_shardings(model, mesh):
    """The same pytree with a NamedSharding for each array."""
    return tree_shardings(param_axes(model), param_shapes(model), mesh)


def laid_out_for_decoding(model, compute):
    """`forward.cast_to_compute`'s tree of a Decoder, each device with all that it multiplies by: a decode step then
    moves no weights. Whole but along the tensor axis; gathered in the compute dtype."""
    axes = {"head": PartitionSpec("vocab", "embed"), **param_axes(model)}

    def gathered(leaf, spec):
        return constrain(constrain(leaf, *spec), *(None if axis == "embed" else axis for axis in spec))

    return jax.tree.map(gathered, compute, axes)


def tensor_table(model):
    """The tensors of a Hugging Face folder that holds `model`: a Decoder, or a Critic as a reward model.

    A reward model's folder has `score.weight` [1,D] and no `lm_head.weight`.
    """
    config = decoder_of(model).config
    table = FAMILIES[config.family].tensors(config)
    if not isinstance(model, Critic):
        return table
    body = [dataclasses.replace(tensor, path=("body", *tensor.path)) for tensor in table if tensor.path != ("head",)]
    return [*body, Tensor("score.weight", ("value", "kernel"), ("embed", None), "transpose")]


def put(tree, path, leaf):
    """Sets the leaf of a nested dict at `path`, a tuple of keys."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf


def at(tree, path):
    """The leaf of a nested dict at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def _initializer(model):
    # Flax learns the shapes from a forward of one token, which XLA then drops: no kernel needs to run here.
    model = model.clone(body=_with_plain(model.body)) if isinstance(model, Critic) else _with_plain(model)
    return lambda key: model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def _with_plain(decoder):
    return decoder.clone(attention="plain", remat=False)
