"""sleep and wakeup: no wakeup is lost, and nobody who left is remembered."""

import random

import trio
import trio.testing

from llmprocd.waitchan import WaitChan


async def test_a_wakeup_wakes_all_who_sleep_on_the_channel_and_no_others(autojump_clock):
    chans = WaitChan()
    log = []

    async def sleeper(name, chan):
        await chans.sleep(chan)
        log.append(name)

    async with trio.open_nursery() as nursery:
        for name in range(3):
            nursery.start_soon(sleeper, name, ("exit", 7))
        nursery.start_soon(sleeper, "other", ("exit", 8))
        await trio.testing.wait_all_tasks_blocked()
        assert len(chans._sleepers["exit", 7]) == 3
        chans.wakeup(("exit", 7))
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(log) == [0, 1, 2]
        nursery.cancel_scope.cancel()


async def test_a_sleeper_on_many_channels_wakes_by_any(autojump_clock):
    for chan in "abc":
        chans = WaitChan()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chans.sleep, "a", "b", "c")
            await trio.testing.wait_all_tasks_blocked()
            chans.wakeup(chan)
        assert chans._sleepers == {}


async def test_a_wakeup_that_nobody_waits_for_is_no_promise(autojump_clock):
    """As with a condition: who sleeps after it waits for the next one."""
    chans = WaitChan()
    chans.wakeup("a")
    with trio.move_on_after(10) as scope:
        await chans.sleep("a")
    assert scope.cancelled_caught


async def test_cancelled_sleepers_are_forgotten(autojump_clock):
    chans = WaitChan()
    async with trio.open_nursery() as nursery:
        for number in range(1000):
            nursery.start_soon(chans.sleep, number % 10, "all")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert chans._sleepers == {}


async def test_no_wakeup_is_lost_between_looking_and_sleeping(autojump_clock):
    """Check, sleep without an await between, check again: every change of the condition is seen."""
    chans = WaitChan()
    rng = random.Random(3)
    state = 0
    goal = 300

    async def waiter():
        seen = 0
        while seen < goal:
            while state == seen:
                await chans.sleep("state")
            seen = state

    async def changer():
        nonlocal state
        for _ in range(goal):
            for _ in range(rng.randrange(3)):
                await trio.lowlevel.checkpoint()
            state += 1
            chans.wakeup("state")

    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(waiter)
            nursery.start_soon(changer)
    assert chans._sleepers == {}


async def test_two_wakeups_at_once_wake_once(autojump_clock):
    chans = WaitChan()
    woken = 0

    async def sleeper():
        nonlocal woken
        while True:
            await chans.sleep("a", "b")
            woken += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleeper)
        await trio.testing.wait_all_tasks_blocked()
        chans.wakeup("a")
        chans.wakeup("b")
        await trio.testing.wait_all_tasks_blocked()
        assert woken == 1
        nursery.cancel_scope.cancel()
