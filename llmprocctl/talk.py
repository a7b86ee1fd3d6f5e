"""What a process says and does, event by event, as a person reads it.

Law: what was shown and then failed (an attempt of a model call) is not left standing as if it had been said.
"""

import time

from llmprocctl import render

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    Event: TypeAlias = dict[str, Any]

_SHORT = 200


class Talk:
    """Events to stdout, text as it comes."""

    def __init__(self, *, activity: bool) -> None:
        self._activity = activity
        self._attempt: object = None
        self._partial = ""  # of a message that is not committed

    def show(self, event: "Event") -> None:
        """Show one event."""
        kind = event["type"]
        if kind == "text":
            self._say(event)
        elif kind == "api_response":
            self._commit(event.get("text") or "")
        elif kind in {"turn_end", "exit"}:
            self._break()
        if self._activity and kind in TOLD:
            self._break()
            render.put(render.dim(line(event)) + "\n")

    def _say(self, event: "Event") -> None:
        if event.get("attempt") != self._attempt:
            self._retract()
            self._attempt = event.get("attempt")
        said = event.get("text") or ""
        self._partial += said
        render.put(render.text(said))

    def _retract(self) -> None:
        """An attempt failed: its line is cleared, of more lines the last."""
        if self._partial:
            render.put("\r\x1b[K" if render.is_terminal() else "\n")
            self._partial = ""

    def _commit(self, committed: str) -> None:
        """The whole message: show what was not shown yet, all of it if something else was."""
        if not committed.startswith(self._partial):
            self._break()
        rest = committed[len(self._partial) :]
        if committed:
            render.put(render.text(rest) + ("" if committed.endswith("\n") else "\n"))
        self._partial, self._attempt = "", None

    def _break(self) -> None:
        """Begin a new line."""
        if self._partial and not self._partial.endswith("\n"):
            render.put("\n")
        self._partial, self._attempt = "", None


def line(event: "Event") -> str:
    """An event that is no text, on one line."""
    return f"[{clock(event['at'])} {TOLD[event['type']](event)}]"


def lines(event: "Event") -> list[str]:
    """An event as `logs` prints it; none for those that say nothing to a person."""
    kind = event["type"]
    if kind == "api_response":
        words = event.get("text") or ""
        return render.text(words).rstrip("\n").split("\n") if words.strip() else []
    if kind == "input" and event.get("text"):
        return [f"> {part}" for part in render.text(event["text"]).rstrip("\n").split("\n")]
    return [line(event)] if kind in TOLD else []


def clock(at: float) -> str:
    """The time of day."""
    return time.strftime("%H:%M:%S", time.localtime(at))


def pairs(event: "Event") -> str:
    """The fields of an event that are its own."""
    own = ((key, value) for key, value in event.items() if key not in {"seq", "at", "type", "pid"})
    return " ".join(f"{key}={_short(value)}" for key, value in own)


def _short(value: object) -> str:
    words = render.cell(value if isinstance(value, str) else _compact(value))
    return words if len(words) <= _SHORT else words[:_SHORT] + "..."


def _compact(value: object) -> str:
    from json import dumps

    return dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _tool(event: "Event") -> str:
    return _short(event.get("tool") or event.get("name") or "?")


def _tool_start(event: "Event") -> str:
    given = event.get("input")
    return f"{_tool(event)} {_short(given)}" if given else _tool(event)


def _tool_end(event: "Event") -> str:
    mark = " failed" if event.get("is_error") else ""
    return f"{_tool(event)}{mark} = {_short(event.get('text') or '')}"


def _stderr(event: "Event") -> str:
    return f"stderr {_short(event.get('text') or '')}"


def _signal(event: "Event") -> str:
    return f"signal {_short(event.get('signal'))}"


def _goto(event: "Event") -> str:
    return f"goto {_short(event.get('old_head'))} -> {_short(event.get('head'))}"


def _exec(event: "Event") -> str:
    return f"exec {_short(event.get('program'))}"


def _fork(event: "Event") -> str:
    return f"forked from {event.get('ppid')} at {_short(event.get('head'))}"


def _limit(event: "Event") -> str:
    return f"limit {pairs(event)}"


def _exit(event: "Event") -> str:
    reason = event.get("reason")
    return f"exit {event.get('status')}" + (f": {_short(reason)}" if reason else "")


TOLD: "dict[str, Callable[[Event], str]]" = {
    "tool_start": _tool_start,
    "tool_end": _tool_end,
    "stderr": _stderr,
    "signal": _signal,
    "goto": _goto,
    "exec": _exec,
    "fork": _fork,
    "limit": _limit,
    "exit": _exit,
}
SHOWN = ["text", "api_response", "turn_end", *TOLD]
"""The types of events that Talk has something to do with."""
