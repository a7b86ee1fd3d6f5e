"""Who may call the model next: fairness, nice, hold, and waiters that change their mind."""

import random
from collections import Counter

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from llmprocd.sched import RunQueue, Scheduler

HERE = "https://api.example"


def nobody(_what):
    """Who does not care what is waited for."""


async def take(sched, tree, log, *, nice=0, seconds=1.0, waits=nobody):
    async with sched.slot(HERE, tree, nice, waits):
        log.append(tree)
        await trio.sleep(seconds)


def served(queue, count):
    return [queue.next().tree for _ in range(count)]


# --- the queue --------------------------------------------------------------------------------------


def test_waiters_of_different_trees_are_served_in_the_order_they_came():
    queue = RunQueue()
    for tree in (7, 3, 5):
        queue.join(tree, 0)
    assert served(queue, 3) == [7, 3, 5]
    assert queue.next() is None


def test_a_tree_with_a_hundred_waiters_does_not_starve_one_with_a_single_waiter():
    queue = RunQueue()
    for _ in range(100):
        queue.join(1, 0)
    queue.join(2, 0)
    assert served(queue, 2) == [1, 2]


def test_two_trees_that_want_as_much_get_as_much():
    queue = RunQueue()
    for _ in range(50):
        queue.join(1, 0)
    for _ in range(50):
        queue.join(2, 0)
    assert Counter(served(queue, 40)) == {1: 20, 2: 20}


@pytest.mark.parametrize(("nice", "share"), [(-5, 0.75), (5, 0.25), (0, 0.5)])
def test_nice_scales_the_share_of_a_tree(nice, share):
    """1.25 to the fifth is three: five steps of nice are three slots to one."""
    queue = RunQueue()
    for _ in range(400):
        queue.join(1, nice)
        queue.join(2, 0)
    assert Counter(served(queue, 400))[1] / 400 == pytest.approx(share, abs=0.02)


def test_a_newcomer_has_no_credit_for_the_time_in_which_it_wanted_nothing():
    queue = RunQueue()
    for _ in range(300):
        queue.join(1, 0)
    served(queue, 200)
    for _ in range(100):
        queue.join(2, 0)
    first = Counter(served(queue, 50))
    assert first[2] <= 26, "it caught up on what it never asked for"


def test_a_cancelled_waiter_is_never_served_and_costs_its_tree_nothing():
    queue = RunQueue()
    for waiter in [queue.join(1, 0) for _ in range(100)]:
        queue.leave(waiter)
    assert queue.waiting == 0
    queue.join(2, 0)
    queue.join(1, 0)
    queue.join(2, 0)
    assert served(queue, 3) == [2, 1, 2]
    assert queue.next() is None


def test_giving_up_twice_counts_once():
    queue = RunQueue()
    waiter = queue.join(1, 0)
    queue.join(2, 0)
    queue.leave(waiter)
    queue.leave(waiter)
    assert queue.waiting == 1


def test_waiters_that_come_and_go_while_no_slot_is_free_are_not_kept():
    """A process that is interrupted again and again must not make the heap grow."""
    queue = RunQueue()
    queue.join(1, 0)
    for tree in range(2, 10_000):
        queue.leave(queue.join(tree, 0))
    assert len(queue._heap) < 1000
    assert len(queue._served) < 1000
    assert served(queue, 1) == [1]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-20, 19), st.booleans()), max_size=60))
def test_every_waiter_is_served_once_or_has_left(moves):
    """Whatever joins, leaves and is served in between: nobody is lost, nobody is served twice."""
    queue = RunQueue()
    waiting = []
    for tree, nice, stay in moves:
        waiter = queue.join(tree, nice)
        if stay:
            waiting.append(waiter)
        else:
            queue.leave(waiter)
        assert queue.waiting == len(waiting)
        if tree == 4 and waiting:
            waiting.remove(queue.next())
    assert {id(queue.next()) for _ in range(len(waiting))} == {id(waiter) for waiter in waiting}
    assert queue.next() is None
    assert queue.waiting == 0


# --- the scheduler ----------------------------------------------------------------------------------


async def test_ten_thousand_waiters_share_fifty_slots(autojump_clock):
    """Never more than fifty at once, never fewer while somebody waits, and each is woken exactly once."""
    sched = Scheduler(50)
    inside, most, done, told = 0, 0, 0, Counter()

    async def caller(number):
        nonlocal inside, most, done
        async with sched.slot(HERE, number % 100, 0, lambda what: told.update([what])):
            inside += 1
            most = max(most, inside)
            await trio.sleep(1)
            inside -= 1
            done += 1

    async with trio.open_nursery() as nursery:
        for number in range(10_000):
            nursery.start_soon(caller, number)
    assert (most, done) == (50, 10_000)
    assert trio.current_time() == pytest.approx(200), "a slot stood empty while somebody waited"
    assert told == {"slot": 9950}
    assert [(row.running, row.waiting) for row in sched.table()] == [(0, 0)]


async def test_a_free_slot_wakes_one_waiter_and_no_other(autojump_clock):
    """No storm: what each end of a call costs does not depend on how many wait."""
    sched = Scheduler(1)
    log = []
    async with trio.open_nursery() as nursery:
        for tree in range(100):
            nursery.start_soon(take, sched, tree, log)
        await trio.sleep(10.5)
        granted = [w for w in sched.endpoint(HERE).queue._heap if w.granted.is_set()]
        assert granted == []
        assert len(log) == 11
        nursery.cancel_scope.cancel()


async def test_cancelled_waiters_leave_no_trace(autojump_clock):
    """Half of the waiters give up: the others get every slot, and the books are even."""
    sched = Scheduler(2)
    log = []
    rng = random.Random(7)
    async with trio.open_nursery() as nursery:
        for tree in range(200):
            scope = trio.CancelScope()
            if rng.random() < 0.5:
                scope.deadline = trio.current_time() + rng.uniform(0.1, 30)

            async def one(tree=tree, scope=scope):
                with scope:
                    await take(sched, tree, log)

            nursery.start_soon(one)
    (row,) = sched.table()
    assert (row.running, row.waiting) == (0, 0)
    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        for tree in range(4):
            nursery.start_soon(take, sched, tree, log)
    assert trio.current_time() - began == pytest.approx(2), "a slot was lost with a waiter"


async def test_a_waiter_cancelled_as_it_is_granted_gives_the_slot_back(autojump_clock):
    """The slot was its own for an instant: it must go to the next one."""
    sched = Scheduler(1)
    log = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, sched, 1, log)
        await trio.testing.wait_all_tasks_blocked()
        scope = trio.CancelScope()

        async def loser():
            with scope:
                await take(sched, 2, log)

        nursery.start_soon(loser)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(take, sched, 3, log)
        await trio.testing.wait_all_tasks_blocked()
        waiter = sched.endpoint(HERE).queue._heap[0]
        assert waiter.tree == 2
        await waiter.granted.wait()  # woken in the same instant as the loser
        scope.cancel()
    assert log in ([1, 3], [1, 2, 3])
    assert sched.table()[0].running == 0


async def test_an_exception_in_the_body_gives_the_slot_back():
    sched = Scheduler(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with sched.slot(HERE, 1, 0, nobody):
                raise ZeroDivisionError
    assert sched.table()[0].running == 0


async def test_more_slots_let_waiters_in_at_once(autojump_clock):
    sched = Scheduler(1)
    log = []
    async with trio.open_nursery() as nursery:
        for tree in range(6):
            nursery.start_soon(take, sched, tree, log)
        await trio.sleep(0.5)
        assert len(log) == 1
        sched.resize(5)
        await trio.sleep(0.1)
        assert len(log) == 5
    assert sched.endpoint("another").slots == 5


async def test_fewer_slots_take_nothing_from_those_who_have_one(autojump_clock):
    sched = Scheduler(4)
    log = []
    async with trio.open_nursery() as nursery:
        for tree in range(8):
            nursery.start_soon(take, sched, tree, log)
        await trio.sleep(0.5)
        sched.resize(1)
        assert sched.table()[0].running == 4
        await trio.sleep(1)
        assert (len(log), sched.table()[0].running) == (5, 1)
    assert trio.current_time() == pytest.approx(5)


async def test_endpoints_do_not_share_slots(autojump_clock):
    sched = Scheduler(1)
    async with sched.slot("a", 1, 0, nobody), sched.slot("b", 1, 0, nobody):
        assert [row.running for row in sched.table()] == [1, 1]


async def test_a_held_endpoint_lets_nobody_call_and_another_everybody(autojump_clock):
    sched = Scheduler(1)
    told = []
    sched.hold(HERE, 12.4)
    await sched.wait_held("another", told.append)
    assert trio.current_time() == 0
    await sched.wait_held(HERE, told.append)
    assert trio.current_time() == pytest.approx(12.4)
    assert told == ["retry-after 13s"]


async def test_the_longest_hold_counts(autojump_clock):
    """A second server's shorter wish does not end the first one, a longer one draws it out."""
    sched = Scheduler(1)
    sched.hold(HERE, 10)
    sched.hold(HERE, 1)
    assert sched.table()[0].held_s == 10
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sched.wait_held, HERE, nobody)
        await trio.sleep(5)
        sched.hold(HERE, 20)
    assert trio.current_time() == pytest.approx(25)
    assert sched.table()[0].held_s == 0
