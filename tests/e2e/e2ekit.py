"""A daemon as a subprocess, a blocking client for its socket, and a strict endpoint for it to call.

Law: nothing in here looks inside the daemon. What it knows is the socket, the exit status and the log.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import msgpack
import pytest

PATIENCE = float(os.environ.get("LLMPROC_TEST_PATIENCE", "60"))
"""Seconds after which a test gives up waiting; generous, since nothing here measures speed."""

CANARY = "sk-ant-canary-0f9d4c1e7b"
"""The key that every daemon of these tests is given, and that must appear nowhere."""

MODEL = "claude-sonnet-5-5"

ALL_TOOLS = (
    "fork", "spawn", "wait", "kill", "send", "goto", "exit", "read_fd", "fd_to_file", "read_file", "list_dir",
    "calculator", "write_stderr", "glob", "grep", "write_file", "edit_file", "bash",
)  # fmt: skip


class RefusedError(Exception):
    """An error that the daemon answered with."""

    def __init__(self, errno: int, text: str, name: str) -> None:
        super().__init__(text)
        self.errno = errno
        self.text = text
        self.name = name


class HungUpError(Exception):
    """The daemon is gone."""


class Client:
    """A connection, blocking. Replies may come in any order; notifications are kept in `notices`."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(path)
        self.unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, max_buffer_size=1 << 28)
        self.notices: list[tuple[str, list[Any]]] = []
        self._replies: dict[int, tuple[Any, Any]] = {}
        self._last = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def begin(self, method: str, **params: Any) -> int:
        """Send a request and return its msgid."""
        self._last += 1
        try:
            self.sock.sendall(msgpack.packb([0, self._last, method, [params]]))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise HungUpError from error
        return self._last

    def end(self, msgid: int) -> Any:
        """The result of a request that was begun. Raises RefusedError."""
        while msgid not in self._replies:
            self.receive()
        error, result = self._replies.pop(msgid)
        if error is not None:
            number, text, more = error
            raise RefusedError(number, text, more["name"])
        return result

    def call(self, method: str, **params: Any) -> Any:
        """A request and its result. Raises RefusedError."""
        return self.end(self.begin(method, **params))

    def receive(self) -> None:
        """Take in at least one frame."""
        while True:
            frames = list(self.unpacker)
            if frames:
                break
            try:
                data = self.sock.recv(1 << 18)
            except ConnectionResetError as error:
                raise HungUpError from error
            if not data:
                raise HungUpError
            self.unpacker.feed(data)
        for frame in frames:
            if frame[0] == 1:
                self._replies[frame[1]] = (frame[2], frame[3])
            elif frame[0] == 2:
                self.notices.append((frame[1], frame[2]))
            else:
                raise AssertionError(f"the daemon asks: {frame}")

    # --- words for what tests do most ---------------------------------------------------------------

    def spawn(self, program: Any, prompt: str | None = None, **more: Any) -> int:
        if prompt is not None:
            more["prompt"] = prompt
        pid: int = self.call("proc.spawn", program=program, **more)["pid"]
        return pid

    def wait(self, *pids: int, **more: Any) -> Any:
        """The row of the one process that was waited for, or all rows."""
        more.setdefault("timeout_ms", int(PATIENCE * 1000))
        rows = self.call("proc.wait", pids=list(pids), **more)["procs"]
        return rows[0] if len(pids) == 1 else rows

    def finish(self, program: Any, prompt: str, **more: Any) -> tuple[int, Any]:
        """Spawn, wait: the pid and its row."""
        pid = self.spawn(program, prompt, **more)
        return pid, self.wait(pid)

    def run(self, pid: int, prompt: str | None = None, **more: Any) -> Any:
        if prompt is not None:
            more["prompt"] = prompt
        return self.call("proc.run", pid=pid, **more)

    def get(self, pid: int) -> Any:
        return self.call("proc.get", pid=pid)["procs"][0]

    def signal(self, pid: int, sig: int | str, **more: Any) -> None:
        self.call("proc.signal", pid=pid, signal=sig, **more)

    def send(self, pid: int, text: str, **more: Any) -> int:
        seq: int = self.call("proc.send", pid=pid, text=text, **more)["seq"]
        return seq

    def until(self, pid: int, what: Callable[[Any], bool]) -> Any:
        """Wait until a process looks a certain way; how it looks then."""
        deadline = time.monotonic() + PATIENCE
        while not what(row := self.get(pid)):
            assert time.monotonic() < deadline, f"process {pid} never got there: {row}"
            time.sleep(0.01)
        return row

    def until_wchan(self, pid: int, wchan: str) -> Any:
        return self.until(pid, lambda row: row["wchan"] == wchan)

    def rests(self, pid: int) -> Any:
        """Wait until a process sleeps at fd 0 with nothing in it."""
        return self.until(pid, lambda row: row["wchan"] == "fd:0" and not row["waiting"])

    def history(self, pid: int, **more: Any) -> list[Any]:
        """Messages with their content decoded."""
        rows = self.call("proc.history", pid=pid, **more)["messages"]
        return [{**row, "content": json.loads(row["content"])} for row in rows]

    def results(self, pid: int) -> list[str]:
        """The texts of all tool results on the path."""
        blocks = [block for message in self.history(pid) for block in message["content"]]
        return [block["content"] for block in blocks if block["type"] == "tool_result"]

    def result(self, pid: int, number: int = -1) -> str:
        return self.results(pid)[number]

    def read(self, pid: int, fd: int | str) -> bytes:
        """All bytes of a descriptor, in as many reads as it takes."""
        data = b""
        while True:
            part = self.call("fd.read", pid=pid, fd=fd, offset=len(data))
            data += part["data"]
            if not part["data"]:
                return data

    def fds(self, pid: int) -> dict[int | str, Any]:
        return {row["fd"]: row for row in self.call("fd.list", pid=pid)["fds"]}

    def events(self, pid: int | None = None, after: int = 0, **more: Any) -> list[Any]:
        """All events after a number."""
        found: list[Any] = []
        if pid is not None:
            more["pids"] = [pid]
        while True:
            page = self.call("events.read", after_seq=after, **more)
            found += page["events"]
            if not page["events"]:
                return found
            after = page["next_seq"]

    def types(self, pid: int) -> list[str]:
        return [event["type"] for event in self.events(pid)]

    def until_event(self, pid: int, type_: str, count: int = 1) -> Any:
        """Wait for an event of a process; the count-th one."""
        deadline = time.monotonic() + PATIENCE
        while len(found := self.events(pid, types=[type_])) < count:
            assert time.monotonic() < deadline, f"process {pid}: no {type_}: {self.types(pid)}"
            time.sleep(0.01)
        return found[count - 1]


def texts(messages: list[Any]) -> list[str]:
    """What is said in each message: its text blocks, joined."""
    return ["".join(b["text"] for b in message["content"] if b["type"] == "text") for message in messages]


def use(name: str, **arguments: Any) -> str:
    """A directive of the script that calls a tool."""
    return f"!tool {name} {json.dumps(arguments)}"


def script(*lines: str) -> str:
    return "\n".join(lines)


def until_there(path: Path) -> str:
    """A shell command that waits for a file."""
    return f"while [ ! -e {path} ]; do sleep 0.02; done"


def program(*tools: Any, provider: str = "anthropic", **tables: Any) -> dict[str, Any]:
    """A program as a map, whose model is the strict endpoint.

    Args:
        tools: names or tables for `[tools] builtin`.
        provider: "script" is the model inside the daemon.
        tables: other tables; those of `model` and `tools` are added to.
    """
    made = dict(tables)
    made["model"] = {"name": MODEL, "provider": provider, **tables.get("model", {})}
    made["tools"] = {"builtin": list(tools), **tables.get("tools", {})}
    return made


def toml(table: Mapping[str, Any]) -> str:
    """A program map as the text of a file."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict)]
    for name, inner in table.items():
        if isinstance(inner, dict):
            lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in inner.items())]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def refused(name: str, *words: str) -> Iterator[None]:
    """The block must be refused with this errno, in these words."""
    with pytest.raises(RefusedError) as told:
        yield
    text = told.value.text
    assert told.value.name == name, text
    for word in words:
        assert word in text, text


class Daemon:
    """One state directory, and a daemon over it that can be killed and started again."""

    def __init__(self, folder: Path, url: str) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        self.folder = folder
        self.state = folder / "state"
        self.log = folder / "log"
        self.work = folder / "work"
        self.work.mkdir()
        self.url = url
        self.config = folder / "config.toml"
        self.config.write_text("retry_s = 20\nretries = 4\n")
        self.process: subprocess.Popen[bytes] | None = None
        self.socket = str(folder / "s")

    def environment(self, **more: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        kept |= {"ANTHROPIC_API_KEY": CANARY, "PYTHONPATH": str(Path(__file__).parents[2])}
        return kept | {"ANTHROPIC_BASE_URL": self.url} | more

    def start(self, **environment: str) -> "Daemon":
        """Start it and wait until it answers."""
        assert self.launch(**environment), f"the daemon did not start:\n{self.log.read_text()}"
        return self

    def launch(self, **environment: str) -> bool:
        """Start it; did it come as far as being ready?"""
        assert self.process is None
        reader, writer = os.pipe()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "llmprocd", "--socket", self.socket, "--state-dir", str(self.state),
                 "--config", str(self.config)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[writer], cwd="/",
                env=self.environment(LLMPROC_READY_FD=str(writer), **environment),
            )  # fmt: skip
        os.close(writer)
        with os.fdopen(reader, "rb") as ready:
            return ready.readline() == b"READY\n"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def client(self) -> Client:
        try:
            return Client(self.socket)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise HungUpError from error

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.ended()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> int:
        """Wait for its end; the exit status."""
        assert self.process is not None
        status = self.process.wait(PATIENCE)
        self.process = None
        return status

    def restart(self, **environment: str) -> None:
        """kill -9 and start again."""
        self.kill()
        self.start(**environment)

    def sweep(self, client: Client) -> None:
        """End and forget all processes."""
        pids = [row["pid"] for row in client.call("proc.list", all=True)["procs"] if row["pid"] != 1]
        for pid in pids:
            with contextlib.suppress(RefusedError):
                client.signal(pid, "KILL")
        if pids:
            client.wait(*pids)
            client.call("proc.remove", pids=pids)

    def close(self) -> None:
        """Stop it if it runs. Its log must tell of no bug."""
        if self.process is not None:
            assert self.stop() == 0, self.log.read_text()
        said = self.log.read_text()
        assert "Traceback" not in said, said
        assert "CRITICAL" not in said.upper(), said


class Strict:
    """The scripted model as a program, over HTTP."""

    def __init__(self, *options: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llmprocd.model.script", *options],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert self.process.stdout is not None
        self.url: str = json.loads(self.process.stdout.readline())["url"]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nothing is answered within the block: a call that is made in it is under way until its end."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def _ask(self, path: str, data: bytes | None = None) -> Any:
        with urllib.request.urlopen(f"{self.url}/_script/{path}", data, timeout=PATIENCE) as answer:
            return json.loads(answer.read())

    def requests(self, having: str = "") -> list[Any]:
        """The model calls that arrived, oldest first; those whose body holds a text."""
        calls = [one for one in self._ask("requests") if one["target"].partition("?")[0] == "/v1/messages"]
        return [one for one in calls if having in one["body"]]

    def books(self) -> dict[str, int]:
        """What has been billed."""
        found: dict[str, int] = self._ask("books")
        return found

    def bodies(self, having: str = "") -> list[str]:
        return [one["body"] for one in self.requests(having)]

    def refusals(self) -> list[str]:
        found: list[str] = self._ask("refusals")
        return found

    def forget(self) -> None:
        """Make it forget the conversations that it holds."""
        self._ask("forget", b"")

    def reset(self) -> None:
        self._ask("reset", b"")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        assert self.process.stdout is not None
        self.process.stdout.close()
