"""`spawn kill stop cont wait send renice rm`."""
# ruff: noqa: PTH100, PTH110

import json
import os
import time

import pytest

from llmprocctl import signals
from llmprocd.abi.types import Signal


def test_spawn_prints_the_pid(ctl, daemon, sent):
    """The prompt's words are joined, and the client's folder goes with them."""
    done = ctl("spawn", "demo", "fix", "the test")
    assert (done.out, done.err, done.status) == ("2\n", "", 0)
    assert sent("proc.spawn") == [{"program": "demo", "prompt": "fix the test", "cwd": str(ctl.folder)}]


def test_spawn_sends_all_its_options(ctl, daemon, sent):
    """Limits as they were written; what is not given is not sent."""
    words = [
        "--name",
        "bob",
        "--nice",
        "-5",
        "--cwd",
        "sub",
        "--env",
        "A=b=c",
        "--env",
        "D=",
        "--limit",
        "wall=10m",
    ]
    assert ctl("spawn", "-i", *words, "--limit", "turns=5", "--access", "write", "demo").status == 0
    (call,) = sent("proc.spawn")
    assert call == {
        "program": "demo",
        "interactive": True,
        "name": "bob",
        "nice": -5,
        "cwd": str(ctl.folder / "sub"),
        "env": {"A": "b=c", "D": ""},
        "limits": {"wall": "10m", "turns": "5"},
        "access": "write",
    }


@pytest.mark.parametrize("word", ["./x.toml", "x.toml", "x.yml", "sub/x"])
def test_a_program_that_is_a_path_is_made_absolute(ctl, daemon, sent, word):
    """With a slash, or a program file's ending."""
    ctl("spawn", word, "hi")
    assert sent("proc.spawn")[0]["program"] == os.path.abspath(f"{ctl.folder}/{word}")


def test_a_name_is_looked_for_on_the_path(ctl, daemon, sent):
    """The first file of that name; one that is nowhere is the daemon's own."""
    for folder, name in (("a", "other.toml"), ("b", "coder.toml"), ("c", "coder.yaml")):
        (ctl.folder / folder).mkdir()
        (ctl.folder / folder / name).write_text("")
    env = {"LLMPROC_PATH": f"{ctl.folder}/none::a:{ctl.folder}/b:{ctl.folder}/c"}
    for word in ("coder", "other", "demo"):
        ctl("spawn", word, "hi", env=env)
    found = [call["program"] for call in sent("proc.spawn")]
    assert found == [f"{ctl.folder}/b/coder.toml", f"{ctl.folder}/a/other.toml", "demo"]


def test_a_prompt_from_stdin(ctl, daemon, sent):
    """`-` reads it; without `-` stdin is left alone."""
    assert ctl("spawn", "demo", "-", stdin=b"line 1\nline 2\n").status == 0
    ctl("spawn", "demo", "hi", stdin=b"not read")
    assert [call["prompt"] for call in sent("proc.spawn")] == ["line 1\nline 2", "hi"]


@pytest.mark.parametrize("data", [b"x" * 9000, b"\xff\xfe\x00bytes", b"y\n" * 2_000_000])
def test_a_long_stdin_goes_by_file(ctl, daemon, sent, data):
    """Long, or no text: a file that the daemon copies and the client removes; only its user can read it."""
    assert ctl("spawn", "demo", "-", stdin=data).status == 0
    (call,) = sent("proc.spawn")
    assert "prompt" not in call
    assert bytes(daemon.files[2, 3][0]) == data
    assert not os.path.exists(call["stdin_path"])


def test_an_empty_stdin_is_no_prompt(ctl, daemon):
    """Nothing is started."""
    done = ctl("spawn", "demo", "-", stdin=b" \n")
    assert (done.status, done.err) == (2, "llmprocctl: spawn: stdin is empty\n")
    assert not daemon.procs


def test_without_any_prompt_nothing_is_left_behind(ctl, daemon):
    """Neither a prompt nor one in the program: exit 2, and no process."""
    done = ctl("spawn", "demo")
    assert done.status == 2
    assert "-i" in done.err
    assert not daemon.procs


def test_interactive_without_a_prompt(ctl, daemon):
    """It rests, and takes messages."""
    assert ctl("spawn", "-i", "demo").out == "2\n"
    assert daemon.procs[2]["status"] is None


@pytest.mark.parametrize(
    ("program", "status", "text"),
    [
        ("missing", 127, "missing: no such program; did you mean demo?"),
        ("broken", 126, "broken: broken.toml:3: model.nam: unknown key; did you mean name?"),
        ("locked", 126, "locked: no credentials for anthropic"),
    ],
)
def test_what_cannot_start(ctl, daemon, program, status, text):
    """127 when there is no such program, 126 when it cannot run."""
    done = ctl("spawn", program, "hi")
    assert (done.status, done.out, done.err) == (status, "", f"llmprocctl: spawn: {text}\n")


@pytest.mark.parametrize("option", [("--env", "A"), ("--env", "=x"), ("--limit", "turns"), ("--nice", "x")])
def test_options_of_a_wrong_form(ctl, daemon, option):
    """A usage error, and nothing is asked of the daemon."""
    assert ctl("spawn", *option, "demo", "hi").status == 2
    assert not [call for call in daemon.calls if call[0] == "proc.spawn"]


def test_a_spawn_whose_answer_was_lost_is_not_done_twice(ctl, daemon):
    """The same request is sent again over a new connection."""
    daemon.hang_up_after["proc.spawn"] = 1
    assert ctl("spawn", "demo", "hi").out == "2\n"
    ids = [call["request_id"] for name, call in daemon.calls if name == "proc.spawn"]
    assert len(ids) == 2
    assert ids[0] == ids[1]
    assert list(daemon.procs) == [2]


def test_a_spawn_is_sent_again_only_once(ctl, daemon):
    """Then the daemon is unreachable."""
    daemon.hang_up_after["proc.spawn"] = 5
    done = ctl("spawn", "demo", "hi")
    assert done.status == 125
    assert "went away" in done.err


def test_kill_sends_term(ctl, daemon, sent):
    """To all operands, %names too."""
    for pid in (5, 6):
        daemon.add("coder", pid=pid, name=f"p{pid}")
    assert ctl("kill", "5", "%p6").status == 0
    assert sent("proc.signal") == [{"pid": 5, "signal": "TERM"}, {"pid": 6, "signal": "TERM"}]


@pytest.mark.parametrize(
    "words",
    [("-9",), ("-KILL",), ("-s", "kill"), ("--signal=SIGKILL",), ("-s", "9"), ("-sKILL",), ("-SIGKILL",)],
)
def test_signals_by_name_and_number(ctl, daemon, sent, words):
    """All ways to write one."""
    daemon.add("coder", pid=5)
    assert ctl("kill", *words, "5").status == 0
    assert sent("proc.signal") == [{"pid": 5, "signal": "KILL"}]


def test_signal_zero_asks_whether_it_exists(ctl, daemon, sent):
    """Nothing is sent to it."""
    daemon.add("coder", pid=5)
    assert ctl("kill", "-0", "5").status == 0
    assert sent("proc.signal") == [{"pid": 5, "signal": 0}]


@pytest.mark.parametrize("words", [("--", "-5"), ("-TERM", "-5"), ("-s", "TERM", "--", "-5")])
def test_a_whole_tree(ctl, daemon, sent, words):
    """-PID is a process and its descendants."""
    daemon.add("coder", pid=5)
    assert ctl("kill", *words).status == 0
    assert sent("proc.signal") == [{"pid": 5, "signal": "TERM", "tree": True}]


def test_all_operands_are_tried(ctl, daemon):
    """One that fails does not keep the others from theirs."""
    for pid in range(2, 303):
        daemon.add("coder", pid=pid)
    done = ctl("kill", "9999", *range(2, 303), "--", "-9998")
    assert done.status == 1
    assert done.err.splitlines() == [
        "llmprocctl: kill: 9999: no such process",
        "llmprocctl: kill: -9998: no such process",
    ]
    assert all(row["status"] == 143 for row in daemon.procs.values())


def test_refusals_are_told_in_the_daemons_words(ctl, daemon):
    """Pid 1 is the daemon."""
    done = ctl("kill", "1")
    assert done.status == 1
    assert done.err.startswith("llmprocctl: kill: 1: the daemon itself cannot be signalled")


@pytest.mark.parametrize("words", [(), ("-s", "FOO", "5"), ("-s",), ("-FOO", "5")])
def test_kill_without_sense(ctl, daemon, words):
    """No process, no such signal: exit 2."""
    assert ctl("kill", *words).status == 2
    assert not daemon.calls


def test_a_word_that_is_no_pid(ctl, daemon):
    """It says what pids look like; the other operands are done. A command of one process is a usage error."""
    daemon.add("coder", pid=5)
    done = ctl("kill", "abc", "5")
    assert (done.status, done.err) == (1, "llmprocctl: kill: abc: not a pid (a number or %name)\n")
    assert daemon.procs[5]["status"] == 143
    assert ctl("send", "abc", "x").status == 2


def test_a_number_beyond_all_pids(ctl, daemon):
    """It is no process, whatever the wire can hold."""
    assert ctl("kill", "9" * 30).err == f"llmprocctl: kill: {'9' * 30}: no such process\n"


def test_kill_lists_the_signals(ctl):
    """Without a daemon; numbers, exit statuses and names are turned into each other."""
    assert ctl("kill", "-l").lines[3] == "15 TERM"
    assert ctl("kill", "-l", "9", "152", "INT").lines == ["KILL", "XCPU", "2"]
    assert ctl("kill", "-l", "99").status == 2


def test_the_signals_are_the_daemons():
    """The table that is quick to import is the same as the other one."""
    assert {sig.value: sig.name for sig in Signal} == signals.NAMES


def test_stop_and_cont(ctl, daemon):
    """Two names for two signals."""
    for pid in (5, 6):
        daemon.add("coder", pid=pid)
    assert ctl("stop", "5", "6").status == 0
    assert [row["stat"] for row in daemon.procs.values()] == ["T", "T"]
    assert ctl("cont", "5").status == 0
    assert [row["stat"] for row in daemon.procs.values()] == ["S", "T"]


def test_wait_exits_with_the_status_of_the_last(ctl, daemon):
    """Whatever ended first."""
    for pid, status in ((5, 3), (6, 0), (7, 143)):
        daemon.add("coder", pid=pid)
        daemon.end(pid, status)
    assert ctl("wait", "5", "7", "6").status == 0
    assert ctl("wait", "6", "7").status == 143
    assert ctl("wait", "6", "5").status == 3
    assert ctl("wait", "5", "5").status == 3


def test_wait_waits(ctl, daemon):
    """It returns when the process has ended, not before."""
    daemon.add("coder", pid=5)
    waiting = ctl.start("wait", "5")
    while not [call for call in daemon.calls if call[0] == "proc.wait"]:
        time.sleep(0.01)
    assert waiting.poll() is None
    daemon.end(5, 9)
    waiting.communicate(timeout=30)
    assert waiting.returncode == 9


def test_wait_for_any(ctl, daemon, sent):
    """-n: the first that ends."""
    for pid in (5, 6):
        daemon.add("coder", pid=pid)
    daemon.end(5, 4)
    assert ctl("wait", "-n", "6", "5").status == 4
    assert sent("proc.wait") == [{"pids": [6, 5], "any": True}]


def test_wait_for_nobody(ctl, daemon):
    """An unknown process is 127; known ones are waited for nevertheless."""
    daemon.add("coder", pid=5)
    daemon.end(5, 4)
    assert ctl("wait", "99").status == 127
    assert ctl("wait", "5", "99").status == 127
    done = ctl("wait", "99", "5")
    assert (done.status, done.err) == (4, "llmprocctl: wait: 99: no such process\n")
    assert ctl("wait", "%nobody").status == 127
    assert ctl("wait", "abc").status == 127


def test_wait_gives_up(ctl, daemon, sent):
    """124 when the time is up."""
    daemon.add("coder", pid=5)
    assert ctl("wait", "--timeout", "0.05", "5").status == 124
    assert sent("proc.wait") == [{"pids": [5], "timeout_ms": 50}]


def test_wait_in_json(ctl, daemon):
    """One object for each that ended."""
    for pid in (5, 6):
        daemon.add("coder", pid=pid)
        daemon.end(pid, pid)
    rows = [json.loads(line) for line in ctl("wait", "--json", "5", "6").lines]
    assert [(row["pid"], row["status"]) for row in rows] == [(5, 5), (6, 6)]


def test_send(ctl, daemon, sent):
    """Words are joined; `-` is stdin; --close closes."""
    daemon.add("coder", pid=5)
    assert ctl("send", "5", "also", "this").status == 0
    assert ctl("send", "5", "-", stdin=b"from stdin\n").status == 0
    assert ctl("send", "--close", "5", "bye").status == 0
    assert sent("proc.send") == [
        {"pid": 5, "text": "also this"},
        {"pid": 5, "text": "from stdin"},
        {"pid": 5, "text": "bye", "close": True},
    ]


def test_send_only_closes(ctl, daemon, sent):
    """Without a text, --close alone."""
    daemon.add("coder", pid=5)
    assert ctl("send", "--close", "5").status == 0
    assert sent("proc.send") == [{"pid": 5, "close": True}]


def test_send_of_a_long_stdin(ctl, daemon, sent):
    """It is written to fd 0; what no request can hold is refused here."""
    daemon.add("coder", pid=5)
    assert ctl("send", "5", "-", stdin=b"x" * 50_000).status == 0
    assert [len(call["data"]) for call in sent("fd.write")] == [50_000]
    assert ctl("send", "5", "-", stdin=b"x" * 2_000_000).status == 2


def test_send_that_is_refused(ctl, daemon):
    """A closed fd 0, an unknown process, no text."""
    daemon.add("coder", pid=5, interactive=False)
    assert ctl("send", "5", "x").err == "llmprocctl: send: 5: fd 0 of process 5 is closed\n"
    assert ctl("send", "99", "x").err == "llmprocctl: send: 99: no such process\n"
    assert ctl("send", "5", "x").status == ctl("send", "99", "x").status == 1
    assert ctl("send", "5").status == 2


@pytest.mark.parametrize("words", [("-5",), ("-n", "-5"), ("--", "-5")])
def test_renice(ctl, daemon, words):
    """A negative number is no option."""
    daemon.add("coder", pid=5)
    assert ctl("renice", *words, "5").status == 0
    assert daemon.procs[5]["nice"] == -5
    assert ctl("renice", "x", "5").status == 2


def test_rm(ctl, daemon):
    """Each for itself: one that lives does not keep another."""
    daemon.add("coder", pid=5)
    daemon.add("coder", pid=6)
    daemon.end(6, 0)
    done = ctl("rm", "5", "6")
    assert (done.status, done.err) == (1, "llmprocctl: rm: 5: process 5 has not ended\n")
    assert list(daemon.procs) == [5]
