"""Who may call the model next.

Each endpoint (endpoint.py) decides; the `Scheduler` waits. Law: a cancelled waiter leaves no trace. Law: a
waiter is woken once, when it may begin; for an endpoint's time to come, one task waits and not each of them.

Before the slots stands the `Herd`: of calls that share a long prompt which no cache has yet, one goes first
and writes it; the others wait until its answer begins, and read. Law: they wait for a few seconds at most.
"""

import math
import random
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager

import trio

from llmprocd.abi.calls import SlotInfo
from llmprocd.abi.types import Pid
from llmprocd.endpoint import Bounds, Endpoint, Grant

PATIENCE = 5.0
"""Seconds that a call waits at most for another one to write the prompt they share."""

WARM = 10_000
"""How many prompts are remembered to be in a cache."""

KEPT = 1_000
"""How many endpoints are remembered."""

Waits = Callable[[Callable[[], str]], None]
"""Is told by what one finds out, at any time, what is waited for (WCHAN)."""


class Scheduler:
    """Endpoints and their queues.

    Args:
        bounds: of every endpoint that has none of its own.
        own: those that have, by base_url, or provider for the default one.
        chance: from 0 to 1, anew each time: spreads callers out.
    """

    def __init__(
        self,
        bounds: Bounds,
        own: Mapping[str, Bounds] | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._bounds = bounds
        self._own = own or {}
        self._chance = chance
        self._endpoints: dict[str, Endpoint] = {}

    def endpoint(self, name: str) -> Endpoint:
        found = self._endpoints.get(name)
        if found is None:
            if len(self._endpoints) >= KEPT:
                self._forget_idle()
            bounds = self._own.get(name, self._bounds)
            found = self._endpoints[name] = Endpoint(name, bounds, self._chance)
        return found

    def _forget_idle(self) -> None:
        now = trio.current_time()
        self._endpoints = {name: e for name, e in self._endpoints.items() if not e.idle(now)}

    def configure(self, bounds: Bounds, own: Mapping[str, Bounds]) -> None:
        """Allow so much from now on."""
        self._bounds, self._own = bounds, own
        for endpoint in self._endpoints.values():
            endpoint.bound(own.get(endpoint.name, bounds), trio.current_time())
            self._serve(endpoint)

    def hold(self, name: str, seconds: float, began: float = math.inf, *, named: bool = True) -> None:
        """Let nobody call an endpoint for a while; see Endpoint.hold."""
        self.endpoint(name).hold(seconds, began, trio.current_time(), named=named)

    @asynccontextmanager
    async def slot(
        self,
        name: str,
        tree: Pid,
        nice: int,
        waits: Waits,
        *,
        interactive: bool = False,
        size: int = 0,
    ) -> AsyncGenerator[Grant, None]:
        """Have a slot for the body.

        Args:
            name: the endpoint.
            tree: the top of the tree that the caller was born in.
            nice: one step is a quarter more or less.
            waits: is told what for, when there is no slot yet.
            interactive: is somebody waiting for the answer?
            size: of the request, in bytes.
        """
        endpoint = self.endpoint(name)
        waiter = endpoint.queue.join(tree, nice, interactive=interactive, size=size)
        try:
            self._serve(endpoint)
            if not waiter.granted.is_set():
                waits(lambda: endpoint.wchan(trio.current_time()))
                await waiter.granted.wait()
            assert waiter.grant is not None
            yield waiter.grant
        finally:
            if waiter.grant is not None:
                waiter.grant.close(trio.current_time())
            else:
                endpoint.queue.leave(waiter)
            self._serve(endpoint)

    def _serve(self, endpoint: Endpoint) -> None:
        """Let in whoever may begin now; whoever may later is let in by the alarm."""
        now = trio.current_time()
        while endpoint.running < endpoint.slots and (waiter := endpoint.queue.first()) is not None:
            delay = endpoint.delay(waiter, now)
            if delay > 0:
                self._set_alarm(endpoint, now + delay)
                return
            endpoint.queue.next()
            waiter.grant = endpoint.start(waiter.size, now)
            waiter.granted.set()

    def _set_alarm(self, endpoint: Endpoint, at: float) -> None:
        if endpoint.alarm is not None:
            endpoint.alarm.deadline = at
            return
        endpoint.alarm = trio.CancelScope(deadline=at)
        trio.lowlevel.spawn_system_task(self._ring, endpoint, endpoint.alarm)

    async def _ring(self, endpoint: Endpoint, alarm: trio.CancelScope) -> None:
        """The one task that waits for an endpoint's time to come: those who wait for a slot sleep on."""
        with alarm:
            await trio.sleep_forever()
        endpoint.alarm = None
        self._serve(endpoint)

    def table(self) -> list[SlotInfo]:
        """What `sys.status` shows."""
        now = trio.current_time()
        return [endpoint.info(now) for endpoint in self._endpoints.values()]


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
