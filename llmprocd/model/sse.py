"""A streamed answer, put together from its bytes. Does no I/O.

Law: the bytes may be cut anywhere; how they were cut changes nothing.
Law: what the model sent goes back to it. A block without deltas is kept to the byte, one with deltas is its
first bytes with the deltas put in; events, blocks and deltas that are not known here do no harm.
Law: a stream that ends is no answer that finished: only `message_stop` makes one.

Deltas are for showing. What counts is `Turn.reply()`, or after an interruption `Turn.partial()`.
"""

import re
from collections.abc import Callable, Container

import msgspec

from llmprocd.abi.errno import Errno
from llmprocd.abi.types import ToolUseId, Usage
from llmprocd.kernel import stop
from llmprocd.kernel.state import ToolUse
from llmprocd.model.protocol import MOST_TOKENS, ModelError, Reply

THINKING = frozenset({"thinking", "redacted_thinking"})

_EVENTS = frozenset(
    {
        "content_block_delta",
        "content_block_start",
        "content_block_stop",
        "message_start",
        "message_delta",
        "message_stop",
        "error",
    }
)
_DELTAS = frozenset(
    {
        "text_delta",
        "input_json_delta",
        "thinking_delta",
        "signature_delta",
        "citations_delta",
        "compaction_delta",
    }
)
_UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_LONGEST_LINE = 64 * 2**20  # bytes; an endless line is no event stream
_FIELDS = (b"event:", b"id:", b"retry:", b":")
_BOM = b"\xef\xbb\xbf"  # may stand at the beginning of a stream
_TITLE = re.compile(r"<title[^>]*>([^<]*)", re.IGNORECASE)
_TAG = re.compile(r"<[^>]*>")
_SHOWN = 400  # characters of a foreign answer that an error repeats

_FAILURES: dict[str, tuple[Errno, bool, bool]] = {  # error type -> errno, again, shared
    "invalid_request_error": (Errno.EINVAL, False, False),
    "authentication_error": (Errno.EACCES, False, False),
    "permission_error": (Errno.EACCES, False, False),
    "billing_error": (Errno.EACCES, False, False),
    "not_found_error": (Errno.ENOENT, False, False),
    "request_too_large": (Errno.E2BIG, False, False),
    "conflict_error": (Errno.EBUSY, True, False),
    "rate_limit_error": (Errno.EAGAIN, True, True),
    "overloaded_error": (Errno.EBUSY, True, True),
    "timeout_error": (Errno.ETIMEDOUT, True, False),
    "api_error": (Errno.EIO, True, False),
}
_TOO_LONG = (
    "prompt is too long",
    "context window",
    "context_window",
    "context limit",
    "context length",
    "context size",
)


def failure(kind: str, text: str, retry_after: float | None = None) -> ModelError:
    """The failure that a provider's error type stands for.

    Args:
        kind: the API's word, as in `overloaded_error`; an unknown one is an `api_error`.
        text: the sentence to show; one that speaks of a full context makes a bad request E2BIG.
        retry_after: seconds until the server wants to be asked again, when it named them.
    """
    errno, again, shared = _FAILURES.get(kind, _FAILURES["api_error"])
    if errno is Errno.EINVAL and any(words in text.lower() for words in _TOO_LONG):
        errno = Errno.E2BIG
    return ModelError(errno, text, again=again, retry_after=retry_after, shared=shared)


def described(text: str) -> str:
    """What somebody answered who speaks another language, for people: of a web page its title or text."""
    if not text.lstrip()[:64].lower().startswith(("<!doctype html", "<html")):
        return plain(text)
    head = text[: 8 * _SHOWN]
    title = _TITLE.search(head)
    said = plain(title[1] if title else _TAG.sub(" ", head))
    return f'a web page, "{said}"' if said else "a web page"


def plain(text: str) -> str:
    """Foreign text on one line, without control characters, and not longer than an error should be."""
    head = text[: 8 * _SHOWN]
    line = " ".join("".join(c if c.isprintable() else " " for c in head).split())
    if len(line) <= _SHOWN and len(head) == len(text):
        return line
    return line[: _SHOWN - 3] + "..."


class _Delta(msgspec.Struct, gc=False):
    type: str = ""
    text: str = ""
    partial_json: str = ""
    thinking: str = ""
    signature: str = ""
    stop_reason: str | None = None
    citation: msgspec.Raw = msgspec.Raw()
    content: msgspec.Raw = msgspec.Raw()
    encrypted_content: msgspec.Raw = msgspec.Raw()


class _Lifetimes(msgspec.Struct, gc=False):
    ephemeral_1h_input_tokens: int | None = None


class _Served(msgspec.Struct, gc=False):
    web_search_requests: int | None = None


class _Counts(msgspec.Struct, gc=False):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_creation: _Lifetimes | None = None
    server_tool_use: _Served | None = None


class _Message(msgspec.Struct, gc=False):
    id: str | None = None
    usage: _Counts | None = None
    diagnostics: msgspec.Raw = msgspec.Raw()


class _Event(msgspec.Struct, gc=False):
    """One flat struct for every event, so that what is not known here decodes too."""

    type: str = ""
    index: int = -1
    delta: _Delta | None = None
    message: _Message | None = None
    usage: _Counts | None = None
    content_block: msgspec.Raw = msgspec.Raw()  # `Raw | None` would take null alone
    error: msgspec.Raw = msgspec.Raw()


class _Kind(msgspec.Struct, gc=False):
    type: str = ""


class _Names(msgspec.Struct, gc=False):
    """What an event is, when that is all that can be decoded of it."""

    type: str = ""
    delta: msgspec.Raw = msgspec.Raw()


class _Text(msgspec.Struct, gc=False):
    text: str | None = ""
    citations: list[msgspec.Raw] | None = None


class _Thought(msgspec.Struct, gc=False):
    thinking: str | None = ""
    signature: str | None = ""


class _Call(msgspec.Struct, gc=False):
    id: str = ""
    name: str = ""


class _Fault(msgspec.Struct, gc=False):
    type: str = "api_error"
    message: str = ""


_decode = msgspec.json.Decoder(_Event).decode
_names = msgspec.json.Decoder(_Names).decode
_kind = msgspec.json.Decoder(_Kind).decode
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_text = msgspec.json.Decoder(_Text).decode
_thought = msgspec.json.Decoder(_Thought).decode
_call = msgspec.json.Decoder(_Call).decode
_encode = msgspec.json.encode


class _Block:
    """One content block while it comes."""

    __slots__ = ("citations", "ended", "kind", "parts", "raw", "replaced")

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.kind = _kind(raw).type
        self.parts: dict[str, list[str]] = {}  # field -> what its deltas add up to
        self.citations: list[msgspec.Raw] = []
        self.replaced: dict[str, msgspec.Raw] = {}
        self.ended = False

    def added(self, field: str) -> str:
        return "".join(self.parts.get(field, ()))

    def text(self) -> str:
        return (_text(self.raw).text or "") + self.added("text")

    def signed(self) -> bool:
        return self.kind != "thinking" or bool(_thought(self.raw).signature or self.added("signature"))

    def content(self, **fields: bytes) -> bytes:
        """The block as JSON, with its deltas and these fields put in; its own bytes if there are none."""
        changed = self._changed() | {name: msgspec.Raw(value) for name, value in fields.items()}
        if not changed:
            return self.raw
        return _encode(_fields(self.raw) | changed)

    def _changed(self) -> dict[str, msgspec.Raw]:
        changed = dict(self.replaced)
        begun = _fields(self.raw)
        for name in self.parts:
            if name == "input":
                sent = self.input()
                changed[name] = msgspec.Raw(sent if _is_object(sent) else b"{}")
            else:
                first = _string(begun.get(name, b"null"))
                changed[name] = msgspec.Raw(_encode(first + self.added(name)))
        if self.citations:
            first = _text(self.raw).citations or []
            changed["citations"] = msgspec.Raw(_encode([*first, *self.citations]))
        return changed

    def input(self) -> bytes:
        """A tool's input as it came; from its deltas if there are any."""
        return self.added("input").encode() or bytes(_fields(self.raw).get("input", b"{}"))

    def call(self) -> tuple[bytes, ToolUse]:
        """A tool call: the block to send back, and the call itself."""
        call = _call(self.raw)
        sent = self.input()
        broken = not _is_object(sent)
        body = self.content(input=b"{}") if broken else self.content()
        return body, ToolUse(ToolUseId(call.id), call.name, sent, broken)


class Turn:
    """A Listener that puts one answer together.

    Args:
        model: the model that was asked; it goes into the reply, because signed thinking is bound to it.
        on_text: gets the answer's text while it comes, what one chunk held in one piece.
        on_think: gets the model's thinking in the same way.
        on_begin: is called when the answer begins: the request's prompt is in the cache from then on.
    """

    def __init__(
        self,
        model: str,
        on_text: Callable[[str], None],
        on_think: Callable[[str], None] | None = None,
        on_begin: Callable[[], None] | None = None,
    ) -> None:
        self.model = model
        self.on_text = on_text
        self.on_think = on_think
        self.on_begin = on_begin
        self.message_id = ""
        self.diagnostics = b""  # JSON, as it came
        self.usage = Usage()
        self.written_1h = 0  # tokens of the prompt that stay in the cache for an hour
        self.searches = 0  # made by the endpoint
        self.stop_reason = ""
        self.stopped = False
        self._begun = False  # an event has come
        self._strange = b""  # what came that is no part of an event stream, to be shown
        self._rest: list[bytes] = []  # a line that has not ended
        self._size = 0  # bytes of it
        self._data: list[bytes] = []  # data lines of an event that has not ended
        self._blocks: list[_Block] = []
        self._open: dict[int, _Block] = {}
        self._sink: Callable[[str], None] | None = None
        self._heard: list[str] = []

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the stream.

        Raises:
            ModelError: the stream reports a failure, or is not what it should be.
        """
        self._rest.append(chunk)
        self._size += len(chunk)
        if self._size > _LONGEST_LINE and not self.stopped:
            raise ModelError(Errno.EPROTO, "the endpoint sent a line without an end")
        if b"\n" not in chunk:
            return
        lines = b"".join(self._rest).split(b"\n")
        rest = lines.pop()
        self._rest = [rest]
        self._size = len(rest)
        try:
            for line in lines:
                self._line(line)
        finally:
            self._flush()

    def reply(self) -> Reply:
        """The whole answer.

        Raises:
            ModelError: the stream ended before the answer did (EIO), or was no event stream (EPROTO).
        """
        if not self.stopped and self._data:
            self._dispatch()
            self._flush()
        if self.stopped:
            return self._composed(self._blocks, self.stop_reason)
        strange = self._strange + b"".join(self._rest)
        if self._begun or not strange:
            raise ModelError(Errno.EIO, "the stream ended early", again=True)
        shown = described(strange.decode(errors="replace"))
        raise ModelError(Errno.EPROTO, f"the endpoint answered something that is no event stream: {shown}")

    def partial(self) -> Reply:
        """What there is of an answer that was interrupted: text, signed thinking and finished tool calls."""
        results = [block for block in self._blocks if block.kind.endswith("_result")]
        answered = {bytes(_fields(block.raw).get("tool_use_id", b"")) for block in results}
        kept = [block for block in self._blocks if _is_kept(block, answered)]
        return self._composed(kept, "interrupted", cut=True)

    def _line(self, line: bytes) -> None:
        if line[:5] == b"data:":
            self._data.append(line[5:])
        elif not line or line == b"\r":
            if self._data:
                self._dispatch()
        elif line.startswith(_BOM) and not self._begun:
            self._line(line.lstrip(_BOM))
        elif not self._begun and not line.startswith(_FIELDS):
            self._strange = (self._strange + line + b" ")[: 8 * _SHOWN]

    def _dispatch(self) -> None:
        data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
        self._data = []
        if self.stopped:
            return
        try:
            self._event(_decode(data))
        except msgspec.ValidationError as fault:
            if _is_known(data):
                raise _undecodable(fault) from None
        except _UNDECODABLE as fault:
            raise _undecodable(fault) from None
        self._begun = True

    def _event(self, event: _Event) -> None:
        kind = event.type
        if kind == "content_block_delta":
            if event.delta is not None:
                self._add(event.index, event.delta)
        elif kind == "content_block_start":
            self._start(event.index, _checked(event.content_block))
        elif kind == "content_block_stop":
            if event.index in self._open:
                self._open[event.index].ended = True
        elif kind == "message_start":
            self._introduce(event.message or _Message())
        elif kind == "message_delta":
            self._count(event.usage)
            self.stop_reason = (event.delta and event.delta.stop_reason) or self.stop_reason
        elif kind == "message_stop":
            self.stopped = True
        elif kind == "error":
            raise _reported(bytes(event.error))

    def _introduce(self, message: _Message) -> None:
        """Take over what the answer is called, and what its prompt has cost."""
        self._count(message.usage)
        self.message_id = message.id or ""
        if bytes(message.diagnostics) != b"null":
            self.diagnostics = _checked(message.diagnostics)
        if self.on_begin is not None:
            self.on_begin()

    def _start(self, index: int, raw: bytes) -> None:
        block = _Block(raw)
        if block.kind == "text":
            self._hear(self.on_text, block.text())
        elif block.kind == "thinking":
            self._hear(self.on_think, _thought(raw).thinking or "")
        elif block.kind == "tool_use" and not (_call(raw).id and _call(raw).name):
            raise ModelError(Errno.EPROTO, "the model called a tool without naming it", again=True)
        self._blocks.append(block)
        self._open[index] = block

    def _add(self, index: int, delta: _Delta) -> None:
        block = self._open.get(index)
        if block is None:
            raise ModelError(
                Errno.EPROTO, f"the stream continues a block that it did not begin: {index}", again=True
            )
        if delta.type == "text_delta":
            block.parts.setdefault("text", []).append(delta.text)
            self._hear(self.on_text, delta.text)
        elif delta.type == "input_json_delta":
            block.parts.setdefault("input", []).append(delta.partial_json)
        elif delta.type == "thinking_delta":
            block.parts.setdefault("thinking", []).append(delta.thinking)
            self._hear(self.on_think, delta.thinking)
        elif delta.type == "signature_delta":
            block.parts.setdefault("signature", []).append(delta.signature)
        elif delta.type == "citations_delta" and block.kind == "text" and bytes(delta.citation):
            block.citations.append(msgspec.Raw(_checked(delta.citation)))
        elif delta.type == "compaction_delta":
            whole = {"content": delta.content, "encrypted_content": delta.encrypted_content}
            block.replaced.update(
                {name: msgspec.Raw(_checked(raw)) for name, raw in whole.items() if bytes(raw)}
            )

    def _count(self, counts: _Counts | None) -> None:
        """Take the counts over: each is a total, so it replaces the one before; what is left out stays."""
        if counts is None:
            return
        old = self.usage
        self.usage = Usage(
            _newer(counts.input_tokens, old.input_tokens),
            _newer(counts.output_tokens, old.output_tokens),
            _newer(counts.cache_read_input_tokens, old.cache_read_input_tokens),
            _newer(counts.cache_creation_input_tokens, old.cache_creation_input_tokens),
        )
        if counts.cache_creation is not None:
            self.written_1h = _newer(counts.cache_creation.ephemeral_1h_input_tokens, self.written_1h)
        if counts.server_tool_use is not None:
            self.searches = _newer(counts.server_tool_use.web_search_requests, self.searches)

    def _hear(self, sink: Callable[[str], None] | None, text: str) -> None:
        if sink is not self._sink:
            self._flush()
            self._sink = sink
        self._heard.append(text)

    def _flush(self) -> None:
        text = "".join(self._heard)
        self._heard.clear()
        if text and self._sink is not None:
            self._sink(text)

    def _composed(self, blocks: list[_Block], stop_reason: str, *, cut: bool = False) -> Reply:
        """The blocks as a message that the API takes back: no blank text, no thinking at its end."""
        kept = [block for block in blocks if block.kind != "text" or block.text().strip()]
        while kept and kept[-1].kind in THINKING and not stop.of(stop_reason).goes_on:
            kept.pop()
        bodies: list[bytes] = []
        texts: list[str] = []
        asks: list[ToolUse] = []
        for block in kept:
            if block.kind == "tool_use":
                body, ask = block.call()
                asks.append(ask)
            elif block.kind == "text":
                body, text = _said(block, stripped=cut and block is kept[-1])
                texts.append(text)
            else:
                body = block.content()
            bodies.append(body)
        return Reply(
            body=b",".join(bodies),
            text="".join(texts),
            asks=tuple(asks),
            thinks=any(block.kind in THINKING for block in kept),
            stop_reason=stop_reason,
            model=self.model,
            usage=self.usage,
            written_1h=self.written_1h,
            searches=self.searches,
            message_id=self.message_id,
            diagnostics=self.diagnostics,
        )


def _said(block: _Block, *, stripped: bool) -> tuple[bytes, str]:
    text = block.text()
    if not stripped or text == text.rstrip():
        return block.content(), text
    text = text.rstrip()
    return block.content(text=_encode(text)), text


def _is_kept(block: _Block, answered: Container[bytes]) -> bool:
    """Whether a block of an interrupted answer may stand in the history."""
    if block.kind == "text":
        return True
    if block.kind in THINKING:
        return block.ended and block.signed()
    if block.kind != "tool_use" and block.kind.endswith(
        "tool_use"
    ):  # the server's own tools: only with their results
        return block.ended and bytes(_fields(block.raw).get("id", b"")) in answered
    return block.ended


def _checked(raw: msgspec.Raw) -> bytes:
    """Bytes that are kept: `Raw` does not look at them, and what is not UTF-8 could never be sent back."""
    kept = bytes(raw)
    kept.decode()
    return kept


def _newer(new: int | None, old: int) -> int:
    return old if new is None or not 0 <= new <= MOST_TOKENS else new


def _string(raw: bytes) -> str:
    try:
        return msgspec.json.decode(raw, type=str | None) or ""
    except msgspec.ValidationError:
        return ""  # a field of another kind, in a block that is not known here


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except _UNDECODABLE:
        return False


def _is_known(data: bytes) -> bool:
    """Whether an event that does not fit is one that should: then the stream is wrong, and not just newer."""
    try:
        names = _names(data)
        if names.type == "content_block_delta":
            return _kind(names.delta).type in _DELTAS
    except _UNDECODABLE:
        return True
    return names.type in _EVENTS


def _undecodable(fault: Exception) -> ModelError:
    return ModelError(Errno.EPROTO, f"the stream holds data that cannot be decoded: {fault}", again=True)


def _reported(raw: bytes) -> ModelError:
    """The failure that an `error` event reports."""
    try:
        fault = msgspec.json.decode(raw, type=_Fault)
    except _UNDECODABLE:
        fault = _Fault(message=raw.decode(errors="replace"))
    return failure(fault.type, f"the stream reported {plain(fault.type)}: {plain(fault.message)}")
