"""Nothing that was acknowledged is lost: not by kill -9, and not by a power cut.

kill -9 loses nothing that the program has written, so that it finds only half of what can be wrong. The
power cut is simulated, and shown to find what it should: two sabotaged stores must be caught.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio
from powercut import record, states
from storechild import contents
from storekit import numbered

from llmprocd.abi.errno import KernelError
from llmprocd.abi.types import MessageId, Pid
from llmprocd.store import sqlite
from llmprocd.store.protocol import StoreFailed

HERE = Path(__file__).parent
CHILD = str(HERE / "storechild.py")


async def whole(folder: str) -> set[int]:
    """The numbers that a store holds; each must be there whole, or not at all."""
    store = sqlite.Store(folder)
    try:
        saved = store.load()
        procs = {p.pid: p for p in saved.procs}
        files = {f.id: f for f in saved.files}
        events = {e.seq: e for e in await store.events(0, None, None, 10**9)}
        nodes = {n.id: n for n in await store.tree([MessageId(n) for n in procs], 0, 10**9)}
        assert set(procs) == set(files) == set(events) == set(nodes) == set(saved.families)
        assert set(procs) == {int(r.id) for r in saved.requests}
        for n in procs:
            want = numbered(n)
            assert [procs[Pid(n)], nodes[MessageId(n)], events[n]] == [
                want.procs[Pid(n)],
                *want.nodes,
                *want.events,
            ]
        for n in [n for n in procs if files[n].disk or n % 10 == 0]:
            held = await store.read(files[n], 0, 10**6)
            assert held == (contents(n) if files[n].disk else numbered(n).chunks[0].data)
        assert saved.counters.pid - 1 in procs or not procs
        return set(procs)
    finally:
        store.close()


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    """Many lives on one folder, each ended at a random moment."""
    folder, chance = str(tmp_path / "state"), random.Random(9)
    acked: set[int] = set()
    have: set[int] = set()
    for life in range(12):
        mode = "blobs" if life % 2 else "plain"
        child = subprocess.Popen(
            [sys.executable, CHILD, mode, folder, str(max(have, default=0) + 1)],
            stdout=subprocess.PIPE, cwd=HERE, text=True,
        )  # fmt: skip
        first = child.stdout.readline()
        timer = threading.Timer(chance.random() * 0.3, os.kill, (child.pid, signal.SIGKILL))
        timer.start()
        lines = [first, *child.stdout]
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL
        timer.join()
        acked |= {int(line) for line in lines if line.endswith("\n")}
        have = trio.run(whole, folder)
        assert acked <= have
    assert len(acked) > 200


def outcome(folder: Path, files: dict[str, bytes], acked: set[int]) -> bool:
    """Is everything that was acknowledged there, and all that is there whole?"""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    try:
        return acked <= trio.run(whole, str(folder))
    except (StoreFailed, KernelError, AssertionError):
        return False


def cuts(tmp_path: Path, mode: str, seconds: float, count: int) -> tuple[int, int]:
    """How many crash states of a store in one mode are in order, and how many there were."""
    folder = tmp_path / "state"
    trace = record([sys.executable, CHILD, mode, str(folder), "1"], tmp_path / "trace", HERE, seconds)
    assert len([one for one in trace if one[0] == "ack"]) > 10
    assert len([one for one in trace if one[0] == "sync"]) > 10
    good = [
        outcome(tmp_path / "after", files, acked)
        for files, acked in states(trace, str(folder), count, seed=3)
    ]
    return sum(good), len(good)


traced = pytest.mark.skipif(not shutil.which("strace"), reason="strace is what records the writes")


@traced
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "blobs"])
def test_a_power_cut_loses_nothing_that_was_acknowledged(mode, tmp_path):
    """Whatever of the unsynced writes reached the disk."""
    good, all_ = cuts(tmp_path, mode, 1.0, 200)
    assert good == all_ == 200


@traced
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["normal", "unsynced"])
def test_a_store_that_does_not_sync_is_caught(mode, tmp_path):
    """The positive control: the simulation can tell a store that keeps its promise from one that does not."""
    good, all_ = cuts(tmp_path, mode, 1.0, 60)
    assert good < all_ * 2 / 3
