"""Reading preferences: each form of a row, each fault with its line; and the generated ones."""

import dataclasses
import json
import re

import pytest

from jaxrl_fp16.tasks import (
    ArithmeticConfig, PreferenceFields, TaskConfig, get_template, load_preferences, open_task, render,
)
from jaxrl_fp16.tasks.arithmetic import KINDS, generator, reward
from jaxrl_fp16.tasks.generated import train_problems
from jaxrl_fp16.tokenizer import character_tokenizer


def say(role, content):
    return {"role": role, "content": content}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


ASKED = [say("system", "Brief."), say("user", "1+1?")]
TWO, THREE = [say("assistant", "2")], [say("assistant", "3")]


def test_rows_of_text(tmp_path):
    path = write(tmp_path / "data.jsonl", {"q": "1+1?", "good": "2", "bad": "3", "level": 1, "answer": 2}, "",
                 {"q": "é?", "good": "", "bad": "x"})
    first, second = load_preferences(path, PreferenceFields("q", "good", "bad"))
    assert (first.problem, first.solution, first.rejected, first.answer) == ("1+1?", "2", "3", "2")
    assert first.fields == {"q": "1+1?", "level": 1} and first.messages == ()
    assert (second.problem, second.solution, second.rejected, second.answer) == ("é?", "", "x", "")


@pytest.mark.parametrize("row", [
    {"prompt": ASKED, "chosen": TWO, "rejected": THREE},
    {"prompt": ASKED, "chosen": "2", "rejected": "3"},
    {"prompt": ASKED, "chosen": "2", "rejected": THREE},
    {"chosen": ASKED + TWO, "rejected": ASKED + THREE},
    {"prompt": None, "chosen": ASKED + TWO, "rejected": ASKED + THREE},
    {"prompt": "1+1?", "chosen": ASKED + TWO, "rejected": ASKED + THREE},
    {"prompt": ASKED, "chosen": ASKED + TWO, "rejected": ASKED + THREE},
], ids=["responses as messages", "as text", "mixed", "conversations", "null", "with the text", "with the messages"])
def test_rows_of_messages_are_one(tmp_path, row):
    (example,) = load_preferences(write(tmp_path / "data.jsonl", row))
    assert list(example.messages) == ASKED and example.problem == "1+1?"
    assert (example.solution, example.rejected) == ("2", "3")


def test_a_prompt_of_text_with_responses_as_messages(tmp_path):
    (example,) = load_preferences(write(tmp_path / "d.jsonl", {"prompt": "1+1?", "chosen": TWO, "rejected": THREE}))
    assert (example.problem, example.messages, example.solution, example.rejected) == ("1+1?", (), "2", "3")


def test_dotted_names_and_fields_that_say_nothing(tmp_path):
    row = {"pair": {"good": [{**TWO[0], "tool_calls": None}], "bad": THREE, "gold": [2, "two"]}, "asked": ASKED}
    fields = PreferenceFields("asked", "pair.good", "pair.bad", "pair.gold")
    (example,) = load_preferences(write(tmp_path / "data.jsonl", row), fields)
    assert (example.solution, example.rejected, example.answer) == ("2", "3", "['2', 'two']")
    assert example.fields == {"pair": {}, "asked": ASKED}


def test_what_a_prompt_says_beside_its_text_is_kept(tmp_path):
    asked = [{**ASKED[1], "name": "Ada"}]
    (example,) = load_preferences(write(tmp_path / "d.jsonl", {"prompt": asked, "chosen": TWO, "rejected": THREE}))
    assert list(example.messages) == asked


def test_equal_responses_leave_the_prompt_whole(tmp_path):
    (example,) = load_preferences(write(tmp_path / "d.jsonl", {"chosen": ASKED + TWO, "rejected": ASKED + TWO}))
    assert list(example.messages) == ASKED and example.solution == example.rejected == "2"


TEXT = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.mark.parametrize("row, message", [
    ("{not json", "line 2: not JSON"),
    ({"prompt": "p", "chosen": "c"}, "line 2: no field 'rejected'; the row has 'chosen', 'prompt'"),
    ({"chosen": "c", "rejected": "r"}, "line 2: no field 'prompt'; the row has 'chosen', 'rejected'"),
    ({**TEXT, "prompt": None}, "line 2: field 'prompt' is null; allowed: text or messages"),
    ({**TEXT, "chosen": 3}, "line 2: field 'chosen' is a int; allowed: text, or a list of messages"),
    ({**TEXT, "chosen": []}, "line 2: field 'chosen' is an empty list; allowed: one message or more"),
    ({**TEXT, "chosen": ["c"]}, "line 2: field 'chosen', message 1 is a str; allowed: an object with role and content"),
    ({**TEXT, "chosen": [say("bot", "c")]},
     "field 'chosen', message 1 has the role 'bot'; allowed: system, user, assistant, tool"),
    ({**TEXT, "chosen": [say("assistant", None)]},
     "field 'chosen', message 1 has a NoneType for content; allowed: text"),
    ({"chosen": ASKED + TWO, "rejected": [say("user", "2+2?")] + THREE},
     "line 2: no field 'prompt', and 'chosen' and 'rejected' do not start with the same messages; allowed: a prompt"),
    ({"prompt": "2+2?", "chosen": ASKED + TWO, "rejected": ASKED + THREE},
     "line 2: the prompt is not what chosen and rejected start with; allowed: the same messages, the text of one"),
    ({"prompt": ASKED, "chosen": TWO + ASKED, "rejected": THREE},
     "field 'chosen' has messages by assistant, system, user after the prompt; allowed: one, by assistant"),
    ({"chosen": ASKED + [say("user", "2")], "rejected": ASKED + THREE}, "'chosen' has messages by user after the"),
    ({"prompt": ASKED + TWO, "chosen": "c", "rejected": "r"},
     "line 2: the prompt ends with a message of the assistant; allowed: user, tool, system"),
    ({"prompt": ASKED, "chosen": [{**TWO[0], "reasoning_content": "1 and 1"}], "rejected": THREE},
     "line 2: the response in field 'chosen' has reasoning_content beside its content, which a response cannot hold"),
    ({"chosen": ASKED + TWO, "rejected": ASKED + [{**THREE[0], "tool_calls": [{"id": 1}], "name": "x"}]},
     "line 2: the response in field 'rejected' has tool_calls, name beside its content"),
    ({**TEXT, "answer": float("nan")}, "line 2: field 'answer' is nan; text or a finite number is needed"),
    ({"prompt": ASKED, "chosen": "c", "rejected": "r"},
     "line 2: the prompts before are text, this one is messages; allowed: one kind"),
])
def test_faults_name_file_and_line(tmp_path, row, message):
    with pytest.raises(ValueError, match="data.jsonl.*" + re.escape(message)):
        load_preferences(write(tmp_path / "data.jsonl", TEXT, row))


def test_absent_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="absent.jsonl: no such data file"):
        load_preferences(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="no rows; at least one JSON object is needed"):
        load_preferences(write(tmp_path / "empty.jsonl"))


# -- as a task --------------------------------------------------------------------------------------------


def test_messages_go_through_the_chat_template(tmp_path):
    pytest.importorskip("jinja2")
    path = write(tmp_path / "data.jsonl", {"prompt": [say("user", "1+1?")], "chosen": "2", "rejected": "3"})
    tokenizer = character_tokenizer("0123456789+?")
    with open_task(TaskConfig(name="preference", path=str(path), template="{problem}", workers=1)) as task:
        with pytest.raises(ValueError, match="a prompt of chat messages needs a tokenizer with a chat template"):
            render(task.template, task.train[0], tokenizer)
        tokenizer.chat_template = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
                                   "{% if add_generation_prompt %}<assistant>{% endif %}")
        assert render(task.template, task.train[0], tokenizer) == "<user>1+1?<assistant>"
        asked = dataclasses.replace(task.train[0], messages=tuple(ASKED))
        chat = get_template("chat", system="Long.")
        assert render(chat, task.train[0], tokenizer) == "<system>Long.<user>1+1?<assistant>"
        assert render(chat, asked, tokenizer) == "<system>Brief.<user>1+1?<assistant>"  # the row's own stays


def test_a_preference_task_grades_what_has_an_answer(tmp_path):
    rows = [{**TEXT, "prompt": f"{n}+1", "gold": n + 1} for n in range(4)]
    config = TaskConfig(name="preference", path=str(write(tmp_path / "data.jsonl", *rows)), template="Sum: {prompt}",
                        answer_field="gold", answer_from="text", heldout_size=1, workers=1)
    with open_task(config) as task:
        assert len(task.train) == 3 and [example.problem for example in task.heldout] == ["3+1"]
        assert render(task.template, task.heldout[0]) == "Sum: 3+1"
        assert task.rewards([""], [["4", "5"]], task.heldout).values.tolist() == [[1, 0]]


def test_a_preference_task_needs_a_source():
    with pytest.raises(ValueError, match="task 'preference' needs either task.path.*or task.hub"):
        with open_task(TaskConfig(name="preference")):
            pass


# -- generated --------------------------------------------------------------------------------------------


def test_generated_preferences_have_one_wrong_step():
    config = ArithmeticConfig(kinds=tuple(KINDS), digits=2, terms=4)
    places = set()
    for example in train_problems(generator(config), seed=1, size=300):
        right, wrong = (list(map(int, text.split(","))) for text in (example.solution, example.rejected))
        assert len(right) == len(wrong) and min(wrong) >= 0
        off = [b - a for a, b in zip(right, wrong)]
        first = next(place for place, error in enumerate(off) if error)
        assert len(set(off[first:])) == 1  # carried on to the result
        assert reward([""] * 2, [example.solution, example.rejected], [example.for_reward()] * 2) == [1, 0]
        places.add(first)
    assert places >= {0, 1, 2} and max(places) == 7  # of a repeat: a count and a total for each of 4 additions
