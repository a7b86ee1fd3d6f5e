r"""Reading descriptors the way a model does: by page, line or character, and by pattern.

Contents live on disk; what is kept in memory is where pages begin. Everything over 256 KiB is decoded and
counted in a thread, so that no output, however large, holds the others up.

A text view is UTF-8. Where a file is not, its view is made once and kept beside it (`ID.shown`), with `\xNN`
for each byte that is not, so that offsets into the view are plain byte offsets too.

Law: views of a growing file are prefixes of one another: a character of which only a part has been written
yet is not shown. Law: a view that is kept beside its file is put there whole, for others may be reading it.
"""

import codecs
import os
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import trio

from llmprocd.kernel import file as files
from llmprocd.kernel.file import Pages
from llmprocd.kernel.state import File
from llmprocd.store.protocol import Store
from llmprocd.tools import output

SMALL = 262_144
PIECE = 1 << 20


class View(msgspec.Struct):
    """A text view of a file and where its pages begin."""

    pages: Pages
    data: bytes | None = None  # the view itself when it is small
    path: str = ""  # else the file that holds it


class Pager:
    """Views of files, the last used ones kept."""

    def __init__(self, store: Store, keep: int = 256) -> None:
        self._store = store
        self._keep = keep
        self._views: OrderedDict[tuple[int, int, int], View] = OrderedDict()
        self._making: dict[int, trio.Lock] = {}

    async def view(self, file: File, size: int) -> View:
        """The view of a file with pages of `size` characters.

        A growing file's view is as it is now; ask again for more.
        """
        making = self._making.setdefault(file.id, trio.Lock())
        try:
            async with making:  # in turn: an older view that ends last would replace what a newer one reads
                return await self._kept(file, size)
        finally:
            if not making.locked():
                self._making.pop(file.id, None)

    async def _kept(self, file: File, size: int) -> View:
        key = (file.id, self.size(file), size)
        found = self._views.get(key)
        if found is None:
            found = self._views[key] = await self._make(file, key[1], size)
            while len(self._views) > self._keep:
                self._views.popitem(last=False)
        self._views.move_to_end(key)
        return found

    def size(self, file: File) -> int:
        """Bytes of a file now; one that grows on disk is looked at."""
        if file.disk and not file.complete:
            return Path(self._store.disk_path(file.id)).stat().st_size
        return file.size

    async def _make(self, file: File, length: int, size: int) -> View:
        if length <= SMALL:
            data = await self._store.read(file, 0, length)
            text = _decoder("backslashreplace").decode(data, final=file.complete)
            return View(files.paginate([text], size), data=text.encode())
        path = self._store.disk_path(file.id) if file.disk else await self._spooled(file, length)
        spool = self._store.spool()
        return await trio.to_thread.run_sync(partial(scan, path, length, size, spool, complete=file.complete))

    async def _spooled(self, file: File, length: int) -> str:
        """A large file that is kept in rows (a long stdout), as a file of its own for scanning."""
        spool = trio.Path(self._store.spool())
        async with await spool.open("wb") as out:
            for offset in range(0, length, PIECE):
                await out.write(await self._store.read(file, offset, min(PIECE, length - offset)))
        return str(await spool.rename(f"{self._store.disk_path(file.id)}.view"))

    async def between(self, view: View, start: int, end: int) -> str:
        """The text between two byte offsets of a view."""
        return (await self.read_bytes(view, start, end)).decode()

    async def read_bytes(self, view: View, start: int, end: int) -> bytes:
        """The bytes of a view between two offsets."""
        if view.data is not None:
            return view.data[start:end]
        return await trio.to_thread.run_sync(partial(_pread, view.path, start, end))

    async def copy(self, view: View, start: int, end: int, path: str) -> None:
        """Write the bytes of a view between two offsets to a new file."""
        if view.data is not None:
            await trio.Path(path).write_bytes(view.data[start:end])
        else:
            await trio.to_thread.run_sync(_copy, view.path, start, end - start, path)

    async def byte_of_line(self, view: View, line: int) -> int:
        """The offset in bytes at which a line (from 1) begins; the end for a line beyond the last."""
        return await self.byte_of_char(view, await self.char_of_line(view, line))

    async def byte_of_char(self, view: View, char: int) -> int:
        """The offset in bytes at which a character (from 0) begins."""
        page = view.pages.page_of_char(char)
        before = await self.read_chars(view, view.pages.chars[page], char - view.pages.chars[page])
        return view.pages.bytes[page] + len(before.encode())

    async def read_pages(self, view: View, first: int, count: int) -> str:
        """Pages from `first` (from 1)."""
        last = min(first - 1 + count, view.pages.count)
        offsets = view.pages.bytes
        return await self.between(view, offsets[first - 1], offsets[min(last, len(offsets) - 1)])

    async def read_chars(self, view: View, start: int, count: int) -> str:
        """Characters from `start` (from 0)."""
        pages = view.pages
        page = pages.page_of_char(start)
        skip = start - pages.chars[page]
        end = pages.page_of_char(start + count) + 1
        text = await self.between(view, pages.bytes[page], pages.bytes[min(end, len(pages.bytes) - 1)])
        return text[skip : skip + count]

    async def read_lines(self, view: View, first: int, count: int) -> str:
        """Whole lines from `first` (from 1)."""
        start = await self.char_of_line(view, first)
        return await self.read_chars(view, start, await self.char_of_line(view, first + count) - start)

    async def char_of_line(self, view: View, line: int) -> int:
        """The character (from 0) at which a line (from 1) begins; the end for a line beyond the last."""
        pages = view.pages
        if line > pages.total_lines:
            return pages.total_chars
        page = pages.page_of_line(line)
        missing = line - 1 - pages.lines[page]
        while missing > 0:
            text = await self.read_pages(view, page + 1, 1)
            if text.count("\n") >= missing:
                return pages.chars[page] + _after_newline(text, missing)
            missing -= text.count("\n")
            page += 1
        return pages.chars[page]


def _after_newline(text: str, number: int) -> int:
    """Where the text after its number-th newline begins."""
    position = 0
    for _ in range(number):
        position = text.index("\n", position) + 1
    return position


def _pread(path: str, start: int, end: int) -> bytes:
    with Path(path).open("rb") as source:
        source.seek(start)
        return source.read(end - start)


def _copy(source: str, start: int, size: int, path: str) -> None:
    with Path(source).open("rb") as file:
        os.lseek(file.fileno(), start, os.SEEK_SET)
        output.copy(file.fileno(), path, size)


def _decoder(errors: str) -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")(errors)


def _pieces(path: str, length: int, errors: str, *, complete: bool) -> Iterator[str]:
    decoder = _decoder(errors)
    with Path(path).open("rb") as source:
        while length > 0 and (data := source.read(min(PIECE, length))):
            length -= len(data)
            yield decoder.decode(data, final=complete and length <= 0)


def scan(path: str, length: int, size: int, spool: str, *, complete: bool) -> View:
    """Count the pages of a file on disk, and make its text view (in `spool` first) where it is not UTF-8."""
    try:
        return View(files.paginate(_pieces(path, length, "strict", complete=complete), size), path=path)
    except UnicodeDecodeError:
        pass
    with Path(spool).open("w", encoding="utf-8", newline="") as out:
        out.writelines(_pieces(path, length, "backslashreplace", complete=complete))
    pages = files.paginate(_pieces(spool, Path(spool).stat().st_size, "strict", complete=True), size)
    return View(pages, path=str(Path(spool).rename(f"{path}.shown")))
