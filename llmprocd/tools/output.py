"""What tools are given and what they answer.

Law: a tool answers with text, or with a spool file that holds every byte of it; both only while it runs.
Law: what the model should read about a failure is a ToolError; any other exception is a bug in the tool.
"""

import os
import sys
from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from llmprocd.abi.types import Access, Pid

if TYPE_CHECKING:  # the spawner raises ToolError, so it imports this module
    from llmprocd.tools.spawner import Running, Spawner

TEXT_LIMIT = 64 << 10
"""Bytes. A longer result stays on disk and is never read whole into memory."""


CHUNK = 1 << 20
"""Bytes that are copied between two looks at whether to go on."""


class ToolError(Exception):
    """A failure the model is to read: one sentence that says what was asked and why it cannot be had."""


class Output(msgspec.Struct, frozen=True):
    """What a tool answers: its text, or a spool file that holds the whole of it."""

    text: str = ""
    spool: str = ""
    is_error: bool = False
    running: "Running | None" = None
    """Set while the spool still grows; `text` then says what was started."""
    ended: tuple[Pid, ...] = ()
    """Children whose ends it tells of: they are collected when it lands."""


class ToolContext(msgspec.Struct, frozen=True):
    """On whose behalf a tool runs, and what it may use.

    Args:
        pid: the LLM process that called.
        cwd: absolute; every relative path starts there.
        env: the process's own extra variables.
        spawner: starts every operating-system process of a tool.
        spool: gives a fresh path for a spool file, in a folder that only the daemon's user enters.
    """

    pid: Pid
    cwd: str
    env: Mapping[str, str]
    spawner: "Spawner"
    spool: Callable[[], str]


class Spec(msgspec.Struct, frozen=True):
    """How a built-in tool is offered to models.

    Args:
        name: as the model calls it.
        access: what a process needs to call it.
        description: for the model.
        input_schema: JSON schema of the arguments, which are the keywords of `run`.
        run: called as `run(context, **arguments)`.
        pure: changes nothing, so that it may silently run again after a crash.
    """

    name: str
    access: Access
    description: str
    input_schema: dict[str, Any]
    run: Callable[..., Awaitable[Output]]
    pure: bool


def schema(required: tuple[str, ...], **properties: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def answer(spool: str, *, is_error: bool = False) -> Output:
    """What a finished spool file amounts to: its text if it is short and UTF-8, else the file itself.

    Blocks for one read of at most `TEXT_LIMIT` bytes. The file is removed when its text is returned.
    """
    path = Path(spool)
    with path.open("rb") as file:
        data = file.read(TEXT_LIMIT + 1)
    if len(data) > TEXT_LIMIT:
        return Output(spool=spool, is_error=is_error)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return Output(spool=spool, is_error=is_error)
    path.unlink()
    return Output(text=text, is_error=is_error)


def text_answer(path: str, text: str) -> Output:
    """A text as an answer, spooled to `path` when it is long or holds bytes that are not UTF-8. Blocks."""
    Path(path).write_bytes(text.encode(errors="surrogateescape"))
    return answer(path)


def copy(source: int, path: str, size: int = sys.maxsize) -> None:
    """Copy at most `size` bytes of an open file to a new one. For threads of trio: can be cancelled."""
    with Path(path).open("xb") as target:
        while size > 0 and (data := os.read(source, min(size, CHUNK))):
            target.write(data)
            size -= len(data)
            trio.from_thread.check_cancelled()


def remove(path: str) -> None:
    """Remove a spool file that may not be there."""
    Path(path).unlink(missing_ok=True)


@contextmanager
def removed(path: str) -> Generator[None, None, None]:
    """Leave no spool file of this name behind, however the block ends."""
    try:
        yield
    finally:
        remove(path)


def encode(field: str, text: str) -> bytes:
    """A model's text as bytes; ToolError if it holds what no file can: half a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ToolError(f"{field}: character {error.start} is half a surrogate pair") from None
