"""Retention: ended processes are forgotten after a while, and in time all that only they had.

Law: a child whose living parent has not collected it is never forgotten. Nor is one that its parent still
waits for, whoever else has collected it.
"""

import itertools
import logging
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import trio

from llmprocd.abi.types import ImageId, Pid
from llmprocd.kernel import garbage, proc
from llmprocd.kernel.state import Garbage, Proc
from llmprocd.machine import Machine
from llmprocd.syscall import sysstore

_log = logging.getLogger("llmprocd.sweep")

EVERY_S = 3600.0
GC_EVERY = 24
"""After how many sweeps messages and files are gone through."""
AT_ONCE = 1000

REQUESTS_S = 86_400.0
"""For how long the answer to a request id is remembered; the store forgets by itself."""


def due(m: Machine) -> list[Pid]:
    """Ended processes that are too old, or too many: the oldest first."""
    ended = sorted(
        (p for p in m.kernel.procs.values() if not p.live and _may_go(m, p)), key=lambda p: p.ended
    )
    before = m.begin().now - m.config.keep_days * 86_400
    extra = max(0, len(ended) - m.config.keep_ended)
    return [p.pid for number, p in enumerate(ended) if number < extra or p.ended < before]


def _may_go(m: Machine, p: Proc) -> bool:
    if proc.binds(m.kernel, p):
        return False
    parent = m.kernel.procs.get(p.ppid)
    if parent is None or not parent.live:
        return True
    return p.collected and not any(p.pid in pids for pids in parent.awaiting.values())


async def run(m: Machine) -> None:
    """Sweep now and then, a little at a time."""
    unused: AbstractSet[ImageId] = frozenset()
    for hour in itertools.count():
        m.begin().forget_requests(REQUESTS_S)
        await forget(m, due(m))
        unused = free_unused(m, unused)
        if hour % GC_EVERY == GC_EVERY - 1:
            freed = await sysstore.collect(m)
            _log.info("freed %d files and %d messages, %d bytes", freed.files, freed.messages, freed.bytes)
        await trio.sleep(EVERY_S)


async def forget(m: Machine, pids: Sequence[Pid]) -> None:
    """Remove ended processes."""
    for start in range(0, len(pids), AT_ONCE):
        k = m.begin()
        for pid in pids[start : start + AT_ONCE]:
            if pid in k.procs and not proc.binds(k, k.procs[pid]):
                proc.remove(k, pid)
        m.commit("sweep")
        await trio.lowlevel.checkpoint()
    if pids:
        _log.info("forgot %d ended processes", len(pids))


def free_unused(m: Machine, before: AbstractSet[ImageId]) -> AbstractSet[ImageId]:
    """Free families that have died out, and programs that were unused before too; gives the unused ones.

    A program is given an hour, for a step that is just being cancelled may still look at it.
    """
    k = m.begin()
    unused, extinct = garbage.images(k), garbage.families(k)
    if extinct or unused & before:
        k.free(Garbage(images=unused & before, families=extinct))
        m.commit("gc_unused")
    return unused - before
