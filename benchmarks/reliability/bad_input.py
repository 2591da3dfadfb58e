"""Bad input: every case as a command of its own. Is it refused at once, in one line, with nothing written?

    JAX_PLATFORMS=cpu python benchmarks/reliability/bad_input.py [--rows 3 8]

Each case of `bad_input_cases.py` runs as `python -m jaxrl_fp16.cli ...` in a folder of its own: exit code 2, nothing on
stdout, one line on stderr that says what the case asks for, no file written or changed, in under ten seconds. Exits 1
where one falls short.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path
import resource
import shutil
import subprocess
import sys
import tempfile
import time

sys.path.append(str(Path(__file__).resolve().parents[1]))

from bad_input_cases import CASES  # noqa: E402
from record import record  # noqa: E402
from sound_input import lay_out  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0  # within which a refusal must come


def snapshot(folder):
    """Every file below a folder, with its size and time of change."""
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}


def command_of(case):
    """The command line of a case."""
    if case.backend is None:
        return [sys.executable, "-m", "jaxrl_fp16.cli", *case.argv]
    code = (f"import sys, jax; jax.default_backend = lambda: {case.backend!r}; "
            "from jaxrl_fp16.cli import main; sys.exit(main(sys.argv[1:]))")
    return [sys.executable, "-c", code, *case.argv]


@contextlib.contextmanager
def prepared(case, sound, folder):
    """Copies what `lay_out` wrote into `folder` and spoils it; another writer holds a folder meanwhile if asked for."""
    from jaxrl_fp16.training.safety.folder_lock import only_writer

    shutil.copytree(sound, folder, dirs_exist_ok=True)
    if case.build is not None:
        case.build(folder)
    with only_writer(folder / case.held) if case.held else contextlib.nullcontext():
        yield


def faults(case, code, out, error):
    """What is not as it must be, as a list of texts."""
    wrong = {
        f"exit code {code}": code != 2,
        f"{error.count(chr(10))} lines on stderr": not error.endswith("\n") or error.count("\n") != 1,
        "another line": not error.startswith("jaxrl-fp16: ") or case.says not in error,
        "something on stdout": out != "",
    }
    return [text for text, is_so in wrong.items() if is_so]


def cpu_seconds():
    """Of the processes that were waited for."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def run_alone(case, sound, folder):
    """Runs one case as a process of its own; gives its row of the table."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **case.environment}
    with prepared(case, sound, folder):
        before, began, spent = snapshot(folder), time.perf_counter(), cpu_seconds()
        done = subprocess.run(command_of(case), cwd=folder, env=environment, capture_output=True, text=True)
        seconds, spent = time.perf_counter() - began, cpu_seconds() - spent
        wrong = faults(case, done.returncode, done.stdout, done.stderr)
    wrong += ["something written"] if snapshot(folder) != before else []
    wrong += [f"took {seconds:.1f} s"] if seconds >= SECONDS else []
    return {"row": case.row, "case": case.name, "seconds": round(seconds, 2), "cpu_seconds": round(spent, 2),
            "wrong": ", ".join(wrong), "line": done.stderr.strip()[-500:]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", help="of the table of faults; default: all")
    parser.add_argument("--name", default="reliability_bad_input", help="of the file of results")
    given = parser.parse_args()
    cases = [case for case in CASES if given.rows is None or case.row in given.rows]
    with tempfile.TemporaryDirectory() as work:
        sound = Path(work) / "sound"
        sound.mkdir()
        lay_out(sound)
        rows = []
        for number, case in enumerate(cases):
            rows.append(run_alone(case, sound, Path(work) / str(number)))
            print(f"{number + 1}/{len(cases)} {case.row} {case.name}: {rows[-1]['wrong'] or 'refused'}", flush=True)
    failed = [row for row in rows if row["wrong"]]
    facts = {"cases": len(rows), "failed": len(failed), "slowest_seconds": max(row["seconds"] for row in rows),
             "slowest_cpu_seconds": max(row["cpu_seconds"] for row in rows), "bound_seconds": SECONDS}
    print(record(given.name, rows, facts))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
