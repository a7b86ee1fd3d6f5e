"""The socket server, with real sockets and a small real door behind it."""

import contextlib
import os
import resource
import select
import socket
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path

import msgpack
import msgspec
import pytest
import trio
import trio.testing

from llmprocd import listen, server
from llmprocd.abi import wire
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.wire import Answer


class Args(msgspec.Struct, forbid_unknown_fields=True):
    """What the calls of this door understand."""

    data: object = None
    seconds: float = 0.0
    size: int = 0
    errors: str = "array"


class Client(msgspec.Struct):
    """A caller of this door."""

    peer: tuple[int, int, int]
    push: server.Push
    errors: str = "array"


class Door:
    """Some calls over a table in memory. Commits are durable when the test says so."""

    def __init__(self, limit: int | None = None) -> None:
        self.durable = 0
        self.newest = 0
        self.limit = limit
        self.lot = trio.lowlevel.ParkingLot()
        self.clients: list[Client] = []
        self.done: list[object] = []
        self.ended: list[str] = []
        self.gone = trio.Event()
        self.closed = False

    async def wait_durable(self, ticket: int) -> None:
        while self.durable < ticket:
            await self.lot.park()

    def sync(self, ticket: int) -> None:
        """All commits up to this one are on disk now."""
        self.durable = ticket
        self.lot.unpark_all()

    async def admit(self, os_pid: int, uid: int, gid: int, push: server.Push) -> Client:
        await trio.lowlevel.checkpoint()
        if self.closed:
            raise KernelError(Errno.EPERM, f"process {os_pid} may not come in")
        self.clients.append(Client((os_pid, uid, gid), push))
        return self.clients[-1]

    def hang_up(self, caller: Client) -> None:
        self.clients.remove(caller)
        self.gone.set()

    def call(self, caller: Client, method: str, params: bytes) -> Answer | Awaitable[Answer]:
        args = decode(params)
        match method:
            case "hello":
                caller.errors = args.errors
                return Answer({"peer": caller.peer})
            case "echo":
                return Answer(args.data)
            case "blob":
                return Answer(bytes(args.size))
            case "fail":
                raise KernelError(Errno.ESRCH, "no such process: 99", pid=99)
            case "commit":
                return self.commit(args.data)
            case "sleep":
                return self.sleep(args)
            case "commit_later":
                return self.commit_later(args)
            case "fail_later" | "fail_slowly":
                return self.fail_later()
            case "commit_slowly":
                return self.commit_later(args)
            case _:
                assert method != "bug"
                raise KernelError(Errno.ENOSYS, f"no such call: {method}")

    def waits(self, method: str) -> bool:
        return method in {"sleep", "commit_later", "fail_later"}

    def commit(self, data: object) -> Answer:
        self.newest += 1
        self.done.append(data)
        return Answer(data, self.newest)

    async def sleep(self, args: Args) -> Answer:
        try:
            await trio.sleep(args.seconds)
        except trio.Cancelled:
            self.ended.append("cancelled")
            raise
        self.ended.append("slept")
        return Answer(args.data)

    async def commit_later(self, args: Args) -> Answer:
        await trio.sleep(args.seconds)
        return self.commit(args.data)

    async def fail_later(self) -> Answer:
        await trio.lowlevel.checkpoint()
        raise KernelError(Errno.ETIMEDOUT, "still running")


def decode(params: bytes) -> Args:
    try:
        return msgspec.msgpack.decode(params or b"\x80", type=Args)
    except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise KernelError(Errno.EINVAL, str(exc)) from None


class Peer:
    """A client that is not ours: msgpack, and a socket."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.sock.setblocking(False)
        self.unpacker = msgpack.Unpacker()

    async def send(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)

    async def ask(self, msgid: int, method: str | bytes, **args: object) -> None:
        await self.send(ask(msgid, method, **args))

    async def read(self) -> list[object] | None:
        """The next message; None at the end of the stream."""
        with trio.fail_after(10):
            while True:
                for message in self.unpacker:
                    return message
                await trio.lowlevel.wait_readable(self.sock)
                data = self.sock.recv(1 << 20)
                if not data:
                    return None
                self.unpacker.feed(data)

    async def reads(self, count: int) -> list[object]:
        return [await self.read() for _ in range(count)]

    def close(self) -> None:
        self.sock.close()

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)


def ask(msgid: int, method: str | bytes, **args: object) -> bytes:
    return msgpack.packb([0, msgid, method, [args] if args else []])


def cancel(msgid: int) -> bytes:
    return msgpack.packb([2, "$/cancel", [msgid]])


@pytest.fixture
def door() -> Door:
    return Door()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "s")


@pytest.fixture
async def served(nursery: trio.Nursery, door: Door, path: str) -> AsyncIterator[str]:
    """The path of a socket that is served."""
    with listen.bind(path) as listener:
        await nursery.start(server.serve, listener, door)
        yield path
        nursery.cancel_scope.cancel()


@pytest.fixture
async def peer(served: str) -> AsyncIterator[Peer]:
    with contextlib.closing(Peer(served)) as client:
        yield client


async def settle() -> None:
    """Let every task do what it can do now."""
    await trio.testing.wait_all_tasks_blocked(0.01)


async def test_a_call_is_answered(peer):
    """One request, one response, in MessagePack-RPC."""
    await peer.ask(1, "echo", data={"a": [1, None]})
    assert await peer.read() == [1, 1, None, {"a": [1, None]}]


async def test_a_method_may_be_bin(peer):
    """Some clients have no other kind of string."""
    await peer.ask(1, b"echo", data=5)
    assert await peer.read() == [1, 1, None, 5]


async def test_the_kernel_says_who_the_peer_is(peer):
    """Pid, uid and gid are read from the socket, not from the client."""
    await peer.ask(1, "hello")
    assert await peer.read() == [1, 1, None, {"peer": [os.getpid(), os.getuid(), os.getgid()]}]


async def test_many_calls_in_one_chunk_are_answered_in_order(peer):
    """Calls that do not wait keep their order."""
    await peer.send(b"".join(ask(i, "echo", data=i) for i in range(500)))
    assert await peer.reads(500) == [[1, i, None, i] for i in range(500)]


@pytest.mark.parametrize("method", ["nothing", b"nothing"])
async def test_an_unknown_method_is_enosys(peer, method):
    """Some clients probe for methods of their own kind first, and live with the error."""
    await peer.ask(1, method)
    assert (await peer.read())[2] == [38, "ENOSYS: no such call: nothing", {"name": "ENOSYS"}]


async def test_errors_have_the_shape_the_connection_asked_for(peer):
    """`hello` changes the shape of all later errors, of calls that wait too."""
    await peer.ask(1, "fail")
    assert (await peer.read())[2] == [3, "ESRCH: no such process: 99", {"name": "ESRCH", "pid": 99}]
    await peer.send(ask(2, "hello", errors="nvim") + ask(3, "fail") + ask(4, "fail_later"))
    assert [m[2] for m in await peer.reads(3)] == [
        None,
        [0, "ESRCH: no such process: 99"],
        [0, "ETIMEDOUT: still running"],
    ]
    await peer.send(ask(5, "hello", errors="string") + ask(6, "fail"))
    assert (await peer.reads(2))[1][2] == "ESRCH: no such process: 99"


@pytest.mark.parametrize(
    "frame",
    [
        [0, 7, "echo", {}],
        [0, 7, "echo", [5]],
        [0, 7, "echo", [{}, {}]],
        [0, 7, {}, []],
        [0, 7, 5, []],
        [0, 7, "echo"],
        [0, 7, "echo", [{"no_such": 1}]],
        [0, 7, b"\xff", []],
        [0, 7, "echo", [], 1],
    ],
)
async def test_a_bad_request_is_einval_and_the_connection_lives(peer, frame):
    """A frame that can be read far enough is answered."""
    await peer.send(msgpack.packb(frame))
    kind, msgid, error, result = await peer.read()
    assert (kind, msgid, error[0], error[2], result) == (1, 7, 22, {"name": "EINVAL"}, None)
    await peer.ask(8, "echo", data=1)
    assert await peer.read() == [1, 8, None, 1]


async def test_responses_and_unknown_notifications_are_ignored(peer):
    """Editors introduce themselves by notifications; nobody is asked anything yet."""
    await peer.send(msgpack.packb([2, b"nvim_set_client_info", ["x", {}, "remote", {}, {}]]))
    await peer.send(msgpack.packb([1, 5, None, {}]) + msgpack.packb([2, {}, 5]) + ask(1, "echo", data=1))
    assert await peer.read() == [1, 1, None, 1]


async def test_waiting_calls_are_answered_when_they_are_done(peer):
    """A call that waits does not hold up those behind it."""
    await peer.send(ask(1, "sleep", seconds=1000) + ask(2, "sleep", seconds=0.01) + ask(3, "echo"))
    assert [m[1] for m in await peer.reads(2)] == [3, 2]
    await peer.send(cancel(1))
    assert (await peer.read())[1] == 1


async def test_a_cancelled_request_is_still_answered(peer, door):
    """With ECANCELED, and the call has been told."""
    await peer.ask(1, "sleep", seconds=1000)
    await settle()
    await peer.send(cancel(1))
    assert await peer.read() == [
        1, 1, [125, "ECANCELED: request 1 was cancelled", {"name": "ECANCELED"}], None
    ]  # fmt: skip
    assert door.ended == ["cancelled"]


async def test_a_cancel_in_the_same_chunk_finds_its_request(peer):
    """The request can be cancelled before its task has run at all."""
    await peer.send(ask(1, "sleep", seconds=1000) + cancel(1))
    assert (await peer.read())[2][0] == Errno.ECANCELED


async def test_a_result_that_won_against_the_cancel_is_given(peer, door):
    """What has been committed is not taken back by the client's change of mind."""
    await peer.ask(1, "commit_later", data="x")
    await settle()
    assert door.done == ["x"]
    await peer.send(cancel(1))
    await settle()
    door.sync(1)
    assert await peer.read() == [1, 1, None, "x"]


@pytest.mark.parametrize("params", [[], [99], ["x"], [1, 2], {}, 5, None, [-1], [2**64 - 1]])
async def test_a_cancel_of_nothing_does_nothing(peer, params):
    """A notification has no error to get."""
    await peer.send(msgpack.packb([2, "$/cancel", params]) + ask(1, "echo", data=1))
    assert await peer.read() == [1, 1, None, 1]


async def test_a_msgid_in_use_is_eexist(peer, door):
    """By a call that waits, or by one whose reply waits for the disk; a free one may be used again."""
    await peer.send(ask(1, "sleep", seconds=1000) + ask(1, "echo"))
    assert (await peer.read())[2][2] == {"name": "EEXIST"}
    await peer.send(ask(2, "commit", data=1) + ask(2, "commit", data=2))
    await settle()
    assert door.done == [1]
    door.sync(1)
    first, second = await peer.reads(2)
    assert first == [1, 2, None, 1]
    assert second[2][2] == {"name": "EEXIST"}
    await peer.send(cancel(1))
    assert (await peer.read())[:2] == [1, 1]
    await peer.send(ask(1, "echo", data=5) + ask(1, "echo", data=6))
    assert await peer.reads(2) == [[1, 1, None, 5], [1, 1, None, 6]]


async def test_more_than_128_in_flight_is_enobufs(peer):
    """And the place of one that is done can be taken."""
    await peer.send(b"".join(ask(i, "sleep", seconds=1000) for i in range(129)))
    _, msgid, error, _ = await peer.read()
    assert (msgid, error[0]) == (128, Errno.ENOBUFS)
    await peer.send(cancel(5))
    assert (await peer.read())[1] == 5
    await peer.ask(5, "sleep", seconds=0)
    assert await peer.read() == [1, 5, None, None]


async def test_a_reply_waits_until_its_commit_is_durable(peer, door):
    """And those behind it, so that the order is kept."""
    await peer.send(ask(1, "echo", data=0) + ask(2, "commit", data="a") + ask(3, "echo", data="b"))
    await peer.send(ask(4, "commit", data="c") + ask(5, "fail") + ask(6, "commit", data="d"))
    assert await peer.read() == [1, 1, None, 0]
    await settle()
    assert door.done == ["a", "c", "d"]
    assert not select.select([peer.sock], [], [], 0)[0]
    door.sync(1)
    assert await peer.reads(2) == [[1, 2, None, "a"], [1, 3, None, "b"]]
    await settle()
    assert not select.select([peer.sock], [], [], 0)[0]
    door.sync(3)
    assert [m[1] for m in await peer.reads(3)] == [4, 5, 6]


async def test_a_durable_reply_does_not_wait(peer, door):
    """What a call made is on disk already when somebody else's commit took it along."""
    door.durable = 10
    await peer.ask(1, "commit", data="x")
    assert await peer.read() == [1, 1, None, "x"]


async def test_a_waiting_call_does_not_leave_before_its_commit(peer, door):
    """Its reply is as external as any other, but holds nobody up."""
    await peer.ask(1, "commit_later", data="x")
    await settle()
    await peer.ask(2, "echo", data="y")
    assert await peer.read() == [1, 2, None, "y"]
    door.sync(1)
    assert await peer.read() == [1, 1, None, "x"]


async def test_calls_that_need_the_disk_keep_their_turn(peer, door):
    """What they need takes a while; what was sent after them takes effect, and is answered, after them."""
    calls = ask(1, "commit_slowly", data="x", seconds=0.02) + ask(2, "commit", data="y")
    calls += ask(3, "fail_slowly") + ask(4, "commit_slowly", data="z") + ask(5, "echo", data="end")
    await peer.send(calls)
    door.sync(3)
    assert [await peer.read() for _ in range(2)] == [[1, 1, None, "x"], [1, 2, None, "y"]]
    assert (await peer.read())[2][0] == Errno.ETIMEDOUT
    assert [await peer.read() for _ in range(2)] == [[1, 4, None, "z"], [1, 5, None, "end"]]
    assert door.done == ["x", "y", "z"]


async def test_a_hang_up_cancels_a_call_that_needs_the_disk(peer, door):
    """Nothing is read while it has its turn, yet it is noticed; what came after is not done."""
    await peer.send(ask(1, "commit_slowly", data="x", seconds=3600) + ask(2, "commit", data="y"))
    await settle()
    peer.close()
    with trio.fail_after(10):
        await door.gone.wait()
    assert door.done == []


async def test_replies_that_wait_for_the_disk_stop_the_reading(peer, door):
    """A stalled disk is not answered by taking in more work without end."""
    await peer.send(b"".join(ask(i, "commit", data=i) for i in range(500)))
    await settle()
    assert len(door.done) == wire.MAX_IN_FLIGHT
    door.sync(500)
    assert await peer.reads(500) == [[1, i, None, i] for i in range(500)]


async def test_a_notification_does_not_overtake_the_reply_before_it(peer, door):
    """The client knows its subscription before it hears of it."""
    await peer.ask(1, "commit", data="subscribed")
    await settle()
    assert door.clients[0].push.notify("event", {"n": 1})
    assert door.clients[0].push.notify("event", {"n": 2}, ticket=2)
    door.sync(1)
    assert await peer.reads(2) == [[1, 1, None, "subscribed"], [2, "event", [{"n": 1}]]]
    await settle()
    assert not select.select([peer.sock], [], [], 0)[0]
    door.sync(2)
    assert await peer.read() == [2, "event", [{"n": 2}]]


async def test_a_slow_reader_makes_notify_say_no(peer, door):
    """The subscription keeps its place and comes back; nothing is lost and nothing piles up."""
    await settle()
    push = door.clients[0].push
    count = 0
    while push.notify("event", bytes(10_000)):
        count += 1
    assert count * 10_000 < 3 * server.HIGH_WATER
    async with trio.open_nursery() as nursery:
        nursery.start_soon(push.writable)
        await settle()
        assert len(nursery.child_tasks) == 1
        await peer.reads(count)
    assert push.notify("event", "more")
    assert await peer.read() == [2, "event", ["more"]]


async def test_nothing_is_pushed_to_a_client_that_is_gone(peer, door):
    """A subscription is not told by an exception that it could miss; it waits until the door ends it."""
    await settle()
    push = door.clients[0].push
    while push.notify("event", bytes(10_000)):
        pass
    async with trio.open_nursery() as nursery:
        nursery.start_soon(push.writable)
        await settle()
        peer.close()
        with trio.fail_after(10):
            await door.gone.wait()
        assert not push.notify("event", 1)
        await settle()
        assert len(nursery.child_tasks) == 1
        nursery.cancel_scope.cancel()


async def test_unread_replies_stop_the_reading(peer, door):
    """A client that does not read is not read from; when it reads, it gets all of it."""
    requests = b"".join(ask(i, "blob", size=200_000) for i in range(100))
    await peer.send(requests)
    await settle()
    await peer.ask(100, "commit", data="late")
    await settle()
    assert door.done == []
    door.durable = 1
    replies = await peer.reads(101)
    assert [m[1] for m in replies] == list(range(101))
    assert all(m[3] == bytes(200_000) for m in replies[:100])


async def test_a_hang_up_cancels_what_waits(peer, door):
    """The calls end, and the door is told, once, after the last of them."""
    await peer.send(ask(1, "sleep", seconds=1000) + ask(2, "sleep", seconds=1000))
    await settle()
    peer.close()
    with trio.fail_after(10):
        await door.gone.wait()
    assert door.ended == ["cancelled", "cancelled"]
    assert door.clients == []


async def test_a_half_closed_client_is_still_answered(peer, door):
    """As `printf ... | socat` is: no more requests come, but the answers are wanted."""
    await peer.send(ask(1, "sleep", seconds=0.1, data="x") + ask(2, "commit", data="y"))
    peer.half_close()
    await settle()
    door.sync(1)
    assert sorted((await peer.reads(2)), key=lambda m: m[1]) == [[1, 1, None, "x"], [1, 2, None, "y"]]
    assert await peer.read() is None


async def test_a_half_closed_client_that_then_goes_is_cancelled(peer, door):
    """A stream at its end does not tell of the hang-up; we look."""
    await peer.ask(1, "sleep", seconds=1000)
    peer.half_close()
    await settle()
    assert door.ended == []
    peer.close()
    with trio.fail_after(10):
        await door.gone.wait()
    assert door.ended == ["cancelled"]


async def test_a_half_closed_client_that_reads_slowly_gets_all(peer):
    """The connection stays until the last byte has left."""
    await peer.send(b"".join(ask(i, "blob", size=900_000) for i in range(3)))
    peer.half_close()
    assert [m[1] for m in await peer.reads(3)] == [0, 1, 2]
    assert await peer.read() is None


async def test_a_request_over_one_mib_is_emsgsize(peer):
    """It is answered although the client is still sending, and then the connection ends."""
    await peer.send(ask(1, "echo", data=2) + ask(7, "echo", data=bytes(3 << 20)))
    assert await peer.read() == [1, 1, None, 2]
    _, msgid, error, _ = await peer.read()
    assert (msgid, error[0]) == (7, Errno.EMSGSIZE)
    assert await peer.read() is None


async def test_a_request_of_one_mib_is_served(peer):
    """The limit is a limit, not a neighbourhood."""
    data = bytes((1 << 20) - 100)
    await peer.ask(1, "echo", data=data)
    assert await peer.read() == [1, 1, None, data]


@pytest.mark.parametrize(
    "junk",
    [
        b"\xc1",
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x94\x00\x07\xa1m\x91\xc6\x80\x00\x00\x00",
        b"\xdd\xff\xff\xff\xff",
        b"\x80" * 100_000,
        msgpack.packb([2]),
        bytes(range(200, 100, -3)) + b"\xc1",
    ],
)
async def test_junk_ends_its_connection_and_no_other(peer, served, junk):
    """Calls before it are answered, those that wait cancelled, and the stream ends."""
    with contextlib.closing(Peer(served)) as other:
        await other.send(ask(1, "echo", data=1) + ask(2, "sleep", seconds=1000) + junk)
        assert await other.read() == [1, 1, None, 1]
        rest = []
        while (message := await other.read()) is not None:
            rest.append(message)
        assert all(m[1] in {2, 7} and m[2] for m in rest)
    await peer.ask(1, "echo", data="alive")
    assert await peer.read() == [1, 1, None, "alive"]


async def test_deep_nesting_is_answered(peer):
    """Two hundred thousand levels are a bad request like any other."""
    await peer.send(b"\x94\x00\x07\xa4echo\x91" + b"\x91" * 200_000 + b"\x90" + ask(8, "echo", data=8))
    _, msgid, error, _ = await peer.read()
    assert (msgid, error[0]) == (7, Errno.EINVAL)
    assert await peer.read() == [1, 8, None, 8]


async def test_three_hundred_garbage_connections_disturb_nobody(peer, served):
    """One client is served while others send noise, halves of requests, nothing, or hang up."""
    noise = [
        b"",
        b"\xc1",
        bytes(range(255, 0, -1)) * 12,
        ask(1, "echo", data=bytes(500))[:-100],
        ask(1, "sleep", seconds=9),
    ]
    others: list[Peer] = []
    for i in range(300):
        other = Peer(served)
        others.append(other)
        with contextlib.suppress(OSError):
            await other.send(noise[i % len(noise)])
        await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        if i % 3 == 0:
            other.close()
        if i % 10 == 0:
            await peer.ask(i, "echo", data=i)
            assert await peer.read() == [1, i, None, i]
    for other in others:
        other.close()
    await peer.ask(1, "echo", data="alive")
    assert await peer.read() == [1, 1, None, "alive"]


async def test_a_byte_at_a_time_is_served(peer):
    """Between the bytes others have their turn, but the request is read."""
    for byte in ask(1, "echo", data="slowly"):
        await peer.send(bytes([byte]))
        await trio.lowlevel.checkpoint()
    assert await peer.read() == [1, 1, None, "slowly"]


async def test_a_client_that_goes_without_its_replies_is_hung_up(peer, door):
    """A send into the void cancels what waits, as a hang-up that was read does."""
    await peer.send(ask(1, "sleep", seconds=1000) + ask(2, "commit_later", seconds=0.05))
    await settle()
    peer.sock.shutdown(socket.SHUT_RD)
    door.durable = 1
    with trio.fail_after(10):
        await door.gone.wait()
    assert door.ended == ["cancelled"]


async def test_what_is_turned_away_may_hang_up_first(served, door):
    """A client that asks nothing, says nonsense, or goes is not waited for."""
    door.closed = True
    for data in (b"", b"\xc1", ask(1, "echo")):
        other = Peer(served)
        await other.send(data)
        other.close()
    await settle()
    with contextlib.closing(Peer(served)) as peer:
        await peer.send(ask(4, "echo")[:3])
        await settle()
        await peer.send(ask(4, "echo")[3:])
        assert (await peer.read())[1] == 4


async def test_who_may_not_come_in_is_told_so(door, served):
    """EPERM is the answer to the first request, and then the connection ends."""
    door.closed = True
    with contextlib.closing(Peer(served)) as peer:
        await peer.ask(4, "echo")
        _, msgid, error, _ = await peer.read()
        assert (msgid, error[0]) == (4, Errno.EPERM)
        assert await peer.read() is None
    assert door.done == []


async def test_a_client_that_went_before_it_was_accepted_is_no_trouble(door, served):
    """Connect and close, with and without a request."""
    for data in (b"", ask(1, "commit", data="x"), b"\xc1"):
        other = Peer(served)
        await other.send(data)
        other.close()
    with trio.fail_after(10):
        await door.gone.wait()
    await settle()
    assert door.clients == []


async def test_running_out_of_descriptors_pauses_accepting(peer, door, served, caplog):
    """Connections wait in the backlog and are accepted when there is room again."""
    await peer.ask(1, "echo")
    await peer.read()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    other = socket.socket(socket.AF_UNIX)
    spare = [os.dup(0) for _ in range(3)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free(), hard))
        other.connect(served)
        with trio.fail_after(10):
            while "accepting nobody" not in caplog.text:
                await trio.sleep(0.01)
        await peer.ask(2, "echo", data="served")
        assert await peer.read() == [1, 2, None, "served"]
        assert len(door.clients) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in spare:
            os.close(fd)
    with contextlib.closing(other):
        other.sendall(ask(1, "echo", data="late"))
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(other)
        assert msgpack.unpackb(other.recv(100)) == [1, 1, None, "late"]


def lowest_free() -> int:
    fd = os.dup(0)
    os.close(fd)
    return fd


async def test_a_bug_in_a_handler_ends_the_server(door, path):
    """It is not hidden, and not answered: the daemon dies and is started into its last commit."""
    with (
        listen.bind(path) as listener,
        pytest.RaisesGroup(AssertionError, flatten_subgroups=True),
    ):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener, door)
            with contextlib.closing(Peer(path)) as peer:
                await peer.ask(1, "bug")
                await trio.sleep(10)


async def test_stopping_closes_connections(door, path):
    """When the server is cancelled its clients see the end of the stream."""
    with listen.bind(path) as listener:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener, door)
            with contextlib.closing(Peer(path)) as peer:
                await peer.ask(1, "echo", data=1)
                await peer.read()
                await peer.ask(2, "sleep", seconds=1000)
                await settle()
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await settle()
                    assert await peer.read() is None
    assert door.clients == []


async def test_an_idle_connection_is_one_task(peer, door):
    """The tasks that write and release are there only while they have something to do."""
    await peer.send(b"".join(ask(i, "blob", size=400_000) for i in range(5)) + ask(9, "commit"))
    await settle()
    door.sync(1)
    await peer.reads(6)
    await settle()
    connection = door.clients[0].push
    assert isinstance(connection, server.Connection)
    assert not connection.nursery.child_tasks
    assert connection.unsent == 0
