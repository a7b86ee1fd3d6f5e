"""The daemon itself: `daemon start|stop|status|reload`, and `gc`."""

import os

from llmprocctl import cmd_local, render, units
from llmprocctl import session as sessions
from llmprocctl.client import UnreachableError
from llmprocctl.session import Session, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NOT_RUNNING = 3  # as LSB's init scripts have it


def daemon(session: Session, *, action: str, json: bool) -> int:
    """Start, stop, look at or reload the daemon."""
    if action == "start":
        status = session.starting().call("sys.status")
        session.say(f"llmprocd runs, pid {status['pid']}, {session.path}")
        return 0
    if action == "status":
        return _status(session, json=json)
    if action == "reload":
        session.call("sys.reload")
        return 0
    if action == "stop":
        return _stop(session)
    raise UsageError(f"{action}: not one of start, stop, status, reload")


def gc(session: Session, *, dry_run: bool, json: bool) -> int:
    """Free what nothing refers to, and say how much it was."""
    freed = session.call("store.gc", dry_run=dry_run)
    if json:
        render.put_json([freed])
    else:
        said = f"{freed['files']} files, {freed['messages']} messages, {units.bytes_(freed['bytes'])}"
        render.put(f"{'would free' if dry_run else 'freed'} {said}\n")
    return 0


def _status(session: Session, *, json: bool) -> int:
    try:
        status = session.call("sys.status")
    except UnreachableError as exc:
        sessions.complain(str(exc))
        return _NOT_RUNNING
    if json:
        render.put_json([status])
    else:
        render.put(_line(status))
        render.put("".join(_endpoint(row) for row in status["scheduler"]))
        if (local := status.get("local")) and local["state"] != "down":
            render.put(f"  local model: {cmd_local.line(local)}\n")
    return 0


def _line(status: "dict[str, Any]") -> str:
    procs = ", ".join(f"{number} {what}" for what, number in status["procs"].items()) or "no processes"
    cost = "" if status["cost_usd"] is None else f", {units.dollars(status['cost_usd'])}"
    up = f"pid {status['pid']}, up {units.clock(status['uptime_s'])}"
    return f"llmprocd {status['version']} {up}, unix://{status['socket']}, {procs}{cost}\n"


def _endpoint(row: "dict[str, Any]") -> str:
    """How a model endpoint does: slots, who waits, for how long it is held, what is left of its limits."""
    said = [f"{row['running']} of {row['slots']} slots", f"{row['waiting']} waiting"]
    if row["held_s"]:
        said.append(f"held for {units.span(int(row['held_s']) + 1)}")
    said += [
        f"{name} {units.count(row[f'{name}_left'])} of {units.count(row[name])} left"
        for name in ("rpm", "itpm", "otpm")
        if row.get(name) is not None
    ]
    return f"  {row['endpoint']}: {', '.join(said)}\n"


def _stop(session: Session) -> int:
    """Stop it, and return when it is gone: whoever starts one next finds the socket free."""
    pid = session.call("sys.status")["pid"]
    handle = -1
    if os.path.exists(f"/proc/{pid}"):  # noqa: PTH110 - else it lives in another pid namespace
        handle = os.pidfd_open(pid)
    session.call("sys.stop")
    session.client.closed()
    if handle >= 0:
        from select import POLLIN, poll

        poller = poll()
        poller.register(handle, POLLIN)
        poller.poll()
        os.close(handle)
    return 0
