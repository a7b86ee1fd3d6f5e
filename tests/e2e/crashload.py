"""A rich workload over the socket that goes on when the daemon dies, and what must be true of it at the end.

Law: what the daemon acknowledged is never asked for again; what it did not answer is looked for first.
"""

import contextlib
import json
import socket
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from e2ekit import Client, Daemon, HungUpError, RefusedError, program, script, texts, toml, use

TOLD = "Interrupted: the daemon was restarted"
BEGUN = {"turn_start", "api_request", "tool_start", "text", "state"}
BASH = program("bash", "exit")
TALK = program()
WORKER = program(
    "bash", "read_file", "write_file", "edit_file", "list_dir", "glob", "grep", "calculator", "read_fd",
    "fd_to_file", "write_stderr", "fork", "spawn", "kill", "wait", "send", "exit",
    model={"max_iterations": 60},
    file_descriptor={"max_direct_output_chars": 2000, "default_page_size": 1000},
)  # fmt: skip


def logs(word: str) -> str:
    """A tool call with a side effect that is counted."""
    return f"!bash echo {word} >> log"


WORK = script(
    logs("A1"), f"!& {logs('A2')}",
    use("write_file", file_path="w", content="one\n"),
    f"!& {use('calculator', expression='6*7')}", f"!& {use('write_stderr', message='A here')}",
    use("edit_file", file_path="w", old_text="one", new_text="two"),
    use("read_file", file_path="w"), f"!& {use('glob', pattern='w')}",
    f"!& {use('grep', pattern='two', path='w')}", f"!& {use('list_dir')}",
    "!bash seq 20000", "!bash seq 1000", use("fd_to_file", fd="fd:3", file_path="copy"),
    f"!fork {logs('C1')}\\n!say c1 | {logs('C2')}\\n!say c2", f"!& {logs('A3')}",
    f"!spawn {logs('S1')}\\n!say s1",
    use("spawn", prompt="!sleep 100", wait=False), '!kill {"pid": {{result:[0-9]+}}, "signal": "TERM"}',
    "!wait {{result:process ([0-9]+)}}",
    "!say A done",
)  # fmt: skip


class Gate:
    """A way to the endpoint that lets nothing through until it is opened."""

    def __init__(self, url: str) -> None:
        beyond = urlsplit(url)
        self._beyond = (beyond.hostname, beyond.port)
        self._door = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._door.getsockname()[1]}"

    def open(self) -> None:
        threading.Thread(target=self._let_in, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)  # wakes who waits in accept
        self._door.close()

    def _let_in(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._door.accept()
                far = socket.create_connection(self._beyond)
                threading.Thread(target=join, args=(near, far), daemon=True).start()


def join(near: socket.socket, far: socket.socket) -> None:
    """Make one connection of two, until both sides have ended."""
    with near, far:
        back = threading.Thread(target=pump, args=(far, near), daemon=True)
        back.start()
        pump(near, far)
        back.join()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes on until there are no more."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class Load:
    """One run of the workload, on a daemon of its own."""

    def __init__(self, daemon: Daemon, gate: Gate) -> None:
        self.daemon = daemon
        self.gate = gate
        self.client: Client = daemon.client()
        self.watcher = self._watch()
        self.deaths = 0
        self.pids: dict[str, int] = {}
        self.sent: list[tuple[int, str]] = []
        self.seen: list[Any] = []
        self.removed: list[int] = []

    @property
    def work(self) -> Path:
        return self.daemon.work

    # --- calls that outlive the daemon --------------------------------------------------------------

    def do(self, call: Callable[[Client], Any], done: Callable[[Client], bool] | None = None) -> Any:
        """Make a call; if the daemon dies over it, start it again, and repeat the call unless it is done."""
        while True:
            try:
                self._look()
                return call(self.client)
            except HungUpError:
                self._revive()
                if done is not None and done(self.client):
                    return None

    def _revive(self) -> None:
        self.deaths += 1
        assert self.deaths == 1, f"it died again:\n{self.daemon.log.read_text()}"
        self.client.close()
        assert self.daemon.ended() == 137, self.daemon.log.read_text()
        self._look()
        self.watcher.close()
        self.daemon.start()
        self.client, self.watcher = self.daemon.client(), self._watch()

    def _watch(self) -> Client:
        """A connection to which all events are pushed."""
        watcher = self.daemon.client()
        watcher.call("events.subscribe", after_seq=0)
        watcher.sock.setblocking(False)
        return watcher

    def _look(self) -> None:
        """Take in what has been pushed: what was shown once may never be taken back."""
        with contextlib.suppress(BlockingIOError, HungUpError):
            while True:
                self.watcher.receive()
        for name, (told,) in self.watcher.notices:
            assert name == "event", "a reader that keeps up has lost events"
            self.seen += told["events"]
        self.watcher.notices.clear()

    def has(self, pid: int, type_: str, **fields: Any) -> Callable[[Client], bool]:
        """Is there such an event?"""

        def has(client: Client) -> bool:
            events = client.events(pid, types=[type_])
            return any(all(event.get(key) == value for key, value in fields.items()) for event in events)

        return has

    def spawn(self, name: str, prog: Any, prompt: str | None = None, **more: Any) -> int:
        asked = {"cwd": str(self.work), "request_id": name, **more}
        pid = self.pids[name] = self.do(lambda client: client.spawn(prog, prompt, **asked))
        return pid

    def send(self, pid: int, text: str) -> None:
        self.do(lambda client: client.send(pid, text), self.has(pid, "input", text=text))
        self.sent.append((pid, text))

    def close(self, pid: int) -> None:
        self.do(lambda client: client.call("proc.send", pid=pid, close=True))

    def signal(self, pid: int, sig: str) -> None:
        self.do(lambda client: client.signal(pid, sig), self.has(pid, "signal", signal=sig))

    def turns(self, pid: int, count: int) -> Any:
        """Wait until a process rests after that many turns."""
        at_rest = {"fd:0", "-"}
        return self.do(
            lambda client: client.until(
                pid, lambda row: row["turns"] >= count and row["wchan"] in at_rest and not row["waiting"]
            )
        )

    def wait(self, pid: int) -> Any:
        return self.do(lambda client: client.wait(pid))

    def head(self, pid: int) -> str:
        return self.do(lambda client: client.get(pid))["head"]

    def until_wchan(self, pid: int, *wchans: str) -> None:
        """Wait until a process waits for one of these, or has died meanwhile and is past it."""
        past = (*wchans, "fd:0", "-")
        self.do(
            lambda client: client.until(
                pid, lambda row: row["wchan"] in past and row["turns"] + row["waiting"] >= 0
            )
        )

    # --- the workload -------------------------------------------------------------------------------

    def run(self) -> None:
        """All of it."""
        worker = self.spawn("worker", WORKER, WORK)
        for part in (
            self.travels,
            self.is_signalled,
            self.is_held,
            self.fails,
            self.is_changed,
            self.grows,
            self.is_forked,
        ):
            part()
        assert self.wait(worker)["message"] == "A done"
        self.check_worker(worker)
        self.check()

    def travels(self) -> None:
        """goto by a user and by the model, then exit by the model."""
        pid = self.spawn("traveller", program("goto", "bash", "exit"), interactive=True)
        self.send(pid, "first")
        self.turns(pid, 1)
        home = self.head(pid)
        self.send(pid, "second")
        self.turns(pid, 2)
        self.do(
            lambda client: client.call("proc.goto", pid=pid, to=home, text="third"),
            self.has(pid, "goto", head=home),
        )
        self.turns(pid, 3)
        self.send(pid, f"!goto {home} \\n!say travelled")
        self.turns(pid, 5)
        history = self.do(lambda client: client.history(pid))
        assert texts(history)[-1] == "travelled", texts(history)
        self.send(pid, '!exit {"status": 7, "message": "bye"}')
        row = self.wait(pid)
        assert (row["status"], row["message"]) == (7, "bye")

    def is_signalled(self) -> None:
        """INT, HUP, CHLD, KILL, TERM and XCPU."""
        path = self.work / "p.toml"
        path.write_text(toml(TALK))
        pid = self.spawn("signalled", str(path), interactive=True)
        self.send(pid, "!sleep 100\n!say never")
        self.until_wchan(pid, "api")
        self.signal(pid, "INT")
        self.do(lambda client: client.rests(pid))
        self.signal(pid, "HUP")
        self.signal(pid, "CHLD")
        self.send(pid, "!say on")
        self.do(lambda client: client.until(pid, lambda row: row["run"] and row["run"]["message"] == "on"))
        self.signal(pid, "TERM")
        assert self.wait(pid)["status"] == 143
        killed = self.spawn("killed", TALK, interactive=True)
        self.signal(killed, "KILL")
        assert self.wait(killed)["status"] == 137
        waits = "!bash while [ ! -e xcpu ]; do sleep 0.02; done"
        limited = self.spawn("limited", BASH, f"{waits}\n{waits}\n!say never")
        self.until_wchan(limited, "tool:bash")
        self.signal(limited, "XCPU")
        (self.work / "xcpu").touch()
        assert self.wait(limited)["status"] == 152

    def is_held(self) -> None:
        """STOP while a model call is under way, CONT when its answer is there."""
        beyond = {**BASH, "model": {**BASH["model"], "base_url": self.gate.url}}
        pid = self.spawn("held", beyond, f"{logs('D1')}\n!say held")
        self.do(lambda client: client.until(pid, lambda row: row["wchan"] == "api"))
        self.signal(pid, "STOP")
        self.gate.open()
        self.do(lambda client: client.until(pid, lambda row: row["wchan"] == "-"))
        assert self.do(lambda client: client.get(pid))["stat"] == "T"
        self.signal(pid, "CONT")
        assert self.wait(pid)["message"] == "held"

    def fails(self) -> None:
        """A refused request, too many iterations, and a wall-clock limit."""
        failed = self.spawn("failed", TALK, "!fail 400 invalid_request_error")
        assert self.wait(failed)["status"] == 1
        loop = self.spawn("loop", {**BASH, "model": {**BASH["model"], "max_iterations": 1}}, logs("F1"))
        assert self.wait(loop)["status"] == 152
        late = self.spawn("late", TALK, "!sleep 100", limits={"wall": 0.05})
        assert self.wait(late)["status"] == 124

    def is_changed(self) -> None:
        """rename, renice, limits, exec, run, remove, and freeing what was removed."""
        pid = self.spawn("changed", TALK, interactive=True)
        self.do(lambda client: client.call("proc.rename", pid=pid, name="after"))
        self.do(lambda client: client.call("proc.renice", pid=pid, nice=3))
        self.do(lambda client: client.call("proc.limits", pid=pid, set={"wall": 1000}))
        self.do(lambda client: client.call("proc.exec", pid=pid, program=BASH))
        self.do(lambda client: client.run(pid, f"{logs('G1')}\n!say ran"), self.has(pid, "input", mail=1))
        self.turns(pid, 2)
        row = self.do(lambda client: client.get(pid))
        assert (row["name"], row["nice"], row["run"]["message"]) == ("after", 3, "ran")
        assert self.do(lambda client: client.call("proc.limits", pid=pid))["limits"]
        gone = self.spawn("gone", TALK, "!say gone")
        self.wait(gone)
        self.do(
            lambda client: client.call("proc.remove", pids=[gone]), lambda client: not listed(client, gone)
        )
        self.removed.append(gone)
        self.do(lambda client: client.call("store.gc"))
        self.close(pid)
        assert self.wait(pid)["status"] == 0

    def grows(self) -> None:
        """A command in the background."""
        command = "echo E1 >> log; echo grown"
        pid = self.spawn("grower", WORKER, interactive=True)
        self.send(pid, f"{use('bash', command=command, background=True)}\n!say started")
        self.turns(pid, 2)
        self.do(
            lambda client: client.until(
                pid,
                lambda _: all(row["complete"] for fd, row in client.fds(pid).items() if fd not in {0, 1, 2}),
            )
        )

    def is_forked(self) -> None:
        """Two children by a user, at the head of an ended process."""
        parent = self.pids["held"]
        prompts = [f"{logs('U1')}\n!say u1", f"{logs('U2')}\n!say u2"]
        children = self.do(
            lambda client: client.call("proc.fork", pid=parent, prompts=prompts, request_id="fork")
        )["pids"]
        assert [self.wait(child)["message"] for child in children] == ["u1", "u2"]
        self.pids |= {"u1": children[0], "u2": children[1]}

    # --- what must be true at the end ---------------------------------------------------------------

    def check_worker(self, worker: int) -> None:
        results = self.do(lambda client: client.results(worker))
        (forked,) = [result for result in results if result.startswith("[{")][:1]
        assert [(child["message"], child["status"]) for child in json.loads(forked)] == [("c1", 0), ("c2", 0)]
        rows = self.do(lambda client: client.call("proc.list", all=True))["procs"]
        assert sum(row["birth"] == worker for row in rows) == 4, "a child was made twice, or lost"
        said = "".join(f"{n}\n" for n in range(1, 20001)) + "[exit 0]"
        told = self.do(lambda client: client.history(worker))
        if TOLD not in str(told):
            assert self.do(lambda client: client.read(worker, 3)).decode() == said
            assert (self.work / "copy").read_text() == said
            assert (self.work / "w").read_text() == "two\n"
        assert self.do(lambda client: client.read(worker, 2)) == b"A here\n"

    def check(self) -> None:
        """Nothing acknowledged is lost, no tool ran twice, nobody was told of what never was."""
        client = self.client
        ran = Counter((self.work / "log").read_text().split())
        histories = {name: client.history(pid, all=True) for name, pid in self.pids.items() if name != "gone"}
        interrupted = sum(str(history).count(TOLD) for history in histories.values()) + self._told_children()
        assert set(ran.values()) == {1}, f"ran twice: {ran}"
        missing = {"A1", "A2", "A3", "C1", "C2", "S1", "D1", "F1", "G1", "E1", "U1", "U2"} - set(ran)
        assert len(missing) <= interrupted, f"never ran and not told: {missing}"
        for pid, text in self.sent:
            said = [mail for mail in client.events(pid, types=["input"]) if mail.get("text") == text]
            assert len(said) == 1, f"{text!r} arrived {len(said)} times"
        for pid in self.removed:
            assert not listed(client, pid)
        events = {event["seq"]: event for event in client.events()}
        assert sorted(events) == list(events), "event numbers went back"
        assert self._taken_back(events) == [], "shown, and then something else"

    def _taken_back(self, events: dict[int, Any]) -> list[Any]:
        """What was shown before the crash and is not what the store has now.

        That a call or a tool was begun is a fact when it is shown; its record may be lost, but its number is
        never given to another event.
        """
        shown = [(event, events.get(event["seq"])) for event in self.seen]
        return [pair for pair in shown if pair[0] != pair[1] and (pair[1] or pair[0]["type"] not in BEGUN)]

    def _told_children(self) -> int:
        rows = self.client.call("proc.list", all=True)["procs"]
        others = [row["pid"] for row in rows if row["pid"] not in {1, *self.pids.values()}]
        return sum(str(self.client.history(pid)).count(TOLD) for pid in others)


def listed(client: Client, pid: int) -> bool:
    """Is there such a process?"""
    try:
        client.get(pid)
    except RefusedError:
        return False
    return True


def play(folder: Path, url: str, point: str) -> str:
    """The whole workload with a crash at one point ("" for none): what went wrong, or ""."""
    daemon, gate = Daemon(folder, url), Gate(url)
    with daemon.config.open("a") as config:
        config.write(f'[endpoints."{gate.url}"]\napi_key_env = "ANTHROPIC_API_KEY"\n')
    environment = {"LLMPROC_CRASH": point} if point else {"LLMPROC_CRASH_LOG": str(folder / "points")}
    began = time.monotonic()
    daemon.start(**environment)
    load = Load(daemon, gate)
    try:
        load.run()
        assert load.deaths == (1 if point else 0), "the daemon did not die"
        assert "Traceback" not in daemon.log.read_text()
    except Exception as error:  # noqa: BLE001 - a report for all points at once
        return "".join(traceback.format_exception(error))[-3000:]
    else:
        return ""
    finally:
        load.client.close()
        load.watcher.close()
        gate.close()
        if daemon.process is not None:
            daemon.kill()
        print(f"{point or 'no crash'}: {time.monotonic() - began:.1f} s")
