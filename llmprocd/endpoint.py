"""What is known of one endpoint, and who waits for it. Pure: told what time it is.

An endpoint has slots, and what may be used of it in a minute: requests, input and output tokens, as
configured and as the headers of its answers tell. A call reserves before it begins what calls of its size
have used, and settles when it ends.

Waiters are served fairly: a tree of processes that has been served is behind one that has not, by an amount
that `nice` scales (as in Linux's scheduler: one step of nice is a quarter more or less). Whoever is at the
head of the queue and does not fit yet is waited for: so big calls do not starve.

A server that says "too many requests" holds its whole endpoint, not one caller; afterwards calls begin one
after another, further apart with each such refusal and closer with each success.
"""

import math
import random
from collections.abc import Callable
from heapq import heapify, heappop, heappush

import msgspec
import trio

from llmprocd.abi.calls import SlotInfo
from llmprocd.abi.types import Pid, Usage
from llmprocd.model.protocol import Allowance, Quota

SLACK = 64
"""How many that have left may stand in a queue beside as many as wait in it."""

FOREGROUND = 4.0
"""How many calls of processes that run by themselves an interactive one weighs."""

FIRST_GAP, WIDEST_GAP = 0.1, 5.0
"""Seconds between the starts of two calls after a server has said "too many": doubled each time it does."""

CALM = 0.9
"""What each success makes of that gap; below a tenth of the first there is none."""


class Bounds(msgspec.Struct, frozen=True):
    """What may be asked of one endpoint: calls at once, and requests and tokens in a minute."""

    slots: int
    rpm: int | None = None
    itpm: int | None = None
    otpm: int | None = None


class Bucket:
    """What may be used in a minute: it comes back steadily, and no more than that can be saved up.

    Pure: told what time it is. Without a limit there is always enough.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self._own: int | None = None
        self._told: int | None = None
        self._level = 0.0
        self._at = 0.0

    def left(self, now: float) -> float:
        """What may be used at once; below zero when more was used than had been reserved."""
        if self.limit is None:
            return math.inf
        return min(float(self.limit), self._level + (now - self._at) * self.limit / 60)

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much may be used; what is more than there can ever be needs a full bucket."""
        if self.limit is None:
            return 0.0
        missing = min(amount, self.limit) - self.left(now)
        return missing * 60 / self.limit if missing > 1e-3 else 0.0  # less is the clock's rounding

    def take(self, amount: float, now: float) -> None:
        """Use so much; less than nothing gives it back."""
        if self.limit is None:
            return
        self._level, self._at = self.left(now) - amount, now
        if self.limit != self._own:  # a server that lets through more than it told of will say so itself
            self._level = max(0.0, self._level)

    def bound(self, limit: int | None, now: float) -> None:
        """Set the limit of whoever runs the daemon; a server can only tell of a lower one."""
        self._own = limit
        self._limit(now)

    def learn(self, told: Allowance, now: float) -> None:
        """What the server says of its limit and of what is left: the less of that and what is known here."""
        if told.limit:
            self._told = told.limit
            self._limit(now)
        if told.left is not None and told.left < self.left(now) and self.limit is not None:
            self._level, self._at = float(told.left), now

    def _limit(self, now: float) -> None:
        known = [limit for limit in (self._own, self._told) if limit is not None]
        limit = min(known, default=None)
        if limit == self.limit:
            return
        used = 0.0 if self.limit is None else self.limit - self.left(now)
        self.limit, self._at = limit, now
        self._level = 0.0 if limit is None else max(0.0, limit - used)  # a minute pays for what was before


class Waiter:
    """One call that waits for a slot, and then has one."""

    def __init__(self, key: tuple[float, int], flow: tuple[Pid, bool], cost: float, size: int) -> None:
        self.key = key
        self.flow = flow
        self.cost = cost  # in virtual time
        self.size = size  # of the request, in bytes
        self.granted = trio.Event()
        self.grant: Grant | None = None
        self.gone = False

    @property
    def tree(self) -> Pid:
        return self.flow[0]

    def __lt__(self, other: "Waiter") -> bool:
        return self.key < other.key


class RunQueue:
    """The order in which waiters get slots: by virtual time, then by arrival.

    Each tree has two accounts, one for interactive processes: who talks to one is not behind the hundred
    children it has sent away. Virtual time is that of the call served last: it goes on with each, so that
    newcomers cannot keep anybody waiting for ever.
    """

    def __init__(self) -> None:
        self._heap: list[Waiter] = []
        self._served: dict[tuple[Pid, bool], float] = {}
        self._floor = 0.0
        self._arrivals = 0
        self.waiting = 0

    def join(self, tree: Pid, nice: int, *, interactive: bool = False, size: int = 0) -> Waiter:
        """Take a place. A tree's second waiter is behind its first."""
        cost = 1.25**nice / (FOREGROUND if interactive else 1.0)
        flow = (tree, interactive)
        tag = max(self._floor, self._served.get(flow, 0.0)) + cost
        self._served[flow] = tag
        self._arrivals += 1
        waiter = Waiter((tag, self._arrivals), flow, cost, size)
        heappush(self._heap, waiter)
        self.waiting += 1
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Give the place up: its tree is as near to its next slot as it was before."""
        if waiter.gone:
            return
        waiter.gone = True
        self.waiting -= 1
        served = self._served.pop(waiter.flow, 0.0) - waiter.cost
        if served > self._floor:
            self._served[waiter.flow] = served
        if len(self._heap) > 2 * self.waiting + SLACK:
            self._tidy()

    def _tidy(self) -> None:
        """Throw those out who have left: while no slot is free, nobody comes past them."""
        self._heap = [waiter for waiter in self._heap if not waiter.gone]
        heapify(self._heap)
        self._served = {flow: served for flow, served in self._served.items() if served > self._floor}

    def first(self) -> Waiter | None:
        """The waiter to serve next; it stays."""
        while self._heap:
            if not self._heap[0].gone:
                return self._heap[0]
            heappop(self._heap)
        self._served.clear()
        return None

    def next(self) -> Waiter | None:
        """The waiter to serve now."""
        waiter = self.first()
        if waiter is not None:
            heappop(self._heap)
            waiter.gone = True
            self.waiting -= 1
            self._floor = waiter.key[0]
        return waiter


class Endpoint:
    """What is known of one endpoint, and who waits for it. Pure: told what time it is."""

    def __init__(self, name: str, bounds: Bounds, chance: Callable[[], float] = random.random) -> None:
        self.name = name
        self.slots = bounds.slots
        self.running = 0
        self.queue = RunQueue()
        self.requests, self.input, self.output = Bucket(), Bucket(), Bucket()
        self.held_until = -math.inf
        self.named = False  # did the server name that time?
        self.held_at = -math.inf
        self.gap = 0.0  # seconds between two starts
        self.not_before = -math.inf
        self.per_byte = 0.25  # input tokens that count, for each byte of a request: what the last ones had
        self.per_call = 256.0  # output tokens
        self.alarm: trio.CancelScope | None = None
        self._chance = chance
        self.bound(bounds, 0.0)

    def bound(self, bounds: Bounds, now: float) -> None:
        """Set what may be asked of it."""
        self.slots = bounds.slots
        self.requests.bound(bounds.rpm, now)
        self.input.bound(bounds.itpm, now)
        self.output.bound(bounds.otpm, now)

    def idle(self, now: float) -> bool:
        """Is there nothing to remember but what can be learned again?"""
        return not (self.running or self.queue.waiting or self.held_until > now)

    def learn(self, quota: Quota, now: float) -> None:
        """Take over what an answer's headers tell."""
        self.requests.learn(quota.requests, now)
        self.input.learn(quota.input_tokens, now)
        self.output.learn(quota.output_tokens, now)

    def hold(self, seconds: float, began: float, now: float, *, named: bool) -> None:
        """Let nobody call for a while, and then one after another.

        Args:
            seconds: how long.
            began: when the call that was refused began: those of one burst are one refusal.
            now: the time.
            named: did the server name that time?
        """
        if now + seconds > self.held_until:
            self.held_until, self.named = now + seconds, named
        if began >= self.held_at:
            self.gap = min(WIDEST_GAP, max(FIRST_GAP, 2 * self.gap))
            self.held_at = now

    def delay(self, waiter: Waiter, now: float) -> float:
        """Seconds until a waiter may begin, if there is a slot."""
        return max(
            0.0,
            self.held_until - now,
            self.not_before - now,
            self.requests.wait(1, now),
            self.input.wait(waiter.size * self.per_byte, now),
            self.output.wait(self.per_call, now),
        )

    def start(self, size: int, now: float) -> "Grant":
        """A call begins: reserve what it will probably use."""
        self.running += 1
        if self.gap:
            self.not_before = now + self.gap * (0.5 + self._chance())
        reserved = (size * self.per_byte, self.per_call)
        self.requests.take(1, now)
        self.input.take(reserved[0], now)
        self.output.take(reserved[1], now)
        return Grant(self, size, reserved)

    def wchan(self, now: float) -> str:
        """What those wait for who wait."""
        seconds = self.held_until - now
        if seconds <= 0:
            return "slot"
        return f"retry-after {math.ceil(seconds)}s" if self.named else "backoff"

    def info(self, now: float) -> SlotInfo:
        """What `sys.status` shows of it."""
        left = [max(0, int(bucket.left(now))) if bucket.limit else None
                for bucket in (self.requests, self.input, self.output)]  # fmt: skip
        return SlotInfo(
            endpoint=self.name,
            running=self.running,
            waiting=self.queue.waiting,
            slots=self.slots,
            held_s=round(max(0.0, self.held_until - now), 3),
            rpm=self.requests.limit,
            rpm_left=left[0],
            itpm=self.input.limit,
            itpm_left=left[1],
            otpm=self.output.limit,
            otpm_left=left[2],
        )


class Grant:
    """A slot that somebody has. What the call really used is settled when it ends."""

    def __init__(self, endpoint: Endpoint, size: int, reserved: tuple[float, float]) -> None:
        self._endpoint = endpoint
        self._size = size
        self._reserved = reserved
        self.began = math.inf

    def begin(self, now: float) -> None:
        """The request goes out."""
        self.began = now

    def heard(self, quota: Quota, now: float) -> None:
        """The headers of the answer are there."""
        self._endpoint.learn(quota, now)

    def end(self, usage: Usage, now: float, *, whole: bool) -> None:
        """The answer has ended; `whole`: as it should."""
        e = self._endpoint
        used = (usage.input_tokens + usage.cache_creation_input_tokens, usage.output_tokens)
        self._settle(used, now)
        if not whole:
            return
        e.gap = e.gap * CALM if e.gap * CALM > FIRST_GAP / 10 else 0.0
        if self._size:
            e.per_byte += (used[0] / self._size - e.per_byte) / 8
        e.per_call += (used[1] - e.per_call) / 8

    def close(self, now: float) -> None:
        """Give the slot back."""
        self._endpoint.running -= 1
        if self.began > now:  # nothing was asked
            self._endpoint.requests.take(-1, now)
        self._settle((0, 0), now)

    def _settle(self, used: tuple[int, int], now: float) -> None:
        e = self._endpoint
        e.input.take(used[0] - self._reserved[0], now)
        e.output.take(used[1] - self._reserved[1], now)
        self._reserved = (0.0, 0.0)
