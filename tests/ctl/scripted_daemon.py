"""A daemon with a scripted process table: the real protocol over a real socket, and no models.

What it offers is what a command line needs to be tried: processes that do, by the name of their program,
what their names say. Every call that arrives is kept in `calls`.

Run as a program it serves $LLMPROC_SOCKET and says READY, as llmprocd does.
"""
# ruff: noqa: E501

import itertools
import os
import socket
import sys
import threading
import time
from pathlib import Path

import msgpack

ERRNO = {
    "EPERM": 1, "ENOENT": 2, "ESRCH": 3, "ENOEXEC": 8, "EBADF": 9, "EACCES": 13, "EBUSY": 16, "EINVAL": 22,
    "EPIPE": 32, "ENOSYS": 38, "ETIMEDOUT": 110, "ECANCELED": 125,
}  # fmt: skip
SIGNALS = {"HUP": 1, "INT": 2, "KILL": 9, "TERM": 15, "STOP": 19, "CONT": 18, "XCPU": 24}
LOCAL = {
    "installed": True, "state": "down", "model": "", "path": "", "url": "", "pid": None, "slots": 0, "window": 0,
    "restarts": 0, "reason": "",
}  # fmt: skip
USAGE = {
    "input_tokens": 1000,
    "output_tokens": 2345,
    "cache_read_input_tokens": 9000,
    "cache_creation_input_tokens": 0,
}


class RefusedError(Exception):
    def __init__(self, name, text):
        super().__init__(f"{name}: {text}")
        self.name = name


class ScriptedDaemon:
    def __init__(self, path):
        self.path = str(path)
        self.calls = []
        self.changed = threading.Condition(threading.RLock())
        self.procs = {}
        self.prompts = {}
        self.files = {}  # (pid, fd) -> [bytes, complete, name]
        self.nodes = {}  # pid -> rows of proc.history
        self.events = []
        self.requests = {}
        self.hang_up_after = {}  # method -> how many more times the connection breaks before it is answered
        self.owner = None  # the process whose tool calls
        self.local = LOCAL
        self.next_pid = itertools.count(2)
        self.connections = set()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(64)
        self.over = threading.Event()
        self.threads = [self.start(self.accept)]

    def start(self, work, *args):
        thread = threading.Thread(target=work, args=args, daemon=True)
        thread.start()
        return thread

    def close(self):
        if self.over.is_set():
            return
        with self.changed:
            self.over.set()
            self.changed.notify_all()
            open_ = list(self.connections)
        self.listener.shutdown(socket.SHUT_RDWR)
        for sock in open_:
            hang_up(sock)
        while self.threads:
            self.threads.pop().join(10)
        self.listener.close()

    # --- the socket ---------------------------------------------------------------------------------

    def accept(self):
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            with self.changed:
                self.connections.add(sock)
                self.threads.append(self.start(self.converse, sock))

    def converse(self, sock):
        unpacker = msgpack.Unpacker()
        sending = threading.Lock()
        cancelled = set()
        waiting = []
        with sock:
            while chunk := receive(sock):
                unpacker.feed(chunk)
                for frame in unpacker:
                    if frame[0] == 2:
                        with self.changed:
                            cancelled.add(frame[2][0])
                            self.changed.notify_all()
                        continue
                    waiting.append(self.answer(sock, sending, cancelled, *frame[1:]))
            with self.changed:
                self.connections.discard(sock)
                cancelled.add(None)
                self.changed.notify_all()
            for thread in filter(None, waiting):
                thread.join(10)

    def answer(self, sock, sending, cancelled, msgid, method, params):
        arguments = params[0] if params else {}
        with self.changed:
            self.calls.append((method, arguments))
            if self.hang_up_after.get(method, 0):
                self.hang_up_after[method] -= 1
                self.perform(method, arguments)
                hang_up(sock)
                return None
        if method == "events.subscribe":
            with sending:
                sock.sendall(msgpack.packb([1, msgid, None, {"sub": msgid}]))
            return self.start(self.push, sock, sending, cancelled, msgid, arguments)
        if method == "events.unsubscribe":
            with self.changed:
                cancelled.add(arguments["sub"])
        waits = arguments.get("wait_ms") or method == "proc.wait"
        if waits:
            return self.start(self.reply, sock, sending, msgid, method, arguments, cancelled)
        self.reply(sock, sending, msgid, method, arguments, cancelled)
        return None

    def reply(self, sock, sending, msgid, method, arguments, cancelled):
        def is_off():
            return self.over.is_set() or None in cancelled or msgid in cancelled

        try:
            with self.changed:
                result, error = self.perform(method, arguments, is_off), None
        except RefusedError as exc:
            result, error = None, [ERRNO[exc.name], str(exc), {"name": exc.name}]
        with sending:
            try:
                sock.sendall(msgpack.packb([1, msgid, error, result]))
            except OSError:
                return

    def push(self, sock, sending, cancelled, sub, arguments):
        """Push events until the connection or the subscription ends."""
        after = arguments.pop("after_seq", len(self.events))

        def is_off():
            return self.over.is_set() or None in cancelled or sub in cancelled

        while True:
            try:
                with self.changed:
                    found = self.events_read(after_seq=after, wait_ms=60_000, is_off=is_off, **arguments)
                after = found["next_seq"]
                with sending:
                    sock.sendall(msgpack.packb([2, "event", [{"sub": sub, "events": found["events"]}]]))
            except (RefusedError, OSError):
                return

    def perform(self, method, arguments, is_off=lambda: False):
        handler = HANDLERS.get(method)
        if handler is None:
            raise RefusedError("ENOSYS", f"no such method: {method}")
        if handler in WAITING:
            return handler(self, is_off=is_off, **arguments)
        return handler(self, **arguments)

    def wait_for(self, condition, millis, is_off):
        """Wait; False when the time is up. ECANCELED when nobody waits any more."""
        until = None if millis is None else time.monotonic() + millis / 1000
        while not condition():
            if is_off():
                raise RefusedError("ECANCELED", "cancelled")
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return False
            self.changed.wait(left)
        return True

    # --- the process table --------------------------------------------------------------------------

    def add(self, program="demo", pid=None, **fields):
        """A process, and its standard descriptors."""
        with self.changed:
            pid = pid or next(self.next_pid)
            self.procs[pid] = {
                "pid": pid, "ppid": 1, "birth": 1, "stat": "S", "program": program, "name": "", "model": "m",
                "provider": "script", "uid": os.getuid(), "access": "admin", "nice": 0, "cwd": "/", "head": None,
                "turns": 3, "context_tokens": 31_000, "context_window": 100_000, "usage": USAGE, "cost_usd": 0.41,
                "started": time.time() - 192, "ended": None, "wchan": "fd:0", "interactive": True, "waiting": 0,
                "collected": False, "status": None, "stop_reason": None, "reason": "", "children": [], "fds": [],
                "run": None,
            } | fields  # fmt: skip
            for fd, name in enumerate(("mailbox", "stdout", "stderr")):
                self.files[pid, fd] = [b"", False, name]
            self.nodes[pid] = []
            self.changed.notify_all()
            return pid

    def proc(self, pid):
        if pid not in self.procs:
            raise RefusedError("ESRCH", f"no such process: {pid}")
        return self.procs[pid]

    def living(self, pid):
        row = self.proc(pid)
        if row["status"] is not None:
            raise RefusedError("ESRCH", f"process {pid} has ended with status {row['status']}")
        return row

    def event(self, type_, pid, **more):
        with self.changed:
            seq = len(self.events) + 1
            self.events.append({"seq": seq, "at": time.time(), "type": type_, "pid": pid, **more})
            self.changed.notify_all()

    def write(self, pid, fd, data):
        with self.changed:
            self.files[pid, fd][0] += data
            self.changed.notify_all()

    def say(self, pid, text, *, deltas=True):
        """The process says a whole message."""
        with self.changed:
            if deltas:
                for word in text.split(" "):
                    self.event("text", pid, text=word if text.endswith(word) else word + " ", attempt=1)
            self.event("api_response", pid, text=text, stop_reason="end_turn", usage=USAGE)
            self.write(pid, 1, text.encode() + b"\n")

    def end(self, pid, status, reason=""):
        with self.changed:
            row = self.procs[pid]
            row.update(
                status=status, stat="Z", ended=time.time(), wchan="-", interactive=False, reason=reason
            )
            row["run"] = {
                "pid": pid, "stop_reason": "end_turn", "message": "said", "api_calls": 1, "tool_calls": [],
                "usage": USAGE, "cost_usd": 0.41, "duration_ms": 7,
            }  # fmt: skip
            for fd in (0, 1, 2):
                self.files[pid, fd][1] = True
            self.event("exit", pid, status=status, reason=reason)

    def play(self, pid, program, prompt):
        """What a program does with its prompt."""
        if program == "demo":
            self.say(pid, f"you said: {prompt}")
            self.end(pid, 0)
        elif program == "fails":
            self.write(pid, 2, b"the provider said no\n")
            self.end(pid, 1, "the provider said no")
        elif program == "quietly-fails":
            self.end(pid, 152, "max_iterations reached")
        elif program == "slow":
            self.start(self.play_slowly, pid)

    def play_slowly(self, pid):
        for word in ("one", "two", "three"):
            self.say(pid, word)
            time.sleep(0.02)
        self.end(pid, 7)

    # --- methods ------------------------------------------------------------------------------------

    def hello(self, **_):
        peer = {"pid": 0, "uid": os.getuid(), "gid": os.getgid()}
        return {"proto": 1, "peer": peer | ({} if self.owner is None else {"proc": self.owner})}

    def sys_status(self):
        return {
            "version": "0.1.0", "pid": os.getpid(), "boot_id": "b", "uptime_s": 7383.0, "socket": self.path,
            "state_dir": "/nowhere", "procs": {"running": 3, "sleeping": 12}, "usage": USAGE, "cost_usd": 1.2,
            "scheduler": [
                {"endpoint": "anthropic", "running": 3, "waiting": 12, "slots": 50, "held_s": 10.4,
                 "rpm": 50, "rpm_left": 12, "itpm": 30_000, "itpm_left": 0, "otpm": None, "otpm_left": None},
                {"endpoint": "http://127.0.0.1:8041", "running": 0, "waiting": 0, "slots": 4, "held_s": 0.0},
            ],
            "local": self.local,
        }  # fmt: skip

    def local_status(self):
        return self.local

    def local_up(self, *, model, path, **_):
        up = {"state": "up", "model": model, "path": path, "pid": 77, "slots": 2, "window": 8192}
        self.local = LOCAL | up
        return self.local

    def local_down(self):
        self.local = LOCAL
        return self.local

    def sys_reload(self):
        return {}

    def store_gc(self, *, dry_run=False):
        return {"files": 2, "messages": 30, "bytes": 0 if dry_run else 5_000_000}

    def sys_stop(self):
        self.start(self.stop_soon)
        return {}

    def stop_soon(self):
        time.sleep(0.05)
        Path(self.path).unlink()
        os._exit(0)

    def sys_api(self):
        return {"methods": [
            {"name": "proc.list", "help": "List.\nMore.", "params": "{}", "result": "{}", "waits": False}
        ]}  # fmt: skip

    def proc_spawn(
        self, *, program, prompt=None, interactive=False, name="", request_id="", stdin_path="",
        needs_prompt=False, **more
    ):  # fmt: skip
        if request_id in self.requests:
            return self.requests[request_id]
        if Path(program).name in {"missing", "missing.toml"}:
            raise RefusedError("ENOENT", f"no such program: {program}; did you mean demo?")
        if program == "broken":
            raise RefusedError("ENOEXEC", "broken.toml:3: model.nam: unknown key; did you mean name?")
        if program == "locked":
            raise RefusedError("EACCES", "no credentials for anthropic")
        if prompt is not None and not prompt.strip():
            raise RefusedError("EINVAL", "prompt: blank")
        if needs_prompt:
            raise RefusedError("EINVAL", f"{program} has no prompt of its own: give one")
        del more
        held = Path(stdin_path).read_bytes() if stdin_path else None
        asks = prompt is not None or held is not None
        pid = self.add(
            Path(program).name, name=name, stat="R", wchan="api", interactive=interactive or not asks
        )
        self.requests[request_id] = {"pid": pid}
        if held is not None:
            self.files[pid, 3] = [held, True, "stdin"]
        self.event("spawn", pid, program=program)
        if asks:
            self.event("input", pid, mail=1, text=prompt or "")
            self.play(pid, Path(program).stem, prompt)
        return {"pid": pid}

    def proc_list(self, *, all=False, pids=None):  # noqa: A002 - the field's name
        rows = [row for row in self.procs.values() if all or not row["collected"]]
        if pids is not None:
            rows = [row for row in rows if row["pid"] in pids or f"%{row['name']}" in pids]
        return {"procs": rows}

    def proc_get(self, *, pids, all=False):  # noqa: A002
        del all
        return {"procs": [self.proc(pid) for pid in pids]}

    def proc_signal(self, *, pid, signal, tree=False):
        if pid == 1:
            raise RefusedError("EPERM", "the daemon itself cannot be signalled; use llmprocctl daemon stop")
        del tree
        row = self.living(pid)
        if signal == 0:
            return {}
        self.event("signal", pid, signal=signal)
        if signal in {"STOP", "CONT"}:
            row["stat"] = "T" if signal == "STOP" else "S"
        elif signal != "HUP" and not (row["program"] == "deaf" and signal == "INT"):
            self.end(pid, 128 + SIGNALS[signal], f"signal {signal}")
        return {}

    def proc_wait(self, *, pids, any=False, timeout_ms=None, collect=True, is_off):  # noqa: A002
        for pid in pids:
            self.proc(pid)

        def ended():
            return [row for pid in pids if (row := self.proc(pid))["status"] is not None]

        if not self.wait_for(lambda: len(ended()) >= (1 if any else len(pids)), timeout_ms, is_off):
            raise RefusedError("ETIMEDOUT", "they go on")
        rows = ended()[:1] if any else ended()
        for row in rows:
            row["collected"] = row["collected"] or collect
        keys = ("pid", "status", "usage", "cost_usd")
        return {"procs": [{"message": "", **{key: row[key] for key in keys}} for row in rows]}

    def proc_send(self, *, pid, text=None, close=False):
        row = self.living(pid)
        if not row["interactive"]:
            raise RefusedError("EPIPE", f"fd 0 of process {pid} is closed")
        if text is not None:
            self.event("input", pid, mail=1, text=text)
            self.say(pid, f"you said: {text}")
        if close:
            self.end(pid, 0)
        return {"seq": 1}

    def proc_fork(self, *, pid, prompts=(), at="", request_id=""):
        self.proc(pid)
        del at
        if request_id in self.requests:
            return self.requests[request_id]
        made = [self.add("demo", ppid=pid) for _ in prompts or [None]]
        self.requests[request_id] = {"pids": made}
        return {"pids": made}

    def proc_goto(self, *, pid, to, text=None, run=False):
        row = self.living(pid)
        del text, run
        if to not in {node["id"] for node in self.nodes[pid]}:
            raise RefusedError("ENOENT", f"no message {to} in the history of process {pid}")
        old, row["head"] = row["head"], to
        return {"old_head": old, "head": to}

    def proc_exec(self, *, pid, program, cwd=""):
        del cwd
        if program == "busy":
            raise RefusedError("EBUSY", f"process {pid} is running tools")
        if program == "missing":
            raise RefusedError("ENOENT", "no such program: missing")
        self.living(pid)["program"] = program
        return {}

    def proc_limits(self, *, pid, set=None):  # noqa: A002
        self.proc(pid)
        soft = 300.0 if (set or {}).get("wall") == "5m:10m" else None
        return {"limits": [{"resource": "wall", "soft": soft, "hard": 600.0 if set else None, "used": 192.4}]}

    def proc_renice(self, *, pid, nice):
        self.living(pid)["nice"] = nice
        return {}

    def proc_remove(self, *, pids):
        for pid in pids:
            if self.proc(pid)["status"] is None:
                raise RefusedError("EBUSY", f"process {pid} has not ended")
            del self.procs[pid]
        return {}

    def proc_history(self, *, pid, all=False, after="", limit=100):  # noqa: A002
        row = self.proc(pid)
        nodes = self.nodes[pid]
        if not all:
            path, name = [], row["head"]
            by_id = {node["id"]: node for node in nodes}
            while name is not None:
                path.insert(0, by_id[name])
                name = by_id[name]["parent"]
            nodes = path
        start = next((i + 1 for i, node in enumerate(nodes) if node["id"] == after), 0)
        return {"head": row["head"], "messages": nodes[start : start + limit]}

    def fd_list(self, *, pid=None):
        if pid is not None:
            self.proc(pid)
        return {"fds": [
            {"pid": owner, "fd": fd, "mode": "r", "type": "FILE", "size": len(data), "name": name, "complete": done,
             "program": self.procs[owner]["program"]}
            for (owner, fd), (data, done, name) in self.files.items()
            if pid in {None, owner} and owner in self.procs
        ]}  # fmt: skip

    def fd_read(self, *, pid, fd, offset=0, count=262_144, wait_ms=0, is_off, **part):
        self.proc(pid)
        if (pid, fd) not in self.files:
            raise RefusedError("EBADF", f"process {pid} has no fd {fd}")
        file = self.files[pid, fd]
        if part:
            return {"offset": 0, "data": repr(sorted(part.items())).encode() + b"\n", "size": 1, "eof": True}
        self.wait_for(lambda: len(file[0]) > offset or file[1], wait_ms, is_off)
        data = bytes(file[0][offset : offset + count])
        return {
            "offset": offset,
            "data": data,
            "size": len(file[0]),
            "eof": file[1] and offset + len(data) >= len(file[0]),
        }

    def fd_write(self, *, pid, fd=0, data=b"", eof=False):
        del fd, eof
        self.event("input", pid, mail=1, text=f"{len(data)} bytes")
        return {"count": len(data)}

    def events_read(self, *, after_seq=None, max=1000, wait_ms=0, pids=None, types=None, is_off):  # noqa: A002
        after = len(self.events) if after_seq is None else after_seq

        def found():
            return [
                event for event in self.events[after:]
                if (pids is None or event["pid"] in pids) and (types is None or event["type"] in types)
            ]  # fmt: skip

        self.wait_for(found, wait_ms, is_off)
        events = found()[:max]
        return {"events": events, "next_seq": events[-1]["seq"] if events else after, "lost": 0}

    def events_unsubscribe(self, *, sub):
        del sub
        return {}

    def prog_list(self):
        other = {"name": "other", "path": "/daemons/path/other.toml", "description": "not this user's"}
        return {"programs": [other, {"name": "demo", "path": "", "description": "a script"}]}

    def prog_check(self, *, path, cwd=""):
        del cwd
        if not Path(path).exists():
            raise RefusedError("ENOENT", f"no such program: {path}")
        faults = [] if "bad" not in path else [
            {"line": 3, "key": "model.nam", "text": "unknown key; did you mean name?"},
            {"line": 0, "key": "", "text": "no model"},
        ]  # fmt: skip
        return {"ok": not faults, "faults": faults, "warnings": ["temperature is left out"]}


HANDLERS = {
    name.replace("_", ".", 1): handler
    for name, handler in vars(ScriptedDaemon).items()
    if name.partition("_")[0] in {"sys", "proc", "fd", "events", "prog", "store", "local"}
    and callable(handler)
} | {"hello": ScriptedDaemon.hello}
WAITING = {ScriptedDaemon.proc_wait, ScriptedDaemon.fd_read, ScriptedDaemon.events_read}


def receive(sock):
    try:
        return sock.recv(65536)
    except OSError:
        return b""


def hang_up(sock):
    """Close a connection that another thread reads."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


def main():
    if os.environ.get("SCRIPTED_DAEMON_FAILS"):
        print("llmprocd: the store is locked", file=sys.stderr)
        raise SystemExit(3)
    started = Path(os.environ["LLMPROC_SOCKET"] + ".starts")
    with started.open("a") as file:
        file.write("started\n")
    time.sleep(0.1)
    daemon = ScriptedDaemon(os.environ["LLMPROC_SOCKET"])
    ready = int(os.environ["LLMPROC_READY_FD"])
    os.write(ready, b"READY\n")
    os.close(ready)
    daemon.over.wait()
