"""A process that writes numbered changes and says on its standard output which are durable.

    storechild.py MODE FOLDER FIRST [COUNT]

It commits `numbered(FIRST)`, `numbered(FIRST + 1)`, ... and writes the line `n` once number n is durable.
MODE: `plain`; `blobs` adopts a file on disk with each; `normal` and `unsynced` are sabotaged (positive
controls): synchronous=NORMAL, and adopting without making the bytes durable.
"""

import itertools
import os
import sys
from pathlib import Path

import trio
from storekit import numbered

from llmprocd.abi.types import FileId
from llmprocd.kernel.state import File
from llmprocd.store import sqlite

TASKS = 5
LOG_PAGES = 300  # folded often, so that a crash finds it half done


def contents(n: int) -> bytes:
    """What the file on disk number n holds."""
    return b"%08d" % n * (100 + n % 400)


async def commit(store: sqlite.Store, mode: str, n: int) -> None:
    change = numbered(n)
    if mode in {"blobs", "unsynced"}:
        spool = store.spool()
        Path(spool).write_bytes(contents(n))
        await store.adopt(spool, FileId(n), sync=mode == "blobs")
        change.files = {FileId(n): File(FileId(n), len(contents(n)), complete=True, origin="bash", disk=True)}
    await store.wait_durable(store.submit(change))
    os.write(1, b"%d\n" % n)


async def main(mode: str, folder: str, first: int, count: int) -> None:
    store = sqlite.Store(folder, log_pages=LOG_PAGES)
    if mode == "normal":
        store._db.pragma("synchronous", "NORMAL")
    store.load()
    numbers = itertools.islice(itertools.count(first), count)
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: store.run(task_status=task_status))
        async with trio.open_nursery() as writers:
            for _ in range(TASKS):
                writers.start_soon(work, store, mode, numbers)
        nursery.cancel_scope.cancel()


async def work(store: sqlite.Store, mode: str, numbers) -> None:
    for n in numbers:
        await commit(store, mode, n)


if __name__ == "__main__":
    mode, folder, first, *rest = sys.argv[1:]
    trio.run(main, mode, folder, int(first), int(rest[0]) if rest else 10**9)
