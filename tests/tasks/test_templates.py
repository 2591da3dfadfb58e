"""Templates against the published strings, and where answers are read."""

import hashlib

import pytest

from jaxrl_fp16.tasks import TEMPLATES, Example, flaw_of, get_template, read_answer, render
from jaxrl_fp16.tasks.templates import last_boxed

SYSTEM, USER = {"role": "system", "content": "S"}, {"role": "user", "content": "1+1?"}
EXAMPLE = Example("What is 1+1? {q} \\frac{1}{2}", "2", {"question": "Q?", "level": 3})


@pytest.mark.parametrize("name, digest", [
    ("r1_distill_qwen", "ae57e39b3a281434"), ("qwen_math", "88f09a93305d74d2"), ("qwen3", "5f49780fb56463f9"),
    ("r1", "d9de64d013282668"), ("none", "9e29cf5502ea15d1"),
])
def test_published_texts_are_unchanged(name, digest):
    assert hashlib.sha256(TEMPLATES[name].text.encode()).hexdigest().startswith(digest)


def test_render_puts_the_problem_in_as_it_stands():
    prompt = render(TEMPLATES["qwen3"], EXAMPLE)
    assert prompt == ("<|im_start|>user\nQuestion: What is 1+1? {q} \\frac{1}{2}\nPlease reason step by "
                      "step, and put your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n")


def test_a_text_with_fields_is_a_template():
    template = get_template("{question} ({level}) in \\boxed{answer}, {} or {1}\nAnswer:")
    assert render(template, EXAMPLE) == "Q? (3) in \\boxed{answer}, {} or {1}\nAnswer:"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'qwen_maths'.*qwen_math"):
        get_template("qwen_maths")
    with pytest.raises(ValueError, match="'answer'; known: level, problem, q, question"):
        render(get_template("{problem} {answer}"), EXAMPLE)
    with pytest.raises(ValueError, match="system text.*'none'"):
        get_template("none", system="Be brief.")
    with pytest.raises(ValueError, match="'box'"):
        get_template("none", reads="box")


@pytest.mark.parametrize("text, example, flaw", [
    ("", Example("", ""), "without a token"), ("Q:", Example(" ", ""), "without the problem's text"),
    ("<a>1 + 1?<b>", Example(" 1  +\n1?\n", ""), None), ("<a>1+1?<b>", EXAMPLE, "without the problem's text"),
    ("S <u>1+1?", Example("1+1?", "", messages=(SYSTEM, USER)), None),
    ("<u>1+1?", Example("1+1?", "", messages=(SYSTEM, USER)), "without the problem's text"),
    ("<t>S", Example("", "", messages=(SYSTEM, {"role": "tool", "content": "x"})), None),
])
def test_a_prompt_must_hold_what_is_asked(text, example, flaw):
    assert flaw_of(text, example) == flaw


def test_chat_without_a_chat_template_is_refused():
    with pytest.raises(ValueError, match="chat template"):
        render(get_template("chat"), EXAMPLE, tokenizer=None)


@pytest.mark.parametrize("text, answer", [
    ("so \\boxed{4}", "4"),
    ("\\boxed{1} then \\boxed{2}.", "2"),
    ("\\boxed{\\frac{1}{2}} }", "\\frac{1}{2}"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{\\boxed{5}}", "5"),
    ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
    ("{ \\boxed {7}", "7"),
    ("\\boxed{6} and \\boxed{12", "6"),
    ("\\boxed 5", ""),
    ("nothing", ""),
    ("", ""),
])
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


def test_last_boxed_takes_linear_time_on_hostile_text():
    assert last_boxed("\\boxed{" * 50_000) == ""
    assert last_boxed("\\boxed{" + "{" * 50_000 + "}" * 50_001) == "{" * 50_000 + "}" * 50_000


@pytest.mark.parametrize("name, response, answer", [
    ("r1_distill_qwen", "maybe \\boxed{1}</think> it is \\boxed{ 2 }", "2"),
    ("r1_distill_qwen", "thoughts \\boxed{1}", ""),
    ("r1", "x</think> <answer> 3 </answer>", "3"),
    ("r1", "<answer>4</answer> <answer>so \\boxed{5}</answer>", "5"),
    ("r1", "<answer> 6", ""),
    ("r1", "7</answer>", ""),
    ("qwen_math", "no box: 8", ""),
    ("none", "\\boxed{9}", "9"),
])
def test_read_answer(name, response, answer):
    assert read_answer(TEMPLATES[name], response) == answer


def test_other_places_to_read_from():
    assert read_answer(get_template("none", reads="last_number"), "so $1,234.50 in 3 parts: -7.") == "-7"
    assert read_answer(get_template("none", reads="last_number"), "it costs 1,234.50 dollars") == "1234.50"
    assert read_answer(get_template("none", reads="last_number"), "none") == ""
    assert read_answer(get_template("none", reads="text"), " 85,66\n") == "85,66"
