"""Model endpoints that others wrote, and that break on purpose, against the real daemon.

`llmock` (PyPI) queues faults and then judges its client: whether it heeded Retry-After, retried what cannot
succeed, stormed, or took a part of an answer for the whole. `@copilotkit/aimock` (npm) cuts streams and
connections of another kind. Both are looked for in the folder $LLMPROC_FOREIGN:

    python3 -m venv $LLMPROC_FOREIGN && $LLMPROC_FOREIGN/bin/pip install llmock
    npm install --prefix $LLMPROC_FOREIGN @copilotkit/aimock
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from e2ekit import PATIENCE, Daemon, program, texts

FOREIGN = Path(os.environ.get("LLMPROC_FOREIGN", Path.home() / ".cache" / "llmproc-foreign"))
LLMOCK = FOREIGN / "bin" / "llmock"
AIMOCK = FOREIGN / "node_modules" / "@copilotkit" / "aimock" / "dist" / "cli.js"
KEY = "sk-foreign-5d2f"


def installed(path, how):
    return pytest.mark.skipif(not path.exists(), reason=f"{path} is not there: {how}")


needs_llmock = installed(LLMOCK, "pip install llmock, in a venv at $LLMPROC_FOREIGN")
needs_aimock = installed(AIMOCK, "npm install --prefix $LLMPROC_FOREIGN @copilotkit/aimock")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Foreign:
    """A server as a process of its own; `at` is where its Messages API is."""

    def __init__(self, command, at=""):
        deadline = time.monotonic() + PATIENCE
        while not self._starts(command, deadline):
            assert time.monotonic() < deadline, f"{command[0]} does not answer"
        self.url = self.root + at

    def _starts(self, command, deadline):
        """Start it on a port that was free a moment ago; does it answer?"""
        port = free_port()
        self.root = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.ask("/health")
                return True
            time.sleep(0.1)
        return False

    def ask(self, path, value=None, **headers):
        data = None if value is None else json.dumps(value).encode()
        headers["Content-Type"] = "application/json"
        request = urllib.request.Request(self.root + path, data, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.loads(answer.read() or b"null")

    def close(self):
        self.process.terminate()
        self.process.wait(PATIENCE)


def housed(foreign, folder, **settings):
    """A daemon whose config pairs the foreign endpoint with a key."""
    daemon = Daemon(folder, "http://127.0.0.1:9")
    lines = [f"{name} = {value}" for name, value in {"retry_s": 60, "stall_s": 4, **settings}.items()]
    lines += [f'[endpoints."{foreign.url}"]', 'api_key_env = "FOREIGN_KEY"']
    daemon.config.write_text("\n".join(lines) + "\n")
    return daemon.start(FOREIGN_KEY=KEY)


@contextlib.contextmanager
def both(command, folder, at="", **settings):
    """A foreign server, a daemon that may call it, and a client of that."""
    foreign = Foreign(command, at)
    daemon = housed(foreign, folder, **settings)
    try:
        with daemon.client() as client:
            yield foreign, client
            daemon.sweep(client)
    finally:
        daemon.close()
        foreign.close()


def at(foreign, *tools, **tables):
    whole = {"enabled": False}  # else `read_fd` is offered, and a foreign model calls whatever is offered
    more = {"parameters": {"max_tokens": 300}, "file_descriptor": whole, **tables}
    return program(*tools, model={"base_url": foreign.url}, **more)


def talk(client, foreign, *tools, **tables):
    return client.call("proc.spawn", program=at(foreign, *tools, **tables), interactive=True)["pid"]


def run(client, pid, prompt):
    return client.call("proc.run", pid=pid, prompt=prompt)


def attempts(client, pid):
    """The numbers of all attempts so far, call by call."""
    return [event["attempt"] for event in client.events(pid, types=["api_request"])]


# --- llmock -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llmock(tmp_path_factory):
    command = [LLMOCK, "serve", "--log-level", "error", "--response-style", "varied"]
    command += ["--stream-chunk-delay-ms", "20"]  # it judges who hangs up; not if it has sent all by then
    with both(command, tmp_path_factory.mktemp("llmock"), "/anthropic", retries=4) as pair:
        yield pair


@pytest.fixture
def judged(llmock):
    """The pair; when the test ends llmock must have nothing to say against its client."""
    foreign, _ = llmock
    foreign.ask("/_llmock/reset", {})
    yield llmock
    verdict = foreign.ask("/_llmock/verdict")
    assert verdict["findings"] == [], verdict


def plan(foreign, *behaviors):
    foreign.ask("/_llmock/scenario", {"behaviors": list(behaviors)})


def fail(status, **more):
    return {"type": "fail", "status": status, **more}


def cut(kind, **more):
    return {"type": "stream_fault", "kind": kind, "after_chunks": 3, **more}


PASSING = {
    "rate limit that names a time": [fail(429, retry_after=1, times=2)],
    "rate limit": [fail(429)],
    "overloaded": [fail(529)],
    "server error": [fail(500, times=2)],
    "unavailable": [fail(503, retry_after=1)],
    "timeout": [fail(408)],
    "conflict": [fail(409)],
    "connection dropped": [cut("disconnect", times=2)],
    "stream that ends early": [cut("truncate", times=2)],
    "chunk that is no JSON": [cut("malformed")],
    "stall": [cut("stall", stall_seconds=60)],
    "one after another": [fail(429, retry_after=0.5), cut("truncate"), cut("disconnect")],
}


@needs_llmock
@pytest.mark.parametrize("faults", PASSING)
def test_a_fault_that_passes_is_outlived(judged, faults):
    """The answer is that of a server without faults; nothing of a broken one is in the conversation."""
    foreign, client = judged
    pid = talk(client, foreign)
    whole = run(client, pid, "Tell me of the sea.")["message"]
    foreign.ask("/_llmock/reset", {})
    plan(foreign, *PASSING[faults])
    again = talk(client, foreign)
    result = run(client, again, "Tell me of the sea.")
    assert (result["message"], result["stop_reason"]) == (whole, "end_turn")
    struck = sum(fault.get("times", 1) for fault in PASSING[faults])
    assert attempts(client, again) == list(range(1, struck + 2))
    assert len(client.history(again)) == 2
    assert run(client, again, "And of the land?")["stop_reason"] == "end_turn"


@needs_llmock
@pytest.mark.parametrize(
    ("status", "errno"),
    [(400, "EINVAL"), (401, "EACCES"), (403, "EACCES"), (404, "ENOENT"), (413, "E2BIG"), (422, "EINVAL")],
)
def test_a_refusal_is_final_and_the_conversation_goes_on(judged, status, errno):
    """Asked once; one sentence with an errno; and the next message is answered."""
    foreign, client = judged
    pid = talk(client, foreign)
    plan(foreign, fail(status))
    assert run(client, pid, "Tell me of the sea.")["stop_reason"] == "error"
    assert attempts(client, pid) == [1]
    told = client.read(pid, 2).decode()
    assert told.startswith(f"{errno}: ")
    assert f"{foreign.root} answered {status}" in told
    assert told.count("\n") == 1
    assert run(client, pid, "Once more?")["stop_reason"] == "end_turn"


@needs_llmock
def test_an_outage_is_final_after_the_configured_retries(llmock):
    """A server that is down for good: five attempts, an errno, and after the repair it goes on."""
    foreign, client = llmock
    foreign.ask("/_llmock/reset", {})
    pid = talk(client, foreign)
    plan(foreign, cut("disconnect", times=None))
    assert run(client, pid, "Tell me of the sea.")["stop_reason"] == "error"
    assert attempts(client, pid) == [1, 2, 3, 4, 5]
    assert client.read(pid, 2).startswith(b"EIO: ")
    foreign.ask("/_llmock/reset", {})
    assert run(client, pid, "Tell me of the sea.")["stop_reason"] == "end_turn"


@needs_llmock
@pytest.mark.parametrize("kind", [None, "malformed_arguments", "unknown_tool"])
def test_calls_that_a_foreign_model_makes(judged, kind):
    """A call is run; one that is broken is an error result; the model reads either and goes on."""
    foreign, client = judged
    pid = talk(client, foreign, "list_dir")
    if kind:
        plan(foreign, {"type": "tool_fault", "kind": kind})
    result = run(client, pid, "List the directory.")
    assert result["stop_reason"] == "end_turn"
    assert len(result["tool_calls"]) >= 1
    if kind:
        assert result["tool_calls"][0]["is_error"]


@needs_llmock
def test_a_stream_that_dies_in_a_tool_call_runs_no_tool(judged):
    foreign, client = judged
    call = {"name": "calculator", "arguments": {"expression": "6*7"}}
    plan(
        foreign, {"type": "reply", "tool_calls": [call]}, cut("truncate"), {"type": "reply", "text": "later"}
    )
    pid = talk(client, foreign, "calculator")
    assert run(client, pid, "What is six times seven?")["stop_reason"] == "end_turn"
    assert attempts(client, pid)[:2] == [1, 2]
    assert client.types(pid).count("tool_start") == len(client.results(pid))


@needs_llmock
def test_a_quota_is_learned_and_kept_to(tmp_path):
    """Requests and tokens a minute, told in headers: more processes than that are all answered."""
    command = [LLMOCK, "serve", "--log-level", "error", "--rpm", "120", "--tool-mode", "off"]
    with both(command, tmp_path, "/anthropic") as (foreign, client):
        pids = [
            client.call("proc.spawn", program=at(foreign), prompt=f"Tell me of sea {number}.")["pid"]
            for number in range(130)
        ]
        ended = client.wait(*pids)
        assert {row["status"] for row in ended} == {0}
        (row,) = [row for row in client.call("sys.status")["scheduler"] if row["endpoint"] == foreign.url]
        assert row["rpm"] == 120
        assert row["rpm_left"] < 20
        findings = {finding["kind"] for finding in foreign.ask("/_llmock/verdict")["findings"]}
        assert findings == set()


@needs_llmock
def test_a_full_context_is_e2big_and_goto_helps(tmp_path):
    command = [LLMOCK, "serve", "--log-level", "error", "--context-window", "2000"]
    with both(command, tmp_path, "/anthropic") as (foreign, client):
        pid = talk(client, foreign)
        run(client, pid, "Tell me of the sea.")
        head = client.call("proc.history", pid=pid)["head"]
        assert run(client, pid, "word " * 4000)["stop_reason"] == "error"
        assert client.read(pid, 2).startswith(b"E2BIG: ")
        client.call("proc.goto", pid=pid, to=head)
        assert run(client, pid, "And of the land?")["stop_reason"] == "end_turn"


# --- aimock -----------------------------------------------------------------------------------------

WHOLE = "The sea is wide, and the ships on it are small; whoever sails it knows that."
FIXTURES = {
    "fixtures": [
        {"match": {"userMessage": "plain"}, "response": {"content": WHOLE}},
        *(
            {"match": {"userMessage": text, "sequenceIndex": number}, "response": {"content": WHOLE}, **more}
            for text, faults in {
                "cut": [{"truncateAfterChunks": 3}, {"truncateAfterChunks": 5}, {}],
                "gone": [{"disconnectAfterMs": 40, "latency": 30}, {}],
                "garbled": [{"chaos": {"malformedRate": 1}}, {}],
                "dropped": [{"chaos": {"disconnectRate": 1}}, {"chaos": {"dropRate": 1}}, {}],
            }.items()
            for number, more in enumerate(faults)
        ),
        {
            "match": {"userMessage": "limit", "sequenceIndex": 0},
            "response": {"error": {"message": "Slow down", "type": "rate_limit_error"}, "status": 429},
        },
        {"match": {"userMessage": "limit", "sequenceIndex": 1}, "response": {"content": WHOLE}},
        {
            "match": {"userMessage": "refuse"},
            "response": {"error": {"message": "No such model", "type": "not_found_error"}, "status": 404},
        },
    ]
}


@pytest.fixture(scope="module")
def aimock(tmp_path_factory):
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node")
    folder = tmp_path_factory.mktemp("aimock")
    fixtures = folder / "fixtures.json"
    fixtures.write_text(json.dumps(FIXTURES))
    command = [node, AIMOCK, "--fixtures", fixtures, "--log-level", "silent"]
    with both(command, folder / "daemon", retries=4) as pair:
        yield pair


@needs_aimock
@pytest.mark.parametrize(
    ("prompt", "asked"), [("plain", 1), ("cut", 3), ("gone", 2), ("dropped", 3), ("limit", 2)]
)
def test_another_kind_of_fault_is_outlived(aimock, prompt, asked):
    foreign, client = aimock
    pid = talk(client, foreign)
    result = run(client, pid, prompt)
    assert (result["message"], result["stop_reason"]) == (WHOLE, "end_turn")
    assert attempts(client, pid) == list(range(1, asked + 1))
    assert texts(client.history(pid))[1:] == [WHOLE]
    assert run(client, pid, "plain")["message"] == WHOLE


@needs_aimock
def test_an_answer_that_is_no_event_stream_is_told_of(aimock):
    """Status 200 and something that is no stream: final, one sentence, and the next message is answered."""
    foreign, client = aimock
    pid = talk(client, foreign)
    assert run(client, pid, "garbled")["stop_reason"] == "error"
    assert client.read(pid, 2).startswith(b"EPROTO: ")
    assert run(client, pid, "plain")["message"] == WHOLE


@needs_aimock
def test_another_kind_of_refusal_is_final(aimock):
    foreign, client = aimock
    pid = talk(client, foreign)
    assert run(client, pid, "refuse")["stop_reason"] == "error"
    assert attempts(client, pid) == [1]
    assert b"No such model" in client.read(pid, 2)
    assert run(client, pid, "plain")["message"] == WHOLE
