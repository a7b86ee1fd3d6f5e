"""`history fork goto exec`."""
# ruff: noqa: E501

import json

import pytest


def node(name, parent, role, *blocks, tokens=None):
    return {
        "id": name, "parent": parent, "role": role, "content": json.dumps(list(blocks)), "tokens": tokens,
        "at": 1_700_000_000.0,
    }  # fmt: skip


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture
def tree(daemon):
    """Two branches from m2, the head on the second."""
    daemon.add("coder", pid=7, head="m6")
    daemon.nodes[7] = [
        node("m1", None, "user", text("fix\nit")),
        node("m2", "m1", "assistant", text("ok"), {"type": "tool_use", "name": "bash", "input": {"command": "ls"}}, tokens=4000),
        node("m3", "m2", "user", {"type": "tool_result", "content": [text("a b")]}),
        node("m4", "m3", "assistant", {"type": "thinking", "thinking": "hm"}, text("done"), tokens=12),
        node("m5", "m2", "user", {"type": "tool_result", "content": "gone\x1b[2J"}),
        node("m6", "m5", "assistant", text("other"), tokens=7),
    ]  # fmt: skip
    return 7


def test_history(ctl, tree):
    """The path to the head; a message on one line, control characters shown."""
    assert ctl("history", tree).lines == [
        "MSG ROLE      TOKENS WHEN     TEXT",
        "m1  user           - 22:13:20 fix\\nit",
        'm2  assistant   4.0k 22:13:20 ok bash({"command": "ls"})',
        "m5  user           - 22:13:20 = gone\\x1b[2J",
        "m6  assistant      7 22:13:20 other",
    ]


def test_all_branches(ctl, tree):
    """--all is every message, the head marked."""
    lines = ctl("history", "--all", tree).lines
    assert [line.split()[0] for line in lines[1:]] == ["m1", "m2", "m3", "m4", "m5", "m6"]
    assert [line for line in lines if " * " in line] == [lines[-1]]
    assert lines[4].endswith("[thinking] done")


def test_the_tree_is_drawn(ctl, tree):
    """What has one way to go stays in its column."""
    lines = ctl("history", "--graph", tree).lines
    drawn = [line[: lines[0].index("ROLE")].rstrip() for line in lines[1:]]
    assert drawn == ["m1", "m2", "|- m3", "|  m4", "`- m5", "   m6 *"]


def test_history_for_programs(ctl, daemon, tree):
    """-q is ids, --json the daemon's rows."""
    assert ctl("history", "-q", tree).lines == ["m1", "m2", "m5", "m6"]
    assert [json.loads(line) for line in ctl("history", "--json", "-a", tree).lines] == daemon.nodes[7]


def test_a_long_history_comes_in_pages(ctl, daemon, sent):
    """No reply has to hold it all."""
    daemon.add("coder", pid=7, head="m950")
    daemon.nodes[7] = [
        node(f"m{i}", f"m{i - 1}" if i > 1 else None, "user", text("x")) for i in range(1, 951)
    ]
    assert ctl("history", "-q", 7).lines == [f"m{i}" for i in range(1, 951)]
    assert len(sent("proc.history")) == 5
    assert len(ctl("history", "--graph", 7).lines) == 951


def test_history_of_nobody(ctl, daemon):
    """Exit 1."""
    assert ctl("history", "99").status == 1


def test_fork(ctl, daemon, sent):
    """One child, or one for each prompt; each pid on a line."""
    daemon.add("coder", pid=7)
    assert ctl("fork", 7).lines == ["2"]
    assert ctl("fork", 7, "--prompt", "try A", "--prompt", "try B", "--at", "m9").lines == ["3", "4"]
    assert sent("proc.fork") == [{"pid": 7}, {"pid": 7, "prompts": ["try A", "try B"], "at": "m9"}]
    assert ctl("fork", 99).err == "llmprocctl: fork: 99: no such process\n"


def test_a_fork_whose_answer_was_lost_is_not_done_twice(ctl, daemon):
    """As of spawn."""
    daemon.add("coder", pid=7)
    daemon.hang_up_after["proc.fork"] = 1
    assert ctl("fork", 7).lines == ["2"]
    assert sorted(daemon.procs) == [2, 7]


def test_goto(ctl, tree, sent):
    """It prints where the head was and is."""
    assert ctl("goto", tree, "m4").out == "m6 -> m4\n"
    assert ctl("goto", tree, "m1", "--run").out == "m4 -> m1\n"
    assert ctl("goto", tree, "m2", "-m", "look").out == "m1 -> m2\n"
    assert sent("proc.goto") == [
        {"pid": 7, "to": "m4"},
        {"pid": 7, "to": "m1", "run": True},
        {"pid": 7, "to": "m2", "text": "look"},
    ]
    assert ctl("goto", tree, "m99").err == "llmprocctl: goto: 7: no message m99 in the history of process 7\n"
    assert ctl("goto", tree, "m1", "--run", "-m", "x").status == 2


def test_exec(ctl, daemon, sent):
    """The program is found as of spawn; 127 when there is none."""
    daemon.add("coder", pid=7)
    assert ctl("exec", 7, "./x.toml").status == 0
    assert sent("proc.exec") == [{"pid": 7, "program": f"{ctl.folder}/x.toml", "cwd": str(ctl.folder)}]
    assert ctl("exec", 7, "missing").status == 127
    assert ctl("exec", 7, "busy").status == 1
    assert ctl("exec", 99, "x").status == 1
