"""The script language, by example, through the engine alone."""

import json

import pytest

from llmprocd.model import script_rules
from llmprocd.model.script import Engine

KEY = {"x-api-key": "script"}


def ask(engine, messages, now=0.0, **fields):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    request = {"model": "script", "max_tokens": 4096, "messages": messages, **fields}
    return engine.answer("POST", "/v1/messages", KEY, json.dumps(request).encode(), now)


def reply(engine, messages, **fields):
    answer = ask(engine, messages, **fields)
    message = json.loads(answer.body)
    assert answer.status == 200, message
    return message


def converse(engine, text, turns, result="fine", **fields):
    """The replies of a conversation in which every tool call gets the same result."""
    messages = [{"role": "user", "content": text}]
    replies = []
    for _ in range(turns):
        replies.append(reply(engine, messages, **fields))
        messages.append({"role": "assistant", "content": replies[-1]["content"]})
        uses = [b["id"] for b in replies[-1]["content"] if b["type"] == "tool_use"]
        messages.append(
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": use, "content": result} for use in uses],
            }
        )
    return replies


def inputs(message):
    return [(b["name"], b["input"]) for b in message["content"] if b["type"] == "tool_use"]


def text_of(message):
    return "".join(b["text"] for b in message["content"] if b["type"] == "text")


def events(answer):
    found = []
    for part in answer.body.decode().split("\n\n")[:-1]:
        name, data = part.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def streamed_text(answer):
    deltas = [data["delta"] for name, data in events(answer) if name == "content_block_delta"]
    return "".join(delta.get("text", "") for delta in deltas)


# What governs


def test_without_a_script_it_repeats_the_whole_text():
    """A text without directives comes back, its escapes and placeholders untouched."""
    assert text_of(reply(Engine(), r"one\ntwo {{n}}")) == r"You said: one\ntwo {{n}}"


def test_each_directive_is_one_turn_and_then_it_is_done():
    """The number of assistant messages after the text is the step."""
    first, second, third = converse(Engine(), "!bash ls\ntalk that means nothing\n!read_file a.txt", 3)
    assert inputs(first) == [("bash", {"command": "ls"})]
    assert first["stop_reason"] == "tool_use"
    assert inputs(second) == [("read_file", {"file_path": "a.txt"})]
    assert text_of(third) == "done"
    assert third["stop_reason"] == "end_turn"


def test_joined_directives_make_one_answer():
    """`!&` puts text and several tools into one turn, in order."""
    message = reply(Engine(), "!say look\n!& !bash ls\n!& read_fd fd:3\n!say later")
    assert [b["type"] for b in message["content"]] == ["text", "tool_use", "tool_use"]
    assert inputs(message) == [("bash", {"command": "ls"}), ("read_fd", {"fd": "fd:3"})]


def test_only_the_last_text_block_of_the_latest_user_text_governs():
    """Earlier blocks and earlier messages are history, and markers in front are no part of the text."""
    messages = [
        {"role": "user", "content": "!say old"},
        {"role": "assistant", "content": "old"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "!say a"}, {"type": "text", "text": "[m12] !say b"}],
        },
    ]
    assert text_of(reply(Engine(), messages)) == "b"


def test_a_text_beside_tool_results_governs_from_its_first_step():
    """A forked child reads its own prompt after the results."""
    fork = reply(Engine(), "!fork x | y")
    use = fork["content"][0]["id"]
    messages = [
        {"role": "user", "content": "!fork x | y\n!say parent"},
        {"role": "assistant", "content": fork["content"]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use, "content": "pid 0"}]},
    ]
    assert text_of(reply(Engine(), messages)) == "parent"
    messages[-1]["content"].append({"type": "text", "text": "!say child"})
    assert text_of(reply(Engine(), messages)) == "child"


def test_the_system_prompt_then_the_file_govern_a_text_without_directives():
    """A script in the system prompt comes before the endpoint's own; the user's text comes before both."""
    engine = Engine("!say file")
    system = "Be kind. <script>!say system</script>"
    assert text_of(reply(engine, "hello")) == "file"
    assert text_of(reply(engine, "hello", system=system)) == "system"
    assert text_of(reply(engine, "hello", system=[{"type": "text", "text": system}])) == "system"
    assert text_of(reply(engine, "!say mine", system=system)) == "mine"


def test_a_demanded_tool_is_called_without_a_script():
    """`tool_choice` decides which, and the input has what the schema requires."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {}}, "required": ["n", "s"]}
    tools = [{"name": "a", "input_schema": {"type": "object"}}, {"name": "b", "input_schema": schema}]
    assert inputs(reply(Engine(), "hi", tools=tools, tool_choice={"type": "any"})) == [("a", {})]
    chosen = reply(Engine(), "hi", tools=tools, tool_choice={"type": "tool", "name": "b"})
    assert inputs(chosen) == [("b", {"n": 0, "s": "x"})]


# Directives


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("!bash echo a | wc -l", "bash", {"command": "echo a | wc -l"}),
        ('!bash {"command": "ls", "timeout_s": 3}', "bash", {"command": "ls", "timeout_s": 3}),
        (r"!bash printf 'a\n'", "bash", {"command": r"printf 'a\n'"}),
        ("!fork A | B|C", "fork", {"prompts": ["A", "B", "C"]}),
        (
            r'!fork !say a\n!say b | !exit {"status":3}',
            "fork",
            {"prompts": ["!say a\n!say b", '!exit {"status":3}']},
        ),
        (r"!fork !fork a \| b | c", "fork", {"prompts": ["!fork a | b", "c"]}),
        (r"!fork !fork !say a\\n!say b", "fork", {"prompts": [r"!fork !say a\n!say b"]}),
        (r"!spawn !say \{{n}}", "spawn", {"prompt": "!say {{n}}"}),
        (r"!goto m3 try\nagain", "goto", {"position": "m3", "message": "try\nagain"}),
        ("!send 7 hello you", "send", {"pid": 7, "message": "hello you"}),
        ("!exit", "exit", {}),
        ("!exit 3", "exit", {"status": 3}),
        ("!exit 3 so long", "exit", {"status": 3, "message": "so long"}),
        ("!wait 7 8", "wait", {"pids": [7, 8]}),
        ("!wait", "wait", {}),
        ("!kill 7 TERM", "kill", {"pid": 7, "signal": "TERM"}),
        ("!read_fd fd:3", "read_fd", {"fd": "fd:3"}),
        ("!read_file a b.txt", "read_file", {"file_path": "a b.txt"}),
        ("!any-tool_1", "any-tool_1", {}),
        ('!tool say {"x": [1, {"y": null}]}', "say", {"x": [1, {"y": None}]}),
    ],
)
def test_a_directive_is_a_tool_call(line, name, value):
    """Every tool can be called by name with JSON, the usual ones by a shorthand."""
    assert inputs(reply(Engine(), line)) == [(name, value)]


def test_say_has_escapes_and_streams_word_by_word():
    """Unknown escapes stay as they are."""
    answer = ask(Engine(), r"!say one\ttwo\n\d three", stream=True)
    assert streamed_text(answer) == "one\ttwo\n\\d three"
    assert sum(name == "content_block_delta" for name, _ in events(answer)) == 4


def test_thinking_is_signed_by_its_model():
    """What the model thought goes back to it, and to no other."""
    message = reply(Engine(), "!think hmm\n!& say so")
    assert message["content"][0] == {
        "type": "thinking",
        "thinking": "hmm",
        "signature": script_rules.signature("script", "hmm"),
    }
    messages = [
        {"role": "user", "content": "!think hmm\n!& say so"},
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": "and?"},
    ]
    reply(Engine(), messages)
    refused = ask(Engine(), messages, model="another")
    assert refused.status == 400
    assert b"Invalid `signature`" in refused.body


def test_raw_blocks_come_as_they_are_and_may_go_back():
    """Kinds of block that nobody knows yet are the client's to keep."""
    block = {"type": "hologram", "frames": [1, {"x": "ü"}]}
    message = reply(Engine(), "!raw " + json.dumps(block))
    assert message["content"] == [block]
    messages = [
        {"role": "user", "content": "!raw {}"},
        {"role": "assistant", "content": message["content"]},
        {"role": "user", "content": "go on"},
    ]
    assert text_of(reply(Engine(), messages)) == "You said: go on"


@pytest.mark.parametrize(
    "reason", ["max_tokens", "refusal", "stop_sequence", "model_context_window_exceeded", "new"]
)
def test_stop_sets_the_stop_reason_of_its_turn(reason):
    """Joined, or on the line after a text, it ends that turn; alone it is a turn."""
    for script in (f"!say hi\n!& stop {reason}", f"!say hi\n!stop {reason}"):
        message = reply(Engine(), script)
        assert (text_of(message), message["stop_reason"]) == ("hi", reason)
        assert (message["stop_details"] is not None) == (reason == "refusal")
    assert reply(Engine(), f"!stop {reason}")["stop_reason"] == reason


def test_stop_after_tools_is_a_turn_of_its_own():
    """Only a text that would end the run anyway takes the next line's stop."""
    first, second = converse(Engine(), "!bash ls\n!stop refusal", 2)
    assert (first["stop_reason"], second["stop_reason"]) == ("tool_use", "refusal")
    assert second["content"] == []


def test_calls_may_be_cut_off():
    """A tool call in an answer that ends for another reason keeps that reason."""
    message = reply(Engine(), "!bash ls\n!& stop max_tokens")
    assert (inputs(message), message["stop_reason"]) == ([("bash", {"command": "ls"})], "max_tokens")


def test_a_pause_goes_on_with_the_next_step():
    """The paused answer is sent back as it is; joined with what came after, it counts as two turns."""
    engine, script = Engine(), "!say wait\n!stop pause_turn\n!bash ls\n!say end"
    paused = reply(engine, script)
    assert paused["stop_reason"] == "pause_turn"
    assert [b["type"] for b in paused["content"]] == ["text", "server_tool_use"]
    messages = [{"role": "user", "content": script}, {"role": "assistant", "content": paused["content"]}]
    second = reply(engine, messages)
    assert [b["type"] for b in second["content"]] == ["web_search_tool_result", "tool_use"]
    messages[1]["content"] = paused["content"] + second["content"]
    result = {"type": "tool_result", "tool_use_id": second["content"][1]["id"], "content": "x"}
    messages.append({"role": "user", "content": [result]})
    assert text_of(reply(engine, messages)) == "end"


@pytest.mark.parametrize("script", ["!empty", "!say", "!say {{result}}"])
def test_an_empty_answer_has_no_content(script):
    """Nothing is said, the turn ends."""
    message = reply(Engine(), script)
    assert (message["content"], message["stop_reason"]) == ([], "end_turn")
    names = [name for name, _ in events(ask(Engine(), script, stream=True))]
    assert names == ["message_start", "message_delta", "message_stop"]


def test_placeholders_stand_for_the_last_result_the_count_and_the_model():
    """In texts, shorthands and JSON alike."""
    script = "!bash x\n!say {{result}} {{result:(\\d+)}} {{result:no}}{{n}} {{model}}"
    assert text_of(converse(Engine(), script, 2, result="pid 42 ok")[1]) == "pid 42 ok 42 3 script"
    for line, value in [
        ("!wait {{result:\\d+}}", {"pids": [42]}),
        ("!kill {{result:\\d{2}}} TERM", {"pid": 42, "signal": "TERM"}),
        ('!wait {"pids": [{{result:\\d+}}]}', {"pids": [42]}),
        ('!wait {"text": "{{result:(\\\\w+) ok}}"}', {"text": "42"}),
        ("!send {{result:\\d+}} got {{result}}", {"pid": 42, "message": "got pid 42 ok"}),
        ("!bash {{result}}", {"command": "pid 42 ok"}),
        ("!fork {{result:4|2}} | b", {"prompts": ["4", "b"]}),
    ]:
        message = converse(Engine(), f"!bash x\n{line}", 2, result="pid 42 ok")[1]
        assert inputs(message)[0][1] == value, line


@pytest.mark.parametrize(
    "line",
    ["!unknown words", "!bash {not json", "!fail", "!fail x", "!sleep long", "!delay -1", "!raw {}",
     "!exit soon", "!drop time=2", "!wait a", "!say {{result:(}}", "!stall"],
)  # fmt: skip
def test_a_line_that_means_nothing_is_refused(line):
    """A typo in a script fails loudly, and the refusal can be looked up."""
    engine = Engine()
    answer = ask(engine, line)
    assert (answer.status, engine.refusals[0][:8]) == (400, "script: ")


# Time


def test_delay_is_between_deltas_of_its_turn_and_later_ones():
    """Not before the first delta, and never before the answer."""
    script = "!bash x\n!delay 2\n!say a b c\n!bash x"
    messages = [{"role": "user", "content": script}]
    waits = []
    for _ in range(3):
        answer = ask(Engine(), messages, stream=True)
        waits.append([chunk.delay for chunk in answer.chunks if chunk.delay])
        whole = ask(Engine(), messages)
        assert sum(chunk.delay for chunk in whole.chunks) == sum(waits[-1])
        messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": [IMAGE]}]
    assert waits[0] == []
    assert waits[1] == [2, 2]
    assert set(waits[2]) == {2}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


def test_sleep_holds_back_the_first_byte():
    """Of the next turn, or joined, of its own; also of an error."""
    assert ask(Engine(), "!sleep 3\n!say a").wait == 3
    assert ask(Engine(), "!say a\n!& sleep 4").wait == 4
    assert ask(Engine(), "!sleep 5\n!& fail 500").wait == 5


# Faults


def test_fail_strikes_a_number_of_times_and_the_same_call_goes_on():
    """Tries are those of one conversation, and a success starts over."""
    engine, script = Engine(), "!fail 529 times=2 retry_after=7\n!say ok\n!say next"
    for _ in range(2):
        for _ in range(2):
            answer = ask(engine, script)
            assert answer.status == 529
            assert json.loads(answer.body)["error"]["type"] == "overloaded_error"
            assert ("retry-after", "7") in answer.headers
        assert text_of(reply(engine, script)) == "ok"
    assert engine.refusals == []


def test_conversations_are_tried_apart():
    """Another prompt is another conversation."""
    engine = Engine()
    assert ask(engine, "!fail 500 times=1\n!say a").status == 500
    assert ask(engine, "!fail 500 times=1\n!say b").status == 500
    assert ask(engine, "!fail 500 times=1\n!say a").status == 200


def test_faults_of_one_step_strike_in_order():
    """First one, then the other, then the answer; a fault at the end is followed by `done`."""
    engine, script = Engine(), "!fail 500 times=1\n!fail 429 my_error times=1"
    assert ask(engine, script).status == 500
    second = ask(engine, script)
    assert (second.status, json.loads(second.body)["error"]["type"]) == (429, "my_error")
    assert text_of(reply(engine, script)) == "done"


def test_a_fault_without_times_never_ends():
    """It is a turn that is never had."""
    engine = Engine()
    assert {ask(engine, "!fail 400\n!say x").status for _ in range(5)} == {400}


def test_drop_and_truncate_break_off_after_some_text():
    """One resets the connection, the other ends it as if all were well."""
    for kind, dropped in (("drop", True), ("truncate", False)):
        engine, script = Engine(), f"!{kind} times=1\n!say fine"
        answer = ask(engine, script, stream=True)
        assert answer.dropped is dropped
        assert streamed_text(answer)
        assert events(answer)[-1][0] == "content_block_delta"
        whole = ask(Engine(), script)
        with pytest.raises(json.JSONDecodeError):
            json.loads(whole.body)
        assert streamed_text(ask(engine, script, stream=True)) == "fine"


def test_a_joined_fault_strikes_the_steps_own_text():
    """What was said until then is a beginning of what will be said."""
    engine, script = Engine(), "!say one two three four\n!& drop times=1"
    assert streamed_text(ask(engine, script, stream=True)) == "one two "
    assert streamed_text(ask(engine, script, stream=True)) == "one two three four"


def test_error_is_an_event_in_mid_stream():
    """Its type can be chosen; without a stream it is a status."""
    answer = ask(Engine(), "!error api_error", stream=True)
    assert (answer.status, answer.dropped) == (200, False)
    name, data = events(answer)[-1]
    assert (name, data["type"], data["error"]["type"]) == ("error", "error", "api_error")
    assert ask(Engine(), "!error").status == 529


def test_badjson_is_a_call_whose_input_cannot_be_read():
    """The deltas do not add up to JSON although the stream ends well."""
    found = events(ask(Engine(), "!badjson bash", stream=True))
    parts = [d["delta"]["partial_json"] for n, d in found if n == "content_block_delta"]
    with pytest.raises(json.JSONDecodeError):
        json.loads("".join(parts))
    assert found[-2][1]["delta"]["stop_reason"] == "tool_use"
    assert found[1][1]["content_block"]["name"] == "bash"


def test_stall_is_silence_and_then_the_rest():
    """Nothing is missing in the end."""
    answer = ask(Engine(), "!say one two three\n!& stall 9", stream=True)
    assert [chunk.delay for chunk in answer.chunks if chunk.delay] == [9]
    assert streamed_text(answer) == "one two three"
    assert events(answer)[-1][0] == "message_stop"


def test_html_is_a_page_with_a_good_status():
    """As a proxy in between would send it."""
    answer = ask(Engine(), "!html", stream=True)
    assert answer.status == 200
    assert ("content-type", "text/html") in answer.headers
    assert answer.body.startswith(b"<html>")


def test_nousage_leaves_usage_out():
    """Nulls at the start, nothing at the end."""
    found = events(ask(Engine(), "!say x\n!& nousage", stream=True))
    assert found[0][1]["message"]["usage"] == {"input_tokens": None, "output_tokens": None}
    assert "usage" not in found[-2][1]


# The endpoint


def test_a_stream_and_a_body_are_the_same_message():
    """Law: the same content streamed and not streamed."""
    script = '!think hmm hmm\n!& say a b\n!& bash ls\n!& raw {"type": "hologram", "x": 1}'
    whole = json.loads(ask(Engine(seed=b"1"), script).body)
    found = events(ask(Engine(seed=b"1"), script, stream=True))
    built = found[0][1]["message"]
    for name, data in found:
        if name == "content_block_start":
            built["content"].append(data["content_block"])
        if name == "content_block_delta":
            join_delta(built["content"][data["index"]], data["delta"])
        if name == "message_delta":
            built |= data["delta"]
            built["usage"] |= data["usage"]
    for block in built["content"]:
        if "json" in block:
            block["input"] = json.loads(block.pop("json"))
    for message in (whole, built):
        message.pop("id")
        message["content"][2].pop("id")
    assert built == whole


def join_delta(block, delta):
    for kind, field in [
        ("text_delta", "text"),
        ("thinking_delta", "thinking"),
        ("signature_delta", "signature"),
    ]:
        if delta["type"] == kind:
            block[field] += delta[field]
    if delta["type"] == "input_json_delta":
        block["json"] = block.get("json", "") + delta["partial_json"]


def test_ids_are_never_the_same_and_with_a_seed_repeatable():
    """Two answers to one request are two messages; the same engine started again gives the same bytes."""
    first, second = (Engine(seed=b"x") for _ in range(2))
    one, two = reply(first, "!bash a\n!& bash b"), reply(first, "!bash a\n!& bash b")
    ids = [m["id"] for m in (one, two)] + [b["id"] for m in (one, two) for b in m["content"]]
    assert len(set(ids)) == 6
    assert reply(second, "!bash a\n!& bash b") == one
    assert reply(Engine(), "!bash a")["id"] != reply(Engine(), "!bash a")["id"]


def test_max_tokens_cuts_the_answer_off():
    """Output never exceeds it, and 0 says nothing."""
    message = reply(Engine(), "!say " + "word " * 100 + "\n!& bash ls", max_tokens=10)
    assert (len(text_of(message)), message["stop_reason"]) == (40, "max_tokens")
    assert message["usage"]["output_tokens"] == 10
    called = reply(Engine(), "!bash " + "x" * 100, max_tokens=5)
    assert (inputs(called), called["stop_reason"]) == ([("bash", {})], "max_tokens")
    assert reply(Engine(), "!say hi", max_tokens=0)["content"] == []


def test_a_stop_sequence_ends_the_answer_before_it():
    """And what comes after it is never said."""
    message = reply(Engine(), "!say one STOP two\n!& bash ls", stop_sequences=["END", "STOP"])
    assert (text_of(message), message["stop_reason"], message["stop_sequence"]) == (
        "one ",
        "stop_sequence",
        "STOP",
    )
    assert inputs(message) == []


def test_a_key_is_required():
    """By either header; with a key of its own, no other is taken."""
    body = b'{"model":"m","max_tokens":9,"messages":[{"role":"user","content":"x"}]}'
    engine = Engine(key="right")
    for headers, status in [
        ({}, 401),
        ({"X-Api-Key": "wrong"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"X-Api-Key": "right"}, 200),
        ({"Authorization": "Bearer right"}, 200),
    ]:
        answer = engine.answer("POST", "/v1/messages?beta=true", headers, body, 0.0)
        assert answer.status == status, headers
    assert (
        json.loads(engine.answer("GET", "/v1/models", {}, b"", 0.0).body)["error"]["type"]
        == "authentication_error"
    )


def test_the_rate_limit_names_the_time_to_wait():
    """As many requests a second as were allowed, and no more."""
    engine = Engine(rate_limit=2)
    assert [ask(engine, "x", now=10.0).status for _ in range(3)] == [200, 200, 429]
    refused = ask(engine, "x", now=10.0)
    headers = dict(refused.headers)
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "500")
    assert ask(engine, "x", now=10.5).status == 200


def test_paths_and_methods_that_are_not_there():
    """404 and 405, as errors of the API."""
    engine = Engine()
    for method, path, status in [
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/messages", 405),
        ("GET", "/v1/models/nothing", 404),
        ("GET", "/v1/models/script", 200),
    ]:
        assert engine.answer(method, path, KEY, b"", 0.0).status == status


def test_tokens_are_counted_as_usage_reports_them():
    """What count_tokens says is what a call is charged."""
    fields = {"model": "script", "messages": [{"role": "user", "content": "hi " * 40}], "system": "s" * 33}
    engine = Engine()
    counted = engine.answer("POST", "/v1/messages/count_tokens", KEY, json.dumps(fields).encode(), 0.0)
    charged = reply(engine, **fields)["usage"]["input_tokens"]
    assert json.loads(counted.body) == {"input_tokens": charged}


def test_what_was_received_can_be_looked_at():
    """The very bytes, the headers, the time; bounded; and forgotten on demand."""
    engine = Engine(keep_bytes=1000)
    ask(engine, "one", now=4.5)
    first = engine.requests[0]
    assert (first.at, first.method, first.headers["x-api-key"]) == (4.5, "POST", "script")
    assert json.loads(first.body)["messages"][0]["content"] == "one"
    engine.answer("POST", "/v1/messages", KEY, b"{}", 0.0)
    assert engine.refusals == ["model: Field required"]
    ask(engine, "x" * 2000)
    assert len(engine.requests) == 1
    engine.forget()
    assert (engine.requests, engine.refusals) == ([], [])


# The cache's books, diagnostics, the window


def test_the_books_are_what_the_answers_said():
    """Every answer's usage is in them, until they are forgotten."""
    engine = Engine()
    usages = [
        reply(engine, [{"role": "user", "content": "!say " + "words " * 600}])["usage"] for _ in range(2)
    ]
    books = json.loads(engine.answer("GET", "/_script/books", {}, b"", 0.0).body)
    assert books.pop("answers") == 2
    assert books == {name: sum(usage[name] for usage in usages) for name in books}
    engine.forget()
    assert engine.books.answers == 0


RULES = [{"type": "text", "text": "be good " * 100}]
ASK = [{"role": "user", "content": "!say one"}]


def told(change, first=None):
    """What the second of two requests is told, compared with the first."""
    engine = Engine()
    fields = {"system": RULES, "diagnostics": {"previous_message_id": None}}
    before = reply(engine, first or ASK, **fields)
    assert before["diagnostics"] is None
    fields["diagnostics"] = {"previous_message_id": before["id"]}
    return reply(engine, **{"messages": ASK, **fields, **change})["diagnostics"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "claude-opus-5-5"}, "model_changed"),
        ({"tools": [{"name": "t", "input_schema": {"type": "object"}}]}, "tools_changed"),
        ({"system": "be bad"}, "system_changed"),
        ({"messages": [{"role": "user", "content": "!say two"}]}, "messages_changed"),
        ({"diagnostics": {"previous_message_id": "msg_no"}}, "previous_message_not_found"),
    ],
)
def test_diagnostics_name_what_has_changed(change, reason):
    """The first part of the prompt that is another one."""
    assert told(change)["cache_miss_reason"]["type"] == reason


def test_diagnostics_are_null_when_the_prompt_goes_on():
    """Markers apart, what was there before is there."""
    more = [*ASK, {"role": "assistant", "content": "one"}, {"role": "user", "content": "!say two"}]
    assert told({"messages": more}) is None
    assert told({"messages": more, "cache_control": {"type": "ephemeral"}}) is None
    assert "diagnostics" not in reply(Engine(), ASK)


def test_a_prompt_longer_than_the_window_is_refused():
    """In the API's words; the list of models says how long it may be."""
    engine = Engine(window=100)
    answer = ask(engine, "!say " + "words " * 100)
    assert answer.status == 400
    assert "prompt is too long: 158 tokens > 100 maximum" in json.loads(answer.body)["error"]["message"]
    listed = json.loads(engine.answer("GET", "/v1/models", KEY, b"", 0.0).body)["data"]
    assert {model["max_input_tokens"] for model in listed} == {100}


def test_an_answer_that_does_not_fit_beside_its_prompt_is_cut_off():
    """With a stop reason of its own; max_tokens counts where it is less."""
    engine = Engine(window=100)
    assert reply(engine, "!say " + "words " * 40)["stop_reason"] == "model_context_window_exceeded"
    assert reply(engine, "!say " + "words " * 40, max_tokens=9)["stop_reason"] == "max_tokens"
    assert reply(engine, "!say short")["stop_reason"] == "end_turn"


def test_an_endpoint_can_be_without_this_and_that():
    """As servers are that speak the API and do not have all of it."""
    engine = Engine(without=["diagnostics", "models"])
    assert ask(engine, "!say x", diagnostics=None).status == 400
    assert engine.answer("GET", "/v1/models", KEY, b"", 0.0).status == 404
    assert ask(engine, "!say x").status == 200


def test_a_notice_of_the_daemon_does_not_govern():
    """The user's text beside it does."""
    notice = {"type": "text", "text": "<context_notice>full</context_notice>"}
    content = [{"type": "text", "text": "!say mine"}, notice]
    assert text_of(reply(Engine(), [{"role": "user", "content": content}])) == "mine"


def test_citations_are_streamed_as_the_api_does():
    """The text, then its sources, one by one."""
    cited = {"type": "text", "text": "a b", "citations": [{"type": "char_location", "cited_text": "x"}]}
    kinds = [
        data["delta"]["type"]
        for name, data in events(ask(Engine(), f"!raw {json.dumps(cited)}", stream=True))
        if name == "content_block_delta"
    ]
    assert kinds == ["text_delta", "text_delta", "citations_delta"]
    assert reply(Engine(), f"!raw {json.dumps(cited)}")["content"] == [cited]
