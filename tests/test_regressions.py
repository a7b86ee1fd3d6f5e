"""What once went wrong, an example each: most of it was found by those who wished the daemon ill.

Where a test says that the daemon lives, it once did not: an exception in a task ends it, by design, and a
call in a model's answer would have ended it again at each boot.
"""

import os
from pathlib import Path

import pytest
import trio
from machinekit import refused, running, script, table, use

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Access
from llmprocd.kernel import proc
from llmprocd.kernel.state import Kernel, Request
from llmprocd.store import memory

PAGED = {"file_descriptor": {"max_direct_output_chars": 5}}
LONG = use("calculator", expression="111111 * 9")
"""A call whose result becomes fd:3 under PAGED."""


async def answers(house, program, *lines, **more):
    """What the tools answered in a process that lived to its end."""
    pid = await house.spawn(program, script(*lines), **more)
    (ended,) = (await house.call("proc.wait", pids=[pid])).procs
    assert ended.status == 0
    return await house.results(pid)


# --- words that are no numbers, paths that are no files ---------------------------------------------


@pytest.mark.parametrize("name", ["²", "%²", "9" * 5000])
async def test_what_looks_like_a_number_and_is_none_is_no_pid(machine, name):
    """Python calls `²` a digit and then refuses to read it: the daemon lives."""
    assert (await machine.call("proc.list", pids=[name])).procs == []
    with refused(Errno.ESRCH, name):
        await machine.call("proc.get", pid=name)


@pytest.mark.parametrize("path", ["a\0b", "/proc/nope", "x" * 300, "/proc/self/comm", "/dev/full", "ring"])
async def test_a_descriptor_cannot_be_written_there_and_the_model_is_told(machine, tmp_path, path):
    """Whatever the system says of a path is an answer: the daemon lives."""
    program = table("calculator", "fd_to_file", **PAGED)
    (tmp_path / "ring").symlink_to("ring")
    results = await answers(
        machine, program, LONG, use("fd_to_file", fd="fd:3", file_path=path), cwd=str(tmp_path)
    )
    assert results[-1]["is_error"]


@pytest.mark.parametrize("path", ["a\0b", "pipe", "/proc/self/environ", "missing", "ring"])
async def test_a_file_that_cannot_be_preloaded_is_an_answer(machine, tmp_path, path):
    """A pipe would have held a thread, and the daemon's end, for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "ring").symlink_to("ring")
    call = use("spawn", prompt="!say hi", additional_preload_files=[path])
    with trio.fail_after(20):
        results = await answers(machine, table("spawn"), call, cwd=str(tmp_path))
    assert results[-1]["is_error"]
    assert "additional_preload_files" in results[-1]["content"]


@pytest.mark.parametrize("path", ["a\0b", "pipe", "/proc/self/environ", "missing"])
async def test_a_stdin_that_is_no_regular_file_is_refused(machine, tmp_path, path):
    """The daemon's own memory and environment are files, too."""
    os.mkfifo(tmp_path / "pipe")
    with trio.fail_after(20), refused(Errno.EINVAL, "stdin_path"):
        await machine.spawn(prompt="hi", stdin_path=str(tmp_path / path))


async def test_a_stdin_becomes_the_first_descriptor(machine, tmp_path):
    """The positive control of the refusals."""
    Path(tmp_path, "in").write_bytes(b"\xff" * 300_000)
    pid = await machine.spawn(prompt="!say hi", stdin_path=str(tmp_path / "in"))
    assert (await machine.call("fd.stat", pid=pid, fd=3)).size == 300_000


async def test_a_folder_to_work_in_is_absolute(machine):
    """Else it would be relative to wherever the daemon was started."""
    with refused(Errno.EINVAL, "cwd"):
        await machine.spawn(interactive=True, cwd="here")


# --- descriptors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fd", [1, 2])
async def test_output_is_not_handed_on_under_its_own_number(machine, fd):
    """The child's next descriptor would have been its stdout or stderr, and unreadable."""
    pid = await machine.spawn(interactive=True)
    with refused(Errno.EBADF, f"fd:{fd}"):
        await machine.spawn(prompt="!say hi", fds=[f"{pid}/fd:{fd}"])
    (result,) = await answers(machine, table("spawn"), use("spawn", prompt="!say hi", fds=[f"fd:{fd}"]))
    assert "EBADF" in result["content"]


class FullDisk(memory.Store):
    """A store that has no room for contents."""

    async def adopt(self, _spool, file, *, sync=True):
        assert sync
        raise KernelError(Errno.ENOSPC, f"no space for file {file}")


async def test_an_output_that_finds_no_room_is_an_error_the_model_reads(tmp_path):
    """A full disk refuses a file, and the daemon lives."""
    Path(tmp_path, "big").write_text("x\n" * 100_000)
    async with running(store=FullDisk()) as house:
        (result,) = await answers(
            house, table("read_file"), use("read_file", file_path=str(tmp_path / "big"))
        )
    assert result["is_error"]
    assert "ENOSPC" in result["content"]


async def test_an_output_that_stays_whole_leaves_no_file(machine, tmp_path):
    """Where descriptors are off, a long output is read from the disk once."""
    Path(tmp_path, "big").write_text("x\n" * 100_000)
    program = table("read_file", file_descriptor={"enabled": False})
    (result,) = await answers(machine, program, use("read_file", file_path=str(tmp_path / "big")))
    assert len(result["content"]) == 200_000
    blobs = Path(machine.store.disk_path(0)).parent
    assert list(blobs.iterdir()) == []


# --- ends, and who waits for them -------------------------------------------------------------------


async def test_a_process_killed_and_removed_at_once_leaves_its_alarm_nothing(machine):
    """Both requests may come in one chunk; the alarm looked for the process afterwards. The daemon lives."""
    pid = await machine.spawn(interactive=True, limits={"wall": 1000})
    await trio.sleep(0.01)
    machine.begin("proc.signal", pid=pid, signal="KILL")
    machine.begin("proc.remove", pids=[pid])
    await trio.sleep(0.01)
    assert (await machine.finish(None, "!say hi")).status == 0


async def test_a_soft_wall_limit_is_told_once(autojump_clock):
    """Each later commit of the process used to ring it again."""
    async with running() as house:
        program = table("read_file")
        pid = await house.spawn(program, "!sleep 5\n!say a", limits={"wall": "1s:1000s"}, interactive=True)
        await house.until(pid, "api")
        await trio.sleep(2)
        await house.call("proc.limits", pid=pid, set={"wall": "2s:1001s"})
        await house.call("proc.renice", pid=pid, nice=1)
        await house.call("proc.wait", pids=[pid])
        assert house.types(pid).count("signal") == 1


async def test_who_waits_for_two_finds_the_status_of_one_that_was_removed(autojump_clock):
    """Whoever waits always finds the status."""
    async with running() as house:
        one = await house.spawn(prompt="!say A")
        two = await house.spawn(prompt="!sleep 2\n!say B")
        async with trio.open_nursery() as nursery:
            waited = []

            async def wait():
                waited.extend((await house.call("proc.wait", pids=[two, one])).procs)

            nursery.start_soon(wait)
            await trio.sleep(1)
            await house.call("proc.remove", pids=[one])
        assert [(row.pid, row.status, row.message) for row in waited] == [(two, 0, "B"), (one, 0, "A")]


async def test_a_parent_reads_what_a_removed_child_said(autojump_clock):
    """The fork's answer waits for the last child; the first was removed before."""
    async with running() as house:
        pid = await house.spawn(table("fork"), "!fork !say A | !sleep 2\\n!say B\n!say x")
        await trio.sleep(1)
        await house.call("proc.remove", pids=[next(iter(house.m.kernel.children[pid]))])
        await house.call("proc.wait", pids=[pid])
        (result,) = await house.results(pid)
        assert '"message":"A","status":0' in result["content"]


async def test_a_run_that_never_began_does_not_tell_of_another(autojump_clock):
    """The process ended before it came to that message."""
    async with running() as house:
        pid = await house.spawn(interactive=True)
        await house.call("proc.run", pid=pid, prompt="!say first")
        await house.call("proc.signal", pid=pid, signal="STOP")
        async with trio.open_nursery() as nursery:
            told = []

            async def run():
                told.append(await house.call("proc.run", pid=pid, prompt="!say second"))

            nursery.start_soon(run)
            await trio.sleep(1)
            await house.call("proc.signal", pid=pid, signal="KILL")
        assert (told[0].api_calls, told[0].message, told[0].status) == (0, "", 137)


async def test_a_wait_of_no_time_is_a_look(autojump_clock):
    """`timeout_s: 0` meant for ever."""
    async with running() as house:
        lines = use("spawn", prompt="!sleep 1000", wait=False), use("wait", timeout_s=0)
        results = await answers(house, table("spawn", "wait"), *lines)
        assert "still running" in results[-1]["content"]
        assert trio.current_time() < 100


# --- signals ----------------------------------------------------------------------------------------


class Forgetful(memory.Store):
    """A store whose cache keeps nothing."""

    def node_nowait(self, _number):
        return None

    async def node(self, number):
        await trio.lowlevel.checkpoint()
        return self._seen.nodes.get(number)

    async def path(self, head, stop=None):
        found = [await self.node(head)]
        while found[-1].parent not in {None, stop}:
            found.append(await self.node(found[-1].parent))
        return found[::-1]


async def test_a_signal_reaches_a_process_whose_head_is_not_in_memory(autojump_clock):
    """A signal to many fetches their heads first; the cache may have forgotten the first by the last."""
    async with running(store=Forgetful()) as house:
        pid = await house.spawn(table("spawn"), use("spawn", prompt="!sleep 1000"))
        await house.until(pid, "wait")
        await house.call("proc.signal", pid=pid, signal="TERM", tree=True)
        assert (await house.call("proc.wait", pids=[pid])).procs[0].status == 143


@pytest.mark.parametrize("signal", ["STOP", "INT"])
async def test_a_tool_does_not_start_once_its_process_was_told_not_to(autojump_clock, signal):
    """The signal came while the intent was on its way to the disk."""
    async with running(latency=1) as house:
        pid = await house.spawn(table("write_stderr"), use("write_stderr", message="hello"), interactive=True)
        while house.proc(pid).at.name != "ASKS":
            await trio.sleep(0.1)
        await house.call("proc.signal", pid=pid, signal=signal)
        await trio.sleep(10)
        assert house.proc(pid).stderr == 0
        await house.call("proc.signal", pid=pid, signal="CONT")
        await house.until(pid, "fd:0")
        assert house.proc(pid).stderr == (len("hello\n") if signal == "STOP" else 0)


async def test_a_model_makes_its_child_read_its_program_again(autojump_clock, tmp_path):
    """The signal was sent, and nobody read the file."""
    path = tmp_path / "it.toml"
    text = '[model]\nname = "claude-sonnet-5-5"\nprovider = "script"\n[tools]\nbuiltin = ["spawn", "kill"]\n'
    path.write_text(text)
    async with running() as house:
        pid = await house.spawn(str(path), use("spawn", prompt="!sleep 1000", wait=False), interactive=True)
        await house.until(pid, "fd:0")
        (child,) = house.m.kernel.children[pid]
        path.write_text(text + '[prompt]\nsystem = "anew"\n')
        await house.call("proc.run", pid=pid, prompt=use("kill", pid=child, signal="HUP"))
        assert b"anew" in house.m.kernel.image(house.proc(child)).prefix


# --- who may what, and how much ---------------------------------------------------------------------


async def test_a_tool_does_not_put_its_process_before_others(machine):
    """As with nice(1), only up."""
    pid = await machine.spawn(interactive=True, nice=5, access="admin")
    tool = machine.caller(pid)
    child = await machine.spawn(interactive=True, nice=-20, by=tool)
    assert machine.proc(child).nice == 5
    with refused(Errno.EPERM, "nice"):
        await machine.call("proc.renice", pid=child, nice=4, by=tool)
    await machine.call("proc.renice", pid=child, nice=6, by=tool)
    assert machine.proc(child).access is Access.WRITE


async def test_a_mailbox_is_full_some_time(machine):
    """All of it is written anew with each commit: a thousand long messages took half a minute."""
    pid = await machine.spawn(interactive=True)
    await machine.call("proc.signal", pid=pid, signal="STOP")
    for _ in range(4):
        await machine.call("proc.send", pid=pid, text="x" * (proc.MAILBOX // 4))
    with refused(Errno.EAGAIN, "full"):
        await machine.call("proc.send", pid=pid, text="one more")


def test_answered_requests_are_forgotten_after_a_day():
    """The store forgot them and memory did not."""
    k = Kernel()
    k.now = 1_000_000.0
    k.put_request(Request(0, "old", b"", b"", k.now - 100_000))
    k.put_request(Request(0, "new", b"", b"", k.now - 10))
    k.forget_requests(86_400)
    assert list(k.requests) == [(0, "new")]
