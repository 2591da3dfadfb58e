"""Preferences: a prompt with a chosen and a rejected response, from data files and Hub data sets.

A row is one of

    {"prompt": "1+1?", "chosen": "2", "rejected": "3"}                                   text
    {"prompt": [MESSAGE, ...], "chosen": [MESSAGE], "rejected": [MESSAGE]}               messages
    {"chosen": [MESSAGE, ..., MESSAGE], "rejected": [MESSAGE, ..., MESSAGE]}             whole conversations

with MESSAGE `{"role": ROLE, "content": TEXT}`; beside a prompt a response may be text or a message. Whole conversations
start with the prompt, which the two share; a field `prompt` then says the same once more, as messages or as the text
of one of them. A prompt of text goes through the task's template, one of messages through the tokenizer's chat
template. A response is one message of the assistant with its content alone. An example holds the chosen response as
its `solution`.
"""

import dataclasses
from typing import Any, Iterable, Mapping

from jaxrl_fp16.tasks.examples import Example, gold_text
from jaxrl_fp16.tasks.messages import Messages, last_asked, one_kind, only_content, prompt_of, text_or_messages
from jaxrl_fp16.tasks.rows import field_of, has_field, read_hub_rows, read_rows, without_fields


@dataclasses.dataclass(frozen=True)
class PreferenceFields:
    """Which fields of a row are what. The answer, for grading, is optional."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    answer: str = "answer"


def load_preferences(path, fields: PreferenceFields = PreferenceFields()) -> list[Example]:
    """Examples with `solution` and `rejected` of a file that `read_rows` reads; names of fields may be dotted.

    A `ValueError` names file and line: what `load_examples` refuses, and a prompt or response that is none of
    the forms above, prompts of text beside prompts of messages, a conversation without a shared prompt.
    """
    return _examples(read_rows(path), fields)


def load_hub_preferences(hub: str, split: str, fields: PreferenceFields = PreferenceFields()) -> list[Example]:
    """The same for a Hugging Face Hub data set; needs the extra `hub`."""
    return _examples(read_hub_rows(hub, split), fields)


def _examples(rows: Iterable[tuple[str, Mapping[str, Any]]], fields: PreferenceFields) -> list[Example]:
    return list(one_kind((where, _example(row, fields, where)) for where, row in rows))


def _example(row: Mapping[str, Any], fields: PreferenceFields, where: str) -> Example:
    prompt, answer = (field_of(row, name, where) if has_field(row, name) else None
                      for name in (fields.prompt, fields.answer))
    prompt = None if prompt is None else text_or_messages(prompt, fields.prompt, where)
    sides = [text_or_messages(field_of(row, name, where), name, where) for name in (fields.chosen, fields.rejected)]
    if prompt is None and any(isinstance(side, str) for side in sides):
        field_of(row, fields.prompt, where)
        raise ValueError(f"{where}: field {fields.prompt!r} is null; allowed: text or messages")
    shared = _shared(*sides)
    if shared:
        prompt = _of_conversations(prompt, shared, where)
        sides = [side[len(shared):] for side in sides]
    elif prompt is None:
        raise ValueError(f"{where}: no field {fields.prompt!r}, and {fields.chosen!r} and {fields.rejected!r} do not "
                         "start with the same messages; allowed: a prompt, or two whole conversations that share it")
    messages = () if isinstance(prompt, str) else prompt_of(prompt, where)
    hidden = {fields.chosen, fields.rejected, fields.answer} - {fields.prompt}
    return Example(
        problem=last_asked(messages) if messages else prompt,
        answer="" if answer is None else gold_text(answer, fields.answer, where, needed=False),
        fields=without_fields(row, hidden),
        solution=_response(sides[0], fields.chosen, where),
        rejected=_response(sides[1], fields.rejected, where),
        messages=messages,
    )


def _shared(chosen: str | Messages, rejected: str | Messages) -> Messages:
    """The messages that both conversations start with, their last ones left out: these are the responses."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        return []
    count = 0
    for one, other in zip(chosen[:-1], rejected[:-1]):
        if one != other:
            break
        count += 1
    return chosen[:count]


def _of_conversations(prompt: str | Messages | None, shared: Messages, where: str) -> Messages:
    """`shared`, compared with the prompt that the row also names."""
    agrees = prompt is None or (
        prompt in [message["content"] for message in shared] if isinstance(prompt, str) else prompt == shared
    )
    if not agrees:
        raise ValueError(f"{where}: the prompt is not what chosen and rejected start with; allowed: the same messages, "
                         "the text of one of them, or responses without the prompt")
    return shared


def _response(side: str | Messages, name: str, where: str) -> str:
    if isinstance(side, str):
        return side
    roles = [message["role"] for message in side]
    if roles != ["assistant"]:
        raise ValueError(f"{where}: field {name!r} has messages by {', '.join(roles)} after the prompt; "
                         "allowed: one, by assistant")
    return only_content(side[0], f"{where}: the response in field {name!r}")
