"""The process table and the small doors through which it changes."""

import ast
import inspect
from pathlib import Path

import pytest
from kernelkit import World, boots_equal, image, refused, state
from msgspec.structs import replace

import llmprocd.kernel
from llmprocd.abi.errno import Errno
from llmprocd.abi.events import FLEETING
from llmprocd.abi.types import INIT, FileId, MessageId, Pid, Usage
from llmprocd.kernel import proc
from llmprocd.kernel.state import (
    Change,
    Counters,
    File,
    Kernel,
    Node,
    Request,
    ToolName,
    stdio,
)


@pytest.fixture
def w():
    return World()


def test_a_new_kernel_is_empty_and_clean():
    """Nothing to save, nobody there; the first pid is 2, the first message m1."""
    k = Kernel()
    assert not k.procs
    assert not k.change
    assert k.living == 0
    assert (k.take("pid"), k.take("message"), k.take("seq")) == (2, 1, 1)


def test_numbers_are_never_given_twice_over_a_restart(w):
    """Every counter goes on where it was."""
    kinds = ("pid", "message", "file", "image", "seq")
    before = [w.k.take(kind) for kind in kinds]
    w.boot()
    after = [w.k.take(kind) for kind in kinds]
    assert after == [number + 1 for number in before]


def test_a_change_keeps_the_counters_as_they_were(w):
    """A change that waits for the disk is not altered by what comes after it."""
    w.k.take("pid")
    change = w.k.taken()
    w.k.take("pid")
    assert change.counters == Counters(pid=3)


def test_taken_gives_each_change_once(w):
    """What was taken is gone from the kernel, and an untouched kernel has nothing to save."""
    w.k.take("pid")
    assert w.k.taken()
    assert w.k.taken() == Change()


def test_an_unknown_pid_is_esrch_and_named(w):
    """The sentence says which."""
    with refused(w, Errno.ESRCH):
        w.k.proc(99)


def test_the_living_are_counted(w):
    """Ended processes do not count, and removing one changes nothing."""
    first, _ = w.spawn(), w.spawn()
    assert w.k.living == 2
    w.exit(first)
    assert w.k.living == 1
    proc.remove(w.k, first)
    w.k.put(w[3])
    assert w.k.living == 1
    w.boot()
    assert w.k.living == 1


def test_stdio_files_are_told_apart_from_all_others():
    """fd 1 and 2 of every process have a file of their own, below zero."""
    ids = [stdio(Pid(pid), fd) for pid in range(1, 50) for fd in (1, 2)]
    assert len(set(ids)) == len(ids)
    assert max(ids) < 0


def test_output_is_appended_to_the_process_and_its_file(w):
    """Sizes are the process's, bytes the change's; nothing is written for nothing."""
    pid = w.spawn()
    p = w.k.put(w.k.write(w.k.write(w[pid], 1, "héllo"), 2, "err"))
    p = w.k.put(w.k.write(p, 1, " you"))
    assert (p.stdout, p.stderr) == (10, 3)
    w.commit()
    assert w.disk.contents == {stdio(pid, 1): "héllo you".encode(), stdio(pid, 2): b"err"}
    assert w.k.write(p, 1, "") is p
    assert not w.k.change


def test_a_file_grows_by_what_is_put(w):
    """The piece that is written lies at the end of the size that is said."""
    number = FileId(w.k.take("file"))
    w.k.put_file(File(number, 3, complete=False, origin="bash"), b"abc")
    w.k.put_file(File(number, 5, complete=True, origin="bash"), b"de")
    assert [(c.offset, c.data) for c in w.k.change.chunks] == [(0, b"abc"), (3, b"de")]
    w.commit()
    assert w.disk.contents[number] == b"abcde"
    boots_equal(w)


def test_a_file_on_disk_writes_no_chunk(w):
    """Its bytes are elsewhere."""
    w.k.put_file(File(FileId(1), 100, complete=True, origin="bash", disk=True))
    assert w.k.change.chunks == []


def test_equal_images_are_stored_once(w):
    """Also after a restart; another program gets another number."""
    one, two = w.k.put_image(image()), w.k.put_image(image())
    other = w.k.put_image(image(model="m-2"))
    assert one == two != other
    w.boot()
    assert w.k.put_image(image()) == one
    assert not w.k.change


def test_families_count_their_descriptors(w):
    """From 3 up, each number once, also beyond those that were handed over and after a restart."""
    assert [w.k.take_fd(Pid(2)) for _ in range(3)] == [3, 4, 5]
    assert w.k.take_fd(Pid(3)) == 3
    w.k.keep_fds(Pid(4), 8)
    w.boot()
    assert [w.k.take_fd(Pid(pid)) for pid in (2, 3, 4)] == [6, 4, 8]


def test_requests_are_remembered(w):
    """By who asked and what he called it."""
    one = Request(7, "abc", b"digest", b"reply", 1.0)
    w.k.put_request(one)
    w.boot()
    assert w.k.requests == {(7, "abc"): one}


def test_answers_that_are_old_are_forgotten(w):
    """Those older than so many seconds; the others stay."""
    for name, at in (("old", 10.0), ("new", 990.0)):
        w.k.put_request(Request(7, name, b"d", b"r", at))
    w.k.forget_requests(100.0)
    assert [name for _, name in w.k.requests] == ["new"]


def test_a_new_life_numbers_its_events_far_above_the_old(w):
    """What was shown and never stored is not numbered again; a first life begins at 1."""
    assert w.k.counters.seq == 1
    w.k.new_life()
    w.k.emit("signal", Pid(2))
    w.commit()
    for _ in range(1000):
        w.k.emit("text", Pid(2))
    shown = w.k.loose[-1].seq
    w.boot()
    w.k.new_life()
    w.k.emit("signal", Pid(2))
    assert w.k.taken().events[0].seq > shown


def test_fleeting_events_are_shown_and_not_stored(w):
    """They take a number all the same, so that order is one order."""
    w.k.emit("text", Pid(2), text="a")
    assert not w.k.change
    w.k.emit("signal", Pid(2), signal="INT")
    assert [(event.seq, event.type) for event in w.k.loose] == [(1, "text")]
    change = w.k.taken()
    assert [(event.seq, event.at, event.more) for event in change.events] == [(2, 1000.0, {"signal": "INT"})]
    assert "text" in FLEETING


def test_dropping_a_process_takes_back_its_own_change(w):
    """Put and dropped in one commit: the disk is told of the end alone."""
    pid = w.spawn()
    w.exit(pid)
    w.k.put(replace(w[pid], collected=True))
    w.k.drop(pid)
    change = w.k.taken()
    assert (change.procs, change.gone) == ({}, [pid])
    w.disk.apply(change)
    boots_equal(w)


def test_dropping_leaves_no_trace(w):
    """After the last process is removed the tables are those of an empty kernel."""
    top = w.spawn(name="top")
    child = w.spawn(ppid=top, name="child")
    for pid in (child, top):
        w.exit(pid)
        proc.remove(w.k, pid)
        w.commit()
    left = state(w.k)
    assert {name: left[name] for name in ("procs", "names", "children", "born", "living")} == {
        "procs": {}, "names": {}, "children": {}, "born": {}, "living": 0,
    }  # fmt: skip


# --- names ------------------------------------------------------------------------------------------


def test_a_name_leads_to_the_living_one(w):
    """An ended namesake does not come between, whatever happens to it."""
    old = w.spawn(name="a")
    w.exit(old)
    new = w.spawn(name="a")
    assert w.k.names["a"] == new
    proc.collect(w.k, old)
    assert w.k.names["a"] == new, "the ended one has taken the name back"
    w.boot()
    assert w.k.names["a"] == new


def test_of_ended_namesakes_the_youngest_answers(w):
    """At once and after a restart alike."""
    old, new = w.spawn(name="b"), w.spawn(name="a")
    w.exit(new)
    proc.rename(w.k, old, "a")
    assert w.k.names["a"] == old, "it lives"
    w.exit(old)
    assert w.k.names["a"] == new
    boots_equal(w)


def test_a_name_goes_on_to_the_next_when_its_holder_is_gone(w):
    """Removed or renamed, the holder leaves the name to a namesake, or to nobody."""
    first = w.spawn(name="a")
    w.exit(first)
    second = w.spawn(name="a")
    proc.rename(w.k, second, "b")
    assert w.k.names == {"a": first, "b": second}
    w.commit()
    proc.remove(w.k, first)
    assert w.k.names == {"b": second}
    w.commit()
    boots_equal(w)


def test_children_and_birth_are_indexed_apart(w):
    """Who waits, and whose subtree: both follow every put."""
    top = w.spawn()
    child = w.spawn(ppid=top)
    assert state(w.k)["children"] == state(w.k)["born"] == {INIT: {top}, top: {child}}
    w.exit(top)
    assert state(w.k)["children"] == {INIT: {top, child}}
    assert state(w.k)["born"] == {INIT: {top}, top: {child}}
    proc.remove(w.k, top)
    assert state(w.k)["born"] == {INIT: {child}}


# --- small values -----------------------------------------------------------------------------------


def test_moving_leaves_nothing_under_way():
    """The head, its kind, and a clean slate for the new place."""
    w = World()
    pid, (call,) = w.in_tools("bash")
    p = replace(w[pid], rest=True, awaiting={call.id: (Pid(9),)})
    node = Node(MessageId(50), None, "user", b"")
    moved = p.moved(node)
    assert (moved.head, moved.rest, moved.begun, moved.results, moved.awaiting) == (50, False, (), (), {})
    assert p.moved(None).head is None
    assert moved.run == p.run


def test_a_label_has_the_name_where_there_is_one(w):
    """What a sentence calls a process."""
    assert w[w.spawn()].label == "2"
    assert w[w.spawn(name="bob")].label == "3 (bob)"


def test_a_tool_is_found_by_the_name_the_model_uses_then_by_its_own():
    """An alias wins over another tool's own name."""
    tools = (ToolName("log", "write_stderr", 0), ToolName("write_stderr", "bash", 1))
    made = image(tools=tools)
    assert made.tool("log").tool == "write_stderr"
    assert made.tool("write_stderr").tool == "bash"
    assert made.tool("bash").name == "write_stderr"
    assert made.tool("other") is None
    assert made.offers("bash")
    assert not made.offers("log")


def test_usage_adds_up_field_by_field():
    """All four counters."""
    assert Usage(1, 2, 3, 4) + Usage(10, 20, 30, 40) == Usage(11, 22, 33, 44)


# --- purity -----------------------------------------------------------------------------------------

SOURCES = sorted(Path(inspect.getfile(llmprocd.kernel)).parent.glob("*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_kernel_never_waits_and_never_asks_the_clock(source):
    """No await, no clock, no chance, no file: what comes in is an argument."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    waits = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, waits)]
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    world = {"trio", "asyncio", "time", "random", "datetime", "os", "socket", "sqlite3", "threading", "uuid"}
    assert not {name.partition(".")[0] for name in imported} & world
