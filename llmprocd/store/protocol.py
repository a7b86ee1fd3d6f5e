"""What a store promises to the machine.

Law: changes become durable whole, in the order they were submitted, or not at all.
Law: a store that failed once never accepts or acknowledges anything again.
Law: contents are durable before the record that names them is.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import trio

from llmprocd.abi.events import Event
from llmprocd.abi.types import FileId, MessageId
from llmprocd.kernel.state import Change, File, Node, Saved
from llmprocd.store.reach import Sifted


class StoreFailed(Exception):  # noqa: N818 - it is the event, and it ends the daemon
    """The store cannot keep its promise: a sentence for the log, then the end of the daemon."""


class Store(Protocol):
    """The disk, or what stands for it."""

    on_durable: Callable[[int], None]
    """Called on the trio thread each time `durable` has grown, with its new value."""

    @property
    def durable(self) -> int:
        """The highest commit number that a crash cannot take back."""
        ...

    @property
    def submitted(self) -> int:
        """The highest commit number that was given out."""
        ...

    @property
    def trimmed(self) -> int:
        """The highest sequence number of an event that was stored and has been trimmed away."""
        ...

    @property
    def instance(self) -> str:
        """The name this store was given when it was made; no other has it."""
        ...

    def submit(self, change: Change) -> int:
        """Hand over a change; returns its commit number. StoreFailed when the store has ended."""
        ...

    async def wait_durable(self, ticket: int) -> None:
        """Wait until a commit is durable; costs nothing when it is already.

        Not cancellable, for a submitted change will happen. StoreFailed when it never will.
        """
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write until cancelled, then write what was submitted, and close. StoreFailed on any error."""
        ...

    def close(self) -> None:
        """Let go of a store that is not running."""
        ...

    def load(self) -> Saved:
        """All records, but no nodes and no contents; once, before `run`."""
        ...

    def node_nowait(self, number: MessageId) -> Node | None:
        """A node, if it is in memory."""
        ...

    async def node(self, number: MessageId) -> Node | None:
        """A node; None when there is none of this id."""
        ...

    async def path(self, head: MessageId, stop: MessageId | None = None) -> list[Node]:
        """The nodes from the root, or from the one after `stop`, to the head.

        ENOENT when one of them is not there.
        """
        ...

    async def tree(self, tips: Sequence[MessageId], after: int = 0, limit: int = 1000) -> list[Node]:
        """The nodes that the tips grew from, and the tips, by id: at most `limit`, with ids over `after`."""
        ...

    async def is_ancestor(self, node: MessageId, tips: Sequence[MessageId]) -> bool:
        """Is a node on the path of one of the tips? A tip is on its own."""
        ...

    async def read(self, file: File, offset: int, count: int) -> bytes:
        """Bytes of a file, as many as were asked for, fewer only at its end. EIO when they are gone.

        A file in rows ends at `file.size`, one on disk where it ends now.
        """
        ...

    async def sift(self, wanted: set[MessageId], below: MessageId) -> Sifted:
        """Go through the next nodes below a number, downwards. What is wanted is durable."""
        ...

    async def remove(self, files: Collection[FileId]) -> None:
        """Remove the contents of files on disk that no durable record names any more."""
        ...

    def spool(self) -> str:
        """A path that nothing has yet, for a tool's output, in a folder that is 0700."""
        ...

    async def adopt(self, spool: str, file: FileId, *, sync: bool = True) -> None:
        """Make a spool file the contents of a file on disk; durable on return.

        Without `sync` only its name is durable: its bytes are when it is adopted, but for a crash.
        That is for a file that still grows.
        """
        ...

    def disk_path(self, file: FileId) -> str:
        """Where the contents of a file on disk are."""
        ...

    async def events(
        self, after: int, pids: Collection[int] | None, types: Collection[str] | None, limit: int
    ) -> list[Event]:
        """Durable events numbered over `after`, in order; of these processes and types, None is all."""
        ...

    def free(self) -> int:
        """Bytes left on the file system."""
        ...
