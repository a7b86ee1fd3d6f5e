"""A blocking client: MessagePack-RPC over the daemon's socket.

Law: replies may come in any order; each goes to whoever asked.
Law: a Client that raised UnreachableError is of no more use; what it asked for may have happened or not.

`_socket` is what `socket` is made of; the rest of `socket` takes eight milliseconds to import, pathlib five.
"""
# ruff: noqa: PTH119, PTH120

import _socket
import os

from llmprocctl import _mini

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SUN_PATH = 107
"""The longest name that fits into a socket address, in bytes."""

_CHUNK = 1 << 18
_STOPPING = ("ESHUTDOWN", "ECANCELED")  # we cancel only what we do not wait for
_LARGE = 1 << 17  # from here on importing msgspec costs less than decoding without it


class UnreachableError(Exception):
    """No daemon answers at this socket, or it went away."""


class LostError(UnreachableError):
    """The connection broke: what was asked for may have happened or not."""


class RefusedError(Exception):
    """The daemon's errno and sentence."""

    def __init__(self, errno: int, name: str, text: str) -> None:
        super().__init__(text)
        self.errno = errno
        self.name = name
        self.text = text


class Client:
    """One connection."""

    def __init__(self, path: str) -> None:
        """Connect; UnreachableError when nobody answers."""
        self.path = path
        self.sock = connect(path)
        self._next = 0
        self._buf = bytearray()
        self._skipper: _mini.Skipper | None = None
        self._done: dict[int, tuple[Any, Any]] = {}
        self._pushed: list[Any] = []
        self._dropped: set[int] = set()

    def call(self, method: str, /, **params: "Any") -> "Any":
        """Ask and wait for the result. Raises RefusedError, UnreachableError."""
        return self.take(self.send(method, **params))

    def send(self, method: str, /, **params: "Any") -> int:
        """Ask; arguments that are None are left out. The number to `take` the result by."""
        self._next += 1
        given = {key: value for key, value in params.items() if value is not None}
        self._write(_mini.pack([0, self._next, method, [given] if given else []]))
        return self._next

    def take(self, msgid: int) -> "Any":
        """Wait for the result of a request. Raises RefusedError, UnreachableError."""
        while msgid not in self._done:
            self._read()
        error, result = self._done.pop(msgid)
        if error is None:
            return result
        refusal = refused(error)
        if refusal.name in _STOPPING:
            raise LostError(f"the daemon at {self.path} is stopping")
        raise refusal

    def answered(self, msgid: int) -> bool:
        """Whether `take` would not wait."""
        return msgid in self._done

    def has_pushed(self) -> bool:
        """Whether `pushed` would give anything."""
        return bool(self._pushed)

    def pushed(self) -> "list[tuple[str, Any]]":
        """The notifications since the last look: method and argument."""
        frames, self._pushed = self._pushed, []
        return [(frame[1], frame[2][0]) for frame in frames if len(frame) == 3 and as_list(frame[2])]

    def tell(self, method: str, /, **params: "Any") -> None:
        """Ask, and do not care for the result."""
        self._dropped.add(self.send(method, **params))

    def drop(self, msgid: int) -> None:
        """Cancel a request that waits, and forget about its result."""
        if self._done.pop(msgid, None) is None:
            self._dropped.add(msgid)
            self._write(_mini.pack([2, "$/cancel", [msgid]]))

    def pump(self, timeout_s: float | None, also: tuple[int, ...] = ()) -> set[int]:
        """Wait until the daemon has said something, and hear it.

        Args:
            timeout_s: at most so long; None for ever.
            also: other descriptors to wait for.

        Returns:
            Those of them that can be read.
        """
        from math import ceil
        from select import POLLIN, poll

        poller = poll()
        own = self.sock.fileno()
        for fd in (own, *also):
            poller.register(fd, POLLIN)
        millis = None if timeout_s is None else max(0, ceil(timeout_s * 1000))
        found = {fd for fd, _ in poller.poll(millis)}
        if own in found:
            self._read()
        return found - {own}

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def closed(self) -> None:
        """Wait until the daemon has closed the connection."""
        while self.sock.recv(_CHUNK):
            pass

    def _write(self, frame: bytes) -> None:
        view = memoryview(frame)
        try:
            while view:
                view = view[self.sock.send(view, _socket.MSG_NOSIGNAL) :]
        except OSError as exc:
            raise LostError(f"the daemon at {self.path} went away: {exc.strerror}") from exc

    def _read(self) -> None:
        try:
            chunk = self.sock.recv(_CHUNK)
        except OSError as exc:
            raise LostError(f"the daemon at {self.path} went away: {exc.strerror}") from exc
        if not chunk:
            raise LostError(f"the daemon at {self.path} went away")
        self._buf += chunk
        try:
            self._decode()
        except ValueError as exc:
            raise UnreachableError(f"what answers at {self.path} is no llmprocd: {exc}") from exc

    def _decode(self) -> None:
        """Hear every frame that is all there."""
        while self._buf:
            if self._skipper is None:
                try:
                    frame, end = _mini.unpack(self._buf)
                except _mini.TruncatedError:
                    self._skipper = _mini.Skipper()
                    continue
            elif self._skipper.ends(self._buf):
                end = self._skipper.pos
                frame = _decoded(bytes(self._buf[:end]))
            else:
                return
            self._skipper = None
            del self._buf[:end]
            self._hear(frame)

    def _hear(self, frame: "Any") -> None:
        """Keep a response or a notification. A request is not for us: tools are registered by others."""
        parts = as_list(frame)
        if not parts:
            raise ValueError("a frame is no array")
        if parts[0] == 2:
            self._pushed.append(parts)
        if parts[0] == 1 and len(parts) == 4:
            msgid = parts[1]
            if msgid in self._dropped:
                self._dropped.discard(msgid)
            else:
                self._done[msgid] = parts[2], parts[3]


def connect(path: str) -> _socket.socket:
    """A connected socket; UnreachableError."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        if len(os.fsencode(path)) <= SUN_PATH:
            sock.connect(path)
        else:
            _connect_long(sock, path)
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        sock.close()
        raise UnreachableError(f"no daemon at {path} (start it: llmprocctl daemon start)") from None
    except OSError as exc:
        sock.close()
        raise UnreachableError(f"no daemon can be reached at {path}: {exc.strerror or exc}") from None
    return sock


def refused(error: "Any") -> RefusedError:
    """The exception that an error object on the wire is."""
    errno, text = (int(error[0]), str(error[1])) if len(as_list(error)) > 1 else (0, str(error))
    name, colon, sentence = text.partition(": ")
    if not colon or not name.isalnum() or not name.isupper():
        name, sentence = "", text
    return RefusedError(errno, name, sentence)


def as_list(value: "Any") -> "list[Any]":
    """A value that is an array; none for anything else."""
    return value if type(value) is list else []  # pyright: ignore[reportUnknownVariableType]


def _connect_long(sock: _socket.socket, path: str) -> None:
    """Connect by way of the open folder, for a path that is too long for a socket address."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
    finally:
        os.close(folder)


def _decoded(frame: bytes) -> "Any":
    if len(frame) < _LARGE:
        return _mini.unpack(frame)[0]
    from msgspec import msgpack

    return msgpack.decode(frame)
