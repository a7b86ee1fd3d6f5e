"""The store on disk: a state folder with `store.db`, `blobs` and `spool`.

Law: what was submitted is in memory until it is durable, and on the disk from then on; a reader looks in
memory first and at the disk after, and so never finds a gap.
Law: only durable events are given out.
"""

import errno
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import trio

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.events import Event
from llmprocd.abi.types import FileId, MessageId
from llmprocd.kernel.state import Change, File, Node, Saved
from llmprocd.store import blobs, cache, queries, reach, readers, rows, schema, tickets, writer
from llmprocd.store.protocol import StoreFailed

CACHE_BYTES = 64 << 20
EVENTS_KEPT = 200_000
LOG_PAGES = 8192
SLICE = 1000
"""How many nodes are read in one transaction."""


def _nobody(_durable: int) -> None:
    """Hear of a commit, and do nothing."""


class Store:
    """Fulfils `protocol.Store`."""

    def __init__(
        self,
        folder: str,
        *,
        cache_bytes: int = CACHE_BYTES,
        events_kept: int = EVENTS_KEPT,
        log_pages: int = LOG_PAGES,
    ) -> None:
        """Open a state folder, and make it when there is none. StoreFailed says why it cannot be used.

        Args:
            folder: made 0700 if it is not there; the caller has locked it against a second daemon.
            cache_bytes: how much memory nodes may take that are durable.
            events_kept: how many events are stored; the oldest go first.
            log_pages: how long the log may grow before it is folded into the database, in 8 KiB.
        """
        self._folder = Path(folder)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._blobs = blobs.Blobs(self._folder)
        except OSError as error:
            raise StoreFailed(f"{folder} cannot be used: {error}") from error
        path = str(self._folder / "store.db")
        self._db = schema.connect(path)
        facts = rows.facts(self._db)
        self.instance, self.trimmed = facts.instance, facts.trimmed
        self._writer = writer.Writer(self._db, facts.events, events_kept, log_pages)
        self._readers = readers.Readers(path)
        self._threads = trio.CapacityLimiter(8)
        self._tickets = tickets.Tickets()
        self._cache, self._pending = cache.Cache(cache_bytes), cache.Pending()
        self._ended = trio.Event()
        self._sweep: Callable[[], int] | None = None
        self.on_durable: Callable[[int], None] = _nobody

    @property
    def durable(self) -> int:
        return self._tickets.durable

    @property
    def submitted(self) -> int:
        return self._tickets.submitted

    def submit(self, change: Change) -> int:
        """Hand over a change; returns its commit number."""
        ticket = self._tickets.take()
        self._pending.add(ticket, change)
        self._writer.put(change)
        return ticket

    async def wait_durable(self, ticket: int) -> None:
        """Wait, shielded, until a commit is durable."""
        await self._tickets.wait(ticket)

    def load(self) -> Saved:
        """All records, but no nodes and no contents; once, before `run`. Empties the spool folder."""
        self._blobs.empty_spool()
        saved = rows.load(self._db, time.time())
        known = {file.id for file in saved.files if file.disk}
        below = saved.counters.file
        self._sweep = lambda: self._blobs.sweep(known, below)
        return saved

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write until cancelled, then write what was submitted, and close. StoreFailed on any error."""
        token = trio.lowlevel.current_trio_token()
        if self._sweep is not None:
            sweep, self._sweep = self._sweep, None
            await trio.to_thread.run_sync(sweep, limiter=self._threads)
        task_status.started()
        try:
            await trio.to_thread.run_sync(
                self._work, token, limiter=trio.CapacityLimiter(1), abandon_on_cancel=True
            )
        except trio.Cancelled:
            await self._drain()
            raise
        except StoreFailed as error:
            self._tickets.close(str(error))
            raise
        finally:
            self._tickets.close("the store has ended")
            self._readers.close()

    def close(self) -> None:
        """Let go of a store that is not running."""
        self._tickets.close("the store is closed")
        self._readers.close()
        self._db.close()

    def node_nowait(self, number: MessageId) -> Node | None:
        """A node, if it is in memory."""
        return self._pending.node(number) or self._cache.get(number)

    async def node(self, number: MessageId) -> Node | None:
        """A node; None when there is none of this id."""
        found = self.node_nowait(number)
        if found is None:
            for found in await self._readers.ask(queries.chain, number, None, 1):
                self._cache.add(found)
        return found

    async def path(self, head: MessageId, stop: MessageId | None = None) -> list[Node]:
        """The nodes from the root, or from the one after `stop`, to the head."""
        path: list[Node] = []
        number: MessageId | None = head
        while number is not None and number != stop:
            node = self.node_nowait(number)
            found = [node] if node else await self._chain(number, stop)
            path += found
            number = found[-1].parent
        path.reverse()
        return path

    async def tree(self, tips: Sequence[MessageId], after: int = 0, limit: int = 1000) -> list[Node]:
        """The nodes that the tips grew from, and the tips, by id."""
        found, beyond = self._pending.above(tips, after)
        if beyond:
            stored = await self._readers.ask(queries.above, beyond, after, limit)
            found.update((node.id, node) for node in stored)
        return [found[number] for number in sorted(found)[:limit]]

    async def is_ancestor(self, node: MessageId, tips: Sequence[MessageId]) -> bool:
        """Is a node on the path of one of the tips? A tip is on its own."""
        found, beyond = self._pending.above(tips, node - 1)
        return node in found or (bool(beyond) and await self._readers.ask(queries.is_above, node, beyond))

    async def read(self, file: File, offset: int, count: int) -> bytes:
        """Bytes of a file, as many as were asked for, fewer only at its end."""
        if file.disk:
            return await trio.to_thread.run_sync(
                self._blobs.read, file.id, offset, count, limiter=self._threads, abandon_on_cancel=True
            )
        count = max(0, min(count, file.size - offset))
        chunks = self._pending.chunks(file.id)
        if count and not (chunks and chunks[0].offset <= offset):
            stored = await self._readers.ask(queries.chunks, file.id, offset, offset + count)
            chunks = [*stored, *chunks]
        data = cache.splice(chunks, offset, count)
        if len(data) < count:
            raise KernelError(Errno.EIO, f"file {file.id} has lost its bytes from {offset + len(data)} on")
        return data

    async def sift(self, wanted: set[MessageId], below: MessageId) -> reach.Sifted:
        """Go through the next nodes below a number, downwards."""
        return await self._readers.ask(queries.sift, wanted, below, SLICE)

    async def remove(self, files: Collection[FileId]) -> None:
        """Remove the contents of files on disk that no record names any more."""
        await trio.to_thread.run_sync(self._blobs.remove, files, limiter=self._threads)

    def spool(self) -> str:
        """A path that nothing has yet, for a tool's output."""
        return self._blobs.spool()

    async def adopt(self, spool: str, file: FileId, *, sync: bool = True) -> None:
        """Make a spool file the contents of a file on disk. ENOSPC when the disk is full."""
        try:
            await trio.to_thread.run_sync(
                lambda: self._blobs.adopt(spool, file, sync=sync), limiter=self._threads
            )
        except OSError as error:
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise KernelError(Errno.ENOSPC, f"no space for file {file}: {error.strerror}") from error
            raise StoreFailed(f"file {file} cannot be stored: {error}") from error

    def disk_path(self, file: FileId) -> str:
        """Where the contents of a file on disk are."""
        return str(self._blobs.path(file))

    async def events(
        self, after: int, pids: Collection[int] | None, types: Collection[str] | None, limit: int
    ) -> list[Event]:
        """Durable events numbered over `after`, in order."""
        return await self._readers.ask(queries.events, after, pids, types, limit)

    def free(self) -> int:
        """Bytes left on the file system."""
        return shutil.disk_usage(self._folder).free

    async def _chain(self, head: MessageId, stop: MessageId | None) -> list[Node]:
        """The head and what is above it from the disk, lowest first: at least the head, or ENOENT."""
        found = await self._readers.ask(queries.chain, head, stop, SLICE)
        if not found:
            raise KernelError(Errno.ENOENT, f"no such message: m{head}")
        for node in found:
            self._cache.add(node)
        return found

    def _work(self, token: trio.lowlevel.TrioToken) -> None:
        try:
            self._writer.work(lambda done, trimmed: token.run_sync_soon(self._settle, done, trimmed))
        finally:
            token.run_sync_soon(self._ended.set)

    def _settle(self, durable: int, trimmed: int) -> None:
        for node in self._pending.settle(durable):
            self._cache.add(node)
        self.trimmed = max(self.trimmed, trimmed)
        self._tickets.advance(durable)
        self.on_durable(durable)

    async def _drain(self) -> None:
        """Wait until the thread has written what was submitted."""
        self._writer.stop()
        with trio.CancelScope(shield=True):
            await self._ended.wait()
        if self._tickets.durable < self._tickets.submitted:
            raise StoreFailed("the store failed at the end: not all that was submitted is durable")
