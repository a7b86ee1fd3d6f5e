"""Named points at which the daemon can be made to die."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from storechild import contents

from llmprocd import crash
from llmprocd.abi.types import FileId
from llmprocd.store import sqlite

HERE = Path(__file__).parent
ADOPT = {"adopt.before", "adopt.renamed", "adopt.after"}


def life(folder: Path, mode: str = "blobs", count: int = 3, **env: str) -> tuple[int, list[int]]:
    """One run of a writer; its exit status, and what it acknowledged."""
    run = subprocess.run(
        [sys.executable, "storechild.py", mode, str(folder), "1", str(count)],
        cwd=HERE, env=os.environ | env, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return run.returncode, sorted(int(line) for line in run.stdout.split())


def test_every_point_is_logged_once(tmp_path):
    """A suite can find all points there are."""
    log = tmp_path / "log"
    assert life(tmp_path / "state", LLMPROC_CRASH_LOG=str(log)) == (0, [1, 2, 3])
    names = log.read_text().splitlines()
    assert set(names) == {"spawn.before", "spawn.after"} | ADOPT
    assert len(names) == 5


@pytest.mark.parametrize("point", ["spawn.before", "spawn.after", *sorted(ADOPT)])
def test_after_a_crash_no_record_names_missing_contents(point, tmp_path):
    """Wherever it dies, what is there is whole, and the next life goes on from it."""
    status, acked = life(tmp_path / "state", LLMPROC_CRASH=f"{point}:2")
    assert status == crash.STATUS
    have = trio.run(found, tmp_path / "state")
    assert set(acked) <= have
    log = tmp_path / "log"
    status, acked = life(tmp_path / "again", count=1, LLMPROC_CRASH=point, LLMPROC_CRASH_LOG=str(log))
    assert (status, acked) == (crash.STATUS, [])
    assert log.read_text().splitlines()[-1] == point
    assert trio.run(found, tmp_path / "again") == ({1} if point == "spawn.after" else set())
    if point != "spawn.after":
        assert life(tmp_path / "again", count=1) == (0, [1])
        assert trio.run(found, tmp_path / "again") == {1}


async def found(folder: Path) -> set[int]:
    store = sqlite.Store(str(folder))
    try:
        files = list(store.load().files)
        for file in files:
            assert await store.read(file, 0, 10**6) == contents(file.id)
        assert FileId(0) not in {file.id for file in files}
        return {file.id for file in files}
    finally:
        store.close()


def test_without_the_variables_a_point_does_nothing():
    """It is not even counted."""
    assert crash.point is crash._pass
    crash.point("spawn.before")
