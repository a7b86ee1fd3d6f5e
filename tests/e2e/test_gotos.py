"""Goto: the head moves to any settled message, back, forth or onto an abandoned branch."""

import json
import time

import pytest
from e2ekit import program, refused, texts, use

TALK = program()


@pytest.fixture
def talk(client):
    """A process at rest after two exchanges, and the ids of its four messages."""
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, "!say one")
    client.run(pid, "!say two")
    return pid, [row["id"] for row in client.history(pid)]


def goto(client, pid, to, **more):
    return client.call("proc.goto", pid=pid, to=to, **more)


# --- by a user --------------------------------------------------------------------------------------


def test_back_and_rest(client, talk, strict):
    """Without a text the process rests where it was put; nothing is deleted."""
    pid, ids = talk
    assert goto(client, pid, ids[1]) == {"old_head": ids[3], "head": ids[1]}
    assert client.rests(pid)["head"] == ids[1]
    assert texts(client.history(pid)) == ["!say one", "one"]
    assert [row["id"] for row in client.history(pid, all=True)] == ids
    assert len(strict.requests()) == 2


def test_back_with_a_text(client, talk, strict):
    """It becomes the next user message, and what was left out is not sent."""
    pid, ids = talk
    goto(client, pid, ids[1], text="!say other")
    client.until(pid, lambda row: row["turns"] == 3)
    assert texts(client.history(pid)) == ["!say one", "one", "!say other", "other"]
    assert "two" not in strict.bodies()[-1]


def test_forth_and_onto_an_abandoned_branch(client, talk):
    """Ids stay valid for ever, from either branch."""
    pid, ids = talk
    goto(client, pid, ids[1], text="!say other")
    client.until(pid, lambda row: row["turns"] == 3)
    other = client.rests(pid)["head"]
    assert goto(client, pid, ids[3])["old_head"] == other
    assert texts(client.history(pid)) == ["!say one", "one", "!say two", "two"]
    assert goto(client, pid, other)["head"] == other
    assert texts(client.history(pid))[-1] == "other"
    goto(client, pid, ids[3], text="!say forth")
    client.until(pid, lambda row: row["turns"] == 4)
    assert texts(client.history(pid)) == ["!say one", "one", "!say two", "two", "!say forth", "forth"]
    assert len(client.history(pid, all=True)) == 8


def test_from_a_user_message_the_model_is_asked_again(client, talk):
    """`run` goes on from there without a new text."""
    pid, ids = talk
    goto(client, pid, ids[2], run=True)
    client.until(pid, lambda row: row["turns"] == 3)
    again = client.history(pid)
    assert texts(again) == ["!say one", "one", "!say two", "two"]
    assert again[-1]["id"] not in ids
    assert again[-1]["parent"] == ids[2]


def test_a_run_without_a_text_asks_again_too(client, talk):
    """It needs a user message to answer."""
    pid, ids = talk
    goto(client, pid, ids[2])
    assert client.rests(pid)["turns"] == 2
    assert client.run(pid)["message"] == "two"
    with refused("EINVAL", "no user message"):
        client.run(pid)


def test_from_an_assistants_message_run_needs_a_text(client, talk):
    """There is nothing to answer."""
    pid, ids = talk
    with refused("EINVAL", "run"):
        goto(client, pid, ids[1], run=True)
    assert client.get(pid)["head"] == ids[3]


def test_text_after_a_user_message_joins_it(client, talk, strict):
    """Two user messages in a row are one to the model."""
    pid, ids = talk
    goto(client, pid, ids[2], text="!say both")
    client.until(pid, lambda row: row["turns"] == 3)
    assert client.rests(pid)["run"]["message"] == "both"
    last = json.loads(strict.bodies()[-1])["messages"][-1]
    assert texts([last]) == ["!say two!say both"]


@pytest.mark.parametrize(
    ("to", "errno"), [("m999999", "ENOENT"), ("12", "EINVAL"), ("m-1", "EINVAL"), ("", "EINVAL")]
)
def test_a_message_that_is_not_there(client, talk, to, errno):
    """ENOENT; what is no message id is EINVAL. The head stays."""
    pid, ids = talk
    with refused(errno):
        goto(client, pid, to)
    assert client.get(pid)["head"] == ids[3]


def test_another_processs_message_is_enoent(client, talk):
    """Also a child's own."""
    pid, _ = talk
    (child,) = client.call("proc.fork", pid=pid, prompts=["!say three"])["pids"]
    client.until(child, lambda row: row["turns"] == 1)
    with refused("ENOENT"):
        goto(client, pid, client.get(child)["head"])


def test_a_message_that_asks_for_tools_is_refused(client):
    """It is not settled; the messages around it are."""
    pid = client.spawn(program("bash"), interactive=True)
    client.run(pid, "!bash echo x\n!say done")
    asks, answers = (row["id"] for row in client.history(pid)[1:3])
    with refused("EINVAL", asks, "asks for tools"):
        goto(client, pid, asks)
    goto(client, pid, answers, run=True)
    client.until(pid, lambda row: row["turns"] == 3)
    assert client.rests(pid)["run"]["message"] == "done"


def test_a_blank_text_is_einval(client, talk):
    """And the head stays."""
    pid, ids = talk
    with refused("EINVAL", "blank"):
        goto(client, pid, ids[1], text="  ")
    assert client.get(pid)["head"] == ids[3]


def test_an_ended_process_stays_where_it_is(client):
    """ESRCH: fork it."""
    pid, _ = client.finish(TALK, "!say x")
    with refused("ESRCH"):
        goto(client, pid, client.history(pid)[0]["id"])


def test_a_call_under_way_is_cancelled_and_never_lands(client, strict):
    """Not even when the head is moved to where it was."""
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, "!say one")
    with strict.held():
        client.send(pid, "!say late")
        client.until_wchan(pid, "api")
        head = client.get(pid)["head"]
        goto(client, pid, head)
        assert client.rests(pid)["head"] == head
    assert client.run(pid, "!say next")["message"] == "next"
    assert "late" not in texts(client.history(pid, all=True))


def test_a_tool_under_way_is_cancelled_and_its_result_never_lands(client, tmp_path):
    """What it had written stays written."""
    pid = client.spawn(program("bash"), interactive=True)
    client.run(pid, "!say one")
    home = client.get(pid)["head"]
    client.send(pid, f"!bash echo began >> {tmp_path}/log; sleep 60; echo ended >> {tmp_path}/log")
    client.until_wchan(pid, "tool:bash")
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    goto(client, pid, home, text="!say back")
    client.until(pid, lambda row: row["turns"] == 3)
    assert texts(client.history(pid)) == ["!say one", "one", "!say back", "back"]
    assert (tmp_path / "log").read_text() == "began\n"


def test_goto_on_a_stopped_process_takes_effect_at_cont(client, talk):
    """The head moves at once, the text is taken later."""
    pid, ids = talk
    client.signal(pid, "STOP")
    goto(client, pid, ids[1], text="!say later")
    assert (client.get(pid)["head"], client.get(pid)["stat"]) == (ids[1], "T")
    client.signal(pid, "CONT")
    client.until(pid, lambda row: row["turns"] == 3)
    assert texts(client.history(pid))[-1] == "later"


def test_the_prefix_that_is_kept_is_sent_as_it_was(client, talk, strict):
    """Byte for byte, so that the cache holds."""
    pid, ids = talk
    goto(client, pid, ids[1], text="!say other")
    client.until(pid, lambda row: row["turns"] == 3)
    second, third = strict.bodies()[1:]
    position = second.index("!say two")
    assert second[:position] == third[:position]


def test_old_branches_survive_a_restart(fresh):
    """History and ids are there, and goto reaches them."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TALK, interactive=True)
        client.run(pid, "!say one")
        client.run(pid, "!say two")
        before = client.history(pid, all=True)
        goto(client, pid, before[1]["id"])
    fresh.restart()
    with fresh.client() as client:
        assert client.history(pid, all=True) == before
        assert client.rests(pid)["head"] == before[1]["id"]
        goto(client, pid, before[3]["id"])
        assert texts(client.history(pid)) == ["!say one", "one", "!say two", "two"]
        assert client.run(pid, "!say three")["message"] == "three"
        new = client.history(pid)[-1]["id"]
        assert new not in {row["id"] for row in before}


def test_history_pages(client, talk):
    """`after` and `limit` walk through it."""
    pid, ids = talk
    found, after = [], ""
    while page := client.history(pid, after=after, limit=3):
        assert len(page) <= 3
        found += [row["id"] for row in page]
        after = page[-1]["id"]
    assert found == ids


# --- by the model -----------------------------------------------------------------------------------

TRAVELLER = program("goto", "bash", "exit")


def traveller(client):
    """An interactive process that may goto, after one exchange; and the ids of its two messages."""
    pid = client.spawn(TRAVELLER, interactive=True)
    assert client.run(pid, "a plain question")["message"] == "You said: a plain question"
    return pid, [row["id"] for row in client.history(pid)]


def test_user_messages_carry_their_ids(client):
    """When goto is offered, and only then."""
    pid, ids = traveller(client)
    assert texts(client.history(pid))[0] == f"[{ids[0]}] a plain question"
    plain, _ = client.finish(TALK, "!say x")
    assert texts(client.history(plain))[0] == "!say x"


def test_the_model_travels_back(client, strict):
    """It goes on from there with its message, framed."""
    pid, ids = traveller(client)
    result = client.run(pid, f"!goto {ids[0]} \\n!say learned")
    assert result["message"] == "learned"
    question, travelled, answer = client.history(pid)
    assert question["id"] == ids[0]
    assert texts([travelled])[0] == (
        f"[{travelled['id']}] <system_message>\n"
        f"GOTO tool used. Conversation reset to message {ids[0]}. 3 messages were removed.\n"
        "</system_message>\n"
        "<original_message_to_be_ignored>\na plain question\n</original_message_to_be_ignored>\n"
        "<time_travel_message>\n\n!say learned\n</time_travel_message>"
    )
    assert texts([answer]) == ["learned"]
    assert "!goto" not in strict.bodies()[-1]


def test_the_abandoned_branch_is_still_there(client):
    """A user can go back to it."""
    pid, ids = traveller(client)
    client.run(pid, f"!goto {ids[1]} \\n!say learned")
    branches = client.history(pid, all=True)
    (left,) = [row for row in branches if "!goto" in str(row["content"]) and row["role"] == "user"]
    assert left["parent"] == ids[1]
    goto(client, pid, left["id"])
    assert client.rests(pid)["head"] == left["id"]


def test_tools_beside_a_goto_end_first(client, tmp_path):
    """They are run; the goto wins over their results."""
    pid, ids = traveller(client)
    client.run(pid, f"!bash echo ran >> {tmp_path}/log\n!& !goto {ids[1]} \\n!say back")
    assert (tmp_path / "log").read_text() == "ran\n"
    assert client.results(pid) == []
    assert texts(client.history(pid))[-1] == "back"


def test_only_the_first_goto_of_a_turn_is_done(client):
    """And no exit after it."""
    pid, ids = traveller(client)
    result = client.run(pid, f"!goto {ids[1]} \\n!say first\n!& !goto {ids[0]} \\n!say second\n!& !exit 3")
    assert result["message"] == "first"
    assert client.rests(pid)["status"] is None


@pytest.mark.parametrize("position", ["m999999", "nowhere", ""])
def test_a_goto_that_cannot_be_is_an_error_result(client, position):
    """The run goes on, and an exit of the same turn is done."""
    pid, _ = traveller(client)
    call = use("goto", position=position, message="x")
    assert client.run(pid, f"{call}\n!say on")["message"] == "on"
    assert position in client.result(pid)
    result = client.run(pid, f"{call}\n!& !exit 4 bye")
    assert (result["status"], result["message"]) == (4, "bye")


def test_a_goto_to_a_message_that_asks_for_tools_is_an_error_result(client):
    """It says where to go instead."""
    pid, _ = traveller(client)
    client.run(pid, "!bash echo x\n!say done")
    asks = client.history(pid)[3]["id"]
    client.run(pid, f"{use('goto', position=asks, message='x')}\n!say on")
    assert "asks for tools" in client.result(pid)
