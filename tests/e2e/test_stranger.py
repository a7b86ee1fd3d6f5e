"""What a stranger tries: wrong words, wrong places and hard ends, by way of the real command line.

Law: nothing a user types, and nowhere he starts the daemon, ends in a traceback.
"""

import contextlib
import errno
import json
import os
import pty
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from e2ekit import PATIENCE, Daemon, program, refused, toml
from prockit import ignore_interrupts, interrupt

DEMO = "demo"
SLOW = "!delay 60\n!say one two three four five six seven eight nine ten eleven twelve"


class Ctl:
    """llmprocctl as a user of this daemon calls it."""

    def __init__(self, daemon: Daemon) -> None:
        self.env = daemon.environment(LLMPROC_SOCKET=daemon.socket, LLMPROC_NO_AUTOSTART="1")
        self.cwd = daemon.work

    def start(self, *words, stdin=subprocess.DEVNULL, preexec_fn=None, **env):
        return subprocess.Popen(
            [sys.executable, "-m", "llmprocctl", *words],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.env | env,
            cwd=self.cwd,
            preexec_fn=preexec_fn,  # noqa: PLW1509
        )

    def __call__(self, *words, stdin=None, **env):
        """Exit status, stdout, stderr."""
        child = self.start(*words, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE, **env)
        out, err = child.communicate(stdin, timeout=PATIENCE)
        assert b"Traceback" not in err, err.decode()
        return child.returncode, out.decode(errors="replace"), err.decode(errors="replace")


@pytest.fixture
def ctl(daemon):
    """The command line, and a daemon that answers it."""
    return Ctl(daemon)


# --- words that mean nothing ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["spawn"], 2, "llmprocctl: spawn: Missing argument 'PROGRAM'."),
        (["nosuch"], 2, "llmprocctl: No such command 'nosuch'."),
        (["ps", "--nosuch"], 2, "llmprocctl: ps: No such option"),
        (["spawn", DEMO], 2, "demo has no prompt of its own: give one, or -i to send it later"),
        (["run", DEMO], 2, "llmprocctl: run: demo has no prompt of its own: give one\n"),
        (["spawn", DEMO, " "], 2, "llmprocctl: spawn: prompt: is blank"),
        (["spawn", "--nice", "50", DEMO, "x"], 2, "50 is not in the range from -20 to 19"),
        (["spawn", "--access", "root", DEMO, "x"], 2, "access: 'root' is none of read, write, admin"),
        (["spawn", "--name", "a/b", DEMO, "x"], 2, "name: 'a/b'"),
        (["spawn", "--cwd", "/nonexistent", DEMO, "x"], 126, "cwd: /nonexistent is no folder"),
        (["spawn", "nosuch", "x"], 127, "llmprocctl: spawn: nosuch: no such program"),
        (["run", DEMO, b"\xff"], 2, "llmprocctl: run: '\\udcff' is not UTF-8 text"),
        (["send", "1", "x"], 1, "llmprocctl: send: 1: process 1 is the daemon itself"),
        (["kill", "1"], 1, "llmprocctl: kill: 1: the daemon itself cannot be signalled"),
        (["kill", "-NOSUCH", "99"], 2, "llmprocctl: kill: NOSUCH: no such signal (there are HUP INT "),
        (["kill", "-99", "99"], 2, "llmprocctl: kill: 99: no such signal"),
        (["kill", "-0", "999999"], 1, "llmprocctl: kill: 999999: no such process"),
        (["kill", "--", "-999999"], 1, "llmprocctl: kill: -999999: no such process"),
        (["renice", "50", "999999"], 2, "llmprocctl: renice: 50: not a number from -20 to 19"),
        (["logs", "-n", "-1", "999999"], 2, "-1 is not in the range"),
        (["events", "999999"], 1, "llmprocctl: events: 999999: no such process"),
        (["cat", "-p", "999999", "fd:1"], 1, "llmprocctl: cat: 999999: no such process"),
        (["wait", "999999"], 127, "llmprocctl: wait: 999999: no such process"),
        (["call", "proc.list", "[]"], 2, "the arguments are no JSON object"),
    ],
)
def test_a_wrong_word_is_a_sentence_and_a_status(ctl, words, status, said):
    """Each mistake is named on stderr in the command's own voice; nothing is printed as data."""
    got, out, err = ctl(*words)
    assert (got, said in err) == (status, True), err
    assert out.count("\n") <= 1  # a header at most


def test_no_words_are_a_call_for_help(ctl):
    """Without a command the help is shown, and that is a usage error."""
    status, _, err = ctl()
    assert (status, err.startswith("Usage: llmprocctl")) == (2, True)


def test_bytes_on_stdin_that_are_no_json_are_refused(ctl):
    """`call METHOD -` reads any bytes, and says what is wrong with them."""
    status, _, err = ctl("call", "proc.list", "-", stdin=b"\xff\xfe")
    assert (status, "the arguments are no JSON" in err) == (2, True)


def test_faults_of_a_program_name_the_file_once_a_line(ctl, daemon):
    """`run` says FILE:LINE: KEY: what, as `check` does, and exits 126."""
    path = daemon.work / "bad.toml"
    path.write_text('[model]\nnme = "x"\nprovider = "script"\n')
    status, _, err = ctl("run", "./bad.toml", "x")
    assert status == 126
    assert err.splitlines() == [
        f"llmprocctl: run: {path}:1: model.name: is missing",
        f"{path}:2: model.nme: unknown key; did you mean name?",
    ]


# --- pid 1, and what the socket says of it ----------------------------------------------------------


def test_the_daemon_is_a_process_that_can_be_looked_at(ctl):
    """Pid 1 has no descriptors, messages or limits; to ask is no error."""
    assert ctl("fd", "1")[0] == ctl("history", "1")[0] == ctl("limits", "1")[0] == 0
    status, out, _ = ctl("inspect", "1", "--json")
    row = json.loads(out)
    assert (status, row["program"], row["descriptors"], row["limits"]) == (0, "init", [], [])


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("proc.send", {"text": "x"}), ("proc.run", {}), ("proc.fork", {}), ("proc.goto", {"to": "m1"}),
        ("proc.renice", {"nice": 1}), ("proc.rename", {"name": "x"}),
        ("proc.limits", {"set": {"wall": "1h"}}), ("fd.write", {"data": "x"}), ("fd.read", {"fd": 1}),
    ],
)  # fmt: skip
def test_the_daemon_is_no_conversation(client, method, more):
    """What would change pid 1 is EPERM: it exists, so ESRCH would be a lie."""
    with refused("EPERM", "process 1 is the daemon itself"):
        client.call(method, pid=1, **more)


# --- calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cwd", "name"), [("rel", "EINVAL"), ("/nonexistent", "ENOENT"), ("a\0b", "EINVAL")])
def test_a_working_directory_must_be_there(client, cwd, name):
    """A process is not started in a folder in which no tool could run."""
    with refused(name, "cwd"):
        client.spawn(DEMO, "x", cwd=cwd)


def test_a_file_is_no_working_directory(client, daemon):
    """ENOENT as for a missing one."""
    with refused("ENOENT", "is no folder"):
        client.spawn(DEMO, "x", cwd=str(daemon.config))


def test_parts_of_a_descriptor_exclude_each_other(client):
    """A page, lines or a pattern: two of them at once would leave one unheard."""
    pid, _ = client.finish(DEMO, "!say x")
    with refused("EINVAL", "only one"):
        client.call("fd.read", pid=pid, fd=1, page=1, line=1)


def test_reading_beyond_the_end_is_the_end(client):
    """No bytes, the size, and eof once the descriptor is complete."""
    pid, _ = client.finish(DEMO, "!say x")
    part = client.call("fd.read", pid=pid, fd=1, offset=1000)
    assert part == {"offset": 1000, "data": b"", "size": 2, "eof": True}


def test_an_event_cursor_outlives_the_daemon(fresh):
    """next_seq from before a kill -9 goes on exactly behind what was read."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(DEMO, interactive=True)
        client.run(pid, "!say one")
        first = client.call("events.read", after_seq=0)
    fresh.restart()
    with fresh.client() as client:
        client.run(pid, "!say two")
        second = client.call("events.read", after_seq=first["next_seq"])
    assert second["lost"] == 0
    said = [
        event["text"] for event in [*first["events"], *second["events"]] if event["type"] == "api_response"
    ]
    assert said == ["one", "two"]


def test_every_method_has_its_schemas(client):
    """sys.api lists each method once, with JSON Schemas that refuse unknown arguments."""
    methods = client.call("sys.api")["methods"]
    names = [method["name"] for method in methods]
    assert len(set(names)) == len(names)
    for method in methods:
        schema = json.loads(method["params"])
        (definition,) = [one for name, one in schema["$defs"].items() if schema["$ref"].endswith(f"/{name}")]
        assert definition["additionalProperties"] is False, method["name"]
        assert json.loads(method["result"])


# --- listings ---------------------------------------------------------------------------------------


def test_every_listing_has_ids_and_json(ctl, client):
    """-q prints one id a line, --json one object a line, of the same rows."""
    pid = str(client.spawn(DEMO, "!say x", interactive=True))
    client.rests(int(pid))
    for words, key in (
        (["ps", pid], "pid"),
        (["fd", pid], "fd"),
        (["history", pid], "id"),
        (["events", pid], "seq"),
        (["limits", pid], "resource"),
        (["programs"], "name"),
        (["api"], "name"),
    ):
        ids = ctl(*words, "-q")[1].splitlines()
        rows = [json.loads(line) for line in ctl(*words, "--json")[1].splitlines()]
        found = [f"{row['pid']}/fd:{row['fd']}" if key == "fd" else str(row[key]) for row in rows]
        assert ids == found, words
        assert ids, words


# --- bytes ------------------------------------------------------------------------------------------


def test_any_bytes_on_stdin_become_a_descriptor(ctl):
    """What is no text is not forced into one: it is fd 3, to the byte."""
    data = bytes(range(256)) * 500
    status, out, _ = ctl("spawn", DEMO, "-", stdin=data)
    assert status == 0
    assert ctl("wait", out.strip())[0] == 0
    child = ctl.start("cat", f"{out.strip()}/fd:3")
    assert child.communicate(timeout=PATIENCE) == (data, b"")


def test_control_characters_do_not_reach_a_listing(ctl, client):
    """What a model or a user says cannot move the cursor of whoever lists it."""
    pid = client.spawn(DEMO, "clear \x1b[2J\rover", interactive=True)
    client.rests(pid)
    for words in (["history"], ["history", "--graph"], ["events"]):
        out = ctl(*words, str(pid))[1]
        assert "\\x1b[2J\\x0dover" in out
        assert "\x1b" not in out


# --- where the daemon cannot be ---------------------------------------------------------------------


def started(*words, **env):
    """Exit status and stderr of a daemon that should not start."""
    kept = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", "llmprocd", *words],
        env=kept | env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return done.returncode, done.stderr


def test_places_that_cannot_be_used_are_named(tmp_path):
    """A state directory or socket that cannot be is one line with its path, and exit 1."""
    (tmp_path / "file").write_text("")
    socket, state = str(tmp_path / "s"), str(tmp_path / "state")
    file = str(tmp_path / "file")
    exists, no_folder = os.strerror(errno.EEXIST), os.strerror(errno.ENOTDIR)
    assert started("--socket", socket, "--state-dir", file) == (1, f"llmprocd: {file}: {exists}\n")
    assert started("--socket", socket, "--state-dir", f"{file}/x") == (
        1,
        f"llmprocd: {file}/x: {no_folder}\n",
    )
    for path in (file, str(tmp_path)):
        status, said = started("--socket", path, "--state-dir", state)
        assert (status, said) == (1, f"llmprocd: {path} is there and is no socket\n")
    status, said = started("--socket", f"{file}/x/s", "--state-dir", state)
    assert (status, no_folder in said, "Traceback" in said) == (1, True, False)


def test_a_second_daemon_is_told_of_the_first(daemon, tmp_path):
    """Neither the socket nor the state directory is shared; who has it is said."""
    for words in (
        ("--socket", daemon.socket, "--state-dir", str(tmp_path / "other")),
        ("--socket", str(tmp_path / "s"), "--state-dir", str(daemon.state)),
    ):
        status, said = started(*words)
        assert (status, f"another daemon (pid {daemon.pid}) has" in said) == (1, True), said


def test_what_is_kept_is_the_owners_alone(fresh):
    """No file of the state directory can be read by others, whatever the folder's own mode."""
    fresh.state.mkdir(mode=0o755)
    fresh.start()
    for path in (fresh.state / "store.db", fresh.state / "store.db-wal", fresh.state / "blobs"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_a_bad_config_is_refused_and_the_old_one_stays(fresh):
    """`daemon reload` says what is wrong and exits 1; SIGHUP logs it; the daemon goes on."""
    fresh.start()
    ctl = Ctl(fresh)
    fresh.config.write_text('slots = "many"\n')
    status, _, err = ctl("daemon", "reload")
    assert (status, f"{fresh.config}: slots: must be `int`, got `str`" in err) == (1, True), err
    fresh.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + PATIENCE
    while "config not reloaded" not in fresh.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert ctl("daemon", "status")[0] == 0


def test_no_autostart_is_a_reason_that_is_given(tmp_path, daemon):
    """`daemon start` does not advise itself when it is forbidden."""
    ctl = Ctl(daemon)
    path = str(tmp_path / "s")
    there_is_none = f"llmprocctl: no daemon at {path} (start it: llmprocctl daemon start)\n"
    assert ctl("--socket", path, "spawn", DEMO, "x") == (125, "", there_is_none)
    forbidden = f"llmprocctl: no daemon at {path}; LLMPROC_NO_AUTOSTART forbids starting one\n"
    assert ctl("--socket", path, "daemon", "start") == (125, "", forbidden)
    assert ctl("--socket", path, "daemon", "status")[0] == 3


# --- hard ends --------------------------------------------------------------------------------------


def is_connected(pid):
    """Whether a process has a connection to a Unix socket."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    connected = {f"socket:[{row[6]}]" for row in rows if row[5] == "03"}
    held = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            held.add(str(fd.readlink()))
    return not held.isdisjoint(connected)


def test_whoever_watches_a_daemon_that_dies_is_told(fresh, strict):
    """run, attach, wait and logs -f end with 125; the process is there when the daemon is back."""
    fresh.start()
    ctl = Ctl(fresh)
    path = fresh.work / "talk.toml"
    path.write_text(toml(program()))
    with strict.held(), fresh.client() as client:
        pid = client.spawn(str(path), "!say one two")
        client.until_wchan(pid, "api")
        watching = [ctl.start(*words, str(pid)) for words in (["attach"], ["wait"], ["logs", "-f"])]
        running = ctl.start("run", str(path), "!say one two")
        client.until_event(pid + 1, "api_request")
        for child in watching:
            while not is_connected(child.pid):
                time.sleep(0.01)
        fresh.kill()
    for child in watching:
        _, err = child.communicate(timeout=PATIENCE)
        assert (child.returncode, b"went away" in err) == (125, True), (child.args, err)
    _, err = running.communicate(timeout=PATIENCE)
    assert (running.returncode, f"see llmprocctl wait {pid + 1}".encode() in err) == (125, True)
    fresh.start()
    assert ctl("wait", str(pid), str(pid + 1))[0] == 0
    assert ctl("cat", f"{pid}/fd:1")[1].startswith("one two")


def test_the_first_interrupt_of_run_is_int(ctl, client):
    """The first ^C is INT: what was streamed is kept, and the status is 130."""
    client.call("events.subscribe", types=["text"])
    child = ctl.start("run", "--json", DEMO, SLOW, preexec_fn=ignore_interrupts)
    while not client.notices:
        client.receive()
    interrupt(child)
    out, _ = child.communicate(timeout=PATIENCE)
    result = json.loads(out)
    assert (child.returncode, result["status"], result["stop_reason"]) == (130, 130, "interrupted")
    assert result["message"].startswith("one")


def test_attach_on_a_terminal(ctl, client):
    """Lines typed are sent, blank ones are not, what is said comes back, ^P^Q leaves it alone."""
    pid = client.spawn(DEMO, interactive=True)
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-m", "llmprocctl", "attach", str(pid)], ctl.env)
    shown = _until(terminal, b"^P^Q detaches")
    os.write(terminal, b"   \n!say good \x1b[31mmorning\n")
    client.until(pid, lambda row: row["turns"] == 1 and row["wchan"] == "fd:0")
    shown += _until(terminal, b"morning\r\n")
    os.write(terminal, b"\x10\x11")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
    assert client.get(pid)["status"] is None
    assert client.types(pid).count("turn_start") == 1


def _until(terminal, words):
    """What a terminal shows until it has shown these words."""
    shown = b""
    while words not in shown:
        shown += os.read(terminal, 4096)
    return shown


def test_a_program_file_is_an_executable(ctl, daemon):
    """With the #! line and the x bit it runs like any command, and stdin is appended."""
    bin_ = daemon.work / "bin"
    bin_.mkdir()
    (bin_ / "llmprocctl").write_text(f'#!/bin/sh\nexec {sys.executable} -m llmprocctl "$@"\n')
    (bin_ / "llmprocctl").chmod(0o755)
    path = daemon.work / "say.toml"
    path.write_text("#!/usr/bin/env -S llmprocctl run\n" + toml(program(provider="script")))
    path.chmod(0o755)
    env = ctl.env | {"PATH": f"{bin_}:{os.environ['PATH']}"}
    done = subprocess.run(
        [path, "be", "brief"],
        input=b"of stdin",
        env=env,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"You said: be brief\n\nof stdin\n"), done.stderr


# --- where the sources are --------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_sources_may_be_in_a_folder_with_a_space(tmp_path):
    """`make demo` hands the script one word, the folder of the programs, wherever it is."""
    root = Path(__file__).parents[2]
    folder = tmp_path / "a b"
    (folder / "tests/demo").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "tests/demo/demo.sh"):
        shutil.copy(root / name, folder / name)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    said = subprocess.check_output(["make", "-n", "demo"], cwd=folder, env=ours, text=True)
    script, *words = shlex.split(said.splitlines()[-1])
    assert (script, [(folder / word).name for word in words]) == ("tests/demo/demo.sh", ["bin"])
    (folder / words[0]).mkdir(parents=True)
    llmprocctl = folder / words[0] / "llmprocctl"
    llmprocctl.write_text('#!/bin/sh\necho found "$0" >&2\nexit 9\n', encoding="utf-8")
    llmprocctl.chmod(0o755)
    done = subprocess.run([folder / script, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert f"found {llmprocctl}\n" in done.stderr
