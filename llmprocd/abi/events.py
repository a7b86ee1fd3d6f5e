"""What is pushed and pulled as events.

Law: `seq` only grows, across restarts too, and no event tells of what a crash could take back
(`text` deltas apart: they carry `attempt` and count only once their message is there).
"""

from typing import Any

import msgspec

from llmprocd.abi.types import Pid

TYPES = frozenset({
    "spawn", "fork", "exec", "goto", "input", "turn_start", "api_request", "text", "api_response",
    "tool_start", "tool_end", "stderr", "turn_end", "limit", "signal", "state", "exit", "overflow",
})  # fmt: skip

FLEETING = frozenset({"text", "state"})
"""Types that are shown and not stored."""


class Event(msgspec.Struct, frozen=True):
    """One thing that happened to one process."""

    seq: int
    at: float
    type: str
    pid: Pid
    more: dict[str, Any] = {}

    def flat(self) -> dict[str, Any]:
        """The event as it goes over the wire: one flat map."""
        return {"seq": self.seq, "at": self.at, "type": self.type, "pid": self.pid, **self.more}
