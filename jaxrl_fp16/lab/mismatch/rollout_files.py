"""Rollouts with every program's log-probs of them, kept as .npz: what the offline figures are made of.

B: rows (responses).  T: columns.  N: max_new_tokens.  K: kept ids of a truncated distribution.
"""

import dataclasses
from pathlib import Path
import re
import zipfile
import zlib

import numpy as np

from jaxrl_fp16.types import Decisions

FORMAT = "jaxrl_fp16 rollouts 1"
JIT = "jit"     # our own sampler; a file that names no engine is its
# field -> (dtype, letters of its shape)
ARRAYS = {
    "tokens": (np.int32, "BT"), "mask": (np.bool_, "BT"), "response_mask": (np.bool_, "BT"),
    "logprobs": (np.float32, "BT"), "finished": (np.bool_, "B"),
}
DECISIONS = {"support": (np.int32, "BNK")}  # likewise; those that the sampler made
SCORES = ("scorer", "gradient", "entropy")  # each a group of arrays float32 [B,T], one a precision
ENGINE = ("engine", "version")              # texts, of another engine than our own
# What NumPy raises for a file that is none of its own, or not whole; a lone array is no context manager.
DAMAGED = (OSError, EOFError, KeyError, TypeError, ValueError, MemoryError, NotImplementedError, zipfile.BadZipFile,
           zlib.error)


@dataclasses.dataclass(frozen=True)
class ScoredRollout:
    """What a sampler drew in one precision, and what other programs say of the same tokens.

    Log-probs and entropies count where `response_mask` is 1.
    """

    precision: str             # of the sampler
    temperature: float
    tokens: np.ndarray         # int32 [B,T]
    mask: np.ndarray           # bool [B,T]: real tokens
    response_mask: np.ndarray  # bool [B,T]: sampled
    logprobs: np.ndarray       # float32 [B,T]: by the sampler, while it sampled
    finished: np.ndarray       # bool [B]: ended by itself
    support: np.ndarray | None = None   # int32 [B,N,K]: as Rollout's
    engine: str = JIT          # what sampled, and its version as it says it
    version: str = ""
    vocab_size: int | None = None   # ids of the model that sampled, where its file says so
    scorer: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)    # precision -> float32 [B,T]
    gradient: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # the gradient program's, likewise
    entropy: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)   # nats a token, by the scorer

    @property
    def decisions(self):
        """As Rollout's."""
        return Decisions(self.support)


def labelled(rollouts):
    """`{label: rollout}`: a label is the precision, after the engine where another than our own is among them.

    Raises ValueError for two of one label.
    """
    plain, found = all(rollout.engine == JIT for rollout in rollouts), {}
    for rollout in rollouts:
        label = rollout.precision if plain else f"{rollout.engine} {rollout.precision}"
        if label in found:
            raise ValueError(f"there are two rollouts of {label}; allowed: each engine once in a precision, and two "
                             "versions or settings of one under names of their own, such as vllm-eager")
        found[label] = rollout
    return found


def file_name(precision, engine=JIT):
    """`fp16` -> `fp16.npz`, of another engine `vllm-fp16.npz`; what a file's name cannot hold becomes a dash."""
    name = precision if engine == JIT else f"{engine}-{precision}"
    return re.sub(r"[^A-Za-z0-9_.]+", "-", name) + ".npz"


def save_rollout(folder, rollout):
    """Writes `folder/PRECISION.npz`, or `ENGINE-PRECISION.npz`, in one piece and gives its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(rollout, name) for name in ARRAYS}
    arrays |= {name: array for name, array in vars(rollout.decisions).items() if array is not None}
    for group in SCORES:
        arrays |= {f"{group}/{precision}": array for precision, array in getattr(rollout, group).items()}
    if rollout.engine != JIT:
        arrays |= {name: np.array(getattr(rollout, name)) for name in ENGINE}
    path = folder / file_name(rollout.precision, rollout.engine)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, format=np.array(FORMAT), precision=np.array(rollout.precision),
                            temperature=np.float64(rollout.temperature), **arrays)
    temporary.replace(path)
    return path


def load_rollout(path):
    """The ScoredRollout of a file that `save_rollout` wrote, or another program in its format.

    Raises ValueError, in one line, for a file that is damaged or holds anything else. No
    pickle is read.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read as stored rollouts ({_one_line(error)})") from error
    if str(arrays.pop("format", "")) != FORMAT:
        raise ValueError(f"{path} holds no stored rollouts; allowed: files with format {FORMAT!r}")
    precision, temperature = (_scalar(path, arrays, *field) for field in (("precision", "U"), ("temperature", "f")))
    made_by = {name: _scalar(path, arrays, name, "U") for name in ENGINE} if "engine" in arrays else {}
    groups = {group: {} for group in SCORES}
    for name in [name for name in arrays if "/" in name]:
        group, _, scored_in = name.partition("/")
        if group not in groups:
            raise ValueError(f"{path}: {name} is unknown; allowed before the slash: {', '.join(SCORES)}")
        groups[group][scored_in] = arrays.pop(name)
    _check(path, arrays, groups)
    return ScoredRollout(precision, temperature, **arrays, **made_by, **groups)


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def _scalar(path, arrays, name, kind):
    value = arrays.pop(name, None)
    if value is None or value.shape or value.dtype.kind != kind:
        raise ValueError(f"{path}: {name} is {'missing' if value is None else f'{value.dtype} {value.shape}'}; "
                         f"allowed: one {'text' if kind == 'U' else 'float'}")
    return value.item()


def _check(path, arrays, groups):
    """Every array is there with its dtype and shape, and the masks go together."""
    wanted = {**ARRAYS, **{name: kind for name, kind in DECISIONS.items() if name in arrays}}
    if set(arrays) != set(wanted):
        odd = ", ".join(sorted(set(arrays) ^ set(wanted)))
        raise ValueError(f"{path}: {odd} missing or unknown; allowed: {', '.join(ARRAYS | DECISIONS)}")
    sizes = dict(zip("BT", np.shape(arrays["tokens"])))
    for name, (dtype, letters) in wanted.items():
        _check_array(path, name, arrays[name], dtype, letters, sizes)
    for group, found in groups.items():
        for precision, array in found.items():
            _check_array(path, f"{group}/{precision}", array, np.float32, "BT", sizes)
    if not arrays["response_mask"].any():
        raise ValueError(f"{path}: no row has a response token; allowed: one or more")
    if (arrays["response_mask"] & ~arrays["mask"]).any():
        raise ValueError(f"{path}: response_mask covers columns where mask is 0; allowed: real tokens")
    if (arrays["tokens"] < 0).any():
        raise ValueError(f"{path}: tokens are as low as {arrays['tokens'].min()}; allowed: 0 and above")


def _check_array(path, name, array, dtype, letters, sizes):
    fits = array.ndim == len(letters) and all(sizes.get(letter, n) == n for letter, n in zip(letters, array.shape))
    if array.dtype != dtype or not fits:
        shape = ",".join(str(sizes.get(letter, letter)) for letter in letters)
        raise ValueError(f"{path}: {name} is {array.dtype} {list(array.shape)}; allowed: "
                         f"{np.dtype(dtype).name} [{shape}]")


def load_rollouts(folder, precisions, engines=(JIT,)):
    """A ScoredRollout of each of `engines` in each of `precisions`, from a folder of such files or a run folder with
    `rollouts/`.

    Raises ValueError, naming the folder, where it lacks one or a file is not what it should be.
    """
    folder = Path(folder)
    inner = folder / "rollouts"
    folder = inner if inner.is_dir() else folder
    held = {path.name for path in folder.glob("*.npz")}
    wanted = {file_name(precision, engine): (precision, engine) for engine in engines for precision in precisions}
    missing = [name for name in wanted if name not in held]
    if missing:
        raise ValueError(f"{folder} has no {missing[0]}; it holds {', '.join(sorted(held)) or 'no .npz file'}; "
                         "allowed: mismatch.precisions of those that are there")
    rollouts = []
    for name, (precision, engine) in wanted.items():
        rollout = load_rollout(folder / name)
        if (rollout.precision, rollout.engine) != (precision, engine):
            by = "" if rollout.engine == engine else f" by {rollout.engine!r}"
            raise ValueError(f"{folder / name} was sampled in {rollout.precision!r}{by}; allowed: {precision!r}"
                             + (f" by {engine!r}" if by else ""))
        rollouts.append(rollout)
    return rollouts
