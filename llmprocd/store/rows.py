"""Values to rows and back: all of the SQL that writes, and what is read at boot.

Law: nodes and contents are added, and go as a whole when nothing refers to them; none is ever changed. A
number that is used twice is an error, and ends the daemon.
Law: reading what was written gives equal values.

A record is one msgpack map in one column: a field that is added later, with a default, needs no migration.
"""

# apsw's stubs name a type that Python has from 3.12 on:
# pyright: reportUnknownMemberType=false

import gc
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import apsw
import msgspec

from llmprocd.abi.events import Event
from llmprocd.abi.types import FileId, ImageId, Pid
from llmprocd.kernel.state import (
    Change,
    Chunk,
    Counters,
    File,
    Image,
    Node,
    Proc,
    Request,
    Saved,
    stdio,
)
from llmprocd.store.protocol import StoreFailed

T = TypeVar("T")
Row = tuple[int | float | str | bytes | None, ...]

REQUESTS_KEPT = 24 * 3600.0
"""How long an answered request is remembered, in seconds."""

_encode = msgspec.msgpack.Encoder().encode


def merge(changes: Sequence[Change]) -> Change:
    """Several changes as one: of what is replaced, the last version only."""
    if len(changes) == 1:
        return changes[0]
    whole = Change()
    for change in changes:
        whole.procs.update(change.procs)
        whole.files.update(change.files)
        whole.images.update(change.images)
        whole.families.update(change.families)
        whole.nodes += change.nodes
        whole.chunks += change.chunks
        whole.events += change.events
        whole.requests += change.requests
        whole.gone += change.gone
        whole.garbage += change.garbage
        whole.counters = change.counters or whole.counters
    return whole


def write(db: apsw.Connection, change: Change) -> None:
    """Write a change down, inside the transaction that is open."""
    for sql, rows in _statements(change):
        if rows:
            db.executemany(sql, rows)


def _statements(change: Change) -> Iterator[tuple[str, Sequence[Row]]]:
    """Each statement with the rows it is run with."""
    yield "INSERT INTO node VALUES(?, ?, ?)", [(n.id, n.parent, _encode(n)) for n in change.nodes]
    yield (
        "INSERT INTO chunk(file, start, body) VALUES(?, ?, ?)",
        [(c.file, c.offset, c.data) for c in change.chunks],
    )
    yield "REPLACE INTO image VALUES(?, ?)", [(i, _encode(image)) for i, image in change.images.items()]
    yield "REPLACE INTO file VALUES(?, ?)", [(i, _encode(file)) for i, file in change.files.items()]
    yield "REPLACE INTO family VALUES(?, ?)", list(change.families.items())
    yield "REPLACE INTO proc VALUES(?, ?)", [(pid, _encode(proc)) for pid, proc in change.procs.items()]
    yield "DELETE FROM proc WHERE pid = ?", [(pid,) for pid in change.gone]
    yield (
        "INSERT INTO event VALUES(?, ?, ?, ?, ?)",
        [(e.seq, e.at, e.type, e.pid, _encode(e.more)) for e in change.events],
    )
    yield (
        "REPLACE INTO request VALUES(?, ?, ?, ?, ?)",
        [(r.uid, r.id, r.digest, r.reply, r.at) for r in change.requests],
    )
    yield from _frees(change)
    if change.counters is not None:
        yield "REPLACE INTO counter VALUES(?, ?)", list(msgspec.structs.asdict(change.counters).items())


def _frees(change: Change) -> Iterator[tuple[str, Sequence[Row]]]:
    """What goes, after all that comes: stdout and stderr with their process, garbage with its contents."""
    yield (
        "DELETE FROM chunk WHERE file IN (?, ?)",
        [(stdio(pid, 1), stdio(pid, 2)) for pid in change.gone],
    )
    for garbage in change.garbage:
        yield "DELETE FROM node WHERE id = ?", _each(garbage.nodes)
        yield "DELETE FROM chunk WHERE file = ?", _each(garbage.files)
        yield "DELETE FROM file WHERE id = ?", _each(garbage.files)
        yield "DELETE FROM image WHERE id = ?", _each(garbage.images)
        yield "DELETE FROM family WHERE id = ?", _each(garbage.families)


def _each(numbers: Iterable[int]) -> list[Row]:
    return [(number,) for number in numbers]


class Facts(msgspec.Struct, frozen=True):
    """What a store says of itself."""

    instance: str
    trimmed: int  # the last event that was trimmed away
    events: int  # how many there are


@contextmanager
def _readable(db: apsw.Connection) -> Generator[None]:
    """What the daemon cannot do without must be readable, or it does not start."""
    try:
        yield
    except (apsw.Error, msgspec.MsgspecError) as error:
        raise StoreFailed(f"{db.filename} cannot be read: {error}") from error


def facts(db: apsw.Connection) -> Facts:
    """What a store says of itself."""
    with _readable(db):
        meta = dict(db.execute("SELECT key, value FROM meta"))
        events = db.execute("SELECT count(*) FROM event").get
        return msgspec.convert({**meta, "events": events}, Facts)


def load(db: apsw.Connection, now: float) -> Saved:
    """Every record, of requests the young ones; forgets the old.

    The garbage collector rests meanwhile: it would look through all records again and again.
    """
    resting = gc.isenabled()
    gc.disable()
    try:
        with _readable(db):
            forget_requests(db, now)
            return _saved(db)
    finally:
        if resting:
            gc.enable()


def _saved(db: apsw.Connection) -> Saved:
    images = [ImageId(number) for (number,) in db.execute("SELECT id FROM image ORDER BY id")]
    return Saved(
        procs=_records(db, "proc", Proc),
        files=_records(db, "file", File),
        images=dict(zip(images, _records(db, "image", Image), strict=True)),
        families={Pid(number): fd for number, fd in db.execute("SELECT id, next FROM family")},
        requests=[Request(*row) for row in db.execute("SELECT uid, id, digest, reply, at FROM request")],
        counters=Counters(**dict(db.execute("SELECT name, next FROM counter"))),
    )


def _records(db: apsw.Connection, table: str, kind: type[T]) -> list[T]:
    """The records of a table, by number. A hundred thousand are usual: nothing else is done for each."""
    decode = msgspec.msgpack.Decoder(kind).decode
    found = db.execute(f"SELECT body FROM {table} ORDER BY rowid")  # noqa: S608 - a name of ours
    try:
        return [decode(body) for (body,) in found]
    except msgspec.MsgspecError as error:
        raise StoreFailed(f"{db.filename} is damaged: a record of table {table}: {error}") from error


def forget_requests(db: apsw.Connection, now: float) -> None:
    """Forget the requests that were answered more than a day ago."""
    db.execute("DELETE FROM request WHERE at < ?", (now - REQUESTS_KEPT,))


def forget_events(db: apsw.Connection, count: int) -> int:
    """Forget the oldest events; returns the number of the last that went."""
    last: int | None = db.execute(
        "SELECT max(seq) FROM (SELECT seq FROM event ORDER BY seq LIMIT ?)", (count,)
    ).get
    if last is None:
        return 0
    db.execute("DELETE FROM event WHERE seq <= ?", (last,))
    db.execute("UPDATE meta SET value = ? WHERE key = 'trimmed'", (last,))
    return last


_node = msgspec.msgpack.Decoder(Node).decode
_more = msgspec.msgpack.Decoder(dict[str, object]).decode


def node(body: bytes) -> Node:
    """The node that a row holds."""
    return _node(body)


def event(seq: int, at: float, kind: str, pid: int, more: bytes) -> Event:
    """The event that a row holds."""
    return Event(seq, at, kind, Pid(pid), _more(more))


def chunk(file: int, start: int, body: bytes) -> Chunk:
    """The piece of a file that a row holds."""
    return Chunk(FileId(file), start, body)
