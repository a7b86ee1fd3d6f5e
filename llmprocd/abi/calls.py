"""One struct for each system call: its fields are the arguments on the wire, its docstring the help text.

Law: an unknown argument is refused (EINVAL), so that a new one can be added later without surprise.
`CALLS` is the method table; `sys.api` prints it with JSON Schemas.
"""

from typing import Annotated, Any, ClassVar, Generic, TypeVar

import msgspec

from llmprocd.abi.types import Usage

R = TypeVar("R")

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Millis = Annotated[int, msgspec.Meta(ge=0, le=366 * 86_400_000)]
Name = Annotated[str, msgspec.Meta(max_length=4096)]
Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]


class Call(msgspec.Struct, Generic[R], frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A system call. `method` is its name on the wire, `reply` the type of what it returns."""

    method: ClassVar[str]
    reply: ClassVar[Any]


class Empty(msgspec.Struct, frozen=True):
    """Nothing to tell."""


# --- processes --------------------------------------------------------------------------------------


class Spawned(msgspec.Struct, frozen=True):
    pid: int


class Spawn(Call[Spawned], kw_only=True, frozen=True):
    """Start a process of a program."""

    method = "proc.spawn"
    reply = Spawned
    program: str | dict[str, Any]
    prompt: Text | None = None
    interactive: bool = False
    needs_prompt: bool = False  # EINVAL without any; else fd 0 is left open then
    name: Name = ""
    cwd: Name = ""
    env: dict[str, str] = {}
    nice: Annotated[int, msgspec.Meta(ge=-20, le=19)] = 0
    limits: dict[str, Any] = {}
    access: str = ""
    fds: Annotated[list[str], msgspec.Meta(max_length=256)] = []
    request_id: Any = ""  # text or bytes
    stdin_path: Name = ""


class ToolCallInfo(msgspec.Struct, frozen=True):
    name: str
    input: str
    is_error: bool


class RunResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one run did. `status` is there once the process has ended."""

    pid: int
    stop_reason: str | None
    message: str
    api_calls: int
    tool_calls: list[ToolCallInfo]
    usage: Usage
    cost_usd: float | None
    duration_ms: int
    status: int | None = None


class RunProc(Call[RunResult], kw_only=True, frozen=True):
    """Give a process a message (or none, to ask the model again) and wait until its run ends."""

    method = "proc.run"
    reply = RunResult
    pid: int
    prompt: Text | None = None
    max_iterations: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    timeout_ms: Millis | None = None


class CacheInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the last model call of a process read from the prompt cache; in tokens."""

    at: float
    message_id: str
    prompt: int
    read: int
    written: int
    expected: int  # what had been left in the cache of the same history
    reason: str  # why less was read; "" when it was not
    told: str  # what the endpoint says of that


class ProcInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `ps`."""

    pid: int
    ppid: int
    birth: int
    stat: str
    program: str
    name: str
    model: str
    provider: str
    uid: int
    access: str
    nice: int
    cwd: str
    head: str | None
    turns: int
    context_tokens: int
    context_window: int | None
    usage: Usage
    cost_usd: float | None  # of the whole subtree; null when not all of it is known
    own_cost_usd: float | None  # of its own model calls
    started: float
    ended: float | None
    wchan: str
    interactive: bool
    waiting: int
    collected: bool
    status: int | None
    stop_reason: str | None
    reason: str
    children: list[int]
    fds: list[int]
    run: RunResult | None
    cache: CacheInfo | None = None


class ProcList(msgspec.Struct, frozen=True):
    procs: list[ProcInfo]


class List(Call[ProcList], kw_only=True, frozen=True):
    """List processes: the living and those not collected, with `all` every one and pid 1."""

    method = "proc.list"
    reply = ProcList
    all: bool = False
    pids: list[int | str] | None = None


class Get(Call[ProcList], kw_only=True, frozen=True):
    """All there is about some processes; ESRCH for an unknown one."""

    method = "proc.get"
    reply = ProcList
    all: bool = False
    pids: list[int | str] | None = None
    pid: int | str | None = None


class SignalProc(Call[Empty], kw_only=True, frozen=True):
    """Send a signal to a process, with `tree` to its descendants too."""

    method = "proc.signal"
    reply = Empty
    pid: int
    signal: int | str
    tree: bool = False


class Ended(msgspec.Struct, frozen=True):
    pid: int
    status: int
    message: str
    usage: Usage
    cost_usd: float | None


class EndedList(msgspec.Struct, frozen=True):
    procs: list[Ended]


class Wait(Call[EndedList], kw_only=True, frozen=True):
    """Wait until all (or any) of some processes have ended, and collect them."""

    method = "proc.wait"
    reply = EndedList
    pids: Annotated[list[int], msgspec.Meta(max_length=100_000)]
    any: bool = False
    timeout_ms: Millis | None = None
    collect: bool = True


class Sent(msgspec.Struct, frozen=True):
    seq: int


class Send(Call[Sent], kw_only=True, frozen=True):
    """Put the next user message into a process's fd 0; durable when answered."""

    method = "proc.send"
    reply = Sent
    pid: int
    text: Text | None = None
    close: bool = False


class Pids(msgspec.Struct, frozen=True):
    pids: list[int]


class Fork(Call[Pids], kw_only=True, frozen=True):
    """Make one child for each prompt, or one that rests, sharing the whole history."""

    method = "proc.fork"
    reply = Pids
    pid: int
    prompts: Annotated[list[Text], msgspec.Meta(max_length=1000)] = []
    at: str = ""
    request_id: Any = ""  # text or bytes


class Moved(msgspec.Struct, frozen=True):
    old_head: str | None
    head: str | None


class Goto(Call[Moved], kw_only=True, frozen=True):
    """Move the head to a settled message of the process's history."""

    method = "proc.goto"
    reply = Moved
    pid: int
    to: str
    text: Text | None = None
    run: bool = False


class Exec(Call[Empty], kw_only=True, frozen=True):
    """Replace the program of a process; history and descriptors stay."""

    method = "proc.exec"
    reply = Empty
    pid: int
    program: str | dict[str, Any]
    cwd: Name = ""


class LimitInfo(msgspec.Struct, frozen=True):
    resource: str
    soft: float | None
    hard: float | None
    used: float | None


class LimitList(msgspec.Struct, frozen=True):
    limits: list[LimitInfo]


class Limits(Call[LimitList], kw_only=True, frozen=True):
    """Show a process's limits, after changing those in `set`."""

    method = "proc.limits"
    reply = LimitList
    pid: int
    set: dict[str, Any] = {}


class Renice(Call[Empty], kw_only=True, frozen=True):
    """Change how a process is weighed against others (-20 first, 19 last)."""

    method = "proc.renice"
    reply = Empty
    pid: int
    nice: Annotated[int, msgspec.Meta(ge=-20, le=19)]


class Rename(Call[Empty], kw_only=True, frozen=True):
    """Give a process another name, or none."""

    method = "proc.rename"
    reply = Empty
    pid: int
    name: Name


class Remove(Call[Empty], kw_only=True, frozen=True):
    """Forget ended processes."""

    method = "proc.remove"
    reply = Empty
    pids: list[int]


# --- history ----------------------------------------------------------------------------------------


class MessageInfo(msgspec.Struct, frozen=True):
    id: str
    parent: str | None
    role: str
    content: str
    tokens: int | None
    at: float


class HistoryList(msgspec.Struct, frozen=True):
    head: str | None
    messages: list[MessageInfo]


class History(Call[HistoryList], kw_only=True, frozen=True):
    """The messages on the path to the head, or with `all` of every branch."""

    method = "proc.history"
    reply = HistoryList
    pid: int
    all: bool = False
    after: str = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None


# --- descriptors ------------------------------------------------------------------------------------


class FdInfo(msgspec.Struct, frozen=True):
    pid: int
    fd: int | str
    mode: str
    type: str
    size: int
    name: str
    complete: bool
    program: str = ""


class FdTable(msgspec.Struct, frozen=True):
    fds: list[FdInfo]


class FdList(Call[FdTable], kw_only=True, frozen=True):
    """The open descriptors of one process, or of all."""

    method = "fd.list"
    reply = FdTable
    pid: int | None = None


class FdStat(Call[FdInfo], kw_only=True, frozen=True):
    """One descriptor."""

    method = "fd.stat"
    reply = FdInfo
    pid: int
    fd: int | str


class Data(msgspec.Struct, frozen=True, omit_defaults=True):
    offset: int
    data: bytes
    size: int
    eof: bool
    page: int | None = None
    pages: int | None = None
    lines: int | None = None


class FdRead(Call[Data], kw_only=True, frozen=True):
    """Bytes of a descriptor from an offset; or one page, some lines, or the lines a pattern matches.

    `offset` also counts within what is matched, and within a line that is longer than an answer.
    """

    method = "fd.read"
    reply = Data
    pid: int
    fd: int | str
    offset: Count = 0
    count: Count = 262_144
    wait_ms: Millis = 0
    page: Annotated[int, msgspec.Meta(ge=1)] | None = None
    line: Annotated[int, msgspec.Meta(ge=1)] | None = None
    lines: Annotated[int, msgspec.Meta(ge=1)] = 1
    grep: Name | None = None


class Written(msgspec.Struct, frozen=True):
    count: int


class FdWrite(Call[Written], kw_only=True, frozen=True):
    """Write to fd 0: the bytes are the next user message; `eof` closes it."""

    method = "fd.write"
    reply = Written
    pid: int
    fd: int = 0
    data: Any = b""  # bytes or text
    eof: bool = False


# --- events -----------------------------------------------------------------------------------------


class EventList(msgspec.Struct, frozen=True):
    events: list[dict[str, Any]]
    next_seq: int
    lost: int


class EventsRead(Call[EventList], kw_only=True, frozen=True):
    """Events after `after_seq`; pass `next_seq` as the next one."""

    method = "events.read"
    reply = EventList
    after_seq: Count | None = None
    max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1000
    wait_ms: Millis = 0
    pids: list[int] | None = None
    types: list[str] | None = None


class Subscribed(msgspec.Struct, frozen=True):
    sub: int


class Subscribe(Call[Subscribed], kw_only=True, frozen=True):
    """Push events to this connection."""

    method = "events.subscribe"
    reply = Subscribed
    after_seq: Count | None = None
    pids: list[int] | None = None
    types: list[str] | None = None


class Unsubscribe(Call[Empty], kw_only=True, frozen=True):
    """Stop pushing."""

    method = "events.unsubscribe"
    reply = Empty
    sub: int


# --- the daemon -------------------------------------------------------------------------------------


class Peer(msgspec.Struct, frozen=True, omit_defaults=True):
    pid: int
    uid: int
    gid: int
    proc: int | None = None


class Greeting(msgspec.Struct, frozen=True):
    proto: int
    server: str
    version: str
    boot_id: str
    caps: list[str]
    limits: dict[str, int]
    peer: Peer


class Hello(Call[Greeting], kw_only=True, frozen=True):
    """Say who you are and how errors shall look: array, nvim or string."""

    method = "hello"
    reply = Greeting
    proto: int = 1
    client: Name = ""
    errors: str = "array"
    caps: list[str] = []


class MethodInfo(msgspec.Struct, frozen=True):
    name: str
    help: str
    params: str
    result: str
    waits: bool


class ApiTable(msgspec.Struct, frozen=True):
    methods: list[MethodInfo]


class Api(Call[ApiTable], kw_only=True, frozen=True):
    """The method table; `params` and `result` are JSON Schemas (JSON text)."""

    method = "sys.api"
    reply = ApiTable


class SlotInfo(msgspec.Struct, frozen=True):
    endpoint: str
    running: int
    waiting: int
    slots: int
    held_s: float
    rpm: int | None = None  # requests in a minute; None: no limit is known
    rpm_left: int | None = None
    itpm: int | None = None  # input tokens
    itpm_left: int | None = None
    otpm: int | None = None  # output tokens
    otpm_left: int | None = None


class LocalInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The model that runs on this machine. `state`: down, starting, up, or waiting to be started again."""

    installed: bool  # is the extra there that it needs?
    state: str
    model: str = ""
    path: str = ""
    url: str = ""
    pid: int | None = None
    slots: int = 0  # answers at once
    window: int = 0  # tokens that a prompt may have
    restarts: int = 0  # since it is wanted
    reason: str = ""  # why it ended last


class Status(msgspec.Struct, frozen=True):
    version: str
    pid: int
    boot_id: str
    uptime_s: float
    socket: str
    state_dir: str
    procs: dict[str, int]
    usage: Usage
    cost_usd: float | None
    scheduler: list[SlotInfo]
    local: LocalInfo | None = None


class GetStatus(Call[Status], kw_only=True, frozen=True):
    """Version, uptime, counts, cost and the scheduler."""

    method = "sys.status"
    reply = Status


class Reload(Call[Empty], kw_only=True, frozen=True):
    """Read the daemon's config again."""

    method = "sys.reload"
    reply = Empty


class Stop(Call[Empty], kw_only=True, frozen=True):
    """Stop the daemon; processes go on when it is started again."""

    method = "sys.stop"
    reply = Empty


# --- the local model --------------------------------------------------------------------------------


class LocalUp(Call[LocalInfo], kw_only=True, frozen=True):
    """Serve a model on this machine, now and whenever the daemon runs; waits until it is ready."""

    method = "local.up"
    reply = LocalInfo
    model: Name = "0.5b"
    path: Name = ""  # of its weights; "" is where the daemon's own user has them
    threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0  # 0: one a core


class LocalDown(Call[LocalInfo], kw_only=True, frozen=True):
    """Serve it no more; waits until it has ended."""

    method = "local.down"
    reply = LocalInfo


class LocalStatus(Call[LocalInfo], kw_only=True, frozen=True):
    """How the model on this machine does."""

    method = "local.status"
    reply = LocalInfo


# --- programs ---------------------------------------------------------------------------------------


class FaultInfo(msgspec.Struct, frozen=True):
    line: int
    key: str
    text: str


class Checked(msgspec.Struct, frozen=True):
    ok: bool
    faults: list[FaultInfo]
    warnings: list[str]


class ProgCheck(Call[Checked], kw_only=True, frozen=True):
    """Name every fault of a program file."""

    method = "prog.check"
    reply = Checked
    path: Name
    cwd: Name = ""


class Freed(msgspec.Struct, frozen=True):
    """What nothing referred to: descriptors' files, messages, and the bytes of both."""

    files: int
    messages: int
    bytes: int


class StoreGc(Call[Freed], kw_only=True, frozen=True):
    """Free what nothing refers to any more: what only processes had that are removed."""

    method = "store.gc"
    reply = Freed
    dry_run: bool = False


class ProgramInfo(msgspec.Struct, frozen=True):
    name: str
    path: str
    description: str


class ProgramTable(msgspec.Struct, frozen=True):
    programs: list[ProgramInfo]


class ProgList(Call[ProgramTable], kw_only=True, frozen=True):
    """The programs that are built in, and those on `$LLMPROC_PATH`."""

    method = "prog.list"
    reply = ProgramTable


CALLS: tuple[type[Call[Any]], ...] = (
    Hello, Api, GetStatus, Reload, Stop,
    Spawn, RunProc, List, Get, SignalProc, Wait, Send, Fork, Goto, Exec, Limits, Renice, Rename, Remove,
    History,
    FdList, FdStat, FdRead, FdWrite,
    EventsRead, Subscribe, Unsubscribe,
    ProgList, ProgCheck,
    StoreGc,
    LocalUp, LocalDown, LocalStatus,
)  # fmt: skip
