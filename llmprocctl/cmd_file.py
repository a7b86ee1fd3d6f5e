"""Descriptors: `fd` and `cat`.

Law: which process a bare `fd:3` belongs to is never guessed.
Law: `cat` writes exactly the bytes that the descriptor holds; only a terminal is spared control characters.
"""

import os

from llmprocctl import render, units
from llmprocctl import session as sessions
from llmprocctl.client import Client, RefusedError
from llmprocctl.session import Session, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Fd: TypeAlias = int | str

_CHUNK = 262_144
_LONG_POLL = 30_000  # milliseconds
_TO_THE_END = 1 << 40


class AmbiguousError(Exception):
    """Several processes have it, or none; `candidates` are rows of fd.list."""

    def __init__(self, word: str, candidates: "list[dict[str, Any]]") -> None:
        super().__init__(word)
        self.word = word
        self.candidates = candidates


def fd(session: Session, *, pids: tuple[str, ...], quiet: bool, json: bool) -> int:
    """Print the open descriptors of processes, or of all."""
    rows: list[dict[str, Any]] = []
    if not pids:
        rows = session.call("fd.list")["fds"]
    for word, pid in session.pids(pids).items():
        try:
            rows += session.call("fd.list", pid=pid)["fds"]
        except RefusedError as error:
            session.fault(word, error)
    if json:
        render.put_json(rows)
    elif quiet:
        render.put("".join(f"{row['pid']}/{name(row['fd'])}\n" for row in rows))
    else:
        cells = [_cells(row) for row in rows]
        render.put_table(cells, ["PROGRAM", "PID", "FD", "MODE", "TYPE", "SIZE", "NAME"], right=[1, 5])
    return session.status


def cat(
    session: Session,
    *,
    fds: tuple[str, ...],
    pid: str | None,
    follow: bool,
    page: int | None,
    lines: str | None,
    grep: str | None,
) -> int:
    """Write the contents of descriptors to stdout."""
    part = _part(page, lines, grep, follow=follow)
    for word, owner, which in [(word, *_split(word)) for word in fds]:
        try:
            target = session.pid(owner or pid or "") if owner or pid else _owner(session, word, which)
            if "line" in part:
                _copy_lines(session, target, which, part["line"], part["lines"])
            elif "grep" in part:
                _copy_matches(session, target, which, part["grep"])
            elif part:
                _write(session.call("fd.read", pid=target, fd=which, **part)["data"])
            else:
                _copy(session.client, target, which, follow=follow)
        except AmbiguousError as exc:
            _list_candidates(session, exc)
            return sessions.USAGE
        except RefusedError as error:
            bare = not owner and pid and error.name == "ESRCH"
            session.fault(pid if bare and pid else word, error)
    return session.status


def name(which: "Fd") -> str:
    """A descriptor as it is written: `fd:3`, `ref:x`."""
    return f"fd:{which}" if isinstance(which, int) else which


def _cells(row: "dict[str, Any]") -> list[str]:
    size = units.bytes_(row["size"]) + ("" if row["complete"] else "+")
    program = render.cell(row.get("program") or "-")
    which = render.cell(str(row["fd"]))
    return [program, str(row["pid"]), which, row["mode"], row["type"], size, render.cell(row["name"])]


def _split(word: str) -> "tuple[str, Fd]":
    """The process and the descriptor of `7/fd:3`, `fd:3` or `ref:x`; no process is ""."""
    owner, slash, which = word.partition("/")
    if not slash or owner.startswith("ref:"):  # the name of a reference may hold a slash
        owner, which = "", word
    kind, colon, rest = which.partition(":")
    if colon and kind == "ref" and rest:
        return owner, which
    if colon and kind == "fd" and rest.isascii() and rest.isdecimal() and len(rest) < 18:
        return owner, int(rest)
    raise UsageError(f"{word}: not a descriptor (they look like fd:3, 42/fd:3, ref:name)")


def _owner(session: Session, word: str, which: "Fd") -> int:
    """The process that a bare descriptor belongs to. Raises AmbiguousError."""
    inside = os.environ.get("LLMPROC_PID", "")
    if inside.isdecimal():
        return int(inside)
    peer = session.call("hello", client="llmprocctl")["peer"]
    if peer.get("proc") is not None:
        return peer["proc"]
    mine = {row["pid"] for row in session.call("proc.list")["procs"] if row.get("uid") in {None, peer["uid"]}}
    rows = [row for row in session.call("fd.list")["fds"] if row["fd"] == which and row["pid"] in mine]
    if len(rows) != 1:
        raise AmbiguousError(word, rows)
    return rows[0]["pid"]


def _list_candidates(session: Session, ambiguous: AmbiguousError) -> None:
    rows = ambiguous.candidates
    session.say(f"{ambiguous.word}: which process? {f'{len(rows)} have' if rows else 'none has'} one")
    for row in rows:
        words = (
            f"{row['pid']}/{name(row['fd'])}",
            row["name"],
            units.bytes_(row["size"]),
            row.get("program", ""),
        )
        sessions.tell("  " + "  ".join(render.cell(word) for word in words).rstrip())


def _part(page: int | None, lines: str | None, grep: str | None, *, follow: bool) -> "dict[str, Any]":
    """The arguments of fd.read for a part of a descriptor; none for all of it."""
    if (page is not None) + (lines is not None) + (grep is not None) + follow > 1:
        raise UsageError("only one of --page, --lines, --grep and -f")
    if page is not None:
        if page < 1:
            raise UsageError("--page: pages count from 1")
        return {"page": page}
    if lines is not None:
        first, last = _range(lines)
        return {"line": first, "lines": last - first + 1}
    return {} if grep is None else {"grep": grep}


def _range(words: str) -> tuple[int, int]:
    """`3-7`, `3-` or `3`."""
    first, dash, last = words.partition("-")
    numbers = [int(word) for word in (first, last) if word.isascii() and word.isdecimal()]
    if len(numbers) == 1 and first and not last:
        numbers.append(_TO_THE_END if dash else numbers[0])
    if len(numbers) != 2 or not 1 <= numbers[0] <= numbers[1]:
        raise UsageError(f"--lines: {words!r} is not of the form A-B, from 1")
    return numbers[0], numbers[1]


def _copy_lines(session: Session, pid: int, which: "Fd", line: int, count: int) -> None:
    """Write some lines, as many at a time as an answer holds; a longer one in parts."""
    offset = 0
    while count > 0:
        reply = session.call("fd.read", pid=pid, fd=which, line=line, lines=count, offset=offset)
        data: bytes = reply["data"]
        _write(data)
        got = data.count(b"\n")
        offset = len(data) - data.rfind(b"\n") - 1 + (0 if got else offset)
        line, count = line + got, count - got
        if not data or reply["eof"] or line > reply.get("lines", 0):
            return


def _copy_matches(session: Session, pid: int, which: "Fd", pattern: str) -> None:
    """Write the lines that match, as many bytes at a time as an answer holds."""
    offset, more = 0, True
    while more:
        reply = session.call("fd.read", pid=pid, fd=which, grep=pattern, offset=offset)
        _write(reply["data"])
        offset += len(reply["data"])
        more = not reply["eof"] and bool(reply["data"])


def _copy(client: Client, pid: int, which: "Fd", *, follow: bool) -> None:
    """Write all of a descriptor, two requests in flight; with `follow` wait until it is complete."""
    offset, size = 0, 0
    asked = [_ask(client, pid, which, 0)]
    while asked:
        if offset + _CHUNK < size and len(asked) == 1:
            asked.append(_ask(client, pid, which, offset + _CHUNK))
        reply = client.take(asked.pop(0))
        data: bytes = reply["data"]
        size = reply["size"]
        _write(data)
        offset += len(data)
        if reply["eof"] or (not data and not follow):
            break
        if asked and len(data) < _CHUNK:  # what was asked for ahead is not what comes next
            client.drop(asked.pop())
        if not asked:
            asked.append(_ask(client, pid, which, offset, _LONG_POLL if follow else None))
    for msgid in asked:
        client.drop(msgid)


def _ask(client: Client, pid: int, which: "Fd", offset: int, wait_ms: int | None = None) -> int:
    return client.send("fd.read", pid=pid, fd=which, offset=offset, count=_CHUNK, wait_ms=wait_ms)


def _write(data: bytes) -> None:
    if render.is_terminal():
        render.put(render.shown(data.decode(errors="backslashreplace")))
    else:
        render.put_bytes(data)
