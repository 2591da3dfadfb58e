"""Results of benchmarks: a table on the console, and the same numbers with what they depend on as JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
from pathlib import Path
import platform
import subprocess

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")


def record(name, rows, facts=None, folder=ROOT / "benchmarks" / "results"):
    """Writes `results/NAME.json` and prints `rows`, a list of flat dicts; returns the file's path.

    facts: plain values that describe the run, beside date, device, versions, flags and commit.
    """
    path = save(name, rows, {**circumstances(), **(facts or {})}, folder)
    print_table(name, rows)
    return path


def save(name, rows, facts, folder=ROOT / "benchmarks" / "results"):
    """Writes `NAME.json` in one piece, so that a kill leaves the old one or the new; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"name": name, **facts, "rows": rows}, indent=2) + "\n")
    temporary.replace(path)
    return path


def folder_of_results():
    """The folder that OUT names, or benchmarks/results."""
    return Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")


def print_table(title, rows):
    """One line a row, one column a key, in the order in which keys first appear."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(_text(row.get(column, "")) for column in columns))
    Console(width=160).print(table)


def _text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def circumstances():
    """What a measurement in this process depends on."""
    import jax

    device = jax.devices()[0]
    return {
        **machine(),
        "device": f"{device.platform}: {device.device_kind}",
        **software(),
    }


def software():
    """Versions and flags; asks no device."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def machine():
    """Date, host and commit; asks no device, which may be another process's."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "commit": _commit() or os.environ.get("COMMIT"),
    }


def _processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    """The commit, with a `+` where tracked files differ from it; None outside of a repository: COMMIT may name it."""
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, text=True, capture_output=True)

    head = git("rev-parse", "--short", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return head.stdout.strip() + ("+" if changed else "") if head.returncode == 0 else None


__all__ = ["circumstances", "folder_of_results", "machine", "print_table", "record", "save", "software"]
