"""Who may call the model next.

Each endpoint has a number of slots. Waiters are served fairly: a tree of processes that has been served is
behind one that has not, by an amount that `nice` scales (as in Linux's scheduler: one step of nice is a
quarter more or less). A server that says "too many requests" holds its whole endpoint, not one caller.

`RunQueue` is pure and decides; `Scheduler` waits. Law: a cancelled waiter leaves no trace.

Before the slots stands the `Herd`: of calls that share a long prompt which no cache has yet, one goes first
and writes it; the others wait until its answer begins, and read. Law: they wait for a few seconds at most.
"""

import math
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from heapq import heapify, heappop, heappush

import trio

from llmprocd.abi.calls import SlotInfo
from llmprocd.abi.types import Pid

PATIENCE = 5.0
"""Seconds that a call waits at most for another one to write the prompt they share."""

WARM = 10_000
"""How many prompts are remembered to be in a cache."""

SLACK = 64
"""How many that have left may stand in a queue beside as many as wait in it."""


class Waiter:
    """One call that waits for a slot."""

    def __init__(self, key: tuple[float, int], tree: Pid, weight: float) -> None:
        self.key = key
        self.tree = tree
        self.weight = weight
        self.granted = trio.Event()
        self.gone = False

    def __lt__(self, other: "Waiter") -> bool:
        return self.key < other.key


class RunQueue:
    """The order in which waiters get slots: by virtual time, then by arrival."""

    def __init__(self) -> None:
        self._heap: list[Waiter] = []
        self._served: dict[Pid, float] = {}
        self._floor = 0.0
        self._arrivals = 0
        self.waiting = 0

    def join(self, tree: Pid, nice: int) -> Waiter:
        """Take a place. A tree's second waiter is behind its first."""
        weight = 1.25**-nice
        start = max(self._floor, self._served.get(tree, 0.0))
        self._served[tree] = start + 1 / weight
        self._arrivals += 1
        waiter = Waiter((start + 1 / weight, self._arrivals), tree, weight)
        heappush(self._heap, waiter)
        self.waiting += 1
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Give the place up: its tree is as near to its next slot as it was before."""
        if waiter.gone:
            return
        waiter.gone = True
        self.waiting -= 1
        served = self._served.pop(waiter.tree, 0.0) - 1 / waiter.weight
        if served > self._floor:
            self._served[waiter.tree] = served
        if len(self._heap) > 2 * self.waiting + SLACK:
            self._tidy()

    def _tidy(self) -> None:
        """Throw those out who have left: while no slot is free, nobody comes past them."""
        self._heap = [waiter for waiter in self._heap if not waiter.gone]
        heapify(self._heap)
        self._served = {tree: served for tree, served in self._served.items() if served > self._floor}

    def next(self) -> Waiter | None:
        """The waiter to serve now."""
        while self._heap:
            waiter = heappop(self._heap)
            if not waiter.gone:
                waiter.gone = True
                self.waiting -= 1
                self._floor = max(self._floor, waiter.key[0] - 1 / waiter.weight)
                return waiter
        self._served.clear()
        return None


class Endpoint:
    """The slots of one endpoint."""

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.slots = slots
        self.running = 0
        self.queue = RunQueue()
        self.held_until = -math.inf  # on trio's clock

    def held(self) -> float:
        """Seconds for which nobody may call."""
        return max(0.0, self.held_until - trio.current_time())


class Scheduler:
    """Endpoints and their queues."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._endpoints: dict[str, Endpoint] = {}

    def endpoint(self, name: str) -> Endpoint:
        found = self._endpoints.get(name)
        if found is None:
            found = self._endpoints[name] = Endpoint(name, self._slots)
        return found

    def resize(self, slots: int) -> None:
        """Allow so many calls at once from now on."""
        self._slots = slots
        for endpoint in self._endpoints.values():
            endpoint.slots = slots
            self._serve(endpoint)

    def hold(self, name: str, seconds: float) -> None:
        """Let nobody call an endpoint for a while."""
        endpoint = self.endpoint(name)
        endpoint.held_until = max(endpoint.held_until, trio.current_time() + seconds)

    @asynccontextmanager
    async def slot(
        self, name: str, tree: Pid, nice: int, waits: Callable[[str], None]
    ) -> AsyncGenerator[None, None]:
        """Have a slot for the body; `waits` is told what for when there is none yet."""
        endpoint = self.endpoint(name)
        waiter = endpoint.queue.join(tree, nice)
        try:
            self._serve(endpoint)
            if not waiter.granted.is_set():
                waits("slot")
                await waiter.granted.wait()
            yield
        finally:
            if waiter.granted.is_set():
                endpoint.running -= 1
            else:
                endpoint.queue.leave(waiter)
            self._serve(endpoint)

    def _serve(self, endpoint: Endpoint) -> None:
        while endpoint.running < endpoint.slots and (waiter := endpoint.queue.next()) is not None:
            endpoint.running += 1
            waiter.granted.set()

    async def wait_held(self, name: str, waits: Callable[[str], None]) -> None:
        """Wait while an endpoint is held."""
        endpoint = self.endpoint(name)
        while (seconds := endpoint.held()) > 0:
            waits(f"retry-after {math.ceil(seconds)}s")
            await trio.sleep(seconds)

    def table(self) -> list[SlotInfo]:
        """What `sys.status` shows."""
        return [
            SlotInfo(e.name, e.running, e.queue.waiting, e.slots, round(e.held(), 3))
            for e in self._endpoints.values()
        ]


class Herd:
    """Who of those that share a prompt goes first; a prompt is known by a key that they have in common."""

    def __init__(self) -> None:
        self._leads: dict[Hashable, trio.Event] = {}
        self._warm: OrderedDict[Hashable, float] = OrderedDict()  # until when, on trio's clock

    def is_warm(self, key: Hashable) -> bool:
        """Is a prompt known to be in the cache?"""
        return self._warm.get(key, -math.inf) > trio.current_time()

    def warm(self, keys: Sequence[Hashable], seconds: float) -> None:
        """An answer has begun: these prompts are in the cache, and whoever waits for one may go."""
        for key in keys:
            self._warm[key] = trio.current_time() + seconds
            self._warm.move_to_end(key)
            if key in self._leads:
                self._leads.pop(key).set()
        while len(self._warm) > WARM:
            self._warm.popitem(last=False)

    @asynccontextmanager
    async def turn(self, key: Hashable, waits: Callable[[str], None]) -> AsyncGenerator[None, None]:
        """Be the first of a key within the block, or wait until the first has done its work or given up."""
        until = trio.current_time() + PATIENCE
        while (lead := self._leads.get(key)) is not None and trio.current_time() < until:
            waits("slot")
            with trio.move_on_at(until):
                await lead.wait()
        if lead is not None or self.is_warm(key):
            yield
            return
        own = self._leads[key] = trio.Event()
        try:
            yield
        finally:
            own.set()
            if self._leads.get(key) is own:
                del self._leads[key]
