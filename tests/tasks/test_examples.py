"""Reading problems: good rows, and each fault with its line."""

import builtins
import json

import pytest

from jaxrl_fp16.tasks import Example, load_examples, load_hub_examples


def write(path, *lines):
    raw = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    path.write_bytes(b"\n".join(raw))
    return path


def test_rows_become_examples(tmp_path):
    path = write(tmp_path / "data.jsonl",
                 {"question": "1+1?", "target": 2, "level": "easy", "why": "because"}, b"",
                 {"question": "é?", "target": "x", "why": ""})
    first, second = load_examples(path, "question", "target", "why")
    assert first == Example("1+1?", "2", {"question": "1+1?", "level": "easy"}, "because")
    assert second.problem == "é?" and second.solution == ""
    assert first.for_reward() == {"question": "1+1?", "level": "easy", "problem": "1+1?", "answer": "2",
                                  "solution": "because"}


@pytest.mark.parametrize("lines, message", [
    ((), "no rows"),
    ((b"  ", b""), "no rows"),
    (({"problem": "p", "answer": "a"}, b"{not json"), r"data\.jsonl, line 2: not JSON"),
    ((b"\xff\xfe",), r"line 1: not UTF-8"),
    ((["problem"],), r"line 1: a JSON list; a JSON object is needed"),
    (({"problem": "p"},), r"line 1: no field 'answer'; the row has 'problem'"),
    (({"problem": "p", "answer": None},), r"line 1: field 'answer' is a NoneType"),
    (({"problem": "p", "answer": True},), r"field 'answer' is a bool"),
    ((b"[" * 100_000,), r"line 1: not JSON"),
])
def test_faults_name_file_and_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path / "data.jsonl", *lines))


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent.jsonl: no such data file"):
        load_examples(tmp_path / "absent.jsonl")


def test_the_hub_without_its_extra_is_refused(monkeypatch):
    real_import = builtins.__import__

    def without_datasets(name, *arguments, **keywords):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(ValueError, match=r"task.hub is 'some/set'.*jaxrl_fp16\[hub\]"):
        load_hub_examples("some/set", "train")
