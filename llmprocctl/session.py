"""One run of llmprocctl: how its command finds the daemon and names processes, and how it ends.

Law: every failure ends here, as a sentence on stderr and an exit status (`run`); nowhere else.
Law: stdout is data, stderr is talk.
"""

import os
import sys

from llmprocctl import table
from llmprocctl.client import Client, RefusedError, UnreachableError
from llmprocd.abi import paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

FAILED, USAGE, TIMED_OUT, UNREACHABLE, CANNOT_START, NOT_FOUND, INTERRUPTED = 1, 2, 124, 125, 126, 127, 130

_BATCH = 100  # requests in flight; a connection may have 128


class UsageError(Exception):
    """The command line asks for what does not exist."""


class Session:
    """What a command works with."""

    def __init__(self, command: str, host: str | None = None, socket: str | None = None) -> None:
        self.command = command
        self.failed = False  # an operand did
        self._host = host
        self._socket = socket
        self._client: Client | None = None

    @property
    def path(self) -> str:
        """The daemon's socket."""
        if self._socket:
            return os.path.abspath(self._socket)  # noqa: PTH100 - pathlib costs five milliseconds
        if self._host:
            return _host_path(self._host)
        try:
            return paths.socket_path(os.environ, os.getuid())
        except PermissionError as exc:
            raise UnreachableError(str(exc)) from None

    @property
    def client(self) -> Client:
        """The connection. Raises UnreachableError."""
        if self._client is None:
            self._client = Client(self.path)
        return self._client

    def starting(self) -> Client:
        """The connection, to a daemon that is started if there is none. Raises UnreachableError."""
        if self._client is None:
            try:
                return self.client
            except UnreachableError:
                if os.environ.get("LLMPROC_NO_AUTOSTART", "") not in {"", "0"}:
                    if self.command != "daemon":
                        raise
                    why = f"no daemon at {self.path}; LLMPROC_NO_AUTOSTART forbids starting one"
                    raise UnreachableError(why) from None
            from llmprocctl import autostart

            self._client = autostart.start(self.path)
        return self._client

    def close(self) -> None:
        """Hang up, if there is a connection."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def reconnect(self) -> None:
        """Forget a connection that broke."""
        self.close()

    def call(self, method: str, /, **params: "Any") -> "Any":
        """A call's result. Raises RefusedError, UnreachableError."""
        return self.client.call(method, **params)

    def say(self, text: str) -> None:
        """Tell the person."""
        complain(f"{self.command}: {text}")

    def fault(self, operand: str, error: "RefusedError | str") -> None:
        """Tell why an operand failed; the others are still done."""
        self.failed = True
        text = error if isinstance(error, str) else error.text
        if isinstance(error, RefusedError) and error.name == "ESRCH" and text.startswith("no such process"):
            text = "no such process"
        self.say(f"{operand}: {text}" if operand else text)

    @property
    def status(self) -> int:
        """The exit status of a command that tried all its operands."""
        return FAILED if self.failed else 0

    def pid(self, word: str) -> int:
        """The process that a number or `%name` stands for.

        Raises RefusedError (ESRCH); UsageError for a word that is neither.
        """
        if word.isascii() and word.isdecimal():
            if len(word) > 19 or int(word) >= 1 << 63:
                raise RefusedError(3, "ESRCH", "no such process")
            return int(word)
        if not word.startswith("%") or len(word) < 2:
            raise UsageError(f"{word}: not a pid (a number or %name)")
        rows = self.call("proc.list", all=True, pids=[word])["procs"]
        if not rows:
            raise RefusedError(3, "ESRCH", "no such process")
        living = [row for row in rows if row["status"] is None]
        return (living or rows)[-1]["pid"]

    def pids(self, words: "Iterable[str]", prefix: str = "") -> dict[str, int]:
        """The processes of several words; those that there are not are complained of."""
        found: dict[str, int] = {}
        for word in words:
            try:
                found[word] = self.pid(word)
            except RefusedError as error:
                self.fault(prefix + word, error)
            except UsageError as exc:
                self.failed = True
                self.say(f"{prefix}{exc}")
        return found

    def each(self, words: "Iterable[str]", send: "Callable[[int], int]", prefix: str = "") -> int:
        """Send one request for each process; all are tried.

        Args:
            words: the operands.
            send: sends the request for a pid.
            prefix: what stood before each operand.

        Returns:
            The exit status.
        """
        targets = list(self.pids(words, prefix).items())
        while targets:
            asked = [(word, send(pid)) for word, pid in targets[:_BATCH]]
            del targets[:_BATCH]
            for word, msgid in asked:
                try:
                    self.client.take(msgid)
                except RefusedError as error:
                    self.fault(prefix + word, error)
        return self.status


def run(settings: "dict[str, Any]", name: str, values: "dict[str, Any]") -> int:
    """Run a command.

    Args:
        settings: the global options.
        name: of the command.
        values: its arguments.

    Returns:
        The exit status.
    """
    session = Session(name, **settings)
    module, _, function = table.COMMANDS[name].run.partition(":")
    try:
        if settings["host"]:
            _host_path(settings["host"])  # a bad address is a mistake whatever else is given
        _require_utf8(values)
        verb = getattr(__import__(f"llmprocctl.{module}", fromlist=[function]), function)
        return verb(session, **values)
    except UsageError as exc:
        complain(f"{name}: {exc}")
        return USAGE
    except UnreachableError as exc:
        complain(str(exc))
        return UNREACHABLE
    except RefusedError as exc:
        session.fault(values.get("pid") or "", exc)
        return FAILED
    except OSError as exc:
        complain(f"{name}: {exc.filename or 'stdout'}: {exc.strerror}")
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        session.close()


def complain(text: str) -> None:
    """Tell the person what is wrong."""
    tell(f"llmprocctl: {text}")


def tell(line: str) -> None:
    """A line on stderr, if there is one."""
    if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison] - `2>&-`
        sys.stderr.write(f"{line}\n")


def _require_utf8(values: "dict[str, Any]") -> None:
    """Refuse words that are not UTF-8: the wire has no other texts."""
    words: list[Any] = []
    for value in values.values():
        words += value if isinstance(value, tuple) else (value,)
    for word in words:
        try:
            word.encode() if isinstance(word, str) else b""
        except UnicodeEncodeError:
            raise UsageError(f"{word!a} is not UTF-8 text (stdin may hold any bytes)") from None


def _host_path(url: str) -> str:
    scheme, colon, path = url.partition("://")
    if scheme == "unix" and path.startswith("/"):
        return path
    if scheme == "ssh" and colon:
        raise UsageError(f"{url}: ssh hosts are not supported by this version; use unix:///path")
    raise UsageError(f"{url}: not a daemon's address (they look like unix:///path)")
