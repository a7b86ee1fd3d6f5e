"""Named places where the daemon can be made to die, for the crash suite.

Law: without `LLMPROC_CRASH` and `LLMPROC_CRASH_LOG` in the environment, `point` does nothing.

`LLMPROC_CRASH=POINT[:N]` ends the process the N-th (first) time that POINT is passed, as abruptly as
kill -9 does: no handler runs, no buffer is flushed. `LLMPROC_CRASH_LOG=FILE` appends the name of each
point to FILE when it is first passed, so that a suite can find them all.
"""

import os
import threading
from pathlib import Path

STATUS = 137
"""How such an end looks to a parent: what a shell says of kill -9."""


class Trap:
    """Counts the points that are passed, in any thread."""

    def __init__(self, spec: str, log: str) -> None:
        name, _, times = spec.partition(":")
        self._name, self._left, self._log = name, int(times or 1), log
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def point(self, name: str) -> None:
        """Pass a point: log it, and die if it is the one."""
        with self._lock:
            if self._log and name not in self._seen:
                self._seen.add(name)
                _append(self._log, name)
            if name == self._name:
                self._left -= 1
                if not self._left:
                    os._exit(STATUS)


def _append(path: str, name: str) -> None:
    with Path(path).open("a", encoding="utf-8") as log:
        log.write(f"{name}\n")


def _pass(name: str) -> None:
    """Pass a point where nothing is set."""


_spec, _log = os.environ.get("LLMPROC_CRASH", ""), os.environ.get("LLMPROC_CRASH_LOG", "")

point = Trap(_spec, _log).point if _spec or _log else _pass
"""Pass the point of this name."""
