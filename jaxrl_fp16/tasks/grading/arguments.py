"""What a reward function of a user's own is called with: lists of one entry a response, by the names of its parameters.

Runs in the workers.
"""

import inspect
from typing import Any, Callable, Mapping, Sequence

IN_ORDER = ("prompts", "responses", "examples")
BY_NAME = ("prompts", "responses", "completions", "examples")
# (prompts, responses, examples) -> positional and named arguments
Fill = Callable[[list[str], list[str], list[dict[str, Any]]], tuple[Sequence[Any], Mapping[str, Any]]]


def fill_by_name(name: str, function: Callable, columns: Mapping[str, str]) -> tuple[Fill, str]:
    """How to call `function`, and a line to say of it; "" for none.

    Filled are `prompts`, `responses` (or `completions`), `examples`, the names of `columns`, and all of these for
    `**kwargs`. Three parameters of other names get the first three in order, which the line says.

    columns: from a column's name to its key in an example.

    Raises TypeError for a parameter that nothing fills and that has no default.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # of a builtin
        return _in_order, ""
    kinds = {parameter.kind for parameter in parameters}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    known = {*BY_NAME, *columns}
    if inspect.Parameter.POSITIONAL_ONLY in kinds or inspect.Parameter.VAR_POSITIONAL in kinds and not named:
        return _in_order, ""
    required = [each for each in named if each.default is each.empty]
    unknown = [each.name for each in required if each.name not in known]
    if unknown and _has_three_places(required):
        return _in_order, (f"task.reward_file: the parameters of {name}, {', '.join(each.name for each in required)}, "
                           f"are filled in this order: {', '.join(IN_ORDER)}")
    if unknown:
        raise TypeError(f"{name} has the parameter {unknown[0]!r}; allowed: prompts, responses or completions, "
                        f"examples, a column of the data ({', '.join(sorted(columns))}), **kwargs")
    wanted = known if takes_all else {each.name for each in named} & known
    defaults = {each.name for each in named if each.default is not each.empty}

    def fill(prompts, responses, examples):
        given = {"prompts": prompts, "responses": responses, "completions": responses, "examples": examples}
        for column in wanted - given.keys():
            if all(columns[column] in example for example in examples):
                given[column] = [example[columns[column]] for example in examples]
            elif column in {each.name for each in named} - defaults:
                raise ValueError(f"{name} asks for the column {column!r}, which a row lacks")
        return (), {key: value for key, value in given.items() if key in wanted}

    return fill, ""


def _in_order(prompts, responses, examples):
    return (prompts, responses, examples), {}


def _has_three_places(required: Sequence[inspect.Parameter]) -> bool:
    """Whether three positions are to fill, none of whose names is one of a different place."""
    places = {"completions": 1, **{each: place for place, each in enumerate(IN_ORDER)}}
    return len(required) == 3 and all(
        each.kind is each.POSITIONAL_OR_KEYWORD and places.get(each.name, place) == place
        for place, each in enumerate(required)
    )
