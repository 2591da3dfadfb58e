"""Reading problems: good rows, and each fault with its line."""

import builtins
import json

import pytest

from jaxrl_fp16.tasks import Example, load_examples, load_hub_examples
from jaxrl_fp16.tasks.grading.answers import gold_answers


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
    (({"problem": float("nan"), "answer": "a"},), r"line 1: field 'problem' is nan; text or a finite number is needed"),
    (({"problem": "p", "answer": "a"}, {"problem": "p", "answer": float("inf")}), r"line 2: field 'answer' is inf"),
    ((b'{"problem": "p", "answer": -1e999}',), r"line 1: field 'answer' is -inf"),
    (({"problem": "p", "answer": [1, float("nan")]},), r"line 1: field 'answer' is nan"),
    (({"problem": "p", "answer": ""},), r"line 1: field 'answer' is '', no answer to grade by; allowed: text, a num"),
    (({"problem": "p", "answer": " \n\t"},), r"line 1: field 'answer' is .* no answer to grade by"),
    (({"problem": "p", "answer": []},), r"line 1: field 'answer' is '\[\]', no answer to grade by"),
    (({"problem": "p", "answer": ["2", " "]},), r"line 1: field 'answer' is .*, no answer to grade by"),
    (({"problem": "p", "answer": "['2', '']"},), r"line 1: field 'answer' is .*, no answer to grade by"),
    (({"problem": "p", "answer": "6 pens.\n#### "},), r"line 1: field 'answer' is .*, no answer to grade by"),
    (({"problem": "p", "answer": [["2"]]},), r"line 1: field 'answer' is a list; text or a number is needed"),
    (({"problem": "p", "answer": {"a": 1}},), r"line 1: field 'answer' is a dict; text or a number is needed"),
    (({"problem": [], "answer": "a"},), r"line 1: field 'problem' is an empty list; allowed: one message or more"),
    (({"problem": ["p"], "answer": "a"},), r"line 1: field 'problem', message 1 is a str; allowed: an object with"),
    (({"problem": [{"role": "assistant", "content": "p"}], "answer": "a"},), r"prompt ends with a message of the assi"),
    (({"problem": "p", "answer": "a"}, {"problem": [{"role": "user", "content": "p"}], "answer": "a"}),
     r"line 2: the prompts before are text, this one is messages; allowed: one kind"),
])
def test_faults_name_file_and_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        load_examples(write(tmp_path / "data.jsonl", *lines))


@pytest.mark.parametrize("answer, golds", [
    ("She has 3+4=<<3+4=7>>7 pens.\n#### 7", ("7",)), ("#### 1,000", ("1,000",)), (["2", "-2"], ("2", "-2")),
    ([2, 0.5], ("2", "0.5")), (["it's", '"x"'], ("it's", '"x"')), (["\\frac{1}{2}"], ("\\frac{1}{2}",)),
    (10**400, (str(10**400),)), (0, ("0",)), ("['2', '-2']", ("2", "-2")),
])
def test_the_answers_that_a_row_accepts(tmp_path, answer, golds):
    (example,) = load_examples(write(tmp_path / "data.jsonl", {"problem": "p", "answer": answer}))
    assert gold_answers(example.answer) == golds


def test_an_empty_answer_passes_where_none_is_graded(tmp_path):
    (example,) = load_examples(write(tmp_path / "data.jsonl", {"problem": "p", "answer": ""}), answered=False)
    assert example.answer == ""


def test_chat_messages_and_dotted_names(tmp_path):
    """Rows as verl and TRL have them."""
    asked = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "1+1?", "name": None}]
    path = write(tmp_path / "data.jsonl", {"prompt": asked, "reward_model": {"style": "rule", "ground_truth": 2}})
    (example,) = load_examples(path, "prompt", "reward_model.ground_truth")
    assert (example.problem, example.answer) == ("1+1?", "2")
    assert list(example.messages) == [asked[0], {"role": "user", "content": "1+1?"}]
    assert example.fields == {"prompt": asked, "reward_model": {"style": "rule"}}  # the gold is not among them


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
