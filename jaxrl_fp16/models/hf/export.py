"""A Decoder, or a reward model, and its parameters -> a Hugging Face folder that Transformers and vLLM load.

The folder is written beside its final place and renamed when whole: an interrupted
export leaves nothing partial under that name.
"""

from contextlib import contextmanager, nullcontext
import json
import math
import os
from pathlib import Path
import secrets
import shutil

import jax
from jax.experimental import multihost_utils
import numpy as np
from safetensors.numpy import save_file

from jaxrl_fp16.models.adapters import check_same
from jaxrl_fp16.models.critic import Critic, decoder_of
from jaxrl_fp16.models.decoder import Decoder
from jaxrl_fp16.models.families import FAMILIES
from jaxrl_fp16.models.hf.load import check_range
from jaxrl_fp16.models.hf.weight_files import DTYPES, INDEX, SINGLE
from jaxrl_fp16.models.init import at, param_shapes, tensor_table
from jaxrl_fp16.parallel.sharding import to_host
from jaxrl_fp16.tokenizer import save_tokenizer

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_pretrained(folder, model, params, dtype="float16", tokenizer=None, generation_config=None, *,
                    overwrite=False, shard_bytes=5 * 10**9, durable=True):
    """Writes a Hugging Face model folder; in a run of several processes all call, and the first one writes.

    Args:
      folder: its path. It must be new or empty, unless `overwrite`.
      model, params: a Decoder and its parameters, on one device or many.
      dtype: of the stored weights: float16, bfloat16 or float32.
      tokenizer: anything with Transformers' `save_pretrained`; gives the special ids too. `save_tokenizer` writes it.
      generation_config: a mapping for `generation_config.json`, such as
        `{"eos_token_id": [1, 2], "temperature": 1.0}`; its ids win over the tokenizer's.
      shard_bytes: weights above this are split into several files. One such file is in memory at once.
      durable: wait until the disk has it all; without that a power cut may leave files that lack their content.

    Raises:
      ValueError: an unknown dtype, a weight that is not finite or beyond the range of
        `dtype`, parameters of another model, or a config that the format cannot express.
      FileExistsError: the folder holds something and `overwrite` is false.
    """
    if not isinstance(model, Decoder) or model.lora is not None:
        kind = "Decoder with adapters" if isinstance(model, Decoder) else type(model).__name__
        raise ValueError(f"a {kind} cannot be exported; allowed: a Decoder, with adapters save_adapter or what "
                         "merge_lora gives")
    ids, generation = _generation(tokenizer, generation_config)
    _save(Path(folder).expanduser(), model, params, dtype, ids, generation, tokenizer, overwrite, shard_bytes, durable)


def save_reward_model(folder, model, params, dtype="float32", tokenizer=None, pad_token_id=None, *,
                      overwrite=False, shard_bytes=5 * 10**9):
    """Writes a reward model as a sequence-classification folder with one label; otherwise as `save_pretrained`.

    model: a Critic without a bias, for which the format has no place. pad_token_id:
    the tokenizer's where None. Transformers scores the last token that is not this
    one, and without one no batch of several rows.
    """
    if not isinstance(model, Critic):
        raise ValueError(f"a {type(model).__name__} cannot be exported as a reward model; allowed: a Critic")
    if model.bias:
        raise ValueError("the Critic has a bias, which the format lacks; allowed: Critic(body, bias=False)")
    ids, _ = _generation(tokenizer, {} if pad_token_id is None else {"pad_token_id": pad_token_id})
    about = {"architectures": [FAMILIES[model.body.config.family].classifier], "id2label": {"0": "LABEL_0"},
             "label2id": {"LABEL_0": 0}, **ids}
    _save(Path(folder).expanduser(), model, params, dtype, about, {}, tokenizer, overwrite, shard_bytes)


def _save(folder, model, params, dtype, about, generation, tokenizer, overwrite, shard_bytes, durable=True):
    """Checks and writes; `about` goes into `config.json` above what the family writes there."""
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES.values())}")
    check_free(folder, overwrite)
    check_same(param_shapes(model), params, "parameter ")
    check_range(model, params, dtype, source=f"export to {folder}")
    body = decoder_of(model).config
    config = {**FAMILIES[body.family].write(body), **about}
    config |= {"dtype": dtype, "torch_dtype": dtype}  # the names of Transformers 5 and 4
    with new_folder(folder, durable) if jax.process_index() == 0 else nullcontext() as place:
        _write_weights(place, model, params, dtype, shard_bytes)
        if place is not None:
            write_json(place / "config.json", config)
            if generation:
                write_json(place / "generation_config.json", generation)
            if tokenizer is not None:
                save_tokenizer(tokenizer, place)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"exported {folder}")


def check_free(folder, overwrite):
    """FileExistsError for a folder that holds something, unless `overwrite`."""
    if not overwrite and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty; allowed: a new or empty folder, or overwrite=True")


def _generation(tokenizer, given):
    """The special ids, for `config.json` too, and all of `generation_config.json`."""
    known = {name: getattr(tokenizer, name, None) for name in TOKEN_IDS} | dict(given or {})
    settings = {name: value for name, value in known.items() if value is not None}
    if "temperature" in settings:
        # Transformers ignores a temperature unless told to sample, and refuses 0.
        settings.setdefault("do_sample", settings["temperature"] > 0)
        if settings["temperature"] == 0:
            del settings["temperature"]
    return {name: settings[name] for name in TOKEN_IDS if name in settings}, settings


# -- weights ------------------------------------------------------------------------------------


def _write_weights(place, model, params, dtype, shard_bytes):
    """The safetensors files, in `place`; a process without one only takes part in gathering."""
    shards = _split(_entries(model, params), np.dtype(dtype).itemsize, shard_bytes)
    where, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {
            entry: hf_array(tensor, at(params, tensor.path), index, dtype) for entry, tensor, index in shard
        }
        where.update(dict.fromkeys(tensors, name))
        total += sum(array.nbytes for array in tensors.values())
        if place is not None:
            # Transformers 4 refuses a file that does not say which library's layout it has.
            save_file(tensors, place / name, metadata={"format": "pt"})
    if place is not None and len(shards) > 1:
        write_json(place / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _entries(model, params):
    """`((name in the folder, its row of the table, its place in our array), number of values)`: layer after layer."""
    entries = []
    for tensor in tensor_table(model):
        shape = at(params, tensor.path).shape
        count = math.prod(shape[len(tensor.counted):])
        entries += [((name, tensor, index), count) for index, name in tensor.entries(shape)]
    return sorted(entries, key=lambda entry: entry[0][2][:1] or (-1,))


def _split(entries, itemsize, shard_bytes):
    """Entries in order, cut where a file would exceed `shard_bytes`."""
    shards, size = [[]], 0
    for entry, count in entries:
        if shards[-1] and size + count * itemsize > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += count * itemsize
    return shards


def hf_array(tensor, array, index, dtype):
    """One tensor as the folder holds it, fetched from the devices and cast on the host."""
    array = to_host(array[index] if index else array)
    # A file gets an array's memory whatever its strides say: a transposed view would be written untransposed.
    return np.ascontiguousarray(tensor.to_hf(array).astype(dtype))


# -- files --------------------------------------------------------------------------------------


@contextmanager
def new_folder(folder, durable=True):
    """A folder to write into, which takes its final name at the end, and is removed after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder.with_name(f".{folder.name}.partial-{secrets.token_hex(8)}")
    place.mkdir()
    try:
        yield place
        usual = place.stat().st_mode & 0o666  # by the umask, which safetensors does not ask
        for path in place.rglob("*"):
            path.chmod(usual)
            if durable:
                _flush(path)
        if durable:
            _flush(place)
        _rename(place, folder, durable)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _rename(place, folder, durable=True):
    """`place` becomes `folder`; what was there goes first, for one folder cannot replace another."""
    old = place.with_name(place.name.replace(".partial-", ".old-"))
    if folder.exists() and any(folder.iterdir()):
        folder.rename(old)
    place.rename(folder)
    if durable:
        _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path):
    """To the disk itself: a rename may survive a power cut that the files' contents do not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path, mapping):
    path.write_text(json.dumps(mapping, indent=2) + "\n", encoding="utf-8")
