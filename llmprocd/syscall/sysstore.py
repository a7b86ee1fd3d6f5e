"""The store: freeing what nothing refers to any more."""

from collections.abc import Sequence

import trio

from llmprocd.abi import calls
from llmprocd.abi.types import FileId, MessageId
from llmprocd.kernel import garbage
from llmprocd.kernel.state import File, Garbage, Proc
from llmprocd.machine import Machine
from llmprocd.syscall.caller import Caller, require_user

AT_ONCE = 1000
"""How many processes are looked at before others have their turn."""


async def sys_gc(m: Machine, caller: Caller, call: calls.StoreGc) -> calls.Freed:
    """Free what nothing refers to, or say how much that would be."""
    require_user(caller)
    return await collect(m, dry_run=call.dry_run)


async def collect(m: Machine, *, dry_run: bool = False) -> calls.Freed:
    """Search among the processes of this moment for what nothing refers to, and free it."""
    procs, known, below = (
        tuple(m.kernel.procs.values()),
        tuple(m.kernel.files.values()),
        m.kernel.counters.message,
    )
    await m.wait_durable()
    wanted, held = await _needed(procs)
    files = [file for file in known if file.complete and file.id not in held]
    if files and not dry_run:
        await _free_files(m, files)
    messages, size = await _nodes(m, wanted, MessageId(below), dry_run=dry_run)
    return calls.Freed(len(files), messages, size + sum(file.size for file in files))


async def _needed(procs: Sequence[Proc]) -> tuple[set[MessageId], set[FileId]]:
    """The messages and files that processes refer to, without holding the others up."""
    wanted: set[MessageId] = set()
    held: set[FileId] = set()
    for start in range(0, len(procs), AT_ONCE):
        part = procs[start : start + AT_ONCE]
        wanted |= garbage.roots(part)
        held |= garbage.held(part)
        await trio.lowlevel.checkpoint()
    return wanted, held


async def _free_files(m: Machine, files: Sequence[File]) -> None:
    """The records first: contents that no record names go at the next boot, if not now."""
    m.begin().free(Garbage(files=[file.id for file in files]))
    m.commit("gc_files")
    await m.wait_durable()
    await m.store.remove([file.id for file in files if file.disk])


async def _nodes(m: Machine, wanted: set[MessageId], below: MessageId, *, dry_run: bool) -> tuple[int, int]:
    """Free the messages that nothing wants; how many they are, and their bytes."""
    count = size = 0
    while below:
        sifted = await m.store.sift(wanted, below)
        if sifted.garbage and not dry_run:
            m.begin().free(Garbage(nodes=sifted.garbage))
            m.commit("gc_nodes")
            await m.wait_durable()
        count, size = count + len(sifted.garbage), size + sifted.bytes
        wanted, below = sifted.wanted, sifted.below
    return count, size
