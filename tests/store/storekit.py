"""What the store's tests share: values of every shape, small changes, and a store that runs for a while."""

import enum
import types
import typing
from collections.abc import Mapping
from contextlib import asynccontextmanager

import msgspec
import trio
from hypothesis import strategies as st

from llmprocd.abi.events import Event
from llmprocd.abi.types import FileId, ImageId, MessageId, Pid
from llmprocd.kernel.state import Change, Chunk, Counters, File, Image, Node, Proc, Request
from llmprocd.store.protocol import Store

SCALARS = {
    int: st.integers(-(2**63), 2**63 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=8),
    bytes: st.binary(max_size=8),
    bool: st.booleans(),
    types.NoneType: st.none(),
    typing.Any: st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text(max_size=4)
    | st.lists(st.integers(0, 3)),
}


def values(kind) -> st.SearchStrategy:
    """Values of any type that the kernel's records use, whatever fields they get later."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, typing.NewType):
        return values(kind.__supertype__)
    if kind in SCALARS:
        return SCALARS[kind]
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin in {types.UnionType, typing.Union}:
        return st.one_of(*(values(arg) for arg in args))
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*(values(arg) for arg in args))
    if origin in {dict, Mapping}:
        return st.dictionaries(values(args[0]), values(args[1]), max_size=2)
    if issubclass(kind, enum.Enum):
        return st.sampled_from(list(kind))
    return structs(kind)


def structs(kind, **fixed) -> st.SearchStrategy:
    """Values of a struct, with some fields given; each field with a default is sometimes left at it."""
    hints = typing.get_type_hints(kind)
    required, optional = {}, {}
    for field in msgspec.structs.fields(kind):
        if field.name in fixed:
            required[field.name] = fixed[field.name]
        elif field.required:
            required[field.name] = values(hints[field.name])
        else:
            optional[field.name] = values(hints[field.name])
    return st.fixed_dictionaries(required, optional=optional).map(lambda kw: kind(**kw))


def keyed(kind, field: str, numbers: st.SearchStrategy) -> st.SearchStrategy:
    """A map from numbers to structs that carry their number."""
    one = numbers.flatmap(lambda n: structs(kind, **{field: st.just(n)}))
    return st.lists(one, max_size=3).map(lambda found: {getattr(value, field): value for value in found})


small = st.integers(1, 6)
changes = st.builds(
    Change,
    procs=keyed(Proc, "pid", small),
    files=keyed(File, "id", small),
    images=st.dictionaries(small, structs(Image), max_size=2),
    families=st.dictionaries(small, st.integers(3, 99), max_size=2),
    requests=st.lists(structs(Request, uid=small, id=st.sampled_from("ab"), at=st.just(2e10)), max_size=2),
    gone=st.lists(st.integers(7, 9), max_size=2),
    counters=structs(Counters),
)
"""Changes with records of every shape, and no nodes or contents."""


def node(number: int, parent: int | None = None, body: bytes = b"", **more) -> Node:
    at = None if parent is None else MessageId(parent)
    return Node(MessageId(number), at, more.pop("role", "user"), body or b"%d" % number, **more)


def proc(pid: int, **more) -> Proc:
    return Proc(pid=Pid(pid), family=Pid(pid), image=ImageId(1), **more)


def event(seq: int, pid: int = 2, kind: str = "input") -> Event:
    return Event(seq, float(seq), kind, Pid(pid), {"text": f"number {seq}"})


def chunk(file: int, offset: int, data: bytes) -> Chunk:
    return Chunk(FileId(file), offset, data)


def numbered(n: int) -> Change:
    """A change that touches every table, all of it with the number n: it must be found whole."""
    return Change(
        procs={Pid(n): proc(n, head=MessageId(n))},
        nodes=[node(n, n - 1 if n > 1 else None, b'{"n":%d}' % n + bytes(n % 700))],
        files={FileId(n): File(FileId(n), 8, complete=True, origin="bash")},
        chunks=[chunk(n, 0, b"%08d" % n)],
        families={Pid(n): 3},
        events=[event(n, n)],
        requests=[Request(0, str(n), b"d", b"r", 2e10)],
        counters=Counters(n + 1, n + 1, n + 1, 1, n + 1),
        why=["spawn"],
    )


@asynccontextmanager
async def running(store: Store):
    """A store that runs within the block; what was submitted in it is durable after it."""
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: store.run(task_status=task_status))
        yield store
        nursery.cancel_scope.cancel()


async def write(store: Store, *them: Change) -> None:
    """Make changes durable, and end the store."""
    async with running(store):
        for change in them:
            store.submit(change)
