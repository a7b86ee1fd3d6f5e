"""What processes say while they say it: one ring of events, and a cursor for each reader.

Law: an event is visible once the commit it came from is durable, and events are visible in order.
Law: memory is bounded by the ring, whoever reads and however slowly; a reader that falls off is told how
much it lost and goes on.
"""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Collection, Generator, Iterable
from contextlib import contextmanager

from llmprocd.abi.events import FLEETING, Event
from llmprocd.abi.types import Pid

RING = 65_536


def _seq(event: Event) -> int:
    return event.seq


class Console:
    """The ring."""

    def __init__(self, next_seq: int, size: int = RING) -> None:
        self._size = size
        self._ring: list[Event] = []
        self._hidden: deque[tuple[int, Event]] = deque()  # (ticket, event), not durable yet
        self.visible = next_seq - 1  # the last number that a reader may have seen
        self.readers = 0  # how many look at all
        self._looked_at: Counter[tuple[Pid | None, str]] = Counter()  # what they look at; None: all processes

    @contextmanager
    def reader(self, pids: Collection[int] | None, types: Collection[str] | None) -> Generator[None]:
        """Somebody looks within the block: at these processes, at these types; None is all of them."""
        whose = [None] if pids is None else [Pid(pid) for pid in set(pids)]
        seen = [(pid, kind) for pid in whose for kind in FLEETING if types is None or kind in types]
        self.readers += 1
        self._looked_at.update(seen)
        try:
            yield
        finally:
            self.readers -= 1
            for key in seen:
                self._looked_at[key] -= 1
                if not self._looked_at[key]:
                    del self._looked_at[key]

    def wanted(self, pid: Pid, kind: str) -> bool:
        """Does anybody look at what is shown and not stored of a process? What nobody sees is not told."""
        return (pid, kind) in self._looked_at or (None, kind) in self._looked_at

    @property
    def oldest(self) -> int:
        """The first number that is still in the ring."""
        return self._ring[0].seq if self._ring else self.visible + 1

    def publish(self, events: Iterable[Event], ticket: int, durable: int) -> bool:
        """Add events of a commit; is any of them visible now?"""
        self._hidden.extend((ticket, event) for event in events)
        return self.reveal(durable)

    def reveal(self, durable: int) -> bool:
        """Show what has become durable; was there any?"""
        shown = False
        while self._hidden and self._hidden[0][0] <= durable:
            event = self._hidden.popleft()[1]
            self._ring.append(event)
            self.visible = event.seq
            shown = True
        if len(self._ring) > 2 * self._size:
            del self._ring[: -self._size]
        return shown

    def read(
        self, after: int, limit: int, pids: Collection[int] | None, types: Collection[str] | None
    ) -> tuple[list[Event], int]:
        """Events after a number, and the number to read on from."""
        found: list[Event] = []
        for event in self._ring[bisect_right(self._ring, after, key=_seq) :]:
            if (pids is None or event.pid in pids) and (types is None or event.type in types):
                found.append(event)
                if len(found) == limit:
                    return found, event.seq
        return found, max(after, self.visible)
