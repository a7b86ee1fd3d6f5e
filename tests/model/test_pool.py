"""Streams read in turn: how often, in which order, and what a cancelled one leaves."""

from collections import Counter

import pytest
import trio

from llmprocd.model.pool import EAGER, READS, TICK, Pool


def busy(streams):
    pool = Pool()
    pool.busy = streams
    return pool


async def read(pool, log, number=0):
    await pool.turn()
    log.append((number, trio.current_time()))


async def test_a_few_streams_read_at_once(autojump_clock):
    pool, log = busy(EAGER), []
    async with trio.open_nursery() as nursery:
        for _ in range(EAGER):
            nursery.start_soon(read, pool, log)
    assert trio.current_time() == 0


async def test_many_streams_read_in_turn_and_together_no_oftener_than_they_may(autojump_clock):
    """A thousand streams, each again and again: all get as much, and no tick is longer than another."""
    pool, log = busy(1000), []

    async def stream(number):
        while True:
            await read(pool, log, number)

    with trio.move_on_after(1.0):
        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(stream, number)
    assert len(log) == pytest.approx(READS, rel=0.02)
    assert set(Counter(number for number, _ in log).values()) <= {4, 5}
    assert max(Counter(at for _, at in log).values()) == READS * TICK


async def test_a_cancelled_stream_takes_no_turn(autojump_clock):
    pool, log = busy(1000), []
    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(read, pool, log)
        await trio.sleep(TICK / 2)
        nursery.cancel_scope.cancel()
    assert not pool._lot
    await read(pool, log)
    assert trio.current_time() <= 2.5 * TICK
    await trio.sleep(1)
    assert not pool._ticks, "nobody waits, and yet it ticks"
