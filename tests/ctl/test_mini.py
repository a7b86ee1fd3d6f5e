"""The little codec against a large one."""

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprocctl import _mini

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=20)
        | st.dictionaries(st.text(max_size=40) | st.integers(0, 9), inner, max_size=20)
    ),
    max_leaves=40,
)


def theirs(data):
    return msgpack.unpackb(data, strict_map_key=False)


@settings(max_examples=2000, deadline=None)
@given(VALUES)
def test_both_codecs_read_what_either_wrote(value):
    """What one packs the other unpacks, in both directions."""
    assert theirs(_mini.pack(value)) == value
    packed = msgpack.packb(value)
    assert _mini.unpack(packed) == (value, len(packed))


@settings(max_examples=300, deadline=None)
@given(VALUES, st.data())
def test_a_value_that_is_cut_short_is_truncated_and_says_how_much_is_missing(value, data):
    """Any prefix raises TruncatedError, which asks for no more than the whole."""
    packed = msgpack.packb(value)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(_mini.TruncatedError) as caught:
        _mini.unpack(packed[:cut])
    assert cut < caught.value.need <= len(packed)


@settings(max_examples=300, deadline=None)
@given(VALUES, st.integers(1, 50), st.binary(max_size=5))
def test_the_skipper_finds_the_end_however_the_value_is_cut(value, step, rest):
    """In pieces of any length, with something behind it, the end is where it is."""
    packed = msgpack.packb(value)
    skipper = _mini.Skipper()
    arrived, ended = bytearray(), False
    for begin in range(0, len(packed + rest), step):
        assert not ended or len(arrived) >= len(packed)
        arrived += (packed + rest)[begin : begin + step]
        ended = ended or skipper.ends(arrived)
    assert ended
    assert skipper.pos == len(packed)


@pytest.mark.parametrize("size", [0, 31, 32, 255, 256, 65_535, 65_536, 70_000])
def test_lengths_around_every_border(size):
    """Texts, bytes, arrays and maps at the lengths where their headers change."""
    for value in ("x" * size, b"x" * size, [1] * size, dict.fromkeys(range(size), 0)):
        assert theirs(_mini.pack(value)) == value
        assert _mini.unpack(msgpack.packb(value))[0] == value


def test_single_precision_floats_are_read():
    """Other encoders send four-byte floats."""
    assert _mini.unpack(msgpack.packb(1.5, use_single_float=True))[0] == 1.5


@pytest.mark.parametrize("data", [b"\xc1", b"\xc7\x01\x05x", b"\xd4\x01x", b"\x81\x90\x01"])
def test_what_is_no_plain_value_is_refused(data):
    """Reserved bytes, extension types and containers as keys raise ValueError."""
    with pytest.raises(ValueError, match=r"0x|key"):
        _mini.unpack(data)


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j])
def test_what_cannot_be_sent_is_refused(value):
    """A type without a form on the wire is a TypeError."""
    with pytest.raises(TypeError):
        _mini.pack(value)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_integers_beyond_64_bits_are_refused(value):
    """Nothing is cut off."""
    with pytest.raises(OverflowError):
        _mini.pack(value)
