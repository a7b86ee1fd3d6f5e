"""The database file: how it is opened, what tables it has, and how an old one becomes a new one.

Law: one connection writes and checkpoints; all others are opened read-only.
Law: a file that is not ours, or newer than this code, is refused and left as it was.
Law: a step of `MIGRATIONS` that was released never changes; a new one is added at the end.

Every page carries a checksum (SQLite's cksumvfs), so that what the disk has changed is not believed.
That needs eight bytes of each page and is chosen when the file is made.
"""

# apsw's stubs name a type that Python has from 3.12 on:
# pyright: reportUnknownMemberType=false

import functools
import os
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import apsw
import apsw.sqlite_extra

from llmprocd.store.protocol import StoreFailed

APPLICATION = 0x4C4C4D50  # "LLMP"
CHECKSUM_BYTES = 8
PAGE = 8192
VFS = "cksmvfs"

Step = Callable[[apsw.Connection], None]


def m001_first(db: apsw.Connection) -> None:
    """The tables of the first release."""
    db.execute("""
        CREATE TABLE meta(key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
        CREATE TABLE counter(name TEXT PRIMARY KEY, next INTEGER NOT NULL) STRICT, WITHOUT ROWID;
        CREATE TABLE proc(pid INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT;
        CREATE TABLE node(id INTEGER PRIMARY KEY, parent INTEGER, body BLOB NOT NULL) STRICT;
        CREATE TABLE file(id INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT;
        CREATE TABLE chunk(id INTEGER PRIMARY KEY, file INTEGER NOT NULL, start INTEGER NOT NULL,
                           body BLOB NOT NULL) STRICT;
        CREATE UNIQUE INDEX chunk_place ON chunk(file, start);
        CREATE TABLE image(id INTEGER PRIMARY KEY, body BLOB NOT NULL) STRICT;
        CREATE TABLE family(id INTEGER PRIMARY KEY, next INTEGER NOT NULL) STRICT;
        CREATE TABLE event(seq INTEGER PRIMARY KEY, at REAL NOT NULL, type TEXT NOT NULL,
                           pid INTEGER NOT NULL, more BLOB NOT NULL) STRICT;
        CREATE INDEX event_pid ON event(pid);
        CREATE TABLE request(uid INTEGER NOT NULL, id TEXT NOT NULL, digest BLOB NOT NULL,
                             reply BLOB NOT NULL, at REAL NOT NULL, PRIMARY KEY(uid, id))
               STRICT, WITHOUT ROWID;
        CREATE INDEX request_at ON request(at);
    """)
    db.executemany(
        "INSERT INTO meta VALUES(?, ?)",
        [("instance", uuid.uuid4().hex), ("created", time.time()), ("trimmed", 0)],
    )


MIGRATIONS: Sequence[Step] = (m001_first,)


def connect(path: str, steps: Sequence[Step] = MIGRATIONS) -> apsw.Connection:
    """Open the one connection that writes; make the file, or bring it up to date, where that is due.

    StoreFailed says in a sentence why a file cannot be used.
    """
    _load_checksums()
    try:
        _make_private(path)
        db = apsw.Connection(path, vfs=VFS)
        if db.pragma("page_count"):
            _check(db, path, len(steps))
        else:
            _prepare(db)
        for pragma, value in _PRAGMAS:
            db.pragma(pragma, value)
        db.wal_autocheckpoint(0)
        _migrate(db, path, steps)
    except (apsw.Error, OSError) as error:
        raise StoreFailed(f"{path} cannot be opened: {error}") from error
    return db


def _make_private(path: str) -> None:
    """Make the file for its owner alone; SQLite gives its log the same permissions."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def connect_reader(path: str) -> apsw.Connection:
    """Open a connection that can only read."""
    _load_checksums()
    db = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY, vfs=VFS)
    db.set_busy_timeout(10_000)
    for pragma, value in (("query_only", True), ("mmap_size", 0), ("cache_size", -8192)):
        db.pragma(pragma, value)
    return db


_PRAGMAS = (
    ("journal_mode", "WAL"),
    ("synchronous", "FULL"),  # NORMAL loses acknowledged commits when the power goes
    ("journal_size_limit", 64 << 20),
    ("cache_size", -65536),
    ("mmap_size", 0),  # a mapped page would be read past its checksum
    ("cell_size_check", True),
    ("trusted_schema", False),
)


@functools.cache
def _load_checksums() -> None:
    """Make the checksumming file system known to SQLite; an extension needs some connection to enter by."""
    with apsw.Connection(":memory:") as db:
        apsw.sqlite_extra.load(db, "cksumvfs")
    db.close()


def _prepare(db: apsw.Connection) -> None:
    """Choose what cannot be changed once there is a page."""
    db.reserve_bytes(reserve=CHECKSUM_BYTES)
    db.pragma("page_size", PAGE)
    db.pragma("auto_vacuum", "INCREMENTAL")


def _check(db: apsw.Connection, path: str, newest: int) -> None:
    """Refuse what is not ours, before anything is changed."""
    application = db.pragma("application_id")
    tables = db.execute("SELECT count(*) FROM sqlite_schema").get
    if application != APPLICATION and (application or tables):
        raise StoreFailed(f"{path} is a database of another program")
    if db.reserve_bytes() != CHECKSUM_BYTES:
        raise StoreFailed(f"{path} has no page checksums: it was not made by llmprocd")
    version = db.pragma("user_version")
    if version > newest:
        raise StoreFailed(
            f"{path} was written by a newer llmprocd: it has version {version}, this one knows {newest}"
        )


def _migrate(db: apsw.Connection, path: str, steps: Sequence[Step]) -> None:
    """Take the steps that the file has not had, each in a transaction of its own."""
    version: int = db.pragma("user_version")
    if 0 < version < len(steps):
        _copy(db, path, version)
    for number, step in enumerate(steps[version:], version + 1):
        with db:
            step(db)
            db.pragma("application_id", APPLICATION)
            db.pragma("user_version", number)
    if not version:
        sync_folder(Path(path).parent)


def _copy(db: apsw.Connection, path: str, version: int) -> None:
    """Put a dated copy beside the file: what an older llmprocd can still read."""
    copy = f"{path}.v{version}-{time.strftime('%Y%m%dT%H%M%S')}"
    db.execute("VACUUM INTO ?", (copy,))
    descriptor = os.open(copy, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(Path(path).parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
