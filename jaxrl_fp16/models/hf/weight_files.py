"""The tensors of a Hugging Face folder: found, checked, and read piece by piece.

Only safetensors are read: a header that the library checks, then plain numbers,
memory-mapped. A pickle is code that runs when it is read, and is refused unread.
"""

import dataclasses
from pathlib import Path

import ml_dtypes  # noqa: F401  gives NumPy the name bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxrl_fp16.models.families.config_json import read_json
from jaxrl_fp16.models.hf.other_folders import what_lies_in

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = f"{SINGLE}, or {INDEX} and its shards"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # written and read
READ = (*DTYPES, "F64")
UNLISTED = ("*.safetensors", "it holds {name}, which no index lists")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
CHUNK_BYTES = 2**25  # read at once, so that the largest tensor too costs little beside its place in memory


class PretrainedError(ValueError):
    """A model folder that is refused, with the file or tensor and what is allowed."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. shape: as it is stored.  dtype: one of READ."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str

    def read_into(self, out, index):
        """Fills float32 `out` with the stored tensor's `index`, a tuple of slices with bounds."""
        rows, *rest = index
        step = max(1, CHUNK_BYTES // max(1, 4 * out[:1].size))
        # Opened for this tensor alone: pages of a mapped file count as memory in use while it is open.
        with safe_open(self.file, "numpy") as file:
            stored = file.get_slice(self.name)
            for start in range(rows.start, rows.stop, step):
                stop = min(start + step, rows.stop)
                # Cast before the assignment: a cast that also transposes runs at half the speed.
                with np.errstate(over="ignore"):  # float64 beyond float32: `check_range` tells
                    values = stored[(slice(start, stop), *rest)].astype(np.float32, copy=False)
                out[start - rows.start:stop - rows.start] = values


def find_tensors(folder):
    """Every tensor of a model folder by name: of its one file, or of the shards that its index lists."""
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    refuse_pickles(folder, WEIGHTS)
    raise PretrainedError(f"{folder} holds no weights{what_lies_in(folder, UNLISTED)}; allowed: {WEIGHTS}")


def refuse_pickles(folder, allowed):
    """PretrainedError for a folder, without the files that are allowed, that holds pickles."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise PretrainedError(f"{folder} holds pickled weights only ({pickles[0]}), which are never opened; "
                              f"allowed: {allowed}")


def _read_shards(folder):
    where = _read_index(folder / INDEX)
    found = {}
    for shard in sorted(set(where.values())):
        for name, tensor in read_header(folder / shard).items():
            if name in found:
                raise PretrainedError(f"{folder}: tensor {name} is in {found[name].file.name} and in "
                                      f"{shard}; allowed: one place")
            if where.get(name) != shard:
                raise PretrainedError(f"{folder / shard}: tensor {name} is unknown to {INDEX}; "
                                      f"allowed: the tensors that it lists")
            found[name] = tensor
    for name, shard in where.items():
        if name not in found:
            raise PretrainedError(f"{folder / shard}: tensor {name} is missing; {INDEX} says it is there")
    return found


def _read_index(path):
    """Tensor name -> file name, each a plain name inside the folder."""
    try:
        where = read_json(path).get("weight_map")
    except ValueError as error:
        raise PretrainedError(str(error)) from error
    if not isinstance(where, dict) or not where:
        raise PretrainedError(f"{path}: weight_map is missing; allowed: an object of tensor and file names")
    for name, shard in where.items():
        # A name with a separator could lead out of the folder.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set("/\\\0") & set(shard):
            raise PretrainedError(f"{path}: tensor {name} is said to lie in {shard!r}; "
                                  f"allowed: the name of a .safetensors file in that folder")
    return where


def read_header(path):
    """The tensors of one safetensors file by name."""
    if not path.is_file():
        raise PretrainedError(f"{path} is missing; allowed: every shard that {INDEX} lists")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise PretrainedError(f"{path} is a Git LFS pointer; allowed: the weights, as `git lfs pull` "
                                  f"fetches them")
    try:
        with safe_open(path, "numpy") as file:
            found = {}
            for name in file.keys():
                stored = file.get_slice(name)
                found[name] = StoredTensor(name, path, tuple(stored.get_shape()), stored.get_dtype())
    except (SafetensorError, OSError) as error:
        raise PretrainedError(f"{path} is damaged or not a safetensors file ({error}); "
                              f"allowed: a whole one, fetch it again") from error
    for name, tensor in found.items():
        if tensor.dtype not in READ:
            raise PretrainedError(f"{path}: tensor {name} is stored as {tensor.dtype}; allowed: {', '.join(READ)}; "
                                  f"a quantised model cannot be trained, the one that it was made from can")
    return found
