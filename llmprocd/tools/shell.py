"""Commands: `bash`, and what else runs a command and reads what it says.

Law: a command writes straight into its spool file; its output never passes through the daemon.
Law: when a foreground command has returned, nobody writes to its spool file any more; when it was cancelled
     or could not start, there is no such file.
"""

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
import trio

from llmprocd.abi.types import Access
from llmprocd.tools import output, spawner
from llmprocd.tools.output import Output, Spec, ToolContext, ToolError
from llmprocd.tools.spawner import Running

OUTPUT_LIMIT = 1 << 30
"""Bytes. A command that says more is killed: `yes` fills a disk in a minute."""

LOOK_S = 1.0
"""How often the size of an output is looked at."""

ARGUMENT_LIMIT = 100 << 10
"""Bytes. Linux takes no single argument over 128 KiB; a longer command comes by stdin."""

FROM_STDIN = 'eval "exec </dev/null\n$(cat)"'


class Ended(msgspec.Struct, frozen=True):
    """How a command ended, and where its output is."""

    spool: str
    status: int
    why: str = ""
    """Set if it was killed before its end: the reason, as `[...]`."""


async def bash(ctx: ToolContext, *, command: str, timeout_s: float = 120, background: bool = False) -> Output:
    """Run a shell command, stdin empty, stdout and stderr together, then a line `[exit N]`.

    Args:
        ctx: on whose behalf, and where.
        command: for `bash -c`, of any length.
        timeout_s: seconds; then everything it started is killed, and the answer is an error.
        background: return at once, with `running` set; `see_out` it. There is no time limit then.

    Returns:
        what it said. Cancelling kills everything it started.

    Raises:
        ToolError: it cannot be started, or an argument makes no sense.
    """
    if not timeout_s > 0:
        raise ToolError(f"timeout_s: {timeout_s} is not more than 0")
    if not command.strip() or "\0" in command:
        raise ToolError("command: it is empty or holds a NUL character")
    argv, stdin = _shell(command)
    if background:
        spool = ctx.spool()
        running = await start(ctx, argv, spool, stdin)
        return Output(f"[running in the background: OS process {running.os_pid}]", spool, running=running)
    ended = await run(ctx, argv, stdin, timeout_s)
    finish(ended.spool, ended.status, ended.why)
    return output.answer(ended.spool, is_error=bool(ended.why))


async def see_out(background: Output) -> int:
    """Wait until a command in the background ends, and write into its spool how it did.

    Returns:
        its exit status. Cancelling kills everything it started.
    """
    running = background.running
    assert running is not None
    try:
        why = await _limit(running, background.spool, math.inf)
    except BaseException:
        await running.end()
        raise
    status = await running.wait()
    finish(background.spool, status, why)
    return status


def finish(spool: str, status: int, why: str = "") -> None:
    """Append to a spool file, on a line of its own, how its command ended: `why`, or `[exit N]`."""
    with Path(spool).open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        apart = b"\n" if size and os.pread(file.fileno(), 1, size - 1) != b"\n" else b""
        file.write(apart + (why or f"[exit {status}]").encode())


async def run(
    ctx: ToolContext, argv: Sequence[str], stdin: bytes = b"", timeout_s: float = math.inf
) -> Ended:
    """Run a command to its end, or to a limit, where everything it started is killed.

    Args:
        ctx: on whose behalf, and where.
        argv: the command.
        stdin: what it reads.
        timeout_s: seconds.

    Returns:
        how it ended. What it has left running no longer writes into that spool file.

    Raises:
        ToolError: it cannot be started.
    """
    spool = ctx.spool()
    running = await start(ctx, argv, spool, stdin)
    try:
        why = await _limit(running, spool, timeout_s)
        if not running.alone:
            await trio.to_thread.run_sync(_detach, spool, ctx.spool())
    except BaseException:
        await running.end()
        output.remove(spool)
        raise
    return Ended(spool, await running.wait(), why)


async def start(ctx: ToolContext, argv: Sequence[str], spool: str, stdin: bytes = b"") -> Running:
    """Start a command that writes into a new spool file. ToolError if it cannot be."""
    writer = os.open(spool, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    try:
        with spawner.memory_file(stdin) as source:
            return await ctx.spawner.start(
                ctx.pid,
                argv,
                cwd=ctx.cwd,
                env=spawner.tool_environment(ctx),
                stdout=writer,
                stdin=source.fileno() if stdin else None,
            )
    except BaseException:
        output.remove(spool)
        raise
    finally:
        os.close(writer)


async def _limit(running: Running, spool: str, timeout_s: float) -> str:
    """Wait for the end of a command, or kill it at the first limit it meets. Returns that limit in words."""
    deadline, why = trio.current_time() + timeout_s, ""
    while not why:
        with trio.move_on_at(min(deadline, trio.current_time() + LOOK_S)):
            await running.wait()
            return ""
        if _size(spool) > OUTPUT_LIMIT:
            why = f"[killed: more than {OUTPUT_LIMIT >> 20} MiB of output]"
        elif trio.current_time() >= deadline:
            why = f"[timed out after {timeout_s:g} s]"
    await running.end()
    return why


def _size(spool: str) -> int:
    return Path(spool).stat().st_size


def _detach(spool: str, copy: str) -> None:
    """Give the spool file's name to a copy: what was left running writes to the old one."""
    try:
        with Path(spool).open("rb") as file:
            output.copy(file.fileno(), copy, os.fstat(file.fileno()).st_size)
        Path(copy).replace(spool)
    except BaseException:
        output.remove(copy)
        raise


def _shell(command: str) -> tuple[list[str], bytes]:
    """How to run a shell command: argv, and what goes to stdin."""
    shell = shutil.which("bash", path="/bin:/usr/bin:/usr/local/bin") or "/bin/sh"
    data = output.encode("command", command)
    if len(data) > ARGUMENT_LIMIT:
        return [shell, "-c", FROM_STDIN], data
    return [shell, "-c", command], b""


SPECS = (
    Spec(
        name="bash",
        access=Access.WRITE,
        description=(
            "Run a shell command in the working directory. Answers with stdout and stderr together, then "
            "[exit N]. Its stdin is empty; each call is a fresh shell. After timeout_s seconds it is killed "
            "with everything it started. With background=true it returns at once and its output grows on."
        ),
        input_schema=output.schema(
            ("command",),
            command={"type": "string", "description": "Passed to bash -c."},
            timeout_s={"type": "number", "description": "Time limit in seconds.", "default": 120},
            background={"type": "boolean", "description": "Do not wait for the end.", "default": False},
        ),
        run=bash,
        pure=False,
    ),
)
