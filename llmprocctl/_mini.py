"""MessagePack, as much of it as MessagePack-RPC needs, without an import.

A command line lives for milliseconds: a codec that takes thirty to import is not worth its speed here.
Law: what this packs every other codec reads, and the other way round; extension types are refused.
"""

TYPE_CHECKING = False  # `typing` costs more than this module
if TYPE_CHECKING:
    from typing import Any


class TruncatedError(Exception):
    """The value is not all there; it cannot be before the buffer holds `need` bytes."""

    def __init__(self, need: int) -> None:
        super().__init__(f"at least {need} bytes")
        self.need = need


class Skipper:
    """Finds where a value ends, however many pieces it comes in, without building it.

    Decoding from the start again for each piece would cost the square of the length.
    """

    def __init__(self) -> None:
        self.pos = 0  # where the next token begins
        self.left: int = 1  # values still to come

    def ends(self, buf: bytes | bytearray) -> bool:
        """Step over what has arrived; True when the value is all there, and ends at `pos`.

        Args:
            buf: all of the value that has arrived, from its first byte. Raises ValueError.
        """
        pos, left, end = self.pos, self.left, len(buf)
        while left and pos < end:
            token: int = buf[pos]
            stop = pos + 1
            if 0x80 <= token < 0xC0:
                if token < 0xA0:
                    left += (token & 15) * (2 if token < 0x90 else 1)
                else:
                    stop += token & 31
            elif token < 0xE0 and token > 0xC3:
                kind, width = _WIDTHS.get(token) or _refuse(token)
                stop += width
                if stop > end:
                    break
                if kind not in {"int", "uint", "float"}:
                    number = int.from_bytes(buf[pos + 1 : stop], "big")
                    left += number if kind == "array" else 2 * number if kind == "map" else 0
                    stop += number if kind in {"bin", "str"} else 0
            pos = stop
            left -= 1
        self.pos, self.left = pos, left
        return not left and pos <= end


def pack(value: "Any") -> bytes:
    """Encode None, bool, int, float, str, bytes, and lists, tuples and dicts of them.

    Raises TypeError for anything else, OverflowError for an integer that no 64 bits hold.
    """
    out = bytearray()
    _pack(value, out)
    return bytes(out)


def unpack(buf: bytes | bytearray, pos: int = 0) -> "tuple[Any, int]":
    """Decode one value.

    Args:
        buf: where it is.
        pos: where it begins.

    Returns:
        The value and where it ends. Raises TruncatedError, or ValueError for what is no MessagePack.
    """
    end = len(buf)
    if pos >= end:
        raise TruncatedError(pos + 1)
    token = buf[pos]
    pos += 1
    if token < 0x80:
        return token, pos
    if token < 0x90:
        return _map(buf, pos, token & 15)
    if token < 0xA0:
        return _array(buf, pos, token & 15)
    if token < 0xC0:
        stop = pos + (token & 31)
        if stop > end:
            raise TruncatedError(stop)
        return buf[pos:stop].decode("utf-8", "surrogateescape"), stop
    if token >= 0xE0:
        return token - 256, pos
    if token in _CONSTANTS:
        return _CONSTANTS[token], pos
    return _long(buf, pos, token)


def _long(buf: bytes | bytearray, pos: int, token: int) -> "tuple[Any, int]":
    """A value whose first byte is followed by a number: its own, or its length."""
    kind, width = _WIDTHS.get(token) or _refuse(token)
    stop = pos + width
    if stop > len(buf):
        raise TruncatedError(stop)
    if kind == "float":
        return _float(bytes(buf[pos:stop])), stop
    number = int.from_bytes(buf[pos:stop], "big", signed=kind == "int")
    if kind in {"int", "uint"}:
        return number, stop
    if kind == "array":
        return _array(buf, stop, number)
    if kind == "map":
        return _map(buf, stop, number)
    if stop + number > len(buf):
        raise TruncatedError(stop + number)
    data = bytes(buf[stop : stop + number])
    return (data if kind == "bin" else data.decode("utf-8", "surrogateescape")), stop + number


def _refuse(token: int) -> tuple[str, int]:
    raise ValueError(f"byte 0x{token:02x} is no MessagePack that is known here")


def _array(buf: bytes | bytearray, pos: int, count: int) -> "tuple[list[Any], int]":
    if pos + count > len(buf):  # every value takes a byte: do not begin in vain
        raise TruncatedError(pos + count)
    items: list[Any] = []
    for _ in range(count):
        item, pos = unpack(buf, pos)
        items.append(item)
    return items, pos


def _map(buf: bytes | bytearray, pos: int, count: int) -> "tuple[dict[Any, Any], int]":
    if pos + 2 * count > len(buf):
        raise TruncatedError(pos + 2 * count)
    items: dict[Any, Any] = {}
    for _ in range(count):
        key, pos = unpack(buf, pos)
        if isinstance(key, (list, dict)):
            raise ValueError("a map's key is an array or a map")  # noqa: TRY004 - the bytes are wrong, not a type
        items[key], pos = unpack(buf, pos)
    return items, pos


def _pack(value: "Any", out: bytearray) -> None:
    if value is None:
        out.append(0xC0)
    elif value is True or value is False:
        out.append(0xC3 if value else 0xC2)
    elif isinstance(value, int):
        _pack_int(value, out)
    elif isinstance(value, str):
        data = value.encode("utf-8", "surrogateescape")
        _head(out, len(data), 0xA0, 31, (0xD9, 0xDA, 0xDB))
        out += data
    elif isinstance(value, (bytes, bytearray)):
        _head(out, len(value), 0, -1, (0xC4, 0xC5, 0xC6))
        out += value
    elif isinstance(value, (list, tuple)):
        _pack_array(value, out)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, dict):
        _pack_map(value, out)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, float):
        out.append(0xCB)
        out += _double(value)
    else:
        raise TypeError(f"{type(value).__name__} cannot be sent")


def _pack_array(items: "list[Any] | tuple[Any, ...]", out: bytearray) -> None:
    _head(out, len(items), 0x90, 15, (0, 0xDC, 0xDD))
    for item in items:
        _pack(item, out)


def _pack_map(items: "dict[Any, Any]", out: bytearray) -> None:
    _head(out, len(items), 0x80, 15, (0, 0xDE, 0xDF))
    for key, item in items.items():
        _pack(key, out)
        _pack(item, out)


def _head(out: bytearray, count: int, short: int, limit: int, tokens: tuple[int, int, int]) -> None:
    """The first bytes of a text, bytes, an array or a map: the shortest form that holds the count."""
    if count <= limit:
        out.append(short | count)
    elif tokens[0] and count < 1 << 8:
        out += bytes((tokens[0], count))
    elif count < 1 << 16:
        out.append(tokens[1])
        out += count.to_bytes(2, "big")
    else:
        out.append(tokens[2])
        out += count.to_bytes(4, "big")


def _pack_int(value: int, out: bytearray) -> None:
    if -32 <= value < 128:
        out.append(value & 0xFF)
        return
    for power in range(4):
        bits = 8 << power
        if 0 <= value < 1 << bits:
            out.append(0xCC + power)
            out += value.to_bytes(1 << power, "big")
            return
        if value < 0 and value >= -(1 << (bits - 1)):
            out.append(0xD0 + power)
            out += value.to_bytes(1 << power, "big", signed=True)
            return
    raise OverflowError(f"{value} does not fit into 64 bits")


def _float(data: bytes) -> float:
    from struct import unpack as unstruct

    return unstruct(">f" if len(data) == 4 else ">d", data)[0]


def _double(value: float) -> bytes:
    from struct import pack as struct

    return struct(">d", value)


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_WIDTHS = {
    0xC4: ("bin", 1), 0xC5: ("bin", 2), 0xC6: ("bin", 4), 0xCA: ("float", 4), 0xCB: ("float", 8),
    0xCC: ("uint", 1), 0xCD: ("uint", 2), 0xCE: ("uint", 4), 0xCF: ("uint", 8),
    0xD0: ("int", 1), 0xD1: ("int", 2), 0xD2: ("int", 4), 0xD3: ("int", 8),
    0xD9: ("str", 1), 0xDA: ("str", 2), 0xDB: ("str", 4), 0xDC: ("array", 2), 0xDD: ("array", 4),
    0xDE: ("map", 2), 0xDF: ("map", 4),
}  # fmt: skip
