"""On a GPU: tests by pytest, their counts and the first line of each failure.

    python benchmarks/gpu/suite.py [--tests '-m gpu tests/models'] [--limit 300] [--name gpu_tests]

After `limit` seconds pytest is interrupted, and counts what has run until then. The exit code is pytest's. This process
itself asks for no device: the tests' processes have it.
"""

import argparse
from functools import partial
from pathlib import Path
import shlex
import signal
import subprocess
import sys
import tempfile
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parents[1]))

from record import ROOT, folder_of_results, machine, save, software  # noqa: E402  benchmarks are scripts, no package

COUNTS = ("tests", "failures", "errors", "skipped", "time")


def run(tests, limit, file):
    """`(exit code, whether it was interrupted)` of pytest with the words `tests`; it writes the JUnit `file`."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "--junit-xml", str(file)]
    # What a shell starts in the background ignores the signal, and its children with it.
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*command, *shlex.split(tests)], cwd=ROOT, preexec_fn=heeded) as process:
        try:
            return process.wait(limit), False
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            return process.wait(), True


def rows_of(file):
    """The counts, and a row a test that did not pass."""
    root = ElementTree.parse(file).getroot()
    suite = root if root.tag == "testsuite" else root[0]
    yield {key: suite.get(key) for key in COUNTS}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                yield {"test": f"{case.get('classname')}::{case.get('name')}",
                       kind: (found.get("message") or "")[:300]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tests", default="-m gpu tests/models", help="flags and paths for pytest")
    parser.add_argument("--limit", type=float, default=300, help="seconds")
    parser.add_argument("--name", default="gpu_tests", help="of the result")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        code, interrupted = run(given.tests, given.limit, file)
        counts, *failures = rows_of(file) if file.exists() else [{"error": "pytest wrote no JUnit file"}]
    if interrupted:
        counts["error"] = f"interrupted after {given.limit:.0f} s"
    rows = [{"what": given.tests, "exit": code, **counts}, *failures]
    save(given.name, rows, {**machine(), **software()}, folder_of_results())
    return code


if __name__ == "__main__":
    sys.exit(main())
