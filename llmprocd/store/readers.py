"""Read-only connections, each used by one thread at a time.

Law: a read never holds up the writer, and one that fails ends its own call and nothing else.
"""

import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import apsw
import msgspec
import trio

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.store import schema

P = ParamSpec("P")
T = TypeVar("T")


class Readers:
    """A few connections, opened when they are first needed."""

    def __init__(self, path: str, most: int = 4) -> None:
        self._path = path
        self._limiter = trio.CapacityLimiter(most)
        self._lock = threading.Lock()
        self._idle: list[apsw.Connection] = []
        self._closed = False

    async def ask(
        self, query: Callable[Concatenate[apsw.Connection, P], T], *args: P.args, **kw: P.kwargs
    ) -> T:
        """Run a query in a thread; EIO when the disk does not give what was asked for.

        Cancelled, it returns at once; the thread ends by itself and gives the connection back.
        """

        def ask(db: apsw.Connection) -> T:
            return query(db, *args, **kw)

        return await trio.to_thread.run_sync(self._run, ask, limiter=self._limiter, abandon_on_cancel=True)

    def close(self) -> None:
        """Close what is idle; what is in use is closed when it comes back."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for db in idle:
            db.close()

    def _run(self, query: Callable[[apsw.Connection], T]) -> T:
        try:
            db = self._take()
            try:
                return query(db)
            finally:
                self._give(db)
        except (apsw.Error, msgspec.MsgspecError) as error:
            raise KernelError(Errno.EIO, f"the store cannot be read: {error}") from error

    def _take(self) -> apsw.Connection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return schema.connect_reader(self._path)

    def _give(self, db: apsw.Connection) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(db)
                return
        db.close()
