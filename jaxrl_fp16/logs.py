"""What a run keeps: metrics.jsonl, samples.jsonl, TensorBoard, W&B; and its console.

`metrics.jsonl` and `samples.jsonl` hold one JSON object a line, each with `step`.
JSON has no NaN: a number that is not finite is written as the text "NaN",
"Infinity" or "-Infinity", which `float` reads back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
from pathlib import Path
import secrets
from typing import Annotated, Any

from annotated_types import Ge

from jaxrl_fp16.config import Doc
from jaxrl_fp16.console import Console

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
WANDB_ID = "wandb_id"   # the file of a run folder that holds its id in W&B: a resumed run goes on there


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    every: Annotated[
        int | None, Ge(1),
        Doc("steps between console lines where the output is no terminal; null: a line each half minute"),
    ] = None
    samples: Annotated[int, Ge(0), Doc("rollouts of each step that samples.jsonl keeps; 0: none")] = 4
    tensorboard: Annotated[bool, Doc("write TensorBoard events into the run folder")] = True
    wandb: Annotated[bool, Doc("log to Weights & Biases; needs the extra `wandb`")] = False
    wandb_project: Annotated[str, Doc("project in Weights & Biases")] = "jaxrl_fp16"

    def __post_init__(self):
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise ValueError("wandb: true needs the package wandb, which is not installed; allowed: false, "
                             "or pip install 'jaxrl_fp16[wandb]'")


class RunLog(Console):
    """Everything that a run writes, except checkpoints. A context manager.

    Console, TensorBoard and W&B may fail (a closed pipe, a network that is gone): one line
    says so and the run goes on without them. A failure to write the JSONL files raises.

    Args:
      folder: of the run, made if absent; None for a console alone.
      config: what to write.
      resumed: the step that a resumed run starts from, None for a new one; TensorBoard hides
        what an earlier process wrote after it.
      primary: whether this process writes at all; one of a multi-process run does.
      facts: plain values that W&B keeps beside the metrics, such as the resolved config.
      console: `steps`, `line` and what else `Console` takes.
    """

    def __init__(self, folder: str | os.PathLike | None, config: LoggingConfig, *, resumed: int | None = None,
                 primary: bool = True, facts: Mapping[str, Any] | None = None, **console):
        super().__init__(every=config.every, quiet=not primary, **console)
        self.folder = Path(folder) if folder is not None and primary else None
        self._config, self._resumed, self._facts = config, resumed, facts
        self._sinks: dict[str, tuple[Callable, Callable]] = {}      # name -> (write(step, numbers), close())
        self._files = contextlib.ExitStack()

    def __enter__(self) -> RunLog:
        if self.folder is None:
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._samples = (self._open(name) for name in (METRICS, SAMPLES))
        if self._config.tensorboard:
            with self._guarded_sink("tensorboard"):
                self._sinks["tensorboard"] = _open_tensorboard(self.folder, self._resumed)
        if self._config.wandb:
            with self._guarded_sink("wandb"):
                self._sinks["wandb"] = _open_wandb(self.folder, self._config.wandb_project, self._facts)
        return self

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for name, (_, close) in self._sinks.items():
            with self._guarded_sink(name):
                close()
        self._files.close()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One step's metrics, to all outputs.

        Args:
          step: iterations done, this one included.
          values: scalars (Python's, NumPy's or JAX's), text, or lists of them; text and
            lists reach the JSONL file only.

        Raises:
          OSError: `metrics.jsonl` cannot be written.
          ValueError: a value is none of these.
        """
        record = plain(values, "metrics")
        if self.folder is not None:
            self._metrics.write(json.dumps({"step": int(step), **record}, allow_nan=False) + "\n")
        read = {key: _unquoted(value) for key, value in record.items()}
        numbers = {key: float(value) for key, value in read.items() if isinstance(value, (int, float))}
        for name, (write, _) in list(self._sinks.items()):
            with self._guarded_sink(name):
                write(step, numbers)
        self.progress(step, numbers)

    def samples(self, step: int, records: Iterable[Mapping[str, Any]]) -> None:
        """Some rollouts of a step, as mappings of text and scalars; the first `config.samples` are kept."""
        if self.folder is None:
            return
        for _, record in zip(range(self._config.samples), records):
            values = {"step": int(step), **plain(record, "samples")}
            self._samples.write(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")

    def _open(self, name: str):
        # Line by line: a run that is killed leaves at most one part of a line.
        file = open(self.folder / name, "a", encoding="utf-8", errors="replace", buffering=1)
        return self._files.enter_context(file)

    @contextlib.contextmanager
    def _guarded_sink(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:      # no error of a sink may end the run
            self._sinks = {other: sink for other, sink in self._sinks.items() if other != name}
            reason = f"{type(error).__name__}: {error}"
            self.say(f"warning: {name} failed and is dropped, {METRICS} goes on ({reason})")


def _open_tensorboard(folder: Path, resumed: int | None):
    import tensorboardX
    purge = None if resumed is None else resumed + 1
    writer = tensorboardX.SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def write(step, numbers):
        for key, value in numbers.items():
            if math.isfinite(value):        # a plot has no place for the rest, and the writer warns of each
                writer.add_scalar(key, value, step)
    return write, writer.close


def _open_wandb(folder: Path, project: str, facts: Mapping[str, Any] | None):
    import wandb
    kept = folder / WANDB_ID
    if not kept.is_file():
        kept.write_text(secrets.token_hex(4), encoding="utf-8")
    # "allow": a run of that id goes on, where there is one; else it begins.
    run = wandb.init(project=project, name=folder.name, dir=str(folder), config=dict(facts or {}),
                     id=kept.read_text(encoding="utf-8").strip(), resume="allow")
    return lambda step, numbers: run.log(dict(numbers), step=step), run.finish


def plain(value: Any, key: str = "value") -> Any:
    """A value as strict JSON has it: what is not finite as text. `key` names it in a ValueError."""
    if isinstance(value, Mapping):
        return {name: plain(item, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, key) for item in value]
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:      # a scalar of NumPy or JAX
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)        # the text NaN, Infinity or -Infinity
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{key}: {type(value).__name__} is not allowed; allowed: scalar, text, or list of them")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """A JSON file of mappings, lists and scalars; what is not finite as in `metrics.jsonl`."""
    text = json.dumps(plain(value, Path(path).name), indent=2, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def _unquoted(value: Any) -> Any:
    """The float behind a text that `plain` made of one that is not finite; anything else as it is."""
    return float(value) if isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity") else value


def truncate(folder: str | os.PathLike, step: int) -> None:
    """Cuts a run's JSONL files back to the steps up to `step`, each file in one atomic replacement."""
    for path in (Path(folder) / METRICS, Path(folder) / SAMPLES):
        if not path.exists():
            continue
        temporary = path.with_suffix(".tmp")
        with open(path, "rb") as old, open(temporary, "wb") as new:
            new.writelines(line.rstrip(b"\n") + b"\n" for line in old if _step_of(line) <= step)
            new.flush()
            os.fsync(new.fileno())
        os.replace(temporary, path)


def _step_of(line: bytes) -> float:
    """The step of a JSON line; infinite for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, with the numbers that are not finite as floats again.

    A last line without its end, as a run that lives or was killed may leave it, is passed over.
    """
    with open(Path(folder) / METRICS, encoding="utf-8") as lines:
        whole = (line for line in lines if line.endswith("\n"))
        return [{key: _unquoted(value) for key, value in json.loads(line).items()} for line in whole]
