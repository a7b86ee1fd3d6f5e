"""`run` and `attach`: to be there while a process talks.

Law: whoever watches only watches: that this program ends, or loses the daemon, changes nothing for the
process.
Law: into a pipe goes what is committed, byte for byte fd 1 of the process; only a terminal sees text that
an attempt may yet take back.
"""

import os
import time

from llmprocctl import launch, render, talk
from llmprocctl import session as sessions
from llmprocctl.client import Client, LostError, RefusedError, UnreachableError
from llmprocctl.interrupts import Interrupts
from llmprocctl.session import Session
from llmprocctl.talk import Talk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    Source: TypeAlias = "Output | Live | Silent"

_LONG_POLL = 30_000  # milliseconds
_CHUNK = 262_144
_GRACE = 5.0  # seconds from TERM to KILL, once the time is up
_ESCALATION = ("INT", "TERM", "KILL")


class Output:
    """fd 1 or 2, byte for byte."""

    def __init__(self, client: Client, pid: int, fd: int = 1) -> None:
        self._client = client
        self._where = {"pid": pid, "fd": fd}
        self._write = render.put_bytes if fd == 1 else _complain_bytes
        self._offset = 0
        self._reading = 0  # the request that is under way
        self._complete = False

    def prepare(self) -> None:
        """Ask for what comes next."""
        if not self._reading and not self._complete:
            self._reading = self._ask(_LONG_POLL)

    def is_fresh(self) -> bool:
        """Whether there is something to show."""
        return self._reading > 0 and self._client.answered(self._reading)

    def show(self) -> None:
        """Write what has come."""
        self._take(self._reading)
        self._reading = 0

    def drain(self) -> bool:
        """Write all that is left; whether that was anything."""
        if self.is_fresh():
            self.show()
        elif self._reading:
            self._client.drop(self._reading)
        begin = self._offset
        while not self._complete and self._take(self._ask(None)):
            pass
        return self._offset > begin

    def _ask(self, wait_ms: int | None) -> int:
        return self._client.send("fd.read", **self._where, offset=self._offset, count=_CHUNK, wait_ms=wait_ms)

    def _take(self, msgid: int) -> bool:
        reply = self._client.take(msgid)
        data: bytes = reply["data"]
        self._offset += len(data)
        self._complete = reply["eof"]
        self._write(data)
        return bool(data)


class Live:
    """Events, as a person reads them.

    They are pushed: text as it comes is not kept for those who come back for more.
    """

    def __init__(self, client: Client, *, activity: bool) -> None:
        self._client = client
        self._talk = Talk(activity=activity)
        self._seen = client.call("events.read", max=1)["next_seq"]
        self._sub = client.call("events.subscribe", after_seq=self._seen, types=talk.SHOWN)["sub"]
        self._pid = 0

    def narrow(self, pid: int) -> None:
        """From now on that process's only."""
        self._pid = pid
        self.show()  # what was pushed while it was being started
        all_, given = self._sub, {"pids": [pid], "types": talk.SHOWN}
        self._sub = self._client.call("events.subscribe", after_seq=self._seen, **given)["sub"]
        self._client.tell("events.unsubscribe", sub=all_)

    def prepare(self) -> None:
        """Nothing: they come by themselves."""

    def is_fresh(self) -> bool:
        """Whether there is something to show."""
        return self._client.has_pushed()

    def show(self) -> None:
        """Show what has happened."""
        for method, told in self._client.pushed():
            if method == "event":
                self._show(told["events"])

    def drain(self) -> None:
        """Show all that has happened until now."""
        self.show()
        while True:
            reply = self._client.call("events.read", after_seq=self._seen, pids=[self._pid])
            if not reply["events"]:
                return
            self._show(reply["events"])

    def _show(self, events: "list[Any]") -> None:
        """Show those that are new: while there are two subscriptions, some come twice."""
        for event in events:
            if event["seq"] > self._seen and event["pid"] == self._pid:
                self._talk.show(event)
            self._seen = max(self._seen, event["seq"])


class Silent:
    """Nothing is shown."""

    def prepare(self) -> None:
        """Nothing."""

    def is_fresh(self) -> bool:
        """Never."""
        return False

    def show(self) -> None:
        """Nothing."""

    def drain(self) -> None:
        """Nothing."""


class Watch:
    """A process that is watched until it ends."""

    def __init__(self, client: Client, pid: int, source: "Source", *, collect: bool = True) -> None:
        self.client = client
        self.pid = pid
        self._source = source
        self._ending = client.send("proc.wait", pids=[pid], collect=collect)

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self.client.answered(self._ending)

    def step(self, timeout_s: float | None, also: tuple[int, ...]) -> set[int]:
        """Wait for something to happen, and show it; which of the other descriptors can be read."""
        self._source.prepare()
        if self._source.is_fresh():
            timeout_s = 0  # it came while another answer was waited for
        ready = self.client.pump(timeout_s, also)
        if self._source.is_fresh():
            self._source.show()
        return ready

    def status(self) -> int:
        """Show what is left, and tell the exit status."""
        row = self.client.take(self._ending)["procs"][0]
        self._source.drain()
        return row["status"]

    def signal(self, name: str) -> None:
        """Send a signal. That the process may have ended meanwhile is no matter."""
        self.client.tell("proc.signal", pid=self.pid, signal=name)


def run(
    session: Session,
    *,
    program: str,
    prompt: tuple[str, ...],
    no_stdin: bool,
    json: bool,
    timeout: float | None,
    remove: bool,
    **options: "Any",
) -> int:
    """Start a process, show what it says, wait for it, and exit with its status."""
    words = () if prompt == ("-",) else prompt
    stdin = launch.read_stdin() if prompt == ("-",) or not (no_stdin or os.isatty(0)) else launch.Stdin()
    try:
        client = session.starting()
        live = Live(client, activity=False) if render.is_terminal() and not json else None
        pid = launch.spawn(session, program=program, words=words, stdin=stdin, **options)
    except launch.CannotStartError as exc:
        session.say(str(exc))
        return exc.status
    finally:
        stdin.close()
    try:
        with Interrupts() as interrupts:
            source = Silent() if json else Output(session.client, pid)
            if live is not None:
                live.narrow(pid)
                source = live
            status, timed_out = _watched(Watch(session.client, pid, source), timeout, interrupts)
        _conclude(session, pid, status, json=json, remove=remove)
    except LostError as exc:
        raise UnreachableError(f"{exc}; see llmprocctl wait {pid} when it is back") from None
    return sessions.TIMED_OUT if timed_out else status


def attach(session: Session, *, pid: str) -> int:
    """Show live what a process says and does, and send it lines."""
    target = session.pid(pid)
    client = session.client
    row = client.call("proc.get", pids=[target])["procs"][0]
    if row["status"] is not None:
        session.fault(pid, f"it has ended with status {row['status']} (llmprocctl logs {pid})")
        return session.status
    live = Live(client, activity=True)
    live.narrow(target)
    watch = Watch(client, target, live, collect=False)
    if not os.isatty(0):
        return _attached(watch, None)
    from llmprocctl.keyboard import Keyboard

    session.say(f"{pid}: {render.cell(row['program'])}; ^P^Q detaches, ^C sends INT")
    with Keyboard() as keyboard:
        return _attached(watch, keyboard.read)


def _watched(watch: Watch, timeout: float | None, interrupts: Interrupts) -> tuple[int, bool]:
    """Watch to the end; the status, and whether the time was up before."""
    deadline = None if timeout is None else time.monotonic() + timeout
    timed_out, sent = False, 0
    while not watch.ended:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            watch.signal("KILL" if timed_out else "TERM")
            deadline = None if timed_out else time.monotonic() + _GRACE
            timed_out = True
            continue
        watch.step(left, (interrupts.fd,))
        for _ in range(interrupts.taken()):
            watch.signal(_ESCALATION[min(sent, 2)])
            sent += 1
    return watch.status(), timed_out


def _attached(watch: Watch, lines: "Callable[[], list[str] | None] | None") -> int:
    """Watch to the end or until detached; the exit status."""
    with Interrupts() as interrupts:
        also = (interrupts.fd,) if lines is None else (interrupts.fd, 0)
        while not watch.ended:
            ready = watch.step(None, also)
            for _ in range(interrupts.taken()):
                watch.signal("INT")
            if lines is not None and 0 in ready and not _typed(watch, lines()):
                return 0
        return watch.status()


def _typed(watch: Watch, lines: list[str] | None) -> bool:
    """Send what was typed; False when it was the keys to detach."""
    for line in lines or ():
        if line.strip():
            try:
                watch.client.call("proc.send", pid=watch.pid, text=line)
            except RefusedError as error:
                sessions.complain(f"attach: {error.text}")
    return lines is not None


def _conclude(session: Session, pid: int, status: int, *, json: bool, remove: bool) -> None:
    """The result, or why there is none."""
    if json:
        row = session.call("proc.get", pids=[pid])["procs"][0]
        render.put_json([{"pid": pid, **(row.get("run") or {}), "status": status}])
    elif status and not Output(session.client, pid, fd=2).drain():
        row = session.call("proc.get", pids=[pid])["procs"][0]
        if row.get("reason") not in {None, "", "exit"}:
            session.say(f"process {pid}: {render.cell(row['reason'])}")
    if remove:
        session.call("proc.remove", pids=[pid])


def _complain_bytes(data: bytes) -> None:
    """What the process complained of goes to stderr."""
    os.write(2, render.shown(data.decode(errors="backslashreplace")).encode())
