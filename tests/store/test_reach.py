"""The walk that finds what is still needed."""

from hypothesis import event, given
from hypothesis import strategies as st

from llmprocd.store import reach


@given(
    parents=st.lists(st.integers(0, 40), max_size=40),
    heads=st.lists(st.integers(1, 40), max_size=4),
    size=st.integers(1, 9),
)
def test_what_is_left_is_what_the_heads_grew_from(parents, heads, size):
    """In whatever slices one walks; node n + 1 hangs from an earlier one, or is a root (0)."""
    nodes = [(n, at % n or None, n) for n, at in enumerate(parents, 1)]
    heads = [head for head in heads if head <= len(nodes)]
    needed: set[int] = set()
    for head in heads:
        at = head
        while at is not None:
            needed.add(at)
            at = nodes[at - 1][1]
    found, size_of, wanted, below = [], 0, set(heads), len(nodes) + 1
    while below:
        rows = sorted((node for node in nodes if node[0] < below), reverse=True)[:size]
        sifted = reach.sift(rows, wanted)
        found += sifted.garbage
        size_of += sifted.bytes
        wanted, below = sifted.wanted, sifted.below
    assert sorted(found) == sorted({node[0] for node in nodes} - needed)
    assert size_of == sum(found)
    assert wanted == set()
    event(f"{min(9, len(found))} are garbage, {min(9, len(needed))} are needed")
