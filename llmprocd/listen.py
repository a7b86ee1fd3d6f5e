"""The socket's name in the file system: one daemon owns it, and it is private from birth.

Law: the lock is taken before the name is, and is held for life; a crash frees it.
Law: there is no moment at which the name is missing, or open to more people than it will be.
"""

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import Final

from llmprocd.abi import paths

SUN_PATH: Final = 107
"""The longest name that fits into a socket address, in bytes."""

_BACKLOG: Final = 128


def lock(path: str) -> int:
    """Be the only daemon of this socket.

    Args:
        path: the socket's; the lock is a file beside it that holds our pid.

    Returns:
        A descriptor. The lock is held until it is closed. SystemExit when another daemon has it.
    """
    name = f"{path}.lock"
    _make_parent(path)
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 20, 0).decode(errors="replace").strip()
        os.close(fd)
        raise SystemExit(f"llmprocd: another daemon (pid {owner or 'unknown'}) has {path}") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def bind(path: str, mode: int = 0o600) -> socket.socket:
    """Listen at this path, in place of a socket that a dead daemon left there.

    Args:
        path: where; its folder is made, for us alone, if it is missing.
        mode: permissions of the socket.

    Returns:
        The listening socket. SystemExit when something that is no socket has the name.
    """
    _make_parent(path)
    _refuse_other_files(path)
    folder, name = os.path.split(path)
    temporary = f".{os.getpid()}.sock"
    dir_fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        with contextlib.suppress(FileNotFoundError):  # a daemon that died here may have had our pid
            os.unlink(temporary, dir_fd=dir_fd)
        listener.bind(_address(folder, temporary, dir_fd))
        os.chmod(temporary, mode, dir_fd=dir_fd)
        listener.listen(_BACKLOG)
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(umask)
        os.close(dir_fd)
    return listener


def handed(fd: int) -> socket.socket:
    """The listening socket that a service manager has made.

    Args:
        fd: its descriptor. SystemExit when it is no Unix stream socket with a path: only those are private.
    """
    listener = socket.socket(fileno=fd)
    name = listener.getsockname()
    named = listener.family is socket.AF_UNIX and isinstance(name, str) and name  # bytes: abstract
    if not (named and listener.type is socket.SOCK_STREAM):
        listener.close()
        raise SystemExit(f"llmprocd: descriptor {fd} of LISTEN_FDS is no Unix stream socket with a path")
    return listener


def is_shared(path: str) -> bool:
    """May others than its owner connect to this socket?"""
    with contextlib.suppress(FileNotFoundError):
        # Asked of the name: fstat of the socket itself says 0777, whatever that says.
        return bool(Path(path).stat().st_mode & 0o022)
    return False


def unbind(path: str, inode: int) -> None:
    """Remove the socket, unless the name is another's by now.

    Args:
        path: where it was bound.
        inode: its inode then (`os.stat(path).st_ino`).
    """
    with contextlib.suppress(FileNotFoundError):
        if os.lstat(path).st_ino == inode:
            Path(path).unlink()


def _address(folder: str, name: str, dir_fd: int) -> str:
    """The path to bind: by way of the open folder when it is too long for a socket address."""
    path = f"{folder or '.'}/{name}"
    return path if len(os.fsencode(path)) <= SUN_PATH else f"/proc/self/fd/{dir_fd}/{name}"


def _make_parent(path: str) -> None:
    paths.make_private(os.path.dirname(path))  # noqa: PTH120


def _refuse_other_files(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SystemExit(f"llmprocd: {path} is there and is no socket")
