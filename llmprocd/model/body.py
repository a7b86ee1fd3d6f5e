"""A request body joined from pieces that were encoded once.

Law: the body of a request depends on the path from the root to the head, on the image, and on nothing else;
equal paths give equal bytes, and a path that goes on gives bytes that go on.
Law: no byte of the past is produced twice: prompt caches and signed thinking depend on it.

Neighbouring nodes of one role become one message; thinking that another model signed is left out, and a node
with nothing else in it with it. The moving cache marker stands in the suffix, never in stored bytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import msgspec

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.kernel import history
from llmprocd.kernel.state import Image, Node, ToolResult

_CACHED = {"type": "ephemeral"}
_OWN = frozenset(
    {"model", "messages", "system", "tools"}
)  # written here from the program, not from its parameters
_LEFT_OUT = frozenset({"stream", "extra_headers", "cache_control", "max_tokens"})
_THINKING = frozenset({"thinking", "redacted_thinking"})
_RESULT = b'"type":"tool_result"'  # quotes inside a JSON string are escaped, so no text holds this

_encode = msgspec.json.encode


class _Block(msgspec.Struct, gc=False):
    type: str = ""


_raws = msgspec.json.Decoder(list[msgspec.Raw]).decode
_block = msgspec.json.Decoder(_Block).decode


def prefix(
    model: str, parameters: Mapping[str, Any], system: str, tools: Sequence[Mapping[str, Any]], caching: bool
) -> tuple[bytes, bytes]:
    """What stands before and after the messages of every request of a program.

    Args:
        model: sent as is.
        parameters: sent as they are, in an order of ours; `extra_headers` are no part of the body.
        system: the rendered system prompt; "" leaves it out.
        tools: the API's tool definitions, in the order in which they are offered.
        caching: marks the system prompt and, in each request anew, its last block.

    Raises:
        KernelError: EINVAL for a parameter that the daemon writes itself.
    """
    if own := _OWN & parameters.keys():
        raise KernelError(Errno.EINVAL, f"parameters: {', '.join(sorted(own))} cannot be set there")
    marker = parameters.get("cache_control") or (_CACHED if caching else None)
    head: dict[str, Any] = {"model": model}
    if "max_tokens" in parameters:
        head["max_tokens"] = parameters["max_tokens"]
    head |= {name: parameters[name] for name in sorted(parameters.keys() - _LEFT_OUT)}
    if system:
        block: dict[str, Any] = {"type": "text", "text": system}
        head["system"] = [block | {"cache_control": marker} if marker and caching else block]
    if tools:
        head["tools"] = tools
    head["stream"] = True
    before = _encode(head)[:-1] + b',"messages":['
    return before, b'],"cache_control":%b}' % _encode(marker) if marker else b"]}"


def user_text(text: str) -> bytes:
    """A user's words as content of a message; b"" for a blank text, which the API refuses."""
    return history.text_block(text) if text.strip() else b""


def tool_results(results: Sequence[ToolResult]) -> bytes:
    """The answers to a message that asked for tools, as content of the next one."""
    return b",".join(map(history.result_block, results))


class Transcript:
    """The messages of one process as they are sent, kept joined; it only grows."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._joined = bytearray()  # the messages; the last one is open: its `]}` is still to come
        self._role = ""  # of the open one
        self._content = 0  # where the open one's content begins

    @classmethod
    def of(cls, nodes: Iterable[Node], model: str) -> Self:
        """The transcript of a path, root first, for the model that is to read it."""
        transcript = cls(model)
        for node in nodes:
            transcript.append(node)
        return transcript

    def __len__(self) -> int:
        """Bytes of the joined messages."""
        return len(self._joined)

    def append(self, node: Node) -> None:
        """Add the next node of the path; costs nothing that grows with the path."""
        content = node.body
        if node.thinks and node.model != self.model:
            content = _without_thinking(content)
        if not content:
            return
        widens = node.role == self._role
        if widens:
            self._joined += b","
        else:
            self._begin(node.role)
        self._joined += content
        if node.role == "user" and _RESULT in content and (widens or not content.startswith(_RESULT, 1)):
            self._put_results_first()

    def pieces(self, image: Image) -> list[bytes]:
        """The body of a request, to be sent piece by piece; the one copy of the messages is made here."""
        assert image.model == self.model, "thinking is bound to its model: make a new transcript"
        ending = b"]}" if self._role else b""
        return [image.prefix, bytes(self._joined), ending + image.suffix]

    def _begin(self, role: str) -> None:
        if self._role:
            self._joined += b"]},"
        self._joined += b'{"role":"%b","content":[' % role.encode()
        self._role = role
        self._content = len(self._joined)

    def _put_results_first(self) -> None:
        """The API wants the answers to tool calls before anything else that a message says."""
        blocks = _raws(b"[" + self._joined[self._content :] + b"]")
        blocks.sort(key=lambda block: _block(block).type != "tool_result")
        self._joined[self._content :] = b",".join(map(bytes, blocks))


def _without_thinking(content: bytes) -> bytes:
    blocks = _raws(b"[" + content + b"]")
    return b",".join(bytes(block) for block in blocks if _block(block).type not in _THINKING)
