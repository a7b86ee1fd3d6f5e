"""The scripted model in process: an HTTP transport for the Anthropic client that opens no socket.

The whole client runs over it, its streams, errors and cancellation included; time is trio's, so a mock clock
rules delays and the life of cached prompts.
"""

from collections.abc import AsyncIterator

import httpx2
import trio

from llmprocd.model.script import Engine
from llmprocd.model.script_answer import Answer

PIECE = 64 * 1024


class ScriptTransport(httpx2.AsyncBaseTransport):
    """Hands requests to an engine and streams its answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer one request. Raises httpx2.ReadError when the answer is a reset without a byte."""
        body = await request.aread()
        answer = self.engine.answer(
            request.method,
            request.url.raw_path.decode(),
            dict(request.headers),
            body,
            trio.current_time(),
        )
        await trio.sleep(answer.wait)
        return httpx2.Response(answer.status, headers=list(answer.headers), stream=ScriptStream(answer))


class ScriptStream(httpx2.AsyncByteStream):
    """The body of one answer, at its pace."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        held = bytearray()
        for chunk in self._answer.chunks:
            if (chunk.delay and held) or len(held) > PIECE:
                yield bytes(held)
                held.clear()
            if chunk.delay:
                await trio.sleep(chunk.delay)
            held += chunk.data
        if held:
            yield bytes(held)
        await trio.lowlevel.checkpoint()
        if self._answer.dropped:
            raise httpx2.ReadError("connection reset by the script")
