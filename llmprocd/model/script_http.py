"""The scripted model over HTTP/1.1 on loopback: any client of the Messages API can talk to it.

Besides the API: GET /_script/requests and /_script/refusals tell what came and what was refused, POST
/_script/reset forgets it, and /_script/forget the conversations that it holds. It answers whoever connects,
so it listens on loopback addresses only.
"""

import argparse
import functools
import ipaddress
import pathlib
import signal
import socket
import struct
import sys
from collections.abc import Sequence

import h11
import msgspec
import trio

from llmprocd.model import script_rules
from llmprocd.model.script import WINDOW, Engine
from llmprocd.model.script_answer import Answer

PIECE = 64 * 1024
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close at once, and tell the peer with a reset


class Served(msgspec.Struct, frozen=True):
    """Where the endpoint answers."""

    url: str


class HungUpError(Exception):
    """The client is gone, or speaks no HTTP."""


class Wire:
    """One connection: HTTP events in and out."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.http = h11.Connection(h11.SERVER, max_incomplete_event_size=64 * 1024)

    async def next_event(self) -> h11.Event:
        """The next event. Raises HungUpError when there will be none."""
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                if self.http.they_are_waiting_for_100_continue:
                    await self.send(h11.InformationalResponse(status_code=100, headers=[]))
                self.http.receive_data(await self.stream.receive_some(PIECE))
            elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                raise HungUpError
            else:
                return event  # pyright: ignore[reportReturnType] - what is left is an Event

    async def send(self, event: h11.Event) -> None:
        data = self.http.send(event)
        if data:
            await self.stream.send_all(data)

    async def pause(self, seconds: float) -> None:
        """Sleep, but no longer than the client stays. Raises HungUpError when it has gone."""
        sock = self.stream.socket
        with trio.move_on_after(seconds) as scope:
            await trio.lowlevel.wait_readable(sock)
        if scope.cancelled_caught:
            return
        if not await sock.recv(1, socket.MSG_PEEK):
            raise HungUpError
        await trio.sleep_until(scope.deadline)

    def reset(self) -> None:
        """End the connection as a crash would."""
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


async def serve(
    engine: Engine,
    port: int = 0,
    host: str = "127.0.0.1",
    *,
    task_status: trio.TaskStatus[Served] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled.

    Args:
        engine: what answers.
        port: TCP port; 0 takes a free one.
        host: a loopback address.
        task_status: is started with a Served once connections are accepted.
    """
    listeners = await trio.open_tcp_listeners(port, host=host)
    name = f"[{host}]" if ":" in host else host
    bound: int = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        handler = functools.partial(converse, engine)
        await nursery.start(functools.partial(trio.serve_listeners, handler, listeners))
        task_status.started(Served(f"http://{name}:{bound}"))


async def converse(engine: Engine, stream: trio.SocketStream) -> None:
    """Answer the requests of one connection, one after another."""
    wire = Wire(stream)
    async with stream:
        try:
            while await exchange(engine, wire):
                wire.http.start_next_cycle()
        except (HungUpError, h11.ProtocolError, trio.BrokenResourceError, ConnectionError):
            return  # the client is gone or speaks no HTTP: nobody is left to be told


async def exchange(engine: Engine, wire: Wire) -> bool:
    """One request and its answer; whether another may follow."""
    head = await wire.next_event()
    if not isinstance(head, h11.Request):
        raise HungUpError
    body = await read_body(wire)
    headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}
    method, target = head.method.decode(), head.target.decode("latin-1")
    answer = engine.answer(method, target, headers, body, trio.current_time())
    await reply(wire, answer, method)
    return wire.http.our_state is h11.DONE and wire.http.their_state is h11.DONE


async def read_body(wire: Wire) -> bytes:
    """A request's body; beyond the limit it is read and thrown away, so that the refusal can be heard."""
    body = bytearray()
    while isinstance(event := await wire.next_event(), h11.Data):
        if len(body) <= script_rules.MAX_BODY:
            body += event.data
    return bytes(body)


async def reply(wire: Wire, answer: Answer, method: str) -> None:
    """Send an answer at its pace."""
    if answer.wait:
        await wire.pause(answer.wait)
    if answer.streamed or not answer.dropped:
        await send_head(wire, answer)
    if method != "HEAD":
        await send_chunks(wire, answer)
    if answer.dropped:
        wire.reset()
        raise HungUpError
    await wire.send(h11.EndOfMessage())


async def send_head(wire: Wire, answer: Answer) -> None:
    headers = list(answer.headers)
    if not answer.streamed:
        headers.append(("content-length", str(len(answer.body))))
    await wire.send(h11.Response(status_code=answer.status, headers=headers))


async def send_chunks(wire: Wire, answer: Answer) -> None:
    held = bytearray()
    for chunk in answer.chunks:
        if (chunk.delay and held) or len(held) > PIECE:
            await wire.send(h11.Data(data=bytes(held)))
            held.clear()
        if chunk.delay:
            await wire.pause(chunk.delay)
        held += chunk.data
    if held:
        await wire.send(h11.Data(data=bytes(held)))


def main(argv: Sequence[str]) -> int:
    """Serve as a program; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="llmprocd.model.script", description="A Messages API endpoint on loopback that plays scripts."
    )
    parser.add_argument("--host", default="127.0.0.1", type=loopback, help="a loopback address (127.0.0.1)")
    parser.add_argument("--port", default=0, type=int, help="TCP port; 0, the default, takes a free one")
    parser.add_argument(
        "--script", type=pathlib.Path, metavar="FILE", help="plays where no other script is given"
    )
    parser.add_argument("--require-key", metavar="KEY", help="any other key is refused")
    parser.add_argument("--window", type=int, default=WINDOW, metavar="N", help="tokens of the window")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME",
        help="diagnostics, thread, count_tokens or models",
    )
    parser.add_argument(
        "--unthreaded", action="append", default=[], metavar="FIELD", help="is refused beside thread"
    )
    parser.add_argument("--rate-limit", type=positive, metavar="N", help="requests a second before 429")
    options = parser.parse_args(argv)
    script = options.script.read_text() if options.script else ""
    engine = Engine(
        script,
        key=options.require_key,
        rate_limit=options.rate_limit,
        window=options.window,
        without=options.without,
        unthreaded=options.unthreaded,
    )
    trio.run(run, engine, options.port, options.host)
    return 0


def loopback(text: str) -> str:
    host = "127.0.0.1" if text == "localhost" else text
    if not ipaddress.ip_address(host).is_loopback:
        raise ValueError(text)
    return host


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise ValueError(text)
    return value


async def run(engine: Engine, port: int, host: str) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            served = await nursery.start(serve, engine, port, host)
            sys.stdout.write(msgspec.json.encode(served).decode() + "\n")
            sys.stdout.flush()
            async for _ in signals:
                nursery.cancel_scope.cancel()
                return
