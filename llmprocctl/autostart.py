"""Start the daemon when none answers.

Law: of any number of clients that come at once, one starts a daemon and all of them get it: the lock is
taken first, and the socket tried again under it.
Law: a client goes on when the daemon says it is ready, or reports the daemon's own words when it never is.
"""
# pathlib is not there yet, and costs five milliseconds
# ruff: noqa: PTH120

import fcntl
import os
import subprocess
import sys

from llmprocctl.client import Client, UnreachableError
from llmprocd.abi import paths

_READY = b"READY"
_LAST_LINES = 10


def start(path: str) -> Client:
    """Connect to the daemon at a socket, starting it if need be.

    Args:
        path: the socket's, absolute; its folder is made, for this user alone.

    Returns:
        A connection. Raises UnreachableError with the daemon's last lines when it did not start.
    """
    paths.make_private(os.path.dirname(path))
    lock = os.open(f"{path}.start", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return Client(path)
        except UnreachableError:
            _launch(path)
            return Client(path)
    finally:
        os.close(lock)


def _launch(path: str) -> None:
    """Start a daemon and wait until it is ready."""
    log = f"{os.path.dirname(path)}/llmprocd.log"
    stderr = os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    ready, said = os.pipe()
    try:
        begin = os.fstat(stderr).st_size
        daemon = subprocess.Popen(
            [sys.executable, "-P", "-m", "llmprocd"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=[said],
            cwd="/",
            env={**os.environ, "LLMPROC_SOCKET": path, "LLMPROC_READY_FD": str(said)},
            start_new_session=True,
        )
        os.close(said)
        said = -1
        if not _is_ready(ready):
            status = daemon.wait()
            raise UnreachableError(f"the daemon did not start (exit {status}){_tail(stderr, begin, log)}")
        daemon.returncode = 0  # it is nobody's child from here on: nothing waits for it
    finally:
        os.close(ready)
        os.close(stderr)
        if said >= 0:
            os.close(said)


def _is_ready(fd: int) -> bool:
    """Wait for the word; False when the daemon ended without it."""
    heard = b""
    while _READY not in heard:
        part = os.read(fd, 64)
        if not part:
            return False
        heard += part
    return True


def _tail(fd: int, begin: int, name: str) -> str:
    """The last lines that the daemon wrote."""
    end = os.fstat(fd).st_size
    begin = max(begin, end - 8192)
    lines = os.pread(fd, end - begin, begin).decode(errors="replace").splitlines()[-_LAST_LINES:]
    return "".join(f"\n  {line}" for line in lines) if lines else f"; see {name}"
