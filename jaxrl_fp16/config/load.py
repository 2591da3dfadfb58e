"""YAML files into nested frozen dataclasses, every value checked.

A module owns its config class and documents each field where it is declared:

    @dataclass(frozen=True)
    class RunConfig:
        steps: Annotated[int, Ge(1), Doc("RL iterations")] = 100
        platform: Annotated[Literal["auto", "cpu", "gpu", "tpu"], Doc("where JAX runs")] = "auto"

Sections nest by using such a class as a field's type; `tuple[Section, ...]`,
`dict[str, Section]` and `Section | None` work too. A `ValueError` from
`__post_init__` becomes a `ConfigError` that names the section. Nothing here
imports JAX.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
import dataclasses
import difflib
import functools
import json
import os
from pathlib import Path
import re
import typing
from typing import Any, TypeVar

from jaxrl_fp16.config import schema, yaml_files
from jaxrl_fp16.config.refusals import ConfigError
from jaxrl_fp16.config.schema import describe, join
from jaxrl_fp16.config.yaml_files import show

T = TypeVar("T")
COMMAND_LINE = "command line"
LARGEST = {int: 2**31 - 1, float: 3.4e38}   # JAX computes in 32 bits


class _Text(str):
    """A value typed on the command line: how it reads depends on the field that it is for."""


class _Bare(_Text):
    """What `--key` alone stands for: true, where the field is true or false."""


def load_config(cls: type[T], path: str | os.PathLike,
                overrides: Sequence[tuple[str, str]] | Sequence[str] = (), unused: Collection[str] = ()) -> T:
    """Reads a YAML file (and those that it extends) into `cls`, a nested frozen dataclass.

    Args:
      path: of the file. Its `extends: other.yaml` is relative to itself; mappings
        merge, lists and scalars replace.
      overrides: what remains of the command line, `["--optimizer.learning_rate", "2e-6"]`,
        or pairs of key and text. Text for a field that takes text is kept as it is;
        any other is read as YAML. `--key` alone is true, where the field is true or false.
        A later one wins.
      unused: sections that the caller does not read: one whose own `__post_init__` refuses it is left at its
        defaults.

    Raises:
      ConfigError: one line, for anything in the files or overrides that is unknown,
        of the wrong type, out of range, missing, or not plain YAML.
    """
    return _build_root(cls, [*yaml_files.read_chain(path), *_override_layers(overrides)], unused)


def parse_config(cls: type[T], mapping: Mapping[str, Any], source: str = "mapping") -> T:
    """Like `load_config`, from a mapping of plain values; `source` is named in errors."""
    return _build_root(cls, [(source, dict(mapping))])


def load_unchecked(cls: type, path: str | os.PathLike) -> dict[str, Any]:
    """The plain values of a file that `to_yaml` wrote, whichever keys it has, over the defaults of `cls`.

    For comparing: no value is checked, as it may be right on another machine, or have been right in its time. Raises
    ConfigError for what is no mapping in plain YAML.
    """
    mappings = (mapping for _, mapping in yaml_files.read_chain(path))
    return functools.reduce(_merge, mappings, schema.to_dict(cls()))


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """`["--a.b", "1", "--c=2", "--d"]` into `[("a.b", "1"), ("c", "2"), ("d", "true")]`.

    Raises ConfigError for anything else. What `--d` alone gives is refused by
    `load_config` where the field is not true or false.
    """
    pairs, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not _is_key(argument):
            raise ConfigError(f"{show(argument)} is not allowed; allowed: --key VALUE ({COMMAND_LINE})")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = _Bare("true") if not rest or _is_key(rest[0]) else rest.pop(0)
        pairs.append((key, value))
    return pairs


def _is_key(argument: str) -> bool:
    return re.match(r"--[A-Za-z_]", argument) is not None


def _override_layers(overrides) -> Iterator[tuple[str, dict]]:
    if overrides and isinstance(overrides[0], str):
        overrides = parse_overrides(overrides)
    for key, text in overrides:
        node: Any = text if isinstance(text, _Bare) else _Text(text)
        for part in reversed(key.split(".")):
            node = {part: node}
        yield COMMAND_LINE, node


def _merge(base: dict, over: dict) -> dict:
    """Mappings are merged key by key; anything else is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# --- building ---------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where values came from, for messages."""

    root: type
    layers: Sequence[tuple[str, dict]]      # (file or "command line", its mapping); later ones win
    unused: Collection[str] = ()            # sections that may be at fault

    def of(self, key: str) -> str:
        for source, node in reversed(self.layers):
            for part in re.split(r"[.\[]", key):
                if not isinstance(node, dict):      # a key inside a list belongs to who wrote the list
                    return source
                if part not in node:
                    break
                node = node[part]
            else:
                return source
        files = [source for source, _ in self.layers if source != COMMAND_LINE]
        return files[-1]

    def refuse(self, key: str, value, allowed: str) -> ConfigError:
        return ConfigError(f"{key}: {show(value)} is not allowed; allowed: {allowed} ({self.of(key)})")


def _build_root(cls, layers, unused=()):
    merged = functools.reduce(_merge, (mapping for _, mapping in layers))
    return _section(cls, merged, "", _Origin(cls, layers, unused))


def _section(cls, value: dict, key: str, origin: _Origin):
    """A dataclass from a mapping."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name in value:
        if name not in fields:
            raise _unknown(name, key, fields, origin)
    built = {name: _build(hints[name], item, join(key, name), origin) for name, item in value.items()}
    for name, field in fields.items():
        if name in built or not schema.is_required(field):
            continue
        if not dataclasses.is_dataclass(schema.bare(hints[name])):
            wanted = schema.type_text(hints[name])
            raise ConfigError(f"{join(key, name)} is missing; allowed: {wanted} ({origin.of(key)})")
        built[name] = _section(schema.bare(hints[name]), {}, join(key, name), origin)
    try:
        return cls(**built)
    except ConfigError:
        raise
    except ValueError as error:
        if key.partition(".")[0] in origin.unused:
            return cls()
        raise ConfigError(f"{key + ': ' if key else ''}{error} ({origin.of(key)})") from error


def _build(hint, value, key: str, origin: _Origin):
    """Any value: a section, a list or mapping of sections, or a leaf."""
    if not schema.sections(hint):
        return _leaf(hint, value, key, origin)
    if isinstance(value, _Text):
        value = _parse(value, key)
    for member in map(schema.bare, schema.members(hint)):
        container, arguments = typing.get_origin(member), typing.get_args(member)
        if isinstance(value, dict) and dataclasses.is_dataclass(member):
            return _section(member, value, key, origin)
        if isinstance(value, dict) and container is dict:
            return {name: _build(arguments[1], item, join(key, name), origin) for name, item in value.items()}
        if isinstance(value, (list, tuple)) and container in (list, tuple):
            items = enumerate(value)
            return container(_build(arguments[0], item, f"{key}[{i}]", origin) for i, item in items)
    leaves = tuple(member for member in schema.members(hint) if not schema.sections(member))
    if not leaves or isinstance(value, dict):
        raise origin.refuse(key, value, schema.type_text(hint))
    return _leaf(typing.Union[leaves], value, key, origin, schema.type_text(hint))


def _leaf(hint, value, key: str, origin: _Origin, allowed: str | None = None):
    """A value without sections, by pydantic in strict JSON mode: an int may stand for a float and a
    list for a tuple, but true is no number and "1" no int."""
    from pydantic import ValidationError  # here: tasks' workers import this package, and do without pydantic

    if isinstance(value, _Text):
        value = _read_text(hint, value, key)
    value = _read_inner_text(value, key)
    try:
        found = _adapter(hint).validate_json(json.dumps(value, allow_nan=False))
        limit = _limit_passed(found)
        if limit is None:
            return found
        allowed = f"{allowed or schema.type_text(hint)}, up to {show(limit)}"
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] != "missing":      # of an item that is not there, pydantic shows the whole list
            key += "".join(f"[{part}]" for part in first["loc"] if isinstance(part, int))
            value = first["input"]
    except (ValueError, TypeError):     # nan and infinity are no JSON, nor is an object
        pass
    raise origin.refuse(key, value, allowed or schema.type_text(hint))


def _limit_passed(found):
    """LARGEST of a number, or of one in a tuple, that is beyond it; None where none is."""
    items = found if isinstance(found, tuple) else (found,)
    return next((LARGEST[type(item)] for item in items if type(item) in LARGEST and abs(item) > LARGEST[type(item)]),
                None)


@functools.cache
def _adapter(hint):
    """Pydantic's check of a type."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))


def _parse(text: _Text, key: str):
    """A command-line value as YAML."""
    if isinstance(text, _Bare):
        raise ConfigError(f"--{key} has no value; allowed: --{key} VALUE ({COMMAND_LINE})")
    return yaml_files.parse(text, f"{COMMAND_LINE}, --{key}")


def _read_text(hint, text: _Text, key: str):
    """A command-line value for `hint`: text where the field takes text, unless another of its types
    (null, a number) fits; YAML where it takes none."""
    members = schema.members(hint)
    if isinstance(text, _Bare) and bool in map(schema.bare, members):
        return True
    others = tuple(member for member in members if schema.bare(member) not in (str, Path))
    if isinstance(text, _Bare) or others == members:
        return _parse(text, key)
    try:
        value = yaml_files.parse(text, COMMAND_LINE) if text else ""
        _adapter(typing.Union[others]).validate_json(json.dumps(value))
        return value
    except (ValueError, TypeError):     # Union[()] is a TypeError: text is all that it takes
        return str(text)


def _read_inner_text(value, key: str):
    """The same inside a free-form mapping, whose values have no type of their own."""
    if isinstance(value, _Text):
        return _parse(value, key)
    if isinstance(value, dict):
        return {name: _read_inner_text(item, f"{key}.{name}") for name, item in value.items()}
    return value


def _unknown(name: str, key: str, fields: Collection[str], origin: _Origin) -> ConfigError:
    near = [join(key, match) for match in difflib.get_close_matches(name, fields, n=1)]
    near += [row.key for row in describe(origin.root) if row.key.rpartition(".")[2] == name]
    advice = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(fields)}"
    return ConfigError(f"unknown key {join(key, name)}; {advice} ({origin.of(join(key, name))})")
