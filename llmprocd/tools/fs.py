"""Files: read_file, list_dir, glob, grep, write_file, edit_file. Relative paths start at the process's cwd.

Law: a file is written whole under another name and then renamed: readers see the old one or the new one.
Law: nothing here waits for a FIFO or a device; what is no regular file is refused on its open descriptor.
"""

import fcntl
import math
import os
import secrets
import stat
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from llmprocd.abi import paths
from llmprocd.abi.types import Access
from llmprocd.tools import output, search, shell
from llmprocd.tools.output import Output, Spec, ToolContext, ToolError

EDIT_LIMIT = 64 << 20
"""Bytes. A longer file is edited by a program, not in the daemon's memory."""

LOCK_PAUSE_S = 0.01


async def read_file(ctx: ToolContext, *, file_path: str) -> Output:
    """The whole of a regular file, byte for byte.

    Raises:
        ToolError: it is not there, no regular file, or may not be read.
    """
    return await trio.to_thread.run_sync(
        _read, _path(ctx, file_path), ctx.spool(), abandon_on_cancel=True
    )  # abandoned, it cleans up after itself: a dead network drive holds nobody up


async def list_dir(
    ctx: ToolContext, *, directory_path: str = ".", show_hidden: bool = False, detailed: bool = False
) -> Output:
    """What is in a folder: `d name` and `f name` lines, folders first.

    Args:
        ctx: on whose behalf, and where.
        directory_path: the folder.
        show_hidden: also names that begin with a dot.
        detailed: with size and time of the last change.

    Raises:
        ToolError: it is not there, no folder, or may not be read.
    """
    return await trio.to_thread.run_sync(
        _list, _path(ctx, directory_path), ctx.spool(), show_hidden, detailed, abandon_on_cancel=True
    )


async def glob(ctx: ToolContext, *, pattern: str, path: str = ".") -> Output:
    """The names below `path` that match a pattern (`*`, `?`, `[a-z]`, `**`), one a line, sorted."""
    return await _search(ctx, f"Nothing matches {pattern!r} in {path}", "glob", path, pattern)


async def grep(
    ctx: ToolContext, *, pattern: str, path: str = ".", glob: str = "", max_matches: int = 1000
) -> Output:
    """The lines that match a regular expression, as `path:line:text`.

    Args:
        ctx: on whose behalf, and where.
        pattern: in Python's dialect.
        path: a file, or a folder that is searched with all below it.
        glob: only files whose name, or path below `path`, matches this.
        max_matches: stop after so many, and say so.

    Raises:
        ToolError: there is no such path, or the pattern is none.
    """
    if max_matches < 1:
        raise ToolError(f"max_matches: {max_matches} is less than 1")
    none = f"No line matches {pattern!r} in {path}"
    return await _search(ctx, none, "grep", path, pattern, glob, str(max_matches))


async def matches(
    ctx: ToolContext, pattern: str, path: str, *, numbered: bool, timeout_s: float = math.inf
) -> str:
    """All lines of one file that match, whole, each as `number:text` if `numbered`.

    Returns:
        a spool file that holds them, in UTF-8.

    Raises:
        ToolError: the pattern is none, or took too long.
    """
    return await _found(ctx, "lines", path, pattern, "numbered" if numbered else "plain", timeout_s=timeout_s)


async def write_file(ctx: ToolContext, *, file_path: str, content: str) -> Output:
    """Write a file, new or in place of what it held. Missing folders are made, its mode is kept.

    Raises:
        ToolError: it may not be written, or is no regular file.
    """
    path, data = _path(ctx, file_path), output.encode("content", content)
    await trio.to_thread.run_sync(_write, path, data)
    return Output(f"Wrote {len(data)} bytes to {path}")


async def edit_file(
    ctx: ToolContext, *, file_path: str, old_text: str, new_text: str, replace_all: bool = False
) -> Output:
    """Replace a text that occurs exactly once in a file, or all its occurrences.

    Raises:
        ToolError: it occurs never, or more than once (and how often), or the file may not be written.
    """
    path = _path(ctx, file_path)
    old, new = output.encode("old_text", old_text), output.encode("new_text", new_text)
    if not old or old == new:
        raise ToolError(
            "old_text is empty: use write_file" if not old else "old_text and new_text are the same"
        )
    count = await trio.to_thread.run_sync(_edit, path, old, new, replace_all)
    return Output(f"Replaced {count} occurrence{'s' * (count != 1)} in {path}")


def _path(ctx: ToolContext, path: str) -> str:
    if b"\0" in output.encode("path", path):
        raise ToolError("path: it holds a NUL character")
    return str(Path(ctx.cwd, path))


@contextmanager
def _faults(
    path: str, missing: str = "File not found", file: str = "Not a directory"
) -> Generator[None, None, None]:
    """Turn the system's refusals into sentences for the model."""
    try:
        yield
    except FileNotFoundError:
        raise ToolError(f"{missing}: {path}") from None
    except (NotADirectoryError, FileExistsError):  # the second is mkdir's word for it
        raise ToolError(f"{file}: {path}") from None
    except OSError as error:
        raise ToolError(f"{error.strerror}: {path}") from None


def _open(path: str) -> int:
    """Open a regular file for reading."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _check_regular(path, os.fstat(fd))
        _check_foreign(path, fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_foreign(path: str, fd: int) -> None:
    if paths.is_of_a_process(paths.opened(fd)):
        raise ToolError(f"Permission denied: {path}")


def _check_regular(path: str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise ToolError(f"Is a directory: {path}")
    if not stat.S_ISREG(status.st_mode):
        raise ToolError(f"Not a regular file: {path}")


def _read(path: str, spool: str) -> Output:
    try:
        with _faults(path), open(_open(path), "rb") as file:
            output.copy(file.fileno(), spool)
        trio.from_thread.check_cancelled()
        return output.answer(spool)
    except BaseException:
        output.remove(spool)
        raise


def _list(path: str, spool: str, show_hidden: bool, detailed: bool) -> Output:
    with _faults(path, "Directory not found", "Path is not a directory"), os.scandir(path) as entries:
        lines = sorted(_line(entry, detailed) for entry in entries if show_hidden or entry.name[0] != ".")
    if not lines:
        return Output(f"Directory '{path}' is empty.")
    return output.text_answer(spool, "\n".join((f"Contents of '{path}':", *lines)))


def _line(entry: os.DirEntry[str], detailed: bool) -> str:
    # os.path's: Path's and the entry's own raise for a link in a circle, and one name must not spoil the list
    line = f"{'d' if os.path.isdir(entry) else 'f'} {entry.name}"  # noqa: PTH112
    if not detailed:
        return line
    status = entry.stat(follow_symlinks=os.path.exists(entry))  # noqa: PTH110
    changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.st_mtime))
    return f"{line} (Size: {_size(status.st_size)}, Modified: {changed})"


def _size(size: float) -> str:
    """A number of bytes as people read it: `1.2 KB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def _write(path: str, data: bytes) -> None:
    with _faults(path):
        target = Path(os.path.realpath(path))  # a link stays a link, and what it names is written
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, target, data)


def _replace(path: str, target: Path, data: bytes) -> None:
    """Put `data` in the place of `target`, with its mode, and with its owner if we may."""
    try:
        old = target.stat()
    except FileNotFoundError:
        old = None
    if old:
        _check_regular(path, old)
        if not os.access(target, os.W_OK):
            raise ToolError(f"Permission denied: {path}")
    fresh = target.with_name(f".llmprocd-{secrets.token_hex(8)}")
    try:
        with fresh.open("xb") as file:
            file.write(data)
            if old:
                _resemble(file.fileno(), old)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the name and not the content
        fresh.replace(target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _resemble(fd: int, old: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.fchown(fd, old.st_uid, old.st_gid)
    os.fchmod(fd, stat.S_IMODE(old.st_mode))


def _edit(path: str, old: bytes, new: bytes, replace_all: bool) -> int:
    with _faults(path), _locked(path) as fd:
        size = os.fstat(fd).st_size
        if size > EDIT_LIMIT:
            raise ToolError(f"File too large to edit: {path} has {size} bytes, the limit is {EDIT_LIMIT}")
        with open(fd, "rb", closefd=False) as file:
            data = file.read()
        count = data.count(old)
        if count == 0:
            raise ToolError(f"old_text was not found in {path}")
        if not replace_all and data.find(old) != data.rfind(old):
            raise ToolError(
                f"old_text was found {max(count, 2)} times in {path}: make it unique, or use replace_all"
            )
        trio.from_thread.check_cancelled()
        _replace(path, Path(os.path.realpath(path)), data.replace(old, new))
        return count


@contextmanager
def _locked(path: str) -> Generator[int, None, None]:
    """A file, open, that no other edit changes meanwhile: edits of one turn run side by side."""
    while True:
        fd = _open(path)
        try:
            if _lock(fd) and os.path.samestat(os.fstat(fd), Path(path).stat()):
                yield fd
                return
        finally:
            os.close(fd)
        trio.from_thread.check_cancelled()


def _lock(fd: int) -> bool:
    """Take the lock of an open file; False after a short wait if somebody has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(LOCK_PAUSE_S)
        return False
    return True


async def _search(ctx: ToolContext, none: str, *args: str) -> Output:
    """Run the search program; `none` is the answer if it finds nothing."""
    found = output.answer(await _found(ctx, *args))
    return found if found.text or found.spool else Output(none)


async def _found(ctx: ToolContext, *args: str, timeout_s: float = math.inf) -> str:
    """Run the search program: the spool file that holds what it found."""
    program = (sys.executable, "-I", "-S", "-X", "utf8", search.__file__)
    ended = await shell.run(ctx, (*program, *args), timeout_s=timeout_s)
    if ended.status or ended.why:
        said = output.answer(ended.spool)
        output.remove(said.spool or ended.spool)
        raise ToolError(ended.why or said.text.strip() or f"{args[0]} failed")
    return ended.spool


WHERE = "Absolute, or relative to the working directory."


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


SPECS = (
    Spec(
        name="read_file",
        access=Access.READ,
        description="Read a whole file.",
        input_schema=output.schema(("file_path",), file_path=_text(WHERE)),
        run=read_file,
        pure=True,
    ),
    Spec(
        name="list_dir",
        access=Access.READ,
        description="List a folder: lines `d name` for folders and `f name` for files.",
        input_schema=output.schema(
            (),
            directory_path=_text(WHERE, default="."),
            show_hidden={
                "type": "boolean",
                "description": "Also names that begin with a dot.",
                "default": False,
            },
            detailed={"type": "boolean", "description": "With size and time of change.", "default": False},
        ),
        run=list_dir,
        pure=True,
    ),
    Spec(
        name="glob",
        access=Access.READ,
        description="Find files and folders by name, for example `src/**/*.py`. One path a line.",
        input_schema=output.schema(
            ("pattern",),
            pattern=_text("With * ? [a-z], and ** for any number of folders."),
            path=_text("The folder to start from.", default="."),
        ),
        run=glob,
        pure=True,
    ),
    Spec(
        name="grep",
        access=Access.READ,
        description=(
            "Find lines by regular expression (Python's dialect) in a file or the text files below a folder. "
            "Lines `path:line:text`. Version control, caches and node_modules are left out."
        ),
        input_schema=output.schema(
            ("pattern",),
            pattern=_text("The regular expression."),
            path=_text("A file or a folder.", default="."),
            glob=_text("Only files whose name or path matches, for example `*.py`.", default=""),
            max_matches={
                "type": "integer",
                "description": "Stop after so many.",
                "default": 1000,
                "minimum": 1,
            },
        ),
        run=grep,
        pure=True,
    ),
    Spec(
        name="write_file",
        access=Access.WRITE,
        description="Write a whole file. What it held is lost; missing folders are made.",
        input_schema=output.schema(
            ("file_path", "content"),
            file_path=_text(WHERE),
            content=_text("The new content, all of it."),
        ),
        run=write_file,
        pure=False,
    ),
    Spec(
        name="edit_file",
        access=Access.WRITE,
        description="Replace a text in a file. It must be there exactly, and only once unless replace_all.",
        input_schema=output.schema(
            ("file_path", "old_text", "new_text"),
            file_path=_text(WHERE),
            old_text=_text("What is there, exactly, with enough around it to be unique."),
            new_text=_text("What shall be there."),
            replace_all={"type": "boolean", "description": "Replace every occurrence.", "default": False},
        ),
        run=edit_file,
        pure=False,
    ),
)
