"""What the tests of the daemon's middle share: a machine that runs in process."""

import pytest
from machinekit import running


@pytest.fixture
async def machine():
    """A machine over a store in memory, instantly durable, with the scripted model: a `machinekit.House`."""
    async with running() as house:
        yield house
