"""YAML, strictly: the plain values that a config is made of, and one line for anything else."""

import json
import os
from pathlib import Path
import re
from typing import Any

import yaml

from jaxrl_fp16.config.refusals import ConfigError

MAX_BYTES = 1 << 20         # a config is a page or two; a data file passed by mistake is refused early


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars, and no part of YAML that a config has no use for.

    PyYAML follows 1.1, where `1e-6` is text, `no` is false and `1:30` is 90.
    """

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        # Without aliases a few bytes cannot grow into gigabytes; without tags a scalar is what it looks like.
        if event.anchor is not None:
            raise _refused("anchors and aliases are not allowed", event)
        if getattr(event, "tag", None) is not None:
            raise _refused(f"the tag {event.tag!r} is not allowed", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag != self.DEFAULT_SCALAR_TAG:
                raise _refused("a key must be text", key)
            if key.value in seen:
                raise _refused(f"the key {key.value!r} is given twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refused(problem: str, at) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something other than text."""

    def ignore_aliases(self, data):
        return True


for _tag, _pattern, _first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
        ("float", r"[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)",
         list("-+.0123456789"))):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), _first)


def parse(text: str, source: str) -> Any:
    """The value that YAML text holds: None, bool, int, float, str, or lists and dicts of them.

    Raises:
      ConfigError: naming `source` and the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)      # a SafeLoader with less in it
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}, line {mark.line + 1}" if mark else source
        raise ConfigError(f"{place}: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: nested too deeply") from None
    except ValueError as error:         # an integer of thousands of digits
        raise ConfigError(f"{source}: {error}") from None


def dump(value: Any) -> str:
    """Plain values as YAML that `parse` reads back as they were."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def show(value: Any) -> str:
    """A value as it would be written in a YAML line, cut to fit a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def read_mapping(path: Path) -> dict[str, Any]:
    """What one file holds."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(f"{path}: {size:,} bytes; a config file has at most {MAX_BYTES:,}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start})") from None
    content = parse(text, str(path))
    if not isinstance(content, dict):
        # Its kind alone: the file may be anything that `extends` leads to, and none of its text is for the console.
        found = "nothing" if content is None else "a list" if isinstance(content, list) else "one value"
        raise ConfigError(f"{path}: holds {found}; a mapping of keys to values is wanted")
    return content


def read_chain(path: str | os.PathLike, seen: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """A file and those that it extends (`extends: other.yaml`, relative to the file itself).

    Returns `(path, mapping)` for each, the one that extends nothing first.
    """
    path = Path(path)
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself, by way of {' -> '.join(p.name for p in seen)}")
    content = read_mapping(path)
    parent = content.pop("extends", None)
    if parent is None:
        return [(str(path), content)]
    if not isinstance(parent, str):
        raise ConfigError(f"extends: {show(parent)} is not allowed; allowed: the path of one file ({path})")
    if not (path.parent / parent).is_file():
        raise ConfigError(f"extends: {show(parent)} is no file beside {path}")
    return [*read_chain(path.parent / parent, (*seen, path.resolve())), (str(path), content)]
