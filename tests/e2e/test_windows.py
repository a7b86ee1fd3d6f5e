"""The context window: how full it is, who is told, and what happens when it is full.

The endpoint of these tests has a window of 6,000 tokens, counts, and says so.
"""

import json

import pytest
from e2ekit import Daemon, Strict, program, script, use

WINDOW = 6000
WORDS = "eight of these words make about ten tokens, " * 12
"""A text of some 130 tokens."""

TALK = program()
TOOLS = program("bash", "goto")


@pytest.fixture(scope="module")
def narrow():
    """An endpoint with a small window."""
    endpoint = Strict("--window", str(WINDOW))
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="module")
def place(narrow, tmp_path_factory):
    """A daemon that has learned of that window."""
    daemon = Daemon(tmp_path_factory.mktemp("narrow"), narrow.url)
    daemon.start()
    with daemon.client() as client:
        pid = client.spawn(TALK, interactive=True)
        client.run(pid, "!say hello")
        client.until(pid, lambda row: row["context_window"] == WINDOW)
    yield daemon
    daemon.close()


@pytest.fixture
def client(place, narrow):
    """A connection; no process of an earlier test lives."""
    narrow.reset()
    with place.client() as connection:
        yield connection
        place.sweep(connection)


def notices(body):
    """The notices in a request, in order: how full, and the kinds of the blocks before it in its message."""
    found = []
    for message in json.loads(body)["messages"]:
        kinds = []
        for block in message["content"]:
            text = block.get("text", "")
            if text.startswith("<context_notice"):
                found.append((text.partition('used="')[2].partition("%")[0], kinds))
            kinds = [*kinds, block["type"]]
    return found


def fill(client, pid, tokens):
    """Talk until so many tokens are there."""
    while client.get(pid)["context_tokens"] < tokens:
        client.run(pid, f"!say {WORDS}")


def test_the_window_is_what_the_endpoint_says(client):
    """The table would say a million. CTX% is the tokens of the last answer over that."""
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, f"!say {WORDS}")
    row = client.get(pid)
    usage = row["usage"]
    assert row["context_window"] == WINDOW
    assert row["context_tokens"] == sum(usage.values())
    (listed,) = client.call("proc.list", pids=[pid])["procs"]
    assert listed["context_window"] == WINDOW


def test_a_process_is_told_once_at_each_threshold(client, narrow):
    """At 80 and at 95 per cent, beside its next message, in the words of the tools it has."""
    pid = client.spawn(TOOLS, interactive=True)
    fill(client, pid, 0.94 * WINDOW)
    client.run(pid, f"!say {WORDS}")
    (first, kinds), (second, _) = notices(narrow.bodies()[-1])
    assert 80 <= int(first) < 95 <= int(second) <= 100
    assert kinds == ["text"]
    assert "use goto" in narrow.bodies()[-1]
    assert client.get(pid)["status"] is None
    assert all(not notices(body) for body in narrow.bodies()[:3])


def test_a_notice_stands_beside_tool_results_too(client, narrow):
    """In the same message, after them."""
    pid = client.spawn(program("bash"), interactive=True)
    fill(client, pid, 0.6 * WINDOW)
    client.run(pid, "!bash seq 1 1000\n!say done")
    ((_, kinds),) = notices(narrow.bodies()[-1])
    assert kinds == ["tool_result"]


def test_near_a_threshold_the_endpoint_is_asked_to_count(client, narrow):
    """And only there: far from it the estimate is good enough."""
    pid = client.spawn(TALK, interactive=True)
    fill(client, pid, 0.4 * WINDOW)
    assert counted(narrow) == 0
    fill(client, pid, 0.8 * WINDOW)
    assert counted(narrow) > 0


def counted(endpoint):
    return sum(one["target"] == "/v1/messages/count_tokens" for one in endpoint._ask("requests"))


def test_goto_makes_room_and_the_notice_comes_again(client, narrow):
    """The conversation is as long as its path."""
    pid = client.spawn(TOOLS, interactive=True)
    client.run(pid, f"!say {WORDS}")
    early = client.history(pid)[-1]["id"]
    before = client.get(pid)["context_tokens"]
    fill(client, pid, 0.8 * WINDOW)
    client.run(pid, "!say told")
    assert len(notices(narrow.bodies()[-1])) == 1
    client.call("proc.goto", pid=pid, to=early)
    assert client.get(pid)["context_tokens"] == before
    fill(client, pid, 0.8 * WINDOW)
    client.run(pid, "!say told")
    assert len(notices(narrow.bodies()[-1])) == 1


def test_a_model_acts_on_the_notice(client, narrow):
    """It travels back with a summary, and goes on with most of the window free."""
    pid = client.spawn(TOOLS, interactive=True)
    client.run(pid, f"!say {WORDS}")
    early = client.history(pid)[-1]["id"]
    fill(client, pid, 0.75 * WINDOW)
    back = use("goto", position=early, message="what was learned: nothing")
    client.run(pid, script("!bash seq 1 700", back))
    assert client.get(pid)["context_tokens"] < WINDOW / 2
    assert "what was learned" in narrow.bodies()[-1]


def test_an_overflow_is_e2big_and_the_conversation_goes_on_after_goto(client, narrow):
    """An interactive process rests with a sentence; nothing of its history is lost or broken."""
    pid = client.spawn(TALK, interactive=True)
    fill(client, pid, 0.9 * WINDOW)
    early = client.history(pid)[1]["id"]
    result = client.run(pid, "too much " * 800)
    row = client.rests(pid)
    assert result["stop_reason"] == "error"
    assert row["reason"].startswith("E2BIG: ")
    assert "goto" in row["reason"]
    assert row["reason"].count("\n") == 0
    assert client.read(pid, 2).decode().strip() == row["reason"]
    client.call("proc.goto", pid=pid, to=early)
    assert client.run(pid, "!say there is room")["message"] == "there is room"
    assert [text for text in narrow.refusals() if "prompt is too long" not in text] == []


def test_a_process_with_a_closed_input_exits_1(client):
    """It cannot be told to go anywhere; its history stays, and can be forked."""
    long = program(file_descriptor={"enabled": False})
    pid, row = client.finish(long, "far too much " * 3000)
    assert row["status"] == 1
    assert client.get(pid)["reason"].startswith("E2BIG: ")


def test_an_answer_that_fills_the_window_is_kept(client, narrow):
    """The endpoint cuts it off, says so, and that is E2BIG as well; after goto it goes on."""
    pid = client.spawn(TALK, interactive=True)
    fill(client, pid, 0.3 * WINDOW)
    early = client.history(pid)[1]["id"]
    result = client.run(pid, "!say and on and on\n!stop model_context_window_exceeded")
    row = client.rests(pid)
    assert result["stop_reason"] == "model_context_window_exceeded"
    assert row["reason"].startswith("E2BIG: ")
    assert "and on and on" in client.history(pid)[-1]["content"][0]["text"]
    client.call("proc.goto", pid=pid, to=early)
    assert client.run(pid, "!say there is room")["message"] == "there is room"


def test_the_operator_knows_better(narrow, tmp_path):
    """A window in the config holds over table and endpoint."""
    daemon = Daemon(tmp_path / "own", narrow.url)
    daemon.config.write_text(daemon.config.read_text() + '[windows]\n"claude-sonnet-5-5" = 3000\n')
    daemon.start()
    with daemon.client() as client:
        pid = client.spawn(TALK, interactive=True)
        client.run(pid, "!say hi")
        assert client.get(pid)["context_window"] == 3000
        client.signal(pid, "KILL")
    daemon.close()


def test_an_unknown_model_has_no_window(client):
    """Nothing is guessed: CTX% is `-`."""
    pid = client.spawn(program(model={"name": "some-model"}), interactive=True)
    client.run(pid, "!say hi")
    assert client.get(pid)["context_window"] is None


def test_an_endpoint_that_has_none_of_it_is_as_good(tmp_path):
    """No list of models, no counting, no diagnostics: table and estimate stand in, and the calls go on."""
    endpoint = Strict("--without", "models", "--without", "count_tokens", "--without", "diagnostics")
    daemon = Daemon(tmp_path / "bare", endpoint.url)
    daemon.config.write_text(daemon.config.read_text() + '[windows]\n"claude-sonnet-5-5" = 3000\n')
    daemon.start()
    with daemon.client() as client:
        pid = client.spawn(TALK, interactive=True)
        fill(client, pid, 0.8 * 3000)
        assert client.run(pid, "!say told")["message"] == "told"
        assert len(notices(endpoint.bodies()[-1])) == 1
        assert client.get(pid)["reason"] == ""
        client.signal(pid, "KILL")
    asked = [one for one in endpoint.requests() if "diagnostics" in one["body"]]
    assert len(asked) == len([text for text in endpoint.refusals() if "diagnostics" in text]) == 1
    assert counted(endpoint) == 1
    daemon.close()
    endpoint.close()
