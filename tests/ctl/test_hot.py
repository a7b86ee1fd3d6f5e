"""The short way in: the same meaning as click's, a fraction of its time."""
# ruff: noqa: E501, PTH109

import os
import resource
import subprocess
import sys

import click
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from llmprocctl import _hot, cli, table

WORDS = ["7", "%coder", "fd:3", "demo", "-", "", "check", "a b", "m9", "10", "-5", "start", "é", "wall=10m"]
VALUES = {
    "int": ["3", "-1", "x"],
    "count": ["3", "-1", "x"],
    "nice": ["19", "-20", "20", "x"],
    "duration": ["10m", "3", "x"],
    "text": [*WORDS, "--all"],
    "many": [*WORDS, "K=V"],
}


def by_click(argv):
    """What click would call the command with; None for an error."""
    seen = []

    class Seen(click.Group):
        def get_command(self, ctx, cmd_name):
            command = cli.group().get_command(ctx, cmd_name)
            if command is not None:
                fixed = table.COMMANDS[cmd_name].fixed
                command.callback = lambda **values: seen.append((cmd_name, values | fixed))
            return command

    group = Seen("llmprocctl", params=cli.group().params)
    try:
        with group.make_context("llmprocctl", list(argv)) as ctx:
            group.invoke(ctx)
            settings_ = {key: ctx.params[key] for key in ("host", "socket")}
    except (click.ClickException, click.exceptions.Exit):
        return None
    return (settings_, *seen[0])


@st.composite
def command_lines(draw):
    """Command lines that a table's reader would write, and some that nobody would."""
    name = draw(st.sampled_from(sorted(table.COMMANDS)))
    words = []
    for option in draw(st.lists(st.sampled_from([*table.COMMANDS[name].options, None]), max_size=4)):
        if option is None:
            words.append(draw(st.sampled_from([*WORDS, "--", "--bad", "-x", "--help"])))
            continue
        given_ = draw(st.sampled_from(option.names))
        if option.kind == "flag":
            words.append(given_)
        else:
            value = draw(st.sampled_from(VALUES[option.kind]))
            words += draw(st.sampled_from([[given_, value], [f"{given_}={value}"], [given_]]))
    words += draw(st.lists(st.sampled_from(WORDS), max_size=3))
    before = draw(st.sampled_from([[], ["--socket", "/s"], ["-H", "unix:///s"], ["--socket=/s"], ["-x"]]))
    return [*before, name, *words]


@settings(max_examples=1000, deadline=None)
@given(command_lines())
def test_both_parsers_read_the_same(argv):
    """Whatever the short way reads, click reads so too."""
    parsed = _hot.parse(argv)
    event("short" if parsed else "left to click")
    if parsed is not None:
        assert parsed == by_click(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["ps"],
        ["ps", "-a", "-o", "pid,stat", "--sort=-cost", "--no-headers"],
        ["kill", "-9", "7", "8"],
        ["kill", "-TERM", "-42"],
        ["kill", "-s", "INT", "7"],
        ["kill", "--", "-42"],
        ["renice", "-5", "7"],
        ["renice", "-n", "5", "7"],
        ["wait", "-n", "--timeout", "30s", "7"],
        ["cat", "-f", "7/fd:1"],
        ["--socket", "/s", "spawn", "-i", "--limit", "wall=10m", "--limit=turns=5", "coder", "fix", "it"],
        ["run", "./x.toml"],
        ["send", "7", "-"],
    ],
)
def test_common_command_lines_take_the_short_way(argv):
    """And mean what click makes of them."""
    parsed = _hot.parse(argv)
    assert parsed is not None
    assert parsed == by_click(argv)


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["kil"], ["ps", "-aq"], ["ps", "--help"], ["wait"], ["ps", "--json=1"]]
)
def test_the_unusual_is_left_to_click(argv):
    """Help, mistakes and letters run together."""
    assert _hot.parse(argv) is None


HEAVY = {
    "trio", "anthropic", "asyncio", "httpx2", "pydantic", "rich", "socket", "argparse", "concurrent", "threading",
    "dataclasses", "inspect", "uuid", "ssl", "importlib.metadata",
}  # fmt: skip
BARE = {"click", "msgspec", "typing", "subprocess", "json", "selectors", "tempfile", "signal"}


def imported(ctl, *words):
    """The modules that a command line imports. (Those that the way of installation needs are not the program's.)"""
    code = f"import sys; sys.argv = {['llmprocctl', *words]!r}; b = set(sys.modules)\nfrom llmprocctl.__main__ import main\n"
    code += "try: main()\nfinally: print('\\n'.join(set(sys.modules) - b), file=sys.stderr)"
    env = {**ctl.env, "PYTHONPATH": os.getcwd()}
    isolated = [sys.executable, "-S", "-c", code]
    if set(words) & {"--help", "nonsense"}:
        isolated.remove("-S")
    done = subprocess.run(
        isolated, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert "Traceback" not in done.stderr, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "words",
    [
        ("ps", "-a"), ("ps", "%coder"), ("kill", "7"), ("kill", "-l"), ("wait", "8"), ("cat", "7/fd:1"), ("stop", "7"),
        ("send", "7", "x"), ("fd",), ("spawn", "demo", "x"), ("renice", "3", "7"), ("rm", "8"),
    ],
)  # fmt: skip
def test_a_hot_command_imports_next_to_nothing(words, ctl, daemon):
    """Neither click nor msgspec, nor any of the standard library's slow modules."""
    daemon.add("coder", pid=7, name="coder")
    daemon.end(daemon.add("coder", pid=8), 0)
    found = imported(ctl, *words)
    assert "llmprocctl.session" in found
    assert not found & (HEAVY | BARE)


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("spawn", "--help"),
        ("nonsense",),
        ("inspect", "7"),
        ("history", "7"),
        ("logs", "7"),
        ("run", "demo", "x"),
    ],
)
def test_no_command_imports_anything_heavy(words, ctl, daemon):
    """Help, mistakes and the slower commands stay clear of event loops and SDKs too."""
    daemon.add("coder", pid=7)
    heavy = HEAVY - {"inspect", "uuid", "importlib.metadata", "threading", "dataclasses", "concurrent"}
    assert not imported(ctl, *words) & heavy


def test_the_list_of_commands_imports_no_command(ctl):
    """`--help` is made from the table alone."""
    assert not [name for name in imported(ctl, "--help") if name.startswith("llmprocctl.cmd_")]


def test_ps_of_a_hundred_processes_takes_little_cpu_time(ctl, daemon):
    """At most 60 ms of CPU, the interpreter's own start included; the best of five counts."""
    for i in range(100):
        daemon.add("coder", name=f"p{i}")

    def cpu():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert len(ctl("ps").lines) == 101
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    best = min(cpu() for _ in range(5))
    assert best < 0.060
