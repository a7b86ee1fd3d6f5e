"""Tables, trees and text for people.

Law: what a model wrote cannot move the cursor, colour the screen or turn the direction of writing: on a
terminal its control characters are shown, not obeyed; in a table they always are.
Law: no colour and no cut where stdout is no terminal.
"""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any


def is_terminal() -> bool:
    """Whether a person reads stdout."""
    return os.isatty(1)


def is_coloured() -> bool:
    """Whether colours are wanted there."""
    return is_terminal() and not os.environ.get("NO_COLOR", "") and os.environ.get("TERM", "") != "dumb"


def put(text: str) -> None:
    """Write to stdout; OSError when that cannot be."""
    put_bytes(text.encode("utf-8", "backslashreplace"))


def put_bytes(data: bytes) -> None:
    """Write to stdout, all of it; OSError when that cannot be."""
    view = memoryview(data)
    while view:
        view = view[os.write(1, view[: 1 << 20]) :]


def put_json(values: "Iterable[Any]") -> None:
    """One JSON value a line."""
    from json import dumps

    lines = [dumps(value, ensure_ascii=False, default=_as_text) for value in values]
    if lines:
        put(text("\n".join(lines)) + "\n")


def put_table(rows: "Sequence[Sequence[str]]", headers: "Sequence[str]", right: "Iterable[int]" = ()) -> None:
    """A table with as wide columns as their cells; the last one is not padded.

    Args:
        rows: cells, escaped already.
        headers: of all columns; none is printed when all are "".
        right: the columns that are numbers.
    """
    lines = [tuple(headers), *rows] if any(headers) else list(rows)
    if not lines:
        return
    widths = [max(map(width, column)) for column in zip(*lines, strict=True)]
    numbers = set(right)
    screen = os.get_terminal_size(1).columns if is_terminal() else 0
    put("".join(_line(cells, widths, numbers, screen) for cells in lines))


def shown(text: str) -> str:
    """Text of many lines, for a terminal: control characters but tab and newline are shown as escapes."""
    return text.translate(_controls())


def cell(text: str) -> str:
    """Text on one line: newlines and tabs are shown too."""
    if text.isascii() and text.isprintable():
        return text
    return shown(text.replace("\n", "\\n").replace("\t", "\\t"))


def text(words: str) -> str:
    """A model's text as it goes to stdout: exact, or made harmless for a terminal."""
    return shown(words) if is_terminal() else words


def dim(words: str) -> str:
    """What is said beside the text."""
    return f"\x1b[2m{words}\x1b[0m" if is_coloured() else words


def cut(words: str, columns: int) -> str:
    """As much of a text as fits; 0 columns are without end."""
    if not columns or width(words) <= columns:
        return words
    while width(words) >= columns and words:
        words = words[: max(columns - 1, 0)] if len(words) > columns else words[:-1]
    return words + ">"


def width(words: str) -> int:
    """How many columns a text takes."""
    if words.isascii():
        return len(words)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in words)


def forest(parents: "dict[int, int]") -> "list[tuple[int, str]]":
    """A tree in the order it is drawn.

    Args:
        parents: the parent of each node. One that is not in it is no node: its children are roots.

    Returns:
        Each node, and what is drawn before it.
    """
    children: dict[int, list[int]] = {}
    for node, parent in parents.items():
        children.setdefault(parent if parent in parents and parent != node else -1, []).append(node)
    drawn: list[tuple[int, str]] = []
    stack = [(node, "", "") for node in reversed(children.get(-1, []))]
    while stack:
        node, before, below = stack.pop()
        drawn.append((node, before))
        kids = children.get(node, [])
        last = len(kids) - 1
        stack.extend(
            (kids[i], f"{below} \\_ ", below + (" |  " if i < last else "    ")) for i in range(last, -1, -1)
        )
    return drawn


def _line(cells: "Sequence[str]", widths: list[int], numbers: set[int], screen: int) -> str:
    padded: list[str] = []
    for i, words in enumerate(cells):
        gap = " " * (widths[i] - width(words))
        padded.append(gap + words if i in numbers else words + gap)
    return cut(" ".join(padded).rstrip(), screen) + "\n"


def _as_text(value: object) -> str:
    """JSON of bytes: the text that they are, else base64."""
    if not isinstance(value, bytes):
        raise TypeError(f"{type(value).__name__} is no JSON")
    try:
        return value.decode()
    except UnicodeDecodeError:
        from base64 import b64encode

        return "base64:" + b64encode(value).decode()


_table: dict[int, str] = {}


def _controls() -> dict[int, str]:
    """C0, DEL, C1, and what turns the direction of writing."""
    if not _table:
        bad = [*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F]
        bad += [*range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
        _table.update({c: f"\\x{c:02x}" if c < 0x100 else f"\\u{c:04x}" for c in bad})
    return _table
