"""Limits of processes and of their subtrees, set by program, at spawn and while they run."""

import pytest
from e2ekit import program, refused, script, use

TALK = program()
BASH = program("bash")


def used(client, pid):
    return {row["resource"]: row for row in client.call("proc.limits", pid=pid)["limits"]}


# --- wall -------------------------------------------------------------------------------------------


def test_wall_of_the_program(client):
    """A process that runs too long ends with 124, tools and all."""
    pid, row = client.finish({**BASH, "limits": {"wall": "200ms"}}, "!bash sleep 60")
    assert row["status"] == 124
    assert client.events(pid, types=["limit"])[0]["resource"] == "wall"


def test_wall_at_spawn_wins(client):
    """What the user says counts."""
    pid, row = client.finish(
        {**BASH, "limits": {"wall": 0.01}}, "!bash sleep 0.1\n!say x", limits={"wall": "30s"}
    )
    assert row["status"] == 0
    assert used(client, pid)["wall"]["hard"] == 30


def test_wall_can_be_changed_while_it_runs(client):
    """Either way."""
    pid = client.spawn(TALK, "!sleep 60\n!say x", limits={"wall": "1h"})
    client.until_wchan(pid, "api")
    client.call("proc.limits", pid=pid, set={"wall": 0.05})
    assert client.wait(pid)["status"] == 124


def test_a_soft_wall_asks_for_one_last_turn(client):
    """Then 152."""
    pid = client.spawn(BASH, "!bash sleep 1\n!say never", limits={"wall": "0.2:60"})
    assert client.wait(pid)["status"] == 152
    assert "last turn" in str(client.history(pid)[-2]["content"])


def test_wall_outlives_the_daemon(fresh):
    """The time that it is down counts."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TALK, interactive=True, limits={"wall": 1.5})
    fresh.restart()
    with fresh.client() as client:
        assert client.wait(pid)["status"] == 124


@pytest.mark.parametrize("value", ["soon", -1, "5:1", [3]])
def test_a_limit_that_is_none_is_einval(client, value):
    """And names it."""
    with refused("EINVAL", "wall"):
        client.spawn(TALK, "!say x", limits={"wall": value})


# --- turns and tokens -------------------------------------------------------------------------------


def test_turns(client):
    """At the hard limit the process exits with 152."""
    pid, row = client.finish(BASH, "!bash true\n" * 5 + "!say never", limits={"turns": 3})
    assert row["status"] == 152
    assert client.get(pid)["turns"] == 3
    assert used(client, pid)["turns"]["used"] == 3


def test_soft_turns_ask_for_one_last_turn(client):
    """The calls of that turn are answered with an error."""
    pid, row = client.finish(BASH, "!bash true\n" * 5 + "!say never", limits={"turns": "2:9"})
    assert row["status"] == 152
    assert client.get(pid)["turns"] == 3


def test_a_childs_use_counts_for_its_ancestors(client):
    """A tree spends one budget."""
    prog = program("fork", "bash", "spawn")
    pid, row = client.finish(
        prog, script(use("fork", prompts=["!bash true\n" * 9] * 2), "!say x"), limits={"turns": 6}
    )
    assert row["status"] == 152
    total = sum(
        one["turns"]
        for one in client.call("proc.list", all=True)["procs"]
        if pid in {one["pid"], one["birth"]}
    )
    assert total <= 6


def test_tokens(client):
    """All four counters of usage."""
    _, row = client.finish(BASH, "!bash true\n" * 8 + "!say never", limits={"tokens": 2000})
    assert row["status"] == 152


# --- processes and descriptors ----------------------------------------------------------------------


def test_procs(client):
    """Living ones of the subtree, itself too; to a model an error result."""
    prog = program("spawn", "fork")
    calls = script(
        *[use("spawn", prompt="!sleep 60", wait=False)] * 3, use("fork", prompts=["x", "y"]), "!say on"
    )
    pid, row = client.finish(prog, calls, limits={"procs": 2})
    assert row["message"] == "on"
    results = client.results(pid)
    assert results[0].isdigit()
    assert all("EAGAIN" in result for result in results[1:]), results


def test_fds(client):
    """Results that find no descriptor any more are an error to the model."""
    prog = program("bash", file_descriptor={"max_direct_output_chars": 100, "default_page_size": 100})
    pid, row = client.finish(prog, "!bash seq 999\n" * 3 + "!say on", limits={"fds": 1})
    assert row["message"] == "on"
    results = client.results(pid)
    assert 'fd="fd:3"' in results[0]
    assert "EDQUOT" in results[1]
    assert "EDQUOT" in results[2]
