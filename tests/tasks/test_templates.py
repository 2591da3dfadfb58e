"""Templates against the published strings, and where answers are read."""

import hashlib
import time

import pytest

from jaxrl_fp16.tasks import TEMPLATES, Example, get_template, read_answer, render
from jaxrl_fp16.tasks.grading.readers import last_boxed

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
    ("\\boxed 5.", "5"), ("\\boxed5", "5"), ("$\\boxed \\frac{1}{2}$", "\\frac{1}{2}"), ("\\boxed 1 \\boxed{2}", "2"),
    ("\\boxed{1} or \\boxed 2", "2"), ("\\fbox{6}", "6"), ("\\boxedin 5", ""), ("\\boxed", ""),
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


@pytest.mark.parametrize("response, answer", [
    ("The range is 3-7", "7"), ("10-5", "5"), ("a+5", "5"), ("COVID-19", "19"), ("x = -7", "-7"), ("(−7)", "-7"),
    ("it is 3/4.", "3/4"), ("-\\dfrac{3}{4}", "-3/4"), ("\\frac{-3}{4}", "-3/4"), ("\\frac34", "3/4"),
    ("\\frac{1,200}{7}", "1200/7"), ("24 / 7", "24/7"), ("2 1/3 cups", "2 1/3"), ("2\\frac{1}{3}", "2 1/3"),
    ("step 2 7/3", "7/3"), ("on 12/25/2024", "2024"), ("1,2,3", "3"), ("[1, 2, -3]", "-3"), ("1,234, 5,678", "5678"),
    ("1,234,5", "5"), ("1{,}234", "1234"), ("x = .5", ".5"), ("1.2.3", "3"), ("6.02e23", "6.02e23"),
    ("1.5e-3.", "1.5e-3"), ("3 \\times 10^{8} m", "3e8"), ("3×10^-5", "3e-5"), ("<think> 5", ""),
    ("<think>4</think> 5", "5"), ("it is 5 <think> or 6", "5"),
])
def test_last_number(response, answer):
    assert read_answer(get_template("none", reads="last_number"), response) == answer


@pytest.mark.parametrize("inside, answer", [
    ("The answer is 5", "5"), ("So the final answer is: \\frac{1}{2}.", "\\frac{1}{2}"), ("x = 5", "x = 5"),
    ("Janet makes 18 dollars every day.", "18"), ("Saturday morning", "Saturday morning"), ("5 apples", "5 apples"),
    ("$(3, 4)$", "$(3, 4)$"),
])
def test_an_answer_tag_around_a_sentence(inside, answer):
    assert read_answer(TEMPLATES["r1"], f"<think>x</think> <answer>{inside}</answer>") == answer


def test_thoughts_without_an_end_hold_no_answer():
    chat = get_template("chat")
    assert read_answer(chat, "<think>maybe \\boxed{5}, no") == ""
    assert read_answer(chat, "\\boxed{4} <think>or \\boxed{5}") == "4"
    assert read_answer(chat, "<think>\\boxed{3}</think> so \\boxed{5}") == "5"
    assert read_answer(chat, "maybe \\boxed{5}", prompt="<|user|>1+4?<|assistant|><think>\n") == ""
    assert read_answer(chat, "no</think> \\boxed{5}", prompt="<|user|>1+4?<|assistant|><think>\n") == "5"
    assert read_answer(chat, "\\boxed{5}", prompt="<|user|>1+4?<|assistant|><think>\n</think>") == "5"
    assert read_answer(TEMPLATES["r1"], "<think> <answer>5</answer>") == ""


def test_readers_take_linear_time_on_hostile_text():
    start = time.perf_counter()
    for text in ("1", "1,", "1/", "1 ", "1 1/", "\\frac{1", "\\boxed ", "\\boxed{", ".1", "1 x 10 ", "<think>"):
        for reads in ("boxed", "answer_tag", "last_number"):
            read_answer(get_template("none", reads=reads), f"<answer>{text * (100_000 // len(text))}</answer>")
    assert time.perf_counter() - start < 5
