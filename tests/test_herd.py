"""Who of those that share a prompt goes first."""

import pytest
import trio
import trio.testing
from machinekit import running, table
from msgspec.structs import replace

from llmprocd import window
from llmprocd.kernel.state import Reply
from llmprocd.sched import PATIENCE, WARM, Herd


async def call(herd, log, name, *, seconds=1.0, begins=True, key="k"):
    """One call that takes its turn: its answer begins after some seconds, or never does."""
    waited = []
    async with herd.turn(key, waited.append):
        log.append((name, trio.current_time()))
        await trio.sleep(seconds)
        if begins:
            herd.warm([key], 300)
    return waited


async def test_the_first_goes_first_and_the_others_wait_for_its_answer(nursery, autojump_clock):
    """Ten at once: one begins now, nine when the prompt is in the cache."""
    herd, log = Herd(), []
    began = trio.current_time()
    async with trio.open_nursery() as all_of_them:
        for name in range(10):
            all_of_them.start_soon(call, herd, log, name)
    assert [at - began for _, at in log] == pytest.approx([0.0] + [1.0] * 9)
    assert herd.is_warm("k")


async def test_others_do_not_wait_for_it(nursery, autojump_clock):
    """A key is its own herd."""
    herd, log = Herd(), []
    began = trio.current_time()
    async with trio.open_nursery() as both:
        both.start_soon(lambda: call(herd, log, 1, key="a"))
        both.start_soon(lambda: call(herd, log, 2, key="b"))
    assert [at - began for _, at in log] == pytest.approx([0.0, 0.0])


async def test_who_waits_says_so(nursery, autojump_clock):
    """WCHAN is `slot`."""
    herd, log = Herd(), []
    nursery.start_soon(call, herd, log, 1)
    await trio.testing.wait_all_tasks_blocked()
    assert await call(herd, log, 2) == ["slot"]
    assert await call(herd, log, 3) == []


async def test_after_one_that_fails_the_next_goes_first(nursery, autojump_clock):
    """One at a time, until an answer begins."""
    herd, log = Herd(), []
    began = trio.current_time()
    async with trio.open_nursery() as all_of_them:
        for name in range(3):
            all_of_them.start_soon(lambda name=name: call(herd, log, name, begins=False))
    assert [at - began for _, at in log] == pytest.approx([0.0, 1.0, 2.0])


async def test_one_that_is_cancelled_lets_the_next_go(nursery, autojump_clock):
    """A killed process holds nobody up, and neither does one that is killed while it waits."""
    herd, log = Herd(), []
    first, second = trio.CancelScope(), trio.CancelScope()

    async def within(scope, name):
        with scope:
            await call(herd, log, name, seconds=2)

    nursery.start_soon(within, first, 1)
    await trio.testing.wait_all_tasks_blocked()
    nursery.start_soon(within, second, 2)
    await trio.testing.wait_all_tasks_blocked()
    second.cancel()
    first.cancel()
    await call(herd, log, 3)
    assert [name for name, _ in log] == [1, 3]


async def test_nobody_waits_for_more_than_a_few_seconds(nursery, autojump_clock):
    """The first's answer is slow to begin: the others go all the same."""
    herd, log = Herd(), []
    began = trio.current_time()
    async with trio.open_nursery() as all_of_them:
        for name in range(5):
            all_of_them.start_soon(lambda name=name: call(herd, log, name, seconds=60))
    assert [at - began for _, at in log] == pytest.approx([0.0] + [PATIENCE] * 4)


async def test_what_is_warm_grows_cold(autojump_clock):
    """A cache forgets after minutes; the herd remembers a bounded number of prompts."""
    herd = Herd()
    herd.warm(["a"], 300)
    await trio.sleep(299)
    assert herd.is_warm("a")
    await trio.sleep(2)
    assert not herd.is_warm("a")
    herd.warm(range(WARM + 5), 300)
    assert not herd.is_warm(4)
    assert herd.is_warm(5)


async def test_what_an_endpoint_goes_on_with_leaves_no_marker_before_the_last_text(autojump_clock):
    """Such a request has none there: siblings that share just that find nothing yet, and are not told so."""
    async with running() as house:
        pid = await house.spawn(table(prompt={"system": "be good"}), "!say one", interactive=True)
        await house.until(pid, "fd:0")
        await house.call("proc.send", pid=pid, text="!sleep 100")
        await house.until(pid, "api")
        m, p = house.m, house.proc(pid)
        transcript = await m.transcript(p)
        image = replace(m.kernel.image(p), threads=True)
        whole = await window.outgoing(m, p, image, transcript)
        answer = Reply(message_id="msg_1", stop_reason="end_turn")
        m.threads.note(replace(p, head=transcript.answer.id), answer, m.kernel.now)
        goes_on = await window.outgoing(m, p, image, transcript)
    assert (whole.previous, goes_on.previous) == (None, "msg_1")
    assert whole.share.marked == (*goes_on.share.marked, whole.share.key)
