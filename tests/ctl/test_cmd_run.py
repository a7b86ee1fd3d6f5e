"""`run` and `attach`."""
# ruff: noqa: E501, PLW1509

import json
import os
import pty
import re
import select
import subprocess
import termios
import time

import pytest
from prockit import ignore_interrupts, interrupt

from llmprocctl import talk


def until(condition):
    """Wait for something that will be true."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, ctl, *words, env=None):
        self.master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.seen = ""
        self.program = subprocess.Popen(
            ctl.command(*words), stdin=slave, stdout=slave, stderr=slave, env={**ctl.env, "TERM": "xterm", **(env or {})},
            cwd=ctl.folder, start_new_session=True, preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )  # fmt: skip

    def read_until(self, text):
        end = time.monotonic() + 30
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode()
        return self.seen

    def type(self, keys):
        os.write(self.master, keys)

    def close(self):
        """The exit status."""
        status = self.program.wait(30)
        if select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536).decode()
        self.after = termios.tcgetattr(self.slave)
        os.close(self.master)
        os.close(self.slave)
        return status


def test_run_prints_what_was_said_and_exits_so(ctl, daemon):
    """fd 1 of the process byte for byte, and its status."""
    done = ctl("run", "-n", "demo", "hi", "there")
    assert (done.out, done.err, done.status) == ("you said: hi there\n", "", 0)
    assert daemon.procs[2]["collected"]


def test_run_shows_text_as_it_is_committed(ctl, daemon):
    """Not only at the end; and the process's own status is the exit status."""
    running = ctl.start("run", "-n", "slow", "x")
    assert running.stdout.readline() == b"one\n"
    out, _ = running.communicate(timeout=30)
    assert (out, running.returncode) == (b"two\nthree\n", 7)


@pytest.mark.parametrize(
    ("words", "stdin", "prompt"),
    [
        (("demo", "sum it up"), b"a diff\n", "sum it up\n\na diff"),
        (("demo",), b"only this\n", "only this"),
        (("demo", "-"), b"explicit\n", "explicit"),
        (("demo", "alone"), b"", "alone"),
        (("demo", "alone"), b" \n\n", "alone"),
        (("-n", "demo", "alone"), b"not read", "alone"),
    ],
)
def test_stdin_is_appended_to_the_prompt(ctl, daemon, sent, words, stdin, prompt):
    """Unless it is blank or forbidden."""
    assert ctl("run", *words, stdin=stdin).status == 0
    assert [call["prompt"] for call in sent("proc.spawn")] == [prompt]


def test_a_long_stdin_is_a_descriptor_of_its_own(ctl, daemon, sent):
    """The prompt stays the prompt."""
    ctl("run", "demo", "sum it up", stdin=b"z" * 8001)
    (call,) = sent("proc.spawn")
    assert call["prompt"] == "sum it up"
    assert bytes(daemon.files[2, 3][0]) == b"z" * 8001


def test_run_without_stdin_at_all(ctl, daemon):
    """`<&-` is as good as an empty one."""
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *ctl.command("run", "demo", "x")]
    done = subprocess.run(command, env=ctl.env, capture_output=True, check=False, timeout=30)
    assert (done.stdout, done.returncode) == (b"you said: x\n", 0)


def test_diagnostics_follow_a_failure(ctl, daemon):
    """fd 2 goes to stderr when the status is not 0; else the reason."""
    done = ctl("run", "-n", "fails", "x")
    assert (done.out, done.err, done.status) == ("", "the provider said no\n", 1)
    done = ctl("run", "-n", "quietly-fails", "x")
    assert (done.err, done.status) == ("llmprocctl: run: process 3: max_iterations reached\n", 152)


def test_run_in_json(ctl, daemon):
    """One result and nothing else."""
    done = ctl("run", "-n", "--json", "demo", "x")
    (line,) = done.lines
    assert json.loads(line) | {"usage": None, "cost_usd": None} == {
        "pid": 2, "stop_reason": "end_turn", "message": "said", "api_calls": 1, "tool_calls": [], "usage": None,
        "cost_usd": None, "duration_ms": 7, "status": 0,
    }  # fmt: skip
    assert ctl("run", "-n", "--json", "fails", "x").status == 1


def test_run_can_remove(ctl, daemon):
    """--rm leaves no process."""
    assert ctl("run", "-n", "--rm", "demo", "x").status == 0
    assert not daemon.procs


@pytest.mark.parametrize(("program", "status"), [("missing", 127), ("broken", 126), ("locked", 126)])
def test_what_cannot_run(ctl, daemon, program, status):
    """As of spawn."""
    done = ctl("run", "-n", program, "x")
    assert done.status == status
    assert done.err.startswith(f"llmprocctl: run: {program}: ")


def test_run_without_any_prompt(ctl, daemon):
    """It would wait for ever: exit 2, and no process is left."""
    assert ctl("run", "demo").status == 2
    assert not daemon.procs


def test_timeout(ctl, daemon, sent):
    """TERM, and 124 although the process exits 143."""
    assert ctl("run", "-n", "--timeout", "0.1", "stuck", "x").status == 124
    assert sent("proc.signal") == [{"pid": 2, "signal": "TERM"}]
    assert daemon.procs[2]["status"] == 143


def test_interrupts_escalate(ctl, daemon, sent):
    """INT, TERM, KILL; the process's status is the exit status."""
    daemon.play = lambda *_: None
    running = ctl.start("run", "-n", "deaf", "x", preexec_fn=ignore_interrupts)
    interrupt(running)
    until(lambda: sent("proc.signal"))
    assert running.poll() is None
    interrupt(running)
    running.communicate(timeout=30)
    assert [call["signal"] for call in sent("proc.signal")] == ["INT", "TERM"]
    assert running.returncode == 143


def test_one_interrupt_ends_a_process_that_minds(ctl, daemon, sent):
    """Exit 130."""
    running = ctl.start("run", "-n", "--json", "stuck", "x", preexec_fn=ignore_interrupts)
    interrupt(running)
    running.communicate(timeout=30)
    assert running.returncode == 130


def test_run_loses_the_daemon(ctl, daemon):
    """Exit 125, and how to go on."""
    running = ctl.start("run", "-n", "stuck", "x")
    until(lambda: [call for call in daemon.calls if call[0] == "proc.wait"])
    daemon.close()
    _, err = running.communicate(timeout=30)
    assert running.returncode == 125
    assert b"llmprocctl wait 2" in err


def test_a_terminal_sees_text_as_it_comes(ctl, daemon):
    """Before the message is whole; control characters are shown."""
    daemon.play = lambda *_: None
    terminal = Terminal(ctl, "run", "stuck", "x")
    until(lambda: [call for call in daemon.calls if call[0] == "events.unsubscribe"])
    daemon.event("text", 2, text="half a\x1b]0;x\x07", attempt=1)
    terminal.read_until("half a\\x1b]0;x\\x07")
    daemon.event("text", 2, text=" message", attempt=1)
    terminal.read_until(" message")
    daemon.event("api_response", 2, text="half a\x1b]0;x\x07 message")
    daemon.end(2, 0)
    assert terminal.close() == 0
    assert terminal.seen == "half a\\x1b]0;x\\x07 message\r\n"


def test_a_second_attempt_begins_anew(capfd):
    """What the failed one said does not stand before what the next says."""
    shown = talk.Talk(activity=False)
    for event in (
        {"type": "text", "text": "first tr", "attempt": 1},
        {"type": "text", "text": "second", "attempt": 2},
        {"type": "api_response", "text": "second try"},
        {"type": "api_response", "text": "no deltas"},
        {"type": "text", "text": "cut", "attempt": 1},
        {"type": "turn_end"},
    ):
        shown.show({"at": 0.0, **event})
    assert capfd.readouterr().out == "first tr\nsecond try\nno deltas\ncut\n"


def test_attach_shows_and_sends(ctl, daemon, sent):
    """Text and tools live; typed lines are sent; ^P^Q leaves all as it was."""
    daemon.add("chat", pid=7)
    terminal = Terminal(ctl, "attach", "7", env={"NO_COLOR": "1"})
    terminal.read_until("detaches")
    until(lambda: [call for call in daemon.calls if call[0] == "events.unsubscribe"])
    terminal.type(b"hello\n")
    terminal.read_until("you said: hello\r\n")
    daemon.event("tool_start", 7, tool="bash", input='{"command": "ls"}')
    daemon.event("tool_end", 7, tool="bash", text="a\nb", is_error=True)
    terminal.read_until("bash failed = a\\nb]")
    assert re.search(r'\[\d\d:\d\d:\d\d bash \{"command": "ls"\}\]', terminal.seen)
    assert "\x1b" not in terminal.seen
    terminal.type(b"\x10\x11")
    assert terminal.close() == 0
    assert terminal.after == terminal.before
    assert daemon.procs[7]["status"] is None
    assert sent("proc.send") == [{"pid": 7, "text": "hello"}]


def test_attach_sends_int(ctl, daemon, sent):
    """^C goes to the process, and the end of the process ends attach with its status, uncollected."""
    daemon.add("chat", pid=7)
    watching = ctl.start("attach", "7", preexec_fn=ignore_interrupts)
    interrupt(watching)
    out, _ = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert b"exit 130: signal INT" in out
    assert not daemon.procs[7]["collected"]


def test_attach_to_what_has_ended(ctl, daemon):
    """There is nothing to come."""
    daemon.add("chat", pid=7)
    daemon.end(7, 3)
    done = ctl("attach", "7")
    assert done.status == 1
    assert "ended with status 3" in done.err
    assert ctl("attach", "99").err == "llmprocctl: attach: 99: no such process\n"


def test_an_answer_that_came_early_is_shown(ctl, daemon):
    """Events that arrive while a line is being sent do not wait for the next thing to happen."""
    daemon.add("chat", pid=7)
    terminal = Terminal(ctl, "attach", "7")
    terminal.read_until("detaches")
    for word in map(str, range(30)):
        terminal.type(f"{word}\n".encode())
        terminal.read_until(f"you said: {word}\r\n")
    terminal.type(b"\x10\x11")
    assert terminal.close() == 0


def test_end_of_input_detaches(ctl, daemon):
    """^D leaves the process alone."""
    daemon.add("chat", pid=7)
    terminal = Terminal(ctl, "attach", "7")
    terminal.read_until("detaches")
    until(lambda: [call for call in daemon.calls if call[0] == "events.unsubscribe"])
    terminal.type(b"\x04")
    assert terminal.close() == 0
    assert daemon.procs[7]["status"] is None
