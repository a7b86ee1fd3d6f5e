"""The life of one process: a step that was interrupted never lands, whatever the order of events.

A thousand seeded schedules. Trio shuffles the tasks that may run; its own dice are seeded here, so that a
schedule that fails fails again. Times are multiples of one tick: answers, interruptions and commits meet.
"""

import json
import random
from contextlib import asynccontextmanager

import pytest
import trio
from machinekit import running, table

from llmprocd.abi.types import Access
from llmprocd.kernel import step
from llmprocd.tools import output, toolbox
from llmprocd.tools.output import Output, Spec

TICK = 0.01
SCHEDULES = 1000
TOGETHER = 100


class Held:
    """A model whose answers come whole and at a tick, as from a socket.

    Whoever has been woken by an event is past the point where it could be told that it was cancelled: this is
    the moment in which a late answer could land.
    """

    def __init__(self, house):
        self.model, self.house = house.m.model, house
        self.ticks, self.rounds = 0, 0

    async def infer(self, *args):
        await self.model.infer(*args)
        await self.arrival()

    async def arrival(self):
        """Wait for some ticks, and then for some turns of the scheduler."""
        if self.ticks:
            arrived = trio.Event()
            self.house.m.background(self._arrive, arrived, self.ticks * TICK, self.rounds)
            await arrived.wait()

    async def _arrive(self, arrived, seconds, rounds):
        await trio.sleep(seconds)
        for _ in range(rounds):
            await trio.lowlevel.checkpoint()
        arrived.set()


@pytest.fixture
def nap(monkeypatch):
    """A tool that ends when an answer would arrive; `nap.held` says when that is."""

    async def run(_ctx):
        await spec.held.arrival()
        return Output(text="late result")

    class Nap(Spec, frozen=False):
        held: object = None

    spec = Nap("nap", Access.READ, "Sleep.", output.schema(()), run, pure=False)
    monkeypatch.setitem(toolbox.SPECS, "nap", spec)
    return spec


@asynccontextmanager
async def held_house(nap, latency):
    """A machine whose model and tool are late when they are told to be."""
    async with running(latency=latency) as house:
        nap.held = house.m.model = Held(house)
        yield house


async def messages(house, pid, *, all_=False):
    """Ids and contents, on the path or of every branch."""
    rows = await house.call("proc.history", pid=pid, all=all_)
    return [(row.id, row.content) for row in rows.messages]


async def talked(house):
    """A process at rest after one exchange, and its head."""
    pid = await house.spawn(table("nap"), interactive=True)
    await house.call("proc.run", pid=pid, prompt="!say early")
    return pid, f"m{house.proc(pid).head}"


async def begun(house, pid, chance):
    """Give a process a message whose answer, or whose tool, takes some ticks; go on at some tick."""
    held = house.m.model
    held.ticks, held.rounds = chance.randrange(1, 4), chance.randrange(6)
    await house.call("proc.send", pid=pid, text=chance.choice(["!say late", "!nap\n!say late"]))
    await trio.sleep(chance.randrange(12) * TICK)
    held.ticks = 0
    return house.wchan(pid)


async def settled(house, pid):
    """Wait until a process rests, and then for as long as the latest answer could take."""
    await house.until(pid, "fd:0")
    await trio.sleep(20 * TICK)
    await house.until(pid, "fd:0")


async def one_goto(house, chance):
    """Goto at some tick of a run; what was going on then."""
    pid, home = await talked(house)
    busy = await begun(house, pid, chance)
    to = chance.choice([home, f"m{house.proc(pid).head}"]) if busy == "api" else home
    text = chance.choice([None, "!say after"])
    moved = await house.call("proc.goto", pid=pid, to=to, text=text)
    last = max(int(id_[1:]) for id_ in (moved.old_head, to))  # what landed before the goto may stay
    await settled(house, pid)
    path = await messages(house, pid)
    after = [content for id_, content in await messages(house, pid, all_=True) if int(id_[1:]) > last]
    assert not any("late" in content for content in after), (busy, after)
    if text is None:
        assert path[-1][0] == moved.head
        assert after == []
    else:
        assert [json.loads(content)[-1]["text"] for _, content in path[-2:]] == ["!say after", "after"]
        assert len(after) == 2
    return busy


@pytest.mark.parametrize("first", range(0, SCHEDULES, TOGETHER))
async def test_goto_while_a_reply_is_in_flight(autojump_clock, nap, first):
    """The late reply, or tool result, never becomes a message, not even when the head is where it was."""
    seen = set()
    async with held_house(nap, latency=TICK * (first // TOGETHER % 3)) as house:
        for seed in range(first, first + TOGETHER):
            trio._core._run._r.seed(seed)
            seen.add(await one_goto(house, random.Random(seed)))
    assert {"api", "tool:nap", "fd:0"} <= seen, "the schedules do not meet all moments"


async def one_signal(house, chance):
    """INT at some tick of a run: the conversation stays valid, and the next message is answered."""
    pid, _ = await talked(house)
    busy = await begun(house, pid, chance)
    for _ in range(chance.randrange(3)):
        await trio.lowlevel.checkpoint()
    last, runs = house.proc(pid).head, step.running(house.proc(pid))
    await house.call("proc.signal", pid=pid, signal="INT")
    await settled(house, pid)
    new = [content for id_, content in await messages(house, pid) if int(id_[1:]) > last]
    if runs:
        assert len(new) <= 2, new
        assert not any("late result" in content for content in new)
    turns = house.proc(pid).turns
    assert (await house.call("proc.run", pid=pid, prompt="!say next")).message == "next"
    assert house.proc(pid).turns == turns + 1, "the interrupted run went on"
    return busy


@pytest.mark.parametrize("first", range(0, SCHEDULES // 2, TOGETHER))
async def test_int_while_a_reply_is_in_flight(autojump_clock, nap, first):
    """Nothing lands after the interruption but what it kept itself; the endpoint accepts what follows."""
    seen = set()
    async with held_house(nap, latency=TICK * (first // TOGETHER % 3)) as house:
        for seed in range(first, first + TOGETHER):
            trio._core._run._r.seed(seed)
            seen.add(await one_signal(house, random.Random(seed)))
    assert {"api", "tool:nap", "fd:0"} <= seen
