"""Connections to model endpoints, kept open between requests.

Law: what a request costs does not depend on how many connections there are, busy or idle. (The pool that
comes with httpx2 walks all of them for each request, and polls those that idle.)
Law: a connection is either with one response or in the free list, or closed: whoever is cancelled in between
leaves it closed.

What a stream costs is waking up for each of its events. So the streams of a pool read in turn, all together
`READS` times a second: a few are read at once, a thousand each five times a second. Those of one tick are few
enough that whoever else wants the loop waits no longer than they take.

The protocol itself (HTTP/1.1, TLS, timeouts) is httpcore2's. Proxies named by the environment get httpx2's
own transports; loopback endpoints are never asked through a proxy.
"""

import ssl
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from contextlib import aclosing, contextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, cast
from urllib.request import getproxies

import httpcore2
import httpx2
import trio

KEEPALIVE = 90.0  # seconds: longer than most tools run
IDLE = 256  # idle connections kept for one endpoint
READS = 5000.0  # of sockets, in a second, all streams together
EAGER = 25  # streams that need not take turns
TICK = 0.01  # seconds
PATIENCE = 5.0  # seconds that closing a connection may take
MOST = 128 << 20  # bytes of an answer; the longest that a model gives are some twenty million
MOST_REFUSED = 64 << 10  # bytes of one that is none: people read a line of it

_LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")
_NAMES = (
    "ConnectError",
    "ConnectTimeout",
    "LocalProtocolError",
    "ProtocolError",
    "ReadError",
    "ReadTimeout",
    "RemoteProtocolError",
    "WriteError",
    "WriteTimeout",
)
_FAILURES: dict[type[Exception], type[httpx2.TransportError]] = {
    getattr(httpcore2, name): getattr(httpx2, name) for name in _NAMES
}


def client(timeout: httpx2.Timeout) -> httpx2.AsyncClient:
    """An HTTP client over a pool of its own. Reads certificates: some 50 ms."""
    tls = httpx2.create_ssl_context()
    pool = Pool(tls)
    mounts: dict[str, httpx2.AsyncBaseTransport | None] = dict.fromkeys(_LOOPBACK, pool)
    if "all" not in getproxies():
        mounts["all://"] = pool  # what a proxy for one scheme claims is more specific, and wins
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=IDLE, keepalive_expiry=KEEPALIVE)
    none_kept = CookieJar(DefaultCookiePolicy(allowed_domains=()))  # ports of one host would share them
    return httpx2.AsyncClient(
        mounts=mounts,
        verify=tls,
        limits=limits,
        timeout=timeout,
        cookies=none_kept,
        event_hooks={"response": [_as_it_came]},
    )


async def _as_it_came(response: httpx2.Response) -> None:
    """Text is UTF-8, as JSON is, and nothing is unpacked: a server could name any codec that Python has."""
    response.encoding = "utf-8"
    response.headers.pop("content-encoding", None)


class Pool(httpx2.AsyncBaseTransport):
    """A transport with a free list for each origin.

    Args:
        tls: the context for https; without one httpcore2's default.
        keepalive: seconds after which an idle connection is not used again.
    """

    def __init__(self, tls: ssl.SSLContext | None = None, keepalive: float = KEEPALIVE) -> None:
        self.tls = tls
        self.keepalive = keepalive
        self.busy = 0  # connections that are with a request or a response
        self._lot = trio.lowlevel.ParkingLot()
        self._ticks = False
        self._idle: OrderedDict[_Origin, deque[_Line]] = OrderedDict()  # the one used last is the last

    @property
    def idle(self) -> int:
        return sum(map(len, self._idle.values()))

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request over an idle connection, or a new one.

        Raises:
            httpx2.TransportError: the connection could not be made, or broke.
        """
        sent = _core(request)
        line = await self._line(sent.url.origin)
        self.busy += 1
        try:
            with _translated():
                response = await line.connection.handle_async_request(sent)
        except BaseException:
            self.busy -= 1
            await line.close()
            raise
        return httpx2.Response(
            response.status,
            headers=response.headers,
            stream=_Body(self, line, response),
        )

    async def turn(self) -> None:
        """Wait until it is a stream's turn to read."""
        if self.busy <= EAGER and not self._lot:
            return
        if not self._ticks:
            self._ticks = True
            trio.lowlevel.spawn_system_task(self._tick)
        await self._lot.park()

    async def _tick(self) -> None:
        """The one task that sleeps for all streams: a timer for each would cost as much as its read."""
        while self._lot:
            await trio.sleep(TICK)
            self._lot.unpark(count=round(READS * TICK))
        self._ticks = False

    async def aclose(self) -> None:
        """Close what is idle; what is busy closes when its response does."""
        idle = [line for lines in self._idle.values() for line in lines]
        self._idle.clear()
        for line in idle:
            await line.close()

    async def _line(self, origin: httpcore2.Origin) -> "_Line":
        lines = self._idle.get(_key(origin))
        while lines:
            line = lines.pop()  # the one used last: the others may expire
            if not line.connection.has_expired():
                return line
            await line.close()
        return _Line(origin, self.tls, self.keepalive, self.turn)

    async def release(self, line: "_Line") -> None:
        """Take back the connection of a response that is closed.

        With it, what has expired of this origin and of the one unused for longest goes: nobody may ask that
        one again.
        """
        self.busy -= 1
        if not line.connection.is_idle():
            await line.close()
            return
        key = _key(line.origin)
        self._idle.setdefault(key, deque()).append(line)
        self._idle.move_to_end(key)
        for origin in dict.fromkeys((key, next(iter(self._idle)))):
            await self._expire(origin)

    async def _expire(self, origin: "_Origin") -> None:
        """Close what an origin has too many of, or has not used for too long."""
        lines = self._idle.get(origin, deque())
        while lines and (len(lines) > IDLE or lines[0].connection.has_expired()):
            await lines.popleft().close()
        if not lines and self._idle.get(origin) is lines:
            del self._idle[origin]


class _Line(httpcore2.AsyncNetworkBackend):
    """A connection, and the socket under it: httpcore2 forgets that one when a TLS handshake is cancelled."""

    def __init__(
        self,
        origin: httpcore2.Origin,
        tls: ssl.SSLContext | None,
        keepalive: float,
        turn: Callable[[], Awaitable[None]],
    ) -> None:
        self.origin = origin
        self.turn = turn
        self.socket: httpcore2.AsyncNetworkStream | None = None
        self.connection = httpcore2.AsyncHTTPConnection(
            origin, ssl_context=tls, keepalive_expiry=keepalive, network_backend=self
        )

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        backend = cast("httpcore2.AsyncNetworkBackend", httpcore2.TrioBackend())
        self.socket = _Paced(await backend.connect_tcp(*args, **kwargs), self.turn)
        return self.socket

    async def close(self) -> None:
        with trio.move_on_after(PATIENCE, shield=True):
            await self.connection.aclose()
            if self.socket is not None:
                await self.socket.aclose()


class _Paced(httpcore2.AsyncNetworkStream):
    """A socket that is read when it is its turn."""

    def __init__(self, stream: httpcore2.AsyncNetworkStream, turn: Callable[[], Awaitable[None]]) -> None:
        self._stream = stream
        self._turn = turn
        self._asked = False  # a new request: its answer is awaited at once

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109  # httpcore2's
        if not self._asked:
            await self._turn()
        self._asked = False
        return await self._stream.read(max_bytes, timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109  # httpcore2's
        self._asked = True
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109  # httpcore2's
    ) -> httpcore2.AsyncNetworkStream:
        inner = await self._stream.start_tls(ssl_context, server_hostname, timeout)
        return _Paced(inner, self._turn)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Body(httpx2.AsyncByteStream):
    """The body of a response; closing it gives its connection back."""

    def __init__(self, pool: Pool, line: _Line, response: httpcore2.Response) -> None:
        self._pool = pool
        self._line = line
        self._response = response
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        refused, size = self._response.status >= 300, 0
        with _translated():
            async with aclosing(self._response.aiter_stream()) as parts:
                async for part in parts:
                    yield part
                    size += len(part)
                    if refused and size >= MOST_REFUSED:
                        return
                    if size > MOST:
                        raise httpx2.RequestError(f"an answer of more than {MOST >> 20} MiB")

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        with trio.move_on_after(PATIENCE, shield=True):
            await self._response.aclose()
        await self._pool.release(self._line)


def _core(request: httpx2.Request) -> httpcore2.Request:
    url = request.url
    if url.scheme not in {"http", "https"}:
        raise httpx2.UnsupportedProtocol(f"neither http nor https: {url.scheme}")
    assert isinstance(request.stream, httpx2.AsyncByteStream)
    return httpcore2.Request(
        request.method,
        httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
        headers=request.headers.raw,
        content=request.stream,
        extensions=request.extensions,
    )


_Origin = tuple[bytes, bytes, int]


def _key(origin: httpcore2.Origin) -> _Origin:
    return origin.scheme, origin.host, origin.port


@contextmanager
def _translated() -> Generator[None]:
    """httpcore2's failures as httpx2's, which is what its users know."""
    try:
        yield
    except tuple(_FAILURES) as fault:
        raise _FAILURES[type(fault)](str(fault)) from fault
