"""Wall-clock limits: what happens when one is reached."""

from llmprocd.abi.types import Pid
from llmprocd.kernel import limits, proc
from llmprocd.kernel.state import At, Kernel, LastTurn, Node, Proc
from llmprocd.machine import Machine

WALL = 124
"""The exit status at a hard wall limit, as timeout(1) has it."""

EARLY_S = 0.01
"""How far wall time may be behind the clock that alarms sleep on."""


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
    if which == "hard":
        _end(m, k, p, node)
    elif p.last_turn is LastTurn.NO:
        limits.tell(k, p, "wall")
    else:
        return
    m.commit("wall")


def _end(m: Machine, k: Kernel, p: Proc, node: Node | None) -> None:
    """The hard wall limit of a process, or of one that it was born below, is reached."""
    due = limits.deadline(k, p)
    if due is None or due.at > k.now + EARLY_S:
        m.limits_changed(p.pid)  # meanwhile, or the clock was set: sleep on
        return
    whose = "" if due.pid == p.pid else f" of process {due.pid}"
    k.emit("limit", p.pid, resource="wall", which="hard", limit=due.seconds, used=due.seconds, of=due.pid)
    proc.interrupt(k, p.pid, node, m.partial(p.pid), verdict=WALL)
    proc.exit_(k, p.pid, WALL, reason=f"wall-clock limit of {due.seconds:g} s{whose}")
