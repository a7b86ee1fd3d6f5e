"""What the store on disk promises beyond what every store does."""

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import apsw
import pytest
import trio
from storekit import event, node, numbered, proc, running, write

from llmprocd.abi.errno import KernelError
from llmprocd.abi.types import FileId, MessageId, Pid
from llmprocd.kernel.state import Change, Counters, File, Garbage, Request
from llmprocd.store import rows, schema, sqlite
from llmprocd.store.protocol import StoreFailed

HERE = Path(__file__).parent


async def test_what_waits_is_written_in_one_commit(state_dir):
    """Whoever submits during one commit rides in the next: a thousand changes are not a thousand syncs."""
    store = state_dir()
    told: list[int] = []
    store.on_durable = told.append
    for n in range(1, 1001):
        store.submit(numbered(n))
    async with running(store):
        await store.wait_durable(1000)
        assert told == [1000]


async def test_a_large_queue_is_written_in_pieces(state_dir):
    """One commit does not take so much that those after it wait long."""
    store = state_dir()
    told: list[int] = []
    store.on_durable = told.append
    for n in range(1, 31):
        store.submit(Change(nodes=[node(n, body=bytes(1 << 20))]))
    async with running(store):
        await store.wait_durable(30)
    assert told == [8, 16, 24, 30]


def test_of_a_record_only_the_last_version_is_written():
    """A batch that changes a process twice writes it once."""
    both = rows.merge(
        [
            Change(procs={Pid(2): proc(2, nice=1)}, nodes=[node(1)], counters=Counters(3)),
            Change(procs={Pid(2): proc(2, nice=2)}, nodes=[node(2)], counters=Counters(4)),
            Change(nodes=[node(3)]),
        ]
    )
    assert both.procs == {2: proc(2, nice=2)}
    assert both.nodes == [node(1), node(2), node(3)]
    assert both.counters == Counters(4)
    gone = rows.merge([Change(procs={Pid(2): proc(2)}), Change(gone=[Pid(2)])])
    assert gone.gone == [2]


async def test_an_error_ends_the_store(state_dir):
    """A number used twice is an error of the kernel: all who wait are told, nothing is accepted after."""
    store = state_dir()
    heard: list[str] = []

    async def waits(ticket):
        try:
            await store.wait_durable(ticket)
        except StoreFailed as error:
            heard.append(str(error))

    store.submit(Change(nodes=[node(1), node(1)]))
    store.submit(Change(nodes=[node(2)]))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits, 1)
        nursery.start_soon(waits, 2)
        with pytest.raises(StoreFailed, match=r"UNIQUE constraint failed: node\.id"):
            await store.run()
    assert len(heard) == 2
    with pytest.raises(StoreFailed):
        store.submit(Change(nodes=[node(3)]))
    assert await state_dir().node(MessageId(2)) is None


async def test_an_error_while_stopping_is_told(state_dir):
    """What was submitted before the stop and could not be written does not pass for written."""
    store = state_dir()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: failing_stop(store, task_status))
        store.submit(Change(nodes=[node(1), node(1)]))
        nursery.cancel_scope.cancel()


async def failing_stop(store, task_status):
    with pytest.raises(StoreFailed):
        await store.run(task_status=task_status)


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import trio
from llmprocd.store import sqlite
from llmprocd.store.protocol import StoreFailed
from storekit import numbered, running

async def main(folder, limit):
    store = sqlite.Store(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        async with running(store):
            for n in range(1, 100000):
                await store.wait_durable(store.submit(numbered(n)))
                print(n, flush=True)
    except* StoreFailed as group:
        print("failed", str(group.exceptions[0]).replace("\\n", " "), flush=True)
trio.run(main, sys.argv[1], int(sys.argv[2]))
"""


@pytest.mark.parametrize("limit", [1_000_000, 2_222_222, 5_000_001])
def test_a_disk_that_takes_no_more_ends_the_store(limit, tmp_path, state_dir):
    """Everything acknowledged before is there, whole, and the store opens again."""
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "state"), str(limit)],
        cwd=HERE, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    *acked, last = run.stdout.splitlines()
    assert last.startswith("failed the store failed: ")
    assert len(acked) > 5
    assert {p.pid for p in state_dir().load().procs} >= {int(n) for n in acked}


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is what makes fdatasync fail here")
@pytest.mark.parametrize("at", [1, 2, 7])
def test_a_failing_sync_is_never_tried_again(at, tmp_path, state_dir):
    """The first fdatasync of the log that fails is the last system call that would make anything durable."""
    trace = tmp_path / "trace"
    database = str(tmp_path / "state" / "store.db")
    state_dir().close()
    run = subprocess.run(
        ["strace", "-f", "-y", "-o", trace, "-P", database, "-P", f"{database}-wal",
         "-e", "trace=fdatasync,pwrite64",
         "-e", f"inject=fdatasync:error=EIO:when={at}", sys.executable, "storechild.py", "plain",
         str(tmp_path / "state"), "1", "400"],
        cwd=HERE, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert "the store failed: IOError" in run.stderr
    lines = trace.read_text().splitlines()
    failed = next(n for n, line in enumerate(lines) if "EIO" in line)
    assert not [line for line in lines[failed + 1 :] if "store.db" in line]
    assert {p.pid for p in state_dir().load().procs} >= {int(n) for n in run.stdout.split()}


async def test_a_change_the_disk_made_is_noticed(tmp_path):
    """Of single bits flipped anywhere in the file none is ever believed."""
    pristine = tmp_path / "pristine"
    await write(sqlite.Store(str(pristine)), *(numbered(n) for n in range(1, 300)))
    whole = await everything(str(pristine))
    size = (pristine / "store.db").stat().st_size
    chance, noticed = random.Random(5), 0
    for _ in range(60):
        shutil.rmtree(tmp_path / "hurt", ignore_errors=True)
        shutil.copytree(pristine, tmp_path / "hurt")
        flip(tmp_path / "hurt" / "store.db", chance.randrange(size * 8))
        try:
            assert await everything(str(tmp_path / "hurt")) == whole
        except (StoreFailed, KernelError):
            noticed += 1
    assert noticed >= 50  # the others hit pages that nothing was read from


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


async def everything(folder: str) -> list[object]:
    """All that a store gives back."""
    store = sqlite.Store(folder)
    try:
        saved = store.load()
        nodes = await store.path(MessageId(299))
        chunks = [await store.read(file, 0, 99) for file in saved.files]
        events = await store.events(0, None, None, 999)
        return [
            saved.procs,
            saved.files,
            saved.requests,
            saved.counters,
            saved.families,
            nodes,
            chunks,
            events,
        ]
    finally:
        store.close()


def test_the_file_is_made_as_it_should_be(state_dir, tmp_path):
    """Page size, checksums, log, synchronous commits and our mark; folders nobody else enters."""
    store = state_dir()
    asked = ("page_size", "journal_mode", "synchronous", "application_id", "user_version", "auto_vacuum")
    assert [store._db.pragma(name) for name in asked] == [
        8192,
        "wal",
        2,
        0x4C4C4D50,
        len(schema.MIGRATIONS),
        2,
    ]
    assert store._db.reserve_bytes() == 8
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "state").iterdir() if p.is_dir()} == {
        "blobs": 0o700, "spool": 0o700,
    }  # fmt: skip
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert len(store.instance) == 32
    name = store.instance
    store.close()
    assert state_dir().instance == name


def m002_more(db: apsw.Connection) -> None:
    db.execute("ALTER TABLE family ADD COLUMN more INTEGER NOT NULL DEFAULT 7")


async def test_an_older_file_is_brought_up_to_date(state_dir, tmp_path):
    """Each step once, in order, its rows kept, and a copy beside it that the older code can read."""
    await write(state_dir(), numbered(1))
    path = tmp_path / "state" / "store.db"
    for _ in range(2):
        db = schema.connect(str(path), (*schema.MIGRATIONS, m002_more))
        assert db.pragma("user_version") == 2
        assert db.execute("SELECT id, next, more FROM family").get == (1, 3, 7)
        db.close()
    (copy,) = path.parent.glob("store.db.v1-*")
    old = schema.connect(str(copy))
    assert rows.load(old, 0).families == {1: 3}
    assert old.reserve_bytes() == 8
    old.close()


def m002_fails(db: apsw.Connection) -> None:
    m002_more(db)
    db.execute("SELECT * FROM nowhere")


async def test_a_step_that_fails_changes_nothing(state_dir, tmp_path):
    """The file stays at the version it had."""
    await write(state_dir(), numbered(1))
    path = tmp_path / "state" / "store.db"
    with pytest.raises(StoreFailed, match="nowhere"):
        schema.connect(str(path), (*schema.MIGRATIONS, m002_fails))
    assert state_dir().load().families == {1: 3}


async def test_a_newer_file_is_refused(state_dir, tmp_path):
    """In a sentence, and left as it was."""
    await write(state_dir(), numbered(1))
    path = tmp_path / "state" / "store.db"
    schema.connect(str(path), (*schema.MIGRATIONS, m002_more)).close()
    before = path.read_bytes()
    with pytest.raises(StoreFailed, match=r"written by a newer llmprocd: it has version 2, this one knows 1"):
        state_dir()
    assert path.read_bytes() == before


def foreign(path: Path) -> None:
    db = apsw.Connection(str(path))
    db.execute("CREATE TABLE theirs(x)")
    db.close()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (foreign, "is a database of another program"),
        (lambda path: path.write_bytes(b"no database at all" * 999), "cannot be opened"),
        (Path.mkdir, "cannot be opened"),
    ],
)
def test_what_is_not_ours_is_refused(make, said, state_dir, tmp_path):
    """And nothing in it is changed."""
    path = tmp_path / "state" / "store.db"
    path.parent.mkdir()
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StoreFailed, match=said):
        state_dir()
    assert not path.is_file() or path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    """In a sentence that names it."""
    (tmp_path / "file").touch()
    with pytest.raises(StoreFailed, match="file/state cannot be used"):
        sqlite.Store(str(tmp_path / "file" / "state"))


async def test_old_events_make_room(state_dir):
    """The newest are kept, and the store says up to where they are gone, in the next life too."""
    store = state_dir(events_kept=50)
    async with running(store):
        for n in range(1, 2001):
            store.submit(Change(events=[event(n)]))
            if n % 100 == 0:
                await store.wait_durable(n)
        left = await store.events(0, None, None, 9999)
        assert [e.seq for e in left] == list(range(1001, 2001))
        assert store.trimmed == 1000
    again = state_dir(events_kept=50)
    assert again.trimmed == 1000
    assert [e.seq for e in await again.events(0, None, None, 9999)] == list(range(1001, 2001))


async def test_old_requests_are_forgotten_at_boot(state_dir):
    """After a day nobody repeats one."""
    old, young = (
        Request(0, name, b"", b"", time.time() - age) for name, age in (("a", 90_000), ("b", 80_000))
    )
    await write(state_dir(), Change(requests=[old, young]))
    assert list(state_dir().load().requests) == [young]


async def test_leftover_contents_are_removed(state_dir, tmp_path):
    """Old files that no record names go; young ones, named ones and ids not yet taken stay.

    Spools all go, and so do the views that are kept beside contents: they are made anew.
    """
    kept = File(FileId(2), 1, complete=True, origin="bash", disk=True)
    await write(state_dir(), Change(files={kept.id: kept}, counters=Counters(file=5)))
    contents = tmp_path / "state" / "blobs"
    for name in ("1", "2", "3", "5", "notes", "2.shown", "-4.view"):
        (contents / name).touch()
        if name != "3":
            os.utime(contents / name, (1e9, 1e9))
    (tmp_path / "state" / "spool" / "1").touch()
    store = state_dir()
    store.load()
    async with running(store):
        assert sorted(p.name for p in contents.iterdir()) == ["2", "3", "5", "notes"]
    assert not list((tmp_path / "state" / "spool").iterdir())


async def test_the_file_shrinks_when_much_is_freed(state_dir, tmp_path):
    """What was freed goes back to the file system, and what is left is whole."""
    store, count = state_dir(), 200
    async with running(store):
        for n in range(1, count):
            store.submit(Change(nodes=[node(n, None, bytes(100_000))]))
        await store.wait_durable(store.submitted)
        store.submit(Change(garbage=[Garbage(nodes=[MessageId(n) for n in range(2, count)])]))
    assert (tmp_path / "state" / "store.db").stat().st_size < count * 100_000 / 3
    async with running(state_dir()) as again:
        assert await again.node(MessageId(1)) == node(1, None, bytes(100_000))


async def test_a_missing_spool_file_ends_the_daemon(state_dir):
    """Contents that should be stored and cannot be are the store's failure."""
    store = state_dir()
    async with running(store):
        with pytest.raises(StoreFailed, match="file 3 cannot be stored"):
            await store.adopt(store.spool(), FileId(3))


async def test_the_log_is_folded_into_the_database(state_dir, tmp_path):
    """It does not grow without end, and what was in it stays readable."""
    store = state_dir()
    async with running(store):
        for n in range(1, 25):
            await store.wait_durable(store.submit(Change(nodes=[node(n, n - 1 or None, bytes(8 << 20))])))
        log = (tmp_path / "state" / "store.db-wal").stat().st_size
        assert log < 100 << 20
        assert len(await store.path(MessageId(24))) == 24


async def test_a_cancelled_read_lets_its_caller_go(state_dir):
    """At once, however long the disk takes; the connection serves the next one."""
    store = state_dir()
    going, gate, order = threading.Event(), threading.Event(), []

    def slow(_db: apsw.Connection) -> None:
        going.set()
        gate.wait(10)
        order.append("read")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store._readers.ask, slow)
        await trio.to_thread.run_sync(going.wait)
        nursery.cancel_scope.cancel()
    order.append("caller")
    gate.set()
    while "read" not in order:
        await trio.sleep(0.01)
    assert order == ["caller", "read"]
    assert await store.node(MessageId(1)) is None
