"""Streams of every kind, cut at every byte."""

import json

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from llmprocd.abi.errno import Errno
from llmprocd.abi.types import Usage
from llmprocd.model.protocol import ModelError, Reply
from llmprocd.model.sse import Turn, described, failure, plain


def event(**fields):
    return b"event: %b\ndata: %b\n\n" % (fields["type"].encode(), msgspec.json.encode(fields))


def start(usage=None):
    return event(type="message_start", message={"id": "msg_1", "model": "m-2025", "usage": usage})


def block(index, content, *deltas, stop=True):
    data = event(type="content_block_start", index=index, content_block=content)
    for delta in deltas:
        data += event(type="content_block_delta", index=index, delta=delta)
    return data + (event(type="content_block_stop", index=index) if stop else b"")


def text(index, *words, stop=True):
    deltas = [{"type": "text_delta", "text": word} for word in words]
    return block(index, {"type": "text", "text": ""}, *deltas, stop=stop)


def call(index, *parts, stop=True, **more):
    deltas = [{"type": "input_json_delta", "partial_json": part} for part in parts]
    content = {"type": "tool_use", "id": f"toolu_{index}", "name": "bash", "input": {}, **more}
    return block(index, content, *deltas, stop=stop)


def thought(index, words, signature, stop=True):
    deltas = [{"type": "thinking_delta", "thinking": words}]
    if signature:
        deltas.append({"type": "signature_delta", "signature": signature})
    return block(index, {"type": "thinking", "thinking": "", "signature": ""}, *deltas, stop=stop)


def end(reason="end_turn", usage=None):
    return event(type="message_delta", delta={"stop_reason": reason}, usage=usage) + event(
        type="message_stop"
    )


def fed(*chunks, heard=None):
    turn = Turn("m", (heard if heard is not None else []).append)
    for chunk in chunks:
        turn.feed(chunk)
    return turn


def blocks(reply: Reply):
    return json.loads(b"[" + reply.body + b"]")


WHOLE = (
    start({"input_tokens": 7, "output_tokens": 1, "cache_read_input_tokens": None})
    + event(type="ping")
    + thought(0, "hm — ", "c2ln")
    + text(1, "Schöne ", "Grüße 😀")
    + call(2, "", '{"command": ', '"ls"}', caller={"type": "direct"})
    + end("tool_use", {"output_tokens": 30})
)


def test_a_turn_is_put_together():
    """Text, thinking, tool input and usage come out as they were sent."""
    reply = fed(WHOLE).reply()
    assert blocks(reply) == [
        {"type": "thinking", "thinking": "hm — ", "signature": "c2ln"},
        {"type": "text", "text": "Schöne Grüße 😀"},
        {
            "type": "tool_use",
            "id": "toolu_2",
            "name": "bash",
            "input": {"command": "ls"},
            "caller": {"type": "direct"},
        },
    ]
    assert reply.text == "Schöne Grüße 😀"
    assert reply.asks[0].input == b'{"command": "ls"}'
    assert not reply.asks[0].broken
    assert (reply.stop_reason, reply.model, reply.thinks) == ("tool_use", "m", True)
    assert reply.usage == Usage(7, 30)


def test_how_a_stream_is_cut_changes_nothing():
    """Cut at every byte, with either kind of line end, the answer and what is heard are the same."""
    for data in (WHOLE, WHOLE.replace(b"\n", b"\r\n")):
        whole = fed(data).reply()
        for at in range(len(data)):
            heard = []
            assert fed(data[:at], data[at:], heard=heard).reply() == whole
            assert "".join(heard) == whole.text
        assert fed(*(data[i : i + 1] for i in range(len(data)))).reply() == whole


def test_the_text_of_one_chunk_is_heard_in_one_piece():
    """Whoever watches is called once a chunk, however many deltas it holds."""
    heard = []
    fed(start() + text(0, "a", "b", "c"), heard=heard)
    assert heard == ["abc"]


def test_thinking_is_heard_apart_from_text():
    """Thinking and text go to their own listeners, in order."""
    heard = []
    turn = Turn("m", lambda said: heard.append(("text", said)), lambda said: heard.append(("think", said)))
    turn.feed(WHOLE)
    assert heard == [("think", "hm — "), ("text", "Schöne Grüße 😀")]


def test_blocks_without_deltas_are_kept_to_the_byte():
    """Spaces, order of keys and unknown fields of a block survive."""
    raw = b'{ "type":"web_search_tool_result", "z" : [1.50,null],"a":"\\u00e9" }'
    data = b'data: {"type":"content_block_start","index":0,"content_block":' + raw + b"}\n\n"
    reply = fed(start(), data, event(type="content_block_stop", index=0), end()).reply()
    assert reply.body == raw


def test_what_is_not_known_does_no_harm():
    """Events, blocks and deltas of the future, with fields of other shapes, do not fail the turn."""
    odd = event(type="novelty", index="x", delta=[1], message="no", usage=3)
    fuzzy = event(type="content_block_delta", index=0, delta={"type": "hum_delta", "text": {"a": 1}})
    reply = fed(
        start(), odd, block(0, {"type": "hologram", "x": 1}, stop=False), fuzzy, end("new_reason")
    ).reply()
    assert blocks(reply) == [{"type": "hologram", "x": 1}]
    assert reply.stop_reason == "new_reason"


def test_a_server_tool_gets_its_input():
    """Deltas reach blocks that are not ours to run; such a block asks nothing of us."""
    content = {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {}}
    data = block(0, content, {"type": "input_json_delta", "partial_json": '{"query":"x"}'})
    reply = fed(start(), data, end("pause_turn")).reply()
    assert blocks(reply) == [{**content, "input": {"query": "x"}}]
    assert reply.asks == ()


def test_citations_are_collected():
    """Citations are added to those that the block began with."""
    cited = [{"type": "citations_delta", "citation": {"cited_text": word}} for word in ("a", "b")]
    data = block(
        0, {"type": "text", "text": "", "citations": None}, {"type": "text_delta", "text": "t"}, *cited
    )
    reply = fed(start(), data, end()).reply()
    assert blocks(reply) == [
        {"type": "text", "text": "t", "citations": [{"cited_text": "a"}, {"cited_text": "b"}]}
    ]


def test_a_compaction_is_replaced_whole():
    """A compaction's delta carries all of it, and null is a value."""
    delta = {"type": "compaction_delta", "content": None, "encrypted_content": "x"}
    reply = fed(
        start(),
        block(0, {"type": "compaction", "content": "old", "signature": "s"}, delta),
        end("compaction"),
    )
    assert blocks(reply.reply()) == [
        {"type": "compaction", "content": None, "signature": "s", "encrypted_content": "x"}
    ]


@pytest.mark.parametrize("sent", ['{"command": "l', "[1]", "nonsense", '{"a":"\\ud83d"}', '{"a":1}}'])
def test_broken_tool_input_is_marked_and_not_lost(sent):
    """The history gets a valid block, the call the text that came."""
    reply = fed(start(), call(0, *sent), end("max_tokens")).reply()
    assert reply.asks[0].broken
    assert reply.asks[0].input == sent.encode()
    assert blocks(reply)[0]["input"] == {}


def test_a_tool_without_input_is_called_with_none():
    """No deltas at all, and empty ones, are an empty object."""
    for data in (call(0), call(0, "", "")):
        reply = fed(start(), data, end("tool_use")).reply()
        assert (reply.asks[0].input, reply.asks[0].broken) == (b"{}", False)


def test_tool_input_is_not_encoded_again():
    """The input is sent back with the model's own spaces, numbers and order of keys."""
    sent = '{ "b": 1.50,\n "a" :"\\u00e9"}'
    reply = fed(start(), call(0, sent), end("tool_use")).reply()
    assert sent.encode() in reply.body


@pytest.mark.parametrize("content", [{"type": "x", "id": 5, "text": 1e308, "input": 3}, {"type": "x"}])
def test_known_deltas_on_unknown_blocks_are_harmless(content):
    """A block of an unknown kind takes what deltas it gets, whatever its fields were."""
    deltas = [
        {"type": "text_delta", "text": "a"},
        {"type": "input_json_delta", "partial_json": "{"},
        {"type": "citations_delta"},
        {"type": "signature_delta", "signature": "s"},
    ]
    turn = fed(start(), block(0, content, *deltas), end())
    assert blocks(turn.reply()) == [{**content, "text": "a", "input": {}, "signature": "s"}]
    assert blocks(turn.partial()) == blocks(turn.reply())


def test_blank_text_is_left_out():
    """Empty and blank text blocks, which the API refuses, do not get into the history."""
    reply = fed(start(), text(0), text(1, " \n"), text(2, " yes "), end()).reply()
    assert blocks(reply) == [{"type": "text", "text": " yes "}]
    assert fed(start(), text(0, "\n"), end()).reply().body == b""


def test_thinking_alone_is_an_empty_answer():
    """A message may not end with thinking, unless the answer goes on."""
    data = start() + thought(0, "hm", "c2ln") + text(1)
    expected = Reply(stop_reason="max_tokens", model="m", message_id="msg_1")
    assert fed(data, end("max_tokens")).reply() == expected
    assert fed(data, end("pause_turn")).reply().thinks


def test_usage_is_replaced_and_not_added():
    """Later counts are totals; null and missing ones keep what was known."""
    first = {"input_tokens": 5, "output_tokens": 1, "cache_creation_input_tokens": 9}
    last = {"output_tokens": 20, "input_tokens": None, "cache_read_input_tokens": 3}
    assert fed(start(first), text(0, "x"), end(usage=last)).reply().usage == Usage(5, 20, 3, 9)
    assert fed(start(None), text(0, "x"), end()).reply().usage == Usage()


@pytest.mark.parametrize("count", [-1, 10**9 + 1, 2**64 - 1])
def test_a_count_that_cannot_be_is_none(count):
    """Sums of counts are kept in 64 bits."""
    told = {"input_tokens": count, "cache_creation": {"ephemeral_1h_input_tokens": count}}
    searched = {"input_tokens": 3, "output_tokens": count, "server_tool_use": {"web_search_requests": count}}
    reply = fed(start(told), text(0, "hi"), end("end_turn", searched)).reply()
    assert (reply.usage, reply.written_1h, reply.searches) == (Usage(input_tokens=3), 0, 0)


def test_a_stream_that_ends_early_has_failed():
    """A clean end without message_stop is a failure that may be tried again; so is nothing at all."""
    for data in (b"", start(), start() + text(0, "so f"), WHOLE[: WHOLE.rindex(b"event: message_stop")]):
        with pytest.raises(ModelError, match="ended early") as caught:
            fed(data).reply()
        assert (caught.value.errno, caught.value.again) == (Errno.EIO, True)


def test_a_last_event_without_its_blank_line_counts():
    """Some servers forget the end of the last event."""
    assert fed(WHOLE[:-1]).reply() == fed(WHOLE).reply()


@pytest.mark.parametrize("line", [b"data:", b"event: message_start\ndata:"])
def test_a_byte_order_mark_hides_no_event(line):
    data = start({"input_tokens": 7}).replace(b"event: message_start\ndata:", line, 1)
    reply = fed(b"\xef\xbb\xbf" + data, text(0, "hi"), end()).reply()
    assert (reply.message_id, reply.usage.input_tokens, reply.text) == ("msg_1", 7, "hi")


def test_what_comes_after_the_end_is_ignored():
    """Trailers of other dialects do not spoil a whole answer."""
    assert fed(WHOLE, b"data: [DONE]\n\n").reply() == fed(WHOLE).reply()


@pytest.mark.parametrize("page", [b"<html>\n<h1>Sign in</h1>\n</html>\n", b'{"type":"message","content":[]}'])
def test_a_web_page_is_not_asked_for_again(page):
    """Whatever answers 200 with something else is named, and what it said is shown."""
    with pytest.raises(ModelError, match=r"no event stream: .*(Sign in|message)") as caught:
        fed(page).reply()
    assert (caught.value.errno, caught.value.again) == (Errno.EPROTO, False)


@pytest.mark.parametrize(
    "data",
    [
        b"data: {broken\n\n",
        b"data: 5\n\n",
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":7}}\n\n',
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"\xff"}}\n\n',
        b'data: {"type":"content_block_start","index":0,"content_block":{"type":"x","y":"\xff"}}\n\n',
        (
            b'data: {"type":"content_block_delta","index":0,'
            b'"delta":{"type":"citations_delta","citation":"\xff"}}\n\n'
        ),
        (
            b'data: {"type":"content_block_delta","index":0,'
            b'"delta":{"type":"compaction_delta","content":"\xff"}}\n\n'
        ),
        b'data: {"type":"message_start","message":{"diagnostics":"\xff"}}\n\n',
        b'data: {"type":"content_block_delta","index":8,"delta":{"type":"text_delta","text":"a"}}\n\n',
        b'data: {"type":"content_block_start","index":0,"content_block":{"type":"tool_use","name":"x"}}\n\n',
        b'data: {"type":"x","y":' + b"[" * 100_000 + b"\n\n",
    ],
)
def test_undecodable_data_fails_the_turn(data):
    """Garbage in a stream is a failure that may be tried again, never an exception of some library."""
    turn = fed(start(), text(0, "so far"))
    with pytest.raises(ModelError) as caught:
        turn.feed(data)
    assert (caught.value.errno, caught.value.again) == (Errno.EPROTO, True)
    assert turn.partial().text == "so far"


@pytest.mark.parametrize(
    ("kind", "errno", "again", "shared"),
    [
        ("overloaded_error", Errno.EBUSY, True, True),
        ("rate_limit_error", Errno.EAGAIN, True, True),
        ("api_error", Errno.EIO, True, False),
        ("never_heard_of", Errno.EIO, True, False),
        ("invalid_request_error", Errno.EINVAL, False, False),
        ("authentication_error", Errno.EACCES, False, False),
    ],
)
def test_an_error_event_fails_the_turn(kind, errno, again, shared):
    """The type of an error in mid-stream says whether to try again."""
    with pytest.raises(ModelError, match=f"{kind}: It is") as caught:
        fed(start(), text(0, "a"), event(type="error", error={"type": kind, "message": "It is"}))
    fault = caught.value
    assert (fault.errno, fault.again, fault.shared) == (errno, again, shared)


def test_an_error_event_of_another_shape_fails_too():
    """Gateways put a bare text there."""
    with pytest.raises(ModelError, match="upstream gone"):
        fed(event(type="error", error="upstream gone"))


def test_a_full_context_has_its_own_errno():
    """A prompt that is too long is E2BIG, whichever server says so."""
    for said in ("prompt is too long: 9 tokens > 8 maximum", "exceeds the available context size"):
        assert failure("invalid_request_error", said).errno is Errno.E2BIG


def test_an_interrupted_answer_keeps_what_may_stand():
    """Text so far, signed thinking and finished calls stay; what was not finished goes."""
    data = start() + thought(0, "hm", "c2ln") + call(1, "{}") + text(2, "so far \n", stop=False)
    reply = fed(data).partial()
    assert [part["type"] for part in blocks(reply)] == ["thinking", "tool_use", "text"]
    assert (reply.text, blocks(reply)[2]["text"]) == ("so far", "so far")
    assert (reply.stop_reason, len(reply.asks), reply.thinks) == ("interrupted", 1, True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        start(),
        start() + thought(0, "hm", "", stop=False),
        start() + thought(0, "hm", ""),
        start() + thought(0, "hm", "c2ln"),
        start() + call(0, '{"a":', stop=False),
        start() + text(0, " ", stop=False),
        start() + block(0, {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}),
    ],
)
def test_an_interrupted_answer_may_be_empty(data):
    """Unsigned or trailing thinking, half a call, blank text and a server's unanswered call leave nothing."""
    partial = fed(data).partial()
    assert replace(partial, message_id="") == Reply(stop_reason="interrupted", model="m")


def test_a_servers_call_stays_with_its_result():
    """A finished pair of call and result is kept."""
    pair = block(0, {"type": "server_tool_use", "id": "s", "name": "x", "input": {}}) + block(
        1, {"type": "web_search_tool_result", "tool_use_id": "s", "content": []}
    )
    assert len(blocks(fed(start() + pair).partial())) == 2


def test_partial_never_fails():
    """Wherever a stream is cut, what there is can be taken, and is a valid message."""
    for at in range(len(WHOLE)):
        reply = fed(WHOLE[:at]).partial()
        assert all(part["type"] != "text" or part["text"].strip() for part in blocks(reply))
        assert WHOLE.decode("utf-8", "ignore").find(reply.text[:7]) >= 0


def test_foreign_text_is_tamed():
    """Control characters and line breaks go, and length is bounded, visibly."""
    assert plain("a\x1b[31m\n b\x00") == "a [31m b"
    assert plain("x" * 5000).endswith("x...")
    assert len(plain("x" * 5000)) == 400
    assert plain(" " * 5000 + "key").endswith("...")


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=60) | st.sampled_from([WHOLE, WHOLE[:300], b"data: ", b"\n\n"]), max_size=8)
)
def test_no_bytes_raise_anything_but_a_model_error(chunks):
    """A hostile server can fail a call and do nothing else."""
    turn = Turn("m", lambda _: None)
    try:
        for chunk in chunks:
            turn.feed(chunk)
        turn.reply()
    except ModelError:
        turn.partial()


def test_when_the_answer_begins_somebody_is_told():
    """Once, at message_start: the prompt is in the cache from then on."""
    begun = []
    turn = Turn("m", lambda _: None, on_begin=lambda: begun.append(turn.message_id))
    turn.feed(event(type="ping"))
    assert begun == []
    turn.feed(start() + text(0, "hi") + end())
    assert begun == ["msg_1"]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ({}, b""),
        ({"diagnostics": None}, b""),
        ({"diagnostics": {"cache_miss_reason": None}}, b'{"cache_miss_reason":null}'),
        ({"diagnostics": {"cache_miss_reason": {"type": "x"}}}, b'{"cache_miss_reason":{"type":"x"}}'),
        ({"diagnostics": 7}, b"7"),
    ],
)
def test_what_the_endpoint_says_of_the_cache_is_kept_as_it_came(said, kept):
    """The message's name too; a server that gives none does no harm."""
    reply = fed(event(type="message_start", message={"id": None, **said}), text(0, "hi"), end()).reply()
    assert (reply.message_id, reply.diagnostics) == ("", kept)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!DOCTYPE html>\n<html><head><title> Sign\n in </title>", 'a web page, "Sign in"'),
        ("\n<HTML><body><h1>502</h1><p>Bad Gateway</p></body></HTML>", 'a web page, "502 Bad Gateway"'),
        ("<html></html>", "a web page"),
        ('{"a": "<html>"}', '{"a": "<html>"}'),
        ("no\nhtml", "no html"),
    ],
)
def test_a_web_page_is_told_of_by_its_title_or_text(text, told):
    assert described(text) == told
