"""What the scripted endpoint refuses, and in which words."""

import json

import pytest

from llmprocd.model import script_rules
from llmprocd.model.script_rules import ApiError

USE = {"type": "tool_use", "id": "t1", "name": "bash", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "ok"}
TEXT = {"type": "text", "text": "hi"}
MARK = {"type": "ephemeral"}
PNG = {"type": "base64", "media_type": "image/png"}
SERVER_USE = {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}}
SERVER_RESULT = {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []}
TOOL = {"name": "bash", "description": "runs", "input_schema": {"type": "object"}}


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def model(*content):
    return {"role": "assistant", "content": content[0] if isinstance(content[0], str) else list(content)}


def request(*messages, **fields):
    return {"model": "script", "max_tokens": 100, "messages": list(messages or [user("hi")]), **fields}


def refusal(value):
    with pytest.raises(ApiError) as caught:
        script_rules.check_create(value)
    return caught.value


GOOD = [
    request(),
    request(user(TEXT), model("yes"), user("no")),
    request(user("a"), model(USE), user(RESULT, TEXT)),
    request(user("a"), model(TEXT, USE, USE | {"id": "t2"}), user(RESULT | {"tool_use_id": "t2"}, RESULT)),
    request(user("a"), model(USE), user(RESULT | {"content": [TEXT]})),
    request(user("a"), model(USE), user({"type": "tool_result", "tool_use_id": "t1"})),
    request(user("a"), model(USE), user(RESULT | {"content": "no", "is_error": True})),
    request(user("a"), model(TEXT, SERVER_USE)),
    request(user("a"), model(TEXT, SERVER_USE, SERVER_RESULT, TEXT), user("b")),
    request(user("a"), model({"type": "hologram"}, TEXT | {"citations": None}), user("b")),
    request(user("a"), model({"type": "redacted_thinking", "data": "x"}, TEXT), user("b")),
    request(tools=[TOOL], tool_choice={"type": "any"}, system="", stream=True, max_tokens=0),
    request(tools=[{"type": "web_search_20250305", "name": "web_search"}]),
    request(system=[TEXT | {"cache_control": MARK | {"ttl": "1h"}}], cache_control=MARK),
    request(thinking={"type": "adaptive", "display": "summarized"}, output_config={"effort": "max"}),
    request(thinking={"type": "enabled", "budget_tokens": 1024}, max_tokens=1025),
    request(stop_sequences=["x"], metadata={"user_id": "u"}, service_tier="auto", speed="fast"),
]


@pytest.mark.parametrize("value", GOOD)
def test_good_requests_are_good(value):
    """A good request passes and is not touched."""
    before = json.dumps(value)
    script_rules.check_create(value)
    assert json.dumps(value) == before


def without(name):
    value = request()
    del value[name]
    return value


BAD = [
    # the top
    (request(foo=1), "foo: Extra inputs are not permitted"),
    (request(thread={"type": "create"}), "thread: Extra inputs are not permitted"),
    (without("max_tokens"), "max_tokens: Field required"),
    (without("model"), "model: Field required"),
    (without("messages"), "messages: Field required"),
    (request(max_tokens=-1), "max_tokens: Input should be greater"),
    (request(max_tokens=True), "max_tokens: Input should be a valid integer"),
    (request(max_tokens="9"), "max_tokens: Input should be a valid integer"),
    (request(max_tokens=10**6), "max_tokens: 1000000 > 128000"),
    (request(model=7), "model: Input should be a valid string"),
    (request(model=""), "model: String should have at least 1"),
    (request(temperature=1.0), "temperature: this parameter is not supported"),
    (request(top_p=1), "top_p: this parameter is not supported"),
    (request(top_k=1), "top_k: this parameter is not supported"),
    (request(stream="yes"), "stream: Input should be a valid boolean"),
    (request(stream=None), "stream: Input should not be null"),
    (request(system=[TEXT | {"text": ""}]), "system: text content blocks must be non-empty"),
    (request(system=[{"type": "image"}]), "system.0.type: Input should be 'text'"),
    (request(system=7), "system: Input should be a valid list"),
    (request(stop_sequences=["\n"]), "stop_sequences: each stop sequence must contain non-whitespace"),
    (request(metadata={"x": 1}), "metadata.x: Extra inputs"),
    (request(service_tier="best"), "service_tier: Input should be 'auto' or 'standard_only'"),
    (request(output_config={"effort": "huge"}), "output_config.effort: Input should be"),
    (request(thinking={"type": "enabled"}), "thinking.enabled.budget_tokens: Field required"),
    (request(thinking={"type": "enabled", "budget_tokens": 1}), "thinking.enabled.budget_tokens: Input"),
    (request(thinking={"type": "enabled", "budget_tokens": 2000}), "`max_tokens` must be greater"),
    (request(thinking={"type": "deep"}), "thinking.type: Input should be"),
    # messages
    ({"model": "m", "max_tokens": 1, "messages": []}, "messages: at least one message is required"),
    ({"model": "m", "max_tokens": 1, "messages": {}}, "messages: Input should be a valid list"),
    (request("hi"), "messages.0: Input should be a valid dictionary"),
    (request({"role": "user"}), "messages.0.content: Field required"),
    (request(user("a") | {"id": 1}), "messages.0.id: Extra inputs"),
    (request(model("hi")), 'messages: first message must use the "user" role'),
    (request(user("a"), {"role": "system", "content": "b"}), 'messages: Unexpected role "system"'),
    (request({"role": "tool", "content": "b"}), "messages.0.role: Input should be 'user' or 'assistant'"),
    (request(user("a"), user("b")), 'but found multiple "user" roles in a row'),
    (request(user("a"), model("b"), model("c"), user("d")), 'found multiple "assistant" roles in a row'),
    (request(user("")), "messages.0: user messages must have non-empty content"),
    (request({"role": "user", "content": []}), "messages.0: user messages must have non-empty content"),
    (request(user("a"), model(""), user("b")), "messages.1: assistant messages must have non-empty content"),
    (request(user(TEXT | {"text": ""})), "messages: text content blocks must be non-empty"),
    (request(user(TEXT | {"text": " \n"})), "messages: text content blocks must contain non-whitespace text"),
    (request(user(" ")), "messages: text content blocks must contain non-whitespace text"),
    (request(user({"type": "text"})), "messages.0.content.0.text.text: Field required"),
    (request(user(TEXT | {"x": 1})), "messages.0.content.0.text.x: Extra inputs are not permitted"),
    (request(user({"type": "hologram"})), "messages.0.content.0: Input tag 'hologram' found"),
    (request(user({"text": "x"})), "messages.0.content.0.type: Field required"),
    (request(user("a"), model("b ")), "final assistant content cannot end with trailing whitespace"),
    (request(user("a"), model("b")), "prefill not supported"),
    (request(user({"type": "image", "source": {"type": "base64", "media_type": "image/bmp"}})), "media_type"),
    (
        request(user({"type": "image", "source": PNG | {"data": "!"}})),
        "invalid base64 data",
    ),
    # tools in messages
    (request(user("a"), model(USE), user("b")), "`tool_use` ids were found without `tool_result` blocks"),
    (request(user("a"), model(USE)), "prefill not supported"),
    (request(user("a"), model(USE, SERVER_USE)), "`tool_use` ids were found without `tool_result` blocks"),
    (request(user("a"), model(USE, USE | {"id": "t2"}), user(RESULT)), "immediately after: t2."),
    (request(user(RESULT)), "messages.0.content.0: unexpected `tool_use_id` found in"),
    (
        request(user("a"), model(USE), user(RESULT), model("b"), user(RESULT)),
        "messages.4.content.0: unexpected `tool_use_id`",
    ),
    (request(user("a"), model(USE), user(RESULT, RESULT)), "each tool_use must have a single result"),
    (request(user("a"), model(USE), user(TEXT, RESULT)), "`tool_result` blocks must come before all other"),
    (request(user("a"), model(USE, USE), user(RESULT)), "`tool_use` ids must be unique"),
    (request(user("a"), model(USE), user(RESULT), model(USE), user(RESULT)), "`tool_use` ids must be unique"),
    (request(user("a"), model(USE | {"name": "b c"}), user(RESULT)), "tool_use.name: String should match"),
    (request(user("a"), model(USE | {"name": 7}), user(RESULT)), "tool_use.name: Input should be"),
    (request(user("a"), model(USE | {"id": "t 1"}), user(RESULT)), "tool_use.id: String should match"),
    (request(user("a"), model(USE | {"input": "x"}), user(RESULT)), "tool_use.input: Input should be"),
    (request(user("a"), model(RESULT), user("b")), "`tool_result` blocks can only be in `user` messages"),
    (request(user(USE)), "`tool_use` blocks can only be in `assistant` messages"),
    (
        request(user("a"), model(USE), user(RESULT | {"content": "", "is_error": True})),
        "content cannot be empty if `is_error` is true",
    ),
    (
        request(user("a"), model(USE), user(RESULT | {"content": [TEXT | {"text": ""}]})),
        "text content blocks must be non-empty",
    ),
    (request(user("a"), model(USE), user(RESULT | {"content": [USE]})), "tool_result.content.0.type: Input"),
    (request(user("a"), model(SERVER_USE), user("b")), "server tool use with id s1 was found without"),
    # tools
    (request(tools=[{"name": "bash"}]), "tools.0.custom.input_schema: Field required"),
    (request(tools=[{"input_schema": {}}]), "tools.0.custom.name: Field required"),
    (request(tools=[TOOL | {"name": "a b"}]), "tools.0.custom.name: String should match pattern"),
    (request(tools=[TOOL | {"description": 7}]), "tools.0.custom.description: Input should be"),
    (request(tools=[TOOL | {"access": "read"}]), "tools.0.custom.access: Extra inputs"),
    (request(tools=[TOOL | {"input_schema": {}}]), "tools.0.custom.input_schema.type: Field required"),
    (request(tools=[TOOL | {"input_schema": {"type": "string"}}]), "type: Input should be 'object'"),
    (request(tools=[TOOL | {"input_schema": {"type": "object", "anyOf": []}}]), "does not support oneOf"),
    (
        request(tools=[TOOL | {"input_schema": {"type": "object", "properties": {"a b": {}}}}]),
        "Property keys should match pattern",
    ),
    (request(tools=[TOOL, TOOL]), "tools: Tool names must be unique."),
    (request(tool_choice={"type": "any"}), "tool_choice may only be specified while providing tools"),
    (request(tools=[TOOL], tool_choice={"type": "tool", "name": "x"}), "Tool 'x' not found in"),
    (request(tools=[TOOL], tool_choice={"type": "some"}), "tool_choice.type: Input should be"),
    # cache
    (
        request(user(*[TEXT | {"cache_control": MARK}] * 4), cache_control=MARK),
        "A maximum of 4 blocks with cache_control may be provided. Found 5.",
    ),
    (request(cache_control={"type": "forever"}), "cache_control.type: Input should be 'ephemeral'"),
    (request(user(TEXT | {"cache_control": MARK | {"ttl": "2h"}})), "messages.0.content.0.cache_control.ttl"),
    (
        request(system=[TEXT | {"cache_control": MARK}], cache_control=MARK | {"ttl": "1h"}),
        "a ttl='1h' cache_control block must not come after a ttl='5m'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("value", "words"), BAD)
def test_bad_requests_are_refused_in_the_apis_words(value, words):
    """Status 400, and a sentence that names the place."""
    error = refusal(value)
    assert (error.status, error.kind) == (400, "invalid_request_error")
    assert words in error.text


def test_a_model_that_is_not_there():
    """Names that begin with no-such are unknown, all others are accepted."""
    error = refusal(request() | {"model": "no-such-model"})
    assert (error.status, error.kind, error.text) == (404, "not_found_error", "model: no-such-model")


def test_thinking_cannot_carry_a_breakpoint():
    """The API has no place for it there."""
    block = {"type": "thinking", "thinking": "x", "signature": "", "cache_control": MARK}
    error = refusal(request(user("a"), model(block), user("b")))
    assert "thinking.cache_control: Extra inputs" in error.text


@pytest.mark.parametrize("change", [{"thinking": "hm!"}, {"signature": "x"}, {"signature": ""}])
def test_changed_thinking_is_refused(change):
    """The signature is over the text and the model."""
    block = {"type": "thinking", "thinking": "hm", "signature": script_rules.signature("script", "hm")}
    script_rules.check_signatures(request(user("a"), model(block, TEXT), user("b")))
    with pytest.raises(ApiError, match="Invalid `signature` in `thinking` block"):
        script_rules.check_signatures(request(user("a"), model(block | change, TEXT), user("b")))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"a": "\xff"}', b'"x"', b'{"a": NaN}', b"[" * 100_000, b'{"a":"\\ud800"}']
)
def test_bodies_that_are_no_json_object(body):
    """Bad syntax, bad UTF-8 and endless nesting are 400."""
    with pytest.raises(ApiError) as caught:
        script_rules.parse(body)
    assert caught.value.status == 400


def test_a_body_over_32_megabytes():
    """413, before anything is read."""
    with pytest.raises(ApiError) as caught:
        script_rules.parse(b" " * (script_rules.MAX_BODY + 1))
    assert (caught.value.status, caught.value.kind) == (413, "request_too_large")


def test_counting_takes_fewer_fields():
    """count_tokens knows nothing of max_tokens and streams."""
    script_rules.check_count({"model": "m", "messages": [user("a")], "tools": [TOOL]})
    for field in ("max_tokens", "stream", "stop_sequences"):
        with pytest.raises(ApiError, match="Extra inputs are not permitted"):
            script_rules.check_count({"model": "m", "messages": [user("a")], field: 1})
