"""The one thread that writes, and the commits it makes of what is submitted.

Law: a commit is reported only after the fdatasync that covers it has returned.
Law: the first error is the last act. An fsync that failed is never tried again: the pages it should have
written may be gone, and a second one would lie.

There is no timer: whoever submits during one commit rides in the next.
"""

# apsw's stubs name a type that Python has from 3.12 on:
# pyright: reportUnknownMemberType=false

import queue
import time
from collections.abc import Callable, Sequence

import apsw

from llmprocd import crash
from llmprocd.kernel.state import Change
from llmprocd.store import rows
from llmprocd.store.protocol import StoreFailed

BATCH_CHANGES = 4096
BATCH_BYTES = 8 << 20
EVENTS_SLICE = 1000
"""How many old events go in one commit."""
SPARE = 4
"""Of how many pages one may be free."""
PAGES_AT_ONCE = 2000
SWEEP_EVERY = 3600.0
"""How often old requests are forgotten, in seconds."""


class Writer:
    """A queue of changes, and the connection they are written with."""

    def __init__(self, db: apsw.Connection, events: int, events_kept: int, log_pages: int) -> None:
        """Write with a connection; there are `events` in it, and about `events_kept` may be.

        Of the log about `log_pages` are kept before they are folded into the database.
        """
        self._db = db
        self._queue: queue.SimpleQueue[Change | None] = queue.SimpleQueue()
        self._stopping = False
        self._log, self._log_pages = 0, log_pages
        self._swept = time.time()
        self._events, self._events_kept = events, events_kept
        db.set_wal_hook(self._grown)

    def put(self, change: Change) -> None:
        self._queue.put(change)

    def stop(self) -> None:
        """Let `work` end when it has written what was put before."""
        self._queue.put(None)

    def work(self, report: Callable[[int, int], None]) -> None:
        """Commit what is put until told to stop, then close; to be run in a thread.

        Args:
            report: called in this thread after each commit with the number of changes written so far, and
                the last event that was trimmed away (0 when none was).
        """
        done = 0
        try:
            while batch := self._next():
                trimmed = self._commit(batch)
                done += len(batch)
                report(done, trimmed)
                if any(change.garbage for change in batch):
                    self._shrink()
                self._checkpoint()
        except Exception as error:
            self._db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            raise StoreFailed(f"the store failed: {type(error).__name__}: {error}") from error
        finally:
            self._db.close()

    def _next(self) -> list[Change]:
        """All that waits, up to a size; waits for one if there is none. Empty when it is time to end."""
        batch: list[Change] = []
        weight = 0
        while not self._stopping and len(batch) < BATCH_CHANGES and weight < BATCH_BYTES:
            try:
                change = self._queue.get(block=not batch)
            except queue.Empty:
                break
            if change is None:
                self._stopping = True
            else:
                batch.append(change)
                weight += _weight(change)
        return batch

    def _commit(self, batch: Sequence[Change]) -> int:
        """Write a batch in one transaction; returns the last event trimmed away."""
        whole = rows.merge(batch)
        self._db.execute("BEGIN IMMEDIATE")
        rows.write(self._db, whole)
        self._forget_requests()
        trimmed = self._trim(len(whole.events))
        _pass_points(batch, "before")
        self._db.execute("COMMIT")
        _pass_points(batch, "after")
        return trimmed

    def _trim(self, added: int) -> int:
        self._events += added
        if self._events < self._events_kept + EVENTS_SLICE:
            return 0
        self._events -= EVENTS_SLICE
        return rows.forget_events(self._db, EVENTS_SLICE)

    def _forget_requests(self) -> None:
        now = time.time()
        if now - self._swept > SWEEP_EVERY:
            self._swept = now
            rows.forget_requests(self._db, now)

    def _checkpoint(self) -> None:
        """Fold the log into the database when it is long; SQLite's own would hold up a commit's report."""
        if self._log >= self._log_pages:
            self._db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _shrink(self) -> None:
        """Give free pages back to the file system, some at a time, where there are very many."""
        spare = self._db.pragma("freelist_count") - self._db.pragma("page_count") // SPARE
        if spare > 0:
            for _ in self._db.execute(f"PRAGMA incremental_vacuum({min(spare, PAGES_AT_ONCE)})"):
                pass

    def _grown(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._log = pages
        return apsw.SQLITE_OK


def _weight(change: Change) -> int:
    """About how many bytes a change will write."""
    contents = sum(len(chunk.data) for chunk in change.chunks)
    return contents + sum(len(node.body) for node in change.nodes)


def _pass_points(batch: Sequence[Change], when: str) -> None:
    for change in batch:
        for why in change.why:
            crash.point(f"{why}.{when}")
