"""Retention: what is forgotten, when, and what never is."""

import msgspec
import pytest
import trio
from machinekit import running, script, table

from llmprocd.config import Config
from llmprocd.syscall import sweep

DAY = 86_400.0


async def ended(house, count):
    pids = [await house.spawn(table(), "!say hi") for _ in range(count)]
    await house.call("proc.wait", pids=pids)
    return pids


async def swept(house, hours=1.0):
    """Let the sweeper run for some hours of virtual time."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sweep.run, house.m)
        await trio.sleep(hours * 3600)
        nursery.cancel_scope.cancel()


async def test_an_ended_process_is_kept_for_the_days_that_were_set(autojump_clock):
    async with running(config=Config(keep_days=2)) as house:
        (pid,) = await ended(house, 1)
        await trio.sleep(2 * DAY - 10)
        assert sweep.due(house.m) == []
        await trio.sleep(20)
        assert sweep.due(house.m) == [pid]


async def test_age_counts_from_the_end_and_not_from_the_start(autojump_clock):
    async with running(config=Config(keep_days=2)) as house:
        pid = await house.spawn(interactive=True)
        await trio.sleep(10 * DAY)
        await house.call("proc.signal", pid=pid, signal="KILL")
        assert sweep.due(house.m) == []


async def test_of_too_many_the_oldest_go_first(autojump_clock):
    async with running(config=Config(keep_ended=3)) as house:
        pids = []
        for _ in range(5):
            pids += await ended(house, 1)
            await trio.sleep(1)
        assert sweep.due(house.m) == pids[:2]
        await swept(house)
        assert sorted(house.m.kernel.procs) == pids[2:]


async def test_a_living_process_is_never_forgotten(autojump_clock):
    async with running(config=Config(keep_days=1, keep_ended=1)) as house:
        pids = [await house.spawn(interactive=True) for _ in range(3)]
        await trio.sleep(100 * DAY)
        assert sweep.due(house.m) == []
        await swept(house)
        assert list(house.m.kernel.procs) == pids


async def parent_and_child(house, *, collected, parent_lives):
    parent = await house.spawn(interactive=True)
    (child,) = (await house.call("proc.fork", pid=parent)).pids
    await house.call("proc.signal", pid=child, signal="KILL")
    if collected:
        await house.call("proc.wait", pids=[child])
    if not parent_lives:
        await house.call("proc.signal", pid=parent, signal="KILL")
    return child


@pytest.mark.parametrize(
    ("collected", "parent_lives", "goes"),
    [(False, True, False), (True, True, True), (False, False, True), (True, False, True)],
)
async def test_a_child_that_its_living_parent_has_not_collected_stays(
    autojump_clock, collected, parent_lives, goes
):
    async with running(config=Config(keep_days=1)) as house:
        child = await parent_and_child(house, collected=collected, parent_lives=parent_lives)
        await trio.sleep(100 * DAY)
        assert (child in sweep.due(house.m)) == goes


async def test_a_child_that_its_parent_waits_for_stays_though_others_have_collected_it(autojump_clock):
    prompt = script(r"!fork !say first | !sleep 100\n!say second", "!say {{result}}")
    async with running(config=Config(keep_ended=0)) as house:
        parent = await house.spawn(table("fork"), prompt)
        await house.until(parent, "wait")
        first, _ = house.m.kernel.children[parent]
        await house.call("proc.wait", pids=[first])
        await swept(house, hours=0.01)
        assert first in house.m.kernel.procs
        store = house.store
    async with running(config=Config(keep_ended=0), store=store.crash()) as house:
        ended = (await house.call("proc.wait", pids=[parent])).procs[0]
        assert '"message":"first","status":0' in ended.message


async def test_children_that_must_stay_do_not_push_others_out(autojump_clock):
    """They count neither as too many nor as room."""
    async with running(config=Config(keep_ended=2)) as house:
        kept = [await parent_and_child(house, collected=False, parent_lives=True) for _ in range(3)]
        pids = await ended(house, 3)
        assert sweep.due(house.m) == pids[:1]
        assert not set(kept) & set(sweep.due(house.m))


async def test_what_is_forgotten_is_gone_from_the_store_too(autojump_clock):
    async with running(config=Config(keep_days=1)) as house:
        await ended(house, 2)
        await trio.sleep(DAY + 10)
        await swept(house)
        await house.m.wait_durable()
        assert house.store.load().procs == []


async def test_thousands_are_forgotten_in_parts(autojump_clock, monkeypatch):
    """One commit for each part: others have their turn in between."""
    monkeypatch.setattr(sweep, "AT_ONCE", 10)
    async with running(config=Config(keep_days=1)) as house:
        await ended(house, 35)
        await trio.sleep(DAY + 10)
        before = house.m.ticket
        await swept(house, hours=0.5)
        assert house.m.kernel.procs == {}
        assert house.m.ticket - before == 4


async def test_the_sweeper_comes_again(autojump_clock):
    async with running(config=Config(keep_days=1)) as house, trio.open_nursery() as nursery:
        nursery.start_soon(sweep.run, house.m)
        await ended(house, 2)
        await trio.sleep(DAY + 2 * sweep.EVERY_S)
        assert house.m.kernel.procs == {}
        nursery.cancel_scope.cancel()


async def test_what_the_forgotten_had_is_freed_once_a_day(autojump_clock):
    """Their messages and programs; those of others stay."""
    async with running(config=Config(keep_days=1)) as house:
        other = await house.spawn(table(prompt={"system": "Another."}), "!say hi", interactive=True)
        await ended(house, 2)
        await trio.sleep(DAY + 10)
        await swept(house, hours=sweep.GC_EVERY + 1)
        freed = await house.call("store.gc", dry_run=True)
        assert (freed.files, freed.messages) == (0, 0)
        assert list(house.m.kernel.images) == [house.proc(other).image]
        assert await house.m.node(house.proc(other).head)
        await house.m.wait_durable()
        assert len(house.store.load().images) == 1


async def test_a_program_is_kept_for_an_hour_after_its_last_process(autojump_clock, machine):
    """A step that is being cancelled may still look at it; who runs it again in that time keeps it."""
    (pid,) = await ended(machine, 1)
    used = machine.proc(pid).image
    await machine.call("proc.remove", pids=[pid])
    unused = sweep.free_unused(machine.m, frozenset())
    assert (unused, set(machine.m.kernel.images)) == ({used}, {used})
    (pid,) = await ended(machine, 1)
    assert machine.proc(pid).image == used
    assert sweep.free_unused(machine.m, unused) == set()
    assert set(machine.m.kernel.images) == {used}
    await machine.call("proc.remove", pids=[pid])
    sweep.free_unused(machine.m, sweep.free_unused(machine.m, frozenset()))
    assert machine.m.kernel.images == {}


async def test_a_family_that_died_out_is_forgotten(machine):
    (pid,) = await ended(machine, 1)
    machine.m.kernel.take_fd(pid)
    sweep.free_unused(machine.m, frozenset())
    assert set(machine.m.kernel.families) == {pid}
    await machine.call("proc.remove", pids=[pid])
    sweep.free_unused(machine.m, frozenset())
    assert machine.m.kernel.families == {}


async def test_a_new_config_counts_from_the_next_sweep_on(autojump_clock, machine):
    (pid,) = await ended(machine, 1)
    await trio.sleep(2 * DAY)
    assert sweep.due(machine.m) == []
    machine.m.configure(msgspec.structs.replace(machine.m.config, keep_days=1))
    assert sweep.due(machine.m) == [pid]
