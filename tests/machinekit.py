"""A machine in process: the kernel, the store in memory, the scripted model and nothing else.

Time is trio's, so a mock clock rules latency, backoff, hold and wall limits. No socket is opened and no
process started, so `autojump_clock` never jumps over work that only looks idle.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import anthropic  # noqa: F401  # imported before any mock clock starts: a thread's wait would look idle to it
import msgspec
import trio

from llmprocd import task
from llmprocd.abi import calls
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.wire import Answer
from llmprocd.config import Config
from llmprocd.kernel.state import Kernel
from llmprocd.machine import Machine
from llmprocd.model import body
from llmprocd.model.anthropic import Anthropic
from llmprocd.model.script import Engine
from llmprocd.model.script_transport import ScriptTransport
from llmprocd.program import load, prompt
from llmprocd.store import memory
from llmprocd.syscall import sysalarm
from llmprocd.syscall.caller import Caller
from llmprocd.syscall.dispatch import Door
from llmprocd.tools import toolbox
from llmprocd.tools.spawner import Spawner

MODEL = "claude-sonnet-5-5"
EPOCH = 1_000_000_000.0
"""Wall time when trio's clock shows zero: a process that began at 0.0 would look as if it had not."""


class NoTools:
    """A spawner of nothing: no tool of these tests is a process."""

    async def kill_all(self, owner: int) -> None:
        """Kill none."""

    async def owner(self, _os_pid: int) -> int | None:
        return None


class Pushed:
    """A connection's side for notifications, kept in a list; `room` is how many it takes at once."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.notices: list[tuple[str, Any, int]] = []
        self.room = room
        self._drained = trio.Event()

    def notify(self, method: str, params: object, ticket: int = 0) -> bool:
        if len(self.notices) >= self.room:
            return False
        self.notices.append((method, params, ticket))
        return True

    async def writable(self) -> None:
        await self._drained.wait()

    def drain(self, room: int) -> None:
        """Let more through."""
        self.room = room
        self._drained.set()
        self._drained = trio.Event()


class House:
    """A machine, its endpoint, and the door that clients come through."""

    def __init__(self, m: Machine, store: memory.Store, engine: Engine, model: Anthropic) -> None:
        self.m = m
        self.store = store
        self.engine = engine
        self.model = model
        self.door = Door(m)
        self.user = self.caller()

    def caller(self, proc: int | None = None, push: Pushed | None = None) -> Caller:
        """A user, or the tool of a process."""
        return Caller(4242, self.m.uid, 0, proc, push or Pushed())

    def begin(self, method: str, *, by: Caller | None = None, **params: Any) -> Any:
        """A call as the socket hands it in: an Answer, or something to await."""
        return self.door.call(by or self.user, method, msgspec.msgpack.encode(params))

    async def call(self, method: str, *, by: Caller | None = None, **params: Any) -> Any:
        """What a call gives back, before anybody asks whether it is durable."""
        answer = self.begin(method, by=by, **params)
        if not isinstance(answer, Answer):
            answer = await answer
        return answer.result

    async def told(self, method: str, **params: Any) -> Any:
        """What a client reads: the answer once it is durable, as plain values."""
        answer = self.begin(method, **params)
        if not isinstance(answer, Answer):
            answer = await answer
        await self.door.wait_durable(answer.ticket)
        return msgspec.to_builtins(answer.result, builtin_types=(bytes,))

    async def spawn(self, program: Any = None, prompt: str | None = None, **more: Any) -> int:
        if prompt is not None:
            more["prompt"] = prompt
        spawned: calls.Spawned = await self.call("proc.spawn", program=program or table(), **more)
        return spawned.pid

    async def finish(self, program: Any, prompt: str, **more: Any) -> calls.Ended:
        """Spawn and wait."""
        pid = await self.spawn(program, prompt, **more)
        ended: calls.EndedList = await self.call("proc.wait", pids=[pid])
        return ended.procs[0]

    def proc(self, pid: int) -> Any:
        return self.m.kernel.proc(pid)

    def wchan(self, pid: int) -> str:
        return self.m.wchan(self.proc(pid))

    def stat(self, pid: int) -> str:
        return self.m.stat(self.proc(pid))

    async def until(self, pid: int, wchan: str) -> None:
        """Let the others run until a process waits for this."""
        with trio.fail_after(60):
            while self.wchan(pid) != wchan:
                await trio.sleep(0.01)

    async def results(self, pid: int) -> list[Any]:
        """The tool results on the path of a process, as they were sent to the model."""
        rows: calls.HistoryList = await self.call("proc.history", pid=pid)
        blocks = [block for row in rows.messages for block in json.loads(row.content)]
        return [block for block in blocks if block["type"] == "tool_result"]

    def types(self, pid: int) -> list[str]:
        """The types of the events of a process that a reader may see."""
        events, _ = self.m.console.read(0, 1_000_000, {pid}, None)
        return [event.type for event in events]


def table(*tools: Any, **tables: Any) -> dict[str, Any]:
    """A program as a map, whose model is the scripted one."""
    made = dict(tables)
    made["model"] = {"name": MODEL, "provider": "script", **tables.get("model", {})}
    made["tools"] = {"builtin": list(tools), **tables.get("tools", {})}
    return made


def script(*lines: str) -> str:
    return "\n".join(lines)


def use(name: str, **arguments: Any) -> str:
    """A directive of the script that calls a tool."""
    return f"!tool {name} {json.dumps(arguments)}"


class Told:
    """What a block was told in place of an answer."""

    error: KernelError


@contextmanager
def refused(errno: Errno, *words: str) -> Iterator[Told]:
    """The block must be refused with this errno, in these words."""
    told = Told()
    try:
        yield told
    except KernelError as error:
        told.error = error
    else:
        raise AssertionError(f"not refused; {errno.name} was due")
    assert told.error.errno is errno, str(told.error)
    assert [word for word in words if word not in told.error.text] == [], told.error.text


def build(
    store: memory.Store, config: Config, engine: Engine, live: Any = task.live, spawner: Any = None
) -> House:
    """A machine over a store; it does not run yet."""
    catalog = toolbox.catalog()
    model = Anthropic(lambda url, _: None if url else "key", None, lambda: ScriptTransport(engine))

    def image_of(source: Any, cwd: str, env: Any) -> Any:
        program, _ = load.load(source, cwd, catalog)
        return prompt.image(program, catalog, cwd=cwd, prefix=body.prefix, env=env)

    m = Machine(
        Kernel(store.load()),
        store,
        config,
        model,
        spawner or NoTools(),
        live,
        image_of,
        clock=lambda: EPOCH + trio.current_time(),
    )
    m.on_alarm = partial(sysalarm.ring, m)
    m.identify("/nowhere/sock", "/nowhere/state", "boot", Desk())  # pyright: ignore[reportArgumentType]
    return House(m, store, engine, model)


class Desk:
    """Reads no files."""

    def __init__(self) -> None:
        self.reloads = 0

    def programs(self) -> Sequence[tuple[str, str, str]]:
        return [("one", "/one.toml", "the first")]

    def check(self, path: str, _cwd: str) -> calls.Checked:
        return calls.Checked(path == "good", [], [])

    def reload(self) -> None:
        self.reloads += 1


@asynccontextmanager
async def running(
    *,
    latency: float = 0.0,
    config: Config | None = None,
    store: memory.Store | None = None,
    engine: Engine | None = None,
    spawner: Spawner | None = None,
    live: Any = task.live,
):
    """A machine that runs within the block. The endpoint must have refused nothing when it ends.

    With a `spawner` tools are real processes: then the clock must be real too.
    """
    store = store or memory.Store(latency=latency)
    house = build(store, config or Config(), engine or Engine(seed=b"house"), live, spawner)
    async with trio.open_nursery() as outer:
        await outer.start(lambda task_status: store.run(task_status=task_status))
        if spawner is not None:
            await outer.start(spawner.run)
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: house.m.run(task_status=task_status))
            yield house
            nursery.cancel_scope.cancel()
        await house.model.aclose()
        outer.cancel_scope.cancel()
    assert house.engine.refusals == [], "the endpoint refused what a process sent"
