"""The ring of events: order, durability, and readers that fall off."""

from hypothesis import given
from hypothesis import strategies as st

from llmprocd.abi.events import Event
from llmprocd.abi.types import Pid
from llmprocd.console import Console


def event(seq, pid=2, kind="input"):
    return Event(seq, float(seq), kind, Pid(pid))


def filled(count, size=10):
    console = Console(1, size)
    for seq in range(1, count + 1):
        console.publish([event(seq)], seq, seq)
    return console


def seqs(read):
    events, following = read
    return [one.seq for one in events], following


def test_what_is_durable_is_visible_at_once():
    console = Console(1)
    assert console.publish([event(1), event(2)], ticket=1, durable=1)
    assert seqs(console.read(0, 10, None, None)) == ([1, 2], 2)


def test_what_is_not_durable_is_shown_to_nobody():
    console = Console(1)
    assert not console.publish([event(1)], ticket=5, durable=4)
    assert console.visible == 0
    assert seqs(console.read(0, 10, None, None)) == ([], 0)
    assert not console.reveal(4)
    assert console.reveal(5)
    assert seqs(console.read(0, 10, None, None)) == ([1], 1)


def test_a_durable_event_waits_for_those_before_it():
    """An announcement that is durable already must not overtake a change that is not."""
    console = Console(1)
    console.publish([event(1)], ticket=7, durable=3)
    assert not console.publish([event(2)], ticket=3, durable=3)
    assert seqs(console.read(0, 10, None, None)) == ([], 0)
    console.reveal(7)
    assert seqs(console.read(0, 10, None, None)) == ([1, 2], 2)


def test_a_reader_goes_on_from_where_it_was():
    console = filled(5)
    assert seqs(console.read(0, 2, None, None)) == ([1, 2], 2)
    assert seqs(console.read(2, 2, None, None)) == ([3, 4], 4)
    assert seqs(console.read(4, 2, None, None)) == ([5], 5)
    assert seqs(console.read(5, 2, None, None)) == ([], 5)


def test_events_that_a_reader_does_not_want_move_its_cursor_on():
    """Else a reader of a quiet process would look at all others' events again and again."""
    console = Console(1)
    console.publish([event(1, 2), event(2, 3, "exit"), event(3, 3), event(4, 4)], 1, 1)
    assert seqs(console.read(0, 10, {3}, None)) == ([2, 3], 4)
    assert seqs(console.read(0, 10, {3}, {"exit"})) == ([2], 4)
    assert seqs(console.read(0, 10, None, {"input"})) == ([1, 3, 4], 4)
    assert seqs(console.read(0, 10, {9}, None)) == ([], 4)
    assert seqs(console.read(0, 1, {3}, None)) == ([2], 2)


def test_a_cursor_from_the_future_stays_where_it_is():
    assert seqs(filled(3).read(99, 10, None, None)) == ([], 99)


def test_numbers_may_have_gaps():
    """After a restart numbering goes on behind a reserved block."""
    console = Console(100)
    assert (console.visible, console.oldest) == (99, 100)
    console.publish([event(100), event(250)], 1, 1)
    assert seqs(console.read(120, 10, None, None)) == ([250], 250)
    assert console.oldest == 100


def test_memory_is_bounded_and_the_newest_stay():
    console = filled(1000, size=10)
    assert len(console._ring) <= 20
    assert console.visible == 1000
    assert console.oldest == 1000 - len(console._ring) + 1
    assert seqs(console.read(0, 1000, None, None))[0] == list(range(console.oldest, 1001))


def test_an_empty_ring_says_what_number_comes_next():
    assert Console(1).oldest == 1
    assert Console(42).visible == 41


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=80))
def test_readers_see_every_durable_event_once_in_order(moves):
    """Whatever is published and made durable in which steps: no event twice, none lost, none early."""
    console = Console(1, 1000)
    tickets, durable, seq = 0, 0, 0
    owned, seen, cursor = {}, [], 0
    for fresh, made_durable in moves:
        tickets += 1
        events = [event(seq + number + 1) for number in range(fresh)]
        seq += fresh
        owned |= {one.seq: tickets for one in events}
        console.publish(events, tickets, durable)
        durable = min(tickets, durable + made_durable)
        console.reveal(durable)
        found, cursor = console.read(cursor, 3, None, None)
        assert all(owned[one.seq] <= durable for one in found)
        seen += [one.seq for one in found]
    console.reveal(tickets)
    found, cursor = console.read(cursor, 10_000, None, None)
    assert seen + [one.seq for one in found] == list(range(1, seq + 1))
