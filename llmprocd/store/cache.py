"""What of the store is in memory: nodes lately used, and everything that is not durable yet.

Law: a node or chunk that is in neither place is on the disk. What was submitted therefore stays in
`Pending` until it is durable, and a reader looks there first and at the disk after.
Nodes are immutable, so a cached one is never wrong.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

from llmprocd.abi.types import FileId, MessageId
from llmprocd.kernel.state import Change, Chunk, Node

OVERHEAD = 600
"""What a node costs in memory beside its body, in bytes."""


class Cache:
    """Nodes lately used, up to a number of bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._nodes: OrderedDict[MessageId, Node] = OrderedDict()

    def get(self, number: MessageId) -> Node | None:
        node = self._nodes.get(number)
        if node is not None:
            self._nodes.move_to_end(number)
        return node

    def add(self, node: Node) -> None:
        """Keep a node, and forget those longest unused if there is no room."""
        if node.id in self._nodes:
            return
        self._nodes[node.id] = node
        self._size += _cost(node)
        while self._size > self._most:
            _, old = self._nodes.popitem(last=False)
            self._size -= _cost(old)


def _cost(node: Node) -> int:
    return OVERHEAD + len(node.body) + sum(len(use.input) for use in node.asks)


class Pending:
    """Nodes and contents of the changes that are submitted and not durable yet."""

    def __init__(self) -> None:
        self._changes: deque[tuple[int, Change]] = deque()
        self._nodes: dict[MessageId, Node] = {}
        self._chunks: dict[FileId, deque[Chunk]] = {}

    def add(self, ticket: int, change: Change) -> None:
        """Keep what a change brings."""
        if not change.nodes and not change.chunks:
            return
        self._changes.append((ticket, change))
        for node in change.nodes:
            self._nodes[node.id] = node
        for chunk in change.chunks:
            self._chunks.setdefault(chunk.file, deque()).append(chunk)

    def settle(self, durable: int) -> Iterable[Node]:
        """Let go of what is durable now; gives the nodes of it."""
        while self._changes and self._changes[0][0] <= durable:
            _, change = self._changes.popleft()
            for chunk in change.chunks:
                self._drop(chunk.file)
            for node in change.nodes:
                del self._nodes[node.id]
                yield node

    def node(self, number: MessageId) -> Node | None:
        return self._nodes.get(number)

    def chunks(self, file: FileId) -> list[Chunk]:
        """The end of a file, as far as it is not durable."""
        return list(self._chunks.get(file, ()))

    def above(self, tips: Iterable[MessageId], after: int) -> tuple[dict[MessageId, Node], set[MessageId]]:
        """Of the nodes over `after` that the tips grew from: those here, and where to go on on the disk."""
        here: dict[MessageId, Node] = {}
        beyond: set[MessageId] = set()
        for tip in tips:
            number: MessageId | None = tip
            while number is not None and number > after and number not in here:
                node = self._nodes.get(number)
                if node is None:
                    beyond.add(number)
                    break
                here[number] = node
                number = node.parent
        return here, beyond

    def _drop(self, file: FileId) -> None:
        chunks = self._chunks[file]
        chunks.popleft()
        if not chunks:
            del self._chunks[file]


def splice(chunks: Sequence[Chunk], offset: int, count: int) -> bytes:
    """Cut bytes out of chunks that are in order; stops at a gap."""
    parts: list[bytes] = []
    at, end = offset, offset + count
    for chunk in chunks:
        if at < end and chunk.offset <= at < chunk.offset + len(chunk.data):
            parts.append(chunk.data[at - chunk.offset : end - chunk.offset])
            at += len(parts[-1])
    return b"".join(parts)
