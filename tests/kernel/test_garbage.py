"""What nobody refers to, and above all what somebody does."""

from kernelkit import World, image, said, search
from msgspec.structs import replace

from llmprocd.abi.types import FileId, ImageId
from llmprocd.kernel import file, garbage, proc
from llmprocd.kernel.state import File, LastCall


def numbers(w, pid):
    """The messages on the path of a process."""
    return {node.id for node in w.disk.path(w[pid].head)}


def opened(w, pid):
    """A file that a process has just made."""
    p, _ = file.add(w.k, w[pid], File(FileId(w.k.take("file")), 3, complete=True, origin="bash"), b"abc")
    w.k.put(p)
    w.commit()
    return max(p.fds.values())


def forget(w, pid):
    if w[pid].live:
        w.exit(pid)
    proc.remove(w.k, pid)
    w.commit()


def test_what_a_living_process_has_is_no_garbage():
    w = World()
    opened(w, w.rested())
    found = search(w)
    assert (found.nodes, found.files) == ([], [])


def test_all_that_only_a_removed_process_had_is_garbage():
    w = World()
    pid, other = w.rested(), w.rested()
    number, mine = opened(w, pid), numbers(w, pid)
    assert not mine & numbers(w, other)
    forget(w, pid)
    found = search(w)
    assert set(found.nodes) == mine
    assert found.files == [number]


def test_an_ended_process_that_was_not_removed_keeps_what_it_has():
    w = World()
    pid = w.rested()
    opened(w, pid)
    w.exit(pid)
    found = search(w)
    assert (found.nodes, found.files) == ([], [])


def test_a_fork_keeps_the_history_and_the_descriptors_it_shares():
    """And not what its parent said afterwards."""
    w = World()
    pid = w.rested()
    number = opened(w, pid)
    (child,) = w.fork(pid)
    shared = numbers(w, child)
    w.send(pid, "more")
    w.take(pid)
    w.land(pid, said("later"))
    later = numbers(w, pid) - shared
    forget(w, pid)
    found = search(w)
    assert set(found.nodes) == later
    assert found.files == []
    assert w[child].fds == {3: number}


def test_a_branch_that_was_left_can_be_gone_back_to():
    w = World()
    pid = w.rested()
    first = min(numbers(w, pid))
    left = numbers(w, pid)
    w.goto(pid, first, "elsewhere")
    assert not left <= numbers(w, pid)
    assert search(w).nodes == []


def test_the_last_of_a_name_is_kept():
    """`ref:name` is as good as a descriptor; what it meant before is garbage."""
    w = World()
    pid = w.rested()
    first, last = (File(FileId(w.k.take("file")), 1, complete=True, origin="ref:x") for _ in range(2))
    for one in (first, last):
        w.k.put(file.refer(w.k, w[pid], "x", one, b"1"))
    w.commit()
    assert search(w).files == [first.id]


def test_a_program_is_kept_by_who_runs_it_or_last_asked_with_it():
    w = World()
    pid = w.rested()
    old, new, never = w[pid].image, w.k.put_image(image(model="m-2")), w.k.put_image(image(model="m-3"))
    call = LastCall("msg_1", 1.0, old, w[pid].head)
    w.k.put(replace(w[pid], image=new, last_call=call))
    assert garbage.images(w.k) == {never}
    w.k.put(replace(w[pid], last_call=None))
    assert garbage.images(w.k) == {ImageId(old), never}


def test_a_family_lives_as_long_as_one_of_it_is_there():
    w = World()
    pid = w.rested()
    opened(w, pid)
    (child,) = w.fork(pid)
    forget(w, pid)
    assert garbage.families(w.k) == set()
    forget(w, child)
    assert garbage.families(w.k) == {pid}
