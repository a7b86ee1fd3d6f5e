"""Machine: the kernel and its devices.

Law: what a verb changed in memory is handed to the store in the same synchronous stretch (`commit`), and
nothing that was computed from it leaves before it is durable (`wait_durable`). One number is enough for
that: whoever looks at memory waits for the last commit there was.
Law: to interrupt is to change the state and count the epoch up; `commit` sees the difference and cancels.
"""

import os
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import msgspec
import trio

from llmprocd import console, pager, sched, waitchan
from llmprocd.abi import calls
from llmprocd.abi.calls import RunResult, ToolCallInfo
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import INIT, MessageId, Pid, ProcState
from llmprocd.config import Config, local_slots, prices, tree_limits
from llmprocd.endpoint import Bounds
from llmprocd.kernel import access, history, limits, step
from llmprocd.kernel.state import Change, Image, Kernel, Limit, Node, Proc, Reply, Run
from llmprocd.local import Local
from llmprocd.model import pricing
from llmprocd.model.body import Transcript
from llmprocd.model.protocol import Model
from llmprocd.model.sse import Turn
from llmprocd.model.threads import Threads
from llmprocd.model.windows import Windows
from llmprocd.store.protocol import Store
from llmprocd.tools.spawner import Spawner

TRANSCRIPTS = 64 << 20
"""Bytes of joined histories that are kept between turns."""


ImageOf = Callable[[str | dict[str, Any], str, Mapping[str, str]], Image]
"""Makes a program (path, name or map; relative to a folder; with the process's variables) ready to run."""


LEAST_FREE = 64 << 20
"""Bytes of disk below which nothing new is begun."""


class Desk(Protocol):
    """Who reads program files and the config."""

    def programs(self) -> list[tuple[str, str, str]]: ...
    def check(self, path: str, cwd: str) -> calls.Checked: ...
    def reload(self) -> None: ...


class Started(msgspec.Struct):
    """The step that a process's task is at."""

    epoch: int
    scope: trio.CancelScope


What = str | Callable[[], str]
"""What a process waits for; one that changes while it waits is computed when somebody looks."""

_STILL = {ProcState.LIVE: "S", ProcState.STOPPED: "T", ProcState.ZOMBIE: "Z"}


class RunWaiter:
    """Somebody who waits for the end of one run."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.proc: Proc | None = None


class EndWaiter:
    """Somebody who waits for the ends of processes, and keeps each as it was then."""

    def __init__(self, left: set[Pid], ended: dict[Pid, Proc], *, any_: bool) -> None:
        self.done = trio.Event()
        self.left = left
        self.ended = ended
        self.any = any_

    def note(self, proc: Proc) -> None:
        """One of them has ended."""
        self.left.discard(proc.pid)
        self.ended[proc.pid] = proc
        if self.any or not self.left:
            self.done.set()


class Machine:
    """What joins the kernel to the world."""

    def __init__(
        self,
        kernel: Kernel,
        store: Store,
        config: Config,
        model: Model,
        spawner: Spawner,
        live: Callable[["Machine", Pid], Awaitable[None]],
        image_of: ImageOf,
        clock: Callable[[], float] = time.time,
    ) -> None:
        kernel.new_life()
        self.kernel = kernel
        self.store = store
        self.config = config
        self.model = model
        self.spawner = spawner
        self.sched = sched.Scheduler(*bounds(config))
        self.prices = prices(config)
        kernel.defaults = tree_limits(config)
        self.herd = sched.Herd()
        self.windows = Windows()
        self.threads = Threads()
        self.console = console.Console(kernel.counters.seq)
        self.waits = waitchan.WaitChan()
        self.pager = pager.Pager(store)
        self.turns: dict[Pid, Turn] = {}  # answers that are coming in
        self.fresh: dict[Pid, MessageId] = {}  # heads whose begun tools have yet to start
        self.ticket = 0
        self.image_of = image_of
        self._live = live
        self._clock = clock
        self._nursery: trio.Nursery | None = None
        self._tasks: set[Pid] = set()
        self._steps: dict[Pid, Started] = {}
        self._doing: dict[Pid, dict[str, What]] = {}
        self._runs: dict[Pid, dict[int, list[RunWaiter]]] = {}
        self._ends: dict[Pid, set[EndWaiter]] = {}
        self._alarms: dict[Pid, trio.CancelScope] = {}
        self._transcripts: dict[Pid, tuple[MessageId | None, Transcript, int]] = {}
        self._kept = 0
        self._published = 0
        self.local: Local | None = None
        self.on_alarm: Callable[[Pid, str], Awaitable[None]] | None = None
        self.stopping = trio.Event()
        self.started = clock()
        self.uid = os.getuid()
        self.os_pid = os.getpid()
        self.shared = False  # may others than this user connect?
        self.boot_id = ""
        self.socket = ""
        self.state_dir = ""
        store.on_durable = self._became_durable

    def identify(self, path: str, state_dir: str, boot_id: str, desk: Desk) -> None:
        """Where this daemon is, which life of it this is, and who reads its files."""
        self.socket, self.state_dir, self.boot_id = path, state_dir, boot_id
        self.programs, self.check, self.reload = desk.programs, desk.check, desk.reload

    def configure(self, config: Config) -> None:
        """Use another config from now on."""
        self.config = config
        self.prices = prices(config)
        self.kernel.defaults = tree_limits(config)
        self.sched.configure(*bounds(config))

    @property
    def busy(self) -> int:
        """How many processes have a step under way."""
        return len(self._steps)

    # --- changing ----------------------------------------------------------------------------------

    def begin(self) -> Kernel:
        """The kernel, told what time it is. Call it after the last await before a verb."""
        self.kernel.now = self._clock()
        return self.kernel

    def commit(self, why: str) -> int:
        """Hand what the verbs changed to the store, and let everybody act on it. Returns the ticket."""
        change = self.kernel.taken()
        if not change:
            return self.ticket
        change.why.append(why)
        self.ticket = self.store.submit(change)
        self._publish(change)
        for proc in change.procs.values():
            self._react(proc)
        for pid in change.gone:
            self.waits.wakeup(("limit", pid))
        return self.ticket

    def room(self, count: int) -> None:
        """Refuse new processes when there are too many (EAGAIN) or the disk is nearly full (ENOSPC)."""
        if self.kernel.living + count > self.config.max_procs:
            raise KernelError(Errno.EAGAIN, f"there are {self.kernel.living} living processes already")
        if self.store.free() < LEAST_FREE:
            raise KernelError(Errno.ENOSPC, "the disk of the state directory is nearly full")

    async def wait_durable(self) -> None:
        """Wait until all that is in memory now is on disk."""
        await self.store.wait_durable(self.ticket)

    def _publish(self, change: Change) -> None:
        events = [event for event in change.events if event.seq > self._published]
        if self.console.publish(events, self.ticket, self.store.durable):
            self.waits.wakeup("events")

    def _became_durable(self, durable: int) -> None:
        if self.console.reveal(durable):
            self.waits.wakeup("events")

    def announce(self, kind: str, pid: Pid, **more: object) -> None:
        """Tell at once of something that no crash can take back. It is stored with the next commit."""
        k = self.begin()
        events = k.change.events
        k.emit(kind, pid, **more)
        event = (k.loose or events)[-1]
        k.loose.clear()
        self._published = event.seq
        if self.console.publish([event], self.ticket, self.store.durable):
            self.waits.wakeup("events")

    # --- processes and their tasks -----------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The supervisor: a task for each process that has a step to run."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._close_files()
            task_status.started()
            for pid in list(self.kernel.procs):
                proc = self.kernel.procs[pid]
                if proc.live:
                    self._react(proc)
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def _close_files(self) -> None:
        """Files that an earlier life's commands were writing to grow no more."""
        k = self.begin()
        for file in [file for file in k.files.values() if file.disk and not file.complete]:
            try:
                size = self.pager.size(file)
            except FileNotFoundError:  # its contents were not on disk yet when the power went
                size = 0
            k.put_file(msgspec.structs.replace(file, size=size, complete=True))
        self.commit("boot")

    def _react(self, proc: Proc) -> None:
        pid = proc.pid
        started = self._steps.get(pid)
        if started is not None and started.epoch != proc.epoch:
            started.scope.cancel(reason="the process was interrupted")
        if not proc.live:
            self._ended(proc)
        elif pid not in self._tasks and not isinstance(step.next_step(proc), step.Sleep):
            self._tasks.add(pid)
            self.background(self._live, self, pid)
        if proc.live and pid not in self._alarms and limits.is_timed(self.kernel, proc):
            self.background(self._alarm, pid)
        self._answer_runs(proc)
        self.waits.wakeup(("proc", pid))

    def _ended(self, proc: Proc) -> None:
        pid = proc.pid
        for waiter in self._ends.pop(pid, ()):
            waiter.note(proc)
        self._forget(pid)
        self.fresh.pop(pid, None)
        self.threads.end(pid)
        if pid in self._alarms:
            self._alarms[pid].cancel(reason="the process ended")
        self.background(self.spawner.kill_all, pid)

    def background(self, task: Callable[..., Awaitable[object]], *args: object) -> None:
        """Run something beside the processes, for as long as the daemon runs."""
        if self._nursery is not None:
            self._nursery.start_soon(task, *args)

    @contextmanager
    def step(self, proc: Proc) -> Generator[None]:
        """The one cancel scope in which a process's step runs."""
        with trio.CancelScope() as scope:
            self._steps[proc.pid] = Started(proc.epoch, scope)
            try:
                yield
            finally:
                del self._steps[proc.pid]
                self._doing.pop(proc.pid, None)

    def leave(self, pid: Pid) -> None:
        """A process's task has nothing to do any more."""
        self._tasks.discard(pid)

    @contextmanager
    def doing(self, pid: Pid, what: What, key: str = "") -> Generator[None]:
        """Say what a process waits for (WCHAN)."""
        self.waits_for(pid, what, key)
        try:
            yield
        finally:
            self._doing.get(pid, {}).pop(key, None)

    def waits_for(self, pid: Pid, what: What, key: str = "") -> None:
        self._doing.setdefault(pid, {})[key] = what
        proc = self.kernel.procs.get(pid)
        if proc is not None and self.console.wanted(pid, "state"):
            self.announce("state", pid, stat=self.stat(proc), wchan=what if isinstance(what, str) else what())

    def wchan(self, proc: Proc) -> str:
        """What a process waits for."""
        doing = self._doing.get(proc.pid)
        if doing:
            said = (what if isinstance(what, str) else what() for what in doing.values())
            return next((what for what in said if what != "wait"), "wait")
        if not proc.live:
            return "-"
        if proc.stopped:
            return "-"
        todo = step.next_step(proc)
        return todo.wchan if isinstance(todo, step.Sleep) else "-"

    def stat(self, proc: Proc) -> str:
        """The letter of `ps`."""
        if not proc.live:
            return "Z"
        if proc.stopped:
            return "T"
        wchan = self.wchan(proc)
        if wchan in {"slot", "limit", "backoff"} or wchan.startswith("retry-after"):
            return "D"
        return "S" if wchan in {"wait", "fd:0"} else "R"

    def counts(self) -> dict[str, int]:
        """How many processes have each letter of `ps`; one without a task sleeps, whatever for."""
        found: dict[str, int] = {}
        for pid, proc in self.kernel.procs.items():
            letter = _STILL[proc.state] if pid not in self._tasks or not proc.live else self.stat(proc)
            found[letter] = found.get(letter, 0) + 1
        return found

    # --- what others wait for ----------------------------------------------------------------------

    async def wait_ended(
        self, pids: Sequence[Pid], *, any_: bool = False, ended: dict[Pid, Proc] | None = None
    ) -> dict[Pid, Proc]:
        """Wait until all (or any) of some processes have ended or are gone.

        Args:
            pids: the processes; one that is gone already is not waited for.
            any_: one end is enough.
            ended: filled with those that have ended, for a caller that may give up waiting.

        Returns:
            those that have ended, as they were then: others may remove them meanwhile.
        """
        ended = {} if ended is None else ended
        procs = [p for p in map(self.kernel.procs.get, pids) if p is not None]
        ended.update((p.pid, p) for p in procs if not p.live)
        left = {p.pid for p in procs if p.live}
        if not left or (any_ and len(left) < len(set(pids))):
            return ended
        waiter = EndWaiter(left, ended, any_=any_)
        for pid in left:
            self._ends.setdefault(pid, set()).add(waiter)
        try:
            await waiter.done.wait()
        finally:
            self._end_no_more(waiter)
        return ended

    def _end_no_more(self, waiter: EndWaiter) -> None:
        for pid in waiter.left:
            self._ends[pid].discard(waiter)
            if not self._ends[pid]:
                del self._ends[pid]

    def wait_run(self, pid: Pid, seq: int) -> Awaitable[Proc]:
        """Wait for the end of the run that a message waiting in fd 0 will begin; the process as it was then.

        It is waited for from here on, whenever the caller gets to awaiting it.
        """
        waiter = RunWaiter()
        self._runs.setdefault(pid, {}).setdefault(seq, []).append(waiter)
        return self._wait_run(pid, seq, waiter)

    async def _wait_run(self, pid: Pid, seq: int, waiter: RunWaiter) -> Proc:
        runs = self._runs[pid]
        try:
            await waiter.done.wait()
        finally:
            runs[seq].remove(waiter)
            if not runs[seq]:
                del runs[seq]
            if not runs:
                del self._runs[pid]
        assert waiter.proc is not None
        return waiter.proc

    def _answer_runs(self, proc: Proc) -> None:
        for seq, waiters in self._runs.get(proc.pid, {}).items():
            if proc.run.seq == seq and proc.run.ended:
                _answer(waiters, proc)
            elif not proc.live:  # it never came to that run
                never = Run(seq=seq, began=proc.ended, ended=proc.ended)
                _answer(waiters, msgspec.structs.replace(proc, run=never))

    async def message(self, proc: Proc) -> str:
        """The last message of a process: its last words, or what the model said last."""
        if proc.farewell:
            return proc.farewell
        return await self.said(proc.run)

    async def said(self, run: Run) -> str:
        """What the model said last in a run."""
        node = await self.store.node(run.spoke) if run.spoke is not None else None
        return history.text(node) if node is not None else ""

    async def run_result(self, proc: Proc) -> RunResult:
        """What the last run of a process did."""
        run = proc.run
        return RunResult(
            pid=proc.pid,
            stop_reason=run.stop_reason or None,
            message=await self.message(proc),
            api_calls=run.api_calls,
            tool_calls=[ToolCallInfo(call.name, call.input, call.is_error) for call in run.tool_calls],
            usage=run.usage,
            cost_usd=self.cost(run, proc.pid),
            duration_ms=round(1000 * max(0.0, (run.ended or self._clock()) - run.began)),
            status=proc.status,
        )

    def cost(self, run: Run, pid: Pid) -> float | None:
        """What a run and all that was born below have cost meanwhile, in dollars; None when not known."""
        if run.ended and run.after is None:
            return 0.0  # it never came to that run
        after = self.kernel.total(pid) if run.after is None else run.after
        return (after + -run.before).dollars

    def partial(self, pid: Pid) -> Reply | None:
        """What has been streamed of the answer under way."""
        turn = self.turns.get(pid)
        return self.priced(pid, turn.partial()) if turn is not None else None

    def priced(self, pid: Pid, reply: Reply) -> Reply:
        """An answer with what it has cost."""
        rate = self.prices.of(self.kernel.image(self.kernel.proc(pid)))
        return msgspec.structs.replace(reply, cost=pricing.cost(rate, reply))

    def affordable(self, image: Image, birth: Pid, own: Mapping[str, Limit]) -> None:
        """Refuse (EINVAL) a model without a known price where a cost limit would bind it."""
        whose = limits.paying(self.kernel, birth, own)
        if whose is not None and self.prices.of(image) is None:
            where = "its own" if whose == INIT else f"that of process {whose}"
            raise KernelError(
                Errno.EINVAL,
                f"limits.cost_usd: the price of {image.model!r} is not known, and a limit binds ({where}); "
                f'give it one in the config: [prices."{image.model}"]',
            )

    # --- history -----------------------------------------------------------------------------------

    async def node(self, id_: MessageId) -> Node:
        """A message that a process refers to. ENOENT when that was removed and its messages are freed."""
        node = self.store.node_nowait(id_) or await self.store.node(id_)
        if node is None:
            raise KernelError(Errno.ENOENT, f"no such message: m{id_}")
        return node

    async def transcript(self, proc: Proc) -> Transcript:
        """The joined history up to a process's head; kept between turns, and appended to."""
        kept = self._transcripts.get(proc.pid)
        model = self.kernel.image(proc).model
        if kept is not None and kept[1].model == model:
            nodes = await self._since(proc, kept[0])
            if nodes is not None:
                for node in nodes:
                    kept[1].append(node)
                self._keep(proc, kept[1])
                return kept[1]
        nodes = await self.store.path(proc.head) if proc.head is not None else []
        transcript = Transcript.of(nodes, model)
        self._keep(proc, transcript)
        return transcript

    async def _since(self, proc: Proc, id_: MessageId | None) -> list[Node] | None:
        """The few nodes between an earlier head and this one; None if it is no near ancestor."""
        nodes: list[Node] = []
        at = proc.head
        while at is not None and at != id_ and len(nodes) < 8:
            nodes.append(await self.node(at))
            at = nodes[-1].parent
        return nodes[::-1] if at == id_ else None

    def _keep(self, proc: Proc, transcript: Transcript) -> None:
        self._forget(proc.pid)
        self._transcripts[proc.pid] = (proc.head, transcript, len(transcript))
        self._kept += len(transcript)
        while self._kept > TRANSCRIPTS and len(self._transcripts) > 1:
            self._forget(next(iter(self._transcripts)))

    def _forget(self, pid: Pid) -> None:
        kept = self._transcripts.pop(pid, None)
        self._kept -= kept[2] if kept else 0

    # --- wall-clock limits -------------------------------------------------------------------------

    def limits_changed(self, pid: Pid) -> None:
        """Other limits bind a process and all below it: alarms are set anew, and waiting calls look again."""
        for one in map(self.kernel.proc, access.subtree(self.kernel, pid)):
            if one.pid in self._alarms:
                self._alarms[one.pid].cancel(reason="the limit was changed")
            elif one.live and limits.is_timed(self.kernel, one):
                self.background(self._alarm, one.pid)
        self.waits.wakeup(("limit", pid))

    async def _alarm(self, pid: Pid) -> None:
        """Raise a process's wall limits when their time has come; begin anew when they are changed."""
        if pid in self._alarms:
            return
        changed = True
        while changed and (proc := self.kernel.procs.get(pid)) is not None and proc.live:
            with trio.CancelScope() as scope:
                self._alarms[pid] = scope
                await self._ring(proc)
            changed = scope.cancelled_caught
        self._alarms.pop(pid, None)

    async def _ring(self, proc: Proc) -> None:
        soft, hard = limits.bound(self.kernel, proc, "wall").soft, limits.deadline(self.kernel, proc)
        times = [(proc.began + soft, "soft")] if soft is not None else []
        if hard is not None:
            times.append((hard.at, "hard"))
        for at, which in sorted(times):
            while (left := at - self._clock()) > 0:  # noqa: ASYNC110  # the clock may be set back meanwhile
                await trio.sleep(left)
            if self.on_alarm is not None:
                await self.on_alarm(proc.pid, which)


def bounds(config: Config) -> tuple[Bounds, dict[str, Bounds]]:
    """What may be asked of endpoints in general, and of those that the config names."""
    own = {
        name: Bounds(table.slots or config.slots, table.rpm, table.itpm, table.otpm)
        for name, table in config.endpoints.items()
    }
    local = own.get("local", Bounds(0))
    own["local"] = msgspec.structs.replace(local, slots=local_slots(config))
    return Bounds(config.slots), own


def _answer(waiters: Sequence[RunWaiter], proc: Proc) -> None:
    for waiter in waiters:
        waiter.proc = waiter.proc or proc
        waiter.done.set()
