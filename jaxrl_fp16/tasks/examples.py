"""Problems, and how they are read from data files and Hub data sets."""

import dataclasses
from typing import Any, Iterable, Mapping

from jaxrl_fp16.tasks.grading.answers import gold_answers
from jaxrl_fp16.tasks.messages import last_asked, one_kind, prompt_of, text_or_messages
from jaxrl_fp16.tasks.rows import field_of, read_hub_rows, read_rows, text_of, without_fields

GSM8K = "####"  # what the published rows of GSM8K put between the solution and its answer


@dataclasses.dataclass(frozen=True)
class Example:
    """One problem with what is needed to grade an answer to it."""

    problem: str        # what the prompt asks; of chat messages, the user's last one
    answer: str         # the gold answer, as the data writes it, or the text of a list of them
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the row, less answer and solution
    solution: str = ""  # a target text for supervised training; may be empty. Of a preference, the chosen response
    rejected: str | None = None  # the response that `solution` is preferred to; None: no preference
    messages: tuple[Mapping[str, Any], ...] = ()  # a prompt of chat messages, which takes the template's place

    def for_reward(self) -> dict[str, Any]:
        """The plain dict that reward functions get."""
        return {**self.fields, "problem": self.problem, "answer": self.answer, "solution": self.solution}


def load_examples(path, problem_field: str = "problem", answer_field: str = "answer",
                  solution_field: str | None = None, answered: bool = True) -> list[Example]:
    """Examples of a file that `read_rows` reads. A field's name may be dotted: `reward_model.ground_truth`.

    A problem is text, a number, or a list of chat messages. An answer is text, a number, or a list of them, any of
    which is right; of one with `#### ` in it, as GSM8K writes them, it is what follows. `answered`: whether one that
    is empty is refused.

    A `ValueError` names the file, and the line where one is at fault: what `read_rows` refuses, a field that is absent
    or nothing of the above, an answer that is empty, NaN or infinite, problems of text beside problems of messages.
    """
    return _examples(read_rows(path), _FieldNames(problem_field, answer_field, solution_field, answered))


def load_hub_examples(hub: str, split: str, problem_field: str = "problem", answer_field: str = "answer",
                      solution_field: str | None = None, answered: bool = True) -> list[Example]:
    """The same for a Hugging Face Hub data set; needs the extra `hub`."""
    return _examples(read_hub_rows(hub, split), _FieldNames(problem_field, answer_field, solution_field, answered))


@dataclasses.dataclass(frozen=True)
class _FieldNames:
    problem: str
    answer: str
    solution: str | None
    answered: bool


def _examples(rows: Iterable[tuple[str, Mapping[str, Any]]], names: _FieldNames) -> list[Example]:
    return list(one_kind((where, _example(row, names, where)) for where, row in rows))


def _example(row: Mapping[str, Any], names: _FieldNames, where: str) -> Example:
    asked = field_of(row, names.problem, where)
    messages = prompt_of(text_or_messages(asked, names.problem, where), where) if isinstance(asked, list) else ()
    # The gold answer stays out of `fields`, so that no template can show it to the model.
    hidden = {names.answer, names.solution} - {names.problem, None}
    return Example(
        problem=last_asked(messages) if messages else text_of(asked, names.problem, where),
        answer=gold_text(field_of(row, names.answer, where), names.answer, where, names.answered),
        fields=without_fields(row, hidden),
        solution=text_of(field_of(row, names.solution, where), names.solution, where) if names.solution else "",
        messages=messages,
    )


def gold_text(value: Any, name: str, where: str, needed: bool = True) -> str:
    """A gold answer as text: of a list, the text of a list of texts. Refuses an empty one where it is `needed`."""
    if isinstance(value, (list, tuple)):
        found = [_gold(each, name, where) for each in value]
        text = found[0] if len(found) == 1 else repr(found)
    else:
        found = [_gold(value, name, where)]
        text = found[0]
    if needed and not (found and all(each.strip() for each in (*found, *gold_answers(text)))):
        raise ValueError(f"{where}: field {name!r} is {str(value)[:80]!r}, no answer to grade by; allowed: text, a "
                         "number or a list of them, none empty")
    return text


def _gold(value: Any, name: str, where: str) -> str:
    text = text_of(value, name, where)
    return text.rpartition(GSM8K)[2].strip() if GSM8K in text else text
