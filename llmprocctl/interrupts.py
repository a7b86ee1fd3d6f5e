"""^C as something to wait for.

Law: an interrupt is counted, never raised: it cannot fall between a reply and whoever it is for.
"""

import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any, Self


class Interrupts:
    """While it is entered, SIGINT is counted and `fd` becomes readable."""

    def __init__(self) -> None:
        self.fd = -1
        self._write = -1
        self._count = 0
        self._old: Any = None

    def __enter__(self) -> Self:
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._old = signal.signal(signal.SIGINT, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._old)
        os.close(self.fd)
        os.close(self._write)

    def taken(self) -> int:
        """How many came since the last look."""
        with suppress(BlockingIOError):
            os.read(self.fd, 4096)
        count, self._count = self._count, 0
        return count

    def _caught(self, _number: int, _frame: FrameType | None) -> None:
        os.write(self._write, b"!")
        self._count += 1
