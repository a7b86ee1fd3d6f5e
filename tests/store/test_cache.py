"""What of the store is in memory."""

from storekit import chunk, node

from llmprocd.abi.types import FileId, MessageId
from llmprocd.kernel.state import Change
from llmprocd.store import cache


def test_what_is_not_durable_yet_is_kept_and_the_rest_let_go():
    """In the order in which it was submitted, contents as well as nodes."""
    pending = cache.Pending()
    for n in range(1, 5):
        pending.add(n, Change(nodes=[node(n)], chunks=[chunk(5, n, b"%d" % n)]))
    assert [n.id for n in pending.settle(2)] == [1, 2]
    assert pending.node(MessageId(2)) is None
    assert pending.node(MessageId(3)) == node(3)
    assert [c.offset for c in pending.chunks(FileId(5))] == [3, 4]
    assert [n.id for n in pending.settle(4)] == [3, 4]
    assert pending.chunks(FileId(5)) == []


def test_nodes_longest_unused_are_forgotten_first():
    """The cache holds as many bytes as it may, bodies counted."""
    nodes = cache.Cache(3 * (cache.OVERHEAD + 1000))
    for n in (1, 2, 3):
        nodes.add(node(n, body=bytes(1000)))
    nodes.get(MessageId(1))
    nodes.add(node(4, body=bytes(1000)))
    assert [n for n in (1, 2, 3, 4) if nodes.get(MessageId(n))] == [1, 3, 4]
    nodes.add(node(5, body=bytes(10_000)))
    assert not any(nodes.get(MessageId(n)) for n in range(1, 6))


def test_a_cut_stops_at_a_gap():
    """Bytes that are not there are never passed over in silence."""
    pieces = [chunk(5, 0, b"abc"), chunk(5, 3, b"def"), chunk(5, 7, b"hij")]
    assert cache.splice(pieces, 1, 4) == b"bcde"
    assert cache.splice(pieces, 2, 9) == b"cdef"
    assert cache.splice(pieces, 9, 3) == b"j"
    assert cache.splice([pieces[0], *pieces], 0, 6) == b"abcdef"
