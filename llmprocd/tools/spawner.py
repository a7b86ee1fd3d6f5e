"""The daemon's end of the spawner: start tools, wait for them, kill them whole, and know whose they are.

The process itself is `spawner_init`. It is executed, not only forked: so it may be started at any time, and a
key in the daemon's memory or environment is in none of the processes below it.

Law: a Running whose `killed` has returned has left no process behind.
Law: the spawner's end ends `run` with SpawnerError; nothing can be started, or need be killed, after that.
"""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import trio

from llmprocd.abi.types import Pid
from llmprocd.tools import spawner_init
from llmprocd.tools.output import ToolContext, ToolError

INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "TZ",
    "TMPDIR",
    "SHELL",
    "XDG_RUNTIME_DIR",
    "LLMPROC_SOCKET",
)
"""What tools get of the daemon's environment, beside LC_*."""

STARTS_AT_ONCE = 16
"""Bounds the descriptors that are on their way: Linux counts them against RLIMIT_NOFILE."""


class SpawnerError(Exception):
    """The spawner is gone, and all tools with it: the daemon cannot go on."""


class Running:
    """A tool that was started, and everything that it starts in turn."""

    def __init__(self, owner: Pid, line: socket.socket) -> None:
        self.owner = owner
        self.os_pid = 0
        """The command's process."""
        self.init_pid = 0
        self.alone = True
        """False once the command has ended and left processes behind that still run."""
        self.line = line
        self.failure = ("", 0)
        self._status = 128 + 9
        self._begun, self._exited, self._gone = trio.Event(), trio.Event(), trio.Event()

    async def begun(self) -> None:
        """Wait until the command runs, or cannot."""
        await self._begun.wait()

    async def wait(self) -> int:
        """Wait for the command itself: its exit status, 128+n if signal n ended it."""
        await self._exited.wait()
        return self._status

    def kill(self) -> None:
        """Kill the whole tree, what has daemonised itself too. Returns at once; again is harmless."""
        if not self._gone.is_set():
            self.line.shutdown(socket.SHUT_WR)

    async def killed(self) -> None:
        """Wait until nothing of the tree is left."""
        await self._gone.wait()

    async def end(self) -> None:
        """Kill the whole tree and wait until nothing of it is left. Cannot be cancelled."""
        self.kill()
        with trio.CancelScope(shield=True):
            await self.killed()

    def hear(self, news: Mapping[str, Any]) -> None:
        """Take in one message of the init."""
        match news:
            case {"init": int(pid)}:
                self.init_pid = pid
            case {"started": int(pid)}:
                self.os_pid = pid
                self._begun.set()
            case {"failed": str(stage), "errno": int(number)}:
                self.failure = (stage, number)
            case {"exited": int(status), "alone": bool(alone)}:
                self._status, self.alone = status, alone
                self._exited.set()
            case _:
                raise AssertionError(f"unknown news of a tool: {news}")

    def leave(self) -> None:
        """Nothing is left of it."""
        self.line.close()
        self.alone = True
        for event in (self._begun, self._exited, self._gone):
            event.set()


class Spawner:
    """The process that starts tools. Make it with `fork`, keep `run` running, and `start` what is wanted."""

    def __init__(self, process: subprocess.Popen[bytes], hub: socket.socket) -> None:
        self.os_pid = process.pid
        self._process = process
        self._hub = hub
        self._sending = trio.Lock()
        self._slots = trio.Semaphore(STARTS_AT_ONCE)
        self._running: set[Running] = set()
        self._news = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._null = os.open(os.devnull, os.O_RDONLY)

    @classmethod
    def fork(cls) -> "Spawner":
        """Start the spawner's process. In a session of its own: a terminal's signals do not reach it."""
        hub, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        hub.setblocking(False)
        with far:
            process = subprocess.Popen(  # noqa: S603  our own interpreter and file
                [sys.executable, "-I", "-S", spawner_init.__file__, str(far.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
                pass_fds=[far.fileno()],
                start_new_session=True,
            )
        return cls(process, hub)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow all tools until cancelled, then kill them and wait until they are gone.

        Raises:
            SpawnerError: the process ended by itself.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                try:
                    await self._ended()
                finally:
                    self._nursery = None
                    self._end()
        finally:
            with trio.CancelScope(shield=True):
                await self._ended()
                self._process.wait()  # its end of the hub closed in its exit: there is no more to wait for
                self._hub.close()
                os.close(self._null)
        raise SpawnerError(
            f"the spawner (process {self.os_pid}) ended with status {self._process.returncode}"
        )

    async def start(
        self,
        owner: Pid,
        argv: Sequence[str],
        *,
        cwd: str,
        env: Mapping[str, str],
        stdout: int,
        stdin: int | None = None,
        stderr: int | None = None,
    ) -> Running:
        """Start a command in a session of its own, with descriptors 0, 1, 2 and no others.

        Args:
            owner: the LLM process it belongs to.
            argv: the first is looked up in `env`'s PATH.
            cwd: where it starts.
            env: its whole environment; see `tool_environment`.
            stdout: a descriptor; the caller keeps its own.
            stdin: /dev/null if None.
            stderr: where stdout goes if None.

        Returns:
            what runs. A start that is cancelled leaves nothing behind.

        Raises:
            ToolError: it cannot be started: no such folder, no such command.
            SpawnerError: nothing can.
        """
        request = _request(argv, cwd, env)
        line, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with far, request:
            running = self._enter(owner, line)
            files = (self._null if stdin is None else stdin, stdout, stdout if stderr is None else stderr)
            try:
                async with self._slots:
                    await self._send((far.fileno(), request.fileno(), *files))
                    far.close()  # from here the line ends when they say so at its other end
                    await running.begun()
            except BaseException:
                far.close()
                await running.end()
                raise
        if not running.os_pid:
            raise ToolError(_reason(running.failure, argv, cwd))
        return running

    async def kill_all(self, owner: Pid) -> None:
        """Kill every tree of one LLM process, and wait until they are gone."""
        trees = [running for running in self._running if running.owner == owner]
        for running in trees:
            running.kill()
        for running in trees:
            await running.killed()

    async def owner(self, os_pid: int) -> Pid | None:
        """The LLM process whose tool the operating-system process `os_pid` is; None if it is no tool.

        Raises:
            ProcessLookupError: it is gone, or its tool is: to be refused, whoever it was.
        """
        while True:
            await trio.lowlevel.checkpoint()
            news, above = self._news, _ancestors(os_pid)
            inits = {running.init_pid: running.owner for running in self._running}
            for pid in above:
                if pid in inits:
                    return inits[pid]
            if self.os_pid not in above:
                return None
            if all(running.init_pid for running in self._running):
                raise ProcessLookupError(errno.ESRCH, f"process {os_pid} is left over from a tool")
            await news.wait()  # an init may be at work before its name has been heard

    def _enter(self, owner: Pid, line: socket.socket) -> Running:
        if self._nursery is None:
            line.close()
            raise SpawnerError("the spawner does not run")
        line.setblocking(False)
        running = Running(owner, line)
        self._running.add(running)
        self._nursery.start_soon(self._follow, running)
        return running

    async def _follow(self, running: Running) -> None:
        """Hear an init out. Shielded: at the daemon's end too, gone means gone."""
        with trio.CancelScope(shield=True):
            while news := await _receive(running.line):
                running.hear(json.loads(news))
                self._spread()
        running.leave()
        self._running.discard(running)
        self._spread()

    def _spread(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def _send(self, fds: Sequence[int]) -> None:
        async with self._sending:
            while True:
                try:
                    socket.send_fds(self._hub, [b"+"], fds)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._hub)
                except (BrokenPipeError, ConnectionResetError):
                    raise SpawnerError("the spawner has ended") from None
                else:
                    return

    async def _ended(self) -> None:
        """Wait for the end of the hub: the process is gone."""
        while await _receive(self._hub):
            pass

    def _end(self) -> None:
        self._hub.shutdown(socket.SHUT_WR)
        for running in self._running:
            running.kill()


def tool_environment(ctx: ToolContext) -> dict[str, str]:
    """The environment of a tool: little of the daemon's, the process's own variables, and LLMPROC_PID.

    A list of what is allowed, not a copy less what is known to be secret: no key gets here by oversight.
    """
    daemon = {name: value for name, value in os.environ.items() if name in INHERITED or _is_locale(name)}
    return {**daemon, "TERM": "dumb", **ctx.env, "LLMPROC_PID": str(ctx.pid)}


def _is_locale(name: str) -> bool:
    return name.startswith("LC_") and name[3:].isalpha()


def _request(argv: Sequence[str], cwd: str, env: Mapping[str, str]) -> BinaryIO:
    """The text of a request, as a file: it may be longer than a datagram."""
    try:
        texts = [os.fsencode(text) for text in (*argv, cwd, *env, *env.values())]
    except UnicodeEncodeError:
        raise ToolError(
            "a command, its folder or its variables hold a lone surrogate, which no file can"
        ) from None
    if any(b"\0" in text for text in texts):
        raise ToolError("a command, its folder or its variables hold a NUL character, which no argument can")
    return memory_file(json.dumps({"argv": list(argv), "cwd": cwd, "env": dict(env)}).encode())


def memory_file(data: bytes) -> BinaryIO:
    """An open file that holds `data`, stands at its start and has no name."""
    file = os.fdopen(os.memfd_create("llmprocd"), "w+b")
    file.write(data)
    file.seek(0)
    return file


async def _receive(line: socket.socket) -> bytes:
    """The next message; nothing at the end."""
    while True:
        try:
            return line.recv(4096)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(line)
        except ConnectionResetError:  # the other end was left with a message unread
            return b""


def _reason(failure: tuple[str, int], argv: Sequence[str], cwd: str) -> str:
    stage, number = failure
    match stage:
        case "cwd":
            return f"Cannot work in {cwd}: {os.strerror(number)}"
        case "exec":
            return f"Cannot run {argv[0]}: {os.strerror(number)}"
        case "fork":
            return f"Cannot start another process: {os.strerror(number)}"
        case _:
            return f"{argv[0]} was killed before it had started"


def _ancestors(os_pid: int) -> list[int]:
    """A process and its parents, up to the first of its namespace, or to one that is hidden: another user's.

    ProcessLookupError if it is gone.
    """
    while True:
        chain = [os_pid]
        while (last := chain[-1]) > 1:
            parent = spawner_init.look(last)[0]
            if parent < 0 and _is_hidden(last):
                return chain
            chain.append(parent)
        if os_pid <= 0 or chain[1:] == [-1]:
            raise ProcessLookupError(errno.ESRCH, f"process {os_pid} is gone")
        if chain[-1] >= 0:
            return chain  # else one in between ended while we climbed: its child has another parent by now


def _is_hidden(os_pid: int) -> bool:
    """Is a process there that /proc does not show (hidepid, ProtectProc=)? None of ours is hidden from us."""
    try:
        os.kill(os_pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return spawner_init.look(os_pid)[0] < 0
