"""Conversations that an endpoint holds for a while, so that a request brings only what is new.

Law: the journal is what counts, and what an endpoint holds is a cache of it: a process goes on only from the
answer that its own last call brought, right where it stands, with the same program, soon enough, and once.
In every other case, after a fork, a goto, an exec or a restart too, the whole conversation is sent.
"""

import msgspec

from llmprocd.abi.types import ImageId, MessageId, Pid
from llmprocd.kernel.state import Node, Proc, Reply

LIFETIME = 300.0
"""Seconds for which an endpoint holds a conversation after its last request, if it does."""

AGAIN = frozenset({"thread_not_found", "thread_already_continued", "thread_continue_in_flight"})
"""What an endpoint says that does not hold a conversation: it is sent anew."""

NEVER = frozenset({"thread_fingerprint_mismatch", "thread_unsupported_request"})
"""What an endpoint says that will not hold conversations of this kind."""

_WHOLE = frozenset({"end_turn", "tool_use", "stop_sequence"})  # nothing of such an answer is left out here


class Held(msgspec.Struct, frozen=True):
    """The answer that a conversation ends with at the endpoint."""

    answer: MessageId | None
    message_id: str  # the endpoint's
    image: ImageId
    at: float


class Threads:
    """What endpoints hold, and for which processes they do not."""

    def __init__(self) -> None:
        self._held: dict[Pid, Held] = {}  # the oldest first
        self._off: set[Pid] = set()
        self._lost: set[Pid] = set()  # those whose present thread replaces one that was not found

    def wanted(self, pid: Pid) -> bool:
        """Whether an endpoint may be asked to hold the conversation of a process."""
        return pid not in self._off

    def off(self, pid: Pid) -> None:
        """From now on all of the conversation of a process is sent each time."""
        self._off.add(pid)
        self._held.pop(pid, None)

    def note(self, p: Proc, answer: Reply, now: float, previous: str | None = None) -> None:
        """An endpoint that was asked to hold a conversation has answered; `p` stands at that answer.

        `previous` is the answer that the request went on from; if that was forgotten meanwhile, all was sent.
        """
        held = self._held.pop(p.pid, None)
        if held is not None and held.message_id == previous:
            self._lost.discard(p.pid)
        while self._held and now - next(iter(self._held.values())).at > LIFETIME:
            del self._held[next(iter(self._held))]
        if answer.message_id and answer.stop_reason in _WHOLE:
            self._held[p.pid] = Held(p.head, answer.message_id, p.image, now)

    def lost(self, pid: Pid) -> bool:
        """A conversation was not found; true when the one before it was not either: nothing is kept there."""
        self.forget(pid)
        again = pid in self._lost
        self._lost.add(pid)
        return again

    def forget(self, pid: Pid) -> None:
        """A conversation is not held any more, or not as the process has it."""
        self._held.pop(pid, None)

    def end(self, pid: Pid) -> None:
        """A process has ended: nothing is remembered of it."""
        self.forget(pid)
        self._off.discard(pid)
        self._lost.discard(pid)

    def previous(self, p: Proc, answer: Node | None, now: float) -> str | None:
        """The endpoint's name of the answer that a process can go on from; None when it holds none.

        Args:
            p: the process.
            answer: the last one on its path.
            now: wall time, seconds.
        """
        held = self._held.get(p.pid)
        if held is None or answer is None or held.answer != answer.id or held.image != p.image:
            return None
        return held.message_id if 0 <= now - held.at < LIFETIME else None
