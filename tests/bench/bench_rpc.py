"""What a small call costs the server, in µs of its CPU and beside the plainest server Python can be.

    python -m tests.bench.bench_rpc [--seconds 0.5] [--rounds 7]

Both servers answer the same request with the same codec; the plain one blocks in recv and send and serves one
client at a time. The numbers are the best of some short rounds. On a loaded machine trust the ratio alone.
"""

import argparse
import contextlib
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import msgspec
import trio

from llmprocd import listen, server
from llmprocd.abi import wire
from llmprocd.abi.wire import Answer

GOAL_US, GOAL_RATIO = 12.0, 2.0
REQUEST = wire.request(7, "proc.get", {"pid": 42, "text": "hello"})
CPU = wire.request(7, "cpu")


class Args(msgspec.Struct, forbid_unknown_fields=True):
    pid: int = 0
    text: str = ""


class Row(msgspec.Struct):
    pid: int
    ppid: int
    stat: str
    program: str


class Client:
    errors = "array"


DECODE = msgspec.msgpack.Decoder(Args).decode


def call(method: str, params: bytes) -> object:
    """The work itself, the same for both servers."""
    if method == "cpu":
        return time.process_time()
    args = DECODE(params)
    return Row(args.pid, 1, "R", "coder")


class Door:
    durable = 0

    async def wait_durable(self, ticket: int) -> None:
        raise NotImplementedError(ticket)

    async def admit(self, os_pid: int, uid: int, gid: int, push: server.Push) -> Client:  # noqa: ARG002
        return Client()

    def call(self, caller: Client, method: str, params: bytes) -> Answer:  # noqa: ARG002
        return Answer(call(method, params))

    def waits(self, method: str) -> bool:  # noqa: ARG002
        return False

    def hang_up(self, caller: Client) -> None:  # noqa: ARG002
        return


def serve_trio(listener: socket.socket) -> None:
    trio.run(server.serve, listener, Door())


def serve_plainly(listener: socket.socket) -> None:
    while True:
        sock, _ = listener.accept()
        with sock:
            framer = wire.Framer()
            while chunk := sock.recv(65536):
                replies: list[bytes] = []
                for frame in framer.feed(chunk):
                    assert isinstance(frame, wire.Request)
                    result = call(wire.name(frame.method), wire.arguments(frame.params))
                    replies.append(wire.reply(frame.msgid, result))
                sock.sendall(b"".join(replies))


@contextlib.contextmanager
def running(serve: Callable[[socket.socket], None], path: str) -> Iterator[socket.socket]:
    """A connection to a server in a process of its own."""
    with listen.bind(path) as listener:
        process: BaseProcess = multiprocessing.get_context("fork").Process(
            target=serve, args=(listener,), daemon=True
        )
        process.start()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        yield client
    process.terminate()
    process.join()


def ask(client: socket.socket, data: bytes, replies: int) -> list[wire.Frame]:
    """Send, and read so many replies."""
    client.sendall(data)
    framer = wire.Framer()
    frames: list[wire.Frame] = []
    while len(frames) < replies:
        frames.extend(framer.feed(client.recv(1 << 18)))
    return frames


def cpu(client: socket.socket) -> float:
    (frame,) = ask(client, CPU, 1)
    assert isinstance(frame, wire.Response)
    return msgspec.msgpack.decode(frame.result, type=float)


def measure(client: socket.socket, depth: int, seconds: float) -> tuple[float, float]:
    """Microseconds of server CPU for a request, and requests per second, with `depth` of them under way."""
    data = REQUEST * depth
    count = 0
    before, start = cpu(client), time.perf_counter()
    while (now := time.perf_counter()) < start + seconds:
        ask(client, data, depth)
        count += depth
    return (cpu(client) - before) / count * 1e6, count / (now - start)


def row(name: str, depth: int, rounds: int, seconds: float) -> tuple[float, float]:
    """One line of the table; gives the two servers' µs."""
    best: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        clients = {
            "plain": stack.enter_context(running(serve_plainly, f"{folder}/plain")),
            "trio": stack.enter_context(running(serve_trio, f"{folder}/trio")),
        }
        for _ in range(rounds):
            for kind, client in clients.items():
                us, rate = measure(client, depth, seconds)
                old = best.get(kind, (us, rate))
                best[kind] = min(us, old[0]), max(rate, old[1])
    (plain, plain_rate), (ours, our_rate) = best["plain"], best["trio"]
    print(f"{name:<16}{plain:>10.1f}{ours:>10.1f}{ours / plain:>8.2f}{plain_rate:>12,.0f}{our_rate:>12,.0f}")
    return plain, ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{'':<16}{'plain µs':>10}{'ours µs':>10}{'ratio':>8}{'plain/s':>12}{'ours/s':>12}")
    plain, ours = row("one at a time", 1, options.rounds, options.seconds)
    row("64 at a time", 64, options.rounds, options.seconds)
    met = ours <= GOAL_US or ours <= GOAL_RATIO * plain
    print(f"goal: {GOAL_US:.0f} µs one at a time, or ratio {GOAL_RATIO}: {'met' if met else 'missed'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
