"""What is asked of the disk while the daemon runs; each is one short read transaction.

Law: a parent's id is below its child's, so a walk up may stop at the first id that is too low.
Law: nothing here holds a transaction while somebody waits: a long one would keep the log from being
folded into the database.
"""

# apsw's stubs name a type that Python has from 3.12 on:
# pyright: reportUnknownMemberType=false

import json
from collections.abc import Collection, Iterable

import apsw

from llmprocd.abi.events import Event
from llmprocd.abi.types import FileId, MessageId
from llmprocd.kernel.state import Chunk, Node
from llmprocd.store import reach, rows


def chain(db: apsw.Connection, head: MessageId, stop: MessageId | None, limit: int) -> list[Node]:
    """The head, its parent, and so on: up to the root, to below `stop`, or `limit` of them."""
    found = db.execute(
        """
        WITH RECURSIVE up(id, parent) AS (
            SELECT id, parent FROM node WHERE id = ?1
            UNION ALL
            SELECT node.id, node.parent FROM up CROSS JOIN node ON node.id = up.parent
            WHERE node.id IS NOT ?2 LIMIT ?3)
        SELECT node.body FROM up CROSS JOIN node USING(id) ORDER BY id DESC
        """,
        (head, stop, limit),
    )
    return [rows.node(body) for (body,) in found]


_UP = """
    WITH RECURSIVE up(id) AS (
        SELECT value FROM json_each(?1) WHERE value > ?2
        UNION
        SELECT node.parent FROM up CROSS JOIN node USING(id) WHERE node.parent > ?2)
"""
_ABOVE = _UP + " SELECT body FROM node WHERE id IN (SELECT id FROM up ORDER BY id LIMIT ?3) ORDER BY id"  # noqa: S608 - constants
_IS_ABOVE = _UP + " SELECT EXISTS(SELECT 1 FROM up CROSS JOIN node USING(id) WHERE id = ?3)"  # noqa: S608 - constants


def above(db: apsw.Connection, tips: Iterable[MessageId], after: int, limit: int) -> list[Node]:
    """The nodes over `after` that the tips grew from, and the tips, by id; at most `limit`."""
    found = db.execute(_ABOVE, (json.dumps(sorted(tips)), after, limit))
    return [rows.node(body) for (body,) in found]


def is_above(db: apsw.Connection, number: MessageId, tips: Iterable[MessageId]) -> bool:
    """Did one of the tips grow from a node, or is it that node?"""
    return bool(db.execute(_IS_ABOVE, (json.dumps(sorted(tips)), number - 1, number)).get)


def sift(db: apsw.Connection, wanted: set[MessageId], below: MessageId, limit: int) -> reach.Sifted:
    """Which of the next nodes below a number nothing needs."""
    nodes = db.execute(
        "SELECT id, parent, length(body) FROM node WHERE id < ? ORDER BY id DESC LIMIT ?", (below, limit)
    )
    return reach.sift(nodes, wanted)


def chunks(db: apsw.Connection, file: FileId, start: int, end: int) -> list[Chunk]:
    """The pieces of a file that hold its bytes from `start` to `end`, in order."""
    found = db.execute(
        """
        SELECT file, start, body FROM chunk WHERE file = ?1 AND start < ?3 AND start >=
            coalesce((SELECT max(start) FROM chunk WHERE file = ?1 AND start <= ?2), 0)
        ORDER BY start
        """,
        (file, start, end),
    )
    return [rows.chunk(*row) for row in found]


def events(
    db: apsw.Connection,
    after: int,
    pids: Collection[int] | None,
    types: Collection[str] | None,
    limit: int,
) -> list[Event]:
    """The events after a number, of these processes and these types."""
    sql = "SELECT seq, at, type, pid, more FROM event WHERE seq > :after"
    arguments: dict[str, int | str] = {"after": after, "limit": limit}
    if pids is not None:
        sql += " AND pid IN (SELECT value FROM json_each(:pids))"
        arguments["pids"] = json.dumps(sorted(pids))
    if types is not None:
        sql += " AND type IN (SELECT value FROM json_each(:types))"
        arguments["types"] = json.dumps(sorted(types))
    return [rows.event(*row) for row in db.execute(sql + " ORDER BY seq LIMIT :limit", arguments)]
