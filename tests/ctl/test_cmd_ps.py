"""`ps`."""

import json

import pytest

from llmprocctl import cmd_ps, render

COLUMNS = ["PID", "PPID", "STAT", "PROGRAM", "TURN", "CTX%", "IN", "OUT", "CACHE%", "COST", "TIME", "WCHAN"]


def test_the_columns(ctl, daemon):
    """One line a process under a line of headers; numbers are short."""
    daemon.add("coder", pid=42, stat="R", wchan="api")
    header, row = ctl("ps").lines
    assert header.split() == COLUMNS
    assert row.split() == ["42", "1", "R", "coder", "3", "31", "10k", "2.3k", "90", "$0.41", "3:12", "api"]


def test_what_is_not_known_is_a_dash(ctl, daemon):
    """No window, no cost, no input: no number is made up."""
    usage = dict.fromkeys(
        ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"), 0
    )
    daemon.add("coder", pid=42, context_window=None, cost_usd=None, usage=usage, wchan="")
    assert ctl("ps", "-o", "ctx,cache,cost,wchan", "--no-headers").out.split() == ["-"] * 4


def test_ended_processes_keep_their_time(ctl, daemon):
    """TIME stands still at the end."""
    daemon.add("coder", started=1000.0, ended=1007.0)
    assert ctl("ps", "-o", "time=").out.strip() == "0:07"


def test_collected_ones_are_shown_with_all(ctl, daemon, sent):
    """What is listed is the daemon's to say."""
    daemon.add("coder", pid=5, collected=True)
    daemon.add("coder", pid=6)
    assert ctl("ps", "-q").lines == ["6"]
    assert ctl("ps", "-a", "-q").lines == ["5", "6"]
    assert sent("proc.list") == [{}, {"all": True}]


def test_chosen_columns(ctl, daemon):
    """-o takes names, more than once, in any case, and `=` takes a header away or gives another."""
    daemon.add("coder", pid=42, name="bob")
    assert ctl("ps", "-o", "pid,NAME", "-o", "stat").lines == ["PID NAME STAT", " 42 bob  S"]
    assert ctl("ps", "-o", "pid=").lines == ["42"]
    assert ctl("ps", "-o", "pid=,name=").lines == ["42 bob"]
    assert ctl("ps", "-o", "pid=P,name").lines == [" P NAME", "42 bob"]
    assert ctl("ps", "-o", "ctx%=").lines == ["31"]


def test_an_unknown_column_is_a_usage_error(ctl, daemon):
    """It names those that there are."""
    done = ctl("ps", "-o", "pid,size")
    assert done.status == 2
    assert "size: no such column" in done.err
    assert "wchan" in done.err


def test_sorting(ctl, daemon):
    """By pid; else as told, what is unknown last."""
    for pid, cost in ((9, 0.5), (3, None), (7, 1.5), (5, 0.5)):
        daemon.add("coder", pid=pid, cost_usd=cost)
    assert ctl("ps", "-q").lines == ["3", "5", "7", "9"]
    assert ctl("ps", "-q", "--sort=-cost").lines == ["7", "5", "9", "3"]
    assert ctl("ps", "-q", "--sort", "cost,-pid").lines == ["9", "5", "7", "3"]


def test_forest(ctl, daemon):
    """Children hang below their parents; one whose parent is not listed is a root."""
    for pid, ppid in ((42, 1), (57, 42), (58, 42), (60, 57), (61, 999)):
        daemon.add("coder", pid=pid, ppid=ppid)
    assert ctl("ps", "--forest", "-o", "pid=,program=").lines == [
        "42 coder",
        "57  \\_ coder",
        "60  |   \\_ coder",
        "58  \\_ coder",
        "61 coder",
    ]


def test_a_forest_of_any_depth():
    """A chain of thousands is drawn without recursion."""
    drawn = render.forest({pid: pid - 1 for pid in range(2, 5000)})
    assert [pid for pid, _ in drawn] == list(range(2, 5000))


def test_named_processes(ctl, daemon, sent):
    """In the order asked, by number or %name."""
    daemon.add("coder", pid=5)
    daemon.add("coder", pid=6, name="bob")
    assert ctl("ps", "-q", "%bob", "5").lines == ["6", "5"]
    assert sent("proc.list")[-1] == {"all": True, "pids": [6, 5]}


def test_an_unknown_process_fails_and_the_others_are_shown(ctl, daemon):
    """Exit 1, and a line each."""
    daemon.add("coder", pid=5)
    done = ctl("ps", "-q", "99", "5", "%nobody")
    assert (done.lines, done.status) == (["5"], 1)
    assert sorted(done.err.splitlines()) == [
        "llmprocctl: ps: %nobody: no such process",
        "llmprocctl: ps: 99: no such process",
    ]


def test_json_is_the_daemons_rows(ctl, daemon):
    """One object a line, with all fields as they came."""
    daemon.add("coder", pid=5)
    daemon.add("coder", pid=6)
    rows = [json.loads(line) for line in ctl("ps", "--json").lines]
    assert rows == list(daemon.procs.values())


def test_no_process(ctl, daemon):
    """Headers alone, and nothing at all in JSON."""
    assert ctl("ps").out.split() == COLUMNS
    assert ctl("ps", "--json").out == ""


def test_text_of_others_cannot_steer_the_terminal(ctl, daemon):
    """Escapes, newlines and what turns the direction of writing are shown, not sent."""
    daemon.add("evil\x1b[31m\nrow\u202e\x9b", pid=5)
    assert ctl("ps", "-o", "program=").lines == ["evil\\x1b[31m\\nrow\\u202e\\x9b"]


@pytest.mark.parametrize("count", [10_000])
def test_thousands_of_processes(ctl, daemon, count):
    """A reply of megabytes, in however many pieces."""
    for _ in range(count):
        daemon.add("coder")
    assert len(ctl("ps", "-q").lines) == count


def test_every_default_column_exists():
    """The list of columns and the default cannot part."""
    assert [cmd_ps.COLUMNS[name][0] for name in cmd_ps.DEFAULT.split(",")] == COLUMNS
