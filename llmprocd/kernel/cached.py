"""What a model call was expected to read from the prompt cache, and why it read less.

What an answer's request left in the cache is what the next request of the same history can read: its node
says how much that was. So what is expected follows from the path, also after a fork, a goto or a restart.
"""

import msgspec

from llmprocd.abi.types import ImageId, MessageId
from llmprocd.kernel.state import LastCall, Node, Reply

SMALLEST = 4096
"""Tokens under which some models keep no prompt; most keep shorter ones."""

ENOUGH = 0.95
"""The share of what was expected from which on nothing is missed."""


class Sent(msgspec.Struct, frozen=True):
    """One request, as far as its answer has to be told of it."""

    image: ImageId
    head: MessageId | None
    size: int  # bytes
    before: Node | None = None  # the last answer in it
    changed: str = ""  # what is not as it was then: "model", "tools", "system", "settings"
    caching: bool = True
    lifetime: float = 300.0  # seconds for which what was marked is kept


def note(sent: Sent, reply: Reply, now: float) -> LastCall:
    """What is kept of a call whose answer has come."""
    usage = reply.usage
    read, written = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
    told = _told(reply.diagnostics)
    call = LastCall(
        message_id=reply.message_id,
        at=now,
        image=sent.image,
        head=sent.head,
        sent=sent.size,
        prompt=usage.prompt,
        read=read,
        written=written,
        expected=_left(sent.before),
        told=told,
    )
    return msgspec.structs.replace(call, reason=_reason(sent, call, now))


def _left(before: Node | None) -> int:
    """Tokens that an answer's request left in the cache."""
    if before is None or before.usage is None:
        return 0
    return before.usage.cache_read_input_tokens + before.usage.cache_creation_input_tokens


def _reason(sent: Sent, call: LastCall, now: float) -> str:
    """Why less was read than expected; the endpoint's word where ours is not better."""
    before = sent.before
    if not sent.caching:
        return "disabled"
    if not call.prompt:
        return "no_usage"
    if before is None:
        return "first_request"
    if call.expected and call.read >= ENOUGH * call.expected:
        return ""
    if sent.changed:
        return f"{sent.changed}_changed"
    if not call.expected:
        return "below_minimum" if call.prompt < SMALLEST else "nothing_cached"
    if now - before.at > sent.lifetime:
        return "expired"
    return call.told or "unexplained"


class _Miss(msgspec.Struct, gc=False):
    type: str = ""


class _Diagnostics(msgspec.Struct, gc=False):
    cache_miss_reason: _Miss | None = None


def _told(diagnostics: bytes) -> str:
    """The word of the endpoint; "pending" when it did not know yet, "" when it said nothing."""
    if not diagnostics:
        return ""
    try:
        reason = msgspec.json.decode(diagnostics, type=_Diagnostics).cache_miss_reason
    except msgspec.MsgspecError:
        return "unreadable"
    return "pending" if reason is None else reason.type
