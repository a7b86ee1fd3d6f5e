"""Who waits for which commit.

Law: commits become durable in the order they were submitted, so one number says which are.
Law: once closed, no commit becomes durable; whoever waits for one is told so.
"""

import trio

from llmprocd.store.protocol import StoreFailed


class Tickets:
    """Commit numbers, and the tasks that wait for them."""

    def __init__(self) -> None:
        self.submitted = 0
        self.durable = 0
        self._closed = ""
        self._waiting: dict[int, trio.Event] = {}

    def take(self) -> int:
        """The number of the next commit; StoreFailed once closed."""
        if self._closed:
            raise StoreFailed(self._closed)
        self.submitted += 1
        return self.submitted

    async def wait(self, ticket: int) -> None:
        """Wait, shielded, until a commit is durable; no checkpoint when it is already."""
        assert ticket <= self.submitted, f"commit {ticket} was never submitted"
        while ticket > self.durable:
            if self._closed:
                raise StoreFailed(self._closed)
            event = self._waiting.setdefault(ticket, trio.Event())
            with trio.CancelScope(shield=True):
                await event.wait()

    def advance(self, durable: int) -> None:
        """Let go all who wait for a commit up to this one."""
        before, self.durable = self.durable, durable
        if self._waiting:
            for ticket in range(before + 1, durable + 1):
                self._release(ticket)

    def close(self, why: str) -> None:
        """Nothing will be durable from here on; `why` is the sentence for those who ask."""
        self._closed = self._closed or why
        for ticket in list(self._waiting):
            self._release(ticket)

    def _release(self, ticket: int) -> None:
        event = self._waiting.pop(ticket, None)
        if event is not None:
            event.set()
