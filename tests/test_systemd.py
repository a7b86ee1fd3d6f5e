"""systemd and the daemon: units that verify, and the protocols spoken for real."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from llmprocd import systemd

UNITS = Path(__file__).parents[1] / "systemd"

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
needs_activate = pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not installed"
)


def installed(folder: Path, units: Path) -> list[str]:
    """The units with the paths of commands that exist here, as an installation would write them."""
    found: list[str] = []
    for unit in sorted(units.glob("llmprocd.*")):
        text = unit.read_text().replace("/usr/bin/llmproc", f"{Path(sys.executable).parent}/llmproc")
        copy = folder / unit.name
        copy.write_text(text)
        found.append(str(copy))
    return found


@needs_systemd
@pytest.mark.parametrize("kind", ["system", "user"])
def test_the_units_verify(tmp_path, kind):
    """systemd-analyze has nothing to say about them."""
    units = installed(tmp_path, UNITS if kind == "system" else UNITS / "user")
    args = ["systemd-analyze", f"--{kind}", "verify", "--man=no", *units]
    environ = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}  # a user manager wants one, if only to look
    done = subprocess.run(args, capture_output=True, text=True, timeout=60, check=False, env=environ)
    said = [line for line in done.stderr.splitlines() if "llmproc" in line]
    assert (done.returncode, said) == (0, [])


@needs_systemd
def test_the_system_service_is_confined():
    """Its exposure is at most 1.2, and tools that make code at run time still work."""
    unit = UNITS / "llmprocd.service"
    args = ["systemd-analyze", "security", "--offline=yes", "--threshold=12", str(unit)]
    assert subprocess.run(args, capture_output=True, timeout=60, check=False).returncode == 0
    assert not any(line.startswith("MemoryDenyWriteExecute") for line in unit.read_text().splitlines())


def datagrams(sock: socket.socket, until: str, seconds: float = 20.0) -> str:
    sock.settimeout(seconds)
    heard = ""
    while until not in heard:
        heard += sock.recv(4096).decode() + "\n"
    return heard


@pytest.fixture
def notified(tmp_path):
    """A notify socket, and a daemon that is to tell it how it is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        environ = {
            **os.environ,
            "NOTIFY_SOCKET": str(tmp_path / "notify"),
            "WATCHDOG_USEC": "200000",
        }
        environ.pop("ANTHROPIC_API_KEY", None)
        args = [
            sys.executable,
            "-m",
            "llmprocd",
            "--socket",
            str(tmp_path / "s"),
            "--state-dir",
            str(tmp_path / "d"),
        ]
        daemon = subprocess.Popen(args, env=environ, stderr=subprocess.DEVNULL)
        yield sock, daemon
        daemon.kill()
        daemon.wait()


def test_readiness_watchdog_reload_and_stop_are_told(notified):
    """READY=1, then WATCHDOG=1 again and again, RELOADING with its clock, STOPPING=1, and status 0."""
    sock, daemon = notified
    heard = datagrams(sock, "READY=1")
    heard += datagrams(sock, "WATCHDOG=1") + datagrams(sock, "WATCHDOG=1")
    assert "STATUS=" in heard
    daemon.send_signal(signal.SIGHUP)
    heard = datagrams(sock, "RELOADING=1")
    assert "RELOADING=1\nMONOTONIC_USEC=" in heard
    datagrams(sock, "READY=1")
    daemon.send_signal(signal.SIGTERM)
    datagrams(sock, "STOPPING=1")
    assert daemon.wait(timeout=20) == 0


def test_a_manager_that_is_gone_is_no_trouble(notified, tmp_path):
    """Nobody hears the watchdog any more; clients are served on, and SIGTERM is a clean end."""
    sock, daemon = notified
    datagrams(sock, "READY=1")
    sock.close()
    (tmp_path / "notify").unlink()
    daemon.send_signal(signal.SIGHUP)
    call(tmp_path / "s", "sys.reload", [])
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(timeout=20) == 0


def test_a_manager_that_does_not_listen_holds_nobody_up(tmp_path):
    """Words that find no room are dropped; they are not waited for."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf:
        deaf.bind(str(tmp_path / "notify"))
        notifier = systemd.Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as filler:
            filler.setblocking(False)
            filler.connect(str(tmp_path / "notify"))
            with contextlib.suppress(BlockingIOError):
                while True:
                    filler.send(b"x")
        notifier.tell("WATCHDOG=1")


def connected(path: Path) -> socket.socket:
    """A connection, as soon as somebody listens."""
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            time.sleep(0.01)
        else:
            return sock


def call(path: Path, method: str, params: list[object]) -> object:
    with connected(path) as sock:
        sock.sendall(msgspec.msgpack.encode([0, 1, method, params]))
        sock.shutdown(socket.SHUT_WR)
        data = b""
        while chunk := sock.recv(65536):
            data += chunk
    _, _, error, result = msgspec.msgpack.decode(data)
    assert error is None, error
    return result


@needs_activate
def test_the_first_client_starts_the_daemon(tmp_path):
    """Socket activation: a listener that was handed over is served by its own path, and not removed."""
    path = tmp_path / "s"
    args = ["systemd-socket-activate", "-l", str(path), sys.executable, "-m", "llmprocd"]
    args += ["--state-dir", str(tmp_path / "d")]
    with subprocess.Popen(args, stderr=subprocess.DEVNULL) as activator:
        status = call(path, "sys.status", [])
        assert isinstance(status, dict)
        assert (status["pid"], status["socket"]) == (activator.pid, str(path))
        activator.terminate()
        assert activator.wait(timeout=20) == 0
    assert path.exists()


def test_descriptors_for_another_process_are_not_taken():
    """LISTEN_PID names somebody else: the variables go, and nothing is listened on."""
    environ = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "rpc", "HOME": "/"}
    assert systemd.listen_fds(environ) == []
    assert environ == {"HOME": "/"}
