"""Problems, and how they are read from JSONL files and Hub data sets."""

import dataclasses
import json
import os
from typing import Any, Iterable, Iterator, Mapping


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem with what is needed to grade an answer to it."""

    problem: str        # what the prompt asks
    answer: str         # the gold answer, as the data writes it
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the row, less answer and solution
    solution: str = ""  # a target text for supervised training; may be empty. Of a preference, the chosen response
    rejected: str | None = None  # the response that `solution` is preferred to; None: no preference
    messages: tuple[Mapping[str, str], ...] = ()  # a prompt of chat messages, which takes the template's place

    def for_reward(self) -> dict[str, Any]:
        """The plain dict that reward functions get."""
        return {**self.fields, "problem": self.problem, "answer": self.answer, "solution": self.solution}


def load_examples(path, problem_field: str = "problem", answer_field: str = "answer",
                  solution_field: str | None = None) -> list[Example]:
    """Examples of a UTF-8 JSONL file; blank lines are passed over.

    A `ValueError` names the file, and the line where one is at fault: no file, no row, not UTF-8, not a JSON
    object, a field that is absent or neither text nor a number.
    """
    names = _FieldNames(problem_field, answer_field, solution_field)
    return [_example(row, names, where) for where, row in read_rows(path)]


def load_hub_examples(hub: str, split: str, problem_field: str = "problem", answer_field: str = "answer",
                      solution_field: str | None = None) -> list[Example]:
    """The same for a Hugging Face Hub data set; needs the extra `hub`."""
    names = _FieldNames(problem_field, answer_field, solution_field)
    return [_example(row, names, where) for where, row in read_hub_rows(hub, split)]


def read_rows(path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`("FILE, line N", row)` of each JSON object of a UTF-8 JSONL file; its faults as in `load_examples`."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such data file")
    empty = True
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                empty, where = False, f"{path}, line {number}"
                yield where, _parse_row(line, where)
    if empty:
        raise ValueError(f"{path}: no rows; at least one JSON object is needed")


def read_hub_rows(hub: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The same for a Hugging Face Hub data set; needs the extra `hub`."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"task.hub is {hub!r}, and reading it needs the package `datasets`: "
                         "pip install 'jaxrl_fp16[hub]', or give task.path a JSONL file") from None
    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(hub, split=split)
    empty = True
    for number, row in enumerate(rows):
        empty = False
        yield f"{hub} ({split}), row {number}", row
    if empty:
        raise ValueError(f"{hub} ({split}): no rows")


@dataclasses.dataclass(frozen=True)
class _FieldNames:
    problem: str
    answer: str
    solution: str | None


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}; a JSON object is needed")
    return row


def _example(row: Mapping[str, Any], names: _FieldNames, where: str) -> Example:
    # The gold answer stays out of `fields`, so that no template can show it to the model.
    hidden = {names.answer, names.solution} - {names.problem}
    return Example(
        problem=_text(row, names.problem, where),
        answer=_text(row, names.answer, where),
        fields={name: value for name, value in row.items() if name not in hidden},
        solution=_text(row, names.solution, where) if names.solution else "",
    )


def field_of(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a field that must be there."""
    if name not in row:
        raise ValueError(f"{where}: no field {name!r}; the row has {', '.join(sorted(map(repr, row)))}")
    return row[name]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = field_of(row, name, where)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r} is a {type(value).__name__}; text or a number is needed")
    return value
