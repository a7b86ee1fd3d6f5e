"""Who calls, and what he may do.

A user who can open the socket may do everything. A tool of an LLM process that opens it has the rights of
that process, not of its user: its own subtree, and within it what its access level allows.
"""

from typing import Protocol

import trio

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Access, Pid
from llmprocd.kernel import access
from llmprocd.kernel.state import Kernel, Proc


class Pushes(Protocol):
    """A connection's side for notifications."""

    def notify(self, method: str, params: object, ticket: int = 0) -> bool: ...
    async def writable(self) -> None: ...


class Caller:
    """One connection."""

    def __init__(self, os_pid: int, uid: int, gid: int, proc: Pid | None, push: Pushes) -> None:
        self.os_pid = os_pid
        self.uid = uid
        self.gid = gid
        self.proc = proc  # the LLM process whose tool this is
        self.push = push
        self.errors = "array"
        self.subs: dict[int, trio.CancelScope] = {}

    def __str__(self) -> str:
        return f"process {self.proc}" if self.proc is not None else f"uid {self.uid} pid {self.os_pid}"


def require(k: Kernel, caller: Caller, need: Access, pid: int | None = None) -> None:
    """Refuse a tool what its process may not do: EPERM. ESRCH for a process that is not there."""
    if caller.proc is None:
        return
    own = k.procs.get(caller.proc)
    if own is None or not own.live:
        raise KernelError(Errno.EPERM, f"process {caller.proc}, whose tool this is, has ended")
    if own.access < need:
        raise KernelError(Errno.EPERM, access.denied(need, own.access).replace("this tool", "this call"))
    if pid is not None:
        require_inside(k, caller, k.proc(pid))


def require_inside(k: Kernel, caller: Caller, p: Proc) -> None:
    """Refuse a tool the processes outside its own subtree: EPERM."""
    if caller.proc is not None and not access.inside(k, p.pid, caller.proc):
        raise KernelError(Errno.EPERM, f"process {p.pid} is not in the subtree of process {caller.proc}")


def require_user(caller: Caller) -> None:
    """Refuse a tool what only people decide: EPERM."""
    if caller.proc is not None:
        raise KernelError(Errno.EPERM, "a process's tools cannot do this")
