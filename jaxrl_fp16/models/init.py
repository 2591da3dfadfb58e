"""A model's parameters as shapes, as logical axes, as shardings, and as fresh values."""

import dataclasses

import jax
from jax.sharding import PartitionSpec
import jax.numpy as jnp

from jaxrl_fp16.models.critic import Critic, decoder_of
from jaxrl_fp16.models.families import FAMILIES
from jaxrl_fp16.models.families.family import Tensor
from jaxrl_fp16.models.frozen import BASE, LORA, in_one
from jaxrl_fp16.parallel.sharding import constrain, tree_shardings


def init_params(model, key, mesh=None):
    """Random float32 parameters of a Decoder or Critic, a nested dict; of a model with adapters those of the plain
    model, its base, for `init_lora`.

    With a `mesh` they are created divided over it; the values depend on `key` alone, but for a last bit on a CPU.
    """
    model = plain(model)
    shardings = None if mesh is None else param_shardings(model, mesh)
    return jax.jit(initializer(model), out_shardings=shardings)(key)


def plain(model):
    """A Decoder or Critic without adapters."""
    return model.clone(body=plain(model.body)) if isinstance(model, Critic) else model.clone(lora=None)


def param_shapes(model, base_dtype=jnp.float32):
    """The parameters with a ShapeDtypeStruct for each array; nothing is allocated. base_dtype: of a frozen part."""
    shapes = jax.eval_shape(initializer(model), jax.random.key(0))
    if decoder_of(model).lora is None:
        return shapes
    return {**shapes, BASE: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, base_dtype), shapes[BASE])}


def param_axes(model):
    """The same pytree with a PartitionSpec of logical axes (keys of `parallel.RULES`) for each array."""
    axes = {}
    for tensor in tensor_table(model, stored=False):
        stacking = (f"{each}s" for each in tensor.counted)
        put(axes, tensor.path, PartitionSpec(*stacking, *tensor.axes))
    return axes


def param_shardings(model, mesh):
    """The same pytree with a NamedSharding for each array."""
    return tree_shardings(param_axes(model), param_shapes(model), mesh)


def laid_out_for_decoding(model, compute):
    """`forward.cast_to_compute`'s tree of a Decoder, each device with all that it multiplies by: a decode step then
    moves no weights. Whole but along the tensor axis; gathered in the compute dtype."""
    axes = {"head": PartitionSpec("vocab", "embed"), **in_one(param_axes(model))}
    axes = {name: axes[name] for name in compute}

    def gathered(leaf, spec):
        return constrain(constrain(leaf, *spec), *(None if axis == "embed" else axis for axis in spec))

    return jax.tree.map(gathered, compute, axes)


def tensor_table(model, stored=True):
    """The tensors of `model`, a Decoder or a Critic: of its Hugging Face folder, and its adapters by PEFT's names.

    stored: as a folder has them. A reward model's has `score.weight` [1,D] and no `lm_head.weight`; there is no place
    in it for a Critic's bias.
    """
    body = decoder_of(model)
    table, adapters = FAMILIES[body.config.family].tensors(body.config), adapter_table(body)
    if isinstance(model, Critic):
        table = [tensor for tensor in table if not stored or tensor.path != ("head",)]
        table, adapters = _below("body", table), _below("body", adapters)
        head = [Tensor("score.weight", ("value", "kernel"), ("embed", None), "transpose")]
        if model.bias and not stored:
            head.append(Tensor("score.bias", ("value", "bias"), (None,)))
        table, adapters = (table, adapters + head) if adapters else (table + head, adapters)
    return _below(BASE, table) + _below(LORA, adapters) if adapters else table


def adapter_table(model):
    """The tensors of a Decoder's adapters as PEFT names and lays them out; their paths lead through the adapters alone.

    Empty without `model.lora`. Raises ValueError for a target that the model lacks.
    """
    if model.lora is None:
        return []
    table = [tensor for tensor in FAMILIES[model.config.family].tensors(model.config) if tensor.linear]
    _check_targets(model.lora, [tensor.linear for tensor in table])
    rows = []
    for tensor in table:
        if not model.lora.adapts(tensor.linear):
            continue
        stem, path = tensor.name.removesuffix(".weight"), tensor.path[:-1]
        # A kernel's first axes are summed over where its heads are; else the first one alone.
        summed = 2 if tensor.kind == "from_heads" else 1
        down, up = (*tensor.axes[:summed], None), (None, *tensor.axes[summed:])
        rows += [
            Tensor(f"base_model.model.{stem}.lora_A.weight", (*path, "a"), down, KINDS[len(down)][0]),
            Tensor(f"base_model.model.{stem}.lora_B.weight", (*path, "b"), up, KINDS[len(up)][1]),
        ]
    return rows


# By the number of axes, how PEFT lays out A and B in terms of ours: heads are one axis there.
KINDS = {2: ("transpose", "transpose"), 3: ("from_heads", "to_heads")}


def _check_targets(lora, known):
    unknown = [name for name in lora.targets if f"{name}_proj" not in known]
    if unknown:
        raise ValueError(f"targets name {', '.join(f'{name}_proj' for name in unknown)}; allowed: {', '.join(known)}")


def _below(name, table):
    return [dataclasses.replace(tensor, path=(name, *tensor.path)) for tensor in table]


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


def initializer(model):
    """`key -> parameters` of a Decoder or Critic, random and float32."""
    # Flax learns the shapes from a forward of one token, which XLA then drops: no kernel needs to run here.
    model = model.clone(body=_with_plain(model.body)) if isinstance(model, Critic) else _with_plain(model)

    def make(key):
        found = model.init(key, jnp.zeros((1, 1), jnp.int32))
        params = found["params"]
        if decoder_of(model).lora is None:
            return params
        if isinstance(model, Critic):
            return {BASE: {"body": params["body"]}, LORA: {"body": found[LORA]["body"], "value": params["value"]}}
        return {BASE: params, LORA: found[LORA]}

    return make


def _with_plain(decoder):
    return decoder.clone(attention="plain", remat=False)
