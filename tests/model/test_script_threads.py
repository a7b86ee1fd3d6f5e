"""Message threads at the built-in endpoint: what it holds, for how long, and what it refuses."""

import json

import pytest

from llmprocd.model.script import Engine
from llmprocd.model.script_threads import BETA

HEADERS = {"x-api-key": "script", "anthropic-beta": f"other-2026-01-01, {BETA}"}
CREATE = {"type": "create"}
TOOL = {"name": "bash", "input_schema": {"type": "object"}}


def post(engine, text, thread=CREATE, now=0.0, headers=HEADERS, **fields):
    """Status and body of the answer to one message, or to messages."""
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    request = {"model": "script", "max_tokens": 4096, "messages": messages, "thread": thread, **fields}
    answer = engine.answer("POST", "/v1/messages?beta=true", headers, json.dumps(request).encode(), now)
    return answer.status, answer.body if answer.streamed else json.loads(answer.body)


def after(message):
    return {"type": "continue", "previous_message_id": message["id"]}


def code(body):
    return body["error"]["details"]["error_code"]


def result(use):
    return [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": use, "content": "fine"}]}]


def test_a_conversation_goes_on_with_what_is_new():
    """Script, tools and calls of earlier messages are known."""
    engine = Engine()
    _, one = post(engine, "!bash ls\n!say {{result}}, message {{n}}", tools=[TOOL], system="be good")
    status, two = post(engine, result(one["content"][0]["id"]), after(one))
    assert status == 200, two
    assert two["content"][0]["text"] == "fine, message 3"
    status, three = post(engine, "!say {{n}}", after(two))
    assert three["content"][0]["text"] == "5"
    assert engine.refusals == []


def test_a_result_that_nobody_asked_for_is_refused_in_a_thread_too():
    """All rules hold for the whole conversation."""
    engine = Engine()
    _, one = post(engine, "!bash ls", tools=[TOOL])
    assert post(engine, "no result", after(one))[0] == 400
    assert post(engine, result("toolu_other"), after(one))[0] == 400
    assert post(engine, result(one["content"][0]["id"]), after(one))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_usage_and_cache_are_those_of_the_whole_conversation(stream):
    """A thread and whole requests cost the same."""
    engine, books = Engine(seed=b"1"), []
    long = "words and words " * 400
    for threaded in (False, True):
        engine.forget()
        talk, thread = [], CREATE
        for text in (f"!say {long}", "!say two", "!say three"):
            new = [{"role": "user", "content": text}]
            sent = new if threaded else [*talk, *new]
            more = {"stream": stream, "cache_control": {"type": "ephemeral"}}
            if threaded and thread != CREATE:
                status, said = post(engine, sent, thread, **more)
            else:
                status, said = post(engine, sent, thread if threaded else None, tools=[TOOL], **more)
            assert status == 200, said
            words = text.removeprefix("!say ").strip()
            talk += [*new, {"role": "assistant", "content": [{"type": "text", "text": words}]}]
            if stream:
                said = json.loads(said.split(b"data: ")[1].split(b"\n")[0])["message"]
            thread = after(said)
        books.append(engine.books)
    whole, held = books
    assert held.cache_read_input_tokens > 3000
    for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
        assert abs(getattr(whole, name) - getattr(held, name)) < 30, (whole, held)
    assert whole.output_tokens == held.output_tokens


def test_an_answer_is_gone_on_from_once():
    """The second is told so, and that is no mistake of its own."""
    engine = Engine()
    _, one = post(engine, "!say one")
    assert post(engine, "!say two", after(one))[0] == 200
    status, body = post(engine, "!say other", after(one))
    assert (status, code(body)) == (400, "thread_already_continued")
    assert engine.refusals == []


def test_a_call_that_fails_does_not_go_on():
    """A scripted failure, and a stream that breaks off, leave the answer to be gone on from."""
    engine = Engine()
    _, one = post(engine, "!say one")
    script = "!fail 529 times=1\n!truncate times=1\n!say two"
    assert post(engine, script, after(one))[0] == 529
    assert post(engine, script, after(one), stream=True)[0] == 200
    assert post(engine, script, after(one), stream=True)[0] == 200
    assert code(post(engine, script, after(one))[1]) == "thread_already_continued"


def test_a_conversation_is_held_for_five_minutes():
    """After its last request; then, or when it has been forgotten, it is a 404."""
    engine = Engine()
    _, one = post(engine, "!say one", now=0.0)
    _, two = post(engine, "!say two", after(one), now=299.0)
    _, three = post(engine, "!say three", after(two), now=598.0)
    status, body = post(engine, "!say four", after(three), now=898.0)
    assert (status, code(body)) == (404, "thread_not_found")
    assert body["error"]["type"] == "not_found_error"
    _, one = post(engine, "!say one", now=900.0)
    assert engine.answer("POST", "/_script/forget", {}, b"", 900.0).status == 200
    assert code(post(engine, "!say two", after(one), now=901.0)[1]) == "thread_not_found"
    assert engine.refusals == []


@pytest.mark.parametrize("field", [{"system": "be good"}, {"tools": [TOOL]}])
def test_what_is_fixed_cannot_be_sent_again(field):
    """System prompt and tools are the thread's."""
    engine = Engine()
    _, one = post(engine, "!say one", **field)
    status, body = post(engine, "!say two", after(one), **field)
    assert (status, code(body)) == (400, "thread_unsupported_request")
    assert len(engine.refusals) == 1


def test_another_model_is_another_thread():
    """A conversation belongs to the model that it began with."""
    engine = Engine()
    _, one = post(engine, "!say one")
    status, body = post(engine, "!say two", after(one), model="claude-sonnet-5-5")
    assert (status, code(body)) == (400, "thread_fingerprint_mismatch")


@pytest.mark.parametrize(
    "thread",
    [
        {}, [], "create", {"type": "new"}, {"type": "continue"}, {"type": ["create"]},
        {"type": "create", "previous_message_id": "x"},
        {"type": "continue", "previous_message_id": 7},
    ],
)  # fmt: skip
def test_a_thread_of_another_shape_is_refused(thread):
    """With a 400 and without a code."""
    status, body = post(Engine(), "!say one", thread)
    assert status == 400
    assert "details" not in body["error"]


def test_without_the_beta_the_field_is_not_known():
    """No header, or an endpoint that has no threads."""
    plain = {"x-api-key": "script"}
    assert post(Engine(), "!say one", headers=plain)[1]["error"]["message"].startswith("thread: Extra inputs")
    status, body = post(Engine(without=["thread"]), "!say one")
    assert (status, body["error"]["message"]) == (400, "thread: Extra inputs are not permitted")


def test_a_pause_goes_on_with_nothing_new():
    """An answer that was interrupted is one message with what comes after it."""
    engine = Engine()
    _, one = post(engine, "!say a\n!stop pause_turn\n!say b\n!say {{n}}")
    status, two = post(engine, [], after(one))
    assert status == 200, two
    _, three = post(engine, "!say {{n}}", after(two))
    assert three["content"][0]["text"] == "3"
