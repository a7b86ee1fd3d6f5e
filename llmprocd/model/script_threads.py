"""Conversations that the built-in endpoint holds, as the beta of message threads has it.

Law: a request that goes on with a conversation is answered as one with all of it would be: `whole` makes that
one, of the very bytes that came, so that rules, tokens and cache are the same.
A conversation is known by the id of the answer that it ends with; it is held for five minutes and can be gone
on with once. System prompt and tools stay as they were. The clock is an argument.
"""

from collections import OrderedDict
from collections.abc import Collection
from typing import Any, NoReturn, cast

import msgspec

from llmprocd.model import script_cache, script_rules
from llmprocd.model.protocol import ModelError
from llmprocd.model.script_answer import Answer
from llmprocd.model.script_cache import RawMessage
from llmprocd.model.script_rules import ApiError, Json
from llmprocd.model.sse import Turn

BETA = "message-threads-2026-08-12"
LIFETIME = 300.0
MAX_HELD = 10_000
FIXED = ("system", "tools")
LOST = frozenset({"thread_not_found", "thread_already_continued"})
"""What may befall any client: it sends all of the conversation then."""

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_messages = msgspec.json.Decoder(list[RawMessage]).decode


class _Message(msgspec.Struct, frozen=True):
    id: str
    content: list[msgspec.Raw]


class Held(msgspec.Struct, frozen=True):
    """One conversation; no messages once it has been gone on with."""

    model: str
    fixed: dict[str, msgspec.Raw]
    messages: tuple[RawMessage, ...]
    until: float
    continued: bool = False


class Threads:
    """The conversations that are held, the oldest first."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, Held] = OrderedDict()

    def forget(self) -> None:
        self._held.clear()

    def whole(self, thread: Json, model: str, body: bytes, now: float) -> bytes:
        """The body of a request with all of its conversation, and without the field `thread`.

        Raises:
            ApiError: the conversation is not held, was gone on with, or cannot be with this request.
        """
        given = _fields(body)
        del given["thread"]
        if thread["type"] == "create":
            return msgspec.json.encode(given)
        held = self._found(thread["previous_message_id"], now)
        if again := [name for name in FIXED if name in given]:
            _refuse(400, "thread_unsupported_request", f"{again[0]}: is fixed when a thread is created")
        if held.model != model:
            _refuse(400, "thread_fingerprint_mismatch", f"model: the thread was created with {held.model}")
        try:
            new = msgspec.json.decode(given["messages"], type=list[msgspec.Raw])
        except msgspec.MsgspecError as error:
            script_rules.refuse(f"messages: {error}")
        messages = msgspec.Raw(msgspec.json.encode([*held.messages, *new]))
        return msgspec.json.encode({**given, **held.fixed, "messages": messages})

    def hold(self, thread: Json, body: bytes, answer: Answer, now: float) -> None:
        """Keep the conversation of a whole body together with its answer, if that is one."""
        message = _said(answer)
        if message is None:
            return
        if thread["type"] == "continue":
            name = thread["previous_message_id"]
            self._held[name] = msgspec.structs.replace(self._held[name], messages=(), continued=True)
        given = _fields(body)
        fixed = {name: given[name] for name in FIXED if name in given}
        messages = [_unmarked(one) for one in _messages(given["messages"])]
        content = b",".join(map(bytes, message.content))
        if messages[-1].role == "assistant":
            content = bytes(messages.pop().content)[1:-1] + b"," + content
        if content:
            messages.append(RawMessage("assistant", msgspec.Raw(b"[" + content + b"]")))
        model = msgspec.json.decode(given["model"], type=str)
        self._held[message.id] = Held(model, fixed, tuple(messages), now + LIFETIME)
        if len(self._held) > MAX_HELD:
            self._held.popitem(last=False)

    def _found(self, name: str, now: float) -> Held:
        held = self._held.get(name)
        if held is None or held.until <= now:
            _refuse(404, "thread_not_found", f"no thread is held for {name}")
        if held.continued:
            _refuse(400, "thread_already_continued", f"{name} was continued already")
        return held


def check_supported(request: Json, unthreaded: Collection[str]) -> None:
    """Refuse a request of a thread that has one of these fields; ApiError 400."""
    for name in sorted(request.keys() & set(unthreaded)):
        _refuse(400, "thread_unsupported_request", f"{name}: is not supported")


def asked(request: Json, headers: dict[str, str]) -> Json | None:
    """What a request says of its thread, None if nothing; ApiError 400 for what the API refuses."""
    if request.get("thread") is None:
        return None
    betas = [word.strip() for word in headers.get("anthropic-beta", "").split(",")]
    if BETA not in betas:
        script_rules.refuse("thread: Extra inputs are not permitted")
    thread: Any = request["thread"]
    fields: dict[Any, Any] = cast("dict[Any, Any]", thread) if isinstance(thread, dict) else {}
    wanted = {"create": {"type"}, "continue": {"type", "previous_message_id"}}
    if fields.keys() != wanted.get(str(fields.get("type"))):
        script_rules.refuse("thread: Input should be a valid thread")
    if not isinstance(fields.get("previous_message_id", ""), str):
        script_rules.refuse("thread.previous_message_id: Input should be a valid string")
    for name in ("model", "messages"):
        if name not in request:
            script_rules.refuse(f"{name}: Field required")
    return fields


def _refuse(status: int, code: str, text: str) -> NoReturn:
    kind = "not_found_error" if status == 404 else "invalid_request_error"
    raise ApiError(status, kind, f"thread: {text}", code=code)


def _unmarked(message: RawMessage) -> RawMessage:
    """A message without the cache markers of the request that brought it."""
    content = bytes(message.content)
    if b'"cache_control"' in content:
        content = script_cache.MARK_AND_COMMA.sub(b"", content)
    return RawMessage(message.role, msgspec.Raw(content))


def _said(answer: Answer) -> _Message | None:
    """The message of an answer, its blocks as a client would send them back; None if it breaks off."""
    if answer.status != 200 or answer.dropped:
        return None
    try:
        if not answer.streamed:
            return msgspec.json.decode(answer.body, type=_Message)
        turn = Turn("", lambda _: None)
        turn.feed(answer.body)
        reply = turn.reply()
    except (ModelError, msgspec.MsgspecError):
        return None
    return _Message(reply.message_id, msgspec.json.decode(b"[" + reply.body + b"]", type=list[msgspec.Raw]))
