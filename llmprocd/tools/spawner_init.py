r"""The process that starts tools, and the one small init that each tool hangs under.

Run by its path under `python -I -S`, so that it is small, has one thread for life and holds nothing of the
daemon's memory or environment. It imports the standard library only.

    daemon ==hub== spawner --- init --- the tool's command --- whatever that starts
         \========line========/

Law: an init is a subreaper: what its tool starts, daemonised or not, stays below it and is found by parent.
Law: end of file on an init's line means: kill the tree. The daemon's end reads end of file when nothing of it
     is left: the spawner holds the line too, until it has killed what a killed init left behind.
Law: who holds the hub's other end holds all lines' other ends, so that all end with him. After the last of
     them the spawner leaves, and that is how the daemon knows that nothing is left.
"""

import ctypes
import errno
import gc
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Container, Sequence
from typing import NoReturn, TypedDict

FDS = 5
"""Descriptors that come with a request: its line, its text, then stdin, stdout and stderr of the tool."""

PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
IGNORED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTERM)
FIRST_PAUSE_MS, LAST_PAUSE_MS = 10, 1000

prctl = ctypes.CDLL(None, use_errno=True).prctl


class Request(TypedDict):
    """What to run: strings as `os.fsdecode` makes them."""

    argv: list[str]
    cwd: str
    env: dict[str, str]


def main() -> None:
    """Serve the hub whose descriptor is the only argument, until it ends and no tool is left."""
    hub = socket.socket(fileno=int(sys.argv[1]))
    for number in IGNORED:  # a terminal's or a service manager's signals are for the daemon to act on
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files[1], files[1]))
    become("llmproc-spawner")
    gc.freeze()  # inits share these pages as long as nobody counts references in them
    Spawner(hub, files).serve()


class Spawner:
    """Parent of all inits: forks one for each request, and is the last to adopt."""

    def __init__(self, hub: socket.socket, files: tuple[int, int]) -> None:
        self.hub = hub
        self.files = files
        self.wake = wake_on_child()
        self.lines: dict[int, socket.socket] = {}
        self.orphaned: list[socket.socket] = []
        self.ended = False

    def serve(self) -> None:
        """Take requests and reap, until the hub has ended and nothing is left."""
        poll = select.poll()
        poll.register(self.hub, select.POLLIN)
        poll.register(self.wake, select.POLLIN)
        while True:
            self.reap()
            if self.ended and not self.lines and not self.orphaned:
                return
            for fd, _ in poll.poll(FIRST_PAUSE_MS if self.orphaned else None):
                if fd == self.wake:
                    drain(self.wake)
                elif not self.take():
                    poll.unregister(self.hub)
                    self.ended = True

    def take(self) -> bool:
        """Start what one request asks for. False at the end of the hub."""
        data, fds, _, _ = socket.recv_fds(self.hub, 1, FDS)
        for fd in fds:
            os.set_inheritable(fd, False)  # recv_fds drops its flags before Python 3.12
        if len(fds) == FDS:
            self.start(socket.socket(fileno=fds[0]), fds[1:])
        elif fds:  # the table of open files was full
            refuse(socket.socket(fileno=fds[0]), errno.EMFILE)
        for fd in fds[1:]:
            os.close(fd)
        return bool(data)

    def start(self, line: socket.socket, fds: Sequence[int]) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            refuse(line, error.errno or 0)
            return
        if pid == 0:
            self.forget()
            run_init(line, fds, self.files)
        self.lines[pid] = line

    def forget(self) -> None:
        """Close, in a new init, what is the spawner's."""
        self.hub.close()
        os.close(self.wake)
        os.close(signal.set_wakeup_fd(-1))
        for line in (*self.lines.values(), *self.orphaned):
            line.close()

    def reap(self) -> None:
        for pid, status in reap()[0]:
            line = self.lines.pop(pid, None)
            if line and status:
                self.orphaned.append(line)
            elif line:
                line.close()
        if self.orphaned and not strike(self.lines):
            for line in self.orphaned:
                line.close()
            self.orphaned.clear()


def run_init(line: socket.socket, fds: Sequence[int], files: tuple[int, int]) -> NoReturn:
    """Be the init of one tool: start it, reap, tell how it ended, and leave as the last of its tree."""
    wake = wake_on_child()
    become("llmproc-init")
    tell(line, init=os.getpid())
    command = launch(line, fds, files)
    for fd in fds:
        os.close(fd)
    mind(line, wake, command)
    os._exit(0)  # an exception ends it too, with a status that tells the spawner to look for orphans


def launch(line: socket.socket, fds: Sequence[int], files: tuple[int, int]) -> int:
    """Start the command and tell its pid, or what failed: `cwd` or `exec`, and the errno. 0 if it failed."""
    with open(fds[0], "rb", closefd=False) as file:
        file.seek(0)
        request: Request = json.load(file)
    result, failure = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        execute(request, fds[1:], files, failure)
    os.close(failure)
    said = os.read(result, 64).split()
    os.close(result)
    if said:
        os.waitpid(pid, 0)
        tell(line, failed=said[0].decode(), errno=int(said[1]))
        return 0
    tell(line, started=pid)
    return pid


def execute(request: Request, stdio: Sequence[int], files: tuple[int, int], failure: int) -> NoReturn:
    """Become the command, in a session of its own; write to `failure` what kept it from that."""
    stage = "cwd"
    try:
        os.setsid()
        for number, fd in enumerate(stdio):
            os.dup2(fd, number)
        for number in range(1, 32):
            if number not in {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        os.chdir(request["cwd"])
        stage = "exec"
        os.execvpe(request["argv"][0], request["argv"], request["env"])  # noqa: S606  that is its trade
    except OSError as error:
        os.write(failure, f"{stage} {error.errno}".encode())
    finally:
        os._exit(127)


def mind(line: socket.socket, wake: int, command: int) -> None:
    """Reap until no child is left; once the line has ended, kill until none is left or none can be killed."""
    poll = select.poll()
    poll.register(line, select.POLLIN)
    poll.register(wake, select.POLLIN)
    pause: int | None = None
    while True:
        ended, alive = reap()
        if command in dict(ended):
            tell(line, exited=dict(ended)[command], alone=not alive)
            command = 0
        if not alive or (pause and pause > FIRST_PAUSE_MS and not strike(())):
            return
        ready = poll.poll(pause)
        pause = pause and min(pause * 2, LAST_PAUSE_MS)
        for fd, _ in ready:
            if fd == wake:
                drain(wake)
            else:
                poll.unregister(line)  # nothing is ever said down a line: it has ended
                pause = FIRST_PAUSE_MS
                end_session(command)


def end_session(command: int) -> None:
    """Kill the command's first process group: most often that is all there is, and /proc need not be read."""
    if command:
        try:
            os.killpg(command, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return  # strike() looks closer


def strike(spare: Container[int]) -> int:
    """Kill all descendants but those in `spare` and theirs. Returns how many groups and processes that were.

    A group at a time: the kernel does that at one moment, so a group that keeps forking is gone in one blow.
    A killed parent's unseen child is ours, and met in the next pass. What outruns this, a bomb that makes a
    session for each of its processes, only a limit on their number holds.
    """
    below: dict[int, list[int]] = {}
    with os.scandir("/proc") as entries:
        for pid in [int(entry.name) for entry in entries if entry.name.isdigit()]:
            below.setdefault(look(pid)[0], []).append(pid)
    me, struck = os.getpid(), 0
    spared = {os.getpgrp()}
    todo = [(me, child) for child in below.get(me, ()) if child not in spare]
    for above, pid in todo:
        struck += kill(pid, (above, me), spared)
        todo += [(pid, child) for child in below.get(pid, ())]
    return struck


def kill(pid: int, parents: tuple[int, int], spared: set[int]) -> bool:
    """Kill `pid` with its process group, which then is spared: one blow is enough.

    Only if it is still a child of one of `parents`: the number may be another's by now. A group that is not
    the spawner's is of the tool's own making, for each tool starts in a session of its own.
    """
    above, group = look(pid)
    if above not in parents:
        return True  # it ended or was adopted since, by us
    try:
        if group not in spared:
            spared.add(group)
            os.killpg(group, signal.SIGKILL)
        elif group == os.getpgrp():
            os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True


def look(pid: int) -> tuple[int, int]:
    """A process's parent and process group; -1 of one that is gone, or that /proc does not show (hidepid)."""
    try:
        stat = os.open(f"/proc/{pid}/stat", os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return -1, -1
    try:
        fields = os.read(stat, 4096).rpartition(b")")[2].split()
    except ProcessLookupError:
        return -1, -1
    finally:
        os.close(stat)
    return int(fields[1]), int(fields[2])


def reap() -> tuple[list[tuple[int, int]], bool]:
    """Collect children that have ended: their pids and exit statuses, and whether any child is left."""
    ended: list[tuple[int, int]] = []
    while True:
        try:
            pid, raw = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended, False
        if pid == 0:
            return ended, True
        code = os.waitstatus_to_exitcode(raw)
        ended.append((pid, code if code >= 0 else 128 - code))


def refuse(line: socket.socket, number: int) -> None:
    """Say that no process can be had, and why, and be done with the line."""
    tell(line, failed="fork", errno=number)
    line.close()


def tell(line: socket.socket, **news: int | str) -> None:
    """Send one message up the line. Nobody may be there any more: then the end of the line says so."""
    try:
        line.send(json.dumps(news).encode())
    except OSError:
        return


def become(name: str) -> None:
    """Take a name, as `ps` shows it, and the part of a subreaper."""
    prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
    if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot become a subreaper")


def wake_on_child() -> int:
    """A descriptor that is readable after a child has ended."""
    wake, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, ignore)
    return wake


def ignore(*_: object) -> None:
    """Have a signal handled, so that it wakes."""


def drain(wake: int) -> None:
    try:
        while os.read(wake, 4096):
            pass
    except BlockingIOError:
        return


if __name__ == "__main__":
    main()
