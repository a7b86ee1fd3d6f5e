"""What is known of conversations that endpoints hold, and the bodies of requests that go on with one."""

import json

from bodykit import tool_results, user_text

from llmprocd.abi.types import ImageId, MessageId, Pid
from llmprocd.kernel.state import Image, Node, Proc, Reply, ToolResult
from llmprocd.model.body import Transcript, is_threaded, prefix, thread
from llmprocd.model.threads import LIFETIME, Threads

TOOLS = [{"name": "bash", "description": "runs", "input_schema": {"type": "object"}}]
MODEL = "claude-sonnet-5-5"


def proc(head=2, pid=7, image=1):
    return Proc(pid=Pid(pid), family=Pid(pid), image=ImageId(image), head=MessageId(head))


def node(number, role, body, text=False):
    parent = MessageId(number - 1) if number > 1 else None
    return Node(MessageId(number), parent, role, body, model=MODEL, text=text)


def reply(message_id="msg_1", stop_reason="end_turn"):
    return Reply(message_id=message_id, stop_reason=stop_reason)


ANSWER = node(2, "assistant", user_text("answer"))


def image(caching=True):
    before, after = prefix(MODEL, {"max_tokens": 99, "tool_choice": {"type": "auto"}}, "good", TOOLS, caching)
    return Image(program="p", path="", model=MODEL, provider="anthropic", prefix=before, suffix=after,
                 caching=caching, threads=True)  # fmt: skip


def test_a_process_goes_on_from_its_own_last_answer():
    """With the endpoint's name of it, until five minutes are over."""
    threads = Threads()
    threads.note(proc(), reply(), 100.0)
    assert threads.previous(proc(), ANSWER, 101.0) == "msg_1"
    assert threads.previous(proc(), ANSWER, 100.0 + LIFETIME - 1) == "msg_1"
    assert threads.previous(proc(), ANSWER, 100.0 + LIFETIME) is None
    assert threads.previous(proc(), ANSWER, 99.0) is None


def test_nothing_else_goes_on_from_it():
    """Not another process, another answer, another program, nor a path without an answer."""
    threads = Threads()
    threads.note(proc(), reply(), 100.0)
    assert threads.previous(proc(pid=8), ANSWER, 101.0) is None
    assert threads.previous(proc(), node(4, "assistant", b""), 101.0) is None
    assert threads.previous(proc(image=2), ANSWER, 101.0) is None
    assert threads.previous(proc(), None, 101.0) is None


def test_only_a_whole_answer_is_gone_on_from():
    """Of one that was cut off the endpoint may have more than the journal."""
    for told in (reply(stop_reason="max_tokens"), reply(stop_reason="pause_turn"), reply(message_id="")):
        threads = Threads()
        threads.note(proc(), reply(), 100.0)
        threads.note(proc(), told, 101.0)
        assert threads.previous(proc(), ANSWER, 102.0) is None


def test_what_is_over_is_forgotten():
    """A note makes room; off is for ever and for one process."""
    threads = Threads()
    threads.note(proc(pid=8), reply(), 100.0)
    threads.note(proc(), reply(), 500.0)
    assert threads.previous(proc(pid=8), ANSWER, 100.0) is None
    threads.off(Pid(7))
    assert not threads.wanted(Pid(7))
    assert threads.wanted(Pid(8))
    assert threads.previous(proc(), ANSWER, 501.0) is None


def test_of_a_process_that_has_ended_nothing_is_kept():
    """Its pid is nobody's any more."""
    threads = Threads()
    threads.note(proc(), reply(), 100.0)
    threads.lost(Pid(7))
    threads.off(Pid(7))
    threads.end(Pid(7))
    assert (threads._held, threads._off, threads._lost) == ({}, set(), set())


def test_a_continued_body_has_only_what_is_new():
    """No program, no past; parameters, the marker of the end and what is asked beside stay."""
    nodes = [
        node(1, "user", user_text("question"), text=True),
        ANSWER,
        node(3, "user", user_text("more"), text=True),
    ]
    pieces = Transcript.of(nodes, MODEL).continued(image(), thread("msg_1") + b',"diagnostics":null')
    assert is_threaded(pieces)
    assert json.loads(b"".join(pieces)) == {
        "model": MODEL,
        "max_tokens": 99,
        "tool_choice": {"type": "auto"},
        "stream": True,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "more"}]}],
        "cache_control": {"type": "ephemeral"},
        "thread": {"type": "continue", "previous_message_id": "msg_1"},
        "diagnostics": None,
    }


def test_a_continued_body_marks_only_what_is_in_it():
    """The place before a text beside results is marked, one that precedes what is new is not."""
    results = tool_results([ToolResult("toolu_1", "fine")])
    nodes = [
        node(1, "user", user_text("question"), text=True),
        node(2, "assistant", b'{"type":"tool_use","id":"toolu_1","name":"bash","input":{}}'),
        node(3, "user", results + b"," + user_text("and more"), text=True),
    ]
    body = b"".join(Transcript.of(nodes, MODEL).continued(image(), thread("msg_1")))
    (message,) = json.loads(body)["messages"]
    assert ["cache_control" in block for block in message["content"]] == [True, False]
    plain = b"".join(Transcript.of(nodes, MODEL).continued(image(caching=False), thread("msg_1")))
    assert b"cache_control" not in plain


def test_whole_and_continued_end_alike():
    """What a continued body brings are the last bytes of the whole one."""
    nodes = [node(1, "user", user_text("question")), ANSWER, node(3, "user", user_text("more"))]
    transcript = Transcript.of(nodes, MODEL)
    whole, new = (
        b"".join(pieces) for pieces in (transcript.pieces(image(), b"!"), transcript.continued(image(), b"!"))
    )
    assert whole.endswith(new.partition(b'"messages":[')[2])


def test_a_text_that_looks_like_a_thread_is_none():
    """Only the end of the body says so."""
    text = ',"thread":{"type":"create"}'
    transcript = Transcript.of([node(1, "user", user_text(text))], MODEL)
    assert not is_threaded(transcript.pieces(image()))
    assert is_threaded(transcript.pieces(image(), thread(None)))


def test_a_long_turn_is_not_near():
    """Then looking back from the end does not find what is cached."""
    nodes = [node(1, "user", user_text("question")), ANSWER, node(3, "user", user_text("more"))]
    assert Transcript.of(nodes, MODEL).near
    nodes[2] = node(3, "user", b",".join([user_text("more")] * 20))
    assert not Transcript.of(nodes, MODEL).near


def test_nothing_to_ask_is_nothing_to_go_on_with():
    """A path that ends with an answer, or has none."""
    question = node(1, "user", user_text("question"))
    assert not Transcript.of([question], MODEL).asks
    assert not Transcript.of([question, ANSWER], MODEL).asks
    assert Transcript.of([question, ANSWER, node(3, "user", user_text("more"))], MODEL).asks
