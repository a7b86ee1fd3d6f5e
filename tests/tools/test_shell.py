"""bash: what a command says, how it ends, and that it ends."""

import os
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from llmprocd.tools import shell
from llmprocd.tools.output import Output, ToolContext, ToolError
from llmprocd.tools.spawner import Spawner

NAP = str(os.getpid() * 1000 + 500)
"""Seconds: naps of this run are told from those of other runs on this machine by their length."""


@pytest.fixture
async def ctx(nursery: trio.Nursery, tmp_path: Path) -> AsyncIterator[ToolContext]:
    """A context whose cwd is `work` and whose spool files are in `spool`."""
    made = Spawner.fork()
    await nursery.start(made.run)
    for name in ("work", "spool"):
        (tmp_path / name).mkdir()
    names = iter(range(1000))
    yield ToolContext(
        7, str(tmp_path / "work"), {"MINE": "1"}, made, lambda: str(tmp_path / "spool" / str(next(names)))
    )
    nursery.cancel_scope.cancel()


def spooled(ctx: ToolContext) -> list[Path]:
    return list((Path(ctx.cwd).parent / "spool").iterdir())


def naps() -> bool:
    return subprocess.call(["pgrep", "-f", f"^sleep {NAP}$"], stdout=subprocess.DEVNULL) == 0


async def until_napping() -> None:
    with trio.fail_after(20):
        while not naps():
            await trio.sleep(0.01)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("echo hello", "hello\n[exit 0]"),
        ("true", "[exit 0]"),
        ("printf x; exit 3", "x\n[exit 3]"),
        ("echo a; echo b >&2; echo c", "a\nb\nc\n[exit 0]"),
        ("kill -9 $$", "[exit 137]"),
        ("no-such-thing 2>/dev/null", "[exit 127]"),
        ("cat", "[exit 0]"),
        ("echo 'ä\U0001f600'", "ä\U0001f600\n[exit 0]"),
        ('echo "$MINE $LLMPROC_PID $TERM"', "1 7 dumb\n[exit 0]"),
        ("basename $PWD", "work\n[exit 0]"),
        ("[[ a == a ]] && echo bash", "bash\n[exit 0]"),
    ],
)
async def test_it_answers_with_what_was_said_and_how_it_ended(ctx, command, text):
    """Stdout and stderr in their order, then the exit status on a line of its own; that is no error."""
    answer = await shell.bash(ctx, command=command)
    assert (answer.text, answer.is_error) == (text, False)
    assert not spooled(ctx)


async def test_the_daemons_keys_stay_with_it(ctx, monkeypatch):
    """A tool sees no variable that nobody gave it."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "canary-4711")
    answer = await shell.bash(ctx, command="env; cat /proc/$PPID/environ | tr '\\0' '\\n'")
    assert "canary" not in answer.text
    assert "[exit 0]" in answer.text


async def test_long_output_stays_in_its_file(ctx):
    """Fifty megabytes are counted, not read, and the loop goes on meanwhile."""
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            await trio.sleep(0.001)
            beats += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat)
        answer = await shell.bash(ctx, command="head -c 50000000 /dev/zero | tr '\\0' x")
        nursery.cancel_scope.cancel()
    assert answer.text == ""
    assert Path(answer.spool).stat().st_size == 50_000_000 + len("\n[exit 0]")
    assert Path(answer.spool).read_bytes()[-10:] == b"x\n[exit 0]"
    assert beats > 3


async def test_output_that_is_no_text_stays_in_its_file(ctx):
    """Bytes that are not UTF-8 are not lost in a text."""
    answer = await shell.bash(ctx, command="printf '\\377\\000'")
    assert Path(answer.spool).read_bytes() == b"\xff\0\n[exit 0]"


async def test_a_timeout_kills_and_tells_what_was_said(mock_clock, ctx):
    """Whatever the command started is gone, and the answer is an error that keeps the output so far."""
    command = f"(setsid sleep {NAP} &); echo begun; sleep {NAP}"
    answers: list[Output] = []

    async def call() -> None:
        answers.append(await shell.bash(ctx, command=command, timeout_s=0.5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        while not [path for path in spooled(ctx) if path.read_bytes()]:
            await trio.to_thread.run_sync(time.sleep, 0.01)
        mock_clock.jump(0.5)
    (answer,) = answers
    assert answer.text == "begun\n[timed out after 0.5 s]"
    assert answer.is_error
    assert not naps()


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
async def test_a_timeout_is_a_time(ctx, timeout_s):
    """What is no time limit is refused before anything runs."""
    with pytest.raises(ToolError, match="timeout_s"):
        await shell.bash(ctx, command="true", timeout_s=timeout_s)


async def test_cancelling_leaves_neither_process_nor_file(ctx):
    """When the cancelled call is over, so is everything it started."""
    async with trio.open_nursery() as nursery:

        async def call() -> None:
            await shell.bash(ctx, command=f"echo x; (setsid nohup sleep {NAP} &); sleep {NAP}")

        nursery.start_soon(call)
        await until_napping()
        nursery.cancel_scope.cancel()
    assert not naps()
    assert not spooled(ctx)


@pytest.mark.parametrize("command", [" \n", "a\0b", "\ud800"])
async def test_a_command_is_a_text(ctx, command):
    """Nothing, NUL and half characters are refused in words."""
    with pytest.raises(ToolError, match="command"):
        await shell.bash(ctx, command=command)
    assert not spooled(ctx)


async def test_a_folder_that_is_gone_is_named(ctx):
    """A process whose cwd was removed is told so."""
    Path(ctx.cwd).rmdir()
    with pytest.raises(ToolError, match=ctx.cwd):
        await shell.bash(ctx, command="true")
    assert not spooled(ctx)


async def test_a_command_of_a_mebibyte_runs(ctx):
    """Linux takes no argument over 128 KiB; a command may be longer, and its stdin is empty all the same."""
    text = "x" * (1 << 20)
    answer = await shell.bash(ctx, command=f"a='{text}'\ncat\necho ${{#a}}\nexit 5")
    assert answer.text == f"{1 << 20}\n[exit 5]"


async def test_what_runs_on_no_longer_writes_into_the_result(ctx):
    """A server that a command started lives on, but the result does not change under its reader."""
    answer = await shell.bash(
        ctx,
        command=f"(while :; do echo more; sleep 0.01; done; : {NAP}) & head -c 100000 /dev/zero; sleep 0.1",
    )
    size = Path(answer.spool).stat().st_size
    await trio.sleep(0.1)
    assert Path(answer.spool).stat().st_size == size
    assert Path(answer.spool).read_bytes().endswith(b"\n[exit 0]")
    await ctx.spawner.kill_all(7)


async def test_endless_output_is_stopped(ctx, monkeypatch):
    """`yes` does not fill the disk."""
    monkeypatch.setattr(shell, "OUTPUT_LIMIT", 1 << 20)
    monkeypatch.setattr(shell, "LOOK_S", 0.05)
    answer = await shell.bash(ctx, command="yes")
    assert answer.is_error
    assert Path(answer.spool).read_bytes().endswith(b"y\n[killed: more than 1 MiB of output]")


async def test_in_the_background_it_returns_at_once(ctx):
    """The output grows in the spool file, and ends with how the command did."""
    answer = await shell.bash(ctx, command="echo one; sleep 0.2; echo two; exit 4", background=True)
    assert answer.running is not None
    assert str(answer.running.os_pid) in answer.text
    assert await shell.see_out(answer) == 4
    assert Path(answer.spool).read_bytes() == b"one\ntwo\n[exit 4]"


async def test_a_background_command_dies_with_whoever_sees_it_out(ctx):
    """Cancelling `see_out` kills the command and what it started."""
    answer = await shell.bash(ctx, command=f"(setsid sleep {NAP} &); sleep {NAP}", background=True)
    await until_napping()
    with trio.move_on_after(0.01):
        await shell.see_out(answer)
    assert not naps()


async def test_many_commands_run_side_by_side(ctx):
    """Each gets its own output back."""
    answers: dict[int, str] = {}

    async def one(number: int) -> None:
        answers[number] = (await shell.bash(ctx, command=f"sleep 0.1; echo {number}")).text

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(one, number)
    assert answers == {number: f"{number}\n[exit 0]" for number in range(50)}
