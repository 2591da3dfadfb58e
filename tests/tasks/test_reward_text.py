"""The text that a reward model reads."""

from types import SimpleNamespace

import pytest

from jaxrl_fp16.tasks import Example
from jaxrl_fp16.tasks.reward_text import make_writer
from jaxrl_fp16.tokenizer import character_tokenizer

EXAMPLE = Example("1+1", "2", {"kind": "add"})
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"


@pytest.fixture
def tokenizer():
    return character_tokenizer("0123456789+=<>{}abcdefghijklmnopqrstuvwxyz ")


def test_without_a_template_prompt_and_response_follow_each_other(tokenizer):
    assert make_writer(None, tokenizer)("Q: 1+1=", "2", EXAMPLE) == "Q: 1+1=2"


def test_the_chat_template_gets_problem_and_response_as_turns(tokenizer):
    tokenizer.chat_template = CHAT
    assert make_writer(None, tokenizer)("Q: 1+1=", "2", EXAMPLE) == "<user>1+1<assistant>2"


def test_a_prompt_of_messages_keeps_its_turns(tokenizer):
    tokenizer.chat_template = CHAT
    turns = [("user", "1+1"), ("assistant", "2"), ("user", "2+1")]
    example = Example("2+1", "3", messages=tuple({"role": role, "content": text} for role, text in turns))
    assert make_writer(None, tokenizer)("p", "3", example) == "<user>1+1<assistant>2<user>2+1<assistant>3"
    assert make_writer("{problem}={response}", tokenizer)("p", "3", example) == "2+1=3"


def test_a_template_of_ones_own_wins(tokenizer):
    tokenizer.chat_template = CHAT
    write = make_writer("{kind}|{problem}|{prompt}|{response}\\boxed{x}", tokenizer)
    assert write("Q: 1+1=", "{problem}", EXAMPLE) == "add|1+1|Q: 1+1=|{problem}\\boxed{x}"


def test_a_template_without_the_response_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"template is '\{problem\}'; allowed: a text with the field \{response\}"):
        make_writer("{problem}", tokenizer)


def test_an_unknown_field_is_refused(tokenizer):
    with pytest.raises(ValueError, match="names the field 'answer'; known: kind, problem, prompt, q, response"):
        make_writer("{answer}{response}", tokenizer)("", "", EXAMPLE)


def test_a_chat_template_that_fails_is_refused():
    def fail(turns, tokenize):
        import jinja2

        raise jinja2.TemplateError("roles must alternate")

    tokenizer = SimpleNamespace(chat_template="x", apply_chat_template=fail)
    with pytest.raises(ValueError, match="the tokenizer: its chat template fails .TemplateError: roles must alternate"):
        make_writer(None, tokenizer)("", "", EXAMPLE)
