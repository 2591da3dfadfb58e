"""Chat messages of a data row, checked: `{"role": ROLE, "content": TEXT, ...}`.

What a message holds beside the two goes to the chat template with it; see `templates.render`.
"""

from typing import Any, Mapping

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
