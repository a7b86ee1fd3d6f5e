"""Starting a process: what is sent, and what becomes of it when it cannot start.

Law: a process is started once, however often the request for it had to be sent.
"""

import os

from llmprocctl import session as sessions
from llmprocctl.client import LostError, RefusedError
from llmprocctl.session import Session, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STDIN_TEXT = 8000
"""A stdin of at most so many characters is put into the prompt; a longer one becomes a descriptor."""

LARGEST = 1_000_000
"""Bytes of the longest message that fits into a request."""

ENDINGS = (".toml", ".yaml", ".yml")


class CannotStartError(Exception):
    """The daemon refused; `status` is what to exit with."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Stdin:
    """What stdin held: a text when it is short, else the path of a file of ours."""

    def __init__(self) -> None:
        self.text = ""
        self.path = ""

    def close(self) -> None:
        """Remove the file."""
        if self.path:
            os.unlink(self.path)  # noqa: PTH108 - pathlib costs five milliseconds
            self.path = ""


def spawn(
    session: Session,
    *,
    program: str,
    words: tuple[str, ...],
    stdin: Stdin,
    interactive: bool = False,
    name: str | None,
    nice: int | None,
    cwd: str | None,
    env: tuple[str, ...],
    limit: tuple[str, ...],
    access: str | None,
) -> int:
    """Start a process.

    Args:
        session: where.
        program: as the user wrote it.
        words: of the prompt; none for none.
        stdin: what was read, or nothing.
        interactive: keep fd 0 open.
        name: what %NAME will stand for.
        nice: -20 to 19.
        cwd: where it works; None for here.
        env: variables as K=V.
        limit: limits as NAME=VALUE.
        access: read, write or admin.

    Returns:
        Its pid. Raises CannotStartError; UsageError when there is nothing to ask the model.
    """
    prompt = "\n\n".join(filter(None, (" ".join(words), stdin.text))) if words or stdin.text else None
    params: dict[str, Any] = {
        "program": find(program),
        "prompt": prompt,
        "stdin_path": stdin.path or None,
        "interactive": interactive or None,
        "needs_prompt": (prompt is None and not stdin.path and not interactive) or None,
        "name": name,
        "nice": nice,
        "cwd": os.path.abspath(cwd or ""),  # noqa: PTH100
        "env": pairs(env, "--env") or None,
        "limits": pairs(limit, "--limit") or None,
        "access": access,
    }
    session.starting()
    try:
        pid: int = once(session, "proc.spawn", params)["pid"]
    except RefusedError as error:
        if session.command == "spawn" and error.text.endswith("no prompt of its own: give one"):
            raise UsageError(f"{error.text}, or -i to send it later") from None
        raise cannot_start(program, error) from None
    return pid


def once(session: Session, method: str, params: "dict[str, Any]") -> "Any":
    """A call that makes something, sent again when its answer was lost: the daemon knows it by its number."""
    params = {**params, "request_id": os.urandom(16).hex()}
    try:
        return session.call(method, **params)
    except LostError:
        session.reconnect()
        if method == "proc.spawn":
            session.starting()
        return session.call(method, **params)


def find(word: str) -> str:
    """The absolute path of a program, or its name when only the daemon can know it."""
    if "/" in word or word.endswith(ENDINGS):
        return os.path.abspath(word)  # noqa: PTH100
    for folder in filter(None, os.environ.get("LLMPROC_PATH", "").split(":")):
        for ending in ("", *ENDINGS):
            path = os.path.abspath(f"{folder}/{word}{ending}")  # noqa: PTH100
            if os.path.isfile(path):  # noqa: PTH113
                return path
    return word


def pairs(words: tuple[str, ...], option: str) -> dict[str, str]:
    """The values of options such as `--env K=V`; UsageError."""
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise UsageError(f"{option}: {word!r} is not of the form NAME=VALUE")
        found[key] = value
    return found


def read_stdin() -> Stdin:
    """All of stdin."""
    data = b""
    while part := os.read(0, 1 << 16):
        data += part
        if len(data) > 4 * STDIN_TEXT:
            return _spooled(data)
    try:
        text = data.decode().rstrip("\n")
    except UnicodeDecodeError:
        return _spooled(data)
    if len(text) > STDIN_TEXT:
        return _spooled(data)
    stdin = Stdin()
    stdin.text = text if text.strip() else ""
    return stdin


def _spooled(data: bytes) -> Stdin:
    """Put what was read, and the rest of stdin, into a file that the daemon copies."""
    from tempfile import mkstemp

    stdin = Stdin()
    fd, stdin.path = mkstemp(prefix="llmprocctl-")
    try:
        while data:
            os.write(fd, data)
            data = os.read(0, 1 << 18)
    except BaseException:
        stdin.close()
        raise
    finally:
        os.close(fd)
    return stdin


def cannot_start(program: str, error: RefusedError) -> CannotStartError:
    """What to say, and what to exit with, when the daemon refused a program."""
    if error.name == "ENOENT" and error.text.startswith("no such program"):
        hint = error.text.partition(";")[2]
        return CannotStartError(f"{program}: no such program{hint and ';' + hint}", sessions.NOT_FOUND)
    if error.name == "EINVAL":  # an argument, not the program
        return CannotStartError(error.text, sessions.USAGE)
    if error.name == "ENOEXEC" and error.text.startswith("/"):  # every line names the file
        return CannotStartError(error.text, sessions.CANNOT_START)
    return CannotStartError(f"{program}: {error.text}", sessions.CANNOT_START)
