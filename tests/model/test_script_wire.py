"""The real Anthropic client against the scripted model, in process and over real HTTP."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import anthropic
import httpx2
import pytest
import trio

from llmprocd.model import script_http, script_rules
from llmprocd.model.script import Engine
from llmprocd.model.script_transport import ScriptTransport


@contextlib.asynccontextmanager
async def in_process(engine, **options):
    transport = ScriptTransport(engine)
    async with httpx2.AsyncClient(transport=transport) as http:
        yield anthropic.AsyncAnthropic(api_key="script", http_client=http, max_retries=0, **options)


@contextlib.asynccontextmanager
async def over_http(engine, **options):
    async with trio.open_nursery() as nursery:
        served = await nursery.start(script_http.serve, engine)
        url = served.url
        async with anthropic.AsyncAnthropic(
            api_key="script", base_url=url, max_retries=0, **options
        ) as client:
            yield client
        nursery.cancel_scope.cancel()


@pytest.fixture(params=[in_process, over_http])
def connect(request):
    """Both ways in."""
    return request.param


def asked(text, **fields):
    return {"model": "script", "max_tokens": 1000, "messages": [{"role": "user", "content": text}]} | fields


async def test_a_whole_message(connect):
    """Text, thinking, tools and usage as the client's types have them."""
    async with connect(Engine()) as client:
        message = await client.messages.create(**asked("!think hm\n!& say a b\n!& bash ls"))
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[2].input == {"command": "ls"}
    assert message.stop_reason == "tool_use"
    assert message.usage.output_tokens > 0


async def test_a_streamed_message_is_the_same(connect):
    """The client's own accumulation of the events ends with what the script says."""
    async with connect(Engine()) as client, client.messages.stream(**asked("!say a b\n!& bash ls")) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        message = await stream.get_final_message()
    assert text == message.content[0].text == "a b"
    assert message.content[1].input == {"command": "ls"}


async def test_a_conversation_with_tools(connect):
    """What the model sent goes back, and the script goes on."""
    engine = Engine()
    request = asked("!think hm\n!& bash ls\n!say got {{result}}")
    async with connect(engine) as client:
        first = await client.messages.create(**request)
        result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "files"}
        request["messages"] += [
            {
                "role": "assistant",
                "content": [block.model_dump(exclude_none=True) for block in first.content],
            },
            {"role": "user", "content": [result]},
        ]
        second = await client.messages.create(**request)
    assert second.content[0].text == "got files"
    assert engine.refusals == []
    assert [json.loads(r.body)["messages"] for r in engine.requests] == [
        request["messages"][:1],
        request["messages"],
    ]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, anthropic.BadRequestError),
        (401, anthropic.AuthenticationError),
        (403, anthropic.PermissionDeniedError),
        (404, anthropic.NotFoundError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
        (529, anthropic.InternalServerError),
    ],
)
async def test_failures_are_the_clients_errors(connect, status, error):
    """Status, type and headers arrive."""
    async with connect(Engine()) as client:
        with pytest.raises(error) as caught:
            await client.messages.create(**asked(f"!fail {status} some_error retry_after=3"))
    assert caught.value.status_code == status
    assert caught.value.response.headers["retry-after"] == "3"
    assert caught.value.body["error"]["type"] == "some_error"
    assert caught.value.request_id.startswith("req_")


async def test_refusals_too(connect):
    """A bad request is refused over the wire as it is by the engine."""
    engine = Engine(key="other")
    async with connect(engine) as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(**asked("x"))
        engine.key = None
        with pytest.raises(anthropic.BadRequestError, match="non-empty content"):
            await client.messages.create(**asked(""))
    assert engine.refusals == ["invalid x-api-key", "messages.0: user messages must have non-empty content"]


async def test_the_clients_own_retries(connect):
    """A retried request is the same conversation's next try."""
    engine = Engine()
    async with connect(engine) as client:
        patient = client.with_options(max_retries=2)
        message = await patient.messages.create(**asked("!fail 529 times=2 retry_after=0.01\n!say ok"))
    assert message.content[0].text == "ok"
    assert len(engine.requests) == 3


async def read_stream(client, text):
    """The text until the stream ends, and how it ended."""
    said, names = "", []
    stream = await client.messages.create(stream=True, **asked(text))
    try:
        async for event in stream:
            names.append(event.type)
            if event.type == "content_block_delta":
                said += event.delta.text
    finally:
        with trio.CancelScope(shield=True):
            await stream.close()
    return said, names


async def test_a_reset_in_mid_stream(connect):
    """The client sees a broken connection, not an end, and what came before it."""
    async with connect(Engine()) as client:
        with pytest.raises((httpx2.ReadError, httpx2.RemoteProtocolError)):
            await read_stream(client, "!say one two three four\n!& drop")
        with pytest.raises(anthropic.APIConnectionError):
            await client.messages.create(**asked("!drop"))


async def test_a_stream_that_ends_without_its_end(connect):
    """Truncation is silent: only the missing message_stop tells."""
    async with connect(Engine()) as client:
        said, names = await read_stream(client, "!say one two three four\n!& truncate")
    assert said == "one two "
    assert names[-1] == "content_block_delta"


async def test_an_error_event_in_mid_stream(connect):
    """The client raises with the status of the response, 200."""
    async with connect(Engine()) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            await read_stream(client, "!error overloaded_error")
    assert caught.value.status_code == 200
    assert caught.value.body["error"]["type"] == "overloaded_error"


async def test_cancellation_in_mid_stream(connect):
    """A stream that stalls can be left, and the next request is served."""
    async with connect(Engine()) as client:
        heard = trio.Event()

        async def listen(scope):
            with scope:
                stream = await client.messages.create(
                    stream=True, **asked("!say one two three\n!& stall 9999")
                )
                try:
                    async for event in stream:
                        if event.type == "content_block_delta":
                            heard.set()
                finally:
                    with trio.CancelScope(shield=True):
                        await stream.close()

        scope = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, scope)
            await heard.wait()
            scope.cancel()
        message = await client.messages.create(**asked("!say still here"))
    assert message.content[0].text == "still here"


async def test_time_in_process_is_the_mock_clocks(autojump_clock):
    """Delays, sleeps and the life of cached prompts pass at once."""
    big = "!sleep 1000\n!delay 100\n!say a b c\n" + "x" * 4096
    request = asked(big, cache_control={"type": "ephemeral"})
    async with in_process(Engine()) as client:
        start = autojump_clock.current_time()
        first = await client.messages.create(**request)
        assert autojump_clock.current_time() - start == pytest.approx(1200)
        second = await client.messages.create(**request)
    assert (first.usage.cache_read_input_tokens, second.usage.cache_read_input_tokens) == (0, 0)
    assert second.usage.cache_creation_input_tokens > 1000


async def test_models_and_token_counts(connect):
    """The other endpoints the client knows."""
    async with connect(Engine()) as client:
        names = [model.id async for model in client.models.list()]
        counted = await client.messages.count_tokens(
            model="script", messages=[{"role": "user", "content": "hi"}]
        )
    assert "script" in names
    assert counted.input_tokens > 0


async def test_cached_prompts_show_in_usage(connect):
    """The second request reads what the first one created."""
    request = asked("x" * 4096, cache_control={"type": "ephemeral"})
    async with connect(Engine()) as client:
        first = await client.messages.create(**request)
        async with client.messages.stream(**request) as stream:
            second = await stream.get_final_message()
    created = first.usage.cache_creation_input_tokens
    assert created == first.usage.cache_creation.ephemeral_5m_input_tokens > 1000
    assert (second.usage.cache_read_input_tokens, second.usage.input_tokens) == (created, 0)


# Only over HTTP


async def test_a_body_too_large_is_heard_of(nursery):
    """The endpoint reads what it will not take, so that the answer arrives; the connection stays."""
    served = await nursery.start(script_http.serve, Engine())
    async with httpx2.AsyncClient(base_url=served.url, headers={"x-api-key": "a"}) as http:
        answer = await http.post("/v1/messages", content=b" " * (script_rules.MAX_BODY + 10))
        assert answer.status_code == 413
        assert answer.json()["error"]["type"] == "request_too_large"
        assert (await http.get("/v1/models")).status_code == 200
    nursery.cancel_scope.cancel()


async def test_what_speaks_no_http_is_dropped_alone(nursery):
    """Noise on one connection ends that connection and no other."""
    served = await nursery.start(script_http.serve, Engine())
    port = int(served.url.rpartition(":")[2])
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(b"\x00\x01 noise\r\n\r\n")
        with contextlib.suppress(trio.BrokenResourceError):
            assert await stream.receive_some() == b""
    async with httpx2.AsyncClient(base_url=served.url) as http:
        assert (await http.get("/_script/refusals")).json() == []
    nursery.cancel_scope.cancel()


async def test_a_client_that_hangs_up_frees_its_task(nursery):
    """A stream nobody reads any more is not played to its end."""
    served = await nursery.start(script_http.serve, Engine())
    port = int(served.url.rpartition(":")[2])
    body = json.dumps(asked("!delay 9999\n!say a b", stream=True)).encode()
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(
            b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: a\r\ncontent-length: %d\r\n\r\n" % len(body)
            + body
        )
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
        await wait_for_tasks(nursery, 2)
    await wait_for_tasks(nursery, 1)
    nursery.cancel_scope.cancel()


async def wait_for_tasks(nursery, count):
    """Wait until the server has `count` tasks: one that listens and one for each connection."""
    with trio.fail_after(10):
        while tasks_below(next(iter(nursery.child_tasks))) != count:
            await trio.sleep(0.01)


def tasks_below(task):
    """How many tasks under this one have none under them."""
    children = [child for below in task.child_nurseries for child in below.child_tasks]
    return sum(tasks_below(child) for child in children) if children else 1


def test_the_program_says_where_it_listens_and_ends_on_a_signal(tmp_path):
    """One JSON line on stdout; what it received can be asked for; SIGTERM is a good end."""
    script = tmp_path / "a.script"
    script.write_text("!say from the file")
    command = [sys.executable, "-m", "llmprocd.model.script", "--port", "0", "--script", str(script)]
    root = pathlib.Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, env=dict(os.environ)) as process:
        url = json.loads(process.stdout.readline())["url"]
        with httpx2.Client(base_url=url, headers={"x-api-key": "k"}, trust_env=False) as http:
            answer = http.post("/v1/messages", json=asked("hello"))
            assert answer.json()["content"][0]["text"] == "from the file"
            http.post("/v1/messages", json={})
            received = http.get("/_script/requests").json()
            assert json.loads(received[0]["body"]) == asked("hello")
            assert received[0]["headers"]["x-api-key"] == "k"
            assert http.get("/_script/refusals").json() == ["model: Field required"]
            assert http.post("/_script/reset").status_code == 200
            assert http.get("/_script/requests").json() == []
            assert http.get("/_script/nothing").status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


@pytest.mark.parametrize("options", [["--host", "0.0.0.0"], ["--rate-limit", "0"], ["--port", "x"]])
def test_bad_usage_is_two(options, capsys):
    """It listens on loopback only, since it shows what it received to anyone."""
    with pytest.raises(SystemExit) as caught:
        script_http.main(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_the_engine_needs_no_client_and_no_loop():
    """Importing it imports neither trio nor an HTTP library."""
    names = ("trio", "httpx2", "anthropic")
    code = f"import sys, llmprocd.model.script; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
