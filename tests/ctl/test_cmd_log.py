"""`logs` and `events`."""

import json
import signal
import time

import pytest


@pytest.fixture
def lived(daemon):
    """A process that has done something of everything."""
    pid = daemon.add("coder", pid=7)
    daemon.event("spawn", pid, program="coder")
    daemon.event("input", pid, mail=1, text="fix it\nplease")
    daemon.event("api_request", pid)
    daemon.event("text", pid, text="I ", attempt=1)
    daemon.event("api_response", pid, text="I look.\nThen I fix.", stop_reason="tool_use")
    daemon.event("tool_start", pid, tool="bash", input='{"command":"ls"}')
    daemon.event("tool_end", pid, tool="bash", is_error=False, text="a\nb")
    daemon.event("stderr", pid, text="careful")
    daemon.event("input", 8, text="of another")
    daemon.end(pid, 0)
    return pid


def without_times(lines):
    return ["[" + line.split(" ", 1)[1] if line.startswith("[") else line for line in lines]


TOLD = [
    "> fix it",
    "> please",
    "I look.",
    "Then I fix.",
    '[bash {"command":"ls"}]',
    "[bash = a\\nb]",
    "[stderr careful]",
    "[exit 0]",
]


def test_logs(ctl, lived):
    """Text as it was said, and a line for what happened, in order of time."""
    done = ctl("logs", lived)
    assert without_times(done.lines) == TOLD
    assert done.status == 0


def test_the_last_lines(ctl, lived):
    """-n counts lines."""
    assert without_times(ctl("logs", "-n", 3, lived).lines) == TOLD[-3:]
    assert ctl("logs", "-n", 0, lived).out == ""


def test_since(ctl, daemon, lived):
    """What is older is left out."""
    daemon.events[1]["at"] -= 3600
    assert without_times(ctl("logs", "--since", "10m", lived).lines) == TOLD[2:]


def test_logs_follow_to_the_end(ctl, daemon):
    """-f waits for more, and ends with the process."""
    daemon.add("coder", pid=7)
    daemon.event("input", 7, text="go")
    following = ctl.start("logs", "-f", "7")
    assert following.stdout.readline() == b"> go\n"
    daemon.say(7, "done")
    assert following.stdout.readline() == b"done\n"
    daemon.end(7, 4)
    out, _ = following.communicate(timeout=30)
    assert following.returncode == 0
    assert b"exit 4" in out


def test_logs_of_what_has_ended_do_not_wait(ctl, lived):
    """-f included."""
    assert without_times(ctl("logs", "-f", lived).lines) == TOLD


def test_logs_of_nobody(ctl, daemon):
    """Exit 1."""
    done = ctl("logs", "99")
    assert (done.status, done.err) == (1, "llmprocctl: logs: 99: no such process\n")


def test_events(ctl, daemon, lived):
    """Every event on a line of its own; in JSON with all its fields."""
    lines = ctl("events").lines
    assert len(lines) == len(daemon.events)
    assert lines[1].split()[::2] == ["2", "7", "mail=1", "it\\nplease"]
    assert [json.loads(line) for line in ctl("events", "--json").lines] == daemon.events
    assert ctl("events", "-q", "--after", "8").lines == ["9", "10"]
    assert ctl("events", "-q", "8").lines == ["9"]


def test_thousands_of_events(ctl, daemon):
    """Page by page, none twice."""
    for _ in range(2500):
        daemon.event("state", 7)
    assert ctl("events", "-q").lines == [str(seq) for seq in range(1, 2501)]


def test_events_follow_until_interrupted(ctl, daemon):
    """-f: old ones first, new ones as they happen; ^C ends it with 130."""
    daemon.event("input", 7, text="old")
    following = ctl.start("events", "-f", "--json")
    assert json.loads(following.stdout.readline())["text"] == "old"
    daemon.event("input", 7, text="new")
    assert json.loads(following.stdout.readline())["text"] == "new"
    while not daemon.calls[-1][1].get("wait_ms"):
        time.sleep(0.005)
    following.send_signal(signal.SIGINT)
    _, err = following.communicate(timeout=30)
    assert (following.returncode, err) == (130, b"")


def test_events_of_nobody(ctl, daemon):
    """A name that nobody has fails; nothing is shown as if it were theirs."""
    daemon.event("input", 7, text="old")
    done = ctl("events", "%nobody")
    assert (done.out, done.status) == ("", 1)
