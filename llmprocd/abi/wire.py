"""MessagePack-RPC frames to values and back; does no I/O.

Law: the same bytes give the same frames, however they were cut.
Law: nothing is built from a frame before its length and its depth are known to be small.
Law: a Framer raises nothing; what is wrong with a frame is a value too (`Refused`).

The protocol has no length prefix. Nearly always one chunk is one frame, so the whole chunk is decoded first.
Else a walk over the tokens finds where the frame ends. That walk is ours, not msgspec's skipper, because it
tells the depth as well, goes on where it stopped (a frame that dribbles in costs no more than one that comes
whole, so no bound on the number of pieces is needed), refuses two gigabytes when their header is read and not
when they have arrived, and does not hang on the wording of another's error messages. On small frames the two
are equally fast; a full chunk of one-byte tokens takes the walk about 15 ms.
"""

from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import msgspec

from llmprocd.abi.errno import Errno, KernelError

MAX_REQUEST: Final = 1 << 20
"""The longest frame a daemon reads, in bytes."""

MAX_DEPTH: Final = 32
"""How deep arrays and maps of a frame may nest: some decoders recurse, and so may ours."""

MAX_IN_FLIGHT: Final = 128
"""Requests of one connection that may wait at a time, and replies that may wait for the disk."""

Shape: TypeAlias = Literal["array", "nvim", "string"]
"""How a connection wants its errors (`hello`)."""


class Request(msgspec.Struct, array_like=True, tag=0, frozen=True, forbid_unknown_fields=True):
    """A call. `method` and `params` are not decoded: see `name` and `arguments`."""

    msgid: int
    method: msgspec.Raw
    params: msgspec.Raw


class Response(msgspec.Struct, array_like=True, tag=1, frozen=True, forbid_unknown_fields=True):
    """What a call came to. `error` is msgpack's nil when it went well."""

    msgid: int
    error: msgspec.Raw
    result: msgspec.Raw


class Notification(msgspec.Struct, array_like=True, tag=2, frozen=True, forbid_unknown_fields=True):
    """A word that wants no answer."""

    method: msgspec.Raw
    params: msgspec.Raw


class Refused(msgspec.Struct, frozen=True):
    """A frame that is none of the three. After a `fatal` one nothing more can be read from that stream."""

    msgid: int | None
    errno: Errno
    text: str
    fatal: bool


Frame: TypeAlias = Request | Response | Notification | Refused


class Answer(msgspec.Struct, frozen=True):
    """What a call gives back: a result, and the commit that must be durable before it leaves (0: none)."""

    result: object
    ticket: int = 0


class Framer:
    """Bytes in, frames out."""

    __slots__ = ("_buf", "_deepest", "_left", "_pos", "_stack", "_stuck", "limit")

    def __init__(self, limit: int = MAX_REQUEST) -> None:
        self.limit = limit
        self._buf = bytearray()
        self._stuck = False
        self._restart()

    def feed(self, chunk: bytes) -> Sequence[Frame]:
        """All frames that end in this chunk, in order.

        Args:
            chunk: what was read, of any length.

        Returns:
            Frames; the last may be a fatal `Refused`, and then every later call returns none.
        """
        if not self._buf and not self._stuck and len(chunk) <= self.limit:
            whole = _whole(chunk)
            if whole is not None:
                return (whole,)
        return () if self._stuck else self._feed_slowly(chunk)

    def _feed_slowly(self, chunk: bytes) -> list[Frame]:
        self._buf += chunk
        frames: list[Frame] = []
        while self._buf:
            frame = self._next()
            if frame is None:
                break
            frames.append(frame)
            if isinstance(frame, Refused) and frame.fatal:
                self._stuck = True
                self._buf.clear()
        return frames

    def _next(self) -> Frame | None:
        """Take the frame the buffer begins with. None: it is not all there."""
        if not (self._buf[0] >> 4 == 9 or self._buf[0] in _ARRAY_HEADERS):
            return _hopeless(
                Errno.EPROTO, self._buf, self.limit
            )  # why wait for the rest of what is no message
        fault = self._walk()
        if fault is None and self._pos > self.limit:
            fault = Errno.EMSGSIZE
        if fault is not None:
            return _hopeless(fault, self._buf, self.limit)
        if self._left or self._pos > len(self._buf):
            return None
        frame = _frame(bytes(self._buf[: self._pos]), self._deepest)
        del self._buf[: self._pos]
        self._restart()
        return frame

    def _restart(self) -> None:
        self._pos = 0  # where the next token begins; it may lie beyond what has arrived
        self._left = 1  # values still to come at this level; 0 when the frame is complete
        self._stack: list[int] = []  # the same for the levels around it
        self._deepest = 0

    def _walk(self) -> Errno | None:
        """Step over the tokens that have arrived; the errno of a stream that cannot be read on."""
        buf, stack, pos, left, end = self._buf, self._stack, self._pos, self._left, len(self._buf)
        while left and pos < end:
            token = buf[pos]
            size = _SIZES[token]
            if size:
                pos += size
                left -= 1
            else:
                width, children, extra = _LONG[token]
                if width < 0:
                    return Errno.EPROTO
                start = pos + 1 + width
                if start > end:
                    break
                count = int.from_bytes(buf[pos + 1 : start], "big") if width else token & 15
                if count > self.limit:
                    return Errno.EMSGSIZE
                pos = start
                left -= 1
                if children:
                    stack.append(left)
                    left = count * children
                    self._deepest = max(self._deepest, len(stack))
                else:
                    pos += count + extra
            while not left and stack:
                left = stack.pop()
        self._pos, self._left = pos, left
        return None


def name(method: msgspec.Raw) -> str:
    """The method that str or bin spells; EINVAL for anything else."""
    raw = bytes(method)
    kind = raw[0]
    try:
        if 0xA0 <= kind <= 0xBF:
            return raw[1:].decode()
        if kind in _TEXT_HEADERS:
            return raw[_TEXT_HEADERS[kind] :].decode()
    except UnicodeDecodeError:
        raise KernelError(Errno.EINVAL, "the method's name is not UTF-8") from None
    raise KernelError(Errno.EINVAL, "the method's name is neither str nor bin")


def arguments(params: msgspec.Raw) -> bytes:
    """The msgpack of the one map in `params`, b"" when there is none; EINVAL for anything else."""
    raw = bytes(params)
    if raw[0] >> 4 == 9:
        count, start = raw[0] & 15, 1
    elif raw[0] in _ARRAY_HEADERS:
        start = _ARRAY_HEADERS[raw[0]]
        count = int.from_bytes(raw[1:start], "big")
    else:
        raise KernelError(Errno.EINVAL, "params is not an array")
    if not count:
        return b""
    if count == 1 and (raw[start] >> 4 == 8 or raw[start] in {0xDE, 0xDF}):
        return raw[start:]
    raise KernelError(Errno.EINVAL, "params holds something other than one map of named arguments")


def request(msgid: int, method: str, params: object = None) -> bytes:
    """The frame of a call.

    Args:
        msgid: 0 to 2**32 - 1, not in use on this connection.
        method: e.g. `proc.list`.
        params: the map of named arguments, or a Struct; None for none.
    """
    return _encode((0, msgid, method, () if params is None else (params,)))


def reply(msgid: int, result: object) -> bytes:
    """The frame of a result."""
    return _encode((1, msgid, None, result))


def refusal(msgid: int, error: KernelError, shape: str = "array") -> bytes:
    """The frame of an error, in the shape this connection asked for."""
    return _encode((1, msgid, error_object(error, shape), None))


def notification(method: str, params: object) -> bytes:
    """The frame of a notification with one argument."""
    return _encode((2, method, (params,)))


def error_object(error: KernelError, shape: str = "array") -> object:
    """An error as a client reads it.

    `array` is for everybody. Neovim's rpcrequest shows only `[0, text]`; Go's net/rpc codecs hang up on
    anything but a string.
    """
    text = str(error)
    if shape == "string":
        return text
    if shape == "nvim":
        return [0, text]
    return [int(error.errno), text, {"name": error.errno.name, **error.data}]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Request | Response | Notification).decode

_SHORT = 4096  # counting bytes in a longer chunk costs more than walking over its few tokens
_NOT_CONTAINERS = bytes(c for c in range(256) if not (0x80 <= c <= 0x9F or 0xDC <= c <= 0xDF))


def _whole(chunk: bytes) -> Frame | None:
    """The frame that this chunk is. None: it is several, a part of one, a bad one, or perhaps deep."""
    if len(chunk) > _SHORT or len(chunk.translate(None, _NOT_CONTAINERS)) > MAX_DEPTH:
        return None
    try:
        return _decode(chunk)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _frame(frame: bytes, depth: int) -> Frame:
    """What a complete frame says, or why it says nothing."""
    if depth > MAX_DEPTH:
        return _bad(frame, f"nested {depth} deep, {MAX_DEPTH} is the limit")
    try:
        return _decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        return _bad(frame, str(exc))


def _bad(frame: bytes, why: str) -> Refused:
    msgid = _msgid(frame)
    if msgid is None:
        return Refused(None, Errno.EPROTO, f"no MessagePack-RPC message: {why}", fatal=True)
    return Refused(msgid, Errno.EINVAL, f"bad request: {why}", fatal=False)


def _hopeless(errno: Errno, buf: bytearray, limit: int) -> Refused:
    if errno is Errno.EMSGSIZE:
        return Refused(_msgid(buf), errno, f"request longer than {limit} bytes", fatal=True)
    return Refused(None, errno, "no MessagePack-RPC message", fatal=True)


def _msgid(frame: bytes | bytearray) -> int | None:
    """The msgid of a frame, complete or not, that seems to be a request. None when it cannot be read."""
    start = 1 if frame[0] >> 4 == 9 else _ARRAY_HEADERS.get(frame[0], 0)
    kind, start = _integer(frame, start) if start else (None, 0)
    if kind in {None, 1, 2}:  # responses and notifications are not answered
        return None
    return _integer(frame, start)[0]


def _integer(buf: bytes | bytearray, pos: int) -> tuple[int | None, int]:
    """The integer at `pos` and where it ends; None when there is no whole one."""
    token = buf[pos] if pos < len(buf) else 0xC1
    if token < 0x80:
        return token, pos + 1
    if token >= 0xE0:
        return token - 256, pos + 1
    end = pos + 1 + (1 << (token & 3))
    if not 0xCC <= token <= 0xD3 or end > len(buf):
        return None, pos
    return int.from_bytes(buf[pos + 1 : end], "big", signed=token >= 0xD0), end


_ARRAY_HEADERS = {0xDC: 3, 0xDD: 5}  # beside the short form 0x90-0x9f; bytes before the first item
_TEXT_HEADERS = {0xC4: 2, 0xC5: 3, 0xC6: 5, 0xD9: 2, 0xDA: 3, 0xDB: 5}


def _sizes() -> list[int]:
    """Bytes of each token whose first byte tells it all; 0 for the others."""
    sizes = [0] * 256
    for token in (*range(0x80), *range(0xE0, 0x100), 0xC0, 0xC2, 0xC3):
        sizes[token] = 1
    for token in range(0xA0, 0xC0):
        sizes[token] = 1 + (token & 31)
    for token, width in ((0xCC, 1), (0xCD, 2), (0xCE, 4), (0xCF, 8), (0xCA, 4), (0xCB, 8)):
        sizes[token] = 1 + width
    for power, (signed, fixext) in enumerate(zip(range(0xD0, 0xD4), range(0xD4, 0xD8), strict=True)):
        sizes[signed] = 1 + (1 << power)
        sizes[fixext] = 2 + (1 << power)
    sizes[0xD8] = 18
    return sizes


def _long() -> dict[int, tuple[int, int, int]]:
    """For the other tokens: width of the count, values per unit of it (0: it counts bytes), bytes besides."""
    table = {token: (0, 2 if token < 0x90 else 1, 0) for token in range(0x80, 0xA0)}
    for power in range(3):
        table[0xC4 + power] = (1 << power, 0, 0)  # bin
        table[0xC7 + power] = (1 << power, 0, 1)  # ext
        table[0xD9 + power] = (1 << power, 0, 0)  # str
    for power in (1, 2):
        table[0xDB + power] = (1 << power, 1, 0)  # array
        table[0xDD + power] = (1 << power, 2, 0)  # map
    table[0xC1] = (-1, 0, 0)  # never used by MessagePack
    return table


_SIZES: Final = _sizes()
_LONG: Final = _long()
