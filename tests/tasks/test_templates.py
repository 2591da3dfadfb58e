"""Templates against the published strings, and where answers are read."""

import dataclasses
import datetime
import hashlib
import re
import time

import pytest

from jaxrl_fp16.tasks import TEMPLATES, Example, TaskConfig, check_template, flaw_of, get_template, read_answer, render
from jaxrl_fp16.tasks.templates import remark_on
from jaxrl_fp16.tasks.grading.readers import last_boxed
from jaxrl_fp16.tasks.messages import asks_for_date
from jaxrl_fp16.tokenizer import character_tokenizer, encode

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
    ("3 -7", "-7"), ("3 - 7", "7"), ("10-7", "7"), ("$-7$", "-7"), ("3, -7", "-7"),
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
    start = time.process_time()
    for text in ("1", "1,", "1/", "1 ", "1 1/", "\\frac{1", "\\boxed ", "\\boxed{", ".1", "1 x 10 ", "<think>"):
        for reads in ("boxed", "answer_tag", "last_number"):
            read_answer(get_template("none", reads=reads), f"<answer>{text * (100_000 // len(text))}</answer>")
    assert time.process_time() - start < 5
# -- with a tokenizer -------------------------------------------------------------------------------


def chat(text):
    """A tokenizer with this chat template."""
    pytest.importorskip("jinja2")
    tokenizer = character_tokenizer("0123456789+?")
    tokenizer.chat_template = text
    return tokenizer


def beginning(single="<s> $A"):
    """A tokenizer that puts `<s>` before a text, and by another `single` more."""
    from tokenizers import processors

    tokenizer = character_tokenizer("0123456789+?= Q:")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    known = [("<s>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    return tokenizer


ASKED = Example("1+1?", "2")


@pytest.mark.parametrize("template, text", [
    ("none", "<s>1+1?"), ("Q: {problem}=", "<s>Q: 1+1?="), ("<s>{q}", "<s>1+1?"),
])
def test_a_text_of_ones_own_begins_as_the_tokenizer_begins(template, text):
    tokenizer = beginning()
    assert render(get_template(template), ASKED, tokenizer) == text
    assert encode(tokenizer, [text])[0] == tokenizer(text.removeprefix("<s>"))["input_ids"]
    assert render(get_template(template), ASKED, character_tokenizer("1+?")) == template.replace(
        "{q}", "1+1?").replace("{problem}", "1+1?").replace("none", "1+1?")


@pytest.mark.parametrize("single, begin", [
    ("<s> $A <eos>", "<s>"), ("$A <eos>", ""), ("$A", ""), ("<s> <s> $A", "<s><s>"),
])
def test_what_ends_a_text_is_not_put_before_it(single, begin):
    assert render(get_template("none"), ASKED, beginning(single)) == begin + "1+1?"


@pytest.mark.parametrize("name", ["r1_distill_qwen", "qwen_math", "qwen3", "r1"])
def test_the_papers_templates_begin_as_they_are_written(name):
    assert render(get_template(name), ASKED, beginning()) == TEMPLATES[name].text.replace("{q}", "1+1?")


def test_a_chat_template_has_its_own_beginning():
    tokenizer = beginning()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert render(get_template("chat"), ASKED, tokenizer) == "1+1?"


MARKS = {"r1_distill_qwen": ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
         "qwen_math": ["<|im_start|>", "<|im_end|>"], "qwen3": ["<|im_start|>", "<|im_end|>"]}


@pytest.mark.parametrize("name", MARKS)
def test_a_published_template_needs_its_markers_as_tokens(name):
    tokenizer = character_tokenizer("1+?<|>_abcdefghijklmnopqrstuvwxyz｜▁")
    for mark in MARKS[name]:
        with pytest.raises(ValueError, match=f"template '{name}' holds .*{re.escape(mark)}.* which this tokenizer"):
            check_template(get_template(name), ASKED, tokenizer)
        tokenizer.add_tokens([mark])
    check_template(get_template(name), ASKED, tokenizer)
    for free in ("none", "r1", "<|user|>{q}"):
        check_template(get_template(free), ASKED, character_tokenizer("1+?"))


def test_markers_of_a_text_of_ones_own_that_are_no_tokens_are_told():
    tokenizer = character_tokenizer("1+?<|>aeinrsudt")
    tokenizer.add_tokens(["<|user|>"])
    assert remark_on(get_template("<|user|>{q}"), tokenizer) == ""
    assert remark_on(get_template("<|user|>{q}<|assistant|>"), tokenizer) == (
        "task.template holds <|assistant|>, which this tokenizer reads as pieces of text")
    assert remark_on(get_template("r1"), tokenizer) == remark_on(get_template("chat"), tokenizer) == ""


def test_options_reach_the_chat_template():
    tokenizer = chat("{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}?{% endif %}")
    for options, text in (({}, "1+1?"), ({"enable_thinking": False}, "1+1??"), ({"enable_thinking": True}, "1+1?")):
        template = get_template("chat", options=options)
        check_template(template, ASKED, tokenizer)
        assert render(template, ASKED, tokenizer) == text


@pytest.mark.parametrize("template, options, message", [
    ("chat", {"enable_thinkng": False}, "template_options.enable_thinkng is no name that the tokenizer's chat temp"),
    ("chat", {"add_generation_prompt": False}, "template_options.add_generation_prompt is no name"),
    ("chat", {"tokenize": True}, "template_options.tokenize is no name"),
    ("none", {"enable_thinking": False}, "template_options are enable_thinking and the template is 'none'; allowed"),
])
def test_options_that_reach_nothing_are_refused(template, options, message):
    with pytest.raises(ValueError, match=message):
        check_template(get_template(template, options=options), ASKED, chat("{{ enable_thinking }}{{ tokenize }}"
                                                                           "{{ add_generation_prompt }}"))


def test_a_date_is_the_runs():
    tokenizer = chat("{{ strftime_now('%d %b %Y, %H') }}: {{ messages[0].content }}")
    assert asks_for_date(tokenizer) and not asks_for_date(chat("{{ messages }}"))
    assert render(get_template("chat", date="2026-02-01"), ASKED, tokenizer) == "01 Feb 2026, 00: 1+1?"
    assert render(get_template("chat"), ASKED, tokenizer)[-6:] == ": 1+1?"
    asked = ("  {% if strftime_now is defined %}\n{% set f = '%-d. %B, %A, 100%%d' %}{% for m in messages %}"
             "{{ strftime_now(f) }}\n{{ strftime_now(format='%Y') }} {{ m.content }}{% endfor %}{% endif %}")
    dated, plain = (render(get_template("chat", date=date), ASKED, chat(asked)) for date in ("2026-02-01", None))
    assert dated == "1. February, Sunday, 100%d\n2026 1+1?"
    assert plain == datetime.date.today().strftime("%-d. %B, %A, 100%%d\n%Y 1+1?")
    assert TaskConfig(date="2026-02-01").date == "2026-02-01"
    for date in ("1 Feb 2026", "2026-02-30", "20260201", ""):
        with pytest.raises(ValueError, match="date is '.*'; allowed: a day as YYYY-MM-DD, or null"):
            TaskConfig(date=date)


@pytest.mark.parametrize("source, read", [
    ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
    ("{% for m in messages %}{{ m.get('name', '') }}{{ m.content }}{% endfor %}", True),
    ("{% for message in messages %}{{ message['name'] }}{{ message.content }}{% endfor %}", True),
    ("{% for m in messages %}{{ m | tojson }}{% endfor %}", True),
    ("{% for m in messages %}{% if m.role == 'tool' %}{{ m.name }}{% endif %}{{ m.content }}{% endfor %}", True),
    ("{% for m in messages %}{{ m.content }}{% for t in m.tools %}{{ t.name }}{% endfor %}{% endfor %}", False),
])
def test_a_field_of_a_message_is_read_or_refused(source, read):
    asked = dataclasses.replace(ASKED, messages=({"role": "user", "content": "1+1?", "name": "7"},))
    if read:
        assert "1+1?" in render(get_template("chat"), asked, chat(source))
        return
    with pytest.raises(ValueError, match="a message by user has 'name', which the tokenizer's chat template does not"):
        render(get_template("chat"), asked, chat(source))


def test_thoughts_and_calls_reach_a_template_that_reads_them():
    source = ("{% for m in messages %}{{ m.reasoning_content }}{{ (m.tool_calls or [{}])[0].f }}{{ m.content }}"
              "{% endfor %}")
    said = {"role": "assistant", "content": "2", "reasoning_content": "think ", "tool_calls": [{"f": "call "}]}
    asked = dataclasses.replace(ASKED, messages=(said, {"role": "user", "content": "1+1?"}))
    assert render(get_template("chat"), asked, chat(source)) == "think call 21+1?"
