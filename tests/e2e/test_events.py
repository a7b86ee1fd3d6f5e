"""Events: their order, their numbers across restarts, slow readers, and what is shown as it comes."""

import socket
import time

import pytest
from e2ekit import program, refused, script

from llmprocd.abi.events import TYPES

TALK = program()
BASH = program("bash")


def test_a_run_tells_its_story_in_order(client):
    """spawn, input, the calls and tools, the end."""
    pid, _ = client.finish(BASH, "!bash echo x\n!say done")
    assert client.types(pid) == [
        "spawn", "input", "turn_start", "api_request", "api_response", "tool_start", "tool_end",
        "turn_start", "api_request", "api_response", "turn_end", "exit",
    ]  # fmt: skip


def test_what_events_say(client):
    """Each is a flat map with seq, at, type and pid."""
    before = time.time()
    pid, _ = client.finish(BASH, "!bash echo x\n!say done")
    events = client.events(pid)
    for event in events:
        assert event["type"] in TYPES
        assert event["pid"] == pid
        assert before - 1 < event["at"] < time.time() + 1
    by_type = {event["type"]: event for event in events}
    assert by_type["tool_end"]["text"] == "x\n[exit 0]"
    assert by_type["exit"]["status"] == 0
    assert by_type["turn_end"]["stop_reason"] == "end_turn"
    assert by_type["api_response"]["text"] == "done"


def test_numbers_only_grow(client):
    """Across processes; pages of any size give the same list."""
    for number in range(3):
        client.finish(BASH, f"!bash echo {number}\n!say done")
    events = client.events()
    numbers = [event["seq"] for event in events]
    assert numbers == sorted(set(numbers))
    paged, after = [], 0
    while page := client.call("events.read", after_seq=after, max=5):
        paged += page["events"]
        if not page["events"]:
            break
        assert len(page["events"]) <= 5
        after = page["next_seq"]
    assert [event["seq"] for event in paged] == numbers


def test_filters(client):
    """By process and by type; an unknown type is EINVAL."""
    one, _ = client.finish(TALK, "!say one")
    two, _ = client.finish(TALK, "!say two")
    found = client.events(types=["exit"])
    assert [event["pid"] for event in found if event["pid"] in {one, two}] == [one, two]
    assert {event["pid"] for event in client.events(two)} == {two}
    with refused("EINVAL", "party"):
        client.call("events.read", types=["party"])


def test_without_a_number_reading_begins_now(client):
    """And waits for what comes."""
    client.finish(TALK, "!say before")
    assert client.call("events.read")["events"] == []
    reading = client.begin("events.read", wait_ms=30_000, types=["spawn"])
    client.call("sys.status")
    pid = client.spawn(TALK, "!say x")
    assert [event["pid"] for event in client.end(reading)["events"]] == [pid]


def test_waiting_for_nothing_ends(client):
    """With no events and the number to read on from."""
    now = client.call("events.read")["next_seq"]
    assert client.call("events.read", after_seq=now, wait_ms=50) == {"events": [], "next_seq": now, "lost": 0}


def test_text_comes_as_it_is_streamed(client):
    """To those who look, while the call is under way; it counts when its message is there."""
    sub = client.call("events.subscribe", types=["text", "api_response"])["sub"]
    pid = client.spawn(TALK, "!& !delay 60\n!say one two three", interactive=True)
    (first,) = pushed(client, sub, lambda _: True)
    assert (first["type"], first["text"].strip(), first["attempt"]) == ("text", "one", 1)
    assert client.get(pid)["wchan"] == "api"
    client.signal(pid, "INT")
    assert pushed(client, sub, lambda events: len(events) == 2)[1]["text"] == "one"


def test_what_is_streamed_is_what_was_said(client):
    """The pieces of an answer, joined, are its message; how many there are is chance."""
    sub = client.call("events.subscribe", types=["text", "api_response"])["sub"]
    pid, _ = client.finish(TALK, "!say one two three four five")
    *deltas, whole = pushed(client, sub, lambda events: events[-1]["type"] == "api_response")
    assert {event["type"] for event in deltas} == {"text"}
    assert "".join(event["text"] for event in deltas) == whole["text"] == "one two three four five"
    assert {event["attempt"] for event in deltas} == {1}
    assert "text" not in client.types(pid) or client.types(pid).count("text") == len(deltas)


def pushed(client, sub, enough):
    """Events of a subscription until there are enough of them."""
    deadline = time.monotonic() + 60
    while True:
        events = [
            e
            for name, (told,) in client.notices
            if name == "event" and told["sub"] == sub
            for e in told["events"]
        ]
        if events and enough(events):
            return events
        assert time.monotonic() < deadline
        client.receive()


def test_a_subscription_pushes_until_it_ends(client):
    """In order, those that were asked for, from a number on."""
    pid, _ = client.finish(TALK, "!say old")
    first = client.events(pid)[0]["seq"]
    sub = client.call("events.subscribe", after_seq=first - 1, pids=[pid])["sub"]
    events = pushed(client, sub, lambda events: events[-1]["type"] == "exit")
    assert events == client.events(pid)
    client.call("events.unsubscribe", sub=sub)
    with refused("ENOENT"):
        client.call("events.unsubscribe", sub=sub)
    client.notices.clear()
    client.finish(TALK, "!say more")
    client.call("sys.status")
    assert client.notices == []


def test_the_reply_comes_before_the_first_event(daemon, client):
    """A subscriber knows its number before it is told anything."""
    client.finish(TALK, "!say x")
    with daemon.client() as other:
        msgid = other.begin("events.subscribe", after_seq=0)
        other.unpacker.feed(other.sock.recv(1 << 18))
        assert next(iter(other.unpacker))[:2] == [1, msgid]


def test_a_slow_reader_holds_nobody_up(daemon, client):
    """It is told what it lost, or gets all; others are answered meanwhile."""
    with daemon.client() as slow:
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sub = slow.call("events.subscribe", after_seq=client.call("events.read")["next_seq"])["sub"]
        pid = client.spawn(BASH, interactive=True)
        big = "x" * 7000
        for _ in range(60):
            client.run(pid, f"!say {big}")
        last = client.call("events.read")["next_seq"]
        numbers = [event["seq"] for event in pushed(slow, sub, lambda events: events[-1]["seq"] >= last)]
        assert numbers == sorted(set(numbers))


def test_numbers_go_on_after_a_restart(fresh):
    """Old events are there, new ones are numbered above them, none twice."""
    fresh.start()
    with fresh.client() as client:
        pid, _ = client.finish(BASH, "!bash echo x\n!say done")
        before = client.events()
    for _ in range(2):
        fresh.restart()
    with fresh.client() as client:
        assert client.events() == before
        assert client.call("events.read")["next_seq"] >= before[-1]["seq"]
        client.finish(BASH, "!bash echo x\n!say done")
        after = client.events()
        assert after[: len(before)] == before
        numbers = [event["seq"] for event in after]
        assert numbers == sorted(set(numbers))
        assert client.types(pid)[-1] == "exit"


def test_a_reader_goes_on_over_a_restart(fresh):
    """Its number is still good: nothing is missing and nothing comes twice."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TALK, interactive=True)
        client.run(pid, "!say one")
        first = client.call("events.read", after_seq=0, pids=[pid])
    fresh.restart()
    with fresh.client() as client:
        client.run(pid, "!say two")
        rest = client.events(pid, after=first["next_seq"])
        assert first["events"] + rest == client.events(pid)
        assert [event["text"] for event in rest if event["type"] == "api_response"] == ["two"]


def test_signals_and_gotos_are_told(client):
    """With who did it, and from where to where."""
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, "!say one")
    home = client.history(pid)[0]["id"]
    client.call("proc.goto", pid=pid, to=home)
    client.signal(pid, "STOP")
    events = {event["type"]: event for event in client.events(pid)}
    assert events["signal"]["signal"] == "STOP"
    assert events["goto"]["head"] == home


@pytest.mark.parametrize("count", [40])
def test_many_readers_see_the_same(daemon, client, count):
    """Each with a cursor of its own."""
    readers = [daemon.client() for _ in range(count)]
    subs = [reader.call("events.subscribe", after_seq=0, types=["exit"])["sub"] for reader in readers]
    pid, _ = client.finish(TALK, script("!say x"))
    for reader, sub in zip(readers, subs, strict=True):
        pushed(reader, sub, lambda events: events[-1]["pid"] == pid)
        reader.close()
