"""`daemon`, and the daemon that is started when none answers."""
# ruff: noqa: PTH115, PTH116, PTH208

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import scripted_daemon
from ctlkit import Ctl

STAND_IN = """
import pkgutil
__path__ = pkgutil.extend_path(__path__, __name__)
__version__ = "0.1.0"
"""


@pytest.fixture
def startable(tmp_path):
    """A command line whose `python -m llmprocd` is the scripted daemon."""
    package = tmp_path / "lib" / "llmprocd"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    (package / "__main__.py").write_text("import scripted_daemon\nscripted_daemon.main()\n")
    ctl = Ctl(tmp_path / "deep" / "er" / "llmprocd.sock", tmp_path)
    del ctl.env["LLMPROC_NO_AUTOSTART"]
    here = Path(scripted_daemon.__file__).parent
    ctl.env["PYTHONPATH"] = f"{package.parent}:{here}:{here.parent.parent}"
    yield ctl
    done = ctl("daemon", "stop")
    assert done.status in {0, 125}


def starts(ctl):
    return Path(f"{ctl.path}.starts").read_text().count("started")


def test_daemon_start(startable):
    """It is there when the command returns; a second start finds it running."""
    done = startable("daemon", "start")
    assert (done.out, done.status) == ("", 0)
    assert startable("daemon", "status").status == 0
    assert startable("daemon", "start").status == 0
    assert starts(startable) == 1
    assert os.stat(Path(startable.path).parent).st_mode & 0o777 == 0o700


def test_daemon_status_shows_the_endpoints(startable):
    """Slots, who waits, how long it is held, and what is left of the limits that are known."""
    startable("daemon", "start")
    assert startable("daemon", "status").lines[1:] == [
        "  anthropic: 3 of 50 slots, 12 waiting, held for 11s, rpm 12 of 50 left, itpm 0 of 30k left",
        "  http://127.0.0.1:8041: 0 of 4 slots, 0 waiting",
    ]


@pytest.mark.parametrize("words", [("spawn", "demo", "hi"), ("run", "-n", "demo", "hi")])
def test_spawn_and_run_start_it(startable, words):
    """As if it had always been there."""
    assert startable(*words).status == 0
    assert starts(startable) == 1


@pytest.mark.parametrize(
    "words", [("ps",), ("kill", "7"), ("events",), ("daemon", "reload"), ("daemon", "stop")]
)
def test_other_commands_do_not(startable, words):
    """They have nothing to ask of an empty daemon."""
    done = startable(*words)
    assert done.status == 125
    assert done.err == f"llmprocctl: no daemon at {startable.path} (start it: llmprocctl daemon start)\n"
    assert not Path(startable.path).parent.exists()


def test_many_clients_start_one_daemon(startable):
    """All of them get it."""
    clients = [startable.start("spawn", "-i", "demo") for _ in range(8)]
    said = [client.communicate(timeout=60) for client in clients]
    assert sorted(out for out, _ in said) == [f"{pid}\n".encode() for pid in range(2, 10)]
    assert starts(startable) == 1


def test_it_can_be_forbidden(startable):
    """LLMPROC_NO_AUTOSTART=1."""
    startable.env["LLMPROC_NO_AUTOSTART"] = "1"
    assert startable("spawn", "demo", "hi").status == 125
    assert startable("daemon", "start").status == 125


def test_a_daemon_that_does_not_start(startable):
    """Its last words are shown, those of earlier failures not; exit 125."""
    startable.env["SCRIPTED_DAEMON_FAILS"] = "1"
    for _ in range(2):
        done = startable("spawn", "demo", "hi")
        assert done.status == 125
        assert done.err == "llmprocctl: the daemon did not start (exit 3)\n  llmprocd: the store is locked\n"


def test_it_outlives_the_session_that_started_it(startable):
    """It has a session of its own, no terminal, and no folder of anybody's."""
    startable("daemon", "start")
    pid = json.loads(startable("daemon", "status", "--json").out)["pid"]
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{pid}/fd/2") == f"{Path(startable.path).parent}/llmprocd.log"
    held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert not [name for name in held if name.endswith(".start") or name.startswith("pipe:")]


def test_daemon_stop_returns_when_it_is_gone(startable):
    """The process has ended, and the next one can start."""
    startable("daemon", "start")
    pid = json.loads(startable("daemon", "status", "--json").out)["pid"]
    assert startable("daemon", "stop").status == 0
    assert not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    assert startable("daemon", "status").status == 3
    assert startable("spawn", "demo", "hi").status == 0
    assert starts(startable) == 2


def test_a_stale_socket_is_no_daemon(startable):
    """Left by a daemon that was killed; the next spawn starts another."""
    startable("daemon", "start")
    pid = json.loads(startable("daemon", "status", "--json").out)["pid"]
    os.kill(pid, signal.SIGKILL)
    while "\nState:\tZ" not in status(pid):
        pass
    assert startable("ps").status == 125
    Path(startable.path).unlink()
    assert startable("spawn", "demo", "hi").status == 0


def status(pid):
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "\nState:\tZ"


def test_daemon_status(ctl, daemon):
    """One line for people, one object for programs; 3 when there is none."""
    assert ctl("daemon", "status").out.startswith(
        f"llmprocd 0.1.0 pid {os.getpid()}, up 2:03:03, unix://{ctl.path}, "
    )
    assert "3 running, 12 sleeping, $1.20" in ctl("daemon", "status").out
    assert json.loads(ctl("daemon", "status", "--json").out)["version"] == "0.1.0"
    assert ctl("--socket", "/nowhere/s", "daemon", "status").status == 3


def test_daemon_reload(ctl, daemon, sent):
    """It returns when the daemon has done it."""
    assert ctl("daemon", "reload").status == 0
    assert sent("sys.reload") == [{}]


def test_gc(ctl, daemon, sent):
    """One line for people, one object for programs; a dry run says that it is one."""
    assert ctl("gc").out == "freed 2 files, 30 messages, 4.8M\n"
    assert ctl("gc", "--dry-run").out == "would free 2 files, 30 messages, 0\n"
    assert json.loads(ctl("gc", "--json").out) == {"files": 2, "messages": 30, "bytes": 5_000_000}
    assert [asked["dry_run"] for asked in sent("store.gc")] == [False, True, False]


def test_daemon_without_sense(ctl, daemon):
    """Exit 2."""
    assert ctl("daemon", "restrat").status == 2
    assert ctl("daemon").status == 2


def test_a_python_is_not_needed_on_the_path(startable):
    """The daemon runs under this program's own interpreter."""
    startable.env["PATH"] = "/nonexistent"
    done = subprocess.run(
        startable.command("daemon", "start"), env=startable.env, cwd="/", check=False, timeout=60
    )
    assert done.returncode == 0
