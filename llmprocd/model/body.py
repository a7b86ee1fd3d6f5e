"""A request body joined from pieces that were encoded once.

Law: the body of a request depends on the path from the root to the head, on the image, and on nothing else;
equal paths give equal bytes, and a path that goes on gives bytes that go on, cache markers apart.
Law: no byte of the past is produced twice: prompt caches and signed thinking depend on it.

Neighbouring nodes of one role become one message; thinking that another model signed is left out, and a node
with nothing else in it with it.

Cache markers stand in no stored bytes: they are put in as a body is made, where the path says. At most four:

- the last tool and the system prompt, for all processes of a program, and for another program's same tools;
- the end of the request before, if the turn since then is so long that looking back from the end would not
  find it;
- what stands before the last text, and before the answers to forks beside it: forks of one history, and a
  goto's new beginnings, share exactly that;
- the end, which moves along by itself (top level). With both of the middle ones, the last tool goes without.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Self

import msgspec

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.kernel.state import Image, Node

_CACHED = {"type": "ephemeral"}
_OWN = frozenset(
    {"model", "messages", "system", "tools"}
)  # written here from the program, not from its parameters
_LEFT_OUT = frozenset({"stream", "extra_headers", "cache_control", "max_tokens"})
_THINKING = frozenset({"thinking", "redacted_thinking"})
_RESULT = b'"type":"tool_result"'  # quotes inside a JSON string are escaped, so no text holds this
_TYPE = b'"type"'  # every block has one, so there are at least as many as blocks
_TEXT = b',{"type":"text",'  # as history.text_block begins, after another block
_NOTICE = b'{"type":"text","text":"<context_notice'  # as window.py words it
_CHILD = b'"content":"pid 0: you are the child of a fork.'  # as kernel/proc.py words it
_SIBLINGS = b'"content":"made by your parent: pids '
_THREAD = b',"thread":{"type":'
_HELD = frozenset({"system", "tools", "messages"})  # what the endpoint has of a conversation it holds
_NEAR = 18  # blocks that looking back (20) surely spans
_MARKED = frozenset({"text", "tool_use", "server_tool_use"})  # an assistant's blocks that can be marked

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
        caching: marks the last tool, the system prompt and, in each request anew, its last block.

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
        head["tools"] = [*tools[:-1], {**tools[-1], "cache_control": marker}] if marker and caching else tools
    head["stream"] = True
    before = _encode(head)[:-1] + b',"messages":['
    return before, b'],"cache_control":%b}' % _encode(marker) if marker else b"]}"


_COUNTED = ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config")
_WHOLE = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def counted(pieces: Sequence[bytes]) -> bytes:
    """What of a request's body is sent to have its tokens counted."""
    whole = _WHOLE(b"".join(pieces))
    return _encode({name: whole[name] for name in _COUNTED if name in whole})


def diagnostics(previous: str | None) -> bytes:
    """The member of a request that asks why its prompt could not be read from the cache.

    Args:
        previous: the message that answered the request to compare with; None when there was none.
    """
    return b',"diagnostics":%b' % _encode({"previous_message_id": previous})


def thread(previous: str | None) -> bytes:
    """The member of a request whose conversation the endpoint is to hold.

    Args:
        previous: the message from which it goes on; None when the request has all of it.
    """
    if previous is None:
        return _THREAD + b'"create"}'
    return _THREAD + b'"continue","previous_message_id":%b}' % _encode(previous)


def is_threaded(pieces: Sequence[bytes]) -> bool:
    """Whether the endpoint is to hold the conversation of a request, as `thread` says at its end."""
    return bool(pieces) and _THREAD in pieces[-1]


@lru_cache(maxsize=64)
def _continuing(prefix: bytes) -> bytes:
    """The beginning of a body that goes on with a conversation that the endpoint holds."""
    whole = _WHOLE(prefix + b"]}")
    return _encode({name: whole[name] for name in whole if name not in _HELD})[:-1] + b',"messages":['


def changed(before: Image, now: Image) -> str:
    """Which part of a prompt two programs do not have in common: "model", "tools", "system", "settings"."""
    if before.model != now.model:
        return "model"
    old, new = (
        _WHOLE(image.prefix.replace(image.suffix[1:-1] or b"\0", b"") + b"]}") for image in (before, now)
    )
    for part, names in (
        ("tools", ("tools",)),
        ("system", ("system",)),
        ("settings", ("tool_choice", "thinking")),
    ):
        if any(old.get(name) != new.get(name) for name in names):
            return part
    return ""


def lifetime(image: Image) -> float:
    """Seconds for which a program's prompts are kept in the cache after their last use."""
    return 3600.0 if b'"1h"' in image.suffix else 300.0


def with_max_tokens(prefix: bytes, old: int, new: int) -> bytes:
    """The beginning of a body with another bound of the answer; nothing else in it changes."""
    before, found, after = prefix.partition(b'"max_tokens":%d' % old)
    assert found, "a request without max_tokens"
    return b'%b"max_tokens":%d%b' % (before, new, after)


class Transcript:
    """The messages of one process as they are sent, kept joined; it only grows.

    `answer` is the last message of the assistant in it: what that request had sent is in the cache.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.answer: Node | None = None
        self._joined = bytearray()  # the messages; the last one is open: its `]}` is still to come
        self._role = ""  # of the open one
        self._content = 0  # where the open one's content begins
        self._last = b""  # the content that was appended last
        self._asked = _Place()  # where the request ended that `answer` answered
        self._shared = _Place()  # where the last text begins, if it is the last block
        self._answered = 0  # where `answer` ends

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

    @property
    def shared(self) -> int:
        """Bytes before the last text: what forks of this history have in common."""
        return self._shared.end

    @property
    def asked(self) -> int:
        """Bytes that the request before had sent."""
        return self._asked.end

    @property
    def since(self) -> int:
        """Bytes that the model has not seen or said yet."""
        return len(self._joined) - self._answered

    @property
    def near(self) -> bool:
        """Whether looking back from the end of what is new finds the end of the request before."""
        return self._joined.count(_TYPE, self._asked.end) <= _NEAR

    @property
    def asks(self) -> bool:
        """Whether the user has said something after an answer."""
        return self.answer is not None and self._role == "user"

    def append(self, node: Node) -> None:
        """Add the next node of the path; costs nothing that grows with the path."""
        content = node.body
        if node.thinks and node.model != self.model:
            content = _without_thinking(content)
        if not content:
            return
        end = _Place(len(self._joined), b"" if self._role == "user" else self._last)
        widens = node.role == self._role
        if widens:
            self._joined += b","
        else:
            self._begin(node.role)
        began = len(self._joined)
        self._joined += content
        self._last = content
        if node.role == "assistant":
            self.answer, self._asked, self._answered = node, end, len(self._joined)
        if not content.startswith(_NOTICE):  # siblings are not all told of their context
            self._shared = _before_text(node, content, began, end)
        if node.role == "user" and _RESULT in content and (widens or not content.startswith(_RESULT, 1)):
            self._put_results_first()

    def pieces(self, image: Image, more: bytes = b"") -> list[bytes]:
        """The body of a request, to be sent piece by piece; the one copy of the messages is made here.

        `more` is what this request alone says at its end: members of the object, each with a comma before it.
        """
        assert image.model == self.model, "thinking is bound to its model: make a new transcript"
        prefix, mark = image.prefix, image.suffix[1:-1] if image.caching else b""
        marked = self._marked() if mark else []
        if len(marked) > 1 and prefix.count(mark) > 1:
            before, _, after = prefix.rpartition(mark)
            prefix = before + after
        return self._cut(prefix, 0, marked, mark, image.suffix[:-1] + more + b"}")

    def continued(self, image: Image, more: bytes) -> list[bytes]:
        """The body of a request that holds only what is new after `answer`; see `pieces`.

        The program is not in it, nor is a marker that would stand before what is new.
        """
        assert self.asks, "nothing is new"
        mark, begin = image.suffix[1:-1] if image.caching else b"", self._answered + len(b"]},")
        marked = [end for end in self._marked() if end > begin] if mark else []
        return self._cut(_continuing(image.prefix), begin, marked, mark, image.suffix[:-1] + more + b"}")

    def _cut(
        self, prefix: bytes, begin: int, marked: Sequence[int], mark: bytes, suffix: bytes
    ) -> list[bytes]:
        """A body from some byte of the messages on, with markers put in."""
        pieces = [prefix]
        with memoryview(self._joined) as joined:
            for end in marked:
                pieces += [joined[begin : end - 1].tobytes(), mark]
                begin = end - 1
            pieces.append(joined[begin:].tobytes())
        ending = b"]}" if self._role else b""
        return [*pieces, ending + suffix]

    def _marked(self) -> list[int]:
        """The ends of the blocks that get a marker of their own, in order."""
        asked, shared = self._asked, self._shared
        far = self._joined.count(_TYPE, asked.end, shared.end or len(self._joined)) > _NEAR
        places = [asked] if far else []
        if shared.end > asked.end:
            places.append(shared)
        return [place.end for place in places if place.end and _can_be_marked(place.content)]

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
        self._shared = _Place()


class _Place(msgspec.Struct, frozen=True, gc=False):
    """The end of a block among the joined messages; 0 is none."""

    end: int = 0
    content: bytes = b""  # the assistant's content that ends there; b"" for a user's, which can be marked


def _before_text(node: Node, content: bytes, began: int, end: _Place) -> _Place:
    """What precedes a user's text: the results beside it, or all that was before the message."""
    if node.role != "user" or not node.text:
        return _Place()
    beside = content.rfind(_TEXT)
    if _CHILD in content:
        beside = _before_forks(content[: max(beside, 0)])
    return end if beside <= 0 else _Place(began + beside)


def _before_forks(results: bytes) -> int:
    """Where the answers to forks begin, if they come last: parent, children and siblings differ in those."""
    blocks = _raws(b"[" + results + b"]")
    while blocks and (_CHILD in bytes(blocks[-1]) or _SIBLINGS in bytes(blocks[-1])):
        blocks.pop()
    return len(b",".join(map(bytes, blocks)))


def _can_be_marked(content: bytes) -> bool:
    """Whether the last block of some content can carry a marker: thinking cannot, nor what is not known."""
    if not content:
        return True
    kind = _block(_raws(b"[" + content + b"]")[-1]).type
    return kind in _MARKED or kind.endswith("_tool_result")


def _without_thinking(content: bytes) -> bytes:
    blocks = _raws(b"[" + content + b"]")
    return b",".join(bytes(block) for block in blocks if _block(block).type not in _THINKING)
