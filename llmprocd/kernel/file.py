"""Descriptors: when an output becomes a file, its pages, and how a model is shown them.

Law: pages tile the text exactly: all of them joined are the text, and a line is cut only if it is longer
than a page.
Law: content stands in its frame as it is, never escaped; where it holds a closing tag, the tag's name is
extended until it does not.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping

import msgspec
from msgspec.structs import replace

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import FileId, Pid
from llmprocd.kernel import limits
from llmprocd.kernel.state import File, Kernel, Proc, stdio


def shown(data: bytes) -> str:
    r"""Bytes as a model reads them: UTF-8, and `\xNN` for what is not."""
    return data.decode(errors="backslashreplace")


def count_lines(text: str) -> int:
    """Lines of a text; a last one without a newline counts."""
    return text.count("\n") + (not text.endswith("\n")) if text else 0


# --- pages ------------------------------------------------------------------------------------------


class Pages(msgspec.Struct):
    """Where each page of a text begins. Page 1 is index 0; one more entry marks the end."""

    size: int  # characters a page may have
    bytes: array[int]  # of the UTF-8 form
    chars: array[int]
    lines: array[int]  # lines that ended before this page
    inside: bytearray  # 1 where the page begins inside a line

    @property
    def count(self) -> int:
        return max(1, len(self.inside))

    @property
    def total_chars(self) -> int:
        return self.chars[-1]

    @property
    def total_lines(self) -> int:
        return self.lines[-1] + self.open

    @property
    def open(self) -> bool:
        """Does the text end inside a line?"""
        return bool(self.tail)

    tail: int = 0

    def page_of_line(self, line: int) -> int:
        """The page (from 0) on which a line (from 1) begins, or one before it."""
        return max(0, bisect_right(self.lines, line - 2, hi=len(self.inside)) - 1) if line > 1 else 0

    def page_of_char(self, char: int) -> int:
        return max(0, bisect_right(self.chars, char, hi=len(self.inside)) - 1)


def cut(text: str, start: int, size: int) -> int:
    """Where the page that begins at `start` ends, when text goes on after `start + size`."""
    newline = text.rfind("\n", start, start + size)
    return newline + 1 if newline >= 0 else start + size


def paginate(pieces: Iterable[str], size: int) -> Pages:
    """The pages of a text that comes in pieces of any length."""
    pages = Pages(size, array("Q", [0]), array("Q", [0]), array("Q", [0]), bytearray())
    inside = False
    for page in split(pieces, size):
        pages.inside.append(inside)
        pages.bytes.append(pages.bytes[-1] + len(page.encode()))
        pages.chars.append(pages.chars[-1] + len(page))
        pages.lines.append(pages.lines[-1] + page.count("\n"))
        inside = not page.endswith("\n")
    pages.tail = inside
    return pages


def split(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The pages themselves, one after another."""
    rest = ""
    for piece in pieces:
        rest += piece
        start = 0
        while len(rest) - start > size:
            end = cut(rest, start, size)
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest


# --- frames -----------------------------------------------------------------------------------------


def tag(name: str, *contents: str) -> str:
    """A tag's name that none of the contents closes."""
    candidate, number = name, 0
    while any(f"</{candidate}>" in content for content in contents):
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def attributes(pairs: Mapping[str, object]) -> str:
    """Attributes of a tag; a quote or bracket in a value cannot break out of it."""
    return "".join(f' {key}="{_attribute(value)}"' for key, value in pairs.items() if value is not None)


def _attribute(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    for char, escaped in (("&", "&amp;"), ('"', "&quot;"), ("<", "&lt;"), (">", "&gt;"), ("\n", " ")):
        text = text.replace(char, escaped)
    return text


def frame(name: str, pairs: Mapping[str, object], body: str) -> str:
    """`<name attributes>`, the body on lines of its own, `</name>`."""
    name = tag(name, body)
    return f"<{name}{attributes(pairs)}>\n{body}\n</{name}>"


def result_frame(
    fd: int, pages: Pages, preview: str, source: str, message: str, *, complete: bool = True
) -> str:
    """What a model reads in place of an output that became a file."""
    inner = tag("preview", preview)
    outer = tag("fd_result", preview)
    more = pages.count > 1 or not complete
    pairs = {
        "fd": f"fd:{fd}",
        "pages": str(pages.count) if complete else f"{pages.count}+",
        "truncated": more,
        "lines": f"1-{count_lines(preview)}",
        "total_lines": pages.total_lines,
        "chars": pages.total_chars,
        "source": source,
    }
    return (
        f"<{outer}{attributes(pairs)}>\n<message>{message}</message>\n"
        f"<{inner}>\n{preview}\n</{inner}>\n</{outer}>"
    )


# --- descriptors ------------------------------------------------------------------------------------


def take_said(k: Kernel, p: Proc, text: str) -> tuple[Proc, str]:
    """A user's text as the model reads it: a long one becomes a descriptor."""
    paging = k.image(p).paging
    if not (paging.enabled and paging.page_user_input and len(text) > paging.max_input_chars):
        return p, text
    data = text.encode()
    if not limits.has_space(k, p.pid, len(data)):
        return p, text  # it was accepted, so it is read whole
    pages = paginate([text], paging.default_page_size)
    file = File(FileId(k.take("file")), len(data), complete=True, origin="user_input")
    p, fd = add(k, p, file, data)
    message = f"Input exceeds {paging.max_input_chars} characters. Use read_fd to read more pages."
    preview = next(split([text], paging.default_page_size))
    return p, result_frame(fd, pages, preview, "user_input", message)


def add(k: Kernel, p: Proc, file: File, data: bytes = b"") -> tuple[Proc, int]:
    """Open a new file as the family's next descriptor. The caller puts the process."""
    k.put_file(file, data)
    fd = k.take_fd(p.family)
    made, size = p.made + 1, p.made_bytes + file.size
    return replace(p, fds={**p.fds, fd: file.id}, made=made, made_bytes=size), fd


def grown(k: Kernel, pid: Pid, size: int) -> None:
    """A file that a process has opened has become so many bytes longer."""
    p = k.procs.get(pid)
    if p is not None:
        k.put(replace(p, made_bytes=p.made_bytes + size))
        limits.notice(k, pid)


def refer(k: Kernel, p: Proc, name: str, file: File, data: bytes) -> Proc:
    """Make a text readable as `ref:name`; the last of one name wins."""
    k.put_file(file, data)
    return replace(p, refs={**p.refs, name: file.id}, made_bytes=p.made_bytes + file.size)


def number(text: str) -> int:
    """The descriptor that `fd:3` or `3` spells; EBADF for anything else."""
    digits = text.removeprefix("fd:")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
        raise KernelError(Errno.EBADF, f"{text!r} is no descriptor (they look like fd:3 or ref:name)")
    return int(digits)


def lookup(p: Proc, name: str | int) -> FileId:
    """The file behind `3`, `fd:3` or `ref:name`; EBADF."""
    text = str(name)
    if text.startswith("ref:"):
        found = p.refs.get(text[4:])
    else:
        fd = number(text)
        found = stdio(p.pid, fd) if fd in {1, 2} else p.fds.get(fd)
    if found is None:
        raise KernelError(Errno.EBADF, f"process {p.label} has no {_named(text)}; it has {_listed(p)}")
    return found


def _named(text: str) -> str:
    return text if ":" in text else f"fd:{text}"


def _listed(p: Proc) -> str:
    names = [f"fd:{fd}" for fd in sorted(p.fds)] + [f"ref:{name}" for name in sorted(p.refs)]
    return ", ".join(names) if names else "none beyond fd:0, fd:1 and fd:2"


def file(k: Kernel, p: Proc, id_: FileId) -> File:
    """The record of a file; stdout and stderr have theirs in the process. ENOENT when it was freed."""
    if id_ >= 0:
        found = k.files.get(id_)
        if found is None:  # its process was removed while somebody read on
            raise KernelError(Errno.ENOENT, f"the file that process {p.label} had open is gone")
        return found
    fd = 1 if id_ == stdio(p.pid, 1) else 2
    size = p.stdout if fd == 1 else p.stderr
    return File(id_, size, not p.live, "stdout" if fd == 1 else "stderr")


def operand(text: str) -> tuple[Pid | None, str]:
    """Process and descriptor of `9/fd:4`, `fd:4`, `ref:x`."""
    owner, slash, name = text.rpartition("/")
    if not slash or text.startswith("ref:"):
        return None, text
    if not (owner.isascii() and owner.isdigit() and len(owner) < 19):
        raise KernelError(Errno.EBADF, f"{text!r}: {owner!r} is no pid")
    return Pid(int(owner)), name


def references(text: str) -> dict[str, str]:
    """The texts inside `<ref id="name">...</ref>`; the last of one name wins."""
    found: dict[str, str] = {}
    position = 0
    while (start := text.find('<ref id="', position)) >= 0:
        quote = text.find('">', start + 9)
        end = text.find("</ref>", quote)
        if quote < 0 or end < 0:
            break
        name = text[start + 9 : quote]
        if name and not any(char in name for char in '"<>/\n'):
            found[name] = text[quote + 2 : end]
            position = end + 6
        else:
            position = start + 9
    return found
