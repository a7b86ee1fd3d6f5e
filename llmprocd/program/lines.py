"""On which line a key of a TOML text stands; the standard library's parser forgets it.

Law: the text has been accepted by `tomllib`. So nothing is checked here, and every key that `tomllib` found
is found again, under the same path.
"""

import re
import tomllib
from bisect import bisect_right

Key = tuple[str | int, ...]
"""The way to a value: names of tables and keys, and numbers of list elements from 0."""

_BLANK = re.compile(r"(?:[ \t\n]++|#[^\n]*+)*+")
_KEY = re.compile(r"""[ \t]*+([A-Za-z0-9_-]++|"(?:[^"\\]|\\.)*+"|'[^']*+')[ \t]*+""")
_TEXT = re.compile(
    r'"""(?:[^"\\]++|\\.|"(?!""))*+"{3,5}'
    r"|'''(?:[^']++|'(?!''))*+'{3,5}"
    r'|"(?:[^"\\]|\\.)*+"'
    r"|'[^']*+'",
    re.DOTALL,
)
_WORD = re.compile(r"[^,\]}#\n]++")  # numbers, booleans, and dates, which may hold a space


def find(text: str) -> dict[Key, int]:
    """The line of every table, key and list element of a TOML text.

    Args:
        text: valid TOML with plain newlines.

    Returns:
        Lines count from 1. A table that is named more than once has the line of its first naming.
    """
    scanner = _Scanner(text)
    scanner.document()
    return scanner.found


class _Scanner:
    """A place in a text, and what was found on the way there."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self.found: dict[Key, int] = {}
        self.starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self.elements: dict[Key, int] = {}  # how many [[tables]] of one name there were

    def document(self) -> None:
        table: Key = ()
        while self.blank():
            if self.text[self.pos] == "[":
                table = self.header()
            else:
                self.pair(table)

    def blank(self) -> bool:
        """Skip to the next token; False at the end."""
        match = _BLANK.match(self.text, self.pos)
        assert match is not None
        self.pos = match.end()
        return self.pos < len(self.text)

    def header(self) -> Key:
        many = self.text.startswith("[[", self.pos)
        line = self.line()
        self.pos += 2 if many else 1
        names = self.names()
        self.pos += 2 if many else 1
        path = self.record((), names[:-1], line) + names[-1:]
        if many:
            self.found.setdefault(path, line)
            self.elements[path] = self.elements.get(path, 0) + 1
        return self.record(path[:-1], path[-1:], line)

    def pair(self, table: Key) -> None:
        line = self.line()
        path = self.record(table, self.names(), line)
        self.pos += 1  # the equals sign
        self.value(path)

    def record(self, table: Key, names: Key, line: int) -> Key:
        """Note a key and the tables its dots imply; a name of [[tables]] means the last of them."""
        path = table
        for name in names:
            path = (*path, name)
            self.found.setdefault(path, line)
            if path in self.elements:
                path = (*path, self.elements[path] - 1)
                self.found.setdefault(path, line)
        return path

    def names(self) -> Key:
        found: list[str] = []
        while match := _KEY.match(self.text, self.pos):
            found.append(_plain(match[1]))
            self.pos = match.end()
            if not self.text.startswith(".", self.pos):
                break
            self.pos += 1
        return tuple(found)

    def value(self, path: Key) -> None:
        self.blank()
        first = self.text[self.pos]
        if first == "[":
            self.array(path)
        elif first == "{":
            self.inline_table(path)
        else:
            match = (_TEXT if first in "\"'" else _WORD).match(self.text, self.pos)
            assert match is not None
            self.pos = match.end()

    def array(self, path: Key) -> None:
        self.pos += 1
        index = 0
        while self.more("]"):
            self.found[(*path, index)] = self.line()
            self.value((*path, index))
            index += 1

    def inline_table(self, path: Key) -> None:
        self.pos += 1
        while self.more("}"):
            self.pair(path)

    def more(self, end: str) -> bool:
        """Skip to the next element; False, and past it, at the closing bracket."""
        self.blank()
        if self.text[self.pos] == ",":
            self.pos += 1
            self.blank()
        if self.text[self.pos] == end:
            self.pos += 1
            return False
        return True

    def line(self) -> int:
        return bisect_right(self.starts, self.pos)


def _plain(name: str) -> str:
    """A key as it is meant, without quotes and escapes."""
    if name[0] == "'":
        return name[1:-1]
    if name[0] == '"':
        return tomllib.loads(f"key = {name}")["key"]
    return name
