"""Prompt templates: the text around a problem, and where its answer is read.

A template is data. The five named ones are strings that published models and results depend on, character for
character, from sail-sg/Precision-RL (MIT); `chat` is the tokenizer's own; any text with field names is a
template too. The paper's four hold their begin-of-text token where one is due, and so do chat templates; a text of
one's own and `none` get the tokenizer's. So prompts are encoded without adding another.
"""

import dataclasses
import re
from typing import Any, Mapping

from jaxrl_fp16.tasks.examples import Example
from jaxrl_fp16.tasks.grading.readers import END_OF_THINK, READERS, THINK
from jaxrl_fp16.tasks.messages import check_options, chat_text
from jaxrl_fp16.tokenizer import begin_text, encode


@dataclasses.dataclass(frozen=True)
class Template:
    """How a problem becomes a prompt and a response becomes an answer."""

    name: str
    text: str | None            # with `{q}` or `{field}` where a value goes; None: the tokenizer's own
    reads: str = "boxed"        # a key of READERS
    system: str | None = None   # system text, for `chat` alone
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the tokenizer's chat template
    date: str | None = None     # YYYY-MM-DD, for a chat template that asks for the date; None: the day's


BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
R1 = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
    "Assistant first thinks about the reasoning process in the mind and then provides the User with the "
    "answer. The reasoning process is enclosed within <think> </think> and answer is enclosed within "
    "<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>."
    "\nUser: {q}\nAssistant: <think>"
)

TEMPLATES = {template.name: template for template in (
    Template("r1_distill_qwen",
             "<｜begin▁of▁sentence｜><｜User｜>{q} " + BOXED + "\n<｜Assistant｜><think>\n",
             reads="boxed_after_think"),
    Template("qwen_math", "<|im_start|>system\n" + BOXED + "<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n"
                          "<|im_start|>assistant\n"),
    Template("qwen3", "<|im_start|>user\nQuestion: {q}\n" + BOXED + "<|im_end|>\n<|im_start|>assistant\n"),
    Template("r1", R1, reads="answer_tag"),
    Template("none", "{q}"),
    Template("chat", None),
)}

OWN = ("text", "none")  # templates without a begin-of-text token of their own
MARKER = re.compile(r"<\|[^<|>]*\|>|<｜[^<｜>]*｜>")

# A field name in braces, unless a LaTeX command comes before it: `\boxed{answer}` is text, not a field.
FIELD = re.compile(r"(\\[A-Za-z]+)?\{([A-Za-z_]\w*)\}")


def get_template(spec: str, system: str | None = None, reads: str | None = None,
                 options: Mapping[str, Any] | None = None, date: str | None = None) -> Template:
    """The template of a name out of TEMPLATES, or one made of a text with field names such as
    `"{question}\\nAnswer:"`. `reads` overrides where the answer is read; `options` and `date` are for the tokenizer's
    chat template."""
    if spec in TEMPLATES:
        template = TEMPLATES[spec]
    elif any(not command for command, _ in FIELD.findall(spec)):
        template = Template("text", spec)
    else:
        raise ValueError(f"template {spec!r} is neither a text with a field name such as '{{problem}}' "
                         f"nor one of {', '.join(TEMPLATES)}")
    if system is not None and template.text is not None:
        raise ValueError(f"a system text goes with template 'chat' alone, not with {spec!r}")
    if reads is not None and reads not in READERS:
        raise ValueError(f"answers are read by one of {', '.join(READERS)}, not {reads!r}")
    return dataclasses.replace(template, system=system, reads=reads or template.reads, options=options or {}, date=date)


def render(template: Template, example: Example, tokenizer=None) -> str:
    """The prompt of an example. A prompt of messages and `chat` need the tokenizer; a text of one's own and `none`
    begin with its begin-of-text token where there is a tokenizer, and it puts one."""
    if needs_tokenizer(template, example):
        return _render_chat(template, example, tokenizer)
    values = {**example.fields, "problem": example.problem, "q": example.problem}

    def fill(match: re.Match) -> str:
        command, name = match.groups()
        if command:
            return match.group()
        if name not in values:
            raise ValueError(f"template names the field {name!r}; known: {', '.join(sorted(values))}")
        return str(values[name])

    text = FIELD.sub(fill, template.text)  # one pass: braces inside a problem stay what they are
    begin = "" if tokenizer is None or template.name not in OWN else begin_text(tokenizer)
    return text if text.startswith(begin) else begin + text


def check_template(template: Template, example: Example, tokenizer) -> None:
    """Refuses, by `ValueError`, a template that means nothing to this tokenizer: a published one whose markers it has
    not, one of chat where it has none, and options that do not reach its chat template."""
    if needs_tokenizer(template, example):
        check_options(tokenizer, template.options)
        render(template, example, tokenizer)
    elif template.options:
        raise ValueError(f"template_options are {', '.join(template.options)} and the template is {template.name!r}; "
                         "allowed: {}, or template chat, whose text they change")
    elif template.name in TEMPLATES and (absent := _in_pieces(template, tokenizer)):
        raise ValueError(f"template {template.name!r} holds {', '.join(absent)}, which this tokenizer reads as "
                         "pieces of text, not as one token; allowed: a model that has them, or another template")


def remark_on(template: Template, tokenizer) -> str:
    """A line to say of a text of one's own whose markers this tokenizer has not; "" where there is none."""
    absent = _in_pieces(template, tokenizer) if template.name == "text" else []
    return f"task.template holds {', '.join(absent)}, which this tokenizer reads as pieces of text" if absent else ""


def _in_pieces(template: Template, tokenizer) -> list[str]:
    """The markers of a template that are no single tokens."""
    marks = dict.fromkeys(MARKER.findall(template.text))
    return [mark for mark, ids in zip(marks, encode(tokenizer, list(marks)) if marks else ())
            if ids != [tokenizer.convert_tokens_to_ids(mark)] or ids == [tokenizer.unk_token_id]]


def flaw_of(text: str, example: Example) -> str | None:
    """Why a rendered prompt asks nothing; None where it asks what the example does, white space aside."""
    if not text:
        return "without a token"
    asked = [example.problem]
    if example.messages:
        asked = [message["content"] for message in example.messages if message["role"] in ("system", "user")]
    parts, shown = [" ".join(part.split()) for part in asked], " ".join(text.split())
    return None if any(parts) and all(part in shown for part in parts) else "without the problem's text"


def needs_tokenizer(template: Template, example: Example) -> bool:
    """Whether the tokenizer's chat template makes the prompt."""
    return template.text is None or bool(example.messages)


def _render_chat(template: Template, example: Example, tokenizer) -> str:
    if getattr(tokenizer, "chat_template", None) is None:
        if example.messages:
            raise ValueError("a prompt of chat messages needs a tokenizer with a chat template; this one has none: "
                             "allowed: another model.tokenizer, or prompts of text")
        raise ValueError("template 'chat' needs a tokenizer with a chat template; this one has none: "
                         f"choose another of {', '.join(name for name in TEMPLATES if name != 'chat')}")
    messages = list(example.messages) or [{"role": "user", "content": example.problem}]
    if template.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": template.system}, *messages]
    return chat_text(tokenizer, messages, template.options, template.date)


def read_answer(template: Template, response: str, prompt: str = "") -> str:
    """The answer in a response; "" where there is none.

    For reader `boxed`, a prompt that ends within `<think>` begins the response's thoughts.
    """
    if template.reads == "boxed" and THINK in prompt and END_OF_THINK not in prompt.rpartition(THINK)[2]:
        response = THINK + response
    return READERS[template.reads](response).strip()
