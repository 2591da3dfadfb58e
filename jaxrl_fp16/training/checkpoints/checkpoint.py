"""Checkpoints of a whole training state, checked before they are used.

    checkpoints/
      100/                what is here was finished: folders get this name last
        state/            the arrays, written by orbax
        about.json        step, the leaves' dtypes and shapes, the caller's extra values, digests of the run's inputs
                          and of what is frozen
        config.yaml       the resolved config
        manifest.json     BLAKE2 of every other file
      200.partial/        a save that is under way, or was killed

Frozen parts of parameters, "base" beside "lora", are not written: their digest is, and they come from the template.

Orbax alone casts to the dtype it is asked for, takes an empty folder for a
checkpoint, and reads a flipped bit as a number; the table of leaves, the name
and the manifest are there for these three.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import concurrent.futures
import dataclasses
import json
import math
import os
from pathlib import Path
import shutil
from typing import Annotated, Any, Literal

from annotated_types import Ge
import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxrl_fp16.config import Doc
from jaxrl_fp16.training.checkpoints import manifest
from jaxrl_fp16.training.checkpoints.leaves import (
    abstract_leaf, describe_frozen, is_key, like_leaf, named_leaves, saved_and_frozen, table_of, target_of,
)

ABOUT, CONFIG, STATE = "about.json", "config.yaml", "state"


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or does not fit; one line."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: Annotated[int, Ge(0), Doc("steps between checkpoints; 0: one after the last step alone")] = 50
    keep: Annotated[int, Ge(1), Doc("newest checkpoints that are kept")] = 2
    best: Annotated[
        str | None, Doc("metric, e.g. eval/NAME/accuracy, whose best checkpoint is kept too; null: none")
    ] = None
    export: Annotated[Literal["latest", "best"], Doc("checkpoint that the command `export` takes")] = "latest"

    def __post_init__(self):
        if self.export == "best" and self.best is None:
            raise ValueError("export is 'best' and best is null; allowed: latest, or a metric as best")


class Checkpoints:
    """The checkpoints of one run. A context manager; leaving it waits for the save under way.

    Saving copies the state to the host, then writes in the background. An error there is
    raised by the next call, or on leaving.

    Args:
      folder: where they lie; made by the first save.
      config: how many stay.
      resolved: the run's config as YAML, kept inside each checkpoint.
      inputs: what JSON holds of the content that the run depends on, kept there too; `newest_about` gives it.
      say: takes a line for a person.
    """

    def __init__(self, folder: str | os.PathLike, config: CheckpointConfig = CheckpointConfig(), *,
                 resolved: str = "", inputs: Mapping[str, Any] | None = None, say: Callable[[str], None] = print):
        self.folder = Path(folder).absolute()
        self._config, self._resolved, self._inputs, self._say = config, resolved, inputs, say
        self._checkpointer = ocp.StandardCheckpointer()
        self._finisher = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        self._current: set[int] = set()         # steps that this object wrote or read
        self._damaged: set[int] = set()
        self._told: set[str] = set()            # unfinished folders that were reported

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.wait()
        except CheckpointError as failure:
            if error is None:
                raise
            self._say(str(failure))         # beside the error that is on its way
        finally:
            self._finisher.shutdown()
            self._checkpointer.close()

    def due(self, step: int) -> bool:
        """Whether the config wants a checkpoint after `step` iterations."""
        return self._config.every > 0 and step % self._config.every == 0

    def steps(self) -> list[int]:
        """The steps that have a finished checkpoint not known to be damaged, oldest first."""
        found = {int(path.name) for path in self.folder.glob("[0-9]*") if _is_finished(path)}
        return sorted(found - self._damaged)

    def is_empty(self) -> bool:
        """Whether no checkpoint was ever finished here: there is none, not even one that lost its manifest."""
        return not any(path.name.isdecimal() or path.suffix == ".damaged" for path in self.folder.glob("[0-9]*"))

    def best(self) -> int | None:
        """The step whose `config.best` is highest, the later of equals; None where none has one."""
        scores = {step: score for step in self.steps() if (score := self._score(step)) is not None}
        return max(scores, key=lambda step: (scores[step], step), default=None)

    def describe(self) -> str:
        """The newest checkpoint, for the line that a run ends with."""
        newest = max(self.steps(), default=None)
        return "there is no checkpoint yet" if newest is None else f"the last checkpoint is {self.folder / str(newest)}"

    def latest(self) -> int | None:
        """The newest of `steps()`, its content not yet verified; None without any."""
        self.wait()
        self._tell_unfinished()
        return max(self.steps(), default=None)

    def wait(self) -> None:
        """Returns when no save is under way; raises CheckpointError if it failed."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            raise self._failed(step, error) from error
        self._current.add(step)

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None,
             metrics: Mapping[str, Any] | None = None) -> bool:
        """Starts writing a checkpoint, once the one before is finished.

        Args:
          step: iterations done.
          state: a pytree of arrays, sharded or not; typed PRNG keys are arrays too. It may be
            donated as soon as this returns.
          extra: values that JSON holds, such as the position in the data.
          metrics: of that step; `config.best` is looked up in them.

        Returns:
          True; False, with a line that says so, if this object wrote or restored that step before.

        Raises:
          CheckpointError: this save or the one before could not be written, or a checkpoint of
            that step is there already, from a run that went further.
          ValueError: a leaf is no array, or `extra` is not JSON.
        """
        self.wait()
        if step in self._current:
            self._say(f"the checkpoint of step {step} is there already and stays as it is")
            return False
        if step in self.steps():
            raise CheckpointError(f"{self.folder / str(step)}: exists already; allowed: a new step or folder")
        leaves, frozen = saved_and_frozen(named_leaves(state))
        about = {"step": step, "leaves": table_of(leaves), "extra": extra or {}}
        if frozen:
            about["frozen"] = describe_frozen(frozen)
        if self._inputs is not None:
            about["inputs"] = self._inputs
        if (score := _finite((metrics or {}).get(self._config.best))) is not None:
            about["score"] = {self._config.best: score}
        try:
            about = json.dumps(about, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra: only JSON values are allowed in a checkpoint ({error})") from None
        arrays = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf
                  for name, leaf in leaves.items() if leaf.size}    # orbax takes no array without elements
        partial = self.folder / f"{step}.partial"
        try:
            if jax.process_index() == 0:
                self._begin(partial, about)
            self._checkpointer.save(partial / STATE, arrays)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)      # gives a full disk its room back
            raise self._failed(step, error) from error
        self._pending = step, self._finisher.submit(self._finish, step, partial)
        return True

    def restore(self, template: Any, step: int | None = None) -> tuple[Any, dict[str, Any], int]:
        """Reads the newest checkpoint whose files are as they were written, or the one of `step`.

        Args:
          template: a pytree like the saved one, of arrays or `jax.ShapeDtypeStruct`s, whose
            shardings the result gets: those of another mesh than the saved one's, if they are.

        Returns:
          `(state, extra, step)`; a frozen part of parameters is the template's own arrays.

        Raises:
          CheckpointError: there is none, names, shapes or dtypes of its leaves are not the template's, or what is
            frozen is not what it was saved beside.
          ValueError: what is frozen is a shape alone in the template.
        """
        _, frozen = saved_and_frozen(named_leaves(template))
        if name := next((name for name, leaf in frozen.items() if isinstance(leaf, jax.ShapeDtypeStruct)), None):
            raise ValueError(f"{name} is a shape alone; allowed: what is frozen as arrays, which the result will hold")
        self.wait()
        self._tell_unfinished()
        known = self.steps()
        for candidate in reversed(known) if step is None else [step] if step in known else []:
            path = self.folder / str(candidate)
            if not (problem := manifest.find_damage(path)):
                try:
                    found = self._read(path, template)
                except (ValueError, TypeError, LookupError) as error:      # what was written was no checkpoint of ours
                    problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                else:
                    self._current.add(candidate)
                    return *found, candidate
            self._damaged.add(candidate)
            self._say(f"{path}: damaged, {problem}; skipped")
        wanted = "" if step is None else f" of step {step}"
        others = ", ".join(map(str, self.steps())) or "none"
        raise CheckpointError(f"{self.folder}: no sound checkpoint{wanted}; steps that have one: {others}")

    def arrays(self, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """`(every array of a sound checkpoint by its dotted path, extra)`; keys as their data.

        Raises CheckpointError where there is none of that step.
        """
        self.wait()
        path = self.folder / str(step)
        table = json.loads((path / ABOUT).read_text(encoding="utf-8"))["leaves"] if step in self.steps() else {}
        state, extra, _ = self.restore({name: abstract_leaf(*entry) for name, entry in table.items()}, step)
        data = {name: jax.random.key_data(leaf) if is_key(leaf) else leaf for name, leaf in state.items()}
        return {name: np.asarray(leaf) for name, leaf in data.items()}, extra

    def holds(self, name: str) -> bool:
        """Whether the state of the newest sound checkpoint has arrays below `name`."""
        paths = (self.folder / str(step) for step in reversed(self.steps()))
        sound = next((path for path in paths if not manifest.find_damage(path)), None)
        if sound is None:
            return False
        about = json.loads((sound / ABOUT).read_text(encoding="utf-8"))
        return any(leaf.startswith(f"{name}.") for leaf in about["leaves"])

    def _begin(self, partial: Path, about: str) -> None:
        for leftover in self.folder.glob("*.partial"):      # of a process that was killed
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        (partial / ABOUT).write_text(about, encoding="utf-8")
        (partial / CONFIG).write_text(self._resolved, encoding="utf-8")

    def _finish(self, step: int, partial: Path) -> None:
        """Runs in the background: waits for orbax, seals the folder, names it, removes the oldest."""
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() != 0:
                return
            manifest.write_manifest(partial)
            final = self.folder / str(step)
            if final.exists():      # unfinished or damaged; `save` has refused to follow a sound one
                aside = final.with_suffix(".damaged")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(final, aside)
                self._damaged.discard(step)
            os.replace(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        best = self.best()
        for old in self.steps()[:-self._config.keep]:
            if old == best:
                continue
            doomed = self.folder / f"{old}.partial"         # what is half removed must not look finished
            os.replace(self.folder / str(old), doomed)
            shutil.rmtree(doomed)

    def _score(self, step: int) -> float | None:
        if self._config.best is None:
            return None
        try:
            about = json.loads((self.folder / str(step) / ABOUT).read_text(encoding="utf-8"))
            return _finite(about.get("score", {}).get(self._config.best))
        except (OSError, ValueError, AttributeError):   # damaged, which whoever reads it will be told
            return None

    def _tell_unfinished(self) -> None:
        for path in sorted(self.folder.glob("[0-9]*")):
            if not _is_finished(path) and path.suffix != ".damaged" and path.name not in self._told:
                self._told.add(path.name)
                self._say(f"{path}: not a finished checkpoint; skipped")

    def _read(self, path: Path, template: Any) -> tuple[Any, dict[str, Any]]:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        whole = named_leaves(template)
        leaves, frozen = saved_and_frozen(whole)
        _check_table(path, about["leaves"], table_of(leaves))
        if frozen:
            _check_frozen(path, about.get("frozen", {}), describe_frozen(frozen))
        targets = {name: target_of(leaf) for name, leaf in leaves.items() if leaf.size}
        arrays = self._checkpointer.restore(path / STATE, targets)
        restored = [leaf if name in frozen else like_leaf(leaf, arrays.get(name)) for name, leaf in whole.items()]
        return jax.tree.unflatten(jax.tree.structure(template), restored), about["extra"]

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return CheckpointError(f"checkpoint of step {step} could not be written ({reason}); {self.describe()}")


def newest_about(folder: str | os.PathLike) -> dict[str, Any]:
    """What the newest checkpoint of a folder says of itself (`about.json`), of those where that file is as it was
    written; {} where there is none. Reads no array."""
    finished = (path for path in Path(folder).glob("[0-9]*") if _is_finished(path))
    for path in sorted(finished, key=lambda path: int(path.name), reverse=True):
        if manifest.is_as_written(path, ABOUT):
            return json.loads((path / ABOUT).read_text(encoding="utf-8"))
    return {}


def _check_table(path: Path, saved: Mapping[str, list], wanted: Mapping[str, list]) -> None:
    def text(entry):
        return "nothing" if entry is None else f"{entry[0]}{entry[1]}"
    wrong = [f"{name} is {text(saved.get(name))}, wanted is {text(wanted.get(name))}"
             for name in {**saved, **wanted} if saved.get(name) != wanted.get(name)]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{path}: of another model or optimizer: {'; '.join(wrong[:3])}{more}")


def _check_frozen(path: Path, saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    wrong = [f"{key} {saved.get(key, 'none')}, here {found.get(key, 'none')}"
             for key in {**saved, **found} if saved.get(key) != found.get(key)]
    if wrong:
        raise CheckpointError(f"{path}: its adapters were trained beside other frozen weights: {'; '.join(wrong)}; "
                              "allowed: the same model folder in the same precision")


def _finite(value: Any) -> float | None:
    """A metric as a number that can be compared; None for NaN and for what is missing."""
    return float(value) if value is not None and math.isfinite(value) else None


def _is_finished(path: Path) -> bool:
    return path.name.isdecimal() and (path / manifest.NAME).is_file()
