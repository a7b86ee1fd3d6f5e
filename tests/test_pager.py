r"""Pages, lines and characters of files of every kind, against an oracle that holds the whole text."""

import os
import random
from pathlib import Path

import pytest
import trio

from llmprocd import pager as pagers
from llmprocd.abi.types import FileId, Pid
from llmprocd.kernel import file as files
from llmprocd.kernel.state import Change, Chunk, Counters, File, stdio
from llmprocd.pager import PIECE, SMALL, Pager
from llmprocd.store import memory


@pytest.fixture
def store():
    return memory.Store()


async def on_disk(store, data, number=1, *, complete=True):
    spool = store.spool()
    Path(spool).write_bytes(data)
    await store.adopt(spool, FileId(number))
    return File(FileId(number), len(data) if complete else 0, complete=complete, origin="bash", disk=True)


def in_rows(store, data, number=1):
    """A file in rows, in chunks of several sizes."""
    chunks, at = [], 0
    for size in [1, 7, *([100_000] * (len(data) // 100_000 + 1))]:
        if at < len(data):
            chunks.append(Chunk(FileId(number), at, data[at : at + size]))
            at += size
    store.submit(Change(chunks=chunks, counters=Counters()))
    return File(FileId(number), len(data), complete=True, origin="stdout")


def text_of(kind, size, seed=0):
    """Bytes of about a size: kinds of text that break naive paging."""
    rng = random.Random(f"{kind}{seed}")
    match kind:
        case "empty":
            return b""
        case "lines":
            made = "".join("x" * rng.randrange(120) + "\n" for _ in range(size // 60 + 1))
        case "one_line":
            made = "y" * size
        case "newlines":
            made = "\n" * size
        case "wide":
            made = "".join(rng.choice("aä€😀\n") for _ in range(size // 2))
        case "crlf":
            made = "ab\r\ncd\re\u2028f\x0bg\n" * (size // 16 + 1)
        case "no_newline":
            made = "abc\ndef" * (size // 7 + 1)
        case _:  # not UTF-8
            return bytes(rng.choice(b"ab\n\xe2\x82\xac\xff\xf0\x9f\xc3") for _ in range(size))
    return made.encode()


KINDS = ("empty", "lines", "one_line", "newlines", "wide", "crlf", "no_newline", "bytes")


def naive_pages(text, size):
    """Pages by the words of the contract: whole lines, and a line is cut only if longer than a page."""
    pages, rest = [], text
    while len(rest) > size:
        end = rest.rfind("\n", 0, size) + 1 or size
        pages.append(rest[:end])
        rest = rest[end:]
    return [*pages, rest] if rest or not pages else pages


def naive_lines(text):
    lines = text.split("\n")
    whole = [line + "\n" for line in lines[:-1]]
    return [*whole, lines[-1]] if lines[-1] else whole


async def check(pager, file, data, size, rng):
    """A view of a file says what the oracle says, wherever one looks."""
    text = data.decode(errors="backslashreplace")
    pages, lines = naive_pages(text, size), naive_lines(text)
    view = await pager.view(file, size)
    assert view.pages.count == max(1, len(pages))
    assert view.pages.total_chars == len(text)
    assert view.pages.total_lines == len(lines)
    everything = [await pager.read_pages(view, page, 1) for page in range(1, view.pages.count + 1)]
    assert everything == pages
    assert await pager.read_pages(view, 1, view.pages.count) == text
    first, last = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    start, end = await pager.byte_of_char(view, first), await pager.byte_of_char(view, last)
    await pager.copy(view, start, end, copied := pager._store.spool())
    assert Path(copied).read_bytes().decode() == text[first:last]
    for _ in range(40):
        start, count = rng.randrange(len(text) + 1), rng.choice([1, 2, 5, size, 3 * size, len(text) + 9])
        assert await pager.read_chars(view, start, count) == text[start : start + count]
        line, many = rng.randrange(len(lines) + 2) + 1, rng.choice([1, 2, 30, len(lines) + 9])
        assert await pager.read_lines(view, line, many) == "".join(lines[line - 1 : line - 1 + many])
        page, more = rng.randrange(view.pages.count) + 1, rng.choice([1, 2, 10])
        assert await pager.read_pages(view, page, more) == "".join(pages[page - 1 : page - 1 + more])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", [on_disk, in_rows])
async def test_small_files_read_anywhere_equal_slices_of_their_text(store, kind, where):
    rng = random.Random(kind)
    for number, length in enumerate((0, 1, 2, 9, 100, 3000), 1):
        data = text_of(kind, length)
        file = where(store, data, number)
        file = await file if where is on_disk else file
        for size in (1, 2, 10, 999):
            await check(Pager(store), file, data, size, rng)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("where", [on_disk, in_rows])
async def test_large_files_read_anywhere_equal_slices_of_their_text(store, kind, where):
    """Over 256 KiB contents are counted in a thread and read from disk, also those that are in rows."""
    data = text_of(kind, SMALL + 70_000)
    file = where(store, data)
    file = await file if where is on_disk else file
    view = await Pager(store).view(file, 4000)
    assert view.data is None
    await check(Pager(store), file, data, 4000, random.Random(1))


async def test_characters_cut_by_the_pieces_of_a_scan_are_whole(store):
    """A piece of the file ends inside a character, of good text and of bad."""
    for number, tail in enumerate((b"", b"\xff"), 1):
        data = b"a" * (PIECE - 1) + "€".encode() * 3 + b"\n" + b"b" * 10 + tail
        await check(Pager(store), await on_disk(store, data, number), data, 4000, random.Random(1))


async def test_a_long_stdout_is_read_by_page(store):
    """Standard output is kept in rows however long it gets."""
    data = text_of("lines", 400_000)
    file = in_rows(store, data, stdio(Pid(7), 1))
    await check(Pager(store), file, data, 4000, random.Random(2))


async def test_a_file_that_is_not_utf8_has_its_text_view_beside_it(store):
    r"""The view is made once, with `\xNN` for what is not text, and the file itself stays exact."""
    data = b"\xff" + b"line\n" * 80_000
    file = await on_disk(store, data)
    pager = Pager(store)
    view = await pager.view(file, 4000)
    assert Path(view.path).name.endswith(".shown")
    assert (await pager.read_pages(view, 1, 1)).startswith("\\xffline\n")
    assert await store.read(file, 0, 3) == b"\xffli"


async def test_views_of_a_growing_file_are_prefixes_of_one_another(store):
    """What was read once stays true: also when a look came in the middle of a character."""
    text = "".join(f"{number} ä€😀\n" for number in range(60_000)).encode()
    bad = text.replace(b"5", b"\xff")
    for number, whole in enumerate((text, bad), 1):
        file = await on_disk(store, b"", number, complete=False)
        pager = Pager(store)
        before = ""
        for end in (0, 5, 7, 1000, 1002, SMALL, SMALL + 1, SMALL + 2, SMALL + 3, 600_000, 600_001, 600_002):
            Path(store.disk_path(file.id)).write_bytes(whole[:end])
            view = await pager.view(file, 4000)
            now = await pager.read_pages(view, 1, view.pages.count)
            assert now.startswith(before), f"what was shown at {end} took something back"
            assert end - len(now.encode()) <= 3 or number == 2
            before = now
        done = File(file.id, 600_002, complete=True, origin="bash", disk=True)
        view = await pager.view(done, 4000)
        assert await pager.read_pages(view, 1, view.pages.count) == files.shown(whole[:600_002])


async def test_a_file_that_has_grown_gets_a_new_view(store):
    file = await on_disk(store, b"one\n", complete=False)
    pager = Pager(store)
    assert (await pager.view(file, 10)).pages.total_lines == 1
    with Path(store.disk_path(file.id)).open("ab") as out:
        out.write(b"two\n")
    assert pager.size(file) == 8
    view = await pager.view(file, 10)
    assert await pager.read_lines(view, 2, 1) == "two\n"


@pytest.mark.parametrize("where", [on_disk, in_rows])
async def test_many_who_look_at_once_see_the_same(store, where):
    """Forked children read the parent's descriptor at the same time, before there is a view of it."""
    data = b"\xff" + text_of("wide", 1_500_000)
    text = data.decode(errors="backslashreplace")
    file = where(store, data)
    file = await file if where is on_disk else file
    pager = Pager(store)
    whole = 0

    async def look(delay):
        nonlocal whole
        await trio.sleep(delay)
        view = await pager.view(file, 4000)
        for start in range(0, len(text), 150_000):
            assert await pager.read_chars(view, start, 100) == text[start : start + 100]
        whole += 1

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(look, number * 0.01)
    assert whole == 16


async def test_an_older_view_takes_nothing_from_a_newer_one(store):
    """Two who look at a growing file that is no text: the first, with small pages, is the last to be done."""
    file = await on_disk(store, b"\xff" * SMALL * 2, complete=False)
    pager, path = Pager(store), Path(store.disk_path(file.id))

    async def look():
        await pager.view(file, 1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        while not pager._making:
            await trio.lowlevel.checkpoint()
        with path.open("ab") as out:
            out.write(b"\xfe" * SMALL)
        newer = await pager.view(file, 4000)
    assert await pager.read_pages(newer, newer.pages.count, 1)
    assert newer.pages.total_chars == 12 * SMALL
    assert (await pager.read_chars(newer, 12 * SMALL - 4, 4)) == "\\xfe"


async def test_views_that_were_not_used_for_long_are_let_go(store):
    pager = Pager(store, keep=3)
    made = [in_rows(store, b"%d" % number, number) for number in range(1, 6)]
    for file in made:
        await pager.view(file, 10)
    assert [key[0] for key in pager._views] == [3, 4, 5]
    kept = await pager.view(made[2], 10)
    await pager.view(made[0], 10)
    assert [key[0] for key in pager._views] == [5, 3, 1]
    assert await pager.view(made[2], 10) is kept


async def test_a_scan_holds_nobody_up(store):
    """Counting a large file is a thread's work: others go on meanwhile."""
    file = await on_disk(store, os.urandom(3 << 20))
    steps = 0
    done = trio.Event()

    async def look():
        await Pager(store).view(file, 4000)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        while not done.is_set():
            await trio.sleep(0.001)
            steps += 1
    assert steps > 5


def test_a_scan_of_a_length_sees_no_byte_beyond_it(tmp_path):
    """The command goes on writing while its output is counted."""
    path = tmp_path / "f"
    path.write_bytes(b"a" * 10 + "é".encode() * 10)
    spool = str(tmp_path / "spool")
    view = pagers.scan(str(path), 13, 4, spool, complete=False)
    assert (view.pages.total_chars, view.pages.count) == (11, 3)
    view = pagers.scan(str(path), 13, 4, spool, complete=True)
    assert (view.pages.total_chars, view.pages.count) == (15, 4)
    assert Path(view.path).read_text() == "a" * 10 + "é\\xc3"
