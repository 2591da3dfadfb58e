"""Frames: what goes in comes out, and what is none is refused."""

import array
import json

from hypothesis import given
from hypothesis import strategies as st
import pytest

from jaxrl_fp16.engines.child import LENGTHS, LONGEST_BODY, LONGEST_HEADER, FrameError, lengths_of, pack, unpack

INTEGERS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5)
FLOATS = st.lists(st.floats(width=32, allow_nan=False), max_size=5)


def parts(frame):
    joined = b"".join(frame)
    header, body = lengths_of(joined[:16])
    assert len(joined) == 16 + header + body
    return joined[16:16 + header], joined[16 + header:]


@given(INTEGERS, FLOATS, st.text(max_size=5))
def test_what_goes_in_comes_out(integers, floats, text):
    frame = pack({"op": text}, ids=array.array("i", integers), values=array.array("f", floats))
    header, arrays = unpack(*parts(frame))
    assert header == {"op": text} and list(arrays) == ["ids", "values"]
    assert arrays["ids"].tolist() == integers and arrays["values"].tolist() == floats


@pytest.mark.parametrize("lengths", [(LONGEST_HEADER + 1, 0), (0, LONGEST_BODY + 1), (2**63, 2**63)])
def test_a_frame_beyond_the_limits_is_refused_before_it_is_read(lengths):
    with pytest.raises(FrameError, match="a frame of"):
        lengths_of(LENGTHS.pack(*lengths))


@pytest.mark.parametrize("header, body", [
    (b"{", b""), (b"[]", b""), (b"{}", b""), (b"\xff\xff", b""), (b'{"arrays": 3}', b""), (b'{"arrays": [["a"]]}', b""),
    ({"arrays": [["a", "int32", 2]]}, b"1234"), ({"arrays": [["a", "int32", 1]]}, b"12345678"),
    ({"arrays": [["a", "int64", 1]]}, b"12345678"), ({"arrays": [["a", "int32", -1]]}, b""),
    ({"arrays": [["a", "int32", 1], ["a", "int32", 1]]}, b"12345678"), ({"arrays": [["a", "int32", "1"]]}, b"1234"),
    ({"arrays": [["a", "int32", 1.5]]}, b"123456"), ({"arrays": [[[], "int32", 1]]}, b"1234"),
])
def test_what_is_no_frame_is_refused(header, body):
    with pytest.raises(FrameError):
        unpack(header if isinstance(header, bytes) else json.dumps(header).encode(), body)


def test_a_header_holds_no_number_that_is_none():
    with pytest.raises(ValueError):
        pack({"value": float("nan")})
