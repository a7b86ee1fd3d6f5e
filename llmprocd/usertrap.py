"""System calls made by models: what each of the tools in `tools/trap.py` does.

Law: effect and answer are one commit. A call changes the kernel after its last await and returns; whoever
lands the answer commits both. So after a crash it is done and answered, or neither.
Law: a model reaches its own descendants and nobody else.
"""

import errno
import logging
import math
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from llmprocd import outcome, window
from llmprocd.abi import paths
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import FIRST_FD, FileId, Pid, Signal, ToolUseId, message_id, signal
from llmprocd.kernel import access, history, limits, proc
from llmprocd.kernel import file as files
from llmprocd.kernel import signal as signals
from llmprocd.kernel.proc import Birth
from llmprocd.kernel.state import File, Image, Kernel, Node, Proc, ToolUse
from llmprocd.machine import Machine
from llmprocd.pager import View
from llmprocd.tools import fs, output, trap
from llmprocd.tools.output import Output, ToolContext, ToolError

_log = logging.getLogger("llmprocd.usertrap")


def context(m: Machine, p: Proc) -> ToolContext:
    """What a tool of this process is given."""
    return ToolContext(pid=p.pid, cwd=p.cwd, env=p.env, spawner=m.spawner, spool=m.store.spool)


async def run(m: Machine, p: Proc, name: str, call: ToolUse) -> Output:
    """Run one system call for a model; a refusal is an answer too, and so is a bug that has changed nothing.

    The daemon would die of it at each start again: the call is still there then. One that has changed
    something must end the daemon, for half a change may not be written.
    """
    try:
        return await TRAPS[name](m, p, call)
    except (ToolError, KernelError) as error:
        return Output(text=str(error), is_error=True)
    except OSError as error:
        return Output(text=f"{name}: {error.strerror}: {error.filename}", is_error=True)
    except Exception as error:
        if m.kernel.change.is_deed:
            raise
        _log.exception("system call %s failed", name)
        return Output(text=f"Tool '{name}' error: {error}", is_error=True)


def acting(m: Machine, p: Proc) -> Kernel:
    """The kernel, for a call that is about to change it: after its last await.

    EINTR when the process was interrupted meanwhile: its answer could not land, so the call must do nothing.
    """
    k = m.begin()
    if proc.current(k, p) is None:
        raise KernelError(Errno.EINTR, f"process {p.label} was interrupted")
    return k


def path_of(p: Proc, field: str, text: str) -> Path:
    """A path that a model names, from the process's folder on."""
    if "\0" in text:
        raise ToolError(f"{field}: it holds a NUL character")
    return Path(p.cwd, text)


# --- processes --------------------------------------------------------------------------------------


async def spawn(m: Machine, p: Proc, call: ToolUse) -> Output:
    """Start a child; wait for it, unless told not to."""
    args = trap.parse(trap.SpawnTool, call.input)
    waiting = m.kernel.proc(p.pid).awaiting.get(call.id)
    if waiting is None:
        m.room(1)
        image = await _image(m, p, args.program_name)
        prompt = await _preloaded(p, args)
        pid = _spawn(m, p, call.id, args, image, prompt)
        if not args.wait:
            return Output(text=str(pid))
        m.commit("spawn_tool")
        waiting = (pid,)
    with m.doing(p.pid, "wait", call.id):
        ended = await m.wait_ended(waiting)
    (told,) = await tell(m, waiting, ended)
    if told["status"] == 0:
        return Output(text=told["message"], ended=waiting)
    text = f"process {told['pid']} ended with status {told['status']}: {told['message']}"
    return Output(text=text, is_error=True, ended=waiting)


async def _image(m: Machine, p: Proc, name: str) -> Image:
    own = m.kernel.image(p)
    if not name.strip():
        return own
    link = next((link for link in own.links if link.name == name), None)
    if link is None:
        known = "".join(f"\n- '{link.name}': {link.description}" for link in own.links) or " none"
        raise ToolError(f"Program {name!r} not found. Available programs:{known}")
    return m.image_of(link.path, p.cwd, p.env)


async def _preloaded(p: Proc, args: trap.SpawnTool) -> str:
    parts: list[str] = []
    for path in args.additional_preload_files:
        where = path_of(p, "additional_preload_files", path)
        try:
            text = await trio.to_thread.run_sync(_text, where)
        except UnicodeDecodeError:
            raise ToolError(f"additional_preload_files: {path}: not UTF-8 text") from None
        except OSError as error:
            raise ToolError(f"additional_preload_files: {path}: {error.strerror}") from None
        parts.append(files.frame("file", {"path": path}, text))
    return "\n".join([*parts, args.prompt])


def _text(path: Path) -> str:
    """A regular file's text; a pipe would hold the daemon's end up."""
    _check_foreign(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    return path.read_text(encoding="utf-8")


def _check_foreign(path: Path) -> None:
    """Refuse the files of /proc/PID: they would be the daemon's."""
    if paths.is_of_a_process(os.path.realpath(path)):  # Path.resolve raises for links in a ring
        raise PermissionError(errno.EACCES, "Permission denied", str(path))


def _spawn(m: Machine, p: Proc, call: ToolUseId, args: trap.SpawnTool, image: Image, prompt: str) -> Pid:
    k = acting(m, p)
    now = proc.require_live(k, p.pid)
    handed = {files.number(fd): files.lookup(now, fd) for fd in args.fds}
    if handed and min(handed) < FIRST_FD:
        raise KernelError(Errno.EBADF, f"fds: fd:{min(handed)} is your own and cannot be handed on")
    m.affordable(image, p.pid, dict(image.limits))
    birth = Birth(
        image=k.put_image(image),
        ppid=p.pid,
        uid=p.uid,
        access=access.child(now, k.image(now)),
        cwd=p.cwd,
        env=p.env,
        nice=now.nice,
        prompt=prompt,
        fds=handed,
        limits=dict(image.limits),
    )
    child = proc.spawn(k, birth)
    if handed:
        k.keep_fds(child.family, max(handed) + 1)
    now = k.proc(p.pid)
    if args.wait:
        now = msgspec.structs.replace(now, awaiting={**now.awaiting, call: (child.pid,)})
    elif args.notify:
        now = msgspec.structs.replace(now, notify=(*now.notify, child.pid))
    k.put(now)
    return child.pid


async def tell(m: Machine, pids: Sequence[Pid], ended: Mapping[Pid, Proc]) -> list[dict[str, Any]]:
    """Status and last message of ended processes, for a model."""
    told: list[dict[str, Any]] = []
    for number, pid in enumerate(pids):
        p = ended.get(pid)
        status = 127 if p is None else p.status
        message = "it was removed" if p is None else await m.message(p) or p.reason
        one: dict[str, Any] = {"id": number, "pid": pid, "message": message, "status": status}
        told.append(one if status == 0 else {**one, "error": True})
    return told


async def children(m: Machine, pids: Sequence[Pid]) -> Output:
    """Wait for forked children, and hand over what each said, in order."""
    ended = await m.wait_ended(pids)
    told = await tell(m, pids, ended)
    return Output(text=msgspec.json.encode(told).decode(), ended=tuple(pids))


async def wait(m: Machine, p: Proc, call: ToolUse) -> Output:
    """Wait for children; those that have not ended in time are told of as running."""
    args = trap.parse(trap.WaitTool, call.input)
    pids = [Pid(pid) for pid in args.pids] or [
        pid for pid in m.kernel.children.get(p.pid, ()) if not m.kernel.procs[pid].collected
    ]
    for pid in pids:
        access.require_below(m.kernel, pid, p.pid)
    found: dict[Pid, Proc] = {}
    seconds = float("inf") if args.timeout_s is None else args.timeout_s
    with m.doing(p.pid, "wait", call.id), trio.move_on_after(seconds):
        await m.wait_ended(pids, ended=found)
    ended = tuple(pid for pid in pids if pid in found)
    told = await tell(m, ended, found)
    running = [{"pid": pid, "status": None, "message": "still running"} for pid in pids if pid not in found]
    return Output(text=msgspec.json.encode([*told, *running]).decode(), ended=ended)


async def kill(m: Machine, p: Proc, call: ToolUse) -> Output:
    """Send a signal to a descendant."""
    args = trap.parse(trap.KillTool, call.input)
    target = access.require_below(m.kernel, Pid(args.pid), p.pid)
    sig = signal(args.signal)
    if sig is None:
        return Output(text=f"process {target.pid} exists")
    image = reread(m, target) if sig is Signal.HUP else None
    node = await m.node(target.head) if target.head is not None else None
    k = acting(m, p)
    if k.proc(target.pid).head != target.head:
        return await kill(m, p, call)
    signals.deliver(k, target.pid, sig, node, m.partial(target.pid), sender=f"process {p.pid}")
    if image is not None:
        proc.reload(k, target.pid, access.narrowed(image, k.image(target)))
    return Output(text=f"sent {sig.name} to process {target.pid}")


def reread(m: Machine, p: Proc) -> Image | None:
    """A process's program file as it is now; None for a built-in or a map."""
    path = m.kernel.image(p).path
    if not path or not p.live:
        return None
    image = m.image_of(path, p.cwd, p.env)
    m.affordable(image, p.birth, p.limits)
    return image


async def send(m: Machine, p: Proc, call: ToolUse) -> Output:
    """Send a message to a descendant."""
    args = trap.parse(trap.SendTool, call.input)
    access.require_below(m.kernel, Pid(args.pid), p.pid)
    proc.send(acting(m, p), args.pid, args.message)
    return Output(text=f"sent to process {args.pid}")


async def write_stderr(m: Machine, p: Proc, call: ToolUse) -> Output:
    """Write a line to the process's own stderr."""
    args = trap.parse(trap.WriteStderr, call.input)
    proc.check_text(args.message, "message")
    k = acting(m, p)
    k.put(k.write(k.proc(p.pid), 2, args.message.rstrip("\n") + "\n"))
    k.emit("stderr", p.pid, text=args.message)
    return Output(text="written")


# --- goto -------------------------------------------------------------------------------------------


async def goto(m: Machine, p: Proc, node: Node, call: ToolUse) -> bool:
    """Travel to an earlier message; False (and the call answered) when that is refused."""
    try:
        args = trap.parse(trap.GotoTool, call.input)
        target, removed = await _destination(m, p, args)
        tokens = await window.tokens_at(m, p, target)
    except (ToolError, KernelError) as error:
        k = m.begin()
        now = proc.current(k, p)
        if now is not None:
            answer = outcome.Shaped(text=_sentence(error), is_error=True)
            land_refusal(m, k, now, node, call, answer.text)
        return False
    k = m.begin()
    now = proc.current(k, p)
    if now is not None and not now.stopped:
        proc.goto_model(k, now, target, framed(target, removed, args.message), tokens)
        m.commit("goto_tool")
    return True


def _sentence(error: ToolError | KernelError) -> str:
    return error.text if isinstance(error, KernelError) else str(error)


def land_refusal(m: Machine, k: Kernel, p: Proc, node: Node, call: ToolUse, text: str) -> None:
    """Answer a call with an error, and retire the turn if it was the last."""
    p = proc.finish_tool(k, p, call, proc.ToolResult(call.id, text, is_error=True))
    if not proc.unanswered(p, node):
        proc.retire_tools(k, p, node)
    m.commit("tool_finished")


async def _destination(m: Machine, p: Proc, args: trap.GotoTool) -> tuple[Node, int]:
    position = args.position.removeprefix("msg_").strip("[] ")
    if re.fullmatch(r"\d+", position):
        position = f"m{position}"
    try:
        number = message_id(position, "position")
    except KernelError:
        raise ToolError(f"Invalid message ID: {args.position!r}. It must look like m12.") from None
    proc.check_text(args.message, "message")
    tips = [tip for tip in (p.head, *p.tips) if tip is not None]
    if not await m.store.is_ancestor(number, tips):
        raise ToolError(f"Could not find message with ID: {position}.")
    target = await m.node(number)
    if target.asks:
        raise ToolError(f"{position} asks for tools; go to a message before or after it.")
    assert p.head is not None
    here = await m.store.is_ancestor(number, [p.head])
    return target, len(await m.store.path(p.head, number)) if here else 0


def framed(target: Node, removed: int, message: str) -> str:
    """What a model reads where it has travelled to."""
    note = f"GOTO tool used. Conversation reset to message m{target.id}. {removed} messages were removed."
    parts = [f"<system_message>\n{note}\n</system_message>"]
    if target.role == "user" and target.text:
        said = history.unmarked(history.text(target))
        parts.append(files.frame("original_message_to_be_ignored", {}, said))
    parts.append(files.frame("time_travel_message", {}, message))
    return "\n".join(parts)


# --- descriptors ------------------------------------------------------------------------------------


async def opened(m: Machine, p: Proc, operand: str) -> File:
    """The file that a model may read as `fd:3`, `ref:x` or `9/fd:4`."""
    owner, name = files.operand(operand)
    now = m.kernel.proc(p.pid)
    if owner is not None and owner != p.pid:
        now = access.require_below(m.kernel, owner, p.pid)
    return files.file(m.kernel, now, files.lookup(now, name))


class Selected(msgspec.Struct):
    """A part of a view that was asked for: characters from `first` (from 0) up to `end`."""

    first: int
    end: int
    line: int  # in which it begins, from 1
    pairs: dict[str, object]  # attributes that repeat what was asked for


async def read_fd(m: Machine, p: Proc, call: ToolUse) -> Output:
    """Read a descriptor: the part that was asked for, cut at the most one answer holds."""
    args = trap.parse(trap.ReadFd, call.input)
    file = await opened(m, p, args.fd)
    if args.grep:
        return await _grepped(m, p, args, file)
    view = await m.pager.view(file, m.kernel.image(p).paging.default_page_size)
    part = await select(m, args, view, complete=file.complete)
    if args.extract_to_new_fd:
        return await _selected(m, p, args, view, part)
    limit = m.kernel.image(p).paging.max_direct_output_chars
    text = await m.pager.read_chars(view, part.first, min(part.end - part.first, limit))
    before = await m.pager.read_chars(view, part.first - 1, 1) if part.first else "\n"
    size, capped = _capped(args, part, text)
    pairs = part.pairs | {"continued": before != "\n"} | capped
    kept = text[:size]
    end = part.first + len(kept)
    pairs["truncated"] = end < view.pages.total_chars and not kept.endswith("\n")
    pairs |= {"lines": _range(part.line, kept), "total_lines": view.pages.total_lines}
    if not file.complete and end == view.pages.total_chars and "page" in pairs:
        pairs["partial"] = True
    return Output(text=files.frame("fd_content", pairs, kept))


def _capped(args: trap.ReadFd, part: Selected, text: str) -> tuple[int, dict[str, object]]:
    """How much of a text is kept when there is more than one answer holds, and how to read on."""
    left = part.end - part.first - len(text)
    if not left:
        return len(text), {}
    newline = text.rfind("\n")
    kept = newline + 1 if newline >= 0 else len(text)
    lines = text.count("\n", 0, kept)
    following = f"mode=char start={part.first + kept} count={left + len(text) - kept}"
    if args.mode == "line" and not args.read_all and newline >= 0:
        following = f"mode=line start={part.line + lines} count={args.count - lines}"
    return kept, {"capped": True, "next": following}


def _range(first: int, text: str) -> str:
    return f"{first}-{first + max(0, files.count_lines(text) - 1)}"


async def select(m: Machine, args: trap.ReadFd, view: View, *, complete: bool) -> Selected:
    """What part of a view was asked for. ToolError when it begins beyond the end."""
    pages = view.pages
    total = str(pages.count) if complete else f"{pages.count}+"
    asked: dict[str, object] = {"fd": args.fd, "page": "all", "pages": total}
    if args.read_all:
        return Selected(0, pages.total_chars, 1, asked)
    if args.mode == "page":
        _within("page number", args.start, 1, pages.count)
        last = min(args.start + args.count - 1, pages.count)
        asked["page"] = args.start if last == args.start else f"{args.start}-{last}"
        end = pages.chars[min(last, len(pages.inside))]
        return Selected(pages.chars[args.start - 1], end, pages.lines[args.start - 1] + 1, asked)
    asked = {"fd": args.fd, "pages": total, "mode": args.mode, "start": args.start, "count": args.count}
    if args.mode == "line":
        _within("line start position", args.start, 1, max(1, pages.total_lines))
        first = await m.pager.char_of_line(view, args.start)
        return Selected(first, await m.pager.char_of_line(view, args.start + args.count), args.start, asked)
    _within("character start position", args.start, 0, pages.total_chars)
    end = min(args.start + args.count, pages.total_chars)
    return Selected(args.start, end, await line_of(m, view, args.start), asked)


async def line_of(m: Machine, view: View, char: int) -> int:
    """The line (from 1) that a character (from 0) stands in."""
    pages = view.pages
    page = pages.page_of_char(char)
    text = await m.pager.read_chars(view, pages.chars[page], char - pages.chars[page])
    return pages.lines[page] + text.count("\n") + 1


def _within(what: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ToolError(f"Invalid {what}: {value}. Valid range: {low}-{high}")


async def _grepped(m: Machine, p: Proc, args: trap.ReadFd, file: File) -> Output:
    """The lines that match, as many as one answer holds."""
    spool = await grep(m, p, file, args.grep, numbered=True, timeout_s=m.config.tool_timeout_s)
    with output.removed(spool):
        if args.extract_to_new_fd:
            return await _extracted(m, p, args, spool=spool)
        limit = m.kernel.image(p).paging.max_direct_output_chars
        text = await trio.to_thread.run_sync(_beginning, spool, limit + 1)
    pairs: dict[str, object] = {"fd": args.fd, "grep": args.grep}
    if len(text) > limit:
        newline = text.rfind("\n", 0, limit)
        text = text[: newline + 1 if newline >= 0 else limit]
        pairs |= {"truncated": not text.endswith("\n"), "capped": True, "next": "a narrower pattern"}
    return Output(text=files.frame("fd_content", pairs, text))


def _beginning(path: str, size: int) -> str:
    """The first characters of a text file."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        return file.read(size)


async def _selected(m: Machine, p: Proc, args: trap.ReadFd, view: View, part: Selected) -> Output:
    """Put a part of a view into a new descriptor: a long one goes from file to file."""
    first = await m.pager.byte_of_char(view, part.first)
    last = await m.pager.byte_of_char(view, part.end)
    if last - first <= outcome.IN_ROWS:
        return await _extracted(m, p, args, await m.pager.read_bytes(view, first, last))
    spool = m.store.spool()
    with output.removed(spool):
        await m.pager.copy(view, first, last, spool)
        return await _extracted(m, p, args, spool=spool)


async def _extracted(m: Machine, p: Proc, args: trap.ReadFd, data: bytes = b"", spool: str = "") -> Output:
    """Put a text, or that in a spool file, into a new descriptor."""
    size = (await trio.Path(spool).stat()).st_size if spool else len(data)
    limits.space(m.kernel, p.pid, size)
    disk = size > outcome.IN_ROWS
    if spool and not disk:
        data = await trio.Path(spool).read_bytes()
    record = File(
        FileId(m.kernel.take("file")), size, complete=True, origin=f"extract of {args.fd}", disk=disk
    )
    chars = len(data.decode())
    if disk:
        await m.store.adopt(spool, record.id)
        view = await m.pager.view(record, m.kernel.image(p).paging.default_page_size)
        chars = view.pages.total_chars
    k = acting(m, p)
    if not limits.has_space(k, p.pid, size):  # others were faster
        outcome.discard(m, outcome.Shaped(file=record))
    limits.space(k, p.pid, size)
    now, fd = files.add(k, k.proc(p.pid), record, data)
    k.put(now)
    pairs = {"source_fd": args.fd, "new_fd": f"fd:{fd}", "mode": args.mode, "content_size": chars}
    message = f"<message>Content from {args.fd} has been extracted to fd:{fd}</message>"
    return Output(text=files.frame("fd_extraction", pairs, message))


async def grep(
    m: Machine, p: Proc, file: File, pattern: str, *, numbered: bool, timeout_s: float = math.inf
) -> str:
    """The lines of a file that match, found by a process of its own: a spool file that holds their text."""
    if file.disk:
        path = m.store.disk_path(file.id)
        return await fs.matches(context(m, p), pattern, path, numbered=numbered, timeout_s=timeout_s)
    spool = m.store.spool()
    data = await m.store.read(file, 0, m.pager.size(file))
    with output.removed(spool):
        await trio.to_thread.run_sync(partial(Path(spool).write_bytes, data))
        return await fs.matches(context(m, p), pattern, spool, numbered=numbered, timeout_s=timeout_s)


async def fd_to_file(m: Machine, p: Proc, call: ToolUse) -> Output:
    """Write a descriptor's exact bytes to a file."""
    args = trap.parse(trap.FdToFile, call.input)
    file = await opened(m, p, args.fd)
    target = path_of(p, "file_path", args.file_path)
    size = m.pager.size(file)
    await trio.to_thread.run_sync(partial(_may_write, target, args))
    how = "ab" if args.mode == "append" else "wb"
    how = how if args.exist_ok else "xb"  # another may have made it just now
    async with await trio.open_file(target, how) as out:
        for offset in range(0, size, 1 << 18):
            await out.write(await m.store.read(file, offset, min(1 << 18, size - offset)))
    view = await m.pager.view(file, m.kernel.image(p).paging.default_page_size)
    pairs = {
        "fd": args.fd,
        "file_path": args.file_path,
        "mode": args.mode,
        "char_count": view.pages.total_chars,
        "size_bytes": size,
        "success": True,
        "create": args.create,
        "exist_ok": args.exist_ok,
    }
    message = f"<message>Content of {args.fd} written to {args.file_path}</message>"
    return Output(text=files.frame("fd_file_result", pairs, message))


def _may_write(target: Path, args: trap.FdToFile) -> None:
    """Refuse what the flags forbid, and make the parent folders."""
    _check_foreign(target)
    exists = target.exists()
    if exists and not args.exist_ok:
        raise ToolError(f"File {args.file_path} already exists and exist_ok=False")
    if not exists and not args.create:
        raise ToolError(f"File {args.file_path} doesn't exist and create=False")
    if exists and not target.is_file():
        raise ToolError(f"{args.file_path} is no regular file")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"Error writing file descriptor: {error}") from None


TRAPS: dict[str, Callable[[Machine, Proc, ToolUse], Awaitable[Output]]] = {
    "spawn": spawn,
    "wait": wait,
    "kill": kill,
    "send": send,
    "write_stderr": write_stderr,
    "read_fd": read_fd,
    "fd_to_file": fd_to_file,
}
