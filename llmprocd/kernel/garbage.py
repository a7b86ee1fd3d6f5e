"""What nothing refers to any more.

Law: messages and files that no process refers to will never be referred to again. Heads move within the tree
that their process grew, and descriptors are handed on by processes that have them. So what was garbage among
the processes of one moment stays garbage, however long the search takes and whatever is done meanwhile.
Programs are not like that: the next spawn may be of an equal one.
"""

from collections.abc import Iterable
from itertools import chain

from llmprocd.abi.types import FileId, ImageId, MessageId, Pid
from llmprocd.kernel.state import Kernel, Proc


def roots(procs: Iterable[Proc]) -> set[MessageId]:
    """The nodes that processes refer to; what these grew from is needed with them."""
    found: set[MessageId | None] = set()
    for p in procs:
        found.update((p.head, p.run.spoke, *p.tips))
        if p.last_call is not None:
            found.add(p.last_call.head)
    return {number for number in found if number is not None}


def held(procs: Iterable[Proc]) -> set[FileId]:
    """The files that processes have open."""
    return {number for p in procs for number in chain(p.fds.values(), p.refs.values())}


def images(k: Kernel) -> set[ImageId]:
    """The programs that nobody runs, nor ran at his last call."""
    used = {p.image for p in k.procs.values()}
    used.update(p.last_call.image for p in k.procs.values() if p.last_call is not None)
    return k.images.keys() - used


def families(k: Kernel) -> set[Pid]:
    """The families that have died out."""
    return k.families.keys() - {p.family for p in k.procs.values()}
