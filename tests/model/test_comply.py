"""The scripted endpoint against somebody else's idea of the Messages API: llm-comply and its OpenAPI file."""

import importlib.resources
import json
import warnings

import pytest
import trio

from llmprocd.model import script_http, script_rules
from llmprocd.model.script import Engine

llm_comply = pytest.importorskip("llm_comply")

from llm_comply import http as comply_http  # noqa: E402 - only if it is there
from llm_comply.tests import anthropic as comply_tests  # noqa: E402

KEY = {"x-api-key": "script"}
SPEC = str(importlib.resources.files(llm_comply) / "specs" / "anthropic.json")


@pytest.fixture(scope="module")
def spec():
    """The schemas of the API, as others wrote them down."""
    return llm_comply.SpecLoader(SPEC)


def faults(spec, value, name):
    """What the schema of this name says against a value."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # it resolves references in jsonschema's older way
        return spec.validate(value, name)


@pytest.mark.parametrize("case", comply_tests.ANTHROPIC_TESTS, ids=lambda case: case.id)
async def test_its_server_checks_pass(case, nursery):
    """Each of its checks, over real HTTP; none is skipped."""
    served = await nursery.start(script_http.serve, Engine())
    config = llm_comply.ComplianceConfig(served.url + "/v1", "key", model="claude-opus-5-5", spec_path=SPEC)
    result = await trio.to_thread.run_sync(run_case, config, case)
    assert (result.status, result.errors) == (llm_comply.TestStatus.PASSED, [])
    nursery.cancel_scope.cancel()


def run_case(config, case):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return llm_comply.TestRunner(config, [case], llm_comply.SpecLoader(SPEC)).run_one(case)
    finally:
        comply_http.close_client()


SCRIPTS = [
    "hello",
    "!say hi\n!& bash ls",
    "!think hm\n!& say hi",
    "!say hi\n!stop pause_turn",
    "!stop refusal",
    "!say hi\n!stop max_tokens",
    "!empty",
    '!raw {"type": "redacted_thinking", "data": "x"}',
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_answers_are_valid(spec, script):
    """Whole messages and each event of a stream have all fields and no wrong one."""
    request = {"model": "m", "max_tokens": 99, "messages": [{"role": "user", "content": script}]}
    body = json.dumps(request).encode()
    assert (
        faults(spec, json.loads(Engine().answer("POST", "/v1/messages", KEY, body, 0.0).body), "Message")
        == []
    )
    stream = Engine().answer(
        "POST", "/v1/messages", KEY, json.dumps(request | {"stream": True}).encode(), 0.0
    )
    for line in stream.body.decode().splitlines():
        if line.startswith("data: ") and '"ping"' not in line:
            assert faults(spec, json.loads(line.removeprefix("data: ")), "MessageStreamEvent") == [], line


def test_the_pause_goes_on_with_a_valid_message(spec):
    """The result of the server tool too."""
    messages = [{"role": "user", "content": "!stop pause_turn\n!say on"}]
    for _ in range(2):
        body = json.dumps({"model": "m", "max_tokens": 99, "messages": messages}).encode()
        message = json.loads(Engine().answer("POST", "/v1/messages", KEY, body, 0.0).body)
        assert faults(spec, message, "Message") == []
        messages.append({"role": "assistant", "content": message["content"]})


@pytest.mark.parametrize(("script", "status"), [("!fail 529", 529), ("!fail 429", 429), ("!nonsense !", 400)])
def test_errors_are_valid(spec, script, status):
    """An error is an error object with a type the schema knows."""
    body = json.dumps(
        {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": script}]}
    ).encode()
    answer = Engine().answer("POST", "/v1/messages", KEY, body, 0.0)
    assert answer.status == status
    assert faults(spec, json.loads(answer.body), "ErrorResponse") == []


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        ("GET", "/v1/models", "ListResponse_ModelInfo_"),
        ("GET", "/v1/models/script", "ModelInfo"),
        ("POST", "/v1/messages/count_tokens", "CountMessageTokensResponse"),
    ],
)
def test_the_other_endpoints_are_valid(spec, method, path, name):
    """Lists, models and counts."""
    body = b'{"model": "m", "messages": [{"role": "user", "content": "x"}]}'
    answer = Engine().answer(method, path, KEY, body, 0.0)
    assert faults(spec, json.loads(answer.body), name) == []


USE = {"type": "tool_use", "id": "t1", "name": "bash", "input": {"command": "ls"}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "ok", "is_error": False}
TEXT = {"type": "text", "text": "x"}
MARK = {"type": "ephemeral", "ttl": "1h"}
PLAIN = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}]}
LONG = [
    {"role": "user", "content": [TEXT | {"cache_control": MARK}]},
    {"role": "assistant", "content": [TEXT, USE]},
    {"role": "user", "content": [RESULT, TEXT]},
]
TOOL = {"name": "bash", "description": "runs", "input_schema": {"type": "object", "properties": {}}}


@pytest.mark.parametrize(
    "request_body",
    [
        PLAIN,
        PLAIN | {"messages": LONG, "tools": [TOOL], "tool_choice": {"type": "auto"}, "stream": True},
        PLAIN | {"system": [TEXT], "cache_control": MARK, "stop_sequences": ["a"]},
        PLAIN | {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
    ],
)
def test_good_requests_are_good_for_both(spec, request_body):
    """What the schema allows and the API takes, the endpoint takes."""
    assert faults(spec, request_body, "CreateMessageParams") == []
    script_rules.check_create(request_body)


@pytest.mark.parametrize(
    "change",
    [
        {"foo": 1},
        {"max_tokens": "9"},
        {"max_tokens": -1},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]},
        {"messages": [{"role": "user", "content": [TEXT | {"x": 1}]}]},
        {"messages": [{"role": "user", "content": "x", "id": 3}]},
        {"tools": [TOOL | {"name": "a b"}]},
        {"tools": [{"name": "bash"}]},
        {"tools": [TOOL | {"input_schema": {"type": "array"}}]},
        {"tools": [TOOL | {"access": "read"}]},
        {"tool_choice": {"type": "some"}},
        {"cache_control": {"type": "ephemeral", "ttl": "2h"}},
        {"thinking": {"type": "deep"}},
        {"service_tier": "best"},
        {"output_config": {"effort": "huge"}},
        {"stream": "yes"},
    ],
)
def test_bad_requests_are_bad_for_both(spec, change):
    """What the schema forbids, the endpoint refuses."""
    assert faults(spec, PLAIN | change, "CreateMessageParams") != []
    with pytest.raises(script_rules.ApiError):
        script_rules.check_create(PLAIN | change)
