"""The socket: MessagePack-RPC connections.

Law: nothing leaves before the commit it was made from is durable.
Law: calls that do not wait take effect and are answered in the order asked; the others when they are done.
Law: whatever a client sends, and however it goes away, ends that client's connection and nothing else.
Law: a failure of a handler that is no KernelError is a bug. It is not caught here: it leaves `serve` and ends
the daemon, which is restarted into its last commit.

An idle connection is one task that waits for input; the tasks that write and release exist while there is
something to write and release. A send is tried before anything waits, since it nearly always succeeds. A read
waits first: trying costs a system call and an exception when the client waits for its answer, as most do, and
so each chunk is a checkpoint at which others have their turn.
"""

import errno
import itertools
import logging
import select
import socket
import struct
from collections import deque
from collections.abc import Awaitable
from typing import Any, Final, Protocol

import msgspec
import trio

from llmprocd.abi import wire
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.wire import Answer

HIGH_WATER: Final = 1 << 20
"""Unsent bytes of one connection above which nothing more is read from it."""

_CHUNK: Final = 1 << 16
_GATHER: Final = 64  # buffers in one sendmsg
_PARTING: Final = 2.0  # seconds to take leave of a client whose frames cannot be read
_PROBE: Final = 0.05  # seconds between looks whether a half-closed client is still there
_PAUSE: Final = 0.1  # seconds without accepting when descriptors run out

_log = logging.getLogger(__name__)


class Caller(Protocol):
    """Who is at the other end. The server knows only how it wants its errors."""

    @property
    def errors(self) -> str: ...


class Push(Protocol):
    """A connection as its subscriptions see it."""

    def notify(self, method: str, params: object, ticket: int = 0) -> bool:
        """Send a notification with one argument. False when too much is unsent: try again once `writable`.

        A notification never overtakes one, or an inline reply, that was handed over before it. Not to be
        called from within `Door.call`: the reply of the call under way does not exist yet.
        """
        ...

    async def writable(self) -> None:
        """Wait until `notify` would be True. That is never, once the client is gone: `hang_up` cancels."""
        ...


class Door(Protocol):
    """What stands behind the socket: the system calls, and how far they are on disk."""

    @property
    def durable(self) -> int:
        """The highest commit that is durable."""
        ...

    async def wait_durable(self, ticket: int) -> None:
        """Return when this commit is durable."""
        ...

    async def admit(self, os_pid: int, uid: int, gid: int, push: Push) -> Caller:
        """Who the peer is; EPERM when it may not come in."""
        ...

    def call(self, caller: Any, method: str, params: bytes) -> Answer | Awaitable[Answer]:
        """Run a call; raises KernelError.

        Args:
            caller: what `admit` gave.
            method: its name, as sent.
            params: msgpack of the one map of arguments, b"" when there is none.

        Returns:
            The answer, or an awaitable of it: of a call that waits, which may be cancelled while it does, or
            of one that first needs something from the disk.
        """
        ...

    def waits(self, method: str) -> bool:
        """Is it a call that waits for something to happen? All others keep their turn."""
        ...

    def hang_up(self, caller: Any) -> None:
        """The client is gone: end what pushes to it. Its calls have ended."""
        ...


class _Held(msgspec.Struct, frozen=True, gc=False):
    """Something to send once its commit is durable, and whatever was to be sent after it."""

    ticket: int
    frame: bytes
    msgid: int | None


class Connection:
    """One client. Also its Push."""

    __slots__ = (
        "caller", "door", "gone", "held", "held_ids", "nursery", "out", "peer", "releasing", "room", "sock",
        "unsent", "waiting", "writing",
    )  # fmt: skip

    nursery: trio.Nursery  # of everything that is done for this client

    def __init__(self, sock: socket.socket, door: Door) -> None:
        self.sock = sock
        self.door = door
        self.peer = _peer(sock)
        self.caller: Caller | None = None
        self.gone = False
        self.waiting: dict[int, trio.CancelScope] = {}
        self.held: deque[_Held] = deque()
        self.held_ids: set[int] = set()
        self.out: deque[bytes | memoryview] = deque()
        self.unsent = 0  # bytes in held and out
        self.room = trio.lowlevel.ParkingLot()
        self.writing = self.releasing = False

    def notify(self, method: str, params: object, ticket: int = 0) -> bool:
        if self.gone or self.unsent > HIGH_WATER:
            return False
        _hand_over(self, wire.notification(method, params), ticket)
        _flush(self)
        return True

    async def writable(self) -> None:
        await trio.lowlevel.checkpoint()
        while self.unsent > HIGH_WATER or self.gone:
            await self.room.park()


async def serve(
    listener: socket.socket, door: Door, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answer clients until cancelled.

    Args:
        listener: an AF_UNIX stream socket that listens; it stays the caller's to close.
        door: what runs their calls.
        task_status: told once clients are accepted.
    """
    listener.setblocking(False)
    async with trio.open_nursery() as nursery:
        task_status.started()
        while True:
            sock = await _accept(listener)
            nursery.start_soon(_connection, sock, door)


async def _accept(listener: socket.socket) -> socket.socket:
    while True:
        await trio.lowlevel.wait_readable(listener)
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            continue  # it went away again, or another daemon on the same socket was quicker
        except OSError as exc:
            if exc.errno not in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                raise
            _log.warning("accepting nobody for %s s: %s", _PAUSE, exc.strerror)
            await trio.sleep(_PAUSE)
            continue
        sock.setblocking(False)
        return sock


async def _connection(sock: socket.socket, door: Door) -> None:
    """The life of one connection."""
    with sock:
        conn = Connection(sock, door)
        try:
            async with trio.open_nursery() as conn.nursery:
                await _converse(conn)
                conn.nursery.cancel_scope.cancel(reason="the conversation is over")
        finally:
            conn.gone = True
            if conn.caller is not None:
                door.hang_up(conn.caller)


async def _converse(conn: Connection) -> None:
    try:
        caller = conn.caller = await conn.door.admit(*conn.peer, conn)
    except KernelError as error:
        await _turn_away(conn, error)
        return
    if await _read(conn, caller):
        await _finish(conn)
    else:
        await _part(conn)


async def _read(conn: Connection, caller: Caller) -> bool:
    """Read and handle until the client sends no more. False: what it sent cannot be read on."""
    framer = wire.Framer()
    while chunk := await _receive(conn.sock):
        for frame in framer.feed(chunk):
            if isinstance(frame, wire.Request):
                slow = _request(conn, caller, frame)
                if slow is not None:
                    await _in_turn(conn, caller, frame.msgid, slow)
            elif isinstance(frame, wire.Refused):
                _refused(conn, caller, frame)
                if frame.fatal:
                    return False
            elif isinstance(frame, wire.Notification):
                _notified(conn, frame)
            else:
                _log.info("peer=%d a response to no request: %d", conn.peer[0], frame.msgid)
            if _is_full(conn):
                await _room(conn)
        _flush(conn)
    return True


def _is_full(conn: Connection) -> bool:
    return conn.unsent > HIGH_WATER or len(conn.held) >= wire.MAX_IN_FLIGHT


async def _room(conn: Connection) -> None:
    """Stop reading until the client has read, and the disk has caught up."""
    _flush(conn)
    while _is_full(conn):
        await conn.room.park()


async def _receive(sock: socket.socket) -> bytes:
    """The next bytes; none when there will be no more."""
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            return sock.recv(_CHUNK)
        except BlockingIOError:
            continue
        except OSError:
            return b""


def _request(conn: Connection, caller: Caller, frame: wire.Request) -> Awaitable[Answer] | None:
    """Run a call: answer it at once, or give it a task when it waits.

    Returns one that needs the disk, which must end before the client's next one begins.
    """
    msgid = frame.msgid
    try:
        _check_in_flight(conn, msgid)
        method = wire.name(frame.method)
        answer = conn.door.call(caller, method, wire.arguments(frame.params))
    except KernelError as error:
        _hand_over(conn, wire.refusal(msgid, error, caller.errors), error.ticket, msgid)
        return None
    if isinstance(answer, Answer):
        _hand_over(conn, wire.reply(msgid, answer.result), answer.ticket, msgid)
        return None
    if not conn.door.waits(method):
        return answer
    # The scope is there before the task runs: a $/cancel may be in this same chunk.
    scope = conn.waiting[msgid] = trio.CancelScope()
    conn.nursery.start_soon(_wait, conn, caller, msgid, answer, scope)
    return None


async def _in_turn(conn: Connection, caller: Caller, msgid: int, call: Awaitable[Answer]) -> None:
    """See a call through and answer it, while what the client sent after it waits."""
    _flush(conn)  # what was answered before it
    watching = trio.CancelScope()
    conn.nursery.start_soon(_watch, conn, watching)
    try:
        answer = await call
    except KernelError as error:
        _hand_over(conn, wire.refusal(msgid, error, caller.errors), error.ticket, msgid)
    else:
        _hand_over(conn, wire.reply(msgid, answer.result), answer.ticket, msgid)
    watching.cancel(reason="the client is read from again")


async def _watch(conn: Connection, watching: trio.CancelScope) -> None:
    """Notice that the client hangs up while nothing is read from it."""
    with watching:
        await trio.sleep(_PROBE)  # nearly always the call is done by then
        while not _hung_up(conn.sock):  # noqa: ASYNC110  as in `_finish`
            await trio.sleep(_PROBE)
        _lost(conn)


def _check_in_flight(conn: Connection, msgid: int) -> None:
    if msgid in conn.waiting or msgid in conn.held_ids:
        raise KernelError(Errno.EEXIST, f"msgid {msgid} is in use")
    if len(conn.waiting) >= wire.MAX_IN_FLIGHT:
        raise KernelError(Errno.ENOBUFS, f"{wire.MAX_IN_FLIGHT} requests of this connection are in flight")


async def _wait(
    conn: Connection, caller: Caller, msgid: int, call: Awaitable[Answer], scope: trio.CancelScope
) -> None:
    """Wait for a call, and answer it."""
    outcome: Answer | KernelError = KernelError(Errno.ECANCELED, f"request {msgid} was cancelled")
    with scope:
        try:
            outcome = await call
        except KernelError as error:
            outcome = error
    # From here on it has happened, and a $/cancel comes too late.
    if isinstance(outcome, KernelError):
        frame = wire.refusal(msgid, outcome, caller.errors)
    else:
        frame = wire.reply(msgid, outcome.result)
    if outcome.ticket > conn.door.durable:
        await conn.door.wait_durable(outcome.ticket)
    del conn.waiting[msgid]
    _append(conn, frame)
    _flush(conn)


def _refused(conn: Connection, caller: Caller, frame: wire.Refused) -> None:
    if frame.fatal:
        _log.warning("peer=%d closing: %s: %s", conn.peer[0], frame.errno.name, frame.text)
    if frame.msgid is not None:
        _hand_over(conn, wire.refusal(frame.msgid, KernelError(frame.errno, frame.text), caller.errors), 0)


def _notified(conn: Connection, frame: wire.Notification) -> None:
    """Cancel what `$/cancel` names; other notifications are ignored (editors introduce themselves)."""
    try:
        if wire.name(frame.method) != "$/cancel":
            return
        (msgid,) = msgspec.msgpack.decode(frame.params, type=tuple[int])
    except (KernelError, msgspec.MsgspecError):
        _log.info("peer=%d a notification that says nothing", conn.peer[0])
        return
    scope = conn.waiting.get(msgid)
    if scope is not None:
        scope.cancel(reason="the client cancelled the request")


def _hand_over(conn: Connection, frame: bytes, ticket: int, msgid: int | None = None) -> None:
    """Send this after all that was handed over before it, and not before its commit is durable."""
    if not conn.held and ticket <= conn.door.durable:
        _append(conn, frame)
        return
    conn.held.append(_Held(ticket, frame, msgid))
    conn.unsent += len(frame)
    if msgid is not None:
        conn.held_ids.add(msgid)
    if not conn.releasing:
        conn.releasing = True
        conn.nursery.start_soon(_release, conn)


async def _release(conn: Connection) -> None:
    """Let go, in order, of what has become durable."""
    while conn.held:
        await conn.door.wait_durable(conn.held[0].ticket)
        durable = conn.door.durable
        while conn.held and conn.held[0].ticket <= durable:
            held = conn.held.popleft()
            if held.msgid is not None:
                conn.held_ids.discard(held.msgid)
            conn.unsent -= len(held.frame)
            _append(conn, held.frame)
        _flush(conn)
        conn.room.unpark_all()
    conn.releasing = False


def _append(conn: Connection, frame: bytes) -> None:
    conn.out.append(frame)
    conn.unsent += len(frame)


def _flush(conn: Connection) -> None:
    """Send what can be sent at once; a task sends the rest."""
    if conn.writing or not conn.out:
        return
    if len(conn.out) > 1:
        joined = b"".join(conn.out)
        conn.out.clear()
        conn.out.append(joined)
    _send(conn)
    if conn.out:
        conn.writing = True
        conn.nursery.start_soon(_write, conn)


async def _write(conn: Connection) -> None:
    """Send the rest as the client reads."""
    while conn.out:
        await trio.lowlevel.wait_writable(conn.sock)
        _send(conn)
        if conn.unsent <= HIGH_WATER:
            conn.room.unpark_all()
    conn.writing = False


def _send(conn: Connection) -> None:
    """One send, of as much as the socket takes."""
    try:
        if len(conn.out) == 1:
            sent = conn.sock.send(conn.out[0], socket.MSG_NOSIGNAL)
        else:
            sent = conn.sock.sendmsg(list(itertools.islice(conn.out, _GATHER)), (), socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return
    except OSError:
        _lost(conn)
        return
    conn.unsent -= sent
    while sent:
        first = conn.out.popleft()
        if len(first) > sent:
            conn.out.appendleft(memoryview(first)[sent:])
            return
        sent -= len(first)


def _lost(conn: Connection) -> None:
    """The client has hung up: nothing it asked for is waited for any more."""
    conn.gone = True
    conn.out.clear()
    conn.nursery.cancel_scope.cancel(reason="the client hung up")


async def _finish(conn: Connection) -> None:
    """Answer what a half-closed client still waits for; give up when it hangs up."""
    # No event tells that it is gone: a stream at its end is readable for ever.
    while (conn.waiting or conn.held or conn.out) and not _hung_up(conn.sock):  # noqa: ASYNC110
        await trio.sleep(_PROBE)


async def _part(conn: Connection) -> None:
    """Take leave of a client whose frames cannot be read: done calls are answered, others cancelled."""
    for scope in conn.waiting.values():
        scope.cancel(reason="the stream cannot be read on")
    with trio.move_on_after(_PARTING):
        _flush(conn)
        await _finish(conn)
        await _linger(conn.sock)


async def _linger(sock: socket.socket) -> None:
    """Say that no more will come, and throw away what does.

    Closing over unread bytes would break a client that is still sending, before it has read why.
    """
    sock.shutdown(socket.SHUT_WR)
    while await _receive(sock):
        continue


async def _turn_away(conn: Connection, error: KernelError) -> None:
    """Answer the first thing that a client asks which may not come in, and close."""
    _log.warning("peer=%d uid=%d turned away: %s", conn.peer[0], conn.peer[1], error)
    framer = wire.Framer()
    with trio.move_on_after(_PARTING):
        while chunk := await _receive(conn.sock):
            asked = [f.msgid for f in framer.feed(chunk) if isinstance(f, wire.Request)]
            for msgid in asked:
                _append(conn, wire.refusal(msgid, error))
            _flush(conn)
            if asked:
                break
        await _linger(conn.sock)


def _peer(sock: socket.socket) -> tuple[int, int, int]:
    """Pid, uid and gid of whoever connected."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


def _hung_up(sock: socket.socket) -> bool:
    """Whether the client is gone; one that only said it sends no more is not."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))
