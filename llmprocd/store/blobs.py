"""Contents that are files of their own.

Law: contents are made durable, then named, then the name is made durable, and only then may a record name
them. A crash between two of these leaves at most a file that no record names.

Such leftovers go at the next boot. One whose id was never durably taken stays, for it may be taken again:
its new owner replaces it. Text views that are kept beside contents (`ID.shown`, `ID.view`) are of one life.
"""

import itertools
import os
import shutil
import time
from collections.abc import Container, Iterable
from pathlib import Path

from llmprocd import crash
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import FileId
from llmprocd.store.schema import sync_folder

VIEWS = (".shown", ".view")
KEPT = 3600.0
"""How old a leftover must be before it goes, in seconds."""


class Blobs:
    """The folders `blobs` and `spool` in a state folder, both 0700."""

    def __init__(self, folder: Path) -> None:
        self._blobs, self._spool = folder / "blobs", folder / "spool"
        self._numbers = itertools.count(1)
        for path in (self._blobs, self._spool):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(folder)

    def path(self, file: FileId) -> Path:
        """Where the contents of a file are."""
        return self._blobs / str(file)

    def spool(self) -> str:
        """A path in the spool folder that was not given before."""
        return str(self._spool / str(next(self._numbers)))

    def empty_spool(self) -> None:
        """Remove what an earlier life has left; before the first `spool`."""
        shutil.rmtree(self._spool)
        self._spool.mkdir(mode=0o700)

    def adopt(self, spool: str, file: FileId, *, sync: bool) -> None:
        """Move a spool file among the contents; then its name, and with `sync` its bytes, are durable."""
        if sync:
            descriptor = os.open(spool, os.O_RDONLY)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)
        crash.point("adopt.before")
        Path(spool).rename(self.path(file))
        crash.point("adopt.renamed")
        sync_folder(self._blobs)
        crash.point("adopt.after")

    def read(self, file: FileId, offset: int, count: int) -> bytes:
        """Bytes of a file as it is now; fewer than `count` only at its end. EIO when they cannot be had."""
        try:
            with self.path(file).open("rb") as contents:
                contents.seek(offset)
                return contents.read(count)
        except OSError as error:
            raise KernelError(
                Errno.EIO, f"the contents of file {file} cannot be read: {error.strerror}"
            ) from error

    def remove(self, files: Iterable[FileId]) -> None:
        """Remove contents, and the views beside them, that no record names any more."""
        for file in files:
            for suffix in ("", *VIEWS):
                Path(f"{self.path(file)}{suffix}").unlink(missing_ok=True)

    def sweep(self, known: Container[FileId], below: int) -> int:
        """Remove all views, and contents that no record names and none under way can; returns how many.

        `known` are the ids that records name, `below` the first id that may still be given out.
        """
        old, gone = time.time() - KEPT, 0
        with os.scandir(self._blobs) as entries:
            for entry in entries:
                if entry.name.endswith(VIEWS):
                    Path(entry.path).unlink()
                    continue
                if not entry.name.isdecimal():
                    continue
                number = FileId(int(entry.name))
                if number < below and number not in known and entry.stat().st_mtime < old:
                    Path(entry.path).unlink()
                    gone += 1
        return gone
