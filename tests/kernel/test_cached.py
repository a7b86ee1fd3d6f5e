"""What was expected of the prompt cache, and why it was not read."""

import pytest

from llmprocd.abi.types import ImageId, MessageId, Usage
from llmprocd.kernel.cached import Sent, note
from llmprocd.kernel.state import Node, Reply

NOW = 1_000.0


def answered(at=NOW - 10, **usage):
    """The last answer of a history."""
    left = Usage(**{"cache_read_input_tokens": 900, "cache_creation_input_tokens": 100, **usage})
    return Node(MessageId(2), MessageId(1), "assistant", b"x", at=at, model="m", usage=left)


def noted(before, *, read=1000, written=50, plain=3, diagnostics=b"", **more):
    usage = Usage(plain, 7, read, written)
    reply = Reply(usage=usage, model="m", message_id="msg_2", diagnostics=diagnostics)
    return note(Sent(ImageId(1), MessageId(3), 4000, before, **more), reply, NOW)


def test_a_hit_needs_no_reason():
    """All that the request before had left is read."""
    call = noted(answered())
    assert (call.expected, call.read, call.written, call.prompt, call.reason) == (1000, 1000, 50, 1053, "")
    assert (call.message_id, call.sent, call.head, call.at) == ("msg_2", 4000, 3, NOW)


@pytest.mark.parametrize(
    ("reason", "more"),
    [
        ("first_request", {"before": None}),
        ("disabled", {"before": answered(), "caching": False}),
        ("no_usage", {"before": answered(), "read": 0, "written": 0, "plain": 0}),
        ("system_changed", {"before": answered(), "read": 0, "changed": "system"}),
        ("expired", {"before": answered(at=NOW - 301), "read": 0}),
        ("unexplained", {"before": answered(at=NOW - 301), "read": 0, "lifetime": 3600.0}),
        ("unexplained", {"before": answered(), "read": 949}),
        ("", {"before": answered(), "read": 950}),
        (
            "below_minimum",
            {"before": answered(cache_read_input_tokens=0, cache_creation_input_tokens=0), "read": 0},
        ),
        (
            "nothing_cached",
            {
                "before": answered(cache_read_input_tokens=0, cache_creation_input_tokens=0),
                "read": 0,
                "plain": 9000,
            },
        ),
    ],
)
def test_every_miss_has_a_reason(reason, more):
    """The first that holds, from what is known here."""
    assert noted(**more).reason == reason


@pytest.mark.parametrize(
    ("diagnostics", "told"),
    [
        (b"", ""),
        (b'{"cache_miss_reason":null}', "pending"),
        (b'{"cache_miss_reason":{"type":"tools_changed","cache_missed_input_tokens":5}}', "tools_changed"),
        (b'{"cache_miss_reason":{"type":"something_new"}}', "something_new"),
        (b'{"cache_miss_reason":7}', "unreadable"),
    ],
)
def test_the_endpoints_word_is_kept(diagnostics, told):
    """It is the reason too where nothing better is known."""
    call = noted(answered(), read=0, diagnostics=diagnostics)
    assert call.told == told
    assert call.reason == (told or "unexplained")
