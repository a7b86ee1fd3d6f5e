"""The vocabulary of failure: on the wire, in the log, to a model and as an exit status.

Numbers are Linux's (errno.h), so that a client in any language can name them.
"""

from enum import IntEnum


class Errno(IntEnum):
    """One name for one kind of failure."""

    EPERM = 1
    ENOENT = 2
    ESRCH = 3
    EINTR = 4
    EIO = 5
    E2BIG = 7
    ENOEXEC = 8
    EBADF = 9
    ECHILD = 10
    EAGAIN = 11
    EACCES = 13
    EBUSY = 16
    EEXIST = 17
    EINVAL = 22
    ENOSPC = 28
    EPIPE = 32
    ENOSYS = 38
    EPROTO = 71
    EMSGSIZE = 90
    ENOBUFS = 105
    ESHUTDOWN = 108
    ETIMEDOUT = 110
    EHOSTUNREACH = 113
    EDQUOT = 122
    ECANCELED = 125


class KernelError(Exception):
    """A refusal: an errno and a sentence a stranger understands.

    Law: whoever raises it has changed nothing.

    `ticket` is the commit that must be durable before it is told: a refusal, too, may come of what a crash
    could still take back.
    """

    ticket = 0

    def __init__(self, errno: Errno, text: str, **data: object) -> None:
        super().__init__(text)
        self.errno = errno
        self.text = text
        self.data = data

    def __str__(self) -> str:
        return f"{self.errno.name}: {self.text}"
