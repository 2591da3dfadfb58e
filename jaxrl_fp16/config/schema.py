"""What a config class says of itself, and an instance as plain values."""

from collections.abc import Collection, Mapping
import dataclasses
import enum
import os
from pathlib import Path
import types
import typing
from typing import Any, NamedTuple

from jaxrl_fp16.config import yaml_files


@dataclasses.dataclass(frozen=True)
class Doc:
    """What a field means, inside its `Annotated`."""

    text: str


class Field(NamedTuple):
    """One row of `describe`."""

    key: str        # dotted; `[]` stands for a list's items
    type: str       # with its bounds or choices
    default: str    # as YAML, or "required"
    doc: str


def join(key: str, name: str) -> str:
    """The dotted key of `name` inside the section `key`; a root section is ""."""
    return f"{key}.{name}" if key else name


def is_required(field: dataclasses.Field) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def bare(hint):
    """The type without its `Annotated`."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def members(hint) -> tuple:
    """The members of a union, or the type alone."""
    union = typing.get_origin(bare(hint)) in (typing.Union, types.UnionType)
    return typing.get_args(bare(hint)) if union else (hint,)


def sections(hint) -> list[type]:
    """The dataclasses somewhere inside a type."""
    hint = bare(hint)
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [section for argument in typing.get_args(hint) for section in sections(argument)]


_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", types.NoneType: "null",
          Path: "path", dict: "mapping", Any: "anything"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "min_length": "length >=", "max_length": "length <="}


def type_text(hint) -> str:
    """A type in a person's words, with its bounds or choices: `integer >= 1`, `cpu | gpu`."""
    plain = bare(hint)
    container, arguments = typing.get_origin(plain), typing.get_args(plain)
    bounds = " and ".join(f"{sign} {getattr(item, name)}" for item in getattr(hint, "__metadata__", ())
                          for name, sign in _SIGNS.items() if getattr(item, name, None) is not None)
    if container in (typing.Union, types.UnionType):
        texts = [type_text(member) for member in arguments]     # the bounds are of what is not null
        return " or ".join(text if text == "null" or not bounds else f"{text} {bounds}" for text in texts)
    if container is typing.Literal:
        text = " | ".join(str(choice) for choice in arguments)
    elif dataclasses.is_dataclass(plain):
        text = f"a section of {', '.join(field.name for field in dataclasses.fields(plain))}"
    elif container in (list, tuple):
        fixed = container is tuple and arguments[-1] is not Ellipsis
        text = f"list of {f'{len(arguments)} x ' if fixed else ''}{type_text(arguments[0])}"
    else:
        text = _NAMES.get(container or plain, str(plain))
    return f"{text} {bounds}" if bounds else text


def _docs(hint) -> list[str]:
    return [item.text for item in getattr(hint, "__metadata__", ()) if isinstance(item, Doc)]


def describe(cls: type, prefix: str = "", defaults: Any = None) -> list[Field]:
    """Every key of `cls` in order of declaration, for `--help` and the docs; `defaults`, an
    instance of `cls`, stands in for the class's own."""
    hints, rows = typing.get_type_hints(cls, include_extras=True), []
    for field in dataclasses.fields(cls):
        hint, key, default = hints[field.name], join(prefix, field.name), field.default
        if defaults is not None:
            default = getattr(defaults, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if not dataclasses.is_dataclass(bare(hint)):
            doc = _docs(hint)
            shown = "required" if default is dataclasses.MISSING else yaml_files.show(to_dict(default))
            rows.append(Field(key, type_text(hint), shown, doc[0] if doc else ""))
        about = _docs(hint)
        listed = any(typing.get_origin(bare(member)) in (list, tuple) for member in members(hint))
        for section in sections(hint):
            own = default if isinstance(default, section) else None
            inner = describe(section, key + "[]" if listed else key, own)
            # What a class says of its fields is said of one of several of its kind, as of an optimizer.
            named = about and dataclasses.is_dataclass(bare(hint))
            rows += [row._replace(doc=f"{row.doc} ({about[0]})") for row in inner] if named else inner
    return rows


def to_dict(value: Any) -> Any:
    """A config as plain dicts, lists and scalars, defaults included."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return {name: to_dict(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {name: to_dict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, os.PathLike) else value


def to_yaml(config: Any) -> str:
    """The resolved config as YAML; `load_config` of it gives an equal config."""
    return yaml_files.dump(to_dict(config))


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    parts = [_flatten(item, join(key, name)) for name, item in value.items()]
    return {leaf: found for part in parts for leaf, found in part.items()}


def diff(old: Any, new: Any, ignore: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """The dotted keys whose values differ, as `{key: (old, new)}`.

    `ignore` names keys that may differ; a section's name covers its keys. A key that
    one side lacks counts as null.
    """
    before, after = _flatten(to_dict(old)), _flatten(to_dict(new))
    changed = {key: (before.get(key), after.get(key)) for key in {**before, **after}
               if before.get(key) != after.get(key)}
    return {key: pair for key, pair in changed.items()
            if not any(f"{key}.".startswith(f"{name}.") for name in ignore)}
