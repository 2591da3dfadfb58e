"""What a reward model reads: a problem and a response as one text, by a template of its own."""

import dataclasses
from typing import Annotated, Callable

from annotated_types import Ge

from jaxrl_fp16.config import Doc
from jaxrl_fp16.tasks.examples import Example
from jaxrl_fp16.tasks.messages import apply_chat_template
from jaxrl_fp16.tasks.templates import FIELD, Template, render


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """A reward model in place of the task's own reward, for training; evaluation keeps the task's."""

    path: Annotated[
        str | None,
        Doc("Hugging Face folder of a reward model, a sequence classifier with one label; null: the task's reward"),
    ] = None
    tokenizer: Annotated[str | None, Doc("folder of the reward model's tokenizer; null: task.reward_model.path")] = None
    template: Annotated[
        str | None,
        Doc("what the reward model reads, a text with {response} and {problem} or {prompt}; null: the tokenizer's "
            "chat template, problem and response as turns of user and assistant, or, where it has none, prompt and "
            "response as they are"),
    ] = None
    max_length: Annotated[
        int, Ge(1), Doc("longest text for the reward model, in tokens; the reward of a longer one counts as failed")
    ] = 1024
    rows: Annotated[int, Ge(1), Doc("texts that the reward model scores at once")] = 32
    precision: Annotated[str | None, Doc("precision of the reward model; null: the run's")] = None


# (prompt as the policy read it, response, example) -> text
Write = Callable[[str, str, Example], str]


def make_writer(template: str | None, tokenizer) -> Write:
    """How a response becomes a reward model's text, special tokens included. Raises `ValueError` for a
    template without a response."""
    if template is not None:
        return _fill(template)
    return _as_chat(tokenizer) if tokenizer.chat_template is not None else lambda prompt, response, example: (
        prompt + response)


def _fill(text: str) -> Write:
    names = [name for command, name in FIELD.findall(text) if not command]
    if "response" not in names:
        raise ValueError(f"template is {text!r}; allowed: a text with the field {{response}}, and with {{problem}} or "
                         "{prompt}")
    template = Template("reward model", text)

    def write(prompt, response, example):
        fields = {**example.fields, "prompt": prompt, "response": response}
        return render(template, dataclasses.replace(example, fields=fields, messages=()))

    return write


def _as_chat(tokenizer) -> Write:
    def write(prompt, response, example):
        asked = list(example.messages) or [{"role": "user", "content": example.problem}]
        return apply_chat_template(tokenizer, [*asked, {"role": "assistant", "content": response}])

    return write
