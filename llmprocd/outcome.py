"""From what a tool answered to what the model reads: short answers as they are, long ones as descriptors.

Preparing takes time and happens first (`shape`); keeping is synchronous and part of the call's own commit
(`keep`). The contents are on disk before the row that names them.
"""

import os
from functools import partial
from pathlib import Path

import msgspec
import trio

from llmprocd.abi.errno import KernelError
from llmprocd.abi.types import FileId, Pid
from llmprocd.kernel import file as files
from llmprocd.kernel import limits
from llmprocd.kernel.file import Pages
from llmprocd.kernel.state import File, Image, Kernel, Paging, Proc
from llmprocd.machine import Machine
from llmprocd.tools import shell
from llmprocd.tools.output import Output

IN_ROWS = 65_536
"""Bytes up to which contents are kept in the database; longer ones are files of their own."""


class Shaped(msgspec.Struct, frozen=True):
    """An answer, ready to land."""

    text: str = ""  # the answer, or what stands before the descriptor's frame
    is_error: bool = False
    file: File | None = None
    data: bytes = b""  # the file's contents where they go into rows
    pages: Pages | None = None
    preview: str = ""
    source: str = ""
    limit: int = 0
    running: Output | None = None  # the command that still writes it


async def shape(m: Machine, image: Image, answer: Output, source: str) -> Shaped:
    """Decide whether an answer becomes a file, and prepare that file.

    A file that cannot be kept (ENOSPC) is an error that the model reads.
    """
    try:
        return await _shaped(m, image, answer, source)
    except (KernelError, OSError) as error:
        _abandon(answer)
        return Shaped(text=f"The output could not be kept: {error}", is_error=True)
    except trio.Cancelled:
        _abandon(answer)
        raise


def _abandon(answer: Output) -> None:
    """Leave nothing of an answer that will not land."""
    if answer.running is not None:
        answer.running.kill()
    if answer.spool:
        Path(answer.spool).unlink(missing_ok=True)


async def _shaped(m: Machine, image: Image, answer: Output, source: str) -> Shaped:
    paging = image.paging
    if answer.running is not None:
        return await _growing(m, paging, answer, source)
    if answer.spool:
        return await _spooled(m, paging, answer, source)
    if not paging.enabled or len(answer.text) <= paging.max_direct_output_chars or _capped(image, source):
        return Shaped(text=answer.text, is_error=answer.is_error)
    data = answer.text.encode()
    if len(data) > IN_ROWS:
        spool = m.store.spool()
        await trio.to_thread.run_sync(partial(Path(spool).write_bytes, data))
        return await _spooled(m, paging, msgspec.structs.replace(answer, spool=spool), source)
    pages = files.paginate([answer.text], paging.default_page_size)
    preview = next(files.split([answer.text], paging.default_page_size))
    record = File(
        FileId(m.kernel.take("file")),
        len(data),
        complete=True,
        origin=source,
        chars=pages.total_chars,
        lines=pages.total_lines,
    )
    return Shaped("", answer.is_error, record, data, pages, preview, source, paging.max_direct_output_chars)


def _capped(image: Image, source: str) -> bool:
    """Does the tool behind a name, which may be an alias, cap its answers itself?"""
    tool = image.tool(source)
    return tool is not None and tool.tool == "read_fd"


async def _spooled(m: Machine, paging: Paging, answer: Output, source: str) -> Shaped:
    number = FileId(m.kernel.take("file"))
    size = (await trio.Path(answer.spool).stat()).st_size
    await m.store.adopt(answer.spool, number)
    record = File(number, size, complete=True, origin=source, disk=True)
    view = await m.pager.view(record, paging.default_page_size)
    direct = paging.max_direct_output_chars
    if not paging.enabled or view.pages.total_chars <= direct:
        text = await m.pager.between(view, 0, view.pages.bytes[-1])
        _remove(m, number)
        return Shaped(text=text, is_error=answer.is_error)
    preview = await m.pager.read_pages(view, 1, 1)
    record = msgspec.structs.replace(record, chars=view.pages.total_chars, lines=view.pages.total_lines)
    return Shaped("", answer.is_error, record, b"", view.pages, preview, source, direct)


async def _growing(m: Machine, paging: Paging, answer: Output, source: str) -> Shaped:
    number = FileId(m.kernel.take("file"))
    await m.store.adopt(answer.spool, number, sync=False)
    record = File(number, 0, complete=False, origin=source, disk=True)
    pages = files.paginate([], paging.default_page_size)
    return Shaped(answer.text, answer.is_error, record, b"", pages, "", source, running=answer)


def within(m: Machine, p: Proc, shaped: Shaped) -> Shaped:
    """An answer that a limit leaves room for: one too long is an error that shows its first page."""
    if shaped.file is None:
        return shaped
    try:
        limits.space(m.kernel, p.pid, shaped.file.size)
    except KernelError as error:
        discard(m, shaped)
        shown = f"\n{shaped.preview}" if shaped.preview else ""
        return Shaped(text=f"{error}. The output was not kept; its first page:{shown}", is_error=True)
    return shaped


def keep(k: Kernel, p: Proc, shaped: Shaped) -> tuple[Proc, str]:
    """Open the descriptor, if there is one, and say what the model reads. The caller puts the process."""
    if shaped.file is None or shaped.pages is None:
        return p, shaped.text
    p, fd = files.add(k, p, shaped.file, shaped.data)
    if shaped.running is not None:
        return p, f"{shaped.text}\nIts output goes to fd:{fd}, which grows; use read_fd to read it."
    message = f"Output exceeds {shaped.limit} characters. Use read_fd to read more pages."
    return p, files.result_frame(fd, shaped.pages, shaped.preview, shaped.source, message)


def discard(m: Machine, shaped: Shaped) -> None:
    """Nobody wants the answer any more."""
    if shaped.running is not None:
        _abandon(shaped.running)
    if shaped.file is not None and shaped.file.disk:
        _remove(m, shaped.file.id)


def _remove(m: Machine, number: FileId) -> None:
    """Remove contents that no record names, and the view beside them."""
    path = m.store.disk_path(number)
    Path(path).unlink(missing_ok=True)
    Path(f"{path}.shown").unlink(missing_ok=True)


def watch(m: Machine, pid: Pid, shaped: Shaped) -> None:
    """Complete a growing file when its command ends."""
    if shaped.running is not None and shaped.file is not None:
        m.background(_complete, m, pid, shaped.running, shaped.file)


async def _complete(m: Machine, pid: Pid, started: Output, record: File) -> None:
    path = m.store.disk_path(record.id)
    status = await shell.see_out(msgspec.structs.replace(started, spool=path))
    size = await trio.to_thread.run_sync(_synced, path)
    k = m.begin()
    k.put_file(msgspec.structs.replace(record, size=size, complete=True))
    files.grown(k, pid, size - record.size)
    k.emit("tool_end", pid, tool=record.origin, file=record.id, status=status)
    m.commit("background_ended")
    m.waits.wakeup(("file", record.id))


def _synced(path: str) -> int:
    """Make a file's bytes durable, before a record says that they are all there; how many there are."""
    with Path(path).open("rb") as file:
        os.fdatasync(file.fileno())
        return os.fstat(file.fileno()).st_size
