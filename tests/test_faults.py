"""Every row of the table of faults in docs/reliability.md has a test that injects it."""

import ast
import importlib
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = [*range(1, 33), 36, 37]


def marked_rows():
    """Row -> the tests with `@pytest.mark.fault(row)`, read from the files without importing them."""
    found = {}
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                (row,) = node.args
                if isinstance(row, ast.Constant):
                    found.setdefault(row.value, []).append(f"{path.relative_to(TESTS)}, line {node.lineno}")
    return found


def table_rows(monkeypatch):
    """The rows of the table of bad input, which test_refusals.py marks case by case."""
    folder = TESTS.parent / "benchmarks" / "reliability"
    monkeypatch.syspath_prepend(folder)
    return {case.row for case in importlib.import_module("bad_input_cases").CASES}


def test_every_row_has_a_test(monkeypatch):
    covered = set(marked_rows()) | table_rows(monkeypatch)
    assert covered <= set(ROWS), f"rows that the table has not: {sorted(covered - set(ROWS))}"
    missing = set(ROWS) - covered
    assert not missing, f"rows without a test: {sorted(missing)}"
