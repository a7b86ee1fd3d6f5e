"""How a command finds the daemon, and how it ends."""
# ruff: noqa: PTH109, PTH123

import os
import signal
import socket
import subprocess
import threading
from contextlib import closing

import msgpack
import pytest
from ctlkit import Ctl
from scripted_daemon import ScriptedDaemon

from llmprocctl import _mini
from llmprocctl.client import Client, LostError, RefusedError, UnreachableError, refused


def test_no_daemon(ctl):
    """Exit 125, with the way to start one."""
    done = ctl("ps")
    assert (done.out, done.status) == ("", 125)
    assert done.err == f"llmprocctl: no daemon at {ctl.path} (start it: llmprocctl daemon start)\n"


def test_a_socket_nobody_listens_to(ctl):
    """The same."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(ctl.path)
    assert "no daemon at" in ctl("ps").err
    assert ctl("ps").status == 125


def test_a_file_that_is_no_socket(ctl):
    """The same, whatever it is."""
    with open(ctl.path, "w") as file:
        file.write("x")
    assert ctl("ps").status == 125
    assert ctl("--socket", f"{ctl.path}/below", "ps").status == 125


@pytest.mark.parametrize(
    "words", [("--socket", "{}"), ("--socket={}",), ("-H", "unix://{}"), ("--host=unix://{}",)]
)
def test_where_the_daemon_is(ctl, daemon, words):
    """--socket and --host come before the environment."""
    daemon.add("coder", pid=7)
    done = ctl(*(word.format(ctl.path) for word in words), "ps", "-q", env={"LLMPROC_SOCKET": "/nowhere"})
    assert done.lines == ["7"]


def test_a_relative_socket(ctl, daemon):
    """It is below the folder one is in."""
    assert ctl("--socket", "llmprocd.sock", "ps").status == 0


@pytest.mark.parametrize(
    ("url", "text"),
    [("ssh://me@host", "not supported"), ("http://x", "not a daemon's address"), ("unix://x", "not a")],
)
def test_addresses_that_do_not_work(ctl, daemon, url, text):
    """A usage error that says what does."""
    done = ctl("-H", url, "ps")
    assert done.status == 2
    assert text in done.err
    assert not daemon.calls


def test_a_long_socket_path(tmp_path):
    """Longer than a socket address can hold."""
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    here = os.getcwd()
    os.chdir(folder)
    scripted = ScriptedDaemon("s")
    os.chdir(here)
    try:
        assert Ctl(folder / "s", tmp_path)("ps").status == 0
        assert Ctl(folder / "none", tmp_path)("ps").status == 125
    finally:
        scripted.close()


def test_a_name_too_long_for_any_address(ctl):
    """An error, no traceback."""
    done = ctl("--socket", "/tmp/" + "x" * 200, "ps")
    assert done.status == 125
    assert "Traceback" not in done.err


def test_version_and_help(ctl):
    """Without a daemon."""
    assert ctl("--version").out == "llmprocctl 0.1.0\n"
    assert "cat" in ctl("--help").out
    assert ctl().status in {0, 2}


def test_every_command_has_help_and_an_example(ctl):
    """Its first line says what it does."""
    from llmprocctl import table

    for name, command in table.COMMANDS.items():
        assert command.help.endswith(".")
        assert command.example.startswith(("llmprocctl ", "git diff | llmprocctl "))
        assert name in command.example
    done = ctl("spawn", "--help")
    assert "Start a process and print its pid." in done.out
    assert "Example: llmprocctl spawn" in done.out


@pytest.mark.parametrize(
    "words",
    [("nonsense",), ("ps", "--nonsense"), ("spawn",), ("--nonsense",), ("wait", "--timeout", "x", "7")],
)
def test_usage_errors(ctl, words):
    """Exit 2, on stderr."""
    done = ctl(*words)
    assert (done.status, done.out) == (2, "")
    assert done.err


def test_a_reader_that_goes_away_ends_it_in_silence(ctl, daemon):
    """As every filter's: SIGPIPE."""
    daemon.add("coder", pid=7)
    daemon.files[7, 3] = [b"x\n" * 1_000_000, True, "bash"]
    reading = ctl.start("cat", "7/fd:3")
    assert reading.stdout.read(2) == b"x\n"
    reading.stdout.close()
    assert reading.wait(30) == -signal.SIGPIPE
    with reading.stderr:
        assert reading.stderr.read() == b""


def test_a_full_disk_is_told(ctl, daemon):
    """Exit 1: what was to be written was not."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            ctl.command("ps"), env=ctl.env, stdout=full, stderr=subprocess.PIPE, check=False, timeout=30
        )
    assert done.returncode == 1
    assert done.stderr == b"llmprocctl: ps: stdout: No space left on device\n"


def test_closed_descriptors(ctl, daemon):
    """Without stdout it fails; without stderr it goes on."""
    daemon.add("coder", pid=7)
    shell = ["sh", "-c", '"$@" >&-', "sh", *ctl.command("ps")]
    assert (
        subprocess.run(shell, env=ctl.env, check=False, timeout=30, stderr=subprocess.DEVNULL).returncode == 1
    )
    shell = ["sh", "-c", '"$@" 2>&-', "sh", *ctl.command("kill", "99", "7")]
    assert subprocess.run(shell, env=ctl.env, check=False, timeout=30).returncode == 1
    assert daemon.procs[7]["status"] == 143


@pytest.mark.parametrize(
    "words", [("ps",), ("ps", "99"), ("wait", "99"), ("run", "demo", "x"), ("programs",)]
)
def test_nothing_is_left_open(ctl, daemon, words):
    """Where Python tells of what was never closed, it has nothing to tell."""
    strict = ctl(*words, env={"PYTHONWARNINGS": "error"})
    assert (strict.err, strict.status) == ((plain := ctl(*words)).err, plain.status)


def test_an_interrupt_is_130(ctl, daemon):
    """Without a word."""
    daemon.add("coder", pid=7)
    waiting = ctl.start("wait", "7")
    while not [call for call in daemon.calls if call[0] == "proc.wait"]:
        pass
    waiting.send_signal(signal.SIGINT)
    assert waiting.communicate(timeout=30) == (b"", b"")
    assert waiting.returncode == 130


class Answers:
    """A server that answers anything with the same bytes, in pieces."""

    def __init__(self, path, *pieces, frames=1):
        self.frames = frames
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.pieces = pieces
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        sock, _ = self.listener.accept()
        with sock, self.listener:
            unpacker = msgpack.Unpacker()
            heard = []
            while len(heard) < self.frames:
                unpacker.feed(sock.recv(65536))
                heard += unpacker
            try:
                for piece in self.pieces:
                    sock.sendall(piece)
            except BrokenPipeError:
                return  # it has read enough


@pytest.mark.parametrize(
    "pieces", [[b"HTTP/1.1 400 Bad Request\r\n"], [b"\xc1"], [b""], [b"\x94\x01\x01"], [b"\x90"]]
)
def test_what_is_no_daemon(ctl, pieces):
    """Exit 125, no traceback."""
    answers = Answers(ctl.path, *pieces)
    done = ctl("ps")
    assert done.status == 125
    assert "Traceback" not in done.err
    answers.thread.join(10)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_answer_in_pieces(tmp_path, step):
    """However it was cut, and with something else before and behind it."""
    result = {"rows": [{"i": i, "text": "x" * (i % 50)} for i in range(100)]}
    whole = b"".join(map(msgpack.packb, ([2, "event", [{}]], [1, 1, None, result], [1, 2, None, "next"])))
    answers = Answers(tmp_path / "s", *(whole[i : i + step] for i in range(0, len(whole), step)))
    client = Client(str(tmp_path / "s"))
    with closing(client):
        assert client.take(client.send("x")) == result
        assert client.take(2) == "next"
        with pytest.raises(LostError):
            client.take(3)
    answers.thread.join(10)


def test_answers_in_any_order(tmp_path):
    """Each goes to whoever asked; a cancelled one to nobody."""
    frames = [msgpack.packb([1, msgid, None, msgid]) for msgid in (3, 1, 2)]
    answers = Answers(tmp_path / "s", *frames, frames=4)
    client = Client(str(tmp_path / "s"))
    with closing(client):
        one, two, three = (client.send("x") for _ in range(3))
        client.drop(two)
        assert client.take(one) == one
        assert client.answered(three)
        assert client.take(three) == three
        with pytest.raises(UnreachableError):
            client.take(two)
    answers.thread.join(10)


@pytest.mark.parametrize(
    ("error", "name", "text"),
    [
        ([3, "ESRCH: no such process: 9", {"name": "ESRCH"}], "ESRCH", "no such process: 9"),
        ("ESRCH: no such process: 9", "ESRCH", "no such process: 9"),
        ([0, "something: else"], "", "something: else"),
        ({"odd": 1}, "", "{'odd': 1}"),
    ],
)
def test_errors_of_any_shape(error, name, text):
    """The three that the protocol has, and what a stranger may send."""
    found = refused(error)
    assert isinstance(found, RefusedError)
    assert (found.name, found.text) == (name, text)


def test_requests_are_what_the_protocol_says(tmp_path):
    """[0, msgid, method, [arguments]], no argument that is None, and none at all without any."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        client = Client(str(tmp_path / "s"))
        peer, _ = listener.accept()
        with peer, closing(client):
            client.send("a.b", x=1, y=None, z=False)
            client.send("c.d", y=None)
            unpacker = msgpack.Unpacker()
            unpacker.feed(peer.recv(65536))
            assert list(unpacker) == [[0, 1, "a.b", [{"x": 1, "z": False}]], [0, 2, "c.d", []]]
    assert _mini.pack([0, 1, "x", []]) == b"\x94\x00\x01\xa1x\x90"
