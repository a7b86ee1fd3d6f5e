"""Which nodes are still needed: one walk down through all of them, by number.

Law: a parent's number is below its child's. So when a node is met, all that could have needed it have been
met before, and what must be remembered is only what has been asked for and not been met yet.
"""

from collections.abc import Collection, Iterable

import msgspec

from llmprocd.abi.types import MessageId


class Sifted(msgspec.Struct, frozen=True):
    """Some nodes in a row, and which of them nothing needs."""

    garbage: list[MessageId]
    bytes: int  # what those take
    wanted: set[MessageId]  # what is to be met further down
    below: MessageId  # where to go on; 0 at the end


def sift(nodes: Iterable[tuple[MessageId, MessageId | None, int]], wanted: Collection[MessageId]) -> Sifted:
    """Go through nodes, each with its parent and its bytes, from the highest number down."""
    garbage: list[MessageId] = []
    size, below, still = 0, MessageId(0), set(wanted)
    for number, parent, length in nodes:
        below = number
        if number not in still:
            garbage.append(number)
            size += length
            continue
        still.remove(number)
        if parent is not None:
            still.add(parent)
    return Sifted(garbage, size, still, below)
