"""Frames: every cut gives the same values, and hostile bytes give a value too."""

import itertools

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprocd.abi import wire
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.wire import Framer, Notification, Refused, Request, Response

NIL = msgspec.Raw(b"\xc0")
SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30
)
MESSAGES = (
    st.tuples(st.just(0), st.integers(0, 2**32 - 1), st.text() | st.binary(), st.lists(VALUES))
    | st.tuples(st.just(1), st.integers(0, 2**32 - 1), VALUES, VALUES)
    | st.tuples(st.just(2), st.text(), st.lists(VALUES))
    | st.tuples(st.integers(0, 4), VALUES, VALUES)
)


def read(data: bytes, *cuts: int, limit: int = wire.MAX_REQUEST) -> list[wire.Frame]:
    """All frames of these bytes, cut at these places."""
    framer = Framer(limit)
    places = [0, *sorted(cuts), len(data)]
    chunks = [data[a:b] for a, b in itertools.pairwise(places)]
    return [frame for chunk in chunks if chunk for frame in framer.feed(chunk)]


def the_refusal(data: bytes, limit: int = wire.MAX_REQUEST) -> Refused:
    (frame,) = read(data, limit=limit)
    assert isinstance(frame, Refused)
    return frame


def pack(*fields: object) -> bytes:
    return msgpack.packb(fields)


def test_a_request_is_an_array_of_four_that_begins_with_zero():
    """MessagePack-RPC to the letter: [0, msgid, method, params]."""
    assert wire.request(7, "proc.list") == b"\x94\x00\x07\xa9proc.list\x90"
    (frame,) = read(b"\x94\x00\x07\xa9proc.list\x90")
    assert isinstance(frame, Request)
    assert (frame.msgid, wire.name(frame.method), wire.arguments(frame.params)) == (7, "proc.list", b"")


def test_replies_and_notifications_are_what_the_protocol_says():
    """[1, msgid, error, result] and [2, method, params], as another's decoder reads them."""
    assert msgpack.unpackb(wire.reply(3, {"pid": 7})) == [1, 3, None, {"pid": 7}]
    assert msgpack.unpackb(wire.notification("event", {"sub": 1})) == [2, "event", [{"sub": 1}]]
    assert msgpack.unpackb(wire.request(4, "proc.get", {"pid": 7})) == [0, 4, "proc.get", [{"pid": 7}]]


def test_a_response_and_a_notification_are_read_without_being_decoded():
    """The daemon builds nothing from what a client sends before it knows the type it wants."""
    assert read(pack(1, 9, None, "ok")) == [Response(9, NIL, msgspec.Raw(b"\xa2ok"))]
    assert read(pack(2, "n", [])) == [Notification(msgspec.Raw(b"\xa1n"), msgspec.Raw(b"\x90"))]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("array", [3, "ESRCH: no such process: 99", {"name": "ESRCH", "pid": 99}]),
        ("nvim", [0, "ESRCH: no such process: 99"]),
        ("string", "ESRCH: no such process: 99"),
    ],
)
def test_errors_come_in_the_shape_that_was_asked_for(shape, expected):
    """Three families of clients show three shapes."""
    error = KernelError(Errno.ESRCH, "no such process: 99", pid=99)
    assert msgpack.unpackb(wire.refusal(5, error, shape)) == [1, 5, expected, None]


@pytest.mark.parametrize("method", ["proc.list", b"proc.list", "x" * 40, b"x" * 300, "é" * 40_000])
def test_a_method_may_be_str_or_bin(method):
    """Some clients have only one kind of string."""
    (frame,) = read(pack(0, 1, method, []))
    assert isinstance(frame, Request)
    assert wire.name(frame.method) == (method if isinstance(method, str) else method.decode())


@pytest.mark.parametrize("method", [None, 5, {}, [], ["a"], {"a": 1}, b"\xff\xfe"])
def test_a_method_that_is_no_name_is_einval(method):
    """A map is not looked up in a table: it would not even hash."""
    (frame,) = read(pack(0, 1, method, []))
    assert isinstance(frame, Request)
    with pytest.raises(KernelError) as caught:
        wire.name(frame.method)
    assert caught.value.errno is Errno.EINVAL


@pytest.mark.parametrize("header", [b"\x90", b"\xdc\x00\x00", b"\xdd\x00\x00\x00\x00"])
def test_no_arguments_in_any_spelling(header):
    """An encoder may write the length of an array in one, three or five bytes."""
    assert wire.arguments(msgspec.Raw(header)) == b""


@pytest.mark.parametrize("header", [b"\x91", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01"])
@pytest.mark.parametrize("args", [b"\x80", b"\x81\xa3pid\x07", b"\xde\x00\x00", b"\xdf\x00\x00\x00\x00"])
def test_one_map_in_any_spelling(header, args):
    """What is handed on is the map's own bytes."""
    assert wire.arguments(msgspec.Raw(header + args)) == args


@pytest.mark.parametrize("params", [5, "x", {}, None, [1], [None], [[]], [{}, {}], [{}, 1], ["x"] * 20])
def test_anything_but_one_map_is_einval(params):
    """Arguments are named; positional ones are refused, not guessed."""
    with pytest.raises(KernelError) as caught:
        wire.arguments(msgspec.Raw(msgpack.packb(params)))
    assert caught.value.errno is Errno.EINVAL


@pytest.mark.parametrize(
    "fields",
    [
        (0, 7),
        (0, 7, "proc.list"),
        (0, 7, "proc.list", [], 1),
        (3, 7, "proc.list", []),
        (0, 2**32 - 1, "x"),
        (0, -5, "x"),
        (0, -500, "x"),
    ],
)
def test_a_bad_frame_whose_msgid_can_be_read_is_einval(fields):
    """The client learns which request it was, and the stream goes on."""
    good = pack(0, 8, "proc.list", [])
    refused, request = read(pack(*fields) + good)
    assert isinstance(refused, Refused)
    assert (refused.msgid, refused.errno, refused.fatal) == (fields[1], Errno.EINVAL, False)
    assert isinstance(request, Request)
    assert request.msgid == 8


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"\x94\x00\x07\xc1\x90",
        b"\x05",
        b"\x80",
        b"\x90",
        b"\xc0",
        b"GET / HTTP/1.1\r\n\r\n",
        pack(0, "seven", "x", []),
        pack(0, None, "x", []),
        pack(0, True, "x", []),
        pack("0", 7, "x", []),
        pack(1, 7),
        pack(2, "x"),
        pack(2),
        b"\x93\x00\xc4\x01a\xc0",
    ],
)
def test_what_is_no_message_ends_the_stream(data):
    """There is nobody to answer, and no telling where the next message begins."""
    refused = the_refusal(data)
    assert (refused.msgid, refused.errno, refused.fatal) == (None, Errno.EPROTO, True)


def test_frames_before_a_bad_one_are_not_lost_and_none_come_after():
    """A fault is read in its place among the frames."""
    framer = Framer()
    first, last = framer.feed(pack(0, 1, "a", []) + b"\xc1" + pack(0, 2, "b", []))
    assert isinstance(first, Request)
    assert isinstance(last, Refused)
    assert framer.feed(pack(0, 3, "c", [])) == ()


def test_every_split_gives_the_same_frames():
    """Two cuts at every pair of places of a stream with every kind of token."""
    tokens = [
        1,
        -1,
        -100,
        200,
        -200,
        70_000,
        -70_000,
        2**40,
        -(2**40),
        1.5,
        True,
        None,
        "s",
        "s" * 40,
        "s" * 300,
    ]
    tokens += [b"b", b"b" * 300, list(range(20)), {i: i for i in range(20)}, {}, [], msgpack.ExtType(5, b"x")]
    tokens += [msgpack.ExtType(5, b"x" * 2**n) for n in range(1, 6)]
    data = pack(0, 1, "m", [{"t": tokens}]) + pack(2, b"n", []) + pack(0, 70_000, "m", [])
    whole = read(data)
    assert [type(f) for f in whole] == [Request, Notification, Request]
    for i in range(1, len(data)):
        assert read(data, i) == whole
    for i in range(1, len(data), 7):
        for j in range(i, len(data), 11):
            assert read(data, i, j) == whole


@given(st.lists(MESSAGES, min_size=1, max_size=6), st.data())
def test_random_splits_decode_identically(messages, data):
    """The law of this file, for other people's encoder."""
    stream = b"".join(map(msgpack.packb, messages))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    assert read(stream, *cuts) == read(stream) == read(stream, *range(len(stream)))


@given(st.binary(max_size=200), st.data())
def test_garbage_raises_nothing_and_does_not_depend_on_the_cut(stream, data):
    """Any bytes at all: frames, or one fatal refusal at the end."""
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    frames = read(stream)
    assert read(stream, *cuts) == frames
    assert not any(isinstance(f, Refused) and f.fatal for f in frames[:-1])


@given(VALUES)
def test_a_frame_ends_where_other_peoples_decoder_says(value):
    """The walk over the tokens and msgpack's agree on any value, and on the arguments it is cut to."""
    stream = pack(0, 1, "m", [{"v": value}])
    (frame,) = read(stream, 1)
    assert isinstance(frame, Request)
    assert msgspec.Raw(msgpack.packb({"v": value})) == msgspec.Raw(wire.arguments(frame.params))


def nest(depth: int, empty: bytes = b"\x90", level: bytes = b"\x91") -> bytes:
    """A request that nests so deep; its own array and its params are two of the levels."""
    return b"\x94\x00\x07\xa1m" + level * (depth - 2) + empty


@pytest.mark.parametrize(
    "level", [b"\x91", b"\x81\xa1k", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01", b"\xdf\x00\x00\x00\x01\x05"]
)
def test_nesting_is_refused_beyond_32_and_answered(level):
    """The depth is known before anything recursive runs, whatever the nesting is spelt in."""
    assert isinstance(read(nest(wire.MAX_DEPTH, level=level))[0], Request)
    refused = the_refusal(nest(wire.MAX_DEPTH + 1, level=level))
    assert (refused.msgid, refused.errno, refused.fatal) == (7, Errno.EINVAL, False)


def test_two_hundred_thousand_levels_are_one_refusal():
    """No recursion of ours or msgspec's is reached."""
    refused, request = read(nest(200_000) + pack(0, 8, "m", []))
    assert isinstance(refused, Refused)
    assert "200000 deep" in refused.text
    assert isinstance(request, Request)


def test_many_shallow_containers_are_not_deep():
    """Counting brackets is only a first look: siblings do not nest."""
    assert isinstance(read(pack(0, 7, "m", [{"a": [[]] * 500}]))[0], Request)
    assert isinstance(read(pack(0, 7, "m", [{"a": "ÄÖÜ" * 500}]))[0], Request)


@pytest.mark.parametrize(
    "value",
    [
        b"\xc6\x7f\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
    ],
)
def test_a_gigabyte_is_refused_when_its_header_is_read(value):
    """Nothing is stored in the hope of the rest."""
    refused = the_refusal(b"\x94\x00\x07\xa1m\x91" + value)
    assert (refused.msgid, refused.errno, refused.fatal) == (7, Errno.EMSGSIZE, True)


@pytest.mark.parametrize("extra", [0, 1])
def test_the_limit_is_exact(extra):
    """One MiB is read, a byte more is not; whole or in pieces."""
    room = wire.MAX_REQUEST - len(pack(0, 7, "m", [{"d": b"x" * 70_000}])) + 70_000
    data = pack(0, 7, "m", [{"d": b"x" * (room + extra)}])
    assert len(data) == wire.MAX_REQUEST + extra
    for cuts in ((), (5,), (500, 70_000), range(0, len(data), 65_536)):
        (frame,) = read(data, *cuts)
        assert isinstance(frame, Refused if extra else Request)
        assert frame.msgid == 7


def test_a_long_frame_of_small_tokens_is_refused_when_it_passes_the_limit():
    """The msgid is found in what has arrived."""
    data = b"\x94\x00\xcd\x01\x00\xa1m\xdd\x00\x00\x03\x00" + b"\xcd\x01\x01" * 400
    refused = the_refusal(data, limit=1000)
    assert (refused.msgid, refused.errno) == (256, Errno.EMSGSIZE)


def test_a_small_frame_obeys_a_small_limit():
    """The short cut for whole chunks is no way round it."""
    assert the_refusal(wire.request(7, "m" * 30), limit=20).errno is Errno.EMSGSIZE


def test_a_frame_that_comes_byte_by_byte_is_read():
    """Slow is not hostile: the work for a piece does not grow with what is there already."""
    data = pack(0, 7, "m", [{"d": list(range(2000))}])
    framer = Framer()
    frames = [frame for i in range(len(data)) for frame in framer.feed(data[i : i + 1])]
    assert [f.msgid for f in frames if isinstance(f, Request)] == [7]
