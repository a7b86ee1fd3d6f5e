"""Retention: ended processes are forgotten after a while.

Law: a child whose living parent has not collected it is never forgotten.
"""

import logging

import trio

from llmprocd.abi.types import INIT, Pid
from llmprocd.kernel import proc
from llmprocd.kernel.state import Proc
from llmprocd.machine import Machine

_log = logging.getLogger("llmprocd.sweep")

EVERY_S = 3600.0
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
    return p.collected or p.ppid == INIT or parent is None or not parent.live


async def run(m: Machine) -> None:
    """Sweep now and then, a little at a time."""
    while True:
        m.begin().forget_requests(REQUESTS_S)
        gone = due(m)
        for start in range(0, len(gone), AT_ONCE):
            k = m.begin()
            for pid in gone[start : start + AT_ONCE]:
                if pid in k.procs and not proc.binds(k, k.procs[pid]):
                    proc.remove(k, pid)
            m.commit("sweep")
            await trio.lowlevel.checkpoint()
        if gone:
            _log.info("forgot %d ended processes", len(gone))
        await trio.sleep(EVERY_S)
