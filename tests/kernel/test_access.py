"""Ceilings, and who is below whom."""

import pytest
from kernelkit import World, image, refused

from llmprocd.abi.errno import Errno
from llmprocd.abi.types import INIT, Access
from llmprocd.kernel import access, proc

LEVELS = list(Access)


@pytest.fixture
def family():
    """A world with a line of three and a stranger: 2 > 3 > 4, and 5."""
    w = World()
    top = w.spawn()
    middle = w.spawn(ppid=top)
    bottom = w.spawn(ppid=middle)
    return w, top, middle, bottom, w.spawn()


@pytest.mark.parametrize("have", LEVELS)
@pytest.mark.parametrize("ceiling", LEVELS)
def test_a_models_child_has_the_lower_of_both(have, ceiling):
    """The parent's own level and the program's ceiling for children both bind."""
    w = World(child_access=ceiling)
    parent = w[w.spawn(access=have)]
    assert access.child(parent, w.k.image(parent)) == min(have, ceiling)


def test_the_default_ceiling_of_children_is_write():
    """An admin's model makes writers, unless its program says otherwise."""
    assert image().child_access is Access.WRITE


def test_levels_are_ordered_and_named():
    """READ < WRITE < ADMIN, and their words are what users type."""
    assert Access.READ < Access.WRITE < Access.ADMIN
    assert [level.word for level in LEVELS] == ["read", "write", "admin"]


def test_a_denial_names_both_levels():
    """The sentence is the contract's."""
    sentence = "Access denied: this tool requires admin access but process has write"
    assert access.denied(Access.ADMIN, Access.WRITE) == sentence


def test_inside_is_the_process_and_all_below(family):
    """A subtree holds its root, at any depth, and no one else."""
    w, top, middle, bottom, stranger = family
    below = {pid for pid in (top, middle, bottom, stranger) if access.inside(w.k, pid, middle)}
    assert below == {middle, bottom}
    assert access.inside(w.k, bottom, top)
    assert access.inside(w.k, bottom, INIT)
    assert not access.inside(w.k, 99, top)


def test_require_below_lets_descendants_through_only(family):
    """Not oneself, not one's parent, not a stranger: EPERM; nobody: ESRCH."""
    w, top, middle, bottom, stranger = family
    assert access.require_below(w.k, bottom, top).pid == bottom
    for pid, errno in ((middle, Errno.EPERM), (top, Errno.EPERM), (stranger, Errno.EPERM), (99, Errno.ESRCH)):
        with refused(w, errno):
            access.require_below(w.k, pid, middle)


def test_subtree_has_parents_first(family):
    """Everybody born below, each after its parent."""
    w, top, middle, bottom, _ = family
    second = w.spawn(ppid=top)
    found = access.subtree(w.k, top)
    assert sorted(found) == [top, middle, bottom, second]
    assert found.index(top) < found.index(middle) < found.index(bottom)


def test_the_subtree_outlives_its_parents(family):
    """Adoption changes who waits, not whose subtree it is; removal hands it to the grandparent."""
    w, top, middle, bottom, _ = family
    w.exit(middle)
    assert (w[bottom].ppid, w[bottom].birth) == (INIT, middle)
    assert access.inside(w.k, bottom, top)
    proc.remove(w.k, middle)
    w.commit()
    assert w[bottom].birth == top
    assert access.subtree(w.k, top) == [top, bottom]
    w.boot()
    assert access.subtree(w.k, top) == [top, bottom]
