"""Descriptors: list, stat, read, write."""

import os
from pathlib import Path

import msgspec
import trio

from llmprocd import usertrap
from llmprocd.abi import calls
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import INIT, Access
from llmprocd.kernel import access as ceilings
from llmprocd.kernel import file as files
from llmprocd.kernel import proc
from llmprocd.kernel.state import File, Proc, stdio
from llmprocd.machine import Machine
from llmprocd.pager import View
from llmprocd.syscall.caller import Caller, require
from llmprocd.tools import output
from llmprocd.tools.output import ToolError

CHUNK = 262_144
"""The most bytes one answer holds."""

LOOK_S = 0.1
"""How often a file that a command writes to is looked at, for those who follow it."""


def sys_fd_list(m: Machine, caller: Caller, call: calls.FdList) -> calls.FdTable:
    """Open descriptors; without a pid those of all processes that are living or not collected."""
    require(m.kernel, caller, Access.READ, call.pid)
    if call.pid == INIT and caller.proc is None:
        return calls.FdTable([])
    if call.pid is not None:
        return calls.FdTable(table(m, m.kernel.proc(call.pid)))
    procs = [
        p
        for p in sorted(m.kernel.procs.values(), key=lambda p: p.pid)
        if not p.collected and (caller.proc is None or ceilings.inside(m.kernel, p.pid, caller.proc))
    ]
    return calls.FdTable([row for p in procs for row in table(m, p)])


def table(m: Machine, p: Proc) -> list[calls.FdInfo]:
    """All descriptors of a process."""
    program = m.kernel.image(p).program
    mailbox = calls.FdInfo(p.pid, 0, "r", "MBOX", len(p.inbox), "mailbox", not p.input_open, program)
    names: list[int | str] = [1, 2, *sorted(p.fds), *(f"ref:{name}" for name in sorted(p.refs))]
    return [mailbox, *(row(m, p, name) for name in names)]


def row(m: Machine, p: Proc, name: int | str) -> calls.FdInfo:
    """One descriptor."""
    file = files.file(m.kernel, p, files.lookup(p, name))
    output = file.id < 0
    return calls.FdInfo(
        pid=p.pid,
        fd=name,
        mode="w" if output else "r",
        type="LOG" if output else ("BLOB" if file.complete else "GROW"),
        size=m.pager.size(file),
        name=file.origin,
        complete=file.complete,
        program=m.kernel.image(p).program,
    )


def sys_fd_stat(m: Machine, caller: Caller, call: calls.FdStat) -> calls.FdInfo:
    """One descriptor."""
    require(m.kernel, caller, Access.READ, call.pid)
    p = m.kernel.proc(call.pid)
    if str(call.fd) in {"0", "fd:0"}:
        return table(m, p)[0]
    name = str(call.fd)
    return row(m, p, name if name.startswith("ref:") else files.number(name))


def opened(m: Machine, pid: int, name: int | str) -> File:
    if str(name) in {"0", "fd:0"}:
        raise KernelError(Errno.EBADF, "fd 0 is a mailbox: it can be written, not read")
    p = m.kernel.proc(pid)
    return files.file(m.kernel, p, files.lookup(p, name))


async def sys_fd_read(m: Machine, caller: Caller, call: calls.FdRead) -> calls.Data:
    """Bytes of a descriptor; exact for any content."""
    require(m.kernel, caller, Access.READ, call.pid)
    file = opened(m, call.pid, call.fd)
    if (call.grep is not None) + (call.page is not None) + (call.line is not None) > 1:
        raise KernelError(Errno.EINVAL, "page, line, grep: only one of them")
    if call.grep is not None:
        return await _grep(m, call, file)
    if call.page is not None or call.line is not None:
        return await _part(m, call, file)
    with trio.move_on_after(call.wait_ms / 1000):
        while call.offset >= m.pager.size(file) and not file.complete:
            await _wait_growth(m, call.pid, file)
            file = opened(m, call.pid, call.fd)
    file = opened(m, call.pid, call.fd)
    size = m.pager.size(file)
    data = await m.store.read(file, call.offset, min(call.count, CHUNK)) if call.offset < size else b""
    end = call.offset + len(data)
    return calls.Data(call.offset, data, size, eof=file.complete and end >= size)


async def _wait_growth(m: Machine, pid: int, file: File) -> None:
    """Wait until a file may have grown."""
    if file.id in {stdio(m.kernel.proc(pid).pid, 1), stdio(m.kernel.proc(pid).pid, 2)}:
        await m.waits.sleep(("proc", pid))
        return
    with trio.move_on_after(LOOK_S):
        await m.waits.sleep(("file", file.id))


async def _part(m: Machine, call: calls.FdRead, file: File) -> calls.Data:
    """A page, or lines, of the text that a model would read."""
    view = await m.pager.view(file, m.kernel.image(m.kernel.proc(call.pid)).paging.default_page_size)
    pages = view.pages
    if call.page is None:
        return await _lines(m, call, file, view)
    if call.page > pages.count:
        raise KernelError(Errno.EINVAL, f"page: {call.page} is beyond the last, {pages.count}")
    data = (await m.pager.read_pages(view, call.page, 1)).encode()
    last = call.page == pages.count and file.complete
    offset = pages.bytes[call.page - 1]
    return calls.Data(
        offset, data, pages.bytes[-1], last, call.page, pages=pages.count, lines=pages.total_lines
    )


async def _lines(m: Machine, call: calls.FdRead, file: File, view: View) -> calls.Data:
    """As many of the lines as one answer holds; of one that is longer, what is at `offset` in it."""
    pages, line = view.pages, call.line or 1
    if line > max(1, pages.total_lines):
        raise KernelError(Errno.EINVAL, f"line: {line} is beyond the last, {pages.total_lines}")
    start = await m.pager.byte_of_line(view, line) + call.offset
    end = await m.pager.byte_of_line(view, line + call.lines)
    data = await m.pager.read_bytes(view, start, max(start, min(end, start + CHUNK)))
    if start + len(data) < end:
        data = data[: data.rfind(b"\n") + 1] or data.decode(errors="ignore").encode()  # no half character
    last = start + len(data) >= pages.bytes[-1] and file.complete
    return calls.Data(call.offset, data, pages.bytes[-1], last, pages=pages.count, lines=pages.total_lines)


async def _grep(m: Machine, call: calls.FdRead, file: File) -> calls.Data:
    """The lines that match. The search is the caller's: it goes on when the process ends."""
    searcher = msgspec.structs.replace(m.kernel.proc(call.pid), pid=INIT)
    try:
        found = await usertrap.grep(m, searcher, file, call.grep or "", numbered=False)
    except ToolError as error:
        raise KernelError(Errno.EINVAL, f"grep: {error}") from None
    with output.removed(found):
        return await trio.to_thread.run_sync(_part_of, found, call.offset, min(call.count, CHUNK))


def _part_of(path: str, offset: int, count: int) -> calls.Data:
    """Bytes of a spool file."""
    with Path(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(offset)
        data = file.read(count)
    return calls.Data(offset, data, size, eof=offset + len(data) >= size)


def sys_fd_write(m: Machine, caller: Caller, call: calls.FdWrite) -> calls.Written:
    """Write a message to fd 0, or close it."""
    require(m.kernel, caller, Access.WRITE, call.pid)
    if call.fd != 0:
        raise KernelError(Errno.EBADF, f"fd {call.fd} of process {call.pid} cannot be written")
    if not isinstance(call.data, (bytes, str)):
        raise KernelError(Errno.EINVAL, "data: must be bytes or text")
    try:
        text = call.data.decode() if isinstance(call.data, bytes) else call.data
    except UnicodeDecodeError:
        raise KernelError(Errno.EINVAL, "data: is not UTF-8, and fd 0 takes messages") from None
    if not text and not call.eof:
        raise KernelError(Errno.EINVAL, "data: is empty")
    proc.send(m.begin(), call.pid, text or None, close=call.eof)
    m.commit("send")
    return calls.Written(len(text.encode()))
