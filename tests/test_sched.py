"""Who may call the model next: fairness, nice, rates, hold, and waiters that change their mind."""

import math
import random
from collections import Counter
from itertools import pairwise

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from llmprocd.abi.types import Usage
from llmprocd.endpoint import FIRST_GAP, FOREGROUND, WIDEST_GAP, Bounds, Bucket, RunQueue
from llmprocd.model.protocol import Allowance, Quota
from llmprocd.sched import KEPT, Scheduler

HERE = "https://api.example"


def nobody(_what):
    """Who does not care what is waited for."""


def slots(number, **more):
    """A scheduler of endpoints with so many slots, whose chance is always in the middle."""
    return Scheduler(Bounds(number, **more), chance=lambda: 0.5)


async def take(sched, tree, log, *, nice=0, seconds=1.0, waits=nobody, **more):
    async with sched.slot(HERE, tree, nice, waits, **more):
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
    sched = slots(50)
    inside, most, done, told = 0, 0, 0, Counter()

    async def caller(number):
        nonlocal inside, most, done
        async with sched.slot(HERE, number % 100, 0, lambda what: told.update([what()])):
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
    sched = slots(1)
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
    sched = slots(2)
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
    sched = slots(1)
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
    sched = slots(1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            async with sched.slot(HERE, 1, 0, nobody):
                raise ZeroDivisionError
    assert sched.table()[0].running == 0


async def test_more_slots_let_waiters_in_at_once(autojump_clock):
    sched = slots(1)
    log = []
    async with trio.open_nursery() as nursery:
        for tree in range(6):
            nursery.start_soon(take, sched, tree, log)
        await trio.sleep(0.5)
        assert len(log) == 1
        sched.configure(Bounds(5), {})
        await trio.sleep(0.1)
        assert len(log) == 5
    assert sched.endpoint("another").slots == 5


async def test_fewer_slots_take_nothing_from_those_who_have_one(autojump_clock):
    sched = slots(4)
    log = []
    async with trio.open_nursery() as nursery:
        for tree in range(8):
            nursery.start_soon(take, sched, tree, log)
        await trio.sleep(0.5)
        sched.configure(Bounds(1), {})
        assert sched.table()[0].running == 4
        await trio.sleep(1)
        assert (len(log), sched.table()[0].running) == (5, 1)
    assert trio.current_time() == pytest.approx(5)


async def test_endpoints_do_not_share_slots(autojump_clock):
    sched = slots(1)
    async with sched.slot("a", 1, 0, nobody), sched.slot("b", 1, 0, nobody):
        assert [row.running for row in sched.table()] == [1, 1]


async def test_an_endpoint_that_the_config_names_has_its_own_slots(autojump_clock):
    sched = Scheduler(Bounds(50), {HERE: Bounds(2)})
    assert (sched.endpoint(HERE).slots, sched.endpoint("another").slots) == (2, 50)
    sched.configure(Bounds(40), {"another": Bounds(3)})
    assert (sched.endpoint(HERE).slots, sched.endpoint("another").slots) == (40, 3)


async def test_endpoints_that_nobody_uses_are_forgotten(autojump_clock):
    """Programs may name any number of addresses; what is held or in use stays."""
    sched = slots(1)
    sched.hold("held", 10)
    async with sched.slot("used", 1, 0, nobody):
        for number in range(3 * KEPT):
            sched.endpoint(str(number))
        assert len(sched.table()) <= KEPT
        assert {"held", "used"} <= {row.endpoint for row in sched.table()}


# --- interactive ------------------------------------------------------------------------------------


def test_an_interactive_waiter_is_before_all_that_run_by_themselves():
    queue = RunQueue()
    for tree in range(1000):
        queue.join(tree, 0)
    queue.join(5000, 0, interactive=True)
    assert served(queue, 1) == [5000]


def test_who_talks_to_a_process_is_not_behind_the_children_it_sent_away():
    """One tree, a hundred calls of children under way: the parent's own is next."""
    queue = RunQueue()
    for _ in range(100):
        queue.join(1, 0)
    queue.join(1, 0, interactive=True)
    assert queue.next().flow == (1, True)


def test_interactive_processes_leave_the_others_a_share():
    """However many they are: a call each time that they have had four each."""
    queue = RunQueue()
    for _ in range(100):
        queue.join(1, 0, interactive=True)
        queue.join(2, 0)
    first = Counter(served(queue, 50))
    assert first[2] == 50 / (FOREGROUND + 1)


def test_newcomers_keep_nobody_waiting_for_ever():
    """A tree with the worst nice is served although a new tree joins for each slot, and before it in line."""
    queue = RunQueue()
    queue.join(0, 19)
    for tree in range(1, 1000):
        queue.join(tree, 0, interactive=True)
        if queue.next().tree == 0:
            return
    pytest.fail("it starved")


# --- buckets ----------------------------------------------------------------------------------------


def bucket(limit, now=0.0):
    made = Bucket()
    made.bound(limit, now)
    return made


def test_a_bucket_is_full_at_first_and_fills_in_a_minute():
    made = bucket(60)
    made.take(60, 0)
    assert made.left(0) == 0
    assert made.wait(1, 0) == pytest.approx(1)
    assert made.wait(30, 10) == pytest.approx(20)
    assert made.left(1000) == 60, "it held more than a minute's worth"


def test_without_a_limit_there_is_always_enough():
    made = Bucket()
    made.take(1e9, 0)
    assert (made.wait(1e9, 0), made.left(0)) == (0, math.inf)


def test_what_is_more_than_a_bucket_holds_waits_until_it_is_full():
    """Else a request larger than the limit would wait for ever."""
    made = bucket(100)
    made.take(10, 0)
    assert made.wait(5000, 0) == pytest.approx(6)
    made.take(5000, 6)
    assert made.wait(1, 6) == pytest.approx(4901 * 60 / 100), "the debt is paid back first"


def test_what_was_not_used_comes_back():
    made = bucket(100)
    made.take(80, 0)
    made.take(-50, 0)
    assert made.left(0) == 70
    made.take(-500, 0)
    assert made.left(0) == 100


def test_a_server_can_tell_of_a_lower_limit_only():
    made = bucket(100)
    made.learn(Allowance(50, 50), 0)
    assert (made.limit, made.left(0)) == (50, 50)
    made.learn(Allowance(1000, 1000), 0)
    assert made.limit == 100, "what the config says is the most"
    made.learn(Allowance(None, None), 0)
    assert made.limit == 100


def test_a_limit_is_learned_and_forgets_nothing_that_was_used():
    made = bucket(100)
    made.take(30, 0)
    made.learn(Allowance(60, None), 0)
    assert (made.limit, made.left(0)) == (60, 30)


def test_a_limit_that_a_server_told_keeps_nobody_waiting_for_more_than_a_minute():
    """It may be a mistake, and another the next time; without a call there is no next time."""
    made = Bucket()
    made.learn(Allowance(1_000_000, None), 0)
    made.take(500_000, 0)
    made.learn(Allowance(1, None), 0)
    assert made.wait(5000, 0) == pytest.approx(60)
    made.take(5000, 60)
    assert made.wait(5000, 60) == pytest.approx(60), "what was let through has been paid for"
    made.bound(100, 60)
    made.learn(Allowance(100, None), 60)
    made.take(5000, 120)
    assert made.wait(1, 120) > 60, "the config's own limit is kept to all the same"


def test_what_others_used_of_the_same_key_is_not_left():
    """Other programs may use the key: the server knows. What is on its way there it does not know yet."""
    made = bucket(100)
    made.learn(Allowance(100, 20), 0)
    assert made.left(0) == 20
    made.take(15, 0)
    made.learn(Allowance(100, 20), 0)
    assert made.left(0) == 5


@given(
    st.integers(1, 10_000),
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 20_000)), max_size=40),
    st.floats(0, 1e9),
)
def test_whoever_waits_as_long_as_told_may_begin(limit, moves, start):
    """And no window of any length lets more through than the bucket and what came back, one call apart."""
    made, now, used = bucket(limit, start), start, 0.0
    for pause, amount in moves:
        now += pause
        now += made.wait(amount, now) * (1 + 1e-9) + 1e-6
        assert made.wait(amount, now) == pytest.approx(0, abs=1e-3)
        assert used <= (limit + (now - start) * limit / 60) * (1 + 1e-6) + 0.01
        made.take(amount, now)
        used += amount


# --- rates ------------------------------------------------------------------------------------------


async def ask(sched, log, *, size=0, usage=None, quota=None, seconds=1.0, whole=True):
    """A call as a process makes it; `log` gets the time at which it began."""
    async with sched.slot(HERE, len(log), 0, nobody, size=size) as grant:
        log.append(trio.current_time())
        grant.begin(trio.current_time())
        if quota:
            grant.heard(quota, trio.current_time())
        await trio.sleep(seconds)
        grant.end(usage or Usage(), trio.current_time(), whole=whole)


async def test_requests_a_minute_are_kept_to(autojump_clock):
    sched, log = slots(100, rpm=60), []
    async with trio.open_nursery() as nursery:
        for _ in range(180):
            nursery.start_soon(ask, sched, log)
    assert sum(at < 60 for at in log) <= 120
    assert log[59] == 0
    assert log[60] > 0
    assert log[-1] == pytest.approx(120, abs=3), "it was slower than it had to be"


async def test_input_tokens_a_minute_are_kept_to(autojump_clock):
    """4,000 bytes are a thousand tokens: ten calls at once, then one each six seconds."""
    sched, log = slots(50, itpm=10_000), []
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(partial_ask(sched, log, size=4000, usage=Usage(input_tokens=1000)))
    assert [at for at in log if at < 1] == [0] * 10
    assert log[-1] == pytest.approx(60, abs=1)


def partial_ask(*args, **more):
    async def asked():
        await ask(*args, **more)

    return asked


async def test_what_was_read_from_a_cache_does_not_count(autojump_clock):
    sched, log = slots(1, itpm=10_000), []
    for _ in range(50):
        usage = Usage(input_tokens=10, cache_read_input_tokens=1000)
        await ask(sched, log, size=4000, usage=usage, seconds=0.01)
    assert trio.current_time() < 1


async def test_output_tokens_that_were_not_foreseen_are_paid_back(autojump_clock):
    sched, log = slots(1, otpm=6000), []
    await ask(sched, log, usage=Usage(output_tokens=12_000), seconds=1)
    await ask(sched, log)
    assert log[1] > 60, "twice a minute's worth was used"


async def test_a_call_that_failed_has_used_no_tokens(autojump_clock):
    sched, log = slots(1, itpm=1000), []
    for _ in range(20):
        await ask(sched, log, size=4000, seconds=0.01, whole=False)
    assert trio.current_time() < 1


async def test_a_waiter_that_never_asked_gives_its_request_back(autojump_clock):
    sched = slots(1, rpm=2)
    for _ in range(10):
        async with sched.slot(HERE, 1, 0, nobody):
            pass
    assert sched.table()[0].rpm_left == 2
    assert trio.current_time() == 0


async def test_limits_are_learned_from_the_answers(autojump_clock):
    """An endpoint says what it allows; from then on nobody runs into it."""
    sched, log = slots(50), []
    told = Quota(requests=Allowance(30, 29), input_tokens=Allowance(5000, 4000))
    await ask(sched, log, quota=told)
    (row,) = sched.table()
    assert (row.rpm, row.itpm, row.otpm, row.otpm_left) == (30, 5000, None, None)
    assert 29 <= row.rpm_left <= 30
    async with trio.open_nursery() as nursery:
        for _ in range(59):
            nursery.start_soon(ask, sched, log)
    assert sum(at < 2 for at in log) <= 31
    assert log[-1] == pytest.approx(60, abs=3)


async def test_a_big_call_is_not_overtaken_for_ever_by_small_ones(autojump_clock):
    sched, log, big = slots(50, itpm=1000), [], []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial_ask(sched, log, size=2000, usage=Usage(input_tokens=500)))
        await trio.sleep(0.1)
        nursery.start_soon(partial_ask(sched, big, size=4000, usage=Usage(input_tokens=1000)))
        for _ in range(100):
            await trio.sleep(1)
            nursery.start_soon(partial_ask(sched, log, size=40, usage=Usage(input_tokens=10)))
    assert big[0] <= 61


# --- hold -------------------------------------------------------------------------------------------


async def test_a_held_endpoint_lets_nobody_call_and_another_everybody(autojump_clock):
    sched, told = slots(1), []
    sched.hold(HERE, 12.4)
    async with sched.slot("another", 1, 0, told.append):
        assert trio.current_time() == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial_ask(sched, []))
        async with trio.open_nursery() as inner:
            inner.start_soon(take_told, sched, told)
            await trio.sleep(0.1)
            assert told[0]() == "retry-after 13s"
            await trio.sleep(10)
            assert told[0]() == "retry-after 3s", "it counts down"
        assert trio.current_time() >= 12.4


async def take_told(sched, told):
    async with sched.slot(HERE, 2, 0, told.append):
        pass


async def test_a_hold_whose_time_no_server_named_says_so(autojump_clock):
    sched, told = slots(1), []
    sched.hold(HERE, 5, named=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_told, sched, told)
        await trio.sleep(1)
        assert told[0]() == "backoff"
        await trio.sleep(5)


async def test_the_longest_hold_counts(autojump_clock):
    """A second server's shorter wish does not end the first one, a longer one draws it out."""
    sched, log = slots(1), []
    sched.hold(HERE, 10)
    sched.hold(HERE, 1)
    assert sched.table()[0].held_s == 10
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, sched, log)
        await trio.sleep(5)
        sched.hold(HERE, 20)
    assert log == [pytest.approx(25)]
    assert sched.table()[0].held_s == 0


async def test_after_a_hold_calls_begin_one_after_another(autojump_clock):
    sched, log = slots(50), []
    sched.hold(HERE, 10)
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(ask, sched, log)
    assert log[0] == pytest.approx(10)
    assert min(b - a for a, b in pairwise(log)) > 0.4 * FIRST_GAP / 10
    assert log[10] - log[0] > FIRST_GAP * 5
    assert sched.endpoint(HERE).gap == 0, "nothing of it is left after as many successes"


async def test_those_refused_together_are_one_refusal(autojump_clock):
    """Fifty answers of 429 to one burst do not double the gap fifty times; the next burst does."""
    sched = slots(50)
    await trio.sleep(1)
    for _ in range(50):
        sched.hold(HERE, 1, began=0.5)
    assert sched.endpoint(HERE).gap == FIRST_GAP
    await trio.sleep(1)
    sched.hold(HERE, 1, began=1.5)
    assert sched.endpoint(HERE).gap == 2 * FIRST_GAP
    for _ in range(20):
        await trio.sleep(1)
        sched.hold(HERE, 1)
    assert sched.endpoint(HERE).gap == WIDEST_GAP


async def test_cancelled_waiters_of_a_held_endpoint_leave_no_trace(autojump_clock):
    sched, log = slots(2), []
    sched.hold(HERE, 10)
    with trio.move_on_after(1):
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(ask, sched, log)
    (row,) = sched.table()
    assert (row.running, row.waiting, log) == (0, 0, [])
    await ask(sched, log)
    assert log == [pytest.approx(10)]
