"""Where two rules meet: signals in the middle of forks, exec during a call, crashes while waiting."""

import json
import time

import pytest
from e2ekit import program, refused, texts, until_there, use

TALK = program()
FAMILY = program("fork", "spawn", "bash", "exit", "wait", "send", "goto")


# --- exec and hup in the middle ---------------------------------------------------------------------


def test_exec_during_a_call_asks_the_new_program(client, strict):
    """The old program's answer never lands."""
    with strict.held():
        pid = client.spawn(program(prompt={"system": "old"}), "!say {{model}}")
        client.until_wchan(pid, "api")
        client.call("proc.exec", pid=pid, program=program(model={"name": "claude-haiku-5-5"}))
    assert client.wait(pid)["message"] == "claude-haiku-5-5"
    assert client.get(pid)["turns"] == 1


def test_hup_during_a_call_leaves_it_alone(client, strict, tmp_path):
    """The next turn uses the new file."""
    path = tmp_path / "p.toml"
    path.write_text(
        '[model]\nname = "claude-sonnet-5-5"\nprovider = "anthropic"\n[tools]\nbuiltin = ["bash"]\n'
    )
    with strict.held():
        pid = client.spawn(str(path), "!bash true\n!say {{model}}")
        client.until_wchan(pid, "api")
        path.write_text(path.read_text().replace("sonnet", "haiku"))
        client.signal(pid, "HUP")
    assert client.wait(pid)["message"] == "claude-haiku-5-5"
    assert client.get(pid)["turns"] == 2


def test_exec_on_a_stopped_process(client, strict):
    """It takes effect at CONT."""
    with strict.held():
        pid = client.spawn(TALK, "!say {{model}}")
        client.until_wchan(pid, "api")
        client.signal(pid, "STOP")
        client.call("proc.exec", pid=pid, program=program(model={"name": "claude-haiku-5-5"}))
    client.signal(pid, "CONT")
    assert client.wait(pid)["message"] == "claude-haiku-5-5"


def test_send_to_a_stopped_process_waits_for_cont(client):
    """It is durable, and taken later."""
    pid = client.spawn(TALK, interactive=True)
    client.signal(pid, "STOP")
    client.send(pid, "!say later")
    time.sleep(0.2)
    assert (client.get(pid)["turns"], client.get(pid)["waiting"]) == (0, 1)
    client.signal(pid, "CONT")
    client.until(pid, lambda row: row["turns"] == 1)


# --- forks of odd processes -------------------------------------------------------------------------


def test_a_fork_of_a_stopped_process_runs(client):
    """The child is a process of its own."""
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, "!say one")
    client.signal(pid, "STOP")
    (child,) = client.call("proc.fork", pid=pid, prompts=["!say child"])["pids"]
    client.until(child, lambda row: row["turns"] == 1)
    assert client.get(pid)["stat"] == "T"


def test_a_fork_of_a_process_that_never_ran(client):
    """An empty history is one too."""
    pid = client.spawn(TALK, interactive=True)
    (child,) = client.call("proc.fork", pid=pid, prompts=["!say first"])["pids"]
    client.until(child, lambda row: row["turns"] == 1)
    assert texts(client.history(child)) == ["!say first", "first"]
    (resting,) = client.call("proc.fork", pid=pid, at="last")["pids"]
    assert client.rests(resting)["head"] is None


def test_a_fork_at_a_user_message_rests_until_it_is_told(client):
    """Without a prompt it makes no call; a run without a text asks the model."""
    pid, _ = client.finish(TALK, "!say one")
    (child,) = client.call("proc.fork", pid=pid, at=client.history(pid)[0]["id"])["pids"]
    assert client.rests(child)["turns"] == 0
    assert client.run(child)["message"] == "one"


def test_a_child_reaches_the_branches_of_its_parent(client):
    """One history tree for the family."""
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, "!say one")
    left = client.get(pid)["head"]
    client.call("proc.goto", pid=pid, to=client.history(pid)[0]["id"], run=True)
    client.until(pid, lambda row: row["turns"] == 2)
    (child,) = client.call("proc.fork", pid=pid)["pids"]
    client.call("proc.goto", pid=child, to=left)
    assert client.rests(child)["head"] == left


# --- signals while children work --------------------------------------------------------------------


def test_stop_while_waiting_for_children(client, tmp_path):
    """They go on and end; the parent reads of it after CONT."""
    go = tmp_path / "go"
    pid = client.spawn(FAMILY, f"!fork !bash {until_there(go)}\\n!say kid\n!say joined")
    client.until_wchan(pid, "wait")
    (child,) = client.get(pid)["children"]
    client.signal(pid, "STOP")
    go.touch()
    client.wait(child)
    time.sleep(0.2)
    assert (client.get(pid)["stat"], client.get(pid)["turns"]) == ("T", 1)
    client.signal(pid, "CONT")
    assert client.wait(pid)["message"] == "joined"
    assert json.loads(client.result(pid))[0]["message"] == "kid"


def test_stop_between_tools_and_forks_of_a_turn(client, tmp_path):
    """The tool lands, the fork waits for CONT, and is made once."""
    go = tmp_path / "go"
    prompt = f"!bash {until_there(go)}; echo ran >> log\n!& !fork !say kid\n!say joined"
    pid = client.spawn(FAMILY, prompt, cwd=str(tmp_path))
    client.until_wchan(pid, "tool:bash")
    client.signal(pid, "STOP")
    go.touch()
    client.until(pid, lambda row: row["wchan"] == "-")
    assert client.get(pid)["children"] == []
    client.signal(pid, "CONT")
    assert client.wait(pid)["message"] == "joined"
    assert (tmp_path / "log").read_text() == "ran\n"
    assert len([row for row in client.call("proc.list", all=True)["procs"] if row["birth"] == pid]) == 1


def test_a_stopped_child_is_waited_for(client, tmp_path):
    """Until somebody lets it go on."""
    go = tmp_path / "go"
    pid = client.spawn(FAMILY, f"!fork !bash {until_there(go)}\\n!say kid\n!say joined")
    (child,) = client.until(pid, lambda row: row["children"])["children"]
    client.until_wchan(child, "tool:bash")
    client.signal(child, "STOP")
    go.touch()
    client.until(child, lambda row: row["wchan"] == "-")
    assert client.get(pid)["wchan"] == "wait"
    client.signal(child, "CONT")
    assert client.wait(pid)["message"] == "joined"


def test_goto_away_from_a_waiting_fork(client, tmp_path):
    """The children are not cancelled; the parent forgets them."""
    pid = client.spawn(FAMILY, interactive=True)
    client.run(pid, "plain")
    home = client.get(pid)["head"]
    go = tmp_path / "go"
    client.send(pid, f"!fork !bash {until_there(go)}\\n!say kid\n!say joined")
    client.until_wchan(pid, "wait")
    (child,) = client.get(pid)["children"]
    client.call("proc.goto", pid=pid, to=home, text="!say elsewhere")
    client.until(pid, lambda row: row["turns"] == 3)
    go.touch()
    assert client.wait(child)["message"] == "kid"
    time.sleep(0.2)
    assert texts(client.history(pid))[-1] == "elsewhere"


def test_a_removed_child_is_told_of(client, tmp_path):
    """Whoever waits for a process that was removed gets an answer."""
    go = tmp_path / "go"
    pid = client.spawn(FAMILY, f"!fork !sleep 60 | !bash {until_there(go)}\\n!say kid\n!say joined")
    children = client.until(pid, lambda row: len(row["children"]) == 2)["children"]
    client.signal(children[0], "KILL")
    client.wait(children[0])
    client.call("proc.remove", pids=[children[0]])
    go.touch()
    assert client.wait(pid)["message"] == "joined"
    gone, kid = json.loads(client.result(pid))
    assert gone["error"] is True
    assert kid["message"] == "kid"


# --- crashes while waiting --------------------------------------------------------------------------


def test_waiting_for_children_goes_on_after_a_crash(fresh):
    """Nobody is forked twice; who ended and who still runs are both told of."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(FAMILY, "!fork !say quick | !bash sleep 60\\n!say slow\n!say joined")
        children = client.until(pid, lambda row: len(row["children"]) == 2)["children"]
        client.until(children[0], lambda row: row["stat"] == "Z")
        client.until_wchan(children[1], "tool:bash")
    for _ in range(2):
        fresh.restart()
    with fresh.client() as client:
        assert client.wait(pid)["message"] == "joined"
        told = json.loads(client.result(pid))
        assert [(one["pid"], one["message"]) for one in told] == [
            (children[0], "quick"),
            (children[1], "slow"),
        ]


def test_a_spawn_that_waits_goes_on_after_a_crash(fresh):
    """The child is not spawned again."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(FAMILY, "!spawn !bash sleep 60\\n!say child\n!say heard {{result}}")
        (child,) = client.until(pid, lambda row: row["children"])["children"]
        client.until_wchan(child, "tool:bash")
    fresh.restart()
    with fresh.client() as client:
        assert client.wait(pid)["message"] == "heard child"
        assert len([row for row in client.call("proc.list", all=True)["procs"] if row["birth"] == pid]) == 1


def test_notify_survives_a_crash(fresh):
    """The line comes once, and fd 0 was kept open for it."""
    fresh.start()
    with fresh.client() as client:
        call = use("spawn", prompt="!bash sleep 60\n!say done", wait=False, notify=True)
        pid = client.spawn(FAMILY, f"{call}\n!say waiting")
        (child,) = client.until(pid, lambda row: row["wchan"] == "fd:0")["children"]
        client.until_wchan(child, "tool:bash")
    fresh.restart()
    with fresh.client() as client:
        assert client.wait(pid)["status"] == 0
        told = [row for row in client.history(pid) if row["role"] == "user" and "has ended with" in str(row)]
        assert len(told) == 1


def test_mail_that_was_not_taken_is_taken_after_a_crash(fresh):
    """In order, once each."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TALK, "!sleep 0.5\n!say zero", interactive=True)
        for number in (1, 2, 3):
            client.send(pid, f"!say number {number}")
    fresh.restart()
    with fresh.client() as client:
        client.until(pid, lambda row: row["turns"] == 4)
        said = [text for text in texts(client.history(pid)) if not text.startswith("!")]
        assert said == ["zero", "number 1", "number 2", "number 3"]


def test_a_repeated_request_after_a_crash(fresh):
    """The id is as durable as the process."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TALK, "!say x", request_id="once")
    fresh.restart()
    with fresh.client() as client:
        assert client.spawn(TALK, "!say x", request_id="once") == pid
        with refused("EEXIST"):
            client.spawn(TALK, "!say y", request_id="once")


def test_read_only_tools_run_again_and_others_do_not(fresh):
    """A tool with effects is answered with an error that says so."""
    fresh.start()
    with fresh.client() as client:
        fifo = fresh.work / "go"
        command = f"echo began >> log; while [ ! -e {fifo} ]; do sleep 0.02; done"
        pid = client.spawn(FAMILY, f"!bash {command}\n!say done", cwd=str(fresh.work))
        while not (fresh.work / "log").exists():
            time.sleep(0.01)
    fresh.restart()
    with fresh.client() as client:
        assert client.wait(pid)["message"] == "done"
        assert "Interrupted" in client.result(pid)
        assert "may have taken effect" in client.result(pid)
        assert (fresh.work / "log").read_text() == "began\n"


# --- many -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_hundred_at_once(client, tmp_path):
    """Each with a tool and two turns; all end well, and every line was written once."""
    prompts = [f"!bash echo {number} >> log\n!say done {number}" for number in range(200)]
    bash = program("bash")
    pids = [client.spawn(bash, prompt, cwd=str(tmp_path)) for prompt in prompts]
    rows = client.wait(*pids)
    assert [row["message"] for row in rows] == [f"done {number}" for number in range(200)]
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(200))


def test_a_deep_tree_ends_somewhere(client):
    """A chain of spawns is refused at some depth, and every one of them ends."""
    prog = program(
        "spawn",
        prompt={"system": "<script>\n!spawn deeper\n!say back\n</script>"},
        tools={"child_access": "admin"},
    )
    _, row = client.finish(prog, "deeper")
    assert row["message"] == "back"
    rows = client.call("proc.list", all=True)["procs"][1:]
    assert {row["status"] for row in rows} == {0}
    assert 10 < len(rows) <= 100
    deepest = max(row["pid"] for row in rows)
    assert "EAGAIN" in client.result(deepest)


def test_two_goto_and_a_script(client):
    """A user's goto right after a model's: the last one wins."""
    pid = client.spawn(FAMILY, interactive=True)
    client.run(pid, "plain")
    ids = [row["id"] for row in client.history(pid)]
    client.send(pid, f"!goto {ids[0]} \\n!bash sleep 60\\n!say by the model")
    client.until_wchan(pid, "tool:bash")
    client.call("proc.goto", pid=pid, to=ids[1], text="!say by the user")
    client.until(pid, lambda row: row["wchan"] == "fd:0" and row["turns"] == 4)
    assert texts(client.history(pid))[-1] == "by the user"
    assert "by the model" not in texts(client.history(pid, all=True))
