"""What the API can answer goes back to it as it came: in tool turns, forks, after goto, exec and a restart.

What is compared are the bytes that the endpoint received, cache markers apart.
"""

import json

import msgspec
import pytest
from e2ekit import program, script

from llmprocd.model import script_cache

CITED = {
    "type": "text",
    "text": "The sky is blue.",
    "citations": [
        {"type": "char_location", "cited_text": "blue é", "document_index": 0, "document_title": None,
         "start_char_index": 0, "end_char_index": 6},
        {"type": "web_search_result_location", "cited_text": "x", "encrypted_index": "Eo8=", "title": "t",
         "url": "https://example.org/"},
    ],
}  # fmt: skip
SEARCHED = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "sky"}}
FOUND = {
    "type": "web_search_tool_result",
    "tool_use_id": "srvtoolu_1",
    "content": [
        {"type": "web_search_result", "url": "https://e.org", "encrypted_content": "AbC/+=", "title": "é"}
    ],
    "caller": {"type": "direct"},
}
REDACTED = {"type": "redacted_thinking", "data": "EmwKAhgB+/=="}
UNKNOWN = {
    "type": "hologram_v9",
    "shape": {"z": 1, "a": [1.50, None, "\u2028\\"]},
    "signature": "s",
    "empty": {},
}
MCP = {"type": "mcp_tool_use", "id": "mcptoolu_1", "name": "q", "server_name": "s", "input": {}}

ALL = [REDACTED, SEARCHED, FOUND, CITED, UNKNOWN, MCP]
WHOLE = [REDACTED, FOUND, UNKNOWN, MCP]
"""Those that come without deltas: they are kept to the byte."""

ANSWER = "\n!& ".join(["!think hm, let me see", *(f"!raw {json.dumps(block)}" for block in ALL)])
TOOLS = program("calculator", "fork", "goto")


def messages(body):
    """The messages of a request, each in its own bytes."""
    raws = msgspec.json.decode(body.encode(), type=dict[str, msgspec.Raw])["messages"]
    found = msgspec.json.decode(raws, type=list[msgspec.Raw])
    return [script_cache.MARK_AND_COMMA.sub(b"", bytes(raw)) for raw in found]


def kept(strict, count):
    """The first messages of every request that has so many: they must be the same in all."""
    heads = [messages(body)[:count] for body in strict.bodies() if len(messages(body)) >= count]
    assert heads.count(heads[0]) == len(heads)
    return heads[0]


@pytest.fixture
def client(house, strict):
    """A connection. The strict endpoint judges alone: no description of the API has tomorrow's blocks."""
    strict.reset()
    with house.client() as connection:
        yield connection
        house.sweep(connection)
    assert strict.refusals() == [], "the endpoint refused what a process sent"


@pytest.fixture
def answered(client):
    """A process that was answered with everything: in a tool turn, and at the end of its run."""
    pid = client.spawn(TOOLS, interactive=True)
    client.run(pid, script(f'{ANSWER}\n!& !calculator {{"expression":"6*7"}}', ANSWER.replace("_1", "_2")))
    return pid


def check(strict, count):
    """Every block that was sent is there, in order and to the byte."""
    first = kept(strict, count)[1]
    for block in WHOLE:
        assert msgspec.json.encode(block) in first
    content = msgspec.json.decode(first)["content"]
    assert [block["type"] for block in content] == ["thinking", *(block["type"] for block in ALL), "tool_use"]
    assert content[1:3] == ALL[:2] or content[2]["input"] == SEARCHED["input"]
    assert content[4] == CITED
    assert content[0]["thinking"] == "hm, let me see"


def test_in_tool_turns_and_later_turns(client, strict, answered):
    """The answer that asked for a tool goes back with its result, and all of it in later turns."""
    check(strict, 2)
    client.run(answered, "!say on")
    assert len(strict.requests()) == 3
    check(strict, 4)


def test_in_forks(client, strict, answered):
    """The child sends what its parent was sent."""
    children = client.call("proc.fork", pid=answered, prompts=["!say a", "!say b"])["pids"]
    for child in children:
        client.rests(child)
    assert len(strict.requests()) == 4
    check(strict, 4)


def test_after_goto(client, strict, answered):
    """Back to a message that everything was in."""
    at = client.history(answered)[-1]["id"]
    client.run(answered, "!say on")
    client.call("proc.goto", pid=answered, to=at, text="!say again")
    client.rests(answered)
    check(strict, 4)


def test_after_exec_with_the_same_model(client, strict, answered):
    """Another program of the same model can read it all."""
    client.call("proc.exec", pid=answered, program=program("calculator", prompt={"system": "new"}))
    client.run(answered, "!say on")
    check(strict, 4)


def test_after_exec_with_another_model_only_its_thinking_is_gone(client, strict, answered):
    """What only the old model can read is left out; all else stays to the byte."""
    other = program("calculator", model={"name": "claude-opus-5-5"})
    client.call("proc.exec", pid=answered, program=other)
    client.run(answered, "!say on")
    answer = messages(strict.bodies()[-1])[1]
    kinds = [block["type"] for block in msgspec.json.decode(answer)["content"]]
    assert kinds == [*(block["type"] for block in ALL[1:]), "tool_use"]
    for block in (FOUND, UNKNOWN, MCP):
        assert msgspec.json.encode(block) in answer


def test_after_a_restart(fresh, strict):
    """From the disk come the same bytes."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TOOLS, interactive=True)
        client.run(pid, script(f'{ANSWER}\n!& !calculator {{"expression":"6*7"}}', "!say done"))
    fresh.restart()
    with fresh.client() as client:
        client.run(pid, "!say on")
        client.signal(pid, "KILL")
    check(strict, 4)


@pytest.mark.parametrize(
    ("reason", "calls", "status"),
    [
        ("end_turn", 1, 0),
        ("max_tokens", 1, 0),
        ("stop_sequence", 1, 0),
        ("refusal", 1, 0),
        ("pause_turn", 2, 0),
        ("model_context_window_exceeded", 1, 1),
        ("something_new", 1, 0),
    ],
)
def test_every_stop_reason_has_its_effect(client, strict, reason, calls, status):
    """The run ends with it and the process with its status; a pause goes on instead."""
    pid, row = client.finish(TOOLS, f"!say so\n!stop {reason}\n!say next")
    assert row["status"] == status
    assert client.get(pid)["turns"] == len(strict.requests()) == calls
    assert client.get(pid)["stop_reason"] == ("end_turn" if reason == "pause_turn" else reason)


def test_malformed_input_is_an_error_result_and_never_empty(client, strict):
    """The model reads that its arguments did not arrive whole; the tool was not run."""
    pid, row = client.finish(TOOLS, "!badjson calculator\n!say on")
    assert row["message"] == "on"
    (result,) = json.loads(strict.bodies()[-1])["messages"][-1]["content"]
    assert result["is_error"] is True
    assert "malformed" in result["content"]
    assert client.types(pid).count("tool_start") == 0
