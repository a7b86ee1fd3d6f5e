"""The real SDK over real HTTP: streams, faults, cancellation, secrets."""

import gc
import importlib
import json
import os
import random
import subprocess
import sys
import warnings
from contextlib import asynccontextmanager, nullcontext
from functools import partial

import httpcore2
import httpx2
import pytest
import trio
from bodykit import tool_results, user_text

from llmprocd.abi.errno import Errno
from llmprocd.abi.types import MessageId, ToolUseId
from llmprocd.kernel.state import Image, Node, ToolResult
from llmprocd.model import script_http
from llmprocd.model.anthropic import Anthropic, Pieces, retry_after
from llmprocd.model.body import Transcript, counted, prefix, thread
from llmprocd.model.pool import Pool
from llmprocd.model.protocol import ModelError
from llmprocd.model.script import Engine
from llmprocd.model.script_transport import ScriptTransport
from llmprocd.model.sse import Turn

KEY = "sk-ant-secret-0123456789"
TOOLS = [{"name": "bash", "description": "runs", "input_schema": {"type": "object"}}]
STREAM = (
    b'data: {"type":"message_start","message":{}}\n\n'
    b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":"hi"}}\n\n'
    b'data: {"type":"content_block_stop","index":0}\n\n'
    b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"}}\n\n'
    b'data: {"type":"message_stop"}\n\n'
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
JSON = b"content-type: application/json"
WHOLE = HEAD + b"content-length: %d\r\n\r\n" % len(STREAM) + STREAM


def image(base_url="", provider="anthropic", headers=(), api_key_env=""):
    before, after = prefix("claude-sonnet-5-5", {"max_tokens": 999}, "be good", TOOLS, True)
    return Image(
        program="p",
        path="",
        model="claude-sonnet-5-5",
        provider=provider,
        prefix=before,
        suffix=after,
        base_url=base_url,
        headers=headers,
        api_key_env=api_key_env,
    )


def node(role, body, thinks=False):
    return Node(MessageId(1), None, role, body, model="claude-sonnet-5-5", thinks=thinks)


def body(text, at=None):
    return Transcript.of([node("user", user_text(text))], "claude-sonnet-5-5").pieces(at or image())


async def ask(model, text="hello", at=None):
    turn = Turn("claude-sonnet-5-5", lambda _: None)
    await model.infer(at or image(), body(text, at), turn)
    return turn.reply()


@asynccontextmanager
async def asking(default_url=None, key=KEY, **more):
    """A Model with one key for the default endpoint, closed at the end."""
    model = Anthropic(
        lambda base_url, _: None if base_url else key, default_url, lambda: ScriptTransport(Engine()), **more
    )
    try:
        yield model
    finally:
        await model.aclose()


@asynccontextmanager
async def endpoint(answer):
    """A raw TCP server that answers each request with `answer(stream, request)`."""
    received = []
    connections = []

    async def converse(stream):
        connections.append(stream)
        data = b""
        try:
            while more := await stream.receive_some(1 << 20):
                data += more
                while (request := _request(data)) is not None:
                    received.append(request)
                    data = data[len(request) :]
                    await answer(stream, request)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client hung up, which is what some tests are about

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, converse, 0, host="127.0.0.1"))
        url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        yield url, received, connections
        nursery.cancel_scope.cancel()


def _request(data):
    """The first whole request in `data`, if there is one."""
    head, found, rest = data.partition(b"\r\n\r\n")
    if not found:
        return None
    lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    length = int(lengths[0].partition(b":")[2]) if lengths else 0
    return None if len(rest) < length else data[: len(head) + 4 + length]


def replying(data, *, close=False):
    async def answer(stream, _request):
        await stream.send_all(data)
        if close:
            await stream.aclose()

    return answer


def status(code, said, *headers):
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    lines = b"".join(b"%b\r\n" % header for header in headers)
    return b"HTTP/1.1 %d X\r\n%bcontent-length: %d\r\n\r\n%b" % (code, lines, len(text), text)


async def served(nursery, **more):
    engine = Engine(key=KEY, **more)
    at = await nursery.start(script_http.serve, engine)
    return engine, at.url


async def refused(model, text="hello", at=None):
    with pytest.raises(ModelError) as caught:
        await ask(model, text, at)
    return caught.value


# --- turns ------------------------------------------------------------------------------------------


async def test_a_conversation_over_http(nursery):
    """Thinking, text and tools go back as they came, and a strict endpoint takes them."""
    engine, url = await served(nursery)
    path = [node("user", user_text('!think hm\n!& say let me see\n!& bash {"command":"ls"}\n!say done now'))]
    async with asking(url) as model:
        turn = Turn("claude-sonnet-5-5", lambda _: None)
        await model.infer(image(), Transcript.of(path, turn.model).pieces(image()), turn)
        reply = turn.reply()
        assert (reply.text, reply.stop_reason, reply.thinks) == ("let me see", "tool_use", True)
        assert reply.usage.input_tokens + reply.usage.cache_creation_input_tokens > 0
        answers = [ToolResult(ToolUseId(ask.id), "a.txt") for ask in reply.asks]
        path += [node("assistant", reply.body, thinks=True), node("user", tool_results(answers))]
        turn = Turn("claude-sonnet-5-5", lambda _: None)
        await model.infer(image(), Transcript.of(path, turn.model).pieces(image()), turn)
        assert turn.reply().text == "done now"
    assert engine.refusals == []
    assert reply.body in engine.requests[1].body
    first, second = (request.body.removesuffix(image().suffix) for request in engine.requests)
    assert second.startswith(first.removesuffix(b"]}"))


async def test_the_script_needs_no_socket():
    """Provider `script` runs the same code over a transport in process, without any key."""
    async with asking(key=None) as model:
        assert (await ask(model, "!say over here", image(provider="script"))).text == "over here"
        assert model._web is None


async def test_a_large_body_arrives_as_it_is():
    """Sent in pieces, with its length, not chunked, and not encoded again."""
    async with endpoint(replying(WHOLE)) as (url, received, _), asking(url) as model:
        text = "x" * 3_000_000
        await ask(model, text)
        head, _, sent = received[0].partition(b"\r\n\r\n")
        assert sent == b"".join(body(text))
        assert b"transfer-encoding" not in head.lower()


async def test_a_small_body_is_one_piece():
    """No packet for each part of a small request."""
    assert Pieces([b"a", b"b"]).pieces == [b"ab"]
    assert len(Pieces([b"a" * 70_000, b"b"]).pieces) == 2


async def test_connections_are_used_again():
    """Turns one after another share a connection; a connection that the server closed is not used."""
    async with endpoint(replying(WHOLE)) as (url, received, connections), asking(url) as model:
        for _ in range(3):
            await ask(model)
        assert (len(received), len(connections)) == (3, 1)
        await connections[0].aclose()
        ((line,),) = model._web._transport_for_url(httpx2.URL(url))._idle.values()
        await trio.lowlevel.wait_readable(line.socket.get_extra_info("socket"))
        await ask(model)
        assert len(connections) == 2


async def test_many_streams_at_once():
    """There is no limit of connections; afterwards as many are kept as are worth keeping."""
    gate = trio.Event()
    waiting = []

    async def answer(stream, request):
        waiting.append(request)
        if len(waiting) == 300:
            gate.set()
        await gate.wait()
        await stream.send_all(WHOLE)

    async with endpoint(answer) as (url, _, connections), asking(url) as model:
        async with trio.open_nursery() as nursery:
            for _ in range(300):
                nursery.start_soon(ask, model)
        pool = model._web._transport_for_url(httpx2.URL(url))
        assert (pool.busy, pool.idle, len(connections)) == (0, 256, 300)


async def test_a_stream_may_come_in_any_pieces():
    """One byte a chunk, with the chunked encoding around each."""

    async def answer(stream, _request):
        await stream.send_all(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        for at in range(len(STREAM)):
            await stream.send_all(b"1\r\n%b\r\n" % STREAM[at : at + 1])
        await stream.send_all(b"0\r\n\r\n")

    async with endpoint(answer) as (url, _, _), asking(url) as model:
        assert (await ask(model)).text == "hi"


# --- faults -----------------------------------------------------------------------------------------

FAULTS = [
    ("!drop", Errno.EIO, True, False, "broke"),
    ("!truncate", Errno.EIO, True, False, "ended early"),
    ("!error overloaded_error", Errno.EBUSY, True, True, "overloaded_error"),
    ("!error invalid_request_error", Errno.EINVAL, False, False, "invalid_request_error"),
    ("!html", Errno.EPROTO, False, False, "no event stream"),
    ("!fail 400", Errno.EINVAL, False, False, "answered 400"),
    ("!fail 401", Errno.EACCES, False, False, "answered 401"),
    ("!fail 403", Errno.EACCES, False, False, "answered 403"),
    ("!fail 404", Errno.ENOENT, False, False, "answered 404"),
    ("!fail 408", Errno.ETIMEDOUT, True, False, "answered 408"),
    ("!fail 409", Errno.EBUSY, True, False, "answered 409"),
    ("!fail 413", Errno.E2BIG, False, False, "answered 413"),
    ("!fail 418", Errno.EINVAL, False, False, "answered 418"),
    ("!fail 429", Errno.EAGAIN, True, True, "answered 429"),
    ("!fail 500", Errno.EIO, True, False, "answered 500"),
    ("!fail 503", Errno.EIO, True, False, "answered 503"),
    ("!fail 529", Errno.EBUSY, True, True, "answered 529"),
]


@pytest.mark.parametrize("provider", ["anthropic", "script"])
@pytest.mark.parametrize(("line", "errno", "again", "shared", "said"), FAULTS)
async def test_faults(nursery, provider, line, errno, again, shared, said):
    """Each way to fail has its errno and its sentence, and says whether to ask again and who should wait."""
    _, url = await served(nursery)
    async with asking(url) as model:
        fault = await refused(model, line, image(provider=provider))
        assert (fault.errno, fault.again, fault.shared) == (errno, again, shared), fault.text
        assert said in fault.text
        assert "\n" not in fault.text


async def test_a_refusal_names_the_request(nursery):
    """The provider's sentence and the id of the request are in the text."""
    engine, url = await served(nursery)
    before, after = prefix("claude-sonnet-5-5", {"max_tokens": 1, "top_k": 3}, "", [], False)
    odd = Image("p", "", "claude-sonnet-5-5", "anthropic", before, after)
    async with asking(url) as model:
        fault = await refused(model, "hello", odd)
    assert fault.errno is Errno.EINVAL
    assert engine.refusals[0][:40] in fault.text
    assert "(request req_" in fault.text


async def test_broken_tool_input_is_not_a_failed_call(nursery):
    """The answer counts; its call is marked."""
    _, url = await served(nursery)
    async with asking(url) as model:
        reply = await ask(model, "!badjson bash")
        assert reply.asks[0].broken


async def test_the_time_to_wait_is_read(nursery):
    """`retry-after` gets to the scheduler."""
    _, url = await served(nursery)
    async with asking(url) as model:
        assert (await refused(model, "!fail 429 retry_after=3")).retry_after == 3


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 20),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": f"Wed, 21 Oct {10**30} 07:28:00 GMT"}, None),
        ({"retry-after": f"Wed, 21 Oct 2026 07:28:00 +{10**30}"}, None),
    ],
)
def test_every_form_of_retry_after(headers, seconds):
    """Milliseconds, seconds, dates; nonsense is none."""
    assert retry_after(headers, 1792567660.0) == seconds


@pytest.mark.parametrize("said", [b"retry-after: 0", b"retry-after: Wed, 21 Oct 2015 07:28:00 GMT"])
async def test_a_time_that_is_over_is_no_time_to_wait_for(said):
    """Else a server whose clock is behind would be asked nine times in a moment."""
    reset = b"anthropic-ratelimit-requests-reset: 2015-01-01T00:00:00Z"
    for code in (429, 503):
        answer = status(code, b"{}", said, b"anthropic-ratelimit-requests-remaining: 0", reset)
        async with endpoint(replying(answer)) as (url, _, _), asking(url) as model:
            fault = await refused(model)
            assert (fault.again, fault.retry_after) == (True, None)


async def test_the_server_may_say_whether_to_retry():
    """`x-should-retry` overrules the status, but for those that can never pass."""
    cases = ((429, b"false", False), (418, b"true", True), (418, b"what", False))
    for code, word, again in (*cases, *((never, b"true", False) for never in (400, 401, 402, 403, 404, 413))):
        answer = status(code, {"error": {"message": "m"}}, b"x-should-retry: " + word)
        async with endpoint(replying(answer)) as (url, _, _), asking(url) as model:
            fault = await refused(model)
            assert (fault.again, fault.shared) == (again, False)


async def test_a_full_context():
    """Servers say it in different words; it is E2BIG and not tried again."""
    said = {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 > 8"},
    }
    async with endpoint(replying(status(400, said))) as (url, _, _), asking(url) as model:
        fault = await refused(model)
        assert (fault.errno, fault.again) == (Errno.E2BIG, False)


@pytest.mark.parametrize(
    "said", [b"<html><h1>502\nBad Gateway</h1></html>", b"", b"\xff\xfe", b'{"error":"x"}', b"[1]"]
)
async def test_error_bodies_of_any_shape(said):
    """A gateway's page, nothing, garbage: one sentence all the same."""
    async with endpoint(replying(status(502, said))) as (url, _, _), asking(url) as model:
        fault = await refused(model)
        assert (fault.errno, fault.again) == (Errno.EIO, True)
        assert fault.text.startswith(f"{url} answered 502 api_error: ")
        assert len(fault.text) < 600


@pytest.mark.parametrize(
    "header",
    [
        b"content-type: text/html; charset=hex",
        b"content-type: text/html; charset=rot13",
        b"content-type: text/html; charset=idna",
        b"content-type: text/html; charset=undefined",
        b"content-type: text/html; charset=utf-16",
        b"content-encoding: gzip",
        b"content-encoding: deflate, deflate",
    ],
)
async def test_no_codec_is_run_because_a_server_names_it(header):
    """Some of Python's raise what nobody expects, some make much of little; the text is shown as UTF-8."""
    answer = status(502, "é not so".encode(), header)
    async with endpoint(replying(answer)) as (url, _, _), asking(url) as model:
        fault = await refused(model)
        assert (fault.errno, fault.again) == (Errno.EIO, True)
        assert fault.text == f"{url} answered 502 api_error: é not so"


async def test_nobody_is_asked_for_what_is_packed():
    """Neither for answers nor for counts."""
    async with endpoint(replying(WHOLE)) as (url, received, _), asking(url) as model:
        await ask(model)
        with pytest.raises(ModelError):
            await model.count(image(), counted(body("hello")))
    asked = [request.lower() for request in received if request.startswith(b"POST ")]
    assert [b"accept-encoding: identity" in request for request in asked] == [True, True]


async def endless(stream, head, part):
    await stream.send_all(head + b"\r\n")
    while True:
        await stream.send_all(part)


async def test_an_error_body_without_an_end_is_cut():
    """What can be shown of it is."""

    async def answer(stream, _request):
        await endless(stream, b"HTTP/1.1 500 X\r\n", b"no end " * 10_000)

    async with endpoint(answer) as (url, _, _), asking(url) as model:
        with trio.fail_after(60):
            fault = await refused(model)
        assert (fault.errno, fault.again) == (Errno.EIO, True)
        assert fault.text.startswith(f"{url} answered 500 api_error: no end no end")


async def test_an_answer_without_an_end_is_no_answer():
    """It would fill the memory of everybody; nor is it asked for again."""
    data = b"data: {" + b" " * 100_000 + b"\n"

    async def answer(stream, _request):
        await endless(stream, HEAD, data * 10)

    async with endpoint(answer) as (url, _, _), asking(url) as model:
        with trio.fail_after(60):
            fault = await refused(model)
            with pytest.raises(ModelError, match="128 MiB"):
                await model.windows(image())
        assert (fault.errno, fault.again) == (Errno.EIO, False)
        assert fault.text == f"the connection to {url} broke: an answer of more than 128 MiB"


async def test_a_redirect_is_not_followed():
    """A redirect is a failure, and nothing is sent to where it points."""
    async with endpoint(replying(WHOLE)) as (other, received, _):
        away = status(307, b"", b"location: " + other.encode())
        async with endpoint(replying(away)) as (url, _, _), asking(url) as model:
            fault = await refused(model)
            assert (fault.errno, fault.again) == (Errno.EPROTO, False)
            assert "redirect" in fault.text
    assert received == []


async def test_silence_is_noticed():
    """Before the answer and in the middle of it."""

    async def silent(_stream, _request):
        await trio.sleep_forever()

    async def halfway(stream, _request):
        await stream.send_all(WHOLE[:200])
        await trio.sleep_forever()

    for answer in (silent, halfway):
        async with endpoint(answer) as (url, _, _), asking(url, stall=0.1) as model:
            fault = await refused(model)
            assert (fault.errno, fault.again) == (Errno.ETIMEDOUT, True)
            assert fault.text == f"no data from {url} for 0.1 s"


async def test_an_error_body_that_stalls():
    """The wait for an error's text has the same limit."""

    async def answer(stream, _request):
        await stream.send_all(b"HTTP/1.1 500 X\r\ncontent-length: 10\r\n\r\n{")
        await trio.sleep_forever()

    async with endpoint(answer) as (url, _, _), asking(url, stall=0.1) as model:
        assert (await refused(model)).errno is Errno.ETIMEDOUT


async def test_hangups():
    """Before the answer, in its head, and in its middle: EIO, to be tried again."""
    for data in (b"", b"HTTP/1.1 200", WHOLE[:200], b"nonsense\r\n\r\n"):
        async with endpoint(replying(data, close=True)) as (url, _, _), asking(url) as model:
            fault = await refused(model)
            assert (fault.errno, fault.again) == (Errno.EIO, True), fault.text


CHUNK = HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(STREAM) + STREAM + b"\r\n"


@pytest.mark.parametrize(
    "data",
    [CHUNK, CHUNK + b"nonsense\r\n", HEAD + b"content-length: %d\r\n\r\n" % (len(STREAM) + 9) + STREAM],
)
async def test_an_answer_is_whole_however_its_connection_ends(data):
    """What has been paid for is not thrown away because a proxy forgot the last chunk."""
    async with endpoint(replying(data, close=True)) as (url, _, _), asking(url) as model:
        assert (await ask(model)).text == "hi"


async def test_a_connection_that_does_not_end_with_its_answer_is_closed():
    """Whether it is silent or busy then."""

    async def pinging(stream, _request):
        await stream.send_all(HEAD + b"\r\n" + STREAM)
        while True:
            await stream.send_all(b"event: ping\n\n")
            await trio.sleep(0)

    for answer in (replying(CHUNK), pinging):
        async with endpoint(answer) as (url, _, _), asking(url, stall=0.1) as model:
            with trio.fail_after(60):
                assert (await ask(model)).text == "hi"


async def test_nobody_listens():
    """A refused connection is EHOSTUNREACH, by the endpoint's name."""
    async with endpoint(replying(WHOLE)) as (url, _, _):
        pass
    async with asking(url) as model:
        fault = await refused(model)
        assert (fault.errno, fault.again) == (Errno.EHOSTUNREACH, True)
        assert url in fault.text


@pytest.mark.parametrize("url", ["localhost:80", "ftp://host", "http://", "http://host:99999", "nonsense"])
async def test_a_bad_base_url(url):
    """It is refused before anything is sent, and not tried again."""
    async with asking() as model:
        fault = await refused(model, "hello", image(url))
        assert (fault.errno, fault.again) == (Errno.EINVAL, False)
        with pytest.raises(ModelError):
            model.check(image(url))


# --- cancellation -----------------------------------------------------------------------------------


async def test_cancellation_leaves_the_pool_clean(nursery):
    """Wherever a call is cancelled, its connection is closed or free, and the next call works."""
    engine, url = await served(nursery)
    rng = random.Random(7)
    async with asking(url) as model:
        await ask(model)
        pool = model._web._transport_for_url(httpx2.URL(url))
        for _ in range(60):
            async with trio.open_nursery() as callers:
                for _ in range(4):
                    callers.start_soon(_cancelled, model, rng.random() * 0.02)
            assert pool.busy == 0
        assert (await ask(model, "!say still here")).text == "still here"
        assert pool.idle <= 5
    assert engine.refusals == []


async def _cancelled(model, after):
    with trio.move_on_after(after):
        await ask(model, "!delay 0.001\n!say " + "word " * 20)


async def test_what_was_heard_survives_a_cancellation():
    """The caller keeps the listener: the text so far can become a message."""

    async def answer(stream, _request):
        await stream.send_all(WHOLE[: WHOLE.index(b"data: ", WHOLE.index(b'"hi"'))])
        await trio.sleep_forever()

    turn = Turn("claude-sonnet-5-5", lambda _: scope.cancel())
    async with endpoint(answer) as (url, _, _), asking(url) as model:
        with trio.CancelScope() as scope:
            await model.infer(image(), body("hello"), turn)
    assert scope.cancelled_caught
    assert turn.partial().text == "hi"


async def test_a_cancelled_handshake_leaks_no_socket():
    """A TLS server that says nothing: the socket is closed when the call is cancelled."""

    async def converse(stream):
        while await stream.receive_some(100):
            scope.cancel()
        closed.set()

    closed = trio.Event()
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, converse, 0, host="127.0.0.1"))
        async with asking(f"https://127.0.0.1:{listeners[0].socket.getsockname()[1]}") as model:
            await model.warm()
            with trio.CancelScope() as scope:
                await ask(model)
            assert scope.cancelled_caught
            with trio.fail_after(10):
                await closed.wait()
        with warnings.catch_warnings(action="error"):
            gc.collect()
        nursery.cancel_scope.cancel()


# --- secrets ----------------------------------------------------------------------------------------


def _headers(request):
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


async def test_the_key_goes_to_its_endpoint_alone(monkeypatch):
    """The default endpoint gets the key; a program's own gets neither it nor anything of the environment."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "env-key-1")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "env-token-2")
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "X-Custom: env-header-3\nAuthorization: env-header-4")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:1")
    async with endpoint(replying(WHOLE)) as (url, received, _), asking(url) as model:
        await ask(model)
        await ask(model, at=image(base_url=url))
        own, other = map(_headers, received)
        assert own["authorization"] == f"Bearer {KEY}"
        assert "authorization" not in other
        assert "x-api-key" not in other
        assert b"env-" not in b"".join(received)
        assert KEY.encode() not in received[1]
    assert os.environ["ANTHROPIC_API_KEY"] == "env-key-1"


async def test_the_config_pairs_keys_and_endpoints():
    """`keys` is asked with the endpoint and the variable's name, and its answer is used."""
    asked = []

    def keys(base_url, env):
        asked.append((base_url, env))
        return "local-key\n"

    async with endpoint(replying(WHOLE)) as (url, received, _):
        model = Anthropic(keys, None, lambda: ScriptTransport(Engine()))
        await ask(model, at=image(base_url=url, api_key_env="LOCAL_KEY"))
        await model.aclose()
    assert asked == [(url, "LOCAL_KEY")]
    assert _headers(received[0])["authorization"] == "Bearer local-key"


async def test_a_cookie_of_one_endpoint_stays_unsent():
    """Ports of one host share cookies: the daemon keeps none."""
    cookie = WHOLE.replace(b"\r\n", b"\r\nset-cookie: a=b\r\n", 1)
    async with endpoint(replying(cookie)) as (url, received, _), asking(url) as model:
        await ask(model)
        await ask(model)
        assert "cookie" not in _headers(received[1])


async def test_extra_headers_are_sent():
    """The program's own headers, `anthropic-beta` among them; not those that HTTP itself needs."""
    async with endpoint(replying(WHOLE)) as (url, received, _), asking(url) as model:
        await ask(model, at=image(headers=(("Anthropic-Beta", "x-1"), ("X-Mine", "y"))))
        sent = _headers(received[0])
        assert (sent["anthropic-beta"], sent["x-mine"]) == ("x-1", "y")
        for name, value in (("Content-Length", "5"), ("X-Ä", "y"), ("X-Mine", "a\r\nHost: b")):
            fault = await refused(model, at=image(headers=((name, value),)))
            assert (fault.errno, fault.again) == (Errno.EINVAL, False)


async def test_no_key_is_a_clear_refusal():
    """Without a key for the default endpoint nothing is sent, and the text says what to do."""
    async with asking(key=None) as model:
        fault = await refused(model)
        assert (fault.errno, fault.again) == (Errno.EACCES, False)
        assert "ANTHROPIC_API_KEY" in fault.text
        with pytest.raises(ModelError):
            model.check(image())
        model.check(image("http://127.0.0.1:1"))
        model.check(image(provider="script"))


@pytest.mark.parametrize("before", [0, 360, 375, 390])
async def test_a_key_that_an_error_repeats_is_hidden(before):
    """In a status's body, in an error event, at the edge where a long text is cut; in whole and in part."""
    said = "x" * before + f" {KEY} or " + "y" * 500
    told = {"type": "error", "error": {"type": "authentication_error", "message": said}}
    event = b"data: " + json.dumps(told).encode() + b"\n\n"
    stream = HEAD + b"content-length: %d\r\n\r\n" % len(event) + event
    for answer in (status(401, told), status(401, said.encode()), stream):
        async with endpoint(replying(answer)) as (url, _, _), asking(url) as model:
            fault = await refused(model)
            assert KEY[:7] not in fault.text
            assert fault.__cause__ is None
            assert fault.__suppress_context__


async def test_a_password_in_the_address_is_not_shown():
    """An endpoint is named by scheme, host and port."""
    async with endpoint(replying(status(500, b"no"))) as (url, _, _), asking() as model:
        fault = await refused(model, at=image(url.replace("//", "//user:hush@") + "/path"))
        assert fault.text.startswith(url + " answered 500")
        assert "hush" not in fault.text


# --- the SDK ----------------------------------------------------------------------------------------


def test_the_sdk_is_not_imported_at_start():
    """Importing the module costs nothing of what the SDK costs."""
    code = (
        "import sys, llmprocd.model.anthropic; sys.exit(bool({'anthropic', 'httpx2'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def test_warm_makes_the_first_call_like_any_other():
    """The SDK and the certificates are there afterwards, however many asked for it at once."""
    async with asking() as model:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(model.warm)
            nursery.start_soon(model.warm)
        assert "anthropic" in sys.modules
        assert model._web is not None


async def test_script_time_is_virtual(autojump_clock):
    """In process nothing waits for a thread or a socket, so a mock clock rules."""
    importlib.import_module("anthropic")  # which is what takes a thread otherwise
    async with asking(key=None) as model:
        with trio.fail_after(1000):
            reply = await ask(model, "!sleep 300\n!say late", image(provider="script"))
        assert reply.text == "late"
        assert 300 <= autojump_clock.current_time() < 400


async def test_idle_connections_expire():
    """One that has idled too long is closed when another comes back, however busy that one is."""
    async with endpoint(replying(WHOLE)) as (url, _, connections):
        pool = Pool(keepalive=0.2)
        async with httpx2.AsyncClient(transport=pool) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.post, url)
                nursery.start_soon(client.post, url)
            assert len(connections) == 2
            for _ in range(6):
                await trio.sleep(0.06)
                await client.post(url)
            assert (pool.busy, pool.idle) == (0, 1)


async def test_idle_connections_to_others_expire_too():
    """Those of an endpoint that nobody asks any more, too: else each that was ever asked would keep some."""
    async with endpoint(replying(WHOLE)) as (gone, _, _), endpoint(replying(WHOLE)) as (used, _, _):
        pool = Pool(keepalive=0.01)
        async with httpx2.AsyncClient(transport=pool) as client:
            await client.post(gone)
            assert len(pool._idle) == 1
            with trio.fail_after(10):
                while httpcore2.URL(gone).origin.port in {port for _, _, port in pool._idle}:
                    await client.post(used)
            assert (pool.busy, pool.idle) == (0, 1)


# --- windows, counting ------------------------------------------------------------------------------


async def test_windows_and_counts_come_through_the_sdk():
    """The list of models, and count_tokens with what of a body it takes."""
    async with asking() as model:
        windows = await model.windows(image(provider="script"))
        assert windows["claude-sonnet-5-5"] == 1_000_000
        at = image(provider="script")
        assert await model.count(at, counted(body("hello", at))) > 10


@pytest.mark.parametrize("said", [b"[]", b'{"data":7}', b'{"data":[{"id":"x"}]}', b"<html>"])
async def test_an_endpoint_that_answers_something_else_is_no_harm(said):
    """There is no count then, and no window but for the models that it names one for."""
    async with endpoint(replying(status(200, said, JSON))) as (url, _, _), asking() as model:
        at = image(base_url=url)
        with pytest.raises(ModelError) as caught:
            await model.count(at, counted(body("hello", at)))
        assert caught.value.errno is Errno.EPROTO
        if b'"x"' in said:
            assert await model.windows(at) == {}
        else:
            with pytest.raises(ModelError):
                await model.windows(at)


@pytest.mark.parametrize("number", [-5, 0, 10**9 + 1, 10**30])
async def test_a_window_or_a_count_that_cannot_be_is_none(number):
    """A count below zero would be room for others, and a window beyond 64 bits can be told to nobody."""
    said = {"data": [{"id": "x", "max_input_tokens": number}], "input_tokens": number}
    async with endpoint(replying(status(200, said, JSON))) as (url, _, _), asking() as model:
        at = image(base_url=url)
        assert await model.windows(at) == {}
        with pytest.raises(ModelError, match="input_tokens") if number else nullcontext():
            await model.count(at, counted(body("hello", at)))


async def test_a_count_says_how_long_it_is():
    """As a model call does: not every server takes a request in chunks."""
    answer = replying(status(200, {"input_tokens": 7}, JSON))
    async with endpoint(answer) as (url, received, _), asking(url) as model:
        assert await model.count(image(), counted(body("hello"))) == 7
    assert len(received) == 1
    assert b"content-length: " in received[0].lower()


# --- quotas -----------------------------------------------------------------------------------------


async def test_what_the_headers_tell_of_limits_is_heard_of_every_answer():
    """Of an answer when it begins, and of a refusal."""
    told = (b"anthropic-ratelimit-requests-limit: 50", b"anthropic-ratelimit-requests-remaining: 0")
    whole = WHOLE.replace(b"\r\n", b"\r\n" + b"\r\n".join(told) + b"\r\n", 1)
    for answer in (whole, status(429, b"{}", *told), status(400, b"{}", *told)):
        heard = []
        async with endpoint(replying(answer)) as (url, _, _), asking(url) as model:
            turn = Turn("claude-sonnet-5-5", lambda _: None)
            with nullcontext() if answer is whole else pytest.raises(ModelError):
                await model.infer(image(), body("hello"), turn, heard.append)
        assert [(quota.requests.limit, quota.requests.left) for quota in heard] == [(50, 0)]


async def test_a_refusal_that_names_no_time_is_waited_out_by_its_limits():
    """429 without Retry-After: until what is used up comes back."""
    reset = b"anthropic-ratelimit-input-tokens-reset: 2999-01-01T00:00:00Z"
    used_up = b"anthropic-ratelimit-input-tokens-remaining: 0"
    for extra, named in (((used_up, reset), True), ((reset,), False)):
        async with endpoint(replying(status(429, b"{}", *extra))) as (url, _, _), asking(url) as model:
            fault = await refused(model)
            assert (fault.retry_after is not None) == named


async def test_a_refusals_code_is_told(nursery):
    """What is said beside the sentence is kept, and nothing is made of a strange one."""
    _, url = await served(nursery)
    body = [b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"x"}]', thread("msg_x") + b"}"]
    async with asking(url) as model:
        with pytest.raises(ModelError) as caught:
            await model.infer(image(), body, Turn("m", lambda _: None))
        assert (caught.value.code, caught.value.again) == ("thread_not_found", False)
    for said in (b"[]", b'{"error":{"details":null}}', b'{"error":{"details":{"error_code":7}}}', b"\xff"):
        async with endpoint(replying(status(400, said, JSON))) as (url, _, _), asking(url) as model:
            assert (await refused(model)).code == ""
