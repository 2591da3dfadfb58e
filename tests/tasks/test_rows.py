"""Files as people have them: each format is read, or refused by the name of what it is."""

from functools import partial
import gzip
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from jaxrl_fp16.tasks.rows import BOM, field_of, read_rows, without_fields

ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "é 漢 🙂?", "answer": 3}]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
LIST = json.dumps(ROWS).encode()
compress = partial(gzip.compress, mtime=0)  # names of tests hold what it gives


def put(tmp_path, content, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def rows_of(path):
    return [row for _, row in read_rows(path)]


@pytest.mark.parametrize("content", [
    LINES, BOM + LINES, LINES.replace(b"\n", b"\r\n\r\n"), b"\n \n" + LINES + b"\n", LIST, BOM + LIST + b"\n",
    json.dumps(ROWS, indent=2).encode(), b"\n" + LIST, b"\n".join(json.dumps(row).encode() for row in ROWS),
], ids=["lines", "BOM", "CRLF", "blank", "list", "BOM, list", "list over lines", "list after a blank", "escapes"])
@pytest.mark.parametrize("pack", [bytes, compress], ids=["plain", "gzip"])
def test_what_is_read(tmp_path, content, pack):
    assert rows_of(put(tmp_path, pack(content), "data.of.any.name")) == ROWS


def test_two_gzip_members_are_one_file(tmp_path):
    first, second = (json.dumps(row).encode() + b"\n" for row in ROWS)
    assert rows_of(put(tmp_path, compress(first) + compress(second))) == ROWS


@pytest.mark.parametrize("content, message", [
    (b"PK\x03\x04....", "data.jsonl: a zip archive, by its first bytes; allowed: JSONL or a JSON list of objects"),
    (b"BZh91AY&SY", "a bzip2 file"), (b"\xfd7zXZ\x00", "an xz file"), (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"ARROW1\0\0", "an Arrow file"), (b"\xff\xff\xff\xff\x10", "an Arrow stream"), (b"ORC\x08", "an ORC file"),
    (b"Obj\x01", "an Avro file"), (b"SQLite format 3\0", "an SQLite database"), (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x80\x04\x95", "a pickle"), (b"\x93NUMPY", "a NumPy array"), (b"<!DOCTYPE html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer, not the file"),
    (b"a" * 257 + b"ustar", "a tar archive"), (compress(b"a" * 257 + b"ustar"), "unpacked: a tar archive"),
    ("{}".encode("utf-16"), "line 1: not UTF-8 but UTF-16"), ("{}".encode("utf-16-le"), "line 1: not UTF-8 but UTF-16"),
    ("{}".encode("utf-32"), "UTF-32 text"), (b'{"a": "\xe9"}', "line 1: not UTF-8"),
    (compress(LINES)[:-12], "data.jsonl: a damaged gzip file"), (b"\x1f\x8bnothing", "a damaged gzip file"),
    (compress(b""), "no rows"), (compress(b"{"), "line 1: not JSON"),
    (b"problem,answer\n1+1,2\n", "line 1: not JSON .*: it begins with 'problem,answer'; allowed: JSONL"),
    (b"problem\tanswer\n", r"it begins with 'problem\\tanswer'"),
    (b'{\n "problem": "1"\n}', "begins with a JSON object over several lines; allowed: one object a line, or a list"),
    (b'[\n {"a": 1},\n 2]', "begins with a JSON list of other things over several lines"),
    (LINES.replace(b"\n", b"\r"), "line 1: not JSON .*: its lines end with a carriage return alone"),
    (b"{'problem': 1}", "line 1: not JSON"), (b'{"a": 1,}', "line 1: not JSON"), (LIST[:-1], "line 1: not JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
    (b'{"a": 1}\n{"answer": "2", "answer": "3"}', "line 2: key 'answer' is there twice; allowed: once"),
    (b'{"a": {"b": 1, "b": 1}}', "line 1: key 'b' is there twice"), (b'[{"b": 1, "b": 1}]', "key 'b' is there twice"),
    (b'{"a": 1}\n{"a": "1\\ud800+1"}', r"line 2: text '1\\ud800\+1' holds half of a surrogate pair"),
    (b'{"a": [{"\\uDC00": 1}]}', "line 1: text .* holds half of a surrogate pair"),
    (b'[{"a": 1}, {"a": "\\udfff"}]', "row 2: text .* holds half of a surrogate pair"),
    (b'{"a": "\xed\xa0\x80"}', "line 1: not UTF-8"),
])
def test_what_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        rows_of(put(tmp_path, content))


def test_whole_pairs_of_surrogates_are_read(tmp_path):
    assert rows_of(put(tmp_path, b'{"a": "\\ud83d\\ude42 \\\\ud800"}')) == [{"a": "🙂 \\ud800"}]


def test_a_folder_is_named_as_one(tmp_path):
    with pytest.raises(ValueError, match="is a folder; allowed: a file"):
        rows_of(tmp_path)


# -- parquet ---------------------------------------------------------------------------------------


class FakeParquet:
    """What is used of `pyarrow.parquet`, over JSON after the first bytes."""

    def __init__(self, path):
        with open(path, "rb") as file:
            self.rows = json.loads(file.read().removeprefix(b"PAR1"))

    def iter_batches(self):
        return map(FakeBatch, (self.rows[:1], self.rows[1:]))


class FakeBatch(list):
    schema = SimpleNamespace(names=["problem", "answer", "raw", "picture", "when"])

    def to_pylist(self):
        return [{**row, "raw": b"x", "picture": b"\xff", "when": complex(1)} for row in self]


def test_parquet_through_its_package(tmp_path, monkeypatch):
    package, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    package.parquet, parquet.ParquetFile = parquet, FakeParquet
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    found = list(read_rows(put(tmp_path, b"PAR1" + LIST)))
    assert [row for _, row in found] == [{**row, "raw": "x", "picture": None, "when": "(1+0j)"} for row in ROWS]
    assert found[1][0].endswith("data.jsonl, row 2")
    with pytest.raises(ValueError, match="data.jsonl: a parquet file that cannot be read"):
        rows_of(put(tmp_path, b"PAR1" + LIST[:-1]))
    monkeypatch.setattr(FakeBatch, "schema", SimpleNamespace(names=["problem", "answer", "answer"]))
    with pytest.raises(ValueError, match="cannot be read .column 'answer' is there twice; allowed: once"):
        rows_of(put(tmp_path, b"PAR1" + LIST))


def test_real_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"ground_truth": "2"}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    assert rows_of(tmp_path / "data.parquet") == rows
    twice = pyarrow.Table.from_arrays([pyarrow.array([b"a"])] * 2, names=["answer", "answer"])
    parquet.write_table(twice, tmp_path / "data.parquet")
    with pytest.raises(ValueError, match="column 'answer' is there twice"):
        rows_of(tmp_path / "data.parquet")


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"a parquet file.*needs the package `pyarrow`.*jaxrl_fp16\[parquet\]"):
        rows_of(put(tmp_path, b"PAR1"))


# -- fields ----------------------------------------------------------------------------------------


def test_dotted_names():
    row = {"a": {"b": {"c": 1, "d": 2}}, "a.x": 3, "e": 4}
    assert [field_of(row, name, "here") for name in ("a.b.c", "a.x", "e", "a.b")] == [1, 3, 4, {"c": 1, "d": 2}]
    assert without_fields(row, ["a.b.c", "e", "no"]) == {"a": {"b": {"d": 2}}, "a.x": 3}
    assert row["a"]["b"]["c"] == 1
    for name in ("a.c", "e.f", "a.b.c.d"):
        with pytest.raises(ValueError, match=f"here: no field '{name}'; the row has 'a.b', 'a.x', 'e'"):
            field_of(row, name, "here")
