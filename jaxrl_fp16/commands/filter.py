"""`filter`: a model's accuracy on every problem of a task, and the problems that it solves sometimes.

The paper's perfectible set (2510.26788): those with an accuracy between 0.2 and 0.8
in 40 samples, which a model can learn to solve all of.
"""

import contextlib
import dataclasses
from functools import partial
import json
from pathlib import Path
import signal

import jax
import numpy as np

from jaxrl_fp16.config import ConfigError, naming
from jaxrl_fp16.console import Console
from jaxrl_fp16.lab.report import draw_accuracies, histogram
from jaxrl_fp16.training.rollouts.collect import truncation_rule
from jaxrl_fp16.training.rollouts.evaluate import grade_chunks, make_evaluator
from jaxrl_fp16.training.runs.inputs import check_inputs, inputs_of
from jaxrl_fp16.training.runs.run import open_folder
from jaxrl_fp16.training.runs.positions import check_positions
from jaxrl_fp16.training.runs.run_folder import check_resumed, write_record
from jaxrl_fp16.training.runs.setup import opened, set_up
from jaxrl_fp16.training.safety.deadlines import Interrupted, caught_signals

ACCURACY, FILTERED = "accuracy.jsonl", "filtered.jsonl"
LINE = (("accuracy", "accuracy", ".3f"), ("between the bounds", "between", ".3f"))


@dataclasses.dataclass(frozen=True)
class Filtered:
    """How a filter run ended."""

    folder: Path
    code: int       # 0, or 128 + the signal that ended it
    kept: int       # problems between the bounds
    measured: int


def run_filter(config):
    """Measures and keeps, as `filter_problems`, and shows the histogram."""
    outcome = filter_problems(config)
    if outcome.code == 0:
        _show(outcome, config.filter)
    return outcome.code


def filter_problems(config):
    """Measures `task.train` problem by problem and writes those between the bounds. Raises ConfigError.

    `accuracy.jsonl` grows by a chunk of problems at a time; `resume` continues after its last
    whole chunk with the samples that a run without a stop would have drawn.
    """
    if not config.sampling.temperature:
        raise ConfigError("sampling.temperature is 0; allowed: above 0, as all samples of a problem would be one")
    setup = set_up(config, "filter")
    config = setup.config
    if config.resume is not None:
        check_resumed(config, config.resume, "filter")
    with contextlib.ExitStack() as stack:
        bench, inputs = stack.enter_context(opened(setup)), inputs_of(config)
        if config.resume is not None:
            check_inputs(config.resume, inputs)
        task = bench.task
        check_positions(config, "filter", bench.model.config.max_positions)
        sampling = dataclasses.replace(config.sampling, group_size=config.filter.samples, max_rows=0)
        with naming("filter"):
            evaluator = make_evaluator(bench, "filter", dataclasses.replace(task, heldout=task.train), sampling)
        params = bench.load_params()
        folder = stack.enter_context(open_folder(config))
        write_record(setup, folder, "filter", inputs)
        signals = stack.enter_context(caught_signals())
        found = _measure(config, evaluator, setup, params, setup.keys.evaluation, folder, signals)
        if signals.received is not None:
            Console().say(f"stopped by {signal.Signals(signals.received).name} after {len(found)} of "
                          f"{len(task.train)} problems; --resume {folder} continues it")
            return Filtered(folder, 128 + signals.received, 0, len(found))
        kept = [row for row in zip(task.train, found, strict=True) if _between(config.filter, row[1])]
        if jax.process_index() == 0:
            _write_filtered(config, kept, folder)
    return Filtered(folder, 0, len(kept), len(found))


def _measure(config, evaluator, setup, params, key, folder, signals):
    """Accuracy of each problem, or None where nothing is known; as far as no signal came."""
    total, at_once = len(evaluator.task.heldout), evaluator.prompts_at_once
    found = _read_accuracies(folder, at_once, total)
    console = Console(steps=total, line=LINE, quiet=jax.process_index() != 0)
    with console, open(folder / ACCURACY, "a", encoding="utf-8") as file:
        length, watch = config.training.max_prompt_tokens, partial(_watch, console, signals)
        chunks = grade_chunks(evaluator, params, setup, length, key, len(found), watch)
        for kept, graded in _up_to_a_signal(chunks) if len(found) < total else ():
            chunk = _accuracies(config.training.truncated, kept, graded)
            if jax.process_index() == 0:
                file.writelines(json.dumps(_row(len(found) + place, value)) + "\n" for place, value in enumerate(chunk))
                file.flush()
            found += chunk
            known = [value for value in found if value is not None]
            console.progress(len(found), {"accuracy": np.mean(known or [0.0]), "between": np.mean(
                [_between(config.filter, value) for value in found])})
            if signals.received is not None:
                break
    return found


def _watch(console, signals, sampled):
    """Says how far a chunk is, and ends it once a signal came: what is written are whole chunks."""
    console.status(f"sampling: {sampled}")
    if signals.received is not None:
        raise Interrupted


def _up_to_a_signal(chunks):
    with contextlib.suppress(Interrupted):
        yield from chunks


def _accuracies(rule, kept, graded):
    """A float for each problem of a chunk: the mean reward of its samples whose reward is known, or None."""
    valid = graded.rewards.valid
    rewards = truncation_rule(rule, graded)[0].reshape(valid.shape)
    counts = valid.sum(axis=1) * np.pad(kept, (0, len(valid) - len(kept)))
    means = np.where(valid, rewards, 0.0).sum(axis=1) / np.maximum(counts, 1)
    return [float(mean) if count else None for mean, count in zip(means[: len(kept)], counts)]


def _row(index, accuracy):
    return {"index": index, "accuracy": accuracy}


def _between(bounds, accuracy):
    return accuracy is not None and bounds.low <= accuracy <= bounds.high


def _read_accuracies(folder, at_once, total):
    """What an earlier run measured, cut back to whole chunks in the file too: a kill may have left part of a line."""
    path = folder / ACCURACY
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is no line
    whole = len(lines) if len(lines) >= total else len(lines) // at_once * at_once
    path.write_bytes(b"".join(line + b"\n" for line in lines[:whole]))
    return [json.loads(line)["accuracy"] for line in lines[:whole]]


def _write_filtered(config, kept, folder):
    """The kept problems as JSONL, as `task.path` reads them with the same field names."""
    names, path = config.task, Path(config.filter.output or folder / FILTERED)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for example, accuracy in kept:
            asked = list(example.messages) or example.problem
            row = {**example.fields, names.problem_field: asked, names.answer_field: example.answer}
            row |= {names.solution_field or "solution": example.solution} if example.solution else {}
            file.write(json.dumps({**row, "accuracy": accuracy}, ensure_ascii=False) + "\n")


def read_accuracies(folder):
    """Accuracies of a finished filter run, those that are known, as float64 [n]."""
    with open(Path(folder) / ACCURACY, encoding="utf-8") as lines:
        values = [json.loads(line)["accuracy"] for line in lines]
    return np.array([value for value in values if value is not None], float)


def _show(outcome, bounds):
    console, accuracies = Console(), read_accuracies(outcome.folder)
    console.table("accuracy of the model on each problem", ("accuracy", "problems"), histogram(accuracies))
    path = bounds.output or outcome.folder / FILTERED
    console.say(f"{outcome.kept} of {outcome.measured} problems lie between {bounds.low:g} and {bounds.high:g}: {path}")
    console.say(f"picture: {draw_accuracies(outcome.folder, accuracies, bounds.low, bounds.high)}")
