"""The socket's name: one owner, private from birth, and never somebody else's file."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from llmprocd import listen

LOCKER = """
import sys
from llmprocd import listen
listen.lock(sys.argv[1])
print("locked", flush=True)
sys.stdin.read()
"""


def connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_a_socket_has_its_mode_and_nothing_is_left_beside_it(tmp_path, mode):
    """The temporary name is gone; clients connect to the final one."""
    path = tmp_path / "s"
    with listen.bind(str(path), mode):
        assert mode_of(path) == mode
        assert names(tmp_path) == ["s"]
        connect(str(path))


def test_the_umask_is_as_it_was(tmp_path):
    """Binding narrows it only for the moment."""
    before = os.umask(0o022)
    try:
        listen.bind(str(tmp_path / "s")).close()
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)


def test_a_missing_folder_is_made_for_us_alone(tmp_path):
    """Its mode is the first gate to the socket, and whoever may rename it opens that."""
    path = tmp_path / "a" / "run" / "s"
    before = os.umask(0)
    try:
        with listen.bind(str(path)):
            assert [mode_of(path.parent), mode_of(path.parent.parent)] == [0o700, 0o700]
    finally:
        os.umask(before)


def test_a_dead_daemons_socket_is_replaced(tmp_path):
    """A stale name refuses connections; the new one takes them."""
    path = str(tmp_path / "s")
    listen.bind(path).close()
    with pytest.raises(ConnectionRefusedError):
        connect(path)
    with listen.bind(path):
        connect(path)


@pytest.mark.parametrize("make", ["file", "folder"])
def test_what_is_no_socket_is_left_alone(tmp_path, make):
    """A mistyped path does not cost anybody a file."""
    path = tmp_path / "precious"
    if make == "file":
        path.write_text("data")
    else:
        path.mkdir()
    with pytest.raises(SystemExit, match="no socket"):
        listen.bind(str(path))
    assert path.exists()
    assert names(tmp_path) == ["precious"]


def test_a_path_longer_than_an_address_is_bound(tmp_path):
    """107 bytes fit into a socket address; folders may be deeper."""
    folder = tmp_path / ("d" * 100) / ("e" * 100)
    with listen.bind(str(folder / "s")):
        fd = os.open(folder, os.O_PATH)
        connect(f"/proc/self/fd/{fd}/s")
        os.close(fd)
        assert names(folder) == ["s"]


def test_a_relative_path_is_bound(tmp_path, monkeypatch):
    """In the current folder, as for any other program."""
    monkeypatch.chdir(tmp_path)
    with listen.bind("s"):
        connect("s")


def test_a_half_made_name_of_a_dead_daemon_is_no_hindrance(tmp_path):
    """In a container every daemon may have the same pid."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / f".{os.getpid()}.sock"))
    with listen.bind(str(tmp_path / "s")):
        assert names(tmp_path) == ["s"]


def test_a_failure_leaks_no_descriptor_and_no_umask(tmp_path):
    """The error is the caller's to tell."""
    (tmp_path / f".{os.getpid()}.sock").mkdir()
    before = len(names(Path("/proc/self/fd"))), os.umask(0o022)
    with pytest.raises(OSError, match=r"directory|not permitted"):
        listen.bind(str(tmp_path / "s"))
    assert len(names(Path("/proc/self/fd"))) == before[0]
    assert os.umask(before[1]) == 0o022


def test_unbind_removes_our_socket_only(tmp_path):
    """Another daemon may have taken the name since."""
    path = str(tmp_path / "s")
    with listen.bind(path):
        ours = Path(path).stat().st_ino
        with listen.bind(path):
            listen.unbind(path, ours)
            connect(path)
            listen.unbind(path, Path(path).stat().st_ino)
            assert not Path(path).exists()
            listen.unbind(path, ours)


def test_a_second_daemon_is_told_who_has_the_socket(tmp_path):
    """The lock names its owner, and is free when the owner is killed."""
    path = str(tmp_path / "run" / "s")
    owner = subprocess.Popen(
        [sys.executable, "-c", LOCKER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with owner:
        assert owner.stdout.readline() == b"locked\n"
        with pytest.raises(SystemExit, match=rf"another daemon \(pid {owner.pid}\) has {path}"):
            listen.lock(path)
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        fd = listen.lock(path)
    assert mode_of(Path(f"{path}.lock")) == 0o600
    assert os.pread(fd, 20, 0) == f"{os.getpid()}\n".encode()
    os.close(fd)


def test_the_lock_is_not_inherited(tmp_path):
    """Else a tool that outlives the daemon would keep it locked."""
    fd = listen.lock(str(tmp_path / "s"))
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize(("mode", "shared"), [(0o600, False), (0o660, True), (0o666, True), (0o644, False)])
def test_who_may_connect_is_told_by_the_mode_of_the_name(tmp_path, mode, shared):
    """To connect is to write."""
    path = str(tmp_path / "s")
    with listen.bind(path, mode):
        assert listen.is_shared(path) is shared
    Path(path).unlink()
    assert not listen.is_shared(path)


def test_a_listener_that_was_handed_over_is_used_as_it_is(tmp_path):
    path = str(tmp_path / "s")
    with listen.bind(path) as made, listen.handed(os.dup(made.fileno())) as listener:
        assert listener.getsockname().endswith(".sock")
        connect(path)


@pytest.mark.parametrize(
    ("family", "kind", "name"),
    [
        (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        (socket.AF_UNIX, socket.SOCK_STREAM, "\0llmprocd-test-abstract"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, "d"),
    ],
)
def test_a_socket_that_no_mode_keeps_private_is_refused(tmp_path, monkeypatch, family, kind, name):
    monkeypatch.chdir(tmp_path)
    with socket.socket(family, kind) as sock:
        sock.bind(name)
        with pytest.raises(SystemExit, match="LISTEN_FDS"):
            listen.handed(os.dup(sock.fileno()))
