"""store.gc: what nothing refers to goes, and nothing else."""

import random

import pytest
import trio
from machinekit import refused, running, table

from llmprocd.abi.errno import Errno
from llmprocd.kernel import file
from llmprocd.kernel.state import Limit
from llmprocd.store import memory
from llmprocd.syscall import sysstore

PAGED = table("write_stderr", file_descriptor={"max_input_chars": 10, "default_page_size": 10})
TALK = "Some words that are longer than ten characters."


async def removed(house, pid):
    await house.call("proc.signal", pid=pid, signal="KILL")
    await house.call("proc.wait", pids=[pid])
    await house.call("proc.remove", pids=[pid])


async def test_what_a_removed_process_had_is_freed(machine):
    """Its messages and descriptors; a dry run says how much that is, and the second time there is none."""
    pid, other = [(await machine.finish(PAGED, TALK)).pid for _ in range(2)]
    await machine.call("proc.remove", pids=[pid])
    would = await machine.call("store.gc", dry_run=True)
    assert (would.files, would.messages) == (1, 2)
    assert would.bytes > len(TALK)
    assert await machine.call("store.gc", dry_run=True) == would
    assert await machine.call("store.gc") == would
    none = await machine.call("store.gc")
    assert (none.files, none.messages, none.bytes) == (0, 0, 0)
    assert len((await machine.call("proc.history", pid=other)).messages) == 2
    assert (await machine.call("fd.read", pid=other, fd=3)).data.decode() == TALK


async def test_a_fork_keeps_what_it_shares(machine):
    pid = await machine.spawn(PAGED, TALK, interactive=True)
    await machine.until(pid, "fd:0")
    (child,) = (await machine.call("proc.fork", pid=pid)).pids
    await removed(machine, pid)
    freed = await machine.call("store.gc")
    assert (freed.files, freed.messages) == (0, 0)
    assert (await machine.call("fd.read", pid=child, fd=3)).data.decode() == TALK
    result = await machine.call("proc.run", pid=child, prompt="!say on")
    assert result.message == "on"


async def test_tools_may_not(machine):
    pid = await machine.spawn(interactive=True)
    with refused(Errno.EPERM):
        await machine.call("store.gc", by=machine.caller(pid))


async def test_a_reader_is_told_that_a_file_is_gone(machine):
    """One that was on its way when the process was removed."""
    ended = await machine.finish(PAGED, TALK)
    p = machine.proc(ended.pid)
    await machine.call("proc.remove", pids=[p.pid])
    await machine.call("store.gc")
    with refused(Errno.ENOENT):
        file.file(machine.m.kernel, p, file.lookup(p, 3))


@pytest.mark.parametrize("seed", range(20))
async def test_nothing_is_missed_while_others_go_on(seed, autojump_clock):
    """Garbage is looked for while processes run, fork, travel and are removed; then the power goes."""
    chance = random.Random(seed)
    store = memory.Store(latency=0.01)
    async with running(store=store) as house:
        house.m.kernel.defaults = {"procs": Limit(None, 1000.0)}
        await house.spawn(PAGED, TALK, interactive=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(collecting, house)
            for _ in range(60):
                await trio.sleep(chance.random() * 0.05)
                await move(house, chance)
            nursery.cancel_scope.cancel()
        await whole(house)
        freed = await house.call("store.gc")
        await house.m.wait_durable()
    async with running(store=store.crash()) as again:
        await whole(again)
        none = await again.call("store.gc")
        assert (none.files, none.messages) == (0, 0), freed


async def collecting(house):
    while True:
        await sysstore.collect(house.m)
        await trio.sleep(0.01)


async def move(house, chance):
    """Something that a user does to one of the processes."""
    pid = chance.choice(sorted(house.m.kernel.procs))
    with_text = {"text": TALK} if chance.random() < 0.5 else {"text": "!say ok"}
    match chance.choice(["send", "send", "fork", "fork", "goto", "remove", "spawn"]):
        case "send" if house.proc(pid).live:
            await house.call("proc.send", pid=pid, **with_text)
        case "fork" if house.proc(pid).head is not None:
            await house.call("proc.fork", pid=pid)
        case "goto" if house.proc(pid).live and house.proc(pid).head is not None:
            rows = (await house.call("proc.history", pid=pid, all=True)).messages
            await house.call("proc.goto", pid=pid, to=chance.choice(rows).id, **with_text)
        case "remove" if len(house.m.kernel.procs) > 2:
            await removed(house, pid)
        case _:
            await house.spawn(PAGED, TALK, interactive=True)


async def whole(house):
    """Every branch of every process can be read, and every descriptor."""
    for pid, p in house.m.kernel.procs.items():
        rows = (await house.call("proc.history", pid=pid, all=True)).messages
        known = {row.id for row in rows}
        assert {row.parent for row in rows} <= {None, *known}
        assert all(f"m{head}" in known for head in (p.head, *p.tips) if head is not None)
        for fd in p.fds:
            assert (await house.call("fd.read", pid=pid, fd=fd)).data.decode() == TALK
