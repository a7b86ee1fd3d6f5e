"""What the store in memory adds: time, and power cuts."""

import pytest
import trio
from storekit import chunk, event, numbered, running

from llmprocd.abi.errno import KernelError
from llmprocd.abi.types import FileId, MessageId, Pid
from llmprocd.kernel.state import Change, File
from llmprocd.store import memory


async def test_a_commit_takes_its_time(autojump_clock):
    """Nothing is durable before; what comes meanwhile rides in the next commit."""
    store = memory.Store(latency=2.0)
    async with running(store):
        start = autojump_clock.current_time()
        first = store.submit(numbered(1))
        await trio.sleep(1)
        second = store.submit(numbered(2))
        assert store.durable == 0
        await store.wait_durable(first)
        assert autojump_clock.current_time() - start == pytest.approx(2)
        await store.wait_durable(second)
        assert autojump_clock.current_time() - start == pytest.approx(4)


async def test_a_crash_keeps_what_was_durable_and_nothing_else(autojump_clock):
    """Of a change under way not a byte is left."""
    store = memory.Store(latency=1.0)
    async with running(store):
        await store.wait_durable(store.submit(numbered(1)))
        store.submit(numbered(2))
        await trio.sleep(0.5)
        assert autojump_clock.current_time() == pytest.approx(1.5)
        after = store.crash()
    saved = after.load()
    assert [p.pid for p in saved.procs] == [1]
    assert saved.counters.pid == 2
    assert after.instance == store.instance
    assert after.node_nowait(MessageId(1)) is not None
    assert after.node_nowait(MessageId(2)) is None
    assert await after.events(0, None, None, 9) == [event(1, 1)]
    async with running(after):
        await after.wait_durable(after.submit(Change(gone=[Pid(1)])))
    assert not list(after.crash().load().procs)


async def test_after_a_crash_nothing_goes_on(autojump_clock):
    """Who waits for the old store, or changes it, waits for ever; cancelling ends that."""
    store = memory.Store(latency=1.0)
    told: list[int] = []
    store.on_durable = told.append

    async def waits(ticket):
        await store.wait_durable(ticket)
        told.append(-1)

    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: store.run(task_status=task_status))
        nursery.start_soon(waits, store.submit(numbered(1)))
        await trio.sleep(0.5)
        store.crash()
        nursery.start_soon(waits, store.submit(numbered(2)))
        await trio.sleep(100)
        assert autojump_clock.current_time() > 100
        nursery.cancel_scope.cancel()
    assert told == []
    assert store.durable == 0


async def test_contents_on_disk_outlive_a_crash():
    """They were durable before anything named them."""
    store = memory.Store()
    spool = store.spool()
    await trio.Path(spool).write_bytes(b"whole")
    await store.adopt(spool, FileId(3))
    after = store.crash()
    assert await after.read(File(FileId(3), 5, complete=True, origin="x", disk=True), 0, 9) == b"whole"


async def test_a_survivor_shares_nothing_with_the_dead():
    """What happens to one store does not reach the other."""
    store = memory.Store()
    async with running(store):
        await store.wait_durable(store.submit(Change(chunks=[chunk(5, 0, b"one")])))
        after = store.crash()
    after.submit(Change(chunks=[chunk(5, 3, b"two")]))
    assert await after.read(File(FileId(5), 6, complete=False, origin="x"), 0, 9) == b"onetwo"
    third = after.crash()
    assert await third.read(File(FileId(5), 3, complete=False, origin="x"), 0, 9) == b"one"
    with pytest.raises(KernelError):
        await third.read(File(FileId(5), 6, complete=False, origin="x"), 0, 9)


async def test_old_events_make_room():
    """The newest are kept, and the store says up to where they are gone."""
    store = memory.Store(events_kept=3)
    async with running(store):
        await store.wait_durable(store.submit(Change(events=[event(n) for n in range(1, 10)])))
        assert [e.seq for e in await store.events(0, None, None, 9)] == [7, 8, 9]
        assert store.trimmed == 6
