"""The spawner: every process of a tool is known, and none outlives what it should."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from llmprocd.abi.types import Pid
from llmprocd.tools import spawner
from llmprocd.tools.output import ToolContext, ToolError
from llmprocd.tools.spawner import Running, Spawner, SpawnerError

SEVEN, EIGHT = Pid(7), Pid(8)
ENV = {"PATH": os.environ["PATH"]}
BASE = os.getpid() * 1000
"""Seconds: sleepers of this run are told from those of other runs on this machine by how long they sleep."""

FAMILY = f"""
sleep {BASE + 1} &
setsid sleep {BASE + 2} &
(setsid nohup sleep {BASE + 3} >/dev/null 2>&1 &)
setsid sh -c '(sleep {BASE + 4} &); trap "" TERM HUP; sleep {BASE + 5}; true' &
sleep {BASE + 6}
"""
"""Six sleepers: a child, sessions of their own, daemonised orphans, and one below a deaf shell."""


@pytest.fixture
async def tools(nursery: trio.Nursery) -> AsyncIterator[Spawner]:
    """A spawner that runs."""
    made = Spawner.fork()
    await nursery.start(made.run)
    yield made
    nursery.cancel_scope.cancel()


@pytest.fixture
def out(tmp_path: Path):
    """An open file for what a tool says."""
    with (tmp_path / "out").open("w+b", buffering=0) as file:
        yield file


async def shell(tools: Spawner, command: str, out, owner: Pid = SEVEN, **more) -> Running:
    return await tools.start(
        owner, ["/bin/bash", "-c", command], **{"cwd": "/", "env": ENV, "stdout": out.fileno()} | more
    )


def said(out) -> str:
    return os.pread(out.fileno(), 1 << 20, 0).decode()


def sleepers() -> list[int]:
    """The sleep commands of this run that are alive."""
    names: list[int] = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if words[0] == b"sleep" and words[1].isdigit() and BASE < int(words[1]) < BASE + 1000:
            names.append(int(words[1]) - BASE)
    return sorted(names)


def pid_of(name: int) -> int:
    return int(subprocess.check_output(["pgrep", "-f", f"^sleep {BASE + name}$"]).split()[0])


async def until_up(count: int = 6) -> None:
    with trio.fail_after(20):
        while len(sleepers()) < count:
            await trio.sleep(0.01)


async def until_gone() -> None:
    with trio.fail_after(20):
        while sleepers():
            await trio.sleep(0.01)


async def test_a_command_runs_where_and_as_it_was_told(tools, out, tmp_path):
    """Folder, environment, session, descriptors and core limit are what was asked for."""
    run = await shell(
        tools, "pwd; echo $GREETING; ulimit -c; ps -o sid= -p $$; echo $$; ls /proc/self/fd; exit 3", out,
        cwd=str(tmp_path), env={**ENV, "GREETING": "salve"},
    )  # fmt: skip
    assert await run.wait() == 3
    await run.killed()
    cwd, greeting, core, sid, pid, *fds = said(out).split()
    assert (cwd, greeting, core) == (str(tmp_path), "salve", "0")
    assert sid == pid == str(run.os_pid)
    assert fds == ["0", "1", "2", "3"]  # 3 is the folder that ls reads


async def test_the_environment_is_exactly_what_was_given(tools, out):
    """Nothing of the daemon's environment comes along by itself."""
    run = await tools.start(SEVEN, ["/usr/bin/env"], cwd="/", env={"A": "1"}, stdout=out.fileno())
    await run.wait()
    assert said(out) == "A=1\n"


async def test_streams_can_be_three_files(tools, out, tmp_path):
    """Stdin, stdout and stderr of a tool server are kept apart."""
    with (tmp_path / "err").open("w+b") as err, spawner.memory_file(b"question") as source:
        run = await shell(tools, "cat; echo oops >&2", out, stdin=source.fileno(), stderr=err.fileno())
        assert await run.wait() == 0
        assert (said(out), said(err)) == ("question", "oops\n")


async def test_a_signal_is_128_more(tools, out):
    """A command that dies of a signal has the status a shell gives it."""
    run = await shell(tools, "kill -TERM $$", out)
    assert await run.wait() == 128 + signal.SIGTERM


async def test_signals_have_their_default_meaning_in_tools(tools, out):
    """What the spawner ignores for itself, its tools do not inherit."""
    run = await shell(tools, "yes | head -1; kill -HUP $$", out)
    assert await run.wait() == 128 + signal.SIGHUP
    assert said(out) == "y\n"


@pytest.mark.parametrize(
    ("argv", "cwd", "text"),
    [
        (["true"], "/no/such/folder", "/no/such/folder: No such file"),
        (["no-such-command"], "/", "no-such-command: No such file"),
        (["/etc/passwd"], "/", "/etc/passwd: Permission denied"),
        (["true", "x" * 200_000], "/", "true: Argument list too long"),
        (["true", "a\0b"], "/", "NUL"),
        (["true", "\ud800"], "/", "surrogate"),
    ],
)
async def test_what_cannot_start_says_why(tools, out, argv, cwd, text):
    """A start that fails names what failed, and leaves no tool behind."""
    with pytest.raises(ToolError, match=text):
        await tools.start(SEVEN, argv, cwd=cwd, env=ENV, stdout=out.fileno())
    assert not tools._running


async def test_a_mebibyte_of_arguments_arrives(tools, out):
    """A request may be much longer than a datagram."""
    words = ["x" * 100_000] * 10
    run = await tools.start(
        SEVEN, ["bash", "-c", "cat <<< ${*} | wc -c", "-", *words], cwd="/", env=ENV, stdout=out.fileno()
    )
    assert await run.wait() == 0
    assert said(out) == "1000010\n"


async def test_kill_takes_the_whole_tree(tools, out):
    """Sessions, daemons and those that ignore signals are gone when `killed` returns."""
    run = await shell(tools, FAMILY, out)
    await until_up()
    run.kill()
    await run.killed()
    assert not sleepers()
    assert await run.wait() == 137
    run.kill()


async def test_a_small_fork_bomb_is_put_out(tools, out):
    """A tree that forks on while it is killed, and whose first process has gone, is killed all the same."""
    bomb = "f() { [ $1 = 0 ] || { f $(($1-1)) & f $(($1-1)) & }; exec sleep SECONDS; }; f 7 &"
    run = await shell(tools, bomb.replace("SECONDS", str(BASE + 50)), out)
    await run.wait()
    with trio.fail_after(60):
        await run.end()
    assert not sleepers()


async def test_tools_that_start_one_after_the_other_are_put_out(tools, out):
    """Each in a session of its own, and the one that starts them too."""
    loop = f"for i in $(seq 500); do setsid sleep {BASE + 50} & sleep 0.005; done"
    run = await shell(tools, f"setsid sh -c '{loop}' &", out)
    await until_up(20)
    with trio.fail_after(60):
        await run.end()
    assert not sleepers()


async def test_what_a_command_leaves_behind_lives_until_its_owner_ends(tools, out):
    """The command's end is told at once; kill_all takes what it has left, and nobody else's."""
    run = await shell(tools, f"(setsid sleep {BASE + 1} &); exit 4", out)
    other = await shell(tools, f"exec sleep {BASE + 2}", out, owner=EIGHT)
    assert await run.wait() == 4
    assert not run.alone
    await until_up(2)
    assert sleepers() == [1, 2]
    await tools.kill_all(SEVEN)
    assert sleepers() == [2]
    other.kill()
    await other.killed()


async def test_a_command_that_leaves_nothing_is_alone(tools, out):
    """Whether anybody may still write to its output is known with its status."""
    run = await shell(tools, "sleep 0.01 & wait", out)
    await run.wait()
    assert run.alone


async def test_orphans_of_a_killed_init_are_killed(tools, out):
    """A tool that kills its own init gains nothing: the spawner finds what is left."""
    run = await shell(tools, FAMILY, out)
    await until_up()
    os.kill(run.init_pid, signal.SIGKILL)
    await run.killed()
    assert not sleepers()
    assert await run.wait() == 137


async def test_a_cancelled_start_leaves_nothing(tools, out):
    """Whenever the cancellation comes, nothing runs afterwards."""
    for delay in (0, 0.0005, 0.001, 0.002, 0.004):
        with trio.move_on_after(delay):
            run = await shell(tools, f"exec sleep {BASE + 1}", out)
            await run.end()
    assert not tools._running
    assert not sleepers()


async def test_two_hundred_at_once(tools, out):
    """More tools than fit into the socket or the descriptor limits on the way."""
    runs: list[Running] = []

    async def one() -> None:
        runs.append(await tools.start(SEVEN, ["sleep", str(BASE + 1)], cwd="/", env=ENV, stdout=out.fileno()))

    async with trio.open_nursery() as many:
        for _ in range(200):
            many.start_soon(one)
    assert len(sleepers()) == 200
    await tools.kill_all(SEVEN)
    assert not sleepers()


async def test_the_owner_of_any_descendant_is_found(tools, out):
    """Child, session leader, daemonised orphan: each is its LLM process's."""
    mine = await shell(tools, FAMILY, out)
    theirs = await shell(tools, f"exec sleep {BASE + 7}", out, owner=EIGHT)
    await until_up(7)
    for name in range(1, 7):
        assert await tools.owner(pid_of(name)) == SEVEN
    assert await tools.owner(theirs.os_pid) == EIGHT
    assert await tools.owner(os.getpid()) is None
    assert await tools.owner(1) is None
    await mine.end()


async def test_a_tool_may_call_back_before_its_init_has_been_heard_of(tools, out):
    """It is neither refused nor taken for the user: the question waits for the name of its init."""
    run = await shell(tools, f"exec sleep {BASE + 1}", out)
    init, run.init_pid = run.init_pid, 0
    owners: list[Pid | None] = []

    async def ask() -> None:
        owners.append(await tools.owner(run.os_pid))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert owners == []
        run.hear({"init": init})
        tools._spread()
    assert owners == [SEVEN]
    await run.end()


ASK = """
import os, signal, subprocess, trio
from llmprocd.tools.spawner import Spawner

async def main():
    tools = Spawner.fork()
    signal.alarm(20)
    for peer in (os.getpid(), os.getppid()):
        print(await tools.owner(peer))
    ended = subprocess.Popen(["true"])
    ended.wait()
    try:
        await tools.owner(ended.pid)
    except ProcessLookupError:
        print("gone")

trio.run(main)
"""
HIDING = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c"]
CONFINED = "setpriv --regid=1 --clear-groups --bounding-set=-all --inh-caps=-all"


@pytest.mark.parametrize("hidepid", [1, 2, 4])
def test_others_that_proc_does_not_show_are_no_tools(hidepid):
    """On a host with hidepid, and with ProtectProc=, a peer of another user, or one's own below another's."""
    mount = f"mount -t proc -o hidepid={hidepid} proc /proc"
    if subprocess.run([*HIDING, mount], capture_output=True, timeout=60, check=False).returncode:
        pytest.skip("/proc cannot be mounted anew here")
    below = f'sh -c "{CONFINED} $0 -c \\"\\$1\\" < /dev/null; true" $0 "$1"'
    words = [*HIDING, f"{mount} && {below}; true", sys.executable, ASK]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["None", "None", "gone"], done.stderr


async def test_a_peer_that_is_gone_has_no_owner(tools):
    """Nobody is taken for the user because he left in time."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    for pid in (gone.pid, 0, -1):
        with pytest.raises(ProcessLookupError):
            await tools.owner(pid)


async def test_an_orphan_of_the_spawner_is_refused(tools, out):
    """What hangs under the spawner without an init of its own is nobody's, least of all the user's."""
    run = await shell(tools, f"exec sleep {BASE + 1}", out)
    tools._running.remove(run)
    with pytest.raises(ProcessLookupError):
        await tools.owner(run.os_pid)
    tools._running.add(run)
    await run.end()


async def test_the_spawners_end_is_an_error(out):
    """A daemon without its spawner cannot go on, and its tools do not either."""
    with pytest.raises(SpawnerError), trio.fail_after(20):
        await lose_the_spawner(out)
    assert not sleepers()


async def lose_the_spawner(out) -> None:
    made = Spawner.fork()
    with trio.CancelScope():
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(made.run)
                await shell(made, FAMILY, out)
                await until_up()
                os.kill(made.os_pid, signal.SIGKILL)
        except* SpawnerError as group:
            raise group.exceptions[0] from None


async def test_a_stop_waits_until_all_is_gone(out):
    """When `run` has been cancelled and has returned, no tool and no spawner is left."""
    made = Spawner.fork()
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        run = await shell(made, FAMILY, out)
        await until_up()
        nursery.cancel_scope.cancel()
    assert not sleepers()
    assert await run.wait() == 137
    assert not Path(f"/proc/{made.os_pid}").exists()
    with pytest.raises(SpawnerError):
        await shell(made, "true", out)


async def test_signals_to_the_terminal_do_not_reach_tools(tools, out):
    """Spawner and tools are in other sessions than the daemon, and a TERM is the daemon's to act on."""
    run = await shell(tools, f"exec sleep {BASE + 1}", out)
    assert len({os.getsid(pid) for pid in (0, tools.os_pid, run.os_pid)}) == 3
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(tools.os_pid, number)
    again = await shell(tools, "echo still here", out)
    assert await again.wait() == 0
    await run.end()


DAEMON = """
import sys, trio
from llmprocd.tools.spawner import Spawner
async def main():
    made = Spawner.fork()
    async with trio.open_nursery() as nursery:
        await nursery.start(made.run)
        for _ in range(3):
            env = {"PATH": "/bin:/usr/bin"}
            await made.start(7, ["bash", "-c", sys.argv[1]], cwd="/", env=env, stdout=2)
        print("ready", made.os_pid, flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


async def test_nothing_survives_a_daemon_that_is_killed():
    """After kill -9 of the daemon its spawner kills every tool, and then ends."""
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, FAMILY],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with daemon:
        ready, pid = daemon.stdout.readline().split()
        assert ready == b"ready"
        await until_up(18)
        daemon.kill()
    await until_gone()
    with trio.fail_after(20):
        while Path(f"/proc/{int(pid)}").exists():
            await trio.sleep(0.01)


def test_tools_get_an_environment_by_name_only(monkeypatch):
    """Keys and whatever else nobody thought of stay with the daemon; LLMPROC_PID cannot be forged."""
    canary = {
        "ANTHROPIC_API_KEY": "c",
        "MY_TOKEN": "c",
        "AWS_SECRET_ACCESS_KEY": "c",
        "LC_API_KEY": "c",
        "FOO": "c",
    }
    for name, value in {**canary, "LC_TIME": "C", "LLMPROC_SOCKET": "/s", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    ctx = ToolContext(SEVEN, "/", {"MINE": "1", "LLMPROC_PID": "1"}, None, str)
    env = spawner.tool_environment(ctx)
    assert not canary.keys() & env.keys()
    assert "c" not in env.values()
    assert env["PATH"] == os.environ["PATH"]
    wanted = {"MINE": "1", "LLMPROC_PID": "7", "TERM": "dumb", "LC_TIME": "C", "LLMPROC_SOCKET": "/s"}
    assert env.items() >= wanted.items()


async def test_no_process_below_the_daemon_holds_its_key(monkeypatch, nursery, out):
    """The spawner and its inits are not copies of the daemon: neither environment nor memory comes along."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "canary-" + "9f3a")
    made = Spawner.fork()
    await nursery.start(made.run)
    run = await shell(made, f"exec sleep {BASE + 1}", out)
    for pid in (made.os_pid, run.init_pid, run.os_pid):
        assert b"canary-" not in Path(f"/proc/{pid}/environ").read_bytes()
    nursery.cancel_scope.cancel()
