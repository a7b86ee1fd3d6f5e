"""Both stores, for the laws that both must keep."""

from pathlib import Path

import pytest

from llmprocd.store import memory, sqlite
from llmprocd.store.protocol import Store


@pytest.fixture(params=["sqlite", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path):
    """An open store of each kind."""
    made: Store = sqlite.Store(str(tmp_path / "state")) if request.param == "sqlite" else memory.Store()
    yield made
    made.close()


@pytest.fixture
def state_dir(tmp_path: Path):
    """Opens the same state folder again and again, and closes what is left open."""
    opened: list[sqlite.Store] = []

    def open_(**options: int) -> sqlite.Store:
        opened.append(sqlite.Store(str(tmp_path / "state"), **options))
        return opened[-1]

    yield open_
    for made in opened:
        made.close()
