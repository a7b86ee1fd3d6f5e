"""sleep(chan) and wakeup(chan): the one way in which anybody waits for anything in here.

A channel is any hashable value: "events", ("proc", 7), ("limit", 7), ("file", 3). Law: a sleeper that checks
its condition, finds it false, and sleeps without an await between, misses no wakeup.
"""

from collections.abc import Hashable

import trio


class WaitChan:
    """Who sleeps on what."""

    def __init__(self) -> None:
        self._sleepers: dict[Hashable, set[trio.Event]] = {}

    async def sleep(self, *chans: Hashable) -> None:
        """Sleep until one of the channels is woken."""
        event = trio.Event()
        for chan in chans:
            self._sleepers.setdefault(chan, set()).add(event)
        try:
            await event.wait()
        finally:
            for chan in chans:
                self._leave(chan, event)

    def _leave(self, chan: Hashable, event: trio.Event) -> None:
        sleepers = self._sleepers.get(chan)
        if sleepers is not None:
            sleepers.discard(event)
            if not sleepers:
                del self._sleepers[chan]

    def wakeup(self, chan: Hashable) -> None:
        """Wake everybody who sleeps on a channel."""
        for event in self._sleepers.get(chan, ()):
            event.set()
