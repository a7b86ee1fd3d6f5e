"""The store in memory, on trio's clock: for tests under a mock clock, and for runs that keep nothing.

Law: it promises what `sqlite.Store` promises, but for the end of the process. A commit takes `latency`
seconds, so that what lies between a change and its durability is there to be tested.
Law: after `crash` nothing goes on: who waits for this store waits for ever, as after a power cut.

No threads: a thread's wait looks idle to a mock clock that jumps.
"""

import copy
import itertools
import shutil
import tempfile
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import trio

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.events import Event
from llmprocd.abi.types import FileId, ImageId, MessageId, Pid
from llmprocd.kernel.state import (
    Change,
    Chunk,
    Counters,
    File,
    Garbage,
    Image,
    Node,
    Proc,
    Request,
    Saved,
    stdio,
)
from llmprocd.store import blobs, cache, reach, tickets
from llmprocd.store.protocol import StoreFailed


class Contents:
    """What changes add up to."""

    def __init__(self, events_kept: int) -> None:
        self.trimmed = 0
        self._events_kept = events_kept
        self.procs: dict[Pid, Proc] = {}
        self.files: dict[FileId, File] = {}
        self.images: dict[ImageId, Image] = {}
        self.families: dict[Pid, int] = {}
        self.requests: dict[tuple[int, str], Request] = {}
        self.nodes: dict[MessageId, Node] = {}
        self.chunks: dict[FileId, list[Chunk]] = {}
        self.events: deque[Event] = deque()
        self.counters = Counters()

    def apply(self, change: Change) -> None:
        """Add a change."""
        self.procs.update(change.procs)
        self.files.update(change.files)
        self.images.update(change.images)
        self.families.update(change.families)
        self.requests.update({(request.uid, request.id): request for request in change.requests})
        self.nodes.update({node.id: node for node in change.nodes})
        self.events += change.events
        for chunk in change.chunks:
            self.chunks.setdefault(chunk.file, []).append(chunk)
        for pid in change.gone:
            self.procs.pop(pid, None)
            self.chunks.pop(stdio(pid, 1), None)
            self.chunks.pop(stdio(pid, 2), None)
        for garbage in change.garbage:
            self._free(garbage)
        while len(self.events) > self._events_kept:
            self.trimmed = self.events.popleft().seq
        self.counters = copy.copy(change.counters or self.counters)

    def _free(self, garbage: Garbage) -> None:
        for node in garbage.nodes:
            self.nodes.pop(node, None)
        for file in garbage.files:
            self.files.pop(file, None)
            self.chunks.pop(file, None)
        for image in garbage.images:
            self.images.pop(image, None)
        for family in garbage.families:
            self.families.pop(family, None)

    def saved(self) -> Saved:
        """The records, in the order in which a disk gives them back."""
        return Saved(
            procs=[self.procs[pid] for pid in sorted(self.procs)],
            files=[self.files[file] for file in sorted(self.files)],
            images=dict(self.images),
            families=dict(self.families),
            requests=[self.requests[key] for key in sorted(self.requests)],
            counters=copy.copy(self.counters),
        )


class Folder:
    """A folder for contents on disk, made when it is first needed and removed with its last user."""

    def __init__(self) -> None:
        self._blobs: blobs.Blobs | None = None

    def blobs(self) -> blobs.Blobs:
        if self._blobs is None:
            path = tempfile.mkdtemp(prefix="llmprocd-")
            weakref.finalize(self, shutil.rmtree, path, ignore_errors=True)
            self._blobs = blobs.Blobs(Path(path))
        return self._blobs


SLICE = 1000
"""How many nodes `sift` goes through."""


def _nobody(_durable: int) -> None:
    """Hear of a commit, and do nothing."""


class Store:
    """Fulfils `protocol.Store`."""

    def __init__(self, *, latency: float = 0.0, events_kept: int = 200_000) -> None:
        """Make an empty store; `latency` is what a commit takes, in seconds of trio's clock."""
        self.instance = uuid.uuid4().hex
        self.latency = latency
        self.on_durable: Callable[[int], None] = _nobody
        self._seen = Contents(events_kept)  # all that was submitted
        self._safe = Contents(events_kept)  # what is durable of it
        self._queue: list[Change] = []
        self._work = trio.Event()
        self._tickets = tickets.Tickets()
        self._folder = Folder()
        self._crashed = False

    @property
    def durable(self) -> int:
        return self._tickets.durable

    @property
    def submitted(self) -> int:
        return self._tickets.submitted

    @property
    def trimmed(self) -> int:
        return self._safe.trimmed

    def crash(self) -> "Store":
        """Cut the power: this store stops where it is; returns one that holds what was durable."""
        self._crashed = True
        self._tickets.close("the power is gone")
        after = Store(latency=self.latency)
        after.instance, after._folder = self.instance, self._folder
        after._safe, after._seen = self._safe, copy.deepcopy(self._safe)
        return after

    def submit(self, change: Change) -> int:
        """Hand over a change; returns its commit number."""
        if self._crashed:
            return self.submitted + 1
        ticket = self._tickets.take()
        self._seen.apply(change)
        self._queue.append(change)
        self._work.set()
        return ticket

    async def wait_durable(self, ticket: int) -> None:
        """Wait, shielded, until a commit is durable."""
        if not self._crashed:
            try:
                await self._tickets.wait(ticket)
            except StoreFailed:
                if not self._crashed:
                    raise
        if ticket > self.durable:
            await trio.sleep_forever()

    def load(self) -> Saved:
        """All records, but no nodes and no contents."""
        return self._seen.saved()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Commit until cancelled, then commit what was submitted."""
        task_status.started()
        try:
            while True:
                await self._work.wait()
                await self._commit()
        finally:
            while self._queue and not self._crashed:
                await self._commit()
            self._tickets.close("the store has ended")

    def close(self) -> None:
        """Let go of a store that is not running."""
        self._tickets.close("the store is closed")

    def node_nowait(self, number: MessageId) -> Node | None:
        """A node; all are in memory."""
        return self._seen.nodes.get(number)

    async def node(self, number: MessageId) -> Node | None:
        """A node; None when there is none of this id."""
        await trio.lowlevel.checkpoint()
        return self.node_nowait(number)

    async def path(self, head: MessageId, stop: MessageId | None = None) -> list[Node]:
        """The nodes from the root, or from the one after `stop`, to the head."""
        await trio.lowlevel.checkpoint()
        path: list[Node] = []
        number: MessageId | None = head
        while number is not None and number != stop:
            node = self.node_nowait(number)
            if node is None:
                raise KernelError(Errno.ENOENT, f"no such message: m{number}")
            path.append(node)
            number = node.parent
        path.reverse()
        return path

    async def tree(self, tips: Sequence[MessageId], after: int = 0, limit: int = 1000) -> list[Node]:
        """The nodes that the tips grew from, and the tips, by id."""
        await trio.lowlevel.checkpoint()
        found = self._above(tips, after)
        return [found[number] for number in sorted(found)[:limit]]

    async def is_ancestor(self, node: MessageId, tips: Sequence[MessageId]) -> bool:
        """Is a node on the path of one of the tips? A tip is on its own."""
        await trio.lowlevel.checkpoint()
        return node in self._above(tips, node - 1)

    async def read(self, file: File, offset: int, count: int) -> bytes:
        """Bytes of a file, as many as were asked for, fewer only at its end."""
        await trio.lowlevel.checkpoint()
        if file.disk:
            return self._folder.blobs().read(file.id, offset, count)
        count = max(0, min(count, file.size - offset))
        data = cache.splice(self._seen.chunks.get(file.id, ()), offset, count)
        if len(data) < count:
            raise KernelError(Errno.EIO, f"file {file.id} has lost its bytes from {offset + len(data)} on")
        return data

    async def sift(self, wanted: set[MessageId], below: MessageId) -> reach.Sifted:
        """Go through the next nodes below a number, downwards."""
        await trio.lowlevel.checkpoint()
        numbers = sorted((number for number in self._safe.nodes if number < below), reverse=True)
        nodes = [self._safe.nodes[number] for number in numbers[:SLICE]]
        return reach.sift(((node.id, node.parent, len(node.body)) for node in nodes), wanted)

    async def remove(self, files: Collection[FileId]) -> None:
        """Remove the contents of files on disk that no record names any more."""
        await trio.lowlevel.checkpoint()
        if not self._crashed:
            self._folder.blobs().remove(files)

    def spool(self) -> str:
        """A path that nothing has yet, for a tool's output."""
        return self._folder.blobs().spool()

    async def adopt(self, spool: str, file: FileId, *, sync: bool = True) -> None:
        """Make a spool file the contents of a file on disk."""
        await trio.sleep(self.latency)
        if self._crashed:
            await trio.sleep_forever()
        self._folder.blobs().adopt(spool, file, sync=sync)

    def disk_path(self, file: FileId) -> str:
        """Where the contents of a file on disk are."""
        return str(self._folder.blobs().path(file))

    async def events(
        self, after: int, pids: Collection[int] | None, types: Collection[str] | None, limit: int
    ) -> list[Event]:
        """Durable events numbered over `after`, in order."""
        await trio.lowlevel.checkpoint()
        found = (
            event
            for event in self._safe.events
            if event.seq > after
            and (pids is None or event.pid in pids)
            and (types is None or event.type in types)
        )
        return list(itertools.islice(found, limit))

    def free(self) -> int:
        """Bytes left on the file system for contents on disk."""
        return shutil.disk_usage(tempfile.gettempdir()).free

    async def _commit(self) -> None:
        """Make durable what was submitted until now; what comes meanwhile rides in the next."""
        batch, self._queue, self._work = self._queue, [], trio.Event()
        with trio.CancelScope(shield=True):
            await trio.sleep(self.latency)
        if self._crashed:
            return
        for change in batch:
            self._safe.apply(change)
        self._tickets.advance(self.durable + len(batch))
        self.on_durable(self.durable)

    def _above(self, tips: Sequence[MessageId], after: int) -> dict[MessageId, Node]:
        found: dict[MessageId, Node] = {}
        for tip in tips:
            node = self.node_nowait(tip)
            while node is not None and node.id > after and node.id not in found:
                found[node.id] = node
                node = None if node.parent is None else self.node_nowait(node.parent)
        return found
