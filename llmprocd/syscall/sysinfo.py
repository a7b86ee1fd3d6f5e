"""The daemon itself: hello, the method table, status, events, programs."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import get_args

import msgspec
import trio

from llmprocd import __version__
from llmprocd.abi import calls, wire
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.events import TYPES, Event
from llmprocd.abi.types import Access, Usage
from llmprocd.kernel import access as ceilings
from llmprocd.kernel.state import NOTHING, Use
from llmprocd.machine import Machine
from llmprocd.syscall import sysfile
from llmprocd.syscall.caller import Caller, require, require_user

PROTO = 1
CAPS = ("cancel", "events.subscribe", "fd.read.wait", "request_id")
LIMITS = {
    "request": wire.MAX_REQUEST,
    "chunk": sysfile.CHUNK,
    "inflight": wire.MAX_IN_FLIGHT,
    "depth": wire.MAX_DEPTH,
}
SHAPES = get_args(wire.Shape)


def sys_hello(m: Machine, caller: Caller, call: calls.Hello) -> calls.Greeting:
    """Introduce each other."""
    if call.errors not in SHAPES:
        raise KernelError(Errno.EINVAL, f"errors: {call.errors!r} is none of {', '.join(SHAPES)}")
    caller.errors = call.errors
    peer = calls.Peer(caller.os_pid, caller.uid, caller.gid, caller.proc)
    return calls.Greeting(PROTO, "llmprocd", __version__, m.boot_id, list(CAPS), LIMITS, peer)


def sys_status(m: Machine, caller: Caller, _call: calls.GetStatus) -> calls.Status:
    """Counts and use."""
    require(m.kernel, caller, Access.READ)
    used = [p.usage for p in m.kernel.procs.values() if p.turns]
    billed = [p for p in m.kernel.procs.values() if p.cost or p.unpriced or p.gone is not NOTHING]
    total = Use(
        cost=sum(p.cost + p.gone.cost for p in billed),
        unpriced=sum(p.unpriced + p.gone.unpriced for p in billed),
    )
    return calls.Status(
        version=__version__,
        pid=m.os_pid,
        boot_id=m.boot_id,
        uptime_s=round(m.begin().now - m.started, 3),
        socket=m.socket,
        state_dir=m.state_dir,
        procs=m.counts(),
        usage=Usage(*(sum(map(attrgetter(field), used)) for field in Usage.__struct_fields__)),
        cost_usd=total.dollars,
        scheduler=m.sched.table(),
        local=m.local.info() if m.local is not None else None,
    )


def sys_reload(m: Machine, caller: Caller, _call: calls.Reload) -> calls.Empty:
    """Read the config again; a bad one is refused and the old one stays."""
    require_user(caller)
    m.reload()
    return calls.Empty()


def sys_stop(m: Machine, caller: Caller, _call: calls.Stop) -> calls.Empty:
    """Stop the daemon, soon after the answer."""
    require_user(caller)
    m.stopping.set()
    return calls.Empty()


# --- events -----------------------------------------------------------------------------------------


class Filter(msgspec.Struct, frozen=True):
    """Whose and which events."""

    pids: frozenset[int] | None
    types: frozenset[str] | None


def sieve(m: Machine, caller: Caller, pids: Sequence[int] | None, types: Sequence[str] | None) -> Filter:
    """What a reader wants to see, and may: a tool sees its own subtree."""
    for name in types or ():
        if name not in TYPES:
            raise KernelError(Errno.EINVAL, f"types: {name!r} is no event type")
    wanted = frozenset(pids) if pids is not None else None
    if caller.proc is not None:
        own = frozenset(ceilings.subtree(m.kernel, caller.proc))
        wanted = own if wanted is None else wanted & own
    return Filter(wanted, frozenset(types) if types is not None else None)


async def sys_events_read(m: Machine, caller: Caller, call: calls.EventsRead) -> calls.EventList:
    """Events after a number; waits for the first one if asked to."""
    require(m.kernel, caller, Access.READ)
    after = m.console.visible if call.after_seq is None else call.after_seq
    with looking(m, caller, call.pids, call.types):
        events, following, lost = await fetch(m, after, call.max, sieve(m, caller, call.pids, call.types))
        with trio.move_on_after(call.wait_ms / 1000):
            while not (events or lost) and call.wait_ms:
                await m.waits.sleep("events")
                wanted = sieve(m, caller, call.pids, call.types)
                events, following, lost = await fetch(m, following, call.max, wanted)
        return listed(events, following, lost)


def looking(
    m: Machine, caller: Caller, pids: Sequence[int] | None, types: Sequence[str] | None
) -> AbstractContextManager[None]:
    """Say what somebody looks at; a tool's subtree grows while it looks, so it is not asked for by pid."""
    return m.console.reader(pids if caller.proc is None else None, types)


def listed(events: Sequence[Event], following: int, lost: int) -> calls.EventList:
    return calls.EventList([event.flat() for event in events], following, lost)


async def fetch(m: Machine, after: int, limit: int, wanted: Filter) -> tuple[list[Event], int, int]:
    """Events after a number, from the ring or from the disk; where to read on; how many are gone."""
    if after + 1 >= m.console.oldest or after >= m.console.visible:
        return (*m.console.read(after, limit, wanted.pids, wanted.types), 0)
    lost = max(0, m.store.trimmed - after)
    until = m.console.oldest
    stored = await m.store.events(after, wanted.pids, wanted.types, limit)
    if m.console.oldest > until:  # the ring has moved on meanwhile: there is more on the disk by now
        return await fetch(m, after, limit, wanted)
    stored = [event for event in stored if event.seq < until]
    if len(stored) == limit:
        return stored, stored[-1].seq, lost
    ring, following = m.console.read(until - 1, limit - len(stored), wanted.pids, wanted.types)
    return [*stored, *ring], following, lost


def sys_subscribe(m: Machine, caller: Caller, call: calls.Subscribe) -> calls.Subscribed:
    """Push events to a connection: a cursor, and no queue."""
    require(m.kernel, caller, Access.READ)
    sieve(m, caller, call.pids, call.types)
    number = max(caller.subs, default=0) + 1
    after = m.console.visible if call.after_seq is None else call.after_seq
    scope = caller.subs[number] = trio.CancelScope()
    m.background(_push, m, caller, call, number, after, scope)
    return calls.Subscribed(number)


async def _push(
    m: Machine, caller: Caller, call: calls.Subscribe, number: int, after: int, scope: trio.CancelScope
) -> None:
    with looking(m, caller, call.pids, call.types), scope:
        while True:
            wanted = sieve(m, caller, call.pids, call.types)
            events, following, lost = await fetch(m, after, 256, wanted)
            if lost:
                await _pushed(m, caller, "overflow", {"sub": number, "lost": lost, "next_seq": following})
            if events:
                batch = {"sub": number, "events": [event.flat() for event in events]}
                await _pushed(m, caller, "event", batch)
            waited = after == following
            after = following
            if waited or not (events or lost):  # telling of a loss may have taken a while
                await m.waits.sleep("events")


async def _pushed(m: Machine, caller: Caller, method: str, params: Mapping[str, object]) -> None:
    while not caller.push.notify(method, params, m.store.durable):
        await caller.push.writable()


def sys_unsubscribe(_m: Machine, caller: Caller, call: calls.Unsubscribe) -> calls.Empty:
    """Stop pushing."""
    scope = caller.subs.pop(call.sub, None)
    if scope is None:
        raise KernelError(Errno.ENOENT, f"sub: there is no subscription {call.sub}")
    scope.cancel(reason="unsubscribed")
    return calls.Empty()


# --- programs ---------------------------------------------------------------------------------------


def sys_prog_list(m: Machine, caller: Caller, _call: calls.ProgList) -> calls.ProgramTable:
    """Programs by name."""
    require(m.kernel, caller, Access.READ)
    return calls.ProgramTable([calls.ProgramInfo(*row) for row in m.programs()])


def sys_prog_check(m: Machine, caller: Caller, call: calls.ProgCheck) -> calls.Checked:
    """Every fault of a program file."""
    require(m.kernel, caller, Access.READ)
    return m.check(call.path, call.cwd or "/")
