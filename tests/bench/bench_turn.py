"""What a turn costs this process, without a network: our side of it and the SDK's.

    python tests/bench/bench_turn.py

CPU time of the median round, in milliseconds, against a transport in process that answers at once.
"""

import statistics
import time
from collections.abc import AsyncIterator, Callable

import httpx2
import msgspec
import trio

from llmprocd.abi.types import MessageId
from llmprocd.kernel.history import text_block
from llmprocd.kernel.state import Image, Node
from llmprocd.model.anthropic import Anthropic
from llmprocd.model.body import Transcript, prefix
from llmprocd.model.sse import Turn

MODEL = "claude-sonnet-5-5"
ROUNDS = 9
WORDS = ('The quick brown fox jumps over the "lazy" dog; naïve café. ' * 20)[:1000]


def event(**fields: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (str(fields["type"]).encode(), msgspec.json.encode(fields))


def stream(texts: int, inputs: int) -> list[bytes]:
    """A streamed turn, an HTTP chunk an event."""
    say = {"type": "text_delta", "text": "a word or two "}
    ask = {"type": "input_json_delta", "partial_json": '"x",'}
    call: dict[str, object] = {"type": "tool_use", "id": "toolu_1", "name": "bash", "input": {}}
    parts = [*([ask] * inputs), {"type": "input_json_delta", "partial_json": '"x"]}'}]
    return [
        event(
            type="message_start", message={"id": "msg_1", "usage": {"input_tokens": 5, "output_tokens": 1}}
        ),
        event(type="content_block_start", index=0, content_block={"type": "text", "text": ""}),
        *(event(type="content_block_delta", index=0, delta=say) for _ in range(texts)),
        event(type="content_block_stop", index=0),
        event(type="content_block_start", index=1, content_block=call),
        event(type="content_block_delta", index=1, delta={**ask, "partial_json": '{"a":['}),
        *(event(type="content_block_delta", index=1, delta=part) for part in parts),
        event(type="content_block_stop", index=1),
        event(type="message_delta", delta={"stop_reason": "tool_use"}, usage={"output_tokens": 300}),
        event(type="message_stop"),
    ]


class Replay(httpx2.AsyncBaseTransport):
    """Reads each request and answers with the same chunks."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        assert isinstance(request.stream, httpx2.AsyncByteStream)
        size = 0
        async for piece in request.stream:
            size += len(piece)
        assert size == int(request.headers["content-length"])
        return httpx2.Response(200, stream=Chunks(self.chunks))


class Chunks(httpx2.AsyncByteStream):
    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk


def path(length: int) -> list[Node]:
    body = text_block(WORDS)
    return [Node(MessageId(i), None, ("user", "assistant")[i % 2], body, model=MODEL) for i in range(length)]


def image() -> Image:
    before, after = prefix(MODEL, {"max_tokens": 999}, "be good", [], True)
    return Image("p", "", MODEL, "script", before, after)


async def turns(length: int, chunks: list[bytes]) -> tuple[float, float]:
    """CPU milliseconds of one turn, and of its body alone."""
    transcript, asked = Transcript.of(path(length), MODEL), image()
    model = Anthropic(lambda _url, _env: None, None, lambda: Replay(chunks))

    async def turn() -> None:
        listener = Turn(MODEL, lambda _: None)
        await model.infer(asked, transcript.pieces(asked), listener)
        assert listener.reply().asks[0].broken is False

    repeat = max(5, 2000 // (length + 10))
    await turn()
    whole: list[float] = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(repeat):
            await turn()
        whole.append((time.process_time() - began) / repeat)
    await model.aclose()
    return statistics.median(whole) * 1e3, cpu(lambda: transcript.pieces(asked), repeat)


def cpu(work: Callable[[], object], repeat: int) -> float:
    """CPU milliseconds of a piece of work."""
    samples: list[float] = []
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(repeat):
            work()
        samples.append((time.process_time() - began) / repeat)
    return statistics.median(samples) * 1e3


def fed(chunks: list[bytes]) -> None:
    listener = Turn(MODEL, lambda _: None)
    for chunk in chunks:
        listener.feed(chunk)
    listener.reply()


async def main() -> None:
    short, long = stream(1, 1), stream(200, 20)
    rows: list[tuple[str, float, float]] = []
    for length, goal in ((20, 2), (1_000, 3), (10_000, 10)):
        turn, body = await turns(length, short)
        rows.append((f"turn over {length:,} messages of 1 KB", turn, goal))
        if length == 1_000:
            rows.append(("  of which its body", body, 0.3))
        nodes = path(length)
        rows.append(("  joining them all anew", cpu(lambda nodes=nodes: Transcript.of(nodes, MODEL), 3), 0))
    rows.append(("stream of 200 text and 20 input deltas", (await turns(1, long))[0], 4))
    rows.append(("  of which ours, a chunk an event", cpu(lambda: fed(long), 50), 0))
    rows.append(("  of which ours, in one chunk", cpu(lambda: fed([b"".join(long)]), 50), 0))
    print(f"{'CPU':42}{'ms':>9}{'goal':>7}")
    for name, spent, goal in rows:
        print(f"{name:42}{spent:9.3f}{f'< {goal:g}' if goal else '':>7}")


if __name__ == "__main__":
    trio.run(main)
