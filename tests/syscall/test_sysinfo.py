"""The daemon about itself: hello, status, events read and pushed, programs, stop and reload."""

import pytest
import trio
import trio.testing
from machinekit import Pushed, refused, running, script, table

from llmprocd import __version__
from llmprocd.abi.errno import Errno
from llmprocd.store import memory


async def test_hello_says_who_is_who(machine):
    caller = machine.caller()
    answer = await machine.call("hello", by=caller, client="test", errors="nvim", proto=1)
    assert (answer.proto, answer.server, answer.version) == (1, "llmprocd", __version__)
    assert answer.boot_id == "boot"
    assert (answer.peer.pid, answer.peer.uid, answer.peer.proc) == (4242, machine.m.uid, None)
    assert answer.limits == {"request": 1 << 20, "chunk": 262_144, "inflight": 128, "depth": 32}
    assert caller.errors == "nvim"


async def test_a_refused_hello_changes_nothing(machine):
    caller = machine.caller()
    with refused(Errno.EINVAL):
        await machine.call("hello", by=caller, errors="xml")
    assert caller.errors == "array"


async def test_hello_tells_a_tool_whose_it_is(machine):
    pid = await machine.spawn(interactive=True)
    answer = await machine.call("hello", by=machine.caller(pid))
    assert answer.peer.proc == pid


async def test_status_counts_processes_tokens_and_slots(autojump_clock, machine):
    await machine.finish(table(), "!say hi")
    await machine.spawn(table(), script("!sleep 99", "!say hi"))
    await machine.spawn(interactive=True)
    await trio.sleep(3)
    status = await machine.call("sys.status")
    assert (status.version, status.boot_id) == (__version__, "boot")
    assert (status.socket, status.state_dir) == ("/nowhere/sock", "/nowhere/state")
    assert status.procs == {"Z": 1, "R": 1, "S": 1}
    assert status.usage == machine.proc(2).usage
    assert status.uptime_s == pytest.approx(3, abs=0.1)
    (slots,) = status.scheduler
    assert (slots.endpoint, slots.running, slots.waiting, slots.slots, slots.held_s) == (
        "script",
        1,
        0,
        50,
        0,
    )


async def test_stop_and_reload_reach_the_daemon(machine):
    await machine.call("sys.reload")
    assert machine.m.reload.__self__.reloads == 1
    assert not machine.m.stopping.is_set()
    await machine.call("sys.stop")
    assert machine.m.stopping.is_set()


async def test_programs_are_listed_and_checked(machine):
    (row,) = (await machine.call("prog.list")).programs
    assert (row.name, row.path, row.description) == ("one", "/one.toml", "the first")
    assert (await machine.call("prog.check", path="good")).ok
    assert not (await machine.call("prog.check", path="bad")).ok


# --- reading events ---------------------------------------------------------------------------------


async def read(machine, **more):
    page = await machine.call("events.read", **more)
    return [event["seq"] for event in page.events], page.next_seq, page.lost


async def test_events_are_flat_and_numbered(autojump_clock, machine):
    ended = await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    page = await machine.call("events.read", after_seq=0)
    assert page.events[0] == {
        "seq": 1, "at": machine.proc(ended.pid).began, "type": "spawn", "pid": ended.pid, "ppid": 1,
        "program": "inline", "name": "",
    }  # fmt: skip
    assert [event["seq"] for event in page.events] == list(range(1, page.next_seq + 1))
    assert page.events[-1]["type"] == "exit"
    assert page.events[-1]["status"] == 0


async def test_without_a_number_events_are_read_from_now_on(autojump_clock, machine):
    await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    seqs, following, lost = await read(machine)
    assert (seqs, lost) == ([], 0)
    await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    seqs, _, _ = await read(machine, after_seq=following)
    assert seqs[0] == following + 1


async def test_next_seq_reads_on_without_a_gap_or_a_repetition(autojump_clock, machine):
    for _ in range(5):
        await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    everything, last, _ = await read(machine, after_seq=0)
    seen, after = [], 0
    while after < last:
        seqs, after, lost = await read(machine, after_seq=after, max=3)
        assert (len(seqs) <= 3, lost) == (True, 0)
        seen += seqs
    assert seen == everything


async def test_events_are_filtered_by_process_and_type(autojump_clock, machine):
    first = await machine.finish(table(), "!say hi")
    await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    page = await machine.call("events.read", after_seq=0, pids=[first.pid], types=["spawn", "exit"])
    assert [(event["pid"], event["type"]) for event in page.events] == [
        (first.pid, "spawn"),
        (first.pid, "exit"),
    ]
    assert page.next_seq == machine.m.console.visible
    assert (await machine.call("events.read", after_seq=0, pids=[])).events == []


async def test_a_reader_is_woken_by_the_first_event_it_wants(autojump_clock, machine):
    pid = await machine.spawn(interactive=True)
    other = await machine.spawn(interactive=True)
    await trio.sleep(1)
    got = []

    async def reader():
        got.append(await machine.call("events.read", wait_ms=3_600_000, pids=[pid], types=["exit"]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader)
        await trio.sleep(5)
        await machine.call("proc.signal", pid=other, signal="KILL")
        await trio.sleep(5)
        assert got == []
        await machine.call("proc.signal", pid=pid, signal="KILL")
    (page,) = got
    assert [event["pid"] for event in page.events] == [pid]
    assert trio.current_time() < 12
    assert machine.m.console.readers == 0


async def test_a_reader_waits_no_longer_than_it_said(autojump_clock, machine):
    seqs, _, _ = await read(machine, wait_ms=5000)
    assert (seqs, trio.current_time()) == ([], 5)
    assert machine.m.console.readers == 0


async def test_what_has_left_the_ring_is_read_from_the_disk(autojump_clock, machine):
    """Fleeting events are gone, all others are there, in order and without a gap."""
    for _ in range(6):
        await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    everything, last, _ = await read(machine, after_seq=0)
    console = machine.m.console
    del console._ring[: len(console._ring) // 2]
    for limit in (1, 4, 7, 1000):
        seen, after = [], 0
        while after < last:
            seqs, after, lost = await read(machine, after_seq=after, max=limit)
            assert lost == 0
            seen += seqs
        assert seen == everything, f"by {limit}"


async def test_a_ring_that_moves_on_while_the_disk_is_read_loses_nothing(
    autojump_clock, machine, monkeypatch
):
    for _ in range(6):
        await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    everything, last, _ = await read(machine, after_seq=0)
    console, store = machine.m.console, machine.store
    stored = store.events
    del console._ring[:10]

    async def slow(*arguments):
        found = await stored(*arguments)
        del console._ring[: len(console._ring) // 2]
        return found

    monkeypatch.setattr(store, "events", slow)
    seen, after = [], 0
    while after < last:
        seqs, after, _ = await read(machine, after_seq=after)
        seen += seqs
    assert seen == everything


async def test_what_was_trimmed_is_counted_as_lost(autojump_clock):
    async with running(store=memory.Store(events_kept=10)) as house:
        for _ in range(6):
            await house.finish(table(), "!say hi")
        await trio.sleep(1)
        del house.m.console._ring[:-5]
        page = await house.call("events.read", after_seq=0)
        seqs = [event["seq"] for event in page.events]
        assert page.lost == seqs[0] - 1 > 0
        assert seqs == list(range(seqs[0], house.m.console.visible + 1))
        page = await house.call("events.read", after_seq=page.next_seq)
        assert (page.events, page.lost) == ([], 0)


# --- pushing events ---------------------------------------------------------------------------------


def pushed(push):
    """The numbers of all events in order, and the names of what was pushed."""
    batches = [params for method, params, _ in push.notices if method == "event"]
    return [event["seq"] for batch in batches for event in batch["events"]]


async def test_a_subscription_is_answered_before_its_first_event(autojump_clock, machine):
    await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    push = Pushed()
    caller = machine.caller(push=push)
    answer = machine.begin("events.subscribe", by=caller, after_seq=0)
    assert answer.result.sub == 1
    assert push.notices == []
    await trio.testing.wait_all_tasks_blocked()
    assert pushed(push) == list(range(1, machine.m.console.visible + 1))


async def test_a_subscriber_gets_every_event_once(autojump_clock, machine):
    push = Pushed()
    caller = machine.caller(push=push)
    await machine.call("events.subscribe", by=caller, after_seq=0)
    for _ in range(20):
        await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    events, _ = machine.m.console.read(0, 10_000, None, None)
    assert pushed(push) == [event.seq for event in events]
    assert all(ticket <= machine.store.durable for _, _, ticket in push.notices)


async def test_subscriptions_of_one_connection_are_told_apart_and_ended_apart(autojump_clock, machine):
    push = Pushed()
    caller = machine.caller(push=push)
    first = (await machine.call("events.subscribe", by=caller, types=["spawn"])).sub
    second = (await machine.call("events.subscribe", by=caller, types=["exit"])).sub
    await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    assert [(p["sub"], p["events"][0]["type"]) for _, p, _ in push.notices] == [
        (first, "spawn"),
        (second, "exit"),
    ]
    await machine.call("events.unsubscribe", by=caller, sub=first)
    with refused(Errno.ENOENT, f"no subscription {first}"):
        await machine.call("events.unsubscribe", by=caller, sub=first)
    await machine.finish(table(), "!say hi")
    await trio.sleep(1)
    assert [p["sub"] for _, p, _ in push.notices] == [first, second, second]


async def test_a_hang_up_ends_all_subscriptions(autojump_clock, machine):
    caller = machine.caller()
    for _ in range(3):
        await machine.call("events.subscribe", by=caller)
    await trio.testing.wait_all_tasks_blocked()
    assert machine.m.console.readers == 3
    machine.door.hang_up(caller)
    await trio.testing.wait_all_tasks_blocked()
    assert machine.m.console.readers == 0
    assert machine.m.waits._sleepers == {}


async def test_a_slow_reader_is_told_what_it_lost_and_goes_on(autojump_clock):
    """Its memory is a cursor: what it does not read is not kept for it."""
    async with running(store=memory.Store(events_kept=20)) as house:
        push = Pushed(room=1)
        caller = house.caller(push=push)
        await house.call("events.subscribe", by=caller, after_seq=0)
        for _ in range(20):
            await house.finish(table(), "!say hi")
        await trio.sleep(1)
        assert len(push.notices) == 1
        del house.m.console._ring[:-10]
        push.drain(1000)
        await trio.sleep(1)
        (lost,) = [params for method, params, _ in push.notices if method == "overflow"]
        assert lost["sub"] == 1
        assert lost["lost"] > 0
        seqs = pushed(push)
        assert seqs == sorted(set(seqs))
        assert seqs[-1] == house.m.console.visible
        await house.finish(table(), "!say more")
        await trio.sleep(1)
        assert pushed(push)[-1] == house.m.console.visible
        house.door.hang_up(caller)


async def test_what_happens_while_a_loss_is_told_of_is_not_missed(autojump_clock):
    """The reader had no room for the word; when it has, the event follows, and not only after another."""
    async with running(store=memory.Store(events_kept=20)) as house:
        for _ in range(20):
            pid = await house.spawn(table(), "!say hi", interactive=True)
            await house.until(pid, "fd:0")
        await house.m.wait_durable()
        del house.m.console._ring[:-10]
        push = Pushed(room=0)
        caller = house.caller(push=push)
        await house.call("events.subscribe", by=caller, after_seq=0, types=["goto"])
        await trio.sleep(1)
        await house.call("proc.goto", pid=pid, to=f"m{house.proc(pid).head}")
        await trio.sleep(1)
        assert push.notices == []
        push.drain(1000)
        await trio.sleep(1)
        assert [method for method, _, _ in push.notices] == ["overflow", "event"]
        house.door.hang_up(caller)
