"""Which nodes are still needed: one walk down through all of them, by number.

Law: a parent's number is below its child's. So when a node is met, all that could have needed it have been
met before, and what must be remembered is only what has been asked for and not been met yet.
"""

from collections.abc import Iterable

import msgspec

from llmprocd.abi.types import MessageId


class Sifted(msgspec.Struct, frozen=True):
    """Some nodes in a row, and which of them nothing needs."""

    garbage: list[MessageId]
    bytes: int  # what those take
    wanted: set[MessageId]  # what is to be met further down
    below: MessageId  # where to go on; 0 at the end


def sift(nodes: Iterable[tuple[MessageId, MessageId | None, int]], wanted: set[MessageId]) -> Sifted:
    """Go through nodes, each with its parent and its bytes, from the highest number down.

    `wanted` is brought up to date and given back: it may be large, and there are many slices.
    """
    garbage: list[MessageId] = []
    size, below = 0, MessageId(0)
    for number, parent, length in nodes:
        below = number
        if number not in wanted:
            garbage.append(number)
            size += length
            continue
        wanted.remove(number)
        if parent is not None:
            wanted.add(parent)
    return Sifted(garbage, size, wanted, below)
