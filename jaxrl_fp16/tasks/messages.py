"""Chat messages of a data row, `{"role": ROLE, "content": TEXT, ...}`: checked, and as a chat template writes them.

What a message holds beside the two reaches the chat template with it, or is refused.
"""

import datetime
import inspect
import re
from typing import Any, Mapping

from jaxrl_fp16.config import ConfigError

ROLES = ("system", "user", "assistant", "tool")
Messages = list[Mapping[str, Any]]


def text_or_messages(value: Any, name: str, where: str) -> str | Messages:
    """A field that holds text or a list of messages. `ValueError` names the row, the field and what is allowed."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where}: field {name!r} is a {type(value).__name__}; allowed: text, or a list of messages")
    if not value:
        raise ValueError(f"{where}: field {name!r} is an empty list; allowed: one message or more")
    return [_message(each, f"{where}: field {name!r}, message {number}") for number, each in enumerate(value, 1)]


def _message(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}; allowed: an object with role and content")
    role, content = value.get("role"), value.get("content")
    if role not in ROLES:
        raise ValueError(f"{where} has the role {role!r}; allowed: {', '.join(ROLES)}")
    if content is None and value.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{where} has a {type(content).__name__} for content; allowed: text")
    return {"role": role, "content": content, **more_of(value)}


def more_of(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a message says beside its role and content; null and empty say nothing."""
    return {name: value for name, value in message.items()
            if name not in ("role", "content") and value not in (None, "", [], {})}


def prompt_of(messages: Messages, where: str) -> tuple[Mapping[str, Any], ...]:
    """Messages that a response may follow."""
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the prompt ends with a message of the assistant; allowed: user, tool, system")
    return tuple(messages)


def last_asked(messages) -> str:
    """The text of the user's last message; "" where there is none."""
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")


def only_content(message: Mapping[str, Any], where: str) -> str:
    """The content of a response, which is text alone: what else it holds would be lost."""
    more = more_of(message)
    if more:
        raise ValueError(f"{where} has {', '.join(more)} beside its content, which a response cannot hold; allowed: "
                         "role and content, with thoughts and calls written into the content")
    return message["content"]


def one_kind(examples):
    """The examples of `(where, example)` pairs, as they come; prompts of text beside some of messages are refused."""
    first = None
    for where, example in examples:
        first = example if first is None else first
        if bool(example.messages) != bool(first.messages):
            kinds = ("text", "messages") if example.messages else ("messages", "text")
            raise ValueError(f"{where}: the prompts before are {kinds[0]}, this one is {kinds[1]}; allowed: one kind")
        yield example


# -- as text ---------------------------------------------------------------------------------------


def chat_text(tokenizer, messages: Messages, options: Mapping[str, Any], date: str | None) -> str:
    """The prompt that a conversation makes. options: what the chat template gets beside it.
    date: YYYY-MM-DD, for a template that asks for the date; None: the day's.

    Raises `ValueError` where a message holds something that the template does not read.
    """
    given = dict(options)
    if date is not None and asks_for_date(tokenizer):
        given["chat_template"] = _clock(date) + tokenizer.get_chat_template()

    def write(conversation):
        return apply_chat_template(tokenizer, conversation, add_generation_prompt=True, **given)

    text = write(messages)
    for place, message in enumerate(messages):
        for name in more_of(message):
            less = [*messages[:place], {key: message[key] for key in message if key != name}, *messages[place + 1:]]
            if not _reads(tokenizer, name) and write(less) == text:
                raise ValueError(f"a message by {message['role']} has {name!r}, which the tokenizer's chat template "
                                 "does not read; allowed: role and content, or a template that reads it")
    return text


def _clock(date: str) -> str:
    """A macro that takes the place of `strftime_now`, and answers for this day at 0:00. Transformers 5 gives a
    template no function that comes from outside."""
    day = datetime.datetime.fromisoformat(date)
    codes = [mark + letter for mark in ("%", "%-") for letter in "aAbBcdDeFGHIjmMpSTuUVwWxXyY"]
    answers = "".join(f"|replace({code!r}, {day.strftime(code)!r})" for code in codes)
    # The newline goes with the tag before it: what follows begins a line, as it did.
    return ("{% macro strftime_now(format) %}{{ format|replace('%%', '\\0')" + answers
            + "|replace('\\0', '%') }}{% endmacro %}\n")


def apply_chat_template(tokenizer, messages, **options) -> str:
    """A conversation as the tokenizer's chat template writes it, in Jinja's sandbox.

    Raises `ConfigError`, in one line, where it fails: the template is its folder's, and may be anything.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program, and may raise anything
        folder = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"{folder}: its chat template fails ({reason}); allowed: another tokenizer, or a template of "
                          "your own") from error


def check_options(tokenizer, options: Mapping[str, Any]) -> None:
    """Refuses, by `ValueError`, options that are not the chat template's to read."""
    ours = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"self", "tools", "documents", "kwargs"}
    for name in options:
        if name in ours or not re.search(rf"\b{re.escape(name)}\b", _source(tokenizer)):
            raise ValueError(f"template_options.{name} is no name that the tokenizer's chat template reads; allowed: "
                             "one that stands in it, such as enable_thinking")


def asks_for_date(tokenizer) -> bool:
    """Whether the chat template writes the date into prompts."""
    return "strftime_now" in _source(tokenizer)


def _reads(tokenizer, name: str) -> bool:
    """Whether the chat template looks for a field of a message, if only in some of them."""
    source = _source(tokenizer)
    messages = {"message", *re.findall(r"\bfor\s+(\w+)\s+in\s+\w*messages", source)}
    access = rf"\b(?:{'|'.join(messages)})\s*(?:\.\s*|\[\s*['\"]|\.get\(\s*['\"]){re.escape(name)}\b"
    return re.search(access, source) is not None


def _source(tokenizer) -> str:
    """The chat template; several are one text."""
    found = getattr(tokenizer, "chat_template", None) or ""
    return found if isinstance(found, str) else "\n".join(map(str, dict(found).values()))
