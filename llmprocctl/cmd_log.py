"""`logs` and `events`: what happened, from the first event that is kept.

Law: the cursor is the client's own, so nothing is shown twice and what was lost is said.
"""

import time

from llmprocctl import render, talk
from llmprocctl.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, TypeAlias

    Event: TypeAlias = dict[str, Any]

_LONG_POLL = 30_000  # milliseconds
_TOLD = [*talk.TOLD, "input", "api_response"]


def logs(session: Session, *, pid: str, follow: bool, lines: int | None, since: float | None) -> int:
    """Print what a process said and did; with `follow` until it ends."""
    target = session.pid(pid)
    row = session.call("proc.get", pids=[target])["procs"][0]
    begin = 0.0 if since is None else time.time() - since
    follow = follow and row["status"] is None
    told: list[str] = []
    for events, over in _batches(session, pids=[target], types=_TOLD, follow=follow):
        told += [line for event in events if event["at"] >= begin for line in talk.lines(event)]
        if over:
            _print(told if lines is None else told[max(len(told) - lines, 0) :])
            told, lines = [], None
        if follow and any(event["type"] == "exit" for event in events):
            break
    _print(told)
    return 0


def events(
    session: Session, *, pids: tuple[str, ...], follow: bool, after: int | None, json: bool, quiet: bool
) -> int:
    """Print every event; with `follow` until interrupted."""
    asked = session.pids(pids)
    wanted = _known(session, asked) if asked else []
    if pids and not wanted:
        return session.status
    for batch, _ in _batches(session, after=after or 0, pids=wanted or None, follow=follow):
        if json:
            render.put_json(batch)
        elif quiet:
            _print([str(event["seq"]) for event in batch])
        else:
            _print([_line(event) for event in batch])
    return session.status


def _known(session: Session, asked: dict[str, int]) -> list[int]:
    """The pids of processes that there are, or were; the others are complained of."""
    rows = session.call("proc.list", all=True, pids=[*asked.values()])["procs"]
    there = {row["pid"] for row in rows}
    for word, pid in asked.items():
        if pid not in there and not session.call("events.read", after_seq=0, max=1, pids=[pid])["events"]:
            session.fault(word, "no such process")
        else:
            there.add(pid)
    return [pid for pid in asked.values() if pid in there]


def _batches(
    session: Session,
    *,
    pids: list[int] | None,
    after: int = 0,
    types: list[str] | None = None,
    follow: bool,
) -> "Iterator[tuple[list[Event], bool]]":
    """Events in order, and whether these were the last so far."""
    wait: int | None = None
    while True:
        reply = session.call("events.read", after_seq=after, pids=pids, types=types, wait_ms=wait)
        found: list[Event] = reply["events"]
        if reply["lost"]:
            session.say(f"{reply['lost']} events were lost")
        after = reply["next_seq"]
        caught_up = not found or wait is not None
        yield found, caught_up
        if caught_up and not follow:
            return
        wait = _LONG_POLL if caught_up else None


def _line(event: "Event") -> str:
    own = talk.pairs(event)
    return f"{event['seq']} {talk.clock(event['at'])} {event['pid']} {event['type']}{own and ' ' + own}"


def _print(lines: list[str]) -> None:
    if lines:
        render.put("\n".join(lines) + "\n")
