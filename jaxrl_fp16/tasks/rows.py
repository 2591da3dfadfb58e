"""Rows of data files and Hub data sets: JSONL, a JSON list, both also gzipped, and parquet.

Which of them a file is, its first bytes say, not its name. What is none of them is refused by the name of what it is.
"""

import gzip
import json
import math
import os
from typing import Any, Iterable, Iterator, Mapping
import zlib

READ = "JSONL or a JSON list of objects in UTF-8, both also gzipped, or parquet"
BOM = b"\xef\xbb\xbf"       # Windows writes it before UTF-8
HEAD = 512                  # bytes that a format is known by

# What a file begins with -> what it is. The longer of two comes first.
_SIGNATURES = (
    (b"\xff\xfe\x00\x00", "UTF-32 text"), (b"\x00\x00\xfe\xff", "UTF-32 text"),
    (b"PK\x03\x04", "a zip archive"), (b"PK\x05\x06", "an empty zip archive"), (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"), (b"\x28\xb5\x2f\xfd", "a zstd file"), (b"\x04\x22\x4d\x18", "an lz4 file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"), (b"Rar!", "a rar archive"), (b"\x1f\x9d", "a compress file"),
    (b"ARROW1", "an Arrow file"), (b"FEA1", "a Feather file"), (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"PARE", "an encrypted parquet file"), (b"ORC", "an ORC file"), (b"Obj\x01", "an Avro file"),
    (b"SQLite format 3\x00", "an SQLite database"), (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"), (b"\xd0\xcf\x11\xe0", "an old Office document"), (b"%PDF-", "a PDF document"),
    (b"{\\rtf", "an RTF document"), (b"\x80\x02", "a pickle"), (b"\x80\x03", "a pickle"), (b"\x80\x04", "a pickle"),
    (b"\x80\x05", "a pickle"), (b"GGUF", "a GGUF model"), (b"\x89PNG", "a picture"), (b"\xff\xd8\xff", "a picture"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file; `git lfs pull` fetches it"),
    (b"<!doctype", "a web page"), (b"<!DOCTYPE", "a web page"), (b"<html", "a web page"), (b"<?xml", "an XML document"),
)


def read_rows(path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`("FILE, line N", row)` of each object of a data file, or `("FILE, row N", row)` where it has no lines.

    Blank lines are passed over. A `ValueError` names the file, and the line where one is at fault: no file, a format
    that is not read, a damaged one, no row, not UTF-8, not JSON, no object, a key twice, half of a surrogate pair.
    """
    if not os.path.isfile(path):
        what = "is a folder; allowed: a file" if os.path.isdir(path) else "no such data file"
        raise ValueError(f"{path}: {what}")
    empty = True
    for where, row in _rows_of(path):
        empty = False
        yield where, row
    if empty:
        raise ValueError(f"{path}: no rows; at least one JSON object is needed")


def read_hub_rows(hub: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The same for a Hugging Face Hub data set; needs the extra `hub`."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"task.hub is {hub!r}, and reading it needs the package `datasets`: "
                         "pip install 'jaxrl_fp16[hub]', or give task.path a JSONL file") from None
    rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(hub, split=split)
    empty = True
    for number, row in enumerate(rows):
        empty = False
        yield f"{hub} ({split}), row {number}", row
    if empty:
        raise ValueError(f"{hub} ({split}): no rows")


def _rows_of(path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"PAR1"):
        return _parquet_rows(path)
    if head.startswith(b"\x1f\x8b"):
        return _unpacked_rows(path)
    _check_format(path, head)
    return _text_rows(path, open)


def _unpacked_rows(path):
    try:
        with gzip.open(path, "rb") as file:
            _check_format(f"{path}, unpacked", file.read(HEAD))
        yield from _text_rows(path, gzip.open)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: a damaged gzip file ({error}); allowed: the whole file") from None


def _check_format(where, head: bytes):
    """Refuses what is no UTF-8 text of JSON, as far as the first bytes tell."""
    found = next((kind for mark, kind in _SIGNATURES if head.startswith(mark)), None)
    if found is None and head[257:262] == b"ustar":
        found = "a tar archive"
    if found is not None:
        raise ValueError(f"{where}: {found}, by its first bytes; allowed: {READ}")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in head[:4]:
        raise ValueError(f"{where}, line 1: not UTF-8 but UTF-16 or UTF-32, by its first bytes; allowed: {READ}")


# -- JSON ------------------------------------------------------------------------------------------


def _text_rows(path, opener) -> Iterator[tuple[str, dict[str, Any]]]:
    listed = _list_of_objects(path, opener)
    if listed is not None:
        yield from listed
        return
    with opener(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    yield where, _parse_row(line, where)
                except _NotJSON as error:
                    raise ValueError(f"{error}{_hint(path, opener, line)}") from None


def _list_of_objects(path, opener):
    """The rows of a file that is one JSON list of objects; None for any other."""
    with opener(path, "rb") as file:
        if not file.read(HEAD).removeprefix(BOM).lstrip().startswith(b"["):
            return None
        file.seek(0)
        text = file.read().removeprefix(BOM)
    try:
        found = _loads(text)
    except _RepeatedKey as error:
        raise ValueError(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        return None     # the line that is at fault is found by reading lines
    if not found or not all(isinstance(row, dict) for row in found):
        return None
    rows = [(f"{path}, row {number}", row) for number, row in enumerate(found, 1)]
    for where, row in rows:
        _check_text(row, text, where)
    return rows


class _NotJSON(ValueError):
    """A line that is no JSON."""


class _RepeatedKey(ValueError):
    """An object that names a key twice."""


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = _loads(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except _RepeatedKey as error:
        raise ValueError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise _NotJSON(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON {type(row).__name__}; a JSON object is needed")
    _check_text(row, line, where)
    return row


def _loads(text: bytes) -> Any:
    return json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)


def _check_text(row: dict[str, Any], source: bytes, where: str):
    """Refuses half of a surrogate pair, which only an escape in `source` gives: decoding refuses the bytes of one."""
    broken = _surrogate_in(row) if b"\\ud" in source.lower() else None
    if broken is not None:
        raise ValueError(f"{where}: text {broken[:40]!a} holds half of a surrogate pair; allowed: whole characters")


def _without_repeats(pairs) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKey(f"key {twice!a} is there twice; allowed: once")
    return found


def _surrogate_in(value: Any) -> str | None:
    """A text within `value` that is not Unicode."""
    if isinstance(value, str):
        return value if any("\ud800" <= character <= "\udfff" for character in value) else None
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for found in map(_surrogate_in, parts) if found is not None), None)


def _hint(path, opener, line: bytes) -> str:
    """What else a file may be whose line is no JSON."""
    line = line.strip()
    if b"\r" in line:
        return ": its lines end with a carriage return alone; allowed: with a newline"
    if not line.startswith((b"{", b"[")):
        return f": it begins with {line[:20].decode('utf-8', 'replace')!a}; allowed: {READ}"
    with opener(path, "rb") as file:
        text = file.read().removeprefix(BOM).decode("utf-8", "replace").lstrip()
    try:
        found, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return ""
    if "\n" not in text[:end]:
        return ""
    kind = "object" if isinstance(found, dict) else "list of other things"
    return f": the file begins with a JSON {kind} over several lines; allowed: one object a line, or a list of objects"


# -- parquet ---------------------------------------------------------------------------------------


def _parquet_rows(path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path}: a parquet file, and reading it needs the package `pyarrow`: "
                         "pip install 'jaxrl_fp16[parquet]', or give a JSONL file") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(os.fspath(path)).iter_batches():
            names = batch.schema.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"column {twice!a} is there twice; allowed: once")
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", _plain(row)
    except (ValueError, OSError, NotImplementedError) as error:  # its own errors are kinds of these
        raise ValueError(f"{path}: a parquet file that cannot be read ({error})") from None


def _plain(value: Any) -> Any:
    """What JSON has too: a date or a decimal number as its text, bytes as the text that they are, or else as null."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


# -- fields ----------------------------------------------------------------------------------------


def has_field(row: Mapping[str, Any], name: str) -> bool:
    """Whether a row has the field, or the one within another that a dotted name means."""
    first, dot, rest = name.partition(".")
    return name in row or bool(dot) and isinstance(row.get(first), Mapping) and has_field(row[first], rest)


def field_of(row: Mapping[str, Any], name: str, where: str) -> Any:
    """The value of a field that must be there: `name`, or for `a.b`, where no field has that name, `b` within `a`."""
    if not has_field(row, name):
        raise ValueError(f"{where}: no field {name!r}; the row has {', '.join(sorted(map(repr, _names(row))))}")
    while name not in row:
        first, _, name = name.partition(".")
        row = row[first]
    return row[name]


def _names(row: Mapping[str, Any]) -> list[str]:
    """Fields, and those within them one deep."""
    inside = [[f"{name}.{part}" for part in value] if value and isinstance(value, Mapping) else [name]
              for name, value in row.items()]
    return [name for names in inside for name in names]


def without_fields(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A copy of the row without these fields, dotted ones too."""
    kept = dict(row)
    for name in names:
        first, dot, rest = name.partition(".")
        if name in kept:
            del kept[name]
        elif dot and isinstance(kept.get(first), Mapping):
            kept[first] = without_fields(kept[first], [rest])
    return kept


def text_of(value: Any, name: str, where: str) -> str:
    """A field's text, or number as text."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where}: field {name!r} is {value}; text or a finite number is needed")
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{where}: field {name!r} is a {type(value).__name__}; text or a number is needed")
    return value
