"""READ < WRITE < ADMIN.

Law: a ceiling only goes down a tree; nothing in here, and nobody who calls it, raises one.
"""

from msgspec.structs import replace

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Access, Pid
from llmprocd.kernel.state import Image, Kernel, Proc


def child(parent: Proc, image: Image) -> Access:
    """The ceiling of a child that a model makes."""
    return min(parent.access, image.child_access)


def narrowed(image: Image, old: Image) -> Image:
    """A program that a process, not a person, puts in the place of another: its children may do no more."""
    return replace(image, child_access=min(image.child_access, old.child_access))


def denied(need: Access, have: Access) -> str:
    """The sentence a model reads when a tool is above its process."""
    return f"Access denied: this tool requires {need.word} access but process has {have.word}"


def inside(k: Kernel, pid: Pid, root: Pid) -> bool:
    """Is `pid` the process `root` or born below it?"""
    while pid != root:
        proc = k.procs.get(pid)
        if proc is None:
            return False
        pid = proc.birth
    return True


def require_below(k: Kernel, pid: Pid, root: Pid) -> Proc:
    """A descendant of `root`; EPERM for any other process, ESRCH for none."""
    proc = k.proc(pid)
    if pid == root or not inside(k, pid, root):
        raise KernelError(Errno.EPERM, f"process {pid} is not a descendant of process {root}")
    return proc


def subtree(k: Kernel, root: Pid) -> list[Pid]:
    """A process and all that were born below it, parents first."""
    found = [root]
    for pid in found:
        found.extend(k.born.get(pid, ()))
    return found
