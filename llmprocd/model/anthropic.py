"""The Messages API through the anthropic SDK.

The SDK knows headers, credentials and errors; data stays out of it: the request is bytes that were encoded
once, the answer bytes for a listener, and retries are the scheduler's.

Clouds (clouds.py) have clients of their own; a local model is asked as any endpoint is, with the address and
the key of the server that runs now.

Law: a key goes to the endpoint it belongs to and nowhere else. The SDK sees nothing of the environment: not
ANTHROPIC_API_KEY or _AUTH_TOKEN, no profile, no custom headers. No redirect is followed.
Law: no error text holds a key, and no exception of the SDK gets out.
Law: the SDK is imported when it is needed first (`warm`): it costs most of a second.
"""

import importlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar, cast

import msgspec
import trio

from llmprocd.abi.errno import Errno
from llmprocd.kernel.state import Image
from llmprocd.model import body as bodies
from llmprocd.model import clouds, quota, sse
from llmprocd.model.protocol import MOST_TOKENS, Listener, ModelError, Quota, unheard

if TYPE_CHECKING:
    import anthropic
    import httpx2

DEFAULT_URL = "https://api.anthropic.com"
CONNECT = 10.0  # seconds
STALL = 120.0  # seconds without a byte; the API sends pings
LINGER = 1.0  # seconds that a connection may take to end after the last event: then it is used again
PATIENCE = 5.0  # seconds that closing a response may take
THREADS = "message-threads-2026-08-12"
"""The beta of conversations that the endpoint holds."""

_SCRIPT_KEY = "the built-in model asks for no key"
_SCRIPT_URL = "http://script.invalid"
_TOGETHER = 64 * 1024  # bytes: a body up to here is sent in one piece
_KINDS = {  # status -> the API's error type; other 4xx are bad requests, all the rest errors of the server
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_HIDDEN = ("ANTHROPIC_", "AWS_BEARER_TOKEN_BEDROCK", "CLOUD_ML_REGION")  # variables that the SDK reads
_NEVER = frozenset({400, 401, 402, 403, 404, 413})
_OURS = frozenset({"connection", "content-length", "host", "transfer-encoding"})
_SECRET = frozenset({"authorization", "cookie", "proxy-authorization", "x-api-key"})


class Endpoint(msgspec.Struct, frozen=True):
    """Whom a request goes to, and with which key."""

    url: str
    key: str = ""
    script: bool = False
    account: clouds.Account | None = None  # with a cloud

    def __repr__(self) -> str:
        return f"Endpoint({self.name})"

    @property
    def name(self) -> str:
        """Its address without what may be secret in it."""
        if self.account is not None and not self.url:
            return self.account.provider
        scheme, _, rest = self.url.partition("://")
        return "the script" if self.script else f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}"


class _ModelInfo(msgspec.Struct):
    id: str = ""
    max_input_tokens: int | None = None


class _Models(msgspec.Struct):
    data: list[_ModelInfo] = []


class _Counted(msgspec.Struct):
    input_tokens: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]


class _Details(msgspec.Struct, frozen=True):
    error_code: str = ""


class _Error(msgspec.Struct, frozen=True):
    details: _Details | None = None


class _Refusal(msgspec.Struct, frozen=True):
    error: _Error = _Error()


class Server(msgspec.Struct, frozen=True):
    """A server on this machine that runs now."""

    url: str
    key: str
    window: int  # tokens that a prompt may have


class Backs(Protocol):
    """Who knows the accounts at clouds, and the server on this machine."""

    def account(self, endpoint: str) -> Mapping[str, str] | None: ...
    def server(self) -> Server: ...


class NoBacks:
    """Nobody knows any."""

    def account(self, endpoint: str) -> Mapping[str, str] | None:
        """An account's variables for a URL, or for a provider's own endpoint; None if none may be used."""
        del endpoint

    def server(self) -> Server:
        """The local model's server. Raises ModelError when there is none now."""
        raise ModelError(Errno.EHOSTUNREACH, "no local model runs here")


class Anthropic:
    """A Model: every endpoint that speaks the Messages API.

    Args:
        keys: gives the key for (base_url, api_key_env), or None; base_url "" is the default endpoint, and a
            provider's name its own.
        default_url: the default endpoint, if it is not the API's own.
        script: makes the transport of provider "script".
        stall: seconds of silence after which a call has failed.
        backs: knows what else there is.
    """

    def __init__(
        self,
        keys: Callable[[str, str], str | None],
        default_url: str | None,
        script: "Callable[[], httpx2.AsyncBaseTransport]",
        stall: float = STALL,
        backs: Backs | None = None,
    ) -> None:
        self.keys = keys
        self.backs: Backs = backs or NoBacks()
        self.default_url = default_url or DEFAULT_URL
        self.script = script
        self.stall = stall
        self._loading = trio.Lock()
        self._web: httpx2.AsyncClient | None = None
        self._clients: dict[Endpoint, anthropic.AsyncAnthropic] = {}
        self._local: Endpoint | None = None

    async def warm(self) -> None:
        """Import the SDK and read the certificates, in a thread, so that the first call finds them."""
        await self._imported()
        web = self._web or await trio.to_thread.run_sync(_web_client, self.stall)
        self._web = self._web or web  # a call may have been faster

    def check(self, image: Image) -> None:
        """Whether a program can ask its model at all.

        Raises:
            ModelError: EACCES no key for the default endpoint, EINVAL a bad base_url or header.
        """
        try:
            self._endpoint(image)
        except ModelError as fault:
            if not fault.again:  # a server that is being started is waited for
                raise
        _headers(image)

    async def infer(
        self,
        image: Image,
        body: Sequence[bytes],
        listener: Listener,
        heard: Callable[[Quota], None] = unheard,
    ) -> None:
        """Send one request and feed the listener what comes back; see protocol.Model."""
        endpoint = self._endpoint(image)
        headers = _headers(image)
        if bodies.is_threaded(body):
            headers["anthropic-beta"] = ",".join(filter(None, (headers.get("anthropic-beta"), THREADS)))
        await self._imported()
        client = self._client(endpoint)
        with _told(endpoint.name, self.stall, _secrets(endpoint, image)):
            await _exchange(client, endpoint.account, headers, body, listener, heard)

    async def windows(self, image: Image) -> dict[str, int]:
        """What the endpoint says of its models' windows; see protocol.Model."""
        if image.provider == "local" and not image.base_url:
            return {image.model: self.backs.server().window}
        said = await self._ask(image, "/v1/models?limit=1000", None)
        models = _convert(said, _Models).data
        told = {model.id: model.max_input_tokens or 0 for model in models if model.id}
        return {name: window for name, window in told.items() if 0 < window <= MOST_TOKENS}

    async def count(self, image: Image, body: bytes) -> int:
        """The tokens of a request; see protocol.Model."""
        return _convert(await self._ask(image, "/v1/messages/count_tokens", body), _Counted).input_tokens

    async def _ask(self, image: Image, path: str, body: bytes | None) -> bytes:
        """A small question of the endpoint, and its answer."""
        endpoint = self._endpoint(image)
        headers = {**_headers(image), "accept-encoding": "identity"}
        options: Any = {"headers": headers, "follow_redirects": False}
        await self._imported()
        client = self._client(endpoint)
        told = _told(endpoint.name, self.stall, _secrets(endpoint, image))
        with told, clouds.told(endpoint.account):
            if body is None:
                return await client.get(path, cast_to=bytes, options=options)
            content: dict[str, Any] = {"content": body}  # in one piece, and so with its length
            if endpoint.account is not None:
                content = clouds.content(endpoint.account, [body])
            return await client.post(path, **content, cast_to=bytes, options=options)

    async def aclose(self) -> None:
        """Close all connections."""
        clients = list(self._clients.values())
        self._clients.clear()
        for client in clients:
            await client.close()
        if self._web is not None:
            await self._web.aclose()
            self._web = None

    async def _imported(self) -> None:
        if "anthropic" in sys.modules and not self._loading.locked():
            return
        async with self._loading:
            await trio.to_thread.run_sync(importlib.import_module, "anthropic")

    def _endpoint(self, image: Image) -> Endpoint:
        if image.provider == "script":
            return Endpoint(_SCRIPT_URL, _SCRIPT_KEY, script=True)
        if image.provider == "local" and not image.base_url:
            return self._local_endpoint()
        cloud = image.provider in clouds.CLOUDS
        key = (
            self.keys(image.base_url or (image.provider if cloud else ""), image.api_key_env) or ""
        ).strip()
        if not (key or image.base_url or cloud):
            raise ModelError(Errno.EACCES, "no API key: set ANTHROPIC_API_KEY for the daemon")
        if not (key.isascii() and key.isprintable()):
            raise ModelError(Errno.EACCES, "the API key holds characters that cannot be sent")
        if not cloud:
            return Endpoint(_checked(image.base_url or self.default_url), key)
        url = _checked(image.base_url) if image.base_url else ""
        platform = self.backs.account(url or image.provider)
        return Endpoint(url, key, account=clouds.account(image, url, key, platform))

    def _local_endpoint(self) -> Endpoint:
        """The server of the moment; its predecessor's client is forgotten."""
        server = self.backs.server()
        now = Endpoint(server.url, server.key)
        if self._local not in {None, now}:
            self._clients.pop(cast("Endpoint", self._local), None)
        self._local = now
        return now

    def _client(self, endpoint: Endpoint) -> "anthropic.AsyncAnthropic":
        client = self._clients.get(endpoint)
        if client is None:
            client = self._clients[endpoint] = _sdk_client(endpoint, self._http(endpoint))
        return client

    def _http(self, endpoint: Endpoint) -> "httpx2.AsyncClient":
        import httpx2

        if endpoint.script:
            return httpx2.AsyncClient(transport=self.script(), timeout=_timeout(self.stall))
        if self._web is None:
            self._web = _web_client(self.stall)
        return self._web


class Pieces:
    """A request body that is sent as it lies: nothing is joined but what is small."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.size = sum(map(len, pieces))
        self.pieces = [b"".join(pieces)] if self.size <= _TOGETHER else pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece


async def _exchange(
    client: "anthropic.AsyncAnthropic",
    account: clouds.Account | None,
    headers: Mapping[str, str],
    body: Sequence[bytes],
    listener: Listener,
    heard: Callable[[Quota], None],
) -> None:
    import anthropic

    try:
        with clouds.told(account):
            response = await _post(client, headers, _content(account, body))
    except anthropic.APIStatusError as fault:
        heard(quota.quota_of(fault.response.headers, time.time()))
        raise
    try:
        heard(quota.quota_of(response.headers, time.time()))
        stream: Any = response.aiter_raw() if account is None else clouds.chunks(account, client, response)
        async with aclosing(stream) as chunks:
            async for chunk in chunks:
                listener.feed(chunk)
                if listener.stopped:
                    break
            await _seen_out(chunks)
    finally:
        with trio.move_on_after(PATIENCE, shield=True):
            await response.aclose()


async def _seen_out(chunks: AsyncIterator[bytes]) -> None:
    """Read what follows an answer that is whole, which no end of its connection can change any more."""
    import httpx2

    with trio.move_on_after(LINGER), suppress(httpx2.HTTPError):
        async for _ in chunks:
            pass


async def _post(
    client: "anthropic.AsyncAnthropic", headers: Mapping[str, str], content: dict[str, Any]
) -> "httpx2.Response":
    import anthropic

    sent, beta = content.get("content"), THREADS in headers.get("anthropic-beta", "")
    length = {"content-length": str(sent.size)} if isinstance(sent, Pieces) else {}
    answer: Any = await client.post(
        "/v1/messages?beta=true" if beta else "/v1/messages",
        **content,
        cast_to=object,
        stream=True,
        stream_cls=anthropic.AsyncStream[object],
        options={
            "headers": {
                **headers,
                "accept-encoding": "identity",
                **length,
                "x-stainless-raw-response": "stream",  # bytes as they come, and yet an exception for a 4xx
            },
            "follow_redirects": False,
        },
    )
    response: httpx2.Response = answer.http_response
    return response


def _content(account: clouds.Account | None, pieces: Sequence[bytes]) -> dict[str, Any]:
    """A body as the arguments of the SDK's `post`."""
    return {"content": Pieces(pieces)} if account is None else clouds.content(account, pieces)


_T = TypeVar("_T")


def _convert(said: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(said, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as fault:
        raise ModelError(Errno.EPROTO, f"the endpoint answered something else: {fault}") from None


def _secrets(endpoint: Endpoint, image: Image) -> list[str]:
    account = endpoint.account.aws[1:] if endpoint.account is not None else ()
    return [endpoint.key, *account, *(value for name, value in image.headers if name.lower() in _SECRET)]


def _timeout(stall: float) -> "httpx2.Timeout":
    import httpx2

    return httpx2.Timeout(stall, connect=CONNECT, pool=None)


def _web_client(stall: float) -> "httpx2.AsyncClient":
    from llmprocd.model import pool

    return pool.client(_timeout(stall))


def _sdk_client(endpoint: Endpoint, http_client: "httpx2.AsyncClient") -> "anthropic.AsyncAnthropic":
    import anthropic

    keyless = cast("Mapping[str, str]", {} if endpoint.key else {"Authorization": anthropic.omit})
    with _no_environment():
        if endpoint.account is not None:
            client = clouds.client(endpoint.account, http_client)
        else:
            client = anthropic.AsyncAnthropic(
                api_key=endpoint.key,
                base_url=endpoint.url,
                timeout=http_client.timeout,
                max_retries=0,
                default_headers=keyless,
                http_client=http_client,
                open_telemetry=False,
            )
    # Else a thread finds out, in the first call of each client.
    client._platform = "Linux"  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    return client


@contextmanager
def _no_environment() -> Generator[None]:
    """The SDK reads credentials and headers from the environment, for whatever endpoint: hide them."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(_HIDDEN)}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _checked(url: str) -> str:
    import httpx2

    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as fault:
        raise ModelError(Errno.EINVAL, f"base_url: {fault}") from None
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ModelError(Errno.EINVAL, f"base_url: {url!r} is neither http:// nor https://")
    if not 0 < (parsed.port or 80) < 1 << 16:
        raise ModelError(Errno.EINVAL, f"base_url: there is no port {parsed.port}")
    return url


def _headers(image: Image) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in image.headers:
        if not (name.isascii() and name.isprintable() and value.isascii() and value.isprintable()):
            raise ModelError(Errno.EINVAL, f"extra_headers: {name!r} holds characters that cannot be sent")
        if name.lower() in _OURS:
            raise ModelError(Errno.EINVAL, f"extra_headers: {name!r} cannot be set")
        headers[name.lower()] = value
    return headers


# --- failures ---------------------------------------------------------------------------------------


@contextmanager
def _told(name: str, stall: float, secrets: Sequence[str]) -> Generator[None]:
    """Every failure of a call as a ModelError, without secrets in its text."""
    import anthropic
    import httpx2

    try:
        yield
    except ModelError as fault:
        raise _redacted(fault, secrets) from None
    except anthropic.APIStatusError as fault:
        raise _redacted(_refused(name, fault), secrets) from None
    except anthropic.APIConnectionError as fault:
        raise _redacted(_broken(name, stall, fault.__cause__ or fault), secrets) from None
    except httpx2.HTTPError as fault:
        raise _redacted(_broken(name, stall, fault), secrets) from None


def _redacted(fault: ModelError, secrets: Sequence[str]) -> ModelError:
    text = fault.text
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
        for length in range(len(secret) - 1, 5, -1):  # one that the end of a cut text cut in two
            text = text.replace(secret[:length] + "...", "***...")
    return ModelError(
        fault.errno,
        text,
        again=fault.again,
        retry_after=fault.retry_after,
        shared=fault.shared,
        code=fault.code,
    )


def _refused(name: str, fault: "anthropic.APIStatusError") -> ModelError:
    """An answer with an error status."""
    status, headers = fault.status_code, fault.response.headers
    if status < 400:
        return ModelError(Errno.EPROTO, f"{name} answered a redirect ({status}), and none is followed")
    kind = _KINDS.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    said = fault.api_message if isinstance(fault.api_message, str) else fault.response.text
    request = f" (request {sse.plain(fault.request_id)})" if fault.request_id else ""
    text = f"{name} answered {status} {kind}: {sse.described(said) or 'nothing more'}{request}"
    now = time.time()
    wait = retry_after(headers, now)
    if not wait and status == 429:
        wait = quota.exhausted_for(quota.quota_of(headers, now))
    told = sse.failure(kind, text, wait or None)  # now, or a time gone by on another clock, names none
    again = _may_pass(status, told, headers.get("x-should-retry"))
    return ModelError(
        told.errno,
        text,
        again=again,
        retry_after=told.retry_after,
        shared=told.shared and again,
        code=_code(fault.response.content),
    )


def _code(said: bytes) -> str:
    """The word that a refusal has for its reason beside the sentence; "" when there is none."""
    try:
        details = msgspec.json.decode(said, type=_Refusal).error.details
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ""
    return details.error_code if details is not None else ""


def _may_pass(status: int, told: ModelError, verdict: str | None) -> bool:
    """Whether the same request may be answered later: the server's word counts, but not against reason."""
    if verdict == "false" or status in _NEVER:
        return False
    return told.again or verdict == "true"


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds until the server wants to be asked again, if its headers say so; `now` is wall time."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        seconds = _number(headers.get(name, "")) * unit
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


def _broken(name: str, stall: float, fault: BaseException) -> ModelError:
    """A call that ended without a whole answer."""
    import httpx2

    why = sse.plain(str(fault)) or type(fault).__name__
    if isinstance(fault, httpx2.ConnectTimeout):
        return ModelError(Errno.ETIMEDOUT, f"cannot connect to {name} within {CONNECT:g} s", again=True)
    if isinstance(fault, httpx2.TimeoutException):
        return ModelError(Errno.ETIMEDOUT, f"no data from {name} for {stall:g} s", again=True)
    if isinstance(fault, httpx2.ConnectError | httpx2.ProxyError):
        return ModelError(Errno.EHOSTUNREACH, f"cannot connect to {name}: {why}", again=True)
    if isinstance(fault, httpx2.LocalProtocolError | httpx2.UnsupportedProtocol | ValueError):
        return ModelError(Errno.EINVAL, f"the request to {name} cannot be sent: {why}")
    again = isinstance(
        fault, httpx2.TransportError | OSError | trio.BrokenResourceError | trio.ClosedResourceError
    )
    return ModelError(Errno.EIO, f"the connection to {name} broke: {why}", again=again)
