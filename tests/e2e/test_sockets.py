"""The socket of the real daemon: its place, its words, its waiting; and the daemon's start and stop."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgpack
import pytest
from e2ekit import program, refused

TALK = program()


def raw(daemon):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(daemon.socket)
    return sock


def frames(sock, count):
    """The next frames that arrive."""
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False)
    found = []
    while len(found) < count:
        data = sock.recv(1 << 18)
        assert data, found
        unpacker.feed(data)
        found += list(unpacker)
    return found


# --- words ------------------------------------------------------------------------------------------


def test_hello(client, daemon):
    """Who is there, and who am I."""
    greeting = client.call("hello", proto=1, client="test")
    assert greeting["proto"] == 1
    assert greeting["server"] == "llmprocd"
    assert greeting["peer"] == {"pid": os.getpid(), "uid": os.getuid(), "gid": os.getgid()}
    assert greeting["limits"]["request"] == 1 << 20
    assert client.call("hello")["boot_id"] == greeting["boot_id"]


@pytest.mark.parametrize("shape", ["array", "nvim", "string"])
def test_errors_come_in_the_shape_that_was_asked_for(daemon, shape):
    """[errno, text, map], [0, text], or the text."""
    sock = raw(daemon)
    sock.sendall(msgpack.packb([0, 1, "hello", [{"errors": shape}]]))
    sock.sendall(msgpack.packb([0, 2, "proc.get", [{"pid": 99999}]]))
    _, (_, msgid, error, result) = frames(sock, 2)
    sock.close()
    text = "ESRCH: no such process: 99999"
    assert (msgid, result) == (2, None)
    if shape == "array":
        number, said, more = error
        assert (number, said, more["name"]) == (3, text, "ESRCH")
    else:
        assert error == {"nvim": [0, text], "string": text}[shape]


def test_every_method_is_in_the_table(client):
    """With help and JSON Schemas."""
    methods = {method["name"]: method for method in client.call("sys.api")["methods"]}
    named = [
        "hello", "sys.api", "sys.status", "sys.reload", "sys.stop", "proc.spawn", "proc.run",
        "proc.list", "proc.get", "proc.signal", "proc.wait", "proc.send", "proc.fork", "proc.goto",
        "proc.exec", "proc.limits", "proc.renice", "proc.rename", "proc.remove", "proc.history",
        "fd.list", "fd.stat", "fd.read", "fd.write", "events.read", "events.subscribe",
        "events.unsubscribe", "prog.list", "prog.check",
    ]  # fmt: skip
    assert set(named) <= set(methods)
    for method in methods.values():
        assert method["help"]
        assert json.loads(method["params"])
        assert json.loads(method["result"])


def test_an_unknown_argument_is_einval(client):
    """It is named, and nothing is done."""
    with refused("EINVAL", "colour"):
        client.call("proc.spawn", program=TALK, prompt="!say x", colour="red")
    with refused("EINVAL", "pid"):
        client.call("proc.signal", pid="seven", signal=1)
    with refused("EINVAL", "signal"):
        client.call("proc.signal", pid=7)


def test_calls_take_effect_in_the_order_sent(client):
    """Also many at once on one connection."""
    pid = client.spawn(TALK, "!sleep 1\n!say x", interactive=True)
    ids = [client.begin("proc.send", pid=pid, text=f"!say {number}") for number in range(50)]
    sequence = [client.end(msgid)["seq"] for msgid in ids]
    assert sequence == sorted(sequence)
    assert len(set(sequence)) == 50


def test_calls_that_look_into_the_history_take_effect_in_the_order_sent(client):
    """Two gotos in one breath: the last one is where the process stands."""
    pid = client.spawn(TALK, interactive=True)
    for word in ("one", "two"):
        client.run(pid, f"!say {word}")
    ids = [message["id"] for message in client.history(pid)]
    for number in range(10):
        places = [ids[number % 3], ids[3]]
        asked = [client.begin("proc.goto", pid=pid, to=place) for place in places]
        moved = [client.end(msgid) for msgid in asked]
        assert [move["head"] for move in moved] == places
        assert moved[1]["old_head"] == places[0]


def test_replies_that_wait_hold_no_others_up(client):
    """They come when they come."""
    pid = client.spawn(TALK, interactive=True)
    waiting = client.begin("proc.wait", pids=[pid])
    assert client.call("proc.list")["procs"][0]["pid"] == pid
    client.signal(pid, "TERM")
    assert client.end(waiting)["procs"][0]["status"] == 143


def test_cancel_ends_the_waiting_and_nothing_else(client, strict):
    """The request is answered with ECANCELED; the run goes on."""
    pid = client.spawn(TALK, interactive=True)
    with strict.held():
        running = client.begin("proc.run", pid=pid, prompt="!say x")
        client.until_wchan(pid, "api")
        client.sock.sendall(msgpack.packb([2, "$/cancel", [running]]))
        with refused("ECANCELED"):
            client.end(running)
    client.until(pid, lambda row: row["turns"] == 1)
    assert client.rests(pid)["run"]["message"] == "x"


def test_a_client_that_hangs_up_stops_nothing(client, daemon, strict):
    """Its process goes on."""
    with strict.held(), daemon.client() as other:
        pid = other.spawn(TALK, interactive=True)
        other.begin("proc.run", pid=pid, prompt="!say x")
        client.until_wchan(pid, "api")
    client.until(pid, lambda row: row["turns"] == 1)


def test_a_half_closed_client_is_still_answered(daemon):
    """`socat` and `nc -N` work."""
    sock = raw(daemon)
    sock.sendall(msgpack.packb([0, 1, "proc.spawn", [{"program": TALK, "prompt": "!sleep 0.2\n!say x"}]]))
    ((_, _, _, spawned),) = frames(sock, 1)
    sock.sendall(msgpack.packb([0, 2, "proc.wait", [{"pids": [spawned["pid"]]}]]))
    sock.shutdown(socket.SHUT_WR)
    ((_, msgid, error, ended),) = frames(sock, 1)
    assert (msgid, error, ended["procs"][0]["message"]) == (2, None, "x")
    assert sock.recv(1) == b""
    sock.close()


@pytest.mark.parametrize(
    "junk", [b"\xc1", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"\xdd\xff\xff\xff\xff" * 10]
)
def test_junk_ends_its_own_connection_only(client, daemon, junk):
    """The others do not notice."""
    sock = raw(daemon)
    sock.sendall(junk)
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(1 << 16):
        pass
    sock.close()
    assert client.call("sys.status")["pid"] == daemon.pid


# --- what is acknowledged ---------------------------------------------------------------------------


def test_what_was_answered_survives_kill_9(fresh):
    """A hundred spawns and messages, each acknowledged, and then the end."""
    fresh.start()
    with fresh.client() as client:
        pids = [client.spawn(TALK, interactive=True, name=f"n{number}") for number in range(100)]
        for number, pid in enumerate(pids):
            client.call("proc.send", pid=pid, text=f"!say number {number}", close=True)
        fresh.kill()
    fresh.start()
    with fresh.client() as client:
        rows = client.wait(*pids)
        assert [row["message"] for row in rows] == [f"number {number}" for number in range(100)]


# --- its place --------------------------------------------------------------------------------------


def test_socket_and_state_are_the_users_alone(house):
    """0600 and 0700."""
    assert stat.S_IMODE(Path(house.socket).stat().st_mode) == 0o600
    assert stat.S_IMODE(house.state.stat().st_mode) == 0o700


STRANGER = """
import os, socket, sys
os.chdir(sys.argv[1])
os.setresuid(65534, 65534, 65534)
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[2])
client.sendall(bytes.fromhex(sys.argv[3]))
sys.stdout.buffer.write(client.recv(4096))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_is_refused_though_the_mode_let_him_in(daemon):
    """The mode is the first gate, and not the only one: it began as 0600."""
    path = Path(daemon.socket)
    path.chmod(0o666)
    path.parent.chmod(0o711)
    try:
        ask = msgpack.packb([0, 1, "proc.list", []]).hex()
        words = [sys.executable, "-c", STRANGER, str(path.parent), path.name, ask]
        said = subprocess.run(words, capture_output=True, timeout=60, check=True).stdout
    finally:
        path.chmod(0o600)
        path.parent.chmod(0o700)
    assert msgpack.unpackb(said)[2][2]["name"] == "EPERM"


def test_a_second_daemon_is_refused(daemon):
    """On the same socket, and on the same state directory; the first one lives on."""
    for path, state in [(daemon.socket, daemon.folder / "other"), (f"{daemon.socket}2", daemon.state)]:
        second = subprocess.run(
            [sys.executable, "-m", "llmprocd", "--socket", str(path), "--state-dir", str(state)],
            env=daemon.environment(), capture_output=True, text=True, timeout=60, cwd="/", check=False,
        )  # fmt: skip
        assert second.returncode == 1
        assert "Traceback" not in second.stderr
        assert second.stderr.strip()
    with daemon.client() as client:
        assert client.call("sys.status")["pid"] == daemon.pid


def test_a_stale_socket_is_replaced(fresh):
    """kill -9 leaves one behind."""
    fresh.start()
    fresh.kill()
    assert Path(fresh.socket).exists()
    fresh.start()
    with fresh.client() as client:
        assert client.call("sys.status")["pid"] == fresh.pid


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_when_told_to(fresh, sig):
    """Exit 0, also with clients that wait; the socket is gone."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TALK, interactive=True)
        client.begin("proc.wait", pids=[pid])
        os.kill(fresh.pid, sig)
        assert fresh.ended() == 0
    assert not Path(fresh.socket).exists()


def test_sys_stop(fresh):
    """It answers first."""
    fresh.start()
    with fresh.client() as client:
        client.call("sys.stop")
        assert fresh.ended() == 0


def test_reload(fresh):
    """SIGHUP and sys.reload read the config again; a bad one is refused and the old one stays."""
    fresh.start()
    with fresh.client() as client:
        fresh.config.write_text("slots = 3\n")
        client.call("sys.reload")
        client.finish(TALK, "!say x")
        assert client.call("sys.status")["scheduler"][0]["slots"] == 3
        fresh.config.write_text("slots = none\n")
        with refused("ENOEXEC"):
            client.call("sys.reload")
        fresh.config.write_text("slots = 4\n")
        os.kill(fresh.pid, signal.SIGHUP)
        deadline = time.monotonic() + 30
        while client.call("sys.status")["scheduler"][0]["slots"] != 4:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_no_tool_outlives_the_daemon(fresh):
    """kill -9 takes them all along, what has daemonised itself too."""
    fresh.start()
    with fresh.client() as client:
        command = "setsid sleep 1000 & echo $! > pid; sleep 1000"
        client.spawn(program("bash"), f"!bash {command}", cwd=str(fresh.work))
        pidfile = fresh.work / "pid"
        while not (pidfile.exists() and pidfile.read_text().strip()):
            time.sleep(0.01)
        child = int(pidfile.read_text())
        fresh.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "arguments", [["--frobnicate"], ["--log-level", "shout"], ["--config", "/nowhere/x.toml"]]
)
def test_it_does_not_start_with_nonsense(arguments):
    """Status 1 or 2, and a line that says why."""
    run = subprocess.run(
        [sys.executable, "-m", "llmprocd", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode in {1, 2}
    assert "Traceback" not in run.stderr
    assert run.stderr.strip()
