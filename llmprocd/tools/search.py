"""A program of its own: find files by name, or lines by pattern.

    search.py glob PATH PATTERN
    search.py grep PATH PATTERN GLOB MAX
    search.py lines PATH PATTERN numbered|plain

Run by its path under `python -I -S`, below the spawner: a regular expression can take for ever, and only a
process can be stopped then. Python's `re`, not grep(1): models write its dialect, the same everywhere.
It writes bytes as they are, and exits 0, or 2 with a sentence if it was asked nonsense.
"""

import fnmatch
import glob
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

SKIPPED = frozenset({".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv"})
LINE_LIMIT = 1000
"""Bytes of a line that are shown."""

LONGEST = 1 << 20
"""Bytes of a line that are looked at: a file of one endless line is read in such pieces."""


def main() -> int:
    """Do what the arguments say."""
    verb, path, pattern, *more = sys.argv[1:]
    if not os.path.lexists(path):
        return refuse(f"No such file or directory: {path}")
    if verb == "glob":
        return find(path, pattern)
    try:
        wanted = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return refuse(f"pattern: {error}")
    if verb == "lines":
        return pick(path, wanted, numbered=more[0] == "numbered")
    return grep(path, wanted, more[0], int(more[1]))


def refuse(text: str) -> int:
    sys.stdout.write(text)
    return 2


def find(path: str, pattern: str) -> int:
    """Print the names below `path` that match, folders with a slash, sorted."""
    for name in sorted(expand(path, pattern)):
        show(Path(path, name), b"/\n" if Path(path, name).is_dir() else b"\n")
    return 0


def expand(root: str, pattern: str) -> set[str]:
    """The names below `root` that match. `**` goes down folders, no links: two that lead up have no end."""
    segments = pattern.split("/")
    if "**" not in segments:
        # Path.glob takes no absolute pattern.
        return set(glob.glob(pattern, root_dir=root))  # noqa: PTH207
    at = segments.index("**")
    head, rest = "/".join(segments[:at]) or "/" * (at > 0), segments[at + 1 :]
    found: set[str] = set()
    for base in glob.glob(head, root_dir=root) if head else [""]:  # noqa: PTH207
        found.update([base] if base and not any(rest) else [])
        for folder, below, here in os.walk(Path(root, base)):
            if any(rest):
                names = expand(folder, "/".join(rest))
            else:
                names = _shown(below if rest else [*below, *here])
            inside = Path(base, os.path.relpath(folder, Path(root, base)))
            found.update(str(inside / name) for name in names)
            below[:] = _shown(below)
    return found


def _shown(names: Iterable[str]) -> list[str]:
    """Those that a wildcard stands for."""
    return [name for name in names if not name.startswith(".")]


def grep(path: str, wanted: re.Pattern[str], names: str, most: int) -> int:
    """Print the lines that match, as PATH:LINE:TEXT; after `most` of them say that there may be more."""
    found, folder = 0, Path(path).is_dir()
    if not folder and not Path(path).is_file():
        return refuse(f"Not a regular file: {path}")
    for file in files(path, names):
        for number, line in lines(file, text_only=folder):
            if not wanted.search(line.decode(errors="surrogateescape")):
                continue
            if found == most:
                sys.stdout.write(f"[stopped after {most} matches]\n")
                return 0
            found += 1
            show(file, b":%d:%b\n" % (number, line[:LINE_LIMIT]))
    return 0


def pick(path: str, wanted: re.Pattern[str], *, numbered: bool) -> int:
    r"""Print the lines of a file that match, whole and as text: `\xNN` stands for a byte that is none."""
    for number, line in lines(Path(path), text_only=False):
        if wanted.search(line.decode(errors="surrogateescape")):
            text = line.decode(errors="backslashreplace").encode()
            sys.stdout.buffer.write(b"%d:%b\n" % (number, text) if numbered else text + b"\n")
    return 0


def show(path: Path, rest: bytes) -> None:
    sys.stdout.buffer.write(os.fsencode(path) + rest)


def files(path: str, names: str) -> Iterator[Path]:
    """The files below `path`, or that file, whose name or path from there matches `names`."""
    if not Path(path).is_dir():
        yield Path(path)
        return
    for folder, below, here in os.walk(path):
        below[:] = sorted(name for name in below if name not in SKIPPED)
        for name in sorted(here):
            inside = os.path.relpath(Path(folder, name), path)
            if not names or fnmatch.fnmatchcase(name, names) or fnmatch.fnmatchcase(inside, names):
                yield Path(folder, name)


def lines(path: Path, *, text_only: bool = True) -> Iterator[tuple[int, bytes]]:
    """The lines of a regular file, numbered; none of one that cannot be read, or is binary if `text_only`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode) or (text_only and b"\0" in file.peek(8192)[:8192]):
            return
        number = 1
        while line := file.readline(LONGEST):
            yield number, line.rstrip(b"\r\n")
            number += line.endswith(b"\n")


if __name__ == "__main__":
    sys.exit(main())
