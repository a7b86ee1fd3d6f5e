"""What systemd and a daemon say to each other: sd_notify(3), sd_listen_fds(3), the watchdog.

Thirty lines of our own, since no package that is kept does all of it.
"""

import contextlib
import os
import socket
from collections.abc import MutableMapping
from typing import Final

_PATIENCE: Final = 0.1  # seconds for whoever manages us to take a word in


def listen_fds(environ: MutableMapping[str, str]) -> list[int]:
    """The descriptors that were handed over, and the variables about them removed."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "0")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []
    fds = [3 + number for number in range(int(count))]
    for fd in fds:
        os.set_inheritable(fd, False)
    return fds


class Notifier:
    """Tells systemd how the daemon is; silent where there is none.

    Law: whoever listens may go away, or listen no more: the daemon serves its clients on.
    """

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        self._path = environ.pop("NOTIFY_SOCKET", "")
        pid = environ.pop("WATCHDOG_PID", str(os.getpid()))
        usec = environ.pop("WATCHDOG_USEC", "0")
        self.watchdog_s = int(usec) / 1e6 if pid == str(os.getpid()) else 0.0

    def tell(self, *lines: str) -> None:
        """Send one datagram of lines such as READY=1."""
        if not self._path:
            return
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
            contextlib.suppress(OSError),
        ):
            sock.settimeout(_PATIENCE)
            sock.connect(address)
            sock.send("\n".join(lines).encode())
