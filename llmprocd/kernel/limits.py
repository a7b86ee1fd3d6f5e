"""What a subtree may still spend: reserve, settle, refuse.

Law: what a process uses counts for it and for all that it was born below, for ever: also after it has ended
or was removed, and after a restart. A child has no budget beside its ancestors'; its own limits can only be
narrower.
Law: no subtree spends more than a hard limit allows. What a model call may use at most is reserved before it,
and settled when it has ended; calls that run at once cannot overshoot together what each of them would keep.

A limit is `soft:hard`. At the soft one a process is told to finish (SIGXCPU), once; at the hard one its next
model call is its end, birth is EAGAIN and a new descriptor EDQUOT. What a process has no limit of is bound by
the config's, for a tree.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec.structs import replace

from llmprocd.abi import units
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import INIT, Pid
from llmprocd.kernel.state import NANO, NOTHING, Kernel, LastTurn, Limit, Proc, Use

PARSERS: Mapping[str, Callable[[Any, str], float]] = {
    "turns": units.count,
    "tokens": units.count,
    "cost_usd": units.dollars,
    "wall": units.duration,
    "procs": units.count,
    "depth": units.count,
    "fds": units.count,
    "fd_bytes": units.size,
}
"""The resources there are, and how an amount of each is written."""

DEFAULTS: Mapping[str, Limit] = {
    "procs": Limit(None, 1024.0),
    "depth": Limit(None, 16.0),
    "fds": Limit(None, 10_000.0),
    "fd_bytes": Limit(None, float(4 << 30)),
}
"""Bounds of each tree where nobody says otherwise: a runaway ends somewhere."""

SPENT = ("turns", "tokens", "cost_usd")
"""What model calls use up."""

SUMMED = (*SPENT, "procs", "fds", "fd_bytes")
"""What adds up over a subtree."""

UNLIMITED = frozenset({"unlimited", "infinity", "none", "-"})

_SHOWN = {"wall": "{:g} s", "cost_usd": "${:g}"}


# --- as people write them ---------------------------------------------------------------------------


def parse(resource: str, value: Any) -> Limit:
    """A limit as it is written: an amount is the hard one, `soft:hard` both, and `unlimited` none.

    Raises EINVAL.
    """
    field = f"limits.{resource}"
    if resource not in PARSERS:
        raise KernelError(
            Errno.EINVAL, f"limits: {resource!r} is no resource (there are {', '.join(PARSERS)})"
        )
    soft, _, hard = value.rpartition(":") if isinstance(value, str) else ("", "", value)
    if isinstance(value, str) and not value.strip(" :"):
        raise KernelError(Errno.EINVAL, f"{field}: {value!r} says nothing; write an amount, or soft:hard")
    limit = Limit(_amount(resource, soft, field), _amount(resource, hard, field))
    if limit.soft is not None and limit.hard is not None and limit.soft > limit.hard:
        raise KernelError(Errno.EINVAL, f"{field}: the soft limit of {value} is above the hard one")
    return limit


def parse_all(given: Mapping[str, Any]) -> dict[str, Limit]:
    """Limits by resource, as they are written. Raises EINVAL."""
    return {resource: parse(resource, value) for resource, value in given.items()}


def _amount(resource: str, text: Any, field: str) -> float | None:
    if isinstance(text, str) and (not text.strip() or text.strip().lower() in UNLIMITED):
        return None
    amount = PARSERS[resource](text, field)
    if resource == "wall" and not amount:
        raise KernelError(Errno.EINVAL, f"{field}: {text!r} is no time at all")
    return amount


def shown(resource: str, amount: float) -> str:
    """An amount in an error's sentence."""
    return _SHOWN.get(resource, "{:.0f}").format(amount)


# --- looking ----------------------------------------------------------------------------------------


def bound_of(k: Kernel, own: Mapping[str, Limit], birth: Pid, resource: str) -> Limit:
    """The limit of a process with these own limits: the config's where a tree's top has none."""
    limit = own.get(resource)
    if limit is None and birth == INIT:
        limit = k.defaults.get(resource)
    return limit or Limit()


def bound(k: Kernel, p: Proc, resource: str) -> Limit:
    """A process's limit of a resource."""
    return bound_of(k, p.limits, p.birth, resource)


def lineage(k: Kernel, pid: Pid) -> Iterator[Proc]:
    """A process and all that it was born below, the ended ones too."""
    while (proc := k.procs.get(pid)) is not None:
        yield proc
        pid = proc.birth


def _is_bound(p: Proc) -> bool:
    """Can a process have limits at all?"""
    return bool(p.limits) or p.birth == INIT


def amount(use: Use, resource: str) -> float:
    """How much of a resource is in a sum; of money, in dollars."""
    return use.cost / NANO if resource == "cost_usd" else getattr(use, resource)


def _hard(limit: Limit, resource: str) -> int | None:
    """A hard limit as it is counted."""
    if limit.hard is None:
        return None
    return round(limit.hard * NANO) if resource == "cost_usd" else int(limit.hard)


def _counted(use: Use, resource: str) -> int:
    return use.cost if resource == "cost_usd" else getattr(use, resource)


class Row(msgspec.Struct, frozen=True):
    """One resource of one process."""

    resource: str
    limit: Limit
    used: float | None  # by the subtree; None: not known


def table(k: Kernel, p: Proc) -> list[Row]:
    """What a process may use, and what it and those below it have."""
    return [Row(resource, bound(k, p, resource), used(k, p, resource)) for resource in PARSERS]


def used(k: Kernel, p: Proc, resource: str) -> float | None:
    """What of a resource the subtree has used; None for a cost that is not known."""
    if resource == "wall":
        return max(0.0, (p.ended or k.now) - p.began)
    if resource == "depth":
        return _height(k, p)
    total = k.total(p.pid)
    return total.dollars if resource == "cost_usd" else amount(total, resource)


def _height(k: Kernel, p: Proc) -> int:
    """How many generations live below a process, itself included."""
    height, level = 0, [(p.pid, 1)]
    for pid, depth in level:
        height = max(height, depth if k.procs[pid].live else 0)
        level += [(child, depth + 1) for child in k.born.get(pid, ())]
    return height


class Deadline(msgspec.Struct, frozen=True):
    """When a wall limit is reached, and whose it is."""

    at: float  # wall time
    pid: Pid
    seconds: float


def deadline(k: Kernel, p: Proc) -> Deadline | None:
    """The first hard wall limit among those of a process and of all that it was born below."""
    first: Deadline | None = None
    for one in lineage(k, p.pid):
        hard = bound(k, one, "wall").hard if _is_bound(one) else None
        if hard is not None and (first is None or one.began + hard < first.at):
            first = Deadline(one.began + hard, one.pid, hard)
    return first


def is_timed(k: Kernel, p: Proc) -> bool:
    """Does a wall limit bind a process, its own or one above it?"""
    return any(_is_bound(one) and bound(k, one, "wall") != Limit() for one in lineage(k, p.pid))


def paying(k: Kernel, birth: Pid, own: Mapping[str, Limit]) -> Pid | None:
    """Whose cost_usd limit would bind a process with these limits; INIT is its own. None when nobody's."""
    if bound_of(k, own, birth, "cost_usd") != Limit():
        return INIT
    return next((p.pid for p in lineage(k, birth) if bound(k, p, "cost_usd") != Limit()), None)


# --- model calls ------------------------------------------------------------------------------------


class Need(msgspec.Struct, frozen=True):
    """What one model call may use up."""

    input: int  # tokens
    output: int  # tokens, at most
    least: int = 1  # tokens of output without which it makes no sense
    input_cost: int | None = None  # in billionths of a dollar; None: not known
    output_price: int = 0  # in billionths of a dollar, for a million tokens

    def use(self, output: int) -> Use:
        """All that is used with so much output."""
        cost = (self.input_cost or 0) - (-output * self.output_price // 1_000_000)
        return Use(turns=1, tokens=self.input + output, cost=cost)

    def fits(self, resource: str, left: int) -> int:
        """How many tokens of output there can be when so much of a resource is left; below zero: none."""
        if resource == "turns":
            return self.output if left >= 1 else -1
        if resource == "tokens":
            return left - self.input
        left -= self.input_cost or 0
        if left < 0 or not self.output_price:
            return self.output if left >= 0 else -1
        return left * 1_000_000 // self.output_price


class Granted(msgspec.Struct, frozen=True):
    """The call may be made, with at most so many tokens of output."""

    output: int
    over: "Over | None" = None  # what keeps it from having more


class Busy(msgspec.Struct, frozen=True):
    """Calls that are under way have to end first; whose limit they have reserved."""

    pid: Pid


class Over(msgspec.Struct, frozen=True):
    """There is not enough left, and there never will be."""

    pid: Pid  # whose limit it is
    resource: str
    hard: float
    unpriced: bool = False  # the model's price is not known, so nobody can say


def reserve(k: Kernel, pid: Pid, need: Need) -> Granted | Busy | Over:
    """Set aside what a call may use, for a process and all that it was born below.

    A call that would fit if nothing else were under way has to wait. One that does not fit whole even then
    may say less; one that cannot say even the least of it is over the limit.
    """
    k.hold(pid, NOTHING)
    now = ever = need.output
    busy: Busy | None = None
    over: Over | None = None
    for p in lineage(k, pid):
        for resource in SPENT if _is_bound(p) else ():
            hard = _hard(limit := bound(k, p, resource), resource)
            if hard is None or limit.hard is None:
                continue
            if resource == "cost_usd" and need.input_cost is None:
                return Over(p.pid, resource, limit.hard, unpriced=True)
            left = hard - _counted(k.total(p.pid), resource)
            if (fits := need.fits(resource, left)) < ever:
                ever, over = fits, Over(p.pid, resource, limit.hard)
            held = _counted(k.held.get(p.pid, NOTHING), resource)
            if (fits := need.fits(resource, left - held)) < now:
                now, busy = fits, Busy(p.pid)
    if over is not None and ever < need.least:
        return over
    if busy is not None and now < ever:
        return busy
    k.hold(pid, need.use(ever))
    return Granted(ever, over)


def release(k: Kernel, pid: Pid) -> None:
    """The call has ended, landed or not: nothing is reserved for it any more."""
    k.hold(pid, NOTHING)


def overdrawn(k: Kernel, pid: Pid) -> Over | None:
    """The hard limit that what is reserved does not fit into any more; None while all do."""
    for p in lineage(k, pid):
        for resource in SPENT if _is_bound(p) else ():
            hard = _hard(limit := bound(k, p, resource), resource)
            wanted = _counted(k.total(p.pid) + k.held.get(p.pid, NOTHING), resource)
            if hard is not None and limit.hard is not None and wanted > hard:
                return Over(p.pid, resource, limit.hard)
    return None


# --- soft limits ------------------------------------------------------------------------------------


def notice(k: Kernel, pid: Pid) -> None:
    """Tell every process that has reached a soft limit of its own to finish (SIGXCPU), once."""
    for p in list(lineage(k, pid)):
        if p.live and p.last_turn is LastTurn.NO and _is_bound(p):
            reached = next((one for one in SUMMED if _is_reached(k, p, one)), None)
            if reached is not None:
                tell(k, p, reached)


def tell(k: Kernel, p: Proc, resource: str) -> Proc:
    """SIGXCPU: the next turn of a process is its last."""
    soft = bound(k, p, resource).soft
    k.emit("limit", p.pid, resource=resource, which="soft", limit=soft, used=used(k, p, resource))
    k.emit("signal", p.pid, signal="XCPU", sender="limit")
    return k.put(replace(p, last_turn=LastTurn.DUE))


def _is_reached(k: Kernel, p: Proc, resource: str) -> bool:
    soft = bound(k, p, resource).soft
    return soft is not None and amount(k.total(p.pid), resource) >= soft


# --- birth, descriptors -----------------------------------------------------------------------------


def room(k: Kernel, birth: Pid, count: int, own: Mapping[str, Limit] | None = None) -> None:
    """Refuse (EAGAIN) so many children of a process where a limit of procs or depth does not allow them.

    `own` are the limits of the children themselves.
    """
    for level, p in enumerate(lineage(k, birth), 2):
        _require(p, bound(k, p, "procs"), "procs", k.total(p.pid).procs + count)
        _require(p, bound(k, p, "depth"), "depth", level)
    for resource in ("procs", "depth"):
        hard = bound_of(k, own or {}, birth, resource).hard
        if hard is not None and hard < 1:
            raise KernelError(Errno.EAGAIN, f"its own {resource} limit allows no process at all")


def _require(p: Proc, limit: Limit, resource: str, wanted: int) -> None:
    if limit.hard is not None and wanted > limit.hard:
        least = shown(resource, limit.hard)
        raise KernelError(Errno.EAGAIN, f"the {resource} limit of {least} of process {p.label} is reached")


def space(k: Kernel, pid: Pid, size: int, fds: int = 1) -> None:
    """Refuse (EDQUOT) a descriptor of so many bytes where a limit of a process or above it has no room."""
    for p in lineage(k, pid):
        for resource, more in (("fds", fds), ("fd_bytes", size)) if _is_bound(p) else ():
            _fits(k, bound(k, p, resource), resource, more, p)


def has_space(k: Kernel, pid: Pid, size: int) -> bool:
    """Is there room for a descriptor of so many bytes?"""
    try:
        space(k, pid, size)
    except KernelError:
        return False
    return True


def space_at_birth(k: Kernel, birth: Pid, own: Mapping[str, Limit], size: int) -> None:
    """As `space`, for a process that is about to be born with a descriptor."""
    for resource, more in (("fds", 1), ("fd_bytes", size)):
        _fits(k, bound_of(k, own, birth, resource), resource, more, None)
    space(k, birth, size)


def _fits(k: Kernel, limit: Limit, resource: str, more: int, p: Proc | None) -> None:
    used_ = 0 if p is None else _counted(k.total(p.pid), resource)
    if limit.hard is not None and used_ + more > limit.hard:
        whose = f" of process {p.label}" if p is not None else ""
        least = shown(resource, limit.hard)
        raise KernelError(
            Errno.EDQUOT, f"the {resource} limit of {least}{whose} leaves no room for {more} more"
        )


# --- changing ---------------------------------------------------------------------------------------


def change(k: Kernel, pid: int, given: Mapping[str, Limit]) -> Proc:
    """Set some limits of a process; they hold from the next check on.

    Raises ESRCH when nothing of its tree lives, EINVAL for a limit of a cost that is not known.
    """
    p = k.proc(pid)
    if not k.total(p.pid).procs:
        raise KernelError(Errno.ESRCH, f"process {p.label} has ended with status {p.status}", pid=p.pid)
    if given.get("cost_usd", Limit()) != Limit() and k.total(p.pid).unpriced:
        raise KernelError(
            Errno.EINVAL, f"limits.cost_usd: what process {p.label} has cost so far is not known"
        )
    told = any(_is_reached(k, p, resource) for resource in SUMMED)
    p = k.put(replace(p, limits={**p.limits, **given}))
    still = any(_is_reached(k, p, resource) for resource in SUMMED)
    if told and not still and p.last_turn is LastTurn.DUE:
        p = k.put(replace(p, last_turn=LastTurn.NO))
    notice(k, p.pid)
    return k.proc(p.pid)
