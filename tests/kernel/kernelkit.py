"""What the kernel's tests share: replies, a disk that changes are replayed on, and a world moved by hand.

Law: what `Disk` holds comes from changes alone, by the plainest rules: the kernel's own tables are never
looked at. So a change that forgets something is found by booting from it.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from msgspec.structs import asdict

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import INIT, Access, FileId, ImageId, MessageId, Pid, Signal, ToolUseId, Usage
from llmprocd.kernel import garbage, history, proc, signal
from llmprocd.kernel.proc import Birth, ForkCall
from llmprocd.kernel.state import (
    At,
    Change,
    Counters,
    File,
    Garbage,
    Image,
    Kernel,
    Node,
    Proc,
    Reply,
    Request,
    Saved,
    ToolName,
    ToolResult,
    ToolUse,
)
from llmprocd.store import reach

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For properties: how long an example takes says something of the machine, and nothing of the kernel."""

EFFECTS = {"bash", "write_file"}
"""Tools that must be written down before they start."""

TOOLS = tuple(
    ToolName(name, name, level)
    for name, level in {
        "bash": Access.WRITE,
        "read_file": Access.READ,
        "fork": Access.ADMIN,
        "spawn": Access.ADMIN,
        "exit": Access.READ,
    }.items()
)


def image(**more: object) -> Image:
    """A program made ready to run."""
    given = {"program": "prog", "path": "/prog.toml", "model": "m-1", "provider": "script", "tools": TOOLS}
    return Image(**{**given, "prefix": b"<", "suffix": b">", **more})


GOTO = (*TOOLS, ToolName("goto", "goto", Access.READ))
"""The tools of a program that can travel."""

_calls = itertools.count(1)


def ask(name: str, input_: bytes = b"{}") -> ToolUse:
    """One call, with an id of its own."""
    return ToolUse(ToolUseId(f"toolu_{next(_calls)}"), name, input_)


def said(text: str = "ok", stop_reason: str = "end_turn", **more: object) -> Reply:
    """An answer in words."""
    return answer_of(text, (), stop_reason, **more)


def asking(*names: str, text: str = "", stop_reason: str = "tool_use", **more: object) -> Reply:
    """An answer that asks for tools."""
    return answer_of(text, tuple(map(ask, names)), stop_reason, **more)


def answer_of(text: str, asks: tuple[ToolUse, ...], stop_reason: str, **more: object) -> Reply:
    parts = [history.text_block(text)] if text else []
    parts += [
        msgspec.json.encode({
            "type": "tool_use", "id": call.id, "name": call.name, "input": msgspec.Raw(call.input)
        })
        for call in asks
    ]  # fmt: skip
    given = {"usage": Usage(100, 10, 1, 2), "model": "m-1", **more}
    return Reply(body=b",".join(parts), text=text, asks=asks, stop_reason=stop_reason, **given)


EMPTY = Reply(stop_reason="end_turn", model="m-1", usage=Usage(100, 0))
"""An answer in which nothing is."""


def result(call: ToolUse, text: str = "done", *, is_error: bool = False) -> ToolResult:
    return ToolResult(call.id, text, is_error)


class Disk:
    """What changes add up to."""

    def __init__(self) -> None:
        self.procs: dict[Pid, Proc] = {}
        self.youngest = INIT
        self.touched: set[Pid] = set()  # whoever was changed since somebody looked
        self.files: dict[FileId, File] = {}
        self.images: dict[ImageId, Image] = {}
        self.families: dict[Pid, int] = {}
        self.requests: dict[tuple[int, str], Request] = {}
        self.nodes: dict[MessageId, Node] = {}
        self.newest = 0
        self.contents: dict[FileId, bytes] = {}
        self.events: list[object] = []
        self.seq = 0
        self.counters = Counters()

    def apply(self, change: Change) -> None:
        """Add a change; numbers that come twice and contents with holes are found here."""
        if not change:
            assert change == Change(), "a change without counters is lost"
            return
        for pid in sorted(change.procs.keys() - self.procs.keys()):
            assert pid > self.youngest, "a pid was used again"
            self.youngest = pid
        self.procs.update(change.procs)
        self.touched.update(change.procs)
        for pid in change.gone:
            del self.procs[pid]
        for node in change.nodes:
            assert node.id > self.newest, f"m{node.id} was used twice"
            self.nodes[node.id] = node
            self.newest = node.id
        for chunk in change.chunks:
            have = self.contents.get(chunk.file, b"")
            assert chunk.offset == len(have), "contents with a hole"
            self.contents[chunk.file] = have + chunk.data
        for event in change.events:
            assert event.seq > self.seq, "an event's number does not grow"
            self.seq = event.seq
            self.events.append(event)
        self.files.update(change.files)
        self.images.update(change.images)
        self.families.update(change.families)
        self.requests.update({(request.uid, request.id): request for request in change.requests})
        for freed in change.garbage:
            self._free(freed)
        self.counters = Counters(**asdict(change.counters))

    def _free(self, freed: Garbage) -> None:
        """Forget what must be there, and is needed no more."""
        for table, numbers in (
            (self.nodes, freed.nodes),
            (self.files, freed.files),
            (self.images, freed.images),
            (self.families, freed.families),
        ):
            for number in numbers:
                del table[number]

    def saved(self) -> Saved:
        """The records, by number, after a trip through the bytes that a disk would keep."""
        return Saved(
            procs=[_through(self.procs[pid]) for pid in sorted(self.procs)],
            files=[self.files[number] for number in sorted(self.files)],
            images={number: _through(one) for number, one in self.images.items()},
            families=dict(self.families),
            requests=[self.requests[key] for key in sorted(self.requests)],
            counters=Counters(**asdict(self.counters)),
        )

    def path(self, head: MessageId | None) -> list[Node]:
        """The nodes from the root to the head."""
        nodes = []
        while head is not None:
            nodes.append(self.nodes[head])
            head = nodes[-1].parent
        return nodes[::-1]


_decoders = {kind: msgspec.msgpack.Decoder(kind).decode for kind in (Proc, Image)}


def _through(value: Proc | Image) -> Proc | Image:
    return _decoders[type(value)](msgspec.msgpack.encode(value))


def state(k: Kernel) -> dict[str, object]:
    """All that a kernel knows, as one value to compare."""
    return {
        "procs": dict(k.procs),
        "files": dict(k.files),
        "images": dict(k.images),
        "image_ids": dict(k.image_ids),
        "families": dict(k.families),
        "requests": dict(k.requests),
        "counters": asdict(k.counters),
        "names": dict(k.names),
        "children": {pid: set(pids) for pid, pids in k.children.items()},
        "born": {pid: set(pids) for pid, pids in k.born.items()},
        "living": k.living,
        "below": dict(k.below),
    }


@contextmanager
def refused(w: "World", errno: Errno) -> Iterator[None]:
    """What the block asks for is refused with this errno, and has changed nothing."""
    w.commit()
    before, held = state(w.k), dict(w.k.held)
    with pytest.raises(KernelError) as caught:
        yield
    assert caught.value.errno is errno, str(caught.value)
    assert w.k.change == Change(), "a call that failed has changed something"
    assert w.k.loose == []
    assert state(w.k) == before
    assert w.k.held == held


class World:
    """A kernel and its disk. Each method is one thing that the machine does, committed."""

    def __init__(self, **more: object) -> None:
        self.disk = Disk()
        self.k = Kernel()
        self.k.now = 1000.0
        self.image = image(**more)

    def commit(self) -> Change:
        change = self.k.taken()
        self.disk.apply(change)
        self.k.now += bool(change)
        return change

    def boot(self) -> None:
        """Forget everything but the disk."""
        self.commit()
        now = self.k.now
        self.k = Kernel(self.disk.saved())
        self.k.now = now

    def __getitem__(self, pid: int) -> Proc:
        return self.k.proc(pid)

    def node(self, pid: int) -> Node | None:
        """The node that a process stands on."""
        self.commit()
        head = self.k.proc(pid).head
        return None if head is None else self.disk.nodes[head]

    def words(self, pid: int) -> list[str]:
        """The path of a process, one line a message: role, text and tool results."""
        self.commit()
        lines = []
        for node in self.disk.path(self.k.proc(pid).head):
            parts = [
                block.get("text") or block.get("content") or f"{block['name']}()"
                for block in history.blocks(node)
            ]
            lines.append(f"{node.role}: {' | '.join(parts)}")
        return lines

    def events(self, kind: str, pid: int | None = None) -> list[dict[str, object]]:
        """What was told of one kind."""
        self.commit()
        return [event.more for event in self.disk.events if event.type == kind and pid in {None, event.pid}]

    # --- verbs -----------------------------------------------------------------------------------------

    def spawn(self, prompt: str | None = None, **more: object) -> Pid:
        given = {"image": self.k.put_image(self.image), "prompt": prompt, **more}
        made = proc.spawn(self.k, Birth(**given))
        self.commit()
        return made.pid

    def send(self, pid: int, text: str | None = "go on", **more: object) -> int:
        seq = proc.send(self.k, pid, text, **more)
        self.commit()
        return seq

    def take(
        self, pid: int, said_: Callable[[Proc, str], tuple[Proc, str]] = lambda p, text: (p, text)
    ) -> Proc:
        """The next mail becomes the next user message."""
        p = proc.take_input(self.k, Pid(pid), said_)
        self.commit()
        return p

    def land(self, pid: int, reply: Reply, begun: tuple[ToolUseId, ...] = ()) -> Proc:
        """The model has answered."""
        p = proc.land(self.k, self.k.proc(pid), reply, begun)
        self.commit()
        return p

    def finish(self, pid: int, call: ToolUse, text: str = "done", *, is_error: bool = False) -> Proc:
        """One call has its answer; the last one makes the next message."""
        node = self.node(pid)
        p = proc.finish_tool(self.k, self.k.proc(pid), call, result(call, text, is_error=is_error))
        if not proc.unanswered(p, node):
            p = proc.retire_tools(self.k, p, node)
        self.commit()
        return p

    def fork_model(self, pid: int, *calls: ForkCall) -> Proc:
        node = self.node(pid)
        p = proc.fork_model(self.k, self.k.proc(pid), node, calls)
        if not proc.unanswered(p, node):
            p = proc.retire_tools(self.k, p, node)
        self.commit()
        return p

    def fork(self, pid: int, *prompts: str, **more: object) -> list[Pid]:
        made = proc.fork(self.k, pid, prompts, **more)
        self.commit()
        return [child.pid for child in made]

    def goto(self, pid: int, number: int, text: str | None = None, **more: object) -> Proc:
        p = proc.goto(self.k, pid, self.disk.nodes[MessageId(number)], text, **more)
        self.commit()
        return p

    def exit(self, pid: int, status: int = 0, **more: object) -> Proc:
        p = proc.exit_(self.k, pid, status, **more)
        self.commit()
        return p

    def kill(self, pid: int, sig: Signal, partial: Reply | None = None) -> Proc:
        """Deliver a signal, with all that the machine would look up for it."""
        node = self.node(pid)
        signal.deliver(self.k, Pid(pid), sig, node, partial, sender="uid 0")
        self.commit()
        return self.k.proc(pid)

    # --- places to begin at ----------------------------------------------------------------------------

    def asked(self, prompt: str | None = "hello", **more: object) -> Pid:
        """A process whose model is being asked."""
        pid = self.spawn(prompt, **more) if prompt is not None else self.spawn(**more)
        if prompt is None:
            self.send(pid, "hello")
        self.take(pid)
        return pid

    def in_tools(self, *names: str, **more: object) -> tuple[Pid, tuple[ToolUse, ...]]:
        """A process that runs tools, and its calls."""
        pid = self.asked(**more)
        reply = asking(*(names or ("bash",)))
        begun = tuple(call.id for call in reply.asks if call.name in EFFECTS)
        self.land(pid, reply, begun)
        return pid, reply.asks

    def rested(self, **more: object) -> Pid:
        """An interactive process that has had one exchange and sleeps: m1 user, m2 assistant."""
        pid = self.asked(None, **more)
        self.land(pid, said("hi"))
        return pid


def search(w: World) -> Garbage:
    """The messages and files that nobody refers to now."""
    nodes = ((node.id, node.parent, 1) for node in sorted(w.disk.nodes.values(), key=lambda n: -n.id))
    procs = w.k.procs.values()
    unheld = w.k.files.keys() - garbage.held(procs)
    return Garbage(nodes=reach.sift(nodes, garbage.roots(procs)).garbage, files=sorted(unheld))


def links_hold(node: Node, parent: Node | None) -> None:
    """The law of answers: each call is answered by exactly the next message, first and in order."""
    results = [block["tool_use_id"] for block in history.blocks(node) if block["type"] == "tool_result"]
    kinds = [block["type"] for block in history.blocks(node)]
    assert kinds, f"m{node.id} says nothing"
    if node.role == "user":
        assert results == [call.id for call in (parent.asks if parent else ())], f"answers of m{node.id}"
        assert kinds == ["tool_result"] * len(results) + ["text"] * (len(kinds) - len(results))
        assert node.asks == ()
    else:
        assert parent is not None, f"m{node.id} answers nobody"
        assert not parent.asks, f"m{node.id} stands in the place of answers"
        assert results == []
        uses = [block["id"] for block in history.blocks(node) if block["type"] == "tool_use"]
        assert uses == [call.id for call in node.asks]


def paths_hold(w: World, known: set[MessageId]) -> None:
    """The law of answers, on the path of every process and of every earlier head; looks at each node once."""
    for p in w.k.procs.values():
        for head in (p.head, *p.tips):
            above = head
            while above is not None and above not in known:
                node = w.disk.nodes[above]
                links_hold(node, None if node.parent is None else w.disk.nodes[node.parent])
                known.add(above)
                above = node.parent


def tree_holds(w: World) -> None:
    """The laws of the process table."""
    owners = [p.head for p in w.k.procs.values() if p.live and p.at is At.ASKS]
    assert len(owners) == len(set(owners)), "a head that asks for tools has one owner"
    for p in w.k.procs.values():
        assert p.ppid == INIT or w.k.proc(p.ppid).live, "every parent lives or is init"
        assert p.birth == INIT or p.access <= w.k.proc(p.birth).access, "a child has more access"


def boots_equal(w: World) -> None:
    """The law of the disk: loading what was saved gives the same kernel."""
    assert state(Kernel(w.disk.saved())) == state(w.k)


def fds_of(w: World) -> Mapping[tuple[Pid, int], FileId]:
    """Every descriptor of every family; two files under one number are a broken law."""
    found: dict[tuple[Pid, int], FileId] = {}
    for p in w.k.procs.values():
        for fd, number in p.fds.items():
            assert found.setdefault((p.family, fd), number) == number, "one number, two files"
            assert fd < w.k.families[p.family]
    return found
