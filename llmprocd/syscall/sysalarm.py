"""Wall-clock limits: what happens when one is reached."""

from llmprocd.abi.types import Pid, Signal
from llmprocd.kernel import proc
from llmprocd.kernel import signal as signals
from llmprocd.kernel.state import At, LastTurn
from llmprocd.machine import Machine

WALL = 124
"""The exit status at a hard wall limit, as timeout(1) has it."""


async def ring(m: Machine, pid: Pid, which: str) -> None:
    """A process has reached its soft wall limit (SIGXCPU), or its hard one (it ends with 124)."""
    p = m.kernel.procs.get(pid)
    if p is None or not p.live:
        return
    if which == "soft" and p.last_turn is not LastTurn.NO:
        return  # it has been told
    node = await m.node(p.head) if p.at is At.ASKS and p.head is not None else None
    k = m.begin()
    p = k.procs.get(pid)
    if p is None or not p.live:
        return
    if p.at is At.ASKS and (node is None or node.id != p.head):
        await ring(m, pid, which)
        return
    bound = p.wall.soft if which == "soft" else p.wall.hard
    k.emit("limit", pid, resource="wall", which=which, seconds=bound)
    if which == "soft":
        signals.deliver(k, pid, Signal.XCPU, node, None, sender="limit")
    else:
        proc.interrupt(k, pid, node, m.partial(pid), verdict=WALL)
        proc.exit_(k, pid, WALL, reason=f"wall-clock limit of {bound:g} s")
    m.commit("wall")
