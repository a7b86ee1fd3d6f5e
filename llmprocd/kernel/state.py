"""Every value that must survive. Read this first.

Law: values are frozen; a change replaces one. Mappings inside them are replaced too, never changed.
Law: the kernel changes memory and writes the same change down in `Kernel.change`, in one synchronous
stretch; the machine hands that change to the store. What is not in a change did not happen.
Law: pids, message ids, file ids and event numbers are never used twice.

A process does not hold its history: it points at one node of it (`head`), and keeps beside the pointer
the kind of that node (`at`), which is all that its next step depends on. Nodes are immutable, so the
two cannot disagree; both are set by `Proc.moved` and nowhere else.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from enum import Enum
from typing import Any, Literal, TypeVar

import msgspec

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.events import FLEETING, Event
from llmprocd.abi.types import (
    INIT,
    Access,
    FileId,
    ImageId,
    MessageId,
    Pid,
    ProcState,
    ToolUseId,
    Usage,
)
from llmprocd.kernel import stop

Role = Literal["user", "assistant"]


class At(Enum):
    """What the head is, as far as the next step is concerned."""

    EMPTY = "empty"  # no message yet
    USER = "user"  # the model's turn
    ASKS = "asks"  # the model asked for tools
    PAUSE = "pause"  # the model wants to be asked again (pause_turn, compaction)
    DONE = "done"  # the model ended its turn


class ToolUse(msgspec.Struct, frozen=True):
    """One call that the model asked for."""

    id: ToolUseId
    name: str
    input: bytes  # JSON, as it came
    broken: bool = False  # the JSON did not arrive whole


class Reply(msgspec.Struct, frozen=True):
    """One answer of a model, or what there is of one that was cut off."""

    body: bytes = b""  # content blocks joined by commas; b"" when the answer is empty
    text: str = ""  # its text blocks, joined
    asks: tuple[ToolUse, ...] = ()
    thinks: bool = False
    stop_reason: str = ""
    model: str = ""
    usage: Usage = Usage()
    written_1h: int = 0  # of what was written into the cache: tokens that stay for an hour
    searches: int = 0  # web searches that the endpoint made
    cost: int | None = None  # billionths of a dollar; None: not known
    message_id: str = ""  # the endpoint's
    diagnostics: bytes = b""  # what the endpoint says of the prompt cache; JSON


class ToolResult(msgspec.Struct, frozen=True):
    """One call's answer; `text` is what the model reads."""

    id: ToolUseId
    text: str
    is_error: bool = False


class Node(msgspec.Struct, frozen=True):
    """One immutable message of a history tree."""

    id: MessageId
    parent: MessageId | None
    role: Role
    body: bytes  # its content blocks as the API's JSON, joined by commas; never encoded again
    at: float = 0.0  # wall time, seconds
    model: str = ""  # who wrote it: signed thinking can be read by that model only
    thinks: bool = False  # holds thinking blocks
    stop_reason: str = ""
    asks: tuple[ToolUse, ...] = ()
    usage: Usage | None = None
    text: bool = False  # a user's own words (not tool results)


class File(msgspec.Struct, frozen=True):
    """Immutable or append-only contents; a fork shares it freely."""

    id: FileId
    size: int  # bytes; of a growing file on disk: when last looked at
    complete: bool
    origin: str  # the tool that made it, "user_input", "stdout", "stderr", "ref:name"
    disk: bool = False  # a file of its own instead of rows
    chars: int = 0  # characters as a model reads it
    lines: int = 0


class Offer(msgspec.Struct, frozen=True):
    """One tool as it can be offered to a model."""

    name: str
    description: str
    input_schema: bytes  # JSON Schema
    access: Access


class ToolName(msgspec.Struct, frozen=True):
    """One tool as a program offers it: the name the model uses, and the tool behind it."""

    name: str
    tool: str
    access: Access


class Link(msgspec.Struct, frozen=True):
    """A program that `spawn` can be asked for by name."""

    name: str
    path: str
    description: str = ""


class Paging(msgspec.Struct, frozen=True):
    """When an output becomes a file, and how large its pages are; in characters."""

    enabled: bool = True
    max_direct_output_chars: int = 8000
    default_page_size: int = 4000
    max_input_chars: int = 8000
    page_user_input: bool = True
    enable_references: bool = False


class Limit(msgspec.Struct, frozen=True):
    """A soft and a hard bound; None is none."""

    soft: float | None = None
    hard: float | None = None


class Use(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a process, or a whole subtree, has used up. Money is counted in billionths of a dollar."""

    turns: int = 0
    tokens: int = 0  # all four counters of usage
    cost: int = 0
    unpriced: int = 0  # model calls whose price is not known
    procs: int = 0  # that live
    fds: int = 0  # descriptors opened
    fd_bytes: int = 0  # ... and what is in them

    def __add__(self, other: "Use") -> "Use":
        return Use(
            self.turns + other.turns,
            self.tokens + other.tokens,
            self.cost + other.cost,
            self.unpriced + other.unpriced,
            self.procs + other.procs,
            self.fds + other.fds,
            self.fd_bytes + other.fd_bytes,
        )

    def __neg__(self) -> "Use":
        return Use(
            -self.turns,
            -self.tokens,
            -self.cost,
            -self.unpriced,
            -self.procs,
            -self.fds,
            -self.fd_bytes,
        )

    @property
    def dollars(self) -> float | None:
        """The cost; None when not all of it is known."""
        return None if self.unpriced else self.cost / NANO


NANO = 1_000_000_000
"""Units of cost in a dollar."""

NOTHING = Use()


class Image(msgspec.Struct, frozen=True):
    """A program made ready to run: what exec replaces. Equal images are stored once."""

    program: str  # its name, for `ps`
    path: str  # the file it came from; "" for a built-in or a map
    model: str
    provider: str
    prefix: bytes  # the request up to `"messages":[`, rendered once; see model/body.py
    suffix: bytes  # what follows the messages
    tools: tuple[ToolName, ...] = ()
    links: tuple[Link, ...] = ()
    paging: Paging = Paging()
    base_url: str = ""
    api_key_env: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    user_prompt: str = ""
    max_iterations: int = 10
    child_access: Access = Access.WRITE
    caching: bool = True
    limits: tuple[tuple[str, Limit], ...] = ()  # by resource
    max_tokens: int = 8192  # as the request says
    least_tokens: int = 1  # below which the endpoint refuses: it must be more than may be thought
    region: str = ""  # of a cloud
    project_id: str = ""  # what a cloud bills: a project, a workspace, a resource
    threads: bool = False  # the endpoint may hold the conversation; see model/threads.py

    def tool(self, name: str) -> ToolName | None:
        """The tool that the model calls by this name, or by its own."""
        for tool in self.tools:
            if tool.name == name:
                return tool
        return next((tool for tool in self.tools if tool.tool == name), None)

    def offers(self, tool: str) -> bool:
        return any(offered.tool == tool for offered in self.tools)


class Mail(msgspec.Struct, frozen=True):
    """One message in fd 0, not yet taken."""

    seq: int
    text: str
    max_iterations: int = 0  # 0: the program's
    again: bool = False  # no text: ask the model again from where the head is


class ToolCall(msgspec.Struct, frozen=True):
    """One tool call of a run, for its result."""

    name: str
    input: str
    is_error: bool


class Run(msgspec.Struct, frozen=True):
    """What the present or last run has done."""

    seq: int = 0  # of the mail that began it
    began: float = 0.0
    ended: float = 0.0  # 0.0 while it goes on
    api_calls: int = 0
    max_iterations: int = 0
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage = Usage()
    stop_reason: str = ""
    spoke: MessageId | None = None  # the last message in which the model said something
    before: Use = NOTHING  # of the subtree, when it began
    after: Use | None = None  # ... and when it ended


class LastCall(msgspec.Struct, frozen=True):
    """The last model call of a process, as far as prompt cache and context are concerned. In tokens."""

    message_id: str  # the endpoint's
    at: float  # wall time of the answer
    image: ImageId
    head: MessageId | None  # what was answered
    sent: int = 0  # bytes of the request
    prompt: int = 0
    read: int = 0  # ... of these from the cache
    written: int = 0  # ... and into it
    expected: int = 0  # what had been left in the cache of the same history
    reason: str = ""  # why less was read; "" when it was not
    told: str = ""  # what the endpoint says of that


class LastTurn(Enum):
    """How far a process is on its way out after a soft limit (SIGXCPU)."""

    NO = "no"
    DUE = "due"  # the next model call is its last
    ASKED = "asked"  # it has been told so
    OVER = "over"  # it has answered: exit 152


def stdio(pid: Pid, fd: int) -> FileId:
    """The file behind fd 1 or 2 of a process; below zero, so that it needs no record of its own."""
    return FileId(-(2 * pid + fd - 1))


class Proc(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A process."""

    pid: Pid
    ppid: Pid = INIT  # who waits for it
    birth: Pid = INIT  # whose subtree it is in, for ever
    family: Pid  # the first of those that share its history and its descriptor numbers
    uid: int = 0
    name: str = ""
    cwd: str = "/"
    env: Mapping[str, str] = {}
    image: ImageId
    access: Access = Access.ADMIN
    nice: int = 0
    began: float = 0.0
    ended: float = 0.0

    head: MessageId | None = None  # the program counter
    at: At = At.EMPTY
    rest: bool = False  # it has been told to rest at this head
    parked: bool = False  # ... by a goto, though fd 0 is closed: it does not exit
    tips: tuple[MessageId, ...] = ()  # earlier heads: the roots of its abandoned branches
    epoch: int = 0  # counts interruptions

    state: ProcState = ProcState.LIVE
    status: int | None = None
    collected: bool = False

    inbox: tuple[Mail, ...] = ()
    input_open: bool = False
    mails: int = 0  # how many were ever sent
    notify: tuple[Pid, ...] = ()  # children whose end puts a line into fd 0

    begun: tuple[ToolUseId, ...] = ()  # tools started under this head
    results: tuple[ToolResult, ...] = ()  # ... and those that ended
    awaiting: Mapping[ToolUseId, tuple[Pid, ...]] = {}  # children that a call waits for

    fds: Mapping[int, FileId] = {}  # from 3 up
    refs: Mapping[str, FileId] = {}
    stdout: int = 0  # bytes written so far; the contents are those of file `stdio(pid, fd)`
    stderr: int = 0

    run: Run = Run()
    verdict: int = 0  # the status it would exit with now
    stop_reason: str = ""  # of its last run
    reason: str = ""  # why it rests, in words
    farewell: str = ""  # what it said with `exit`
    turns: int = 0
    usage: Usage = Usage()
    cost: int = 0  # of its own calls, in billionths of a dollar
    unpriced: int = 0  # its own calls whose price is not known
    made: int = 0  # descriptors it has opened
    made_bytes: int = 0
    gone: Use = NOTHING  # what processes that were born below it and are removed had used
    context_tokens: int = 0
    context_told: int = 0  # per cent of the window that it has been told of
    last_call: LastCall | None = None
    limits: Mapping[str, Limit] = {}  # by resource; what is not there is as the config says
    last_turn: LastTurn = LastTurn.NO

    @property
    def live(self) -> bool:
        return self.state is not ProcState.ZOMBIE

    @property
    def stopped(self) -> bool:
        return self.state is ProcState.STOPPED

    @property
    def used(self) -> Use:
        """What it has used itself, and those below it that are removed."""
        tokens = self.usage.total
        own = Use(self.turns, tokens, self.cost, self.unpriced, int(self.live), self.made, self.made_bytes)
        return own if self.gone is NOTHING else own + self.gone

    @property
    def label(self) -> str:
        return f"{self.pid} ({self.name})" if self.name else f"{self.pid}"

    def moved(self, node: Node | None) -> "Proc":
        """The same process with its head on `node`, and nothing under way there."""
        return msgspec.structs.replace(
            self,
            head=node.id if node else None,
            at=kind(node),
            rest=False,
            parked=False,
            begun=(),
            results=(),
            awaiting={},
        )


def kind(node: Node | None) -> At:
    """What a node is to the process whose head it is."""
    if node is None:
        return At.EMPTY
    if node.role == "user":
        return At.USER
    if node.asks:
        return At.ASKS
    return At.PAUSE if stop.of(node.stop_reason).goes_on else At.DONE


class Request(msgspec.Struct, frozen=True):
    """An answered request: repeating it gives the same answer."""

    uid: int
    id: str
    digest: bytes
    reply: bytes
    at: float


class Chunk(msgspec.Struct, frozen=True):
    """Bytes appended to a file that is kept in rows."""

    file: FileId
    offset: int
    data: bytes


class Counters(msgspec.Struct):
    """The next number of each kind."""

    pid: int = 2
    message: int = 1
    file: int = 1
    image: int = 1
    seq: int = 1


class Garbage(msgspec.Struct, frozen=True):
    """What nothing refers to any more; see kernel/garbage.py."""

    nodes: Sequence[MessageId] = ()
    files: Collection[FileId] = ()
    images: Collection[ImageId] = ()
    families: Collection[Pid] = ()


class Change(msgspec.Struct):
    """What one commit writes. Replayed on an empty store in order, it gives the kernel back."""

    procs: dict[Pid, Proc] = {}
    nodes: list[Node] = []
    files: dict[FileId, File] = {}
    chunks: list[Chunk] = []
    images: dict[ImageId, Image] = {}
    families: dict[Pid, int] = {}  # family -> next descriptor number
    events: list[Event] = []
    requests: list[Request] = []
    gone: list[Pid] = []
    garbage: list[Garbage] = []
    counters: Counters | None = None
    why: list[str] = []  # the verbs it came from: names of the crash suite's points

    def __bool__(self) -> bool:
        return self.counters is not None

    @property
    def is_deed(self) -> bool:
        """Does it change anything, rather than take a number or tell of something?"""
        made = self.procs or self.nodes or self.files or self.chunks or self.images or self.families
        return bool(made or self.requests or self.gone or self.garbage)


class Saved(msgspec.Struct):
    """What a store gives back at boot."""

    procs: Iterable[Proc] = ()
    files: Iterable[File] = ()
    images: Mapping[ImageId, Image] = {}
    families: Mapping[Pid, int] = {}
    requests: Iterable[Request] = ()
    counters: Counters = msgspec.field(default_factory=Counters)


SEQ_GAP = 1_000_000
"""Event numbers that are left out at boot: more than could have been given since the last commit."""


class Kernel:
    """The process table and what hangs from it.

    Changed by the verbs of this package only, through `put`, `add_node`, `put_file`, `emit` and the
    other small doors below, which write each change down as they make it.
    """

    def __init__(self, saved: Saved | None = None) -> None:
        saved = saved or Saved()
        self.now = 0.0  # wall time, given by the machine before each call
        self.counters = saved.counters
        self.images = dict(saved.images)
        self.image_ids = {image: number for number, image in self.images.items()}
        self.files = {file.id: file for file in saved.files}
        self.families = dict(saved.families)
        self.requests = {(request.uid, request.id): request for request in saved.requests}
        self.procs: dict[Pid, Proc] = {}
        self.names: dict[str, Pid] = {}  # who answers to a name: the living one, else the youngest
        self._namesakes: dict[str, dict[Pid, None]] = {}
        self.children: dict[Pid, dict[Pid, None]] = {}
        self.born: dict[Pid, dict[Pid, None]] = {}
        self.change = Change()
        self.living = 0
        self.defaults: Mapping[str, Limit] = {}  # the config's limits, for each tree
        self.below: dict[Pid, Use] = {}  # what all that were born below a process have used
        self.holds: dict[Pid, Use] = {}  # what model calls under way may yet use
        self.held: dict[Pid, Use] = {}  # ... and those of whole subtrees
        for proc in saved.procs:
            self._index(proc)
            self.living += proc.live
        self._add_up()
        self.loose: list[Event] = []  # events that are shown and not stored

    def proc(self, pid: int) -> Proc:
        """The process of a pid; ESRCH when there is none, EPERM for init: it has no conversation."""
        try:
            return self.procs[Pid(pid)]
        except KeyError:
            if pid == INIT:
                raise KernelError(Errno.EPERM, "process 1 is the daemon itself", pid=pid) from None
            raise KernelError(Errno.ESRCH, f"no such process: {pid}", pid=pid) from None

    def image(self, proc: Proc) -> Image:
        return self.images[proc.image]

    def put(self, proc: Proc) -> Proc:
        """Replace a process, or add it."""
        old = self.procs.get(proc.pid)
        self.living += proc.live - (old is not None and old.live)
        if old is not None and (old.ppid, old.birth, old.name) != (proc.ppid, proc.birth, proc.name):
            self._unindex(old)
        self._index(proc)
        self._count(old, proc)
        self._dirty().procs[proc.pid] = proc
        return proc

    def drop(self, pid: Pid) -> None:
        """Forget an ended process. What it has used is forgotten with it: see `proc.remove`."""
        self.hold(pid, NOTHING)
        proc = self.procs.pop(pid)
        self.lift(self.below, proc.birth, -proc.used)
        self.below.pop(pid, None)
        self._unindex(proc)
        self.change.procs.pop(pid, None)
        self._dirty().gone.append(pid)

    def add_node(self, node: Node) -> Node:
        self._dirty().nodes.append(node)
        return node

    def put_file(self, file: File, data: bytes = b"") -> File:
        """Add or replace a file; `data` is what it grew by at its end."""
        self.files[file.id] = file
        change = self._dirty()
        change.files[file.id] = file
        if data:
            change.chunks.append(Chunk(file.id, file.size - len(data), data))
        return file

    def write(self, proc: Proc, fd: Literal[1, 2], text: str) -> Proc:
        """Append to a process's stdout or stderr. The caller puts the process."""
        data = text.encode()
        if not data:
            return proc
        offset = proc.stdout if fd == 1 else proc.stderr
        self._dirty().chunks.append(Chunk(stdio(proc.pid, fd), offset, data))
        size = {"stdout" if fd == 1 else "stderr": offset + len(data)}
        return msgspec.structs.replace(proc, **size)

    def put_image(self, image: Image) -> ImageId:
        """The number of an image; equal images have one."""
        number = self.image_ids.get(image)
        if number is None:
            number = ImageId(self.take("image"))
            self.images[number] = image
            self.image_ids[image] = number
            self._dirty().images[number] = image
        return number

    def put_request(self, request: Request) -> None:
        self.requests[request.uid, request.id] = request
        self._dirty().requests.append(request)

    def free(self, garbage: Garbage) -> None:
        """Let go of what nothing refers to."""
        for file in garbage.files:
            self.files.pop(file, None)
        for image in garbage.images:
            self.image_ids.pop(self.images.pop(image), None)
        for family in garbage.families:
            self.families.pop(family, None)
        self._dirty().garbage.append(garbage)

    def forget_requests(self, seconds: float) -> None:
        """Forget the answers that are older than that."""
        self.requests = {key: one for key, one in self.requests.items() if one.at >= self.now - seconds}

    def take(self, what: Literal["pid", "message", "file", "image", "seq"]) -> int:
        """The next number of a kind."""
        number: int = getattr(self.counters, what)
        setattr(self.counters, what, number + 1)
        self._dirty()
        return number

    def take_fd(self, family: Pid) -> int:
        """The next descriptor number of a family."""
        number = self.families.get(family, 3)
        self.families[family] = number + 1
        self._dirty().families[family] = number + 1
        return number

    def keep_fds(self, family: Pid, first_free: int) -> None:
        """Keep the descriptor numbers below one for what a family was handed."""
        self.families[family] = first_free
        self._dirty().families[family] = first_free

    def new_life(self) -> None:
        """Boot: number events far above what an earlier life may have shown."""
        if self.counters.seq > 1:
            self.counters.seq += SEQ_GAP

    def emit(self, type_: str, pid: Pid, **more: Any) -> None:
        """Tell the world, once the change is durable.

        A fleeting event makes no commit, so its number may be forgotten in a crash: that is why a new life
        begins its numbers far above the last that was written down.
        """
        if type_ in FLEETING:
            self.loose.append(Event(self.counters.seq, self.now, type_, pid, more))
            self.counters.seq += 1
        else:
            self._dirty().events.append(Event(self.take("seq"), self.now, type_, pid, more))

    def total(self, pid: Pid) -> Use:
        """What a process and all that were ever born below it have used."""
        proc = self.procs.get(pid)
        own = NOTHING if proc is None else proc.used
        below = self.below.get(pid)
        return own if below is None else own + below

    def hold(self, pid: Pid, use: Use) -> None:
        """Reserve what a model call may use up, in place of what was reserved for it before. Not stored."""
        before = self.holds.pop(pid, NOTHING)
        if use != NOTHING:
            self.holds[pid] = use
        self.lift(self.held, pid, use + -before)

    def lift(self, table: dict[Pid, Use], pid: Pid, more: Use) -> None:
        """Add to the sums of a process and of all that it was born below."""
        if more == NOTHING:
            return
        while (proc := self.procs.get(pid)) is not None:
            total = table.get(pid, NOTHING) + more
            if total == NOTHING:
                table.pop(pid, None)
            else:
                table[pid] = total
            pid = proc.birth

    def taken(self) -> Change:
        """The change since the last call, for the store."""
        change, self.change = self.change, Change()
        if change.counters is not None:
            change.counters = copy(change.counters)
        return change

    def _dirty(self) -> Change:
        if self.change.counters is None:
            self.change.counters = self.counters
        return self.change

    def _add_up(self) -> None:
        """The sums of all subtrees, in one pass: who was born later has the larger pid."""
        born = sorted((pid for pid, proc in self.procs.items() if proc.birth in self.procs), reverse=True)
        for pid in born:
            birth = self.procs[pid].birth
            self.below[birth] = self.below.get(birth, NOTHING) + self.total(pid)
        self.below = {pid: use for pid, use in self.below.items() if use != NOTHING}

    def _count(self, old: Proc | None, proc: Proc) -> None:
        """Carry what a process has used to all that it was born below."""
        if old is None:
            self.lift(self.below, proc.birth, proc.used)
            return
        if old.birth != proc.birth:
            whole = self.below.get(proc.pid, NOTHING) + old.used
            held = self.held.get(proc.pid, NOTHING)
            self.lift(self.below, old.birth, -whole)
            self.lift(self.held, old.birth, -held)
            self.lift(self.below, proc.birth, whole)
            self.lift(self.held, proc.birth, held)
        if not _used_alike(old, proc):
            self.lift(self.below, proc.birth, proc.used + -old.used)

    def _index(self, proc: Proc) -> None:
        self.procs[proc.pid] = proc
        self.children.setdefault(proc.ppid, {})[proc.pid] = None
        self.born.setdefault(proc.birth, {})[proc.pid] = None
        if proc.name:
            self._namesakes.setdefault(proc.name, {})[proc.pid] = None
            holder = self.names.get(proc.name)
            if holder is None or self._claim(proc.pid) > self._claim(holder):
                self.names[proc.name] = proc.pid
            elif holder == proc.pid and not proc.live:
                self._choose(proc.name)

    def _unindex(self, proc: Proc) -> None:
        _take_out(self.children, proc.ppid, proc.pid)
        _take_out(self.born, proc.birth, proc.pid)
        if proc.name:
            _take_out(self._namesakes, proc.name, proc.pid)
            self._choose(proc.name)

    def _claim(self, pid: Pid) -> tuple[bool, Pid]:
        return self.procs[pid].live, pid

    def _choose(self, name: str) -> None:
        """Say anew who answers to a name."""
        namesakes = self._namesakes.get(name)
        if namesakes:
            self.names[name] = max(namesakes, key=self._claim)
        else:
            self.names.pop(name, None)


def _used_alike(old: Proc, new: Proc) -> bool:
    """Whether one has certainly used what the other has; most changes of a process are of that kind."""
    return (
        old.usage is new.usage
        and old.gone is new.gone
        and (old.turns, old.cost, old.unpriced, old.made, old.made_bytes, old.live)
        == (new.turns, new.cost, new.unpriced, new.made, new.made_bytes, new.live)
    )


_Key = TypeVar("_Key")


def _take_out(index: dict[_Key, dict[Pid, None]], key: _Key, pid: Pid) -> None:
    """Take a process out of an index; nothing is kept for a key that has none."""
    index[key].pop(pid)
    if not index[key]:
        del index[key]
