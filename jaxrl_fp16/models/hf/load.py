"""A Hugging Face folder -> a Decoder, or a reward model, and its float32 parameters.

One of our arrays holds a tensor of every layer, stacked. Nothing is downloaded, no
code of the folder runs, and the host never holds a second copy: each array, or each
device's part of it, is filled from the mapped files tensor by tensor.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_fp16.finite import peak
from jaxrl_fp16.folders import local_folder
from jaxrl_fp16.models.critic import Critic, decoder_of
from jaxrl_fp16.models.decoder import Decoder, DecoderConfig
from jaxrl_fp16.models.families import FAMILIES
from jaxrl_fp16.models.families.config_json import read_json, refuse_quantised, refuse_unless
from jaxrl_fp16.models.hf.other_folders import refuse_adapter, what_lies_in
from jaxrl_fp16.models.hf.weight_files import PretrainedError, find_tensors
from jaxrl_fp16.models.init import at, param_shapes, param_shardings, plain, put, tensor_table
from jaxrl_fp16.models.numerics import DEFAULT
from jaxrl_fp16.parallel.sharding import to_host

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ALIGNMENT = 64  # bytes; JAX on CPU takes an array so aligned as it is, without a copy


def load_pretrained(
    folder, *, attention="blockwise", remat=True, mesh=None, compute_dtype="float32", numerics=DEFAULT, lora=None,
    dtype="float32",
):
    """Reads a Hugging Face model folder: `config.json` and safetensors, whole or in shards.

    Args:
      folder: its path.
      attention, remat, numerics, lora: of the Decoder. With `lora` the parameters are those that `init_lora` takes.
      mesh: where given, each device reads and holds its part of every array.
      compute_dtype: the policy's; a weight beyond its range is refused. None: none is, not even a NaN.
      dtype: of the parameters. Only a base that stays as it is should be of another than float32.

    Returns:
      (Decoder, parameters as a nested dict of arrays). The folder's own data types, float32, float16 or bfloat16, are
      cast tensor by tensor, and rounded to `dtype` array by array.

    Raises:
      PretrainedError: a ValueError; the folder, a file or a tensor is not what
        `config.json` asks for.
    """
    model = Decoder(read_config(folder), attention=attention, remat=remat, numerics=numerics, lora=lora)
    return model, _load_params(local_folder(folder), plain(model), mesh, compute_dtype, dtype)


def load_reward_model(
    folder, *, attention="blockwise", remat=True, mesh=None, compute_dtype="float32", numerics=DEFAULT,
):
    """Reads a sequence-classification folder with one label: a decoder's body and `score.weight` [1,D].

    Arguments and errors as `load_pretrained`'s; a causal language model's folder,
    and one of several labels, is refused too. Returns (Critic without a bias,
    parameters). Its scores are `sequence_scores` of `forward.py`.
    """
    config = read_config(folder, classifier=True)
    # No head is stored, and a Decoder that is tied has none of its own.
    config = dataclasses.replace(config, tie_embeddings=True)
    body = Decoder(config, attention=attention, remat=remat, numerics=numerics)
    model = Critic(body, bias=False)
    return model, _load_params(local_folder(folder), model, mesh, compute_dtype)


def _load_params(folder, model, mesh, compute_dtype, dtype="float32"):
    """The parameters of `model`, every tensor of the folder checked before the first is read."""
    shapes, num_layers = param_shapes(model), decoder_of(model).config.num_layers
    stored = find_tensors(folder)
    if num_layers > len(stored):  # before a list of that many names is made: it may be any number
        raise PretrainedError(f"{folder}: config.json asks for {num_layers} layers; {len(stored)} tensors are there; "
                              "allowed: the weights of that config.json")
    table = tensor_table(model)
    _check_tensors(folder, model, stored, expected_tensors(table, shapes))
    shardings = None if mesh is None else param_shardings(model, mesh)
    params = {}
    for tensor in table:
        shape = at(shapes, tensor.path).shape
        array = load_array(tensor, shape, None if mesh is None else at(shardings, tensor.path), stored)
        if dtype != "float32":  # rounded at once, what it was is gone
            if compute_dtype is not None:
                check_arrays([tensor], [array], compute_dtype, folder)
            array = jax.block_until_ready(array.astype(dtype))
        put(params, tensor.path, array)
    if compute_dtype is not None and dtype == "float32":
        check_range(model, params, compute_dtype, source=folder)
    return params


def read_config(folder, classifier=False):
    """The DecoderConfig that a model folder's `config.json` describes; with `classifier` a reward model's."""
    try:
        folder = local_folder(folder)
        path = folder / "config.json"
        refuse_adapter(folder)
        if not path.is_file():
            raise ValueError(f"{path} is missing{what_lies_in(folder)}; allowed: a model folder as Transformers "
                             "saves it")
        found = read_json(path)
    except ValueError as error:
        raise PretrainedError(str(error)) from error
    name = found.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise PretrainedError(f"{path}: model_type is {name!r}; allowed: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    try:
        refuse_quantised(found)
        refuse_unless(found, "architectures", ([family.classifier if classifier else family.architecture],))
        if classifier:
            _refuse_labels(found)
        return DecoderConfig(family=name, **family.read(found))
    except ValueError as error:
        raise PretrainedError(f"{path}: {error}") from error


def _refuse_labels(config):
    """ValueError unless a classifier has one label. Transformers takes 2 where `config.json` tells nothing."""
    labels = config.get("num_labels")
    if labels is None:
        labels = len(config["id2label"]) if isinstance(config.get("id2label"), dict) else 2
    if labels != 1:
        raise ValueError(f"num_labels is {labels} (the length of id2label; 2 where both are missing); "
                         f"allowed: 1, a reward is one number")


def check_range(model, params, dtype, source="parameters"):
    """PretrainedError if any value of `params` that a folder holds is NaN, infinite, or beyond the range of `dtype`.

    One reduction on the device; the error names the tensor as Hugging Face does, after `source`.
    """
    table = tensor_table(model)
    check_arrays(table, [at(params, tensor.path) for tensor in table], dtype, source)


def check_arrays(table, arrays, dtype, source):
    """`check_range` of some rows of a table and their arrays."""
    limit, depths = float(jnp.finfo(dtype).max), tuple(len(tensor.counted) for tensor in table)
    peaks = _peaks(depths, arrays)
    for tensor, found in zip(table, map(to_host, peaks), strict=True):
        for index, name in tensor.entries(found.shape):
            largest = found[index].max()
            if not largest <= limit:  # a NaN compares false
                raise PretrainedError(f"{source}: tensor {name} holds {largest:g}; allowed: finite values up to "
                                      f"{limit:g}, the range of {jnp.dtype(dtype).name}")


@partial(jax.jit, static_argnums=0)
def _peaks(depths, arrays):
    """Largest magnitude along all but the first `depth` axes of each array, and at least one."""
    return [peak(x, tuple(range(max(depth, 1), x.ndim))) for depth, x in zip(depths, arrays)]


# -- what must be there -------------------------------------------------------------------------


def expected_tensors(table, shapes):
    """Tensor name -> shape in the folder."""
    expected = {}
    for tensor in table:
        shape = at(shapes, tensor.path).shape
        stored = tensor.hf_shape(shape[len(tensor.counted):])
        expected.update({name: stored for _, name in tensor.entries(shape)})
    return expected


def _check_tensors(folder, model, stored, expected):
    """PretrainedError unless the stored tensors are those that the config asks for, each of its shape."""
    config, extra = decoder_of(model).config, set()
    tied = config.tie_embeddings and isinstance(model, Decoder) and HEAD not in expected
    for name in stored:
        if name.endswith("rotary_emb.inv_freq") or (name == HEAD and tied):
            extra.add(name)     # the first is a constant that Transformers saved until 4.31
    check_stored(folder, {name: tensor for name, tensor in stored.items() if name not in extra}, expected,
                 f"config.json ({config.family}, {config.num_layers} layers)")
    if HEAD in extra:
        _check_tied(folder, stored[HEAD], stored[EMBEDDING])


def check_stored(folder, stored, expected, asked):
    """PretrainedError unless the stored tensors are the expected ones, each of its shape; asked: who asks for them."""
    missing = [name for name in expected if name not in stored]
    if missing:
        raise PretrainedError(f"{folder}: tensor {missing[0]} is missing, with {len(missing) - 1} others; "
                              f"allowed: all {len(expected)} tensors that {asked} asks for")
    for name, tensor in stored.items():
        if name not in expected:
            raise PretrainedError(f"{folder}: tensor {name} in {tensor.file.name} is unknown; "
                                  f"allowed: the {len(expected)} tensors that {asked} asks for")
        if tensor.shape != expected[name]:
            raise PretrainedError(f"{folder}: tensor {name} has shape {list(tensor.shape)}; "
                                  f"allowed: {list(expected[name])}, as {asked} asks for")


def _check_tied(folder, head, embedding):
    """A tied model may store its head as well, if it is the embedding."""
    if head.shape == embedding.shape:
        arrays = [np.empty(head.shape, np.float32) for _ in range(2)]
        for tensor, array in zip((head, embedding), arrays, strict=True):
            tensor.read_into(array, tuple(slice(0, size) for size in head.shape))
        if np.array_equal(*arrays):
            return
    raise PretrainedError(f"{folder}: tensor {HEAD} differs from {EMBEDDING} while config.json says "
                          f"tie_word_embeddings; allowed: equal ones, or no {HEAD}")


# -- from files to devices ----------------------------------------------------------------------


def load_array(tensor, shape, sharding, stored):
    """float32: one of our arrays, each device's part of it read once; on the default device if `sharding` is None."""
    if sharding is None:
        bounds = tuple((0, size) for size in shape)
        return jax.block_until_ready(jax.device_put(_read_part(tensor, shape, bounds, stored)))
    holders = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    parts = []
    for bounds, devices in holders.items():
        part = _read_part(tensor, shape, bounds, stored)
        parts += [jax.device_put(part, device) for device in devices]
        jax.block_until_ready(parts)  # else the parts of all devices would wait in host memory
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _read_part(tensor, shape, bounds, stored):
    """float32: the part of one of our arrays within `bounds`, (start, stop) for each axis."""
    part = _aligned([stop - start for start, stop in bounds])
    depth, names = len(tensor.counted), dict(tensor.entries(shape))
    index = tensor.hf_index([slice(*bound) for bound in bounds[depth:]], shape[depth:])
    for place in np.ndindex(part.shape[:depth]):
        name = names[tuple(start + offset for (start, _), offset in zip(bounds, place))]
        stored[name].read_into(tensor.to_hf(part[place]), index)
    return part


def _aligned(shape):
    """An uninitialised float32 array that begins at a multiple of ALIGNMENT bytes."""
    size = 4 * int(np.prod(shape))
    room = np.empty(size + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    return room[start:start + size].view(np.float32).reshape(shape)
