"""Programs that are interrupted, when they are ready for it and not before."""

import signal
import time
from pathlib import Path


def ignore_interrupts():
    """A `preexec_fn`: until it makes arrangements of its own, ^C does nothing to the program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupt(process):
    """Send SIGINT to a program that was started so, once it has made its arrangements."""
    bit = 1 << (signal.SIGINT - 1)
    while not _caught(process.pid) & bit:
        assert process.poll() is None, "it has ended"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)


def _caught(pid):
    """The signals that a process has handlers for, as a mask."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
