"""What both stores promise."""

import itertools
from pathlib import Path

import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import event as note
from hypothesis import strategies as st
from storekit import changes, chunk, event, node, numbered, proc, running, structs, values, write

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import FileId, ImageId, MessageId, Pid
from llmprocd.kernel.state import Change, Counters, File, Garbage, Image, Node, Request, stdio
from llmprocd.store import memory, sqlite
from llmprocd.store.protocol import Store, StoreFailed

PLAIN = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


def both(tmp_path_factory, **options) -> list[Store]:
    return [sqlite.Store(str(tmp_path_factory.mktemp("state")), **options), memory.Store()]


def folded(them: list[Change]) -> dict[str, object]:
    """The records that changes add up to, by the plainest rule."""
    whole = Change(counters=Counters())
    requests: dict[tuple[int, str], Request] = {}
    for change in them:
        for name in ("procs", "files", "images", "families"):
            getattr(whole, name).update(getattr(change, name))
        for pid in change.gone:
            whole.procs.pop(pid, None)
        requests.update({(request.uid, request.id): request for request in change.requests})
        whole.counters = change.counters or whole.counters
    return {
        "procs": sorted(whole.procs.values(), key=lambda p: p.pid),
        "files": sorted(whole.files.values(), key=lambda f: f.id),
        "images": whole.images,
        "families": whole.families,
        "requests": [requests[key] for key in sorted(requests)],
        "counters": whole.counters,
    }


def reopened(store: Store, folder: str) -> Store:
    return store.crash() if isinstance(store, memory.Store) else sqlite.Store(folder)


@PLAIN
@given(them=st.lists(changes, max_size=4))
def test_loading_gives_the_records_that_were_saved(them, tmp_path_factory):
    """Whatever fields records have, they come back equal, in both stores."""
    folder = str(tmp_path_factory.mktemp("state"))
    for store in (sqlite.Store(folder), memory.Store()):
        trio.run(write, store, *them)
        again = reopened(store, folder)
        saved = again.load()
        again.close()
        assert {name: getattr(saved, name) for name in folded(them)} == folded(them)
    note(f"{len(them)} changes")


@PLAIN
@given(them=st.lists(structs(Node, parent=st.none(), id=st.integers(1, 9)), unique_by=lambda n: n.id))
def test_nodes_come_back_equal(them, tmp_path_factory):
    """Every field of a node survives, read from the disk and not from memory."""

    async def main():
        for store in both(tmp_path_factory, cache_bytes=0):
            async with running(store):
                await store.wait_durable(store.submit(Change(nodes=them)))
                for one in them:
                    assert await store.node(one.id) == one

    trio.run(main)


@PLAIN
@given(them=st.lists(values(dict[str, str | int | float | bool | None]), max_size=4))
def test_events_come_back_equal(them, tmp_path_factory):
    """What an event tells survives."""
    said = [msgspec.structs.replace(event(n), more=more) for n, more in enumerate(them, 1)]

    async def main():
        for store in both(tmp_path_factory):
            async with running(store):
                await store.wait_durable(store.submit(Change(events=said)))
                assert await store.events(0, None, None, 99) == said

    trio.run(main)


async def test_commits_become_durable_in_order(store):
    """`durable` only grows, `on_durable` tells each growth, and a waiter wakes when its commit is there."""
    told: list[int] = []
    woken: list[int] = []
    store.on_durable = told.append

    async def waits(ticket):
        await store.wait_durable(ticket)
        assert store.durable >= ticket
        woken.append(ticket)

    async with running(store), trio.open_nursery() as nursery:
        tickets = [store.submit(numbered(n)) for n in range(1, 50)]
        assert tickets == list(range(1, 50))
        for ticket in reversed(tickets):
            nursery.start_soon(waits, ticket)
    assert sorted(woken) == tickets
    assert told == sorted(set(told))
    assert told[-1] == store.durable == store.submitted == 49


async def test_nothing_is_durable_before_the_store_runs(store):
    """A submitted change is seen at once, and durable only when it has been written."""
    store.submit(numbered(1))
    assert store.node_nowait(MessageId(1))
    assert store.durable == 0
    async with running(store):
        await store.wait_durable(1)
        assert store.durable == 1


async def test_waiting_for_a_commit_cannot_be_cancelled(store):
    """The change will happen, so whoever asked for it hears that it has."""
    async with running(store):
        with trio.CancelScope() as scope:
            ticket = store.submit(numbered(1))
            scope.cancel()
            await store.wait_durable(ticket)
            assert store.durable == ticket
        assert not scope.cancelled_caught


async def test_a_store_that_stops_has_written_everything(store):
    """Stopping is no reason to lose what was submitted; afterwards nothing is accepted."""
    async with running(store):
        for n in range(1, 200):
            store.submit(numbered(n))
    assert store.durable == 199
    with pytest.raises(StoreFailed):
        store.submit(numbered(200))


async def test_waiting_for_an_ended_store_fails(store):
    """Nobody waits for ever for a commit that will not be."""
    store.submit(numbered(1))
    store.close()
    with pytest.raises(StoreFailed):
        await store.wait_durable(1)


def grown(parents: list[int]) -> list[Node]:
    """A forest: node n + 1 hangs from an earlier one, or is a root (0)."""
    return [node(n, at % n or None) for n, at in enumerate(parents, 1)]


def path_of(nodes: list[Node], number: int | None) -> list[int]:
    path: list[int] = []
    while number is not None:
        path.insert(0, number)
        number = nodes[number - 1].parent
    return path


@PLAIN
@given(data=st.data(), parents=st.lists(st.integers(0, 30), min_size=1, max_size=30))
def test_paths_and_trees_are_those_that_were_grown(data, parents, tmp_path_factory):
    """With any part of the nodes durable, in the cache or neither, a history is found whole."""
    nodes = grown(parents)
    numbers = st.integers(1, len(nodes))
    stored, head, stop, after = (data.draw(numbers) for _ in range(4))
    tips = data.draw(st.lists(numbers, max_size=4))
    limit = data.draw(st.integers(1, 30))

    async def main():
        for store in both(tmp_path_factory, cache_bytes=data.draw(st.sampled_from([0, 2000, 1 << 20]))):
            async with running(store):
                await store.wait_durable(store.submit(Change(nodes=nodes[:stored])))
                store.submit(Change(nodes=nodes[stored:]))
                await check(store)

    async def check(store):
        whole = path_of(nodes, head)
        assert [n.id for n in await store.path(head)] == whole
        below = whole[whole.index(stop) + 1 :] if stop in whole else whole
        assert [n.id for n in await store.path(head, stop)] == below
        reached = sorted(set(itertools.chain(*(path_of(nodes, tip) for tip in tips))))
        assert [n.id for n in await store.tree(tips)] == reached
        assert [n.id for n in await store.tree(tips, after, limit)] == [n for n in reached if n > after][
            :limit
        ]
        assert await store.is_ancestor(head, tips) == (head in reached)
        assert await store.node(head) == nodes[head - 1]

    trio.run(main)


async def test_a_path_ends_where_it_is_told_to(tmp_path_factory):
    """Read from the disk, in one piece and in several, it stops below the node that the caller has."""
    nodes = [node(n, n - 1 or None) for n in range(1, 2501)]
    for store in both(tmp_path_factory, cache_bytes=0):
        async with running(store):
            await store.wait_durable(store.submit(Change(nodes=nodes)))
            for head, stop in ((2500, 1), (2500, 1500), (2500, 1499), (2500, 2499), (7, 7), (7, 8)):
                want = nodes[stop:head] if stop <= head else nodes[:head]
                assert await store.path(MessageId(head), MessageId(stop)) == want
            assert await store.path(MessageId(2500)) == nodes


async def test_a_page_of_a_tree_is_never_longer_than_asked_for(store):
    """Even when one part of it is durable and the other is not."""
    async with running(store):
        await store.wait_durable(store.submit(Change(nodes=[node(n, n - 1 or None) for n in range(1, 11)])))
        store.submit(Change(nodes=[node(n, n - 1) for n in range(11, 21)]))
        assert [n.id for n in await store.tree([MessageId(20)], 5, 10)] == list(range(6, 16))


async def test_a_message_that_is_not_there(store):
    """A path to nowhere is ENOENT, a single node is None."""
    async with running(store):
        assert await store.node(MessageId(7)) is None
        with pytest.raises(KernelError) as caught:
            await store.path(MessageId(7))
        assert caught.value.errno is Errno.ENOENT


@PLAIN
@given(data=st.data(), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_reading_gives_exactly_the_bytes(data, sizes, tmp_path_factory):
    """Any window of a file, with any part of it durable, even when it has grown since."""
    whole = bytes(range(sum(sizes)))
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    pieces = [chunk(5, at, whole[at : at + size]) for at, size in zip(starts, sizes, strict=True)]
    stored = data.draw(st.integers(0, len(pieces)))
    size, offset, count = (data.draw(st.integers(0, len(whole) + 2)) for _ in range(3))
    file = File(FileId(5), min(size, len(whole)), complete=False, origin="stdout")

    async def main():
        for store in both(tmp_path_factory):
            async with running(store):
                await store.wait_durable(store.submit(Change(chunks=pieces[:stored])))
                for piece in pieces[stored:]:
                    store.submit(Change(chunks=[piece, chunk(6, piece.offset, bytes(len(piece.data)))]))
                assert await store.read(file, offset, count) == whole[: file.size][offset : offset + count]

    trio.run(main)


async def test_bytes_that_are_lost_are_an_error(store):
    """A file that says it is longer than its contents is EIO, never cut short in silence."""
    async with running(store):
        await store.wait_durable(store.submit(Change(chunks=[chunk(5, 0, b"abc")])))
        with pytest.raises(KernelError) as caught:
            await store.read(File(FileId(5), 9, complete=True, origin="x"), 0, 9)
        assert caught.value.errno is Errno.EIO


async def test_a_spool_file_becomes_contents(store):
    """What a tool wrote is found under the file's id, and the spool is gone."""
    file = File(FileId(7), 6, complete=True, origin="bash", disk=True)
    async with running(store):
        spool = trio.Path(store.spool())
        assert spool.parent.name == "spool"
        assert spool != trio.Path(store.spool())
        await spool.write_bytes(b"output")
        await store.adopt(str(spool), file.id)
        assert not await spool.exists()
        assert await trio.Path(store.disk_path(file.id)).read_bytes() == b"output"
        assert await store.read(file, 2, 3) == b"tpu"
        assert await store.read(file, 2, 300) == b"tput"
        assert await store.read(file, 200, 1) == b""


async def test_a_file_that_still_grows_is_read_as_far_as_it_is(store):
    """A background tool's output can be read while it runs, whatever its record says."""
    file = File(FileId(7), 0, complete=False, origin="bash", disk=True)
    async with running(store):
        spool = store.spool()
        with Path(spool).open("wb", buffering=0) as out:
            out.write(b"one ")
            await store.adopt(spool, file.id, sync=False)
            out.write(b"two")
            assert await store.read(file, 0, 99) == b"one two"


async def test_contents_that_are_gone_are_an_error(store):
    """A record whose contents somebody has removed is EIO."""
    async with running(store):
        with pytest.raises(KernelError) as caught:
            await store.read(File(FileId(9), 6, complete=True, origin="bash", disk=True), 0, 1)
        assert caught.value.errno is Errno.EIO


async def test_events_are_chosen_by_number_process_and_type(store):
    """Each filter alone and all of them together."""
    kinds = ["input", "exit", "spawn"]
    them = [event(n, n % 4, kinds[n % 3]) for n in range(1, 40)]
    async with running(store):
        await store.wait_durable(store.submit(Change(events=them)))
        assert await store.events(30, None, None, 5) == them[30:35]
        assert await store.events(0, [1, 3], None, 99) == [e for e in them if e.pid in {1, 3}]
        assert await store.events(0, None, ["exit"], 99) == [e for e in them if e.type == "exit"]
        chosen = [e for e in them if e.seq > 9 and e.pid == 2 and e.type in {"spawn", "exit"}]
        assert await store.events(9, [2], ["spawn", "exit"], 3) == chosen[:3]
        assert await store.events(0, [], None, 99) == []


async def test_events_are_told_only_when_they_are_durable(store):
    """An event that a crash could take back is not given out."""
    store.submit(Change(events=[event(1)]))
    assert await store.events(0, None, None, 99) == []
    async with running(store):
        await store.wait_durable(1)
        assert await store.events(0, None, None, 99) == [event(1)]


async def test_a_removed_process_leaves_its_messages(store, tmp_path):
    """Its record is gone; others may have grown from what it said."""
    async with running(store):
        store.submit(Change(procs={Pid(2): proc(2), Pid(3): proc(3)}, nodes=[node(1)]))
        await store.wait_durable(store.submit(Change(gone=[Pid(2)])))
        assert await store.node(MessageId(1)) == node(1)
    again = reopened(store, str(tmp_path / "state"))
    assert list(again.load().procs) == [proc(3)]
    again.close()


async def test_what_a_process_said_goes_with_it(store):
    """Its stdout and stderr, which only it had; those of others stay."""
    said = [(pid, fd, chunk(stdio(Pid(pid), fd), 0, b"words")) for pid in (2, 3) for fd in (1, 2)]
    async with running(store):
        store.submit(Change(procs={Pid(2): proc(2), Pid(3): proc(3)}, chunks=[one for _, _, one in said]))
        await store.wait_durable(store.submit(Change(gone=[Pid(2)])))
        for pid, _, one in said:
            file = File(one.file, 5, complete=True, origin="stdout")
            if pid == 2:
                with pytest.raises(KernelError):
                    await store.read(file, 0, 5)
            else:
                assert await store.read(file, 0, 5) == b"words"


async def test_garbage_is_freed_and_nothing_else(store, tmp_path):
    """Messages, files with their contents, programs and families of the numbers that were named."""
    image = Image("prog", "", "m-1", "script", b"", b"")
    async with running(store):
        for n in range(1, 4):
            store.submit(msgspec.structs.replace(numbered(n), images={ImageId(n): image}))
        freed = Garbage([MessageId(2)], [FileId(2)], [ImageId(2)], [Pid(2)])
        await store.wait_durable(store.submit(Change(garbage=[freed])))
    again = reopened(store, str(tmp_path / "state"))
    saved = again.load()
    assert [file.id for file in saved.files] == list(saved.images) == list(saved.families) == [1, 3]
    async with running(again):
        assert [n for n in range(1, 4) if await again.node(MessageId(n)) is not None] == [1, 3]
        for file in numbered(1).files.values():
            assert await again.read(file, 0, 8) == b"00000001"
        with pytest.raises(KernelError):
            await again.read(File(FileId(2), 8, complete=True, origin="bash"), 0, 8)


async def test_a_walk_goes_through_all_nodes_from_the_top(store):
    """In slices; what the wanted ones grew from is found to be needed."""
    nodes = grown([0, 1, 0, 3, 2, 4])
    async with running(store):
        await store.wait_durable(store.submit(Change(nodes=nodes)))
        first = await store.sift({MessageId(5)}, MessageId(6))
        assert (first.garbage, first.wanted, first.below) == ([4, 3], set(), 1)
        assert first.bytes >= len(nodes[2].body + nodes[3].body)
        last = await store.sift(first.wanted, first.below)
        assert (last.garbage, last.below) == ([], 0)


async def test_contents_are_removed_with_their_views(store):
    """Those that were named, whether or not they are there."""
    async with running(store):
        for n in (7, 8):
            spool = trio.Path(store.spool())
            await spool.write_bytes(b"output")
            await store.adopt(str(spool), FileId(n))
            await trio.Path(f"{store.disk_path(FileId(n))}.shown").touch()
        await store.remove([FileId(7), FileId(9)])
        left = Path(store.disk_path(FileId(7))).parent.iterdir()
        assert sorted(path.name for path in left) == ["8", "8.shown"]


async def test_there_is_room(store):
    """`free` is a number of bytes."""
    assert store.free() > 1 << 20
