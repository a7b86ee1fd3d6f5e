"""A real model on this machine, through the whole daemon.

Only when asked for (LLMPROC_TEST_LOCAL=1), and only with weights that `llmprocctl local up` has fetched
before: half a gigabyte and minutes of all cores are nobody's idea of a test.
"""

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from e2ekit import PATIENCE, Client

from llmprocd.abi import paths
from llmprocd.abi.weights import MODELS

WEIGHTS = Path(paths.cache_dir(os.environ, os.getuid()), MODELS["0.5b"].file)
THREADS = int(os.environ.get("LLMPROC_TEST_THREADS", "0"))

if os.environ.get("LLMPROC_TEST_LOCAL") != "1":
    pytest.skip("LLMPROC_TEST_LOCAL is not 1", allow_module_level=True)
pytest.importorskip("xllamacpp", reason="the extra 'local' is not installed")
if not WEIGHTS.exists():
    pytest.skip(f"no weights at {WEIGHTS} (llmprocctl local up)", allow_module_level=True)

PROGRAM = {
    "model": {"name": "local", "provider": "local", "max_iterations": 6},
    "parameters": {"max_tokens": 80, "temperature": 0},
    "prompt": {"system": "You answer briefly."},
    "tools": {"builtin": ["calculator"]},
    "file_descriptor": {"enabled": False},
}
FACTS = " ".join(f"Box {number} holds {number * 7 % 50} marbles." for number in range(40))


@pytest.fixture(scope="module")
def serving(house):
    """The daemon of the module, with the model up."""
    with house.client() as client:
        client.sock.settimeout(10 * PATIENCE)
        up(client)
    return house


@pytest.fixture
def local(serving):
    with serving.client() as client:
        client.sock.settimeout(10 * PATIENCE)
        yield client


def up(client: Client):
    return client.call("local.up", model="0.5b", path=str(WEIGHTS), threads=THREADS)


def call_of(pid, client):
    """The last model call's tokens: read from the cache, and anew."""
    row = client.get(pid)["cache"]
    return row["read"], row["prompt"] - row["read"]


def test_a_conversation_with_a_tool_call(local):
    """It asks for the tool, with arguments that fit, and says what came of it."""
    pid = local.spawn(PROGRAM, interactive=True)
    result = local.run(pid, "Compute 1234*5678 with the calculator.")
    assert result["stop_reason"] == "end_turn"
    assert [(call["name"], call["is_error"]) for call in result["tool_calls"]] == [("calculator", False)]
    assert "7006652" in result["message"].replace(",", "")
    assert result["usage"]["output_tokens"] > 0


def test_a_fork_begins_where_its_parent_stands(local):
    """Of what parent and children have in common, all is read from the server's memory."""
    parent = local.spawn(PROGRAM, interactive=True)
    local.run(parent, f"{FACTS}\nHow many marbles are in box 3?")
    whole = local.get(parent)["context_tokens"]
    for child in local.call("proc.fork", pid=parent, prompts=["And in box 5?", "And in box 9?"])["pids"]:
        local.rests(child)
        read, anew = call_of(child, local)
        assert read > 0.9 * whole
        assert anew < 60


def test_its_window_and_its_state_are_shown(local):
    """CTX% has something to divide by."""
    pid = local.spawn(PROGRAM, interactive=True)
    local.run(pid, "Say hello.")
    assert local.get(pid)["context_window"] == 8192
    assert local.call("sys.status")["local"]["state"] == "up"


def test_the_port_is_of_no_use_without_the_key(local):
    """Others on this machine can reach it."""
    url = local.call("local.status")["url"]
    body = json.dumps({"model": "local", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]})
    request = urllib.request.Request(
        f"{url}/v1/messages", body.encode(), {"content-type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=PATIENCE)
    refused.value.close()
    assert refused.value.code == 401


def test_it_ends_with_the_daemon_and_comes_back_with_it(serving, local):
    """kill -9: nothing is left running, and a conversation goes on without a hand."""
    pid = local.spawn(PROGRAM, interactive=True)
    server = local.call("local.status")["pid"]
    local.run(pid, "Say hello.")
    serving.kill()
    serving.start()
    with serving.client() as client:
        client.sock.settimeout(10 * PATIENCE)
        assert client.run(pid, "Say hello again.")["stop_reason"] == "end_turn"
        assert client.call("local.status")["state"] == "up"
        assert client.call("local.status")["pid"] != server
    assert not Path(f"/proc/{server}").exists()
