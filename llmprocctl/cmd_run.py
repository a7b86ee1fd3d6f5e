"""`run` and `attach`: to be there while a process talks.

Law: whoever watches only watches: that this program ends, or loses the daemon, changes nothing for the
process.
Law: into a pipe goes what is committed, byte for byte fd 1 of the process; only a terminal sees text that
an attempt may yet take back.
"""

import os
import time

from llmprocctl import launch, render
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

    def __init__(self, pid: int, fd: int = 1) -> None:
        self._pid = pid
        self._fd = fd
        self._offset = 0

    def ask(self, client: Client, wait_ms: int) -> int:
        """Send a request for what comes next."""
        given = {"pid": self._pid, "fd": self._fd, "offset": self._offset, "count": _CHUNK}
        return client.send("fd.read", **given, wait_ms=wait_ms or None)

    def show(self, client: Client, msgid: int) -> bool:
        """Write it; False at the end of the file."""
        reply = client.take(msgid)
        data: bytes = reply["data"]
        self._offset += len(data)
        if self._fd == 1:
            render.put_bytes(data)
        else:
            os.write(2, render.shown(data.decode(errors="backslashreplace")).encode())
        return not reply["eof"]

    def drain(self, client: Client) -> bool:
        """Write what is there; whether that was anything."""
        begin = self._offset
        before = -1
        while self._offset != before:
            before = self._offset
            if not self.show(client, self.ask(client, 0)):
                break
        return self._offset > begin


class Live:
    """Events, as a person reads them."""

    def __init__(self, pid: int, after: int, *, activity: bool) -> None:
        self._pid = pid
        self._after = after
        self._talk = Talk(activity=activity)

    def ask(self, client: Client, wait_ms: int) -> int:
        """Send a request for what comes next."""
        return client.send("events.read", after_seq=self._after, pids=[self._pid], wait_ms=wait_ms or None)

    def show(self, client: Client, msgid: int) -> bool:
        """Show them; True, since there may always be more."""
        self._show(client.take(msgid))
        return True

    def drain(self, client: Client) -> None:
        """Show what has happened."""
        while self._show(client.take(self.ask(client, 0))):
            pass

    def _show(self, reply: "dict[str, Any]") -> int:
        self._after = reply["next_seq"]
        for event in reply["events"]:
            self._talk.show(event)
        return len(reply["events"])


class Silent:
    """Nothing is shown."""

    def drain(self, client: Client) -> None:
        """Nothing."""


class Watch:
    """A process that is watched until it ends."""

    def __init__(self, client: Client, pid: int, source: "Source", *, collect: bool = True) -> None:
        self.client = client
        self.pid = pid
        self._source = source
        self._reading = 0  # the request for more that is under way
        self._at_end = False
        self._ending = client.send("proc.wait", pids=[pid], collect=collect)

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self.client.answered(self._ending)

    def step(self, timeout_s: float | None, also: tuple[int, ...]) -> set[int]:
        """Wait for something to happen, and show it; which of the other descriptors can be read."""
        source = self._source
        if not isinstance(source, Silent) and not self._reading and not self._at_end:
            self._reading = source.ask(self.client, _LONG_POLL)
        if self._reading and self.client.answered(self._reading):
            timeout_s = 0  # it came while another answer was waited for
        ready = self.client.pump(timeout_s, also)
        if not isinstance(source, Silent) and self._reading and self.client.answered(self._reading):
            self._at_end = not source.show(self.client, self._reading)
            self._reading = 0
        return ready

    def status(self) -> int:
        """Show what is left, and tell the exit status."""
        row = self.client.take(self._ending)["procs"][0]
        if self._reading:
            self.client.drop(self._reading)
        if not self._at_end:
            self._source.drain(self.client)
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
        after = _now(session.starting()) if render.is_terminal() and not json else None
        pid = launch.spawn(session, program=program, words=words, stdin=stdin, **options)
    except launch.CannotStartError as exc:
        session.say(str(exc))
        return exc.status
    finally:
        stdin.close()
    try:
        source = Silent() if json else Output(pid) if after is None else Live(pid, after, activity=False)
        status, timed_out = _watched(Watch(session.client, pid, source), timeout)
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
    watch = Watch(client, target, Live(target, _now(client), activity=True), collect=False)
    if not os.isatty(0):
        return _attached(watch, None)
    from llmprocctl.keyboard import Keyboard

    session.say(f"{pid}: {render.cell(row['program'])}; ^P^Q detaches, ^C sends INT")
    with Keyboard() as keyboard:
        return _attached(watch, keyboard.read)


def _watched(watch: Watch, timeout: float | None) -> tuple[int, bool]:
    """Watch to the end; the status, and whether the time was up before."""
    deadline = None if timeout is None else time.monotonic() + timeout
    timed_out, sent = False, 0
    with Interrupts() as interrupts:
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


def _now(client: Client) -> int:
    """The number of the last event."""
    return client.call("events.read", max=1)["next_seq"]


def _conclude(session: Session, pid: int, status: int, *, json: bool, remove: bool) -> None:
    """The result, or why there is none."""
    if json:
        row = session.call("proc.get", pids=[pid])["procs"][0]
        render.put_json([{"pid": pid, **(row.get("run") or {}), "status": status}])
    elif status and not Output(pid, fd=2).drain(session.client):
        row = session.call("proc.get", pids=[pid])["procs"][0]
        if row.get("reason") not in {None, "", "exit"}:
            session.say(f"process {pid}: {render.cell(row['reason'])}")
    if remove:
        session.call("proc.remove", pids=[pid])
