"""The prompt cache: of what has been sent before, at least 95 % is read and not paid again.

The endpoint keeps a cache as the API does, from the bytes it receives; `cachekit` works the same out again
from what arrived, so what is asserted here is neither the daemon's word nor the endpoint's.
"""

import json
import subprocess
import sys

import pytest
from cachekit import all_read, billed, seen
from e2ekit import Strict, program, script, toml, use

RULES = "Obey this rule, and the ones before it. " * 100
"""A system prompt of a thousand tokens."""

LONG = "words that go on and on, " * 400
"""A text of 2,500 tokens."""

TALK = program(prompt={"system": RULES})
TOOLS = program("bash", "calculator", "fork", "spawn", "goto", prompt={"system": RULES})


def sums(count, first=0):
    """One answer with so many calls."""
    return "\n!& ".join(["!calculator " + json.dumps({"expression": f"1+{first + i}"}) for i in range(count)])


# --- one process ------------------------------------------------------------------------------------


def test_tool_turns_read_all_that_was_sent_before(client, strict):
    """Each turn adds a call and a result of a page; the rest comes from the cache."""
    turns = [f"!bash seq {n}000 {n}300" for n in range(1, 7)]
    client.finish(TOOLS, script(*turns, "!say done"))
    assert len(all_read(strict, 6)) == 7


def test_a_conversation_reads_all_that_was_said_before(client, strict):
    """Texts alone, of both sides."""
    pid = client.spawn(TALK, interactive=True)
    for number in range(5):
        client.run(pid, f"!say {number} {LONG}")
    all_read(strict, 4)


@pytest.mark.parametrize("count", [9, 10, 25, 60])
def test_a_turn_of_many_blocks_reads_what_was_before_it(client, strict, count):
    """Looking back spans 20 blocks: a turn with more of them needs a marker where it began."""
    pid = client.spawn(TOOLS, interactive=True)
    client.run(pid, f"{sums(count)}\n{sums(count, 100)}\n!say {LONG}")
    client.run(pid, f"{sums(count, 200)}\n!say that was all")
    assert len(all_read(strict, 4)) == 5


def test_text_after_a_long_answer_reads_what_was_before_it(client, strict):
    """An answer of many blocks, and then a text: both middle markers are needed, and four are the most."""
    blocks = "\n!& ".join(f'!raw {{"type":"text","text":"part {n}"}}' for n in range(40))
    pid = client.spawn(TOOLS, interactive=True)
    client.run(pid, f"!say {LONG}")
    client.run(pid, blocks)
    client.run(pid, "!say and on")
    client.run(pid, "!say and on")
    assert max(one.body.count('"cache_control"') for one in all_read(strict, 3)) == 4


def test_a_pause_goes_on_from_the_cache(client, strict):
    """The answer that was sent back is read the next time."""
    client.finish(TALK, f"!say {LONG[:3000]}\n!stop pause_turn\n!say more\n!stop pause_turn\n!say end")
    all_read(strict, 2)


def test_goto_reads_the_common_part(client, strict):
    """Back to an answer, back to a question, and on from both."""
    pid = client.spawn(TOOLS, interactive=True)
    for number in range(4):
        client.run(pid, f"!say {number} {LONG}")
    ids = [row["id"] for row in client.history(pid)]
    for at in (ids[3], ids[4], ids[0], ids[-1]):
        client.call("proc.goto", pid=pid, to=at, text=f"!say again after {at}")
        client.rests(pid)
    assert len(all_read(strict, 7)) == 8


def test_a_models_goto_reads_the_common_part(client, strict):
    """The same for the tool."""
    pid = client.spawn(TOOLS, interactive=True)
    client.run(pid, f"!say first {LONG}")
    at = client.history(pid)[-1]["id"]
    client.run(pid, f"!bash seq 1000\n{use('goto', position=at, message='!say back')}")
    assert client.history(pid)[-1]["content"][0]["text"] == "back"
    all_read(strict, 3)


def test_exec_with_the_same_model_reads_what_is_common(client, strict):
    """Another program with the same prompt and tools reads all; with another prompt, the tools at least."""
    pid = client.spawn(TOOLS, interactive=True)
    client.run(pid, f"!say first {LONG}")
    client.call("proc.exec", pid=pid, program={**TOOLS, "model": {**TOOLS["model"], "max_iterations": 3}})
    client.run(pid, "!say second")
    all_read(strict, 1)
    assert client.get(pid)["cache"]["reason"] == ""
    client.call("proc.exec", pid=pid, program={**TOOLS, "prompt": {"system": RULES + "New."}})
    client.run(pid, "!say third")
    all_read(strict, 2)
    assert client.get(pid)["cache"]["reason"] == "system_changed"
    assert client.get(pid)["cache"]["read"] > 512


def test_hup_with_an_unchanged_file_changes_nothing(client, strict, tmp_path):
    """The program is read again and is the same to the byte."""
    path = tmp_path / "p.toml"
    path.write_text(toml(TOOLS))
    pid = client.spawn(str(path), interactive=True)
    client.run(pid, f"!say first {LONG}")
    client.signal(pid, "HUP")
    client.run(pid, "!say second")
    all_read(strict, 1)


def test_a_killed_daemon_goes_on_from_the_cache(fresh, strict):
    """The bytes that were sent before are sent again, from the disk."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TOOLS, f"!bash seq 1 1000\n!say {LONG}", interactive=True)
        client.rests(pid)
    fresh.restart()
    with fresh.client() as client:
        client.run(pid, "!bash seq 2 1000\n!say on")
        client.signal(pid, "KILL")
    assert len(all_read(strict, 3)) == 4


def test_it_can_be_disabled(client, strict):
    """Then no request marks anything, and nothing is read."""
    plain = {**TALK, "model": {**TALK["model"], "disable_automatic_caching": True}}
    pid = client.spawn(plain, interactive=True)
    client.run(pid, f"!say {LONG}")
    client.run(pid, "!say more")
    assert all("cache_control" not in body and "diagnostics" not in body for body in strict.bodies())
    usage = client.get(pid)["usage"]
    assert (usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]) == (0, 0)
    assert client.get(pid)["cache"]["reason"] == "disabled"


def test_markers_last_as_long_as_the_program_says(client, strict):
    """All markers of a request have the same lifetime."""
    hour = {"type": "ephemeral", "ttl": "1h"}
    pid = client.spawn({**TOOLS, "parameters": {"cache_control": hour}}, interactive=True)
    client.run(pid, f"{sums(30)}\n!say {LONG}")
    client.run(pid, "!say more")
    for body in strict.bodies():
        assert body.count('"cache_control":{"type":"ephemeral","ttl":"1h"}') == body.count("cache_control")
    assert all(one.usage.created_5m == 0 for one in all_read(strict, 2))


# --- families ---------------------------------------------------------------------------------------


def test_parent_and_children_of_a_fork_read_the_history(client, strict):
    """Forks by a user, of a living process and at an earlier message; then all go on."""
    pid = client.spawn(TOOLS, interactive=True)
    client.run(pid, f"!bash seq 1 1000\n!say one {LONG}")
    client.run(pid, f"!say two {LONG}")
    children = client.call("proc.fork", pid=pid, prompts=[f"!say child {n}" for n in range(4)])["pids"]
    early = client.history(pid)[3]["id"]
    children += client.call("proc.fork", pid=pid, prompts=["!say early"], at=early)["pids"]
    for child in children:
        client.rests(child)
    for one in (pid, *children):
        client.run(one, f"!bash echo {one}\n!say on")
    assert len(all_read(strict, 18)) == 20


@pytest.mark.parametrize("beside", [1, 30])
def test_a_models_children_read_the_history(client, strict, beside):
    """Forks beside few and many other calls of the same turn."""
    fork = use("fork", prompts=[f"!bash echo {n}\\n!say child {n}" for n in range(5)])
    said = script("!bash seq 1 1000", f"{sums(beside)}\n!& {fork}", "!say all done")
    _, row = client.finish(TOOLS, said)
    assert row["message"] == "all done"
    assert len(all_read(strict, 12)) == 13


def test_a_second_process_of_a_program_reads_its_prompt(client, strict):
    """Tools and system prompt are the same bytes; a model's spawn too."""
    for _ in range(2):
        client.finish(TOOLS, "!spawn !say child\n!say done")
    requests = all_read(strict, 5)
    assert len(requests) == 6


def test_in_another_folder_the_tools_are_still_read(client, strict, tmp_path):
    """The folder stands in the system prompt; what precedes it is in the cache."""
    placed = {**TOOLS, "env_info": {"variables": ["working_directory"]}}
    client.finish(placed, "!say one", cwd="/")
    client.finish(placed, "!say two", cwd=str(tmp_path))
    (_, second) = all_read(strict, 1)
    assert second.read > 512


def test_children_of_a_cold_history_write_it_once(fresh, strict):
    """The first writes what they share, the others wait until its answer begins, and read."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TALK, interactive=True)
        for number in range(4):
            client.run(pid, f"!say {number} {LONG}")
    fresh.kill()
    strict.reset()
    fresh.start()
    with fresh.client() as client:
        children = client.call("proc.fork", pid=pid, prompts=[f"!say child {n}" for n in range(12)])["pids"]
        for child in children:
            client.rests(child)
        rows = [client.get(child) for child in children]
    requests = seen(strict)
    assert len(requests) == 12
    history = requests[0].written
    assert history > 9_000
    assert sum(one.written for one in requests) < 1.05 * history
    assert billed(rows)["cache_creation_input_tokens"] < 1.05 * history
    assert sorted(row["cache"]["read"] > 9_000 for row in rows) == [False] + [True] * 11


def test_a_first_that_fails_holds_nobody_up(fresh, strict):
    """Killed before its answer begins, it lets the next one go first."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TALK, interactive=True)
        client.run(pid, f"!say {LONG} {LONG}")
    fresh.kill()
    strict.reset()
    fresh.start()
    with fresh.client() as client:
        (first,) = client.call("proc.fork", pid=pid, prompts=["!sleep 300\n!say late"])["pids"]
        client.until_wchan(first, "api")
        others = client.call("proc.fork", pid=pid, prompts=[f"!say {n}" for n in range(3)])["pids"]
        for other in others:
            client.until_wchan(other, "slot")
        client.signal(first, "KILL")
        for other in others:
            client.rests(other)
        assert [client.get(other)["turns"] for other in others] == [1, 1, 1]


def test_a_first_that_is_slow_holds_nobody_up_for_long(fresh, strict):
    """The others go by themselves after a few seconds."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TALK, interactive=True)
        client.run(pid, f"!say {LONG} {LONG}")
    fresh.restart()
    with fresh.client() as client:
        (first,) = client.call("proc.fork", pid=pid, prompts=["!sleep 300\n!say late"])["pids"]
        client.until_wchan(first, "api")
        (other,) = client.call("proc.fork", pid=pid, prompts=["!say quick"])["pids"]
        client.rests(other)
        assert client.get(first)["wchan"] == "api"


# --- the books --------------------------------------------------------------------------------------


def test_every_column_adds_up_to_the_endpoints_books(client, daemon, strict):
    """IN, OUT and CACHE% over a tree of forks and spawns."""
    fork = use("fork", prompts=[f"!bash echo {n}\\n!say child {n}" for n in range(3)])
    pid, _ = client.finish(TOOLS, script("!bash seq 1 1000", fork, "!spawn !say spawned", "!say done"))
    client.wait(*client.call("proc.fork", pid=pid, prompts=["!say a", "!say b"])["pids"])
    rows = [row for row in client.call("proc.list", all=True)["procs"] if row["pid"] != 1]
    books = strict.books()
    assert books.pop("answers") == len(strict.requests()) == sum(row["turns"] for row in rows)
    assert billed(rows) == books
    command = [sys.executable, "-m", "llmprocctl", "--socket", daemon.socket, "ps", "-a", "-o", "pid,cache"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=daemon.environment())
    shown = dict(line.split() for line in printed.stdout.splitlines()[1:])
    for row in rows:
        one = billed([row])
        whole = sum(one.values()) - one["output_tokens"]
        assert shown[str(row["pid"])] == f"{100 * one['cache_read_input_tokens'] / whole:.0f}"


def test_the_first_request_is_explained_and_so_is_a_hit(client):
    """`inspect` says what was expected of the cache, and why it was not."""
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, f"!say {LONG}")
    first = client.get(pid)["cache"]
    assert (first["reason"], first["expected"]) == ("first_request", 0)
    assert first["read"] + first["written"] > 0
    client.run(pid, "!say more")
    second = client.get(pid)["cache"]
    assert (second["reason"], second["told"]) == ("", "")
    assert second["expected"] == first["read"] + first["written"]
    assert second["read"] >= second["expected"]


def test_the_endpoints_word_is_recorded(client, strict):
    """The default endpoint is asked why a prompt was missed, and its word is kept."""
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, f"!say {LONG}")
    message = client.get(pid)["cache"]["message_id"]
    assert json.loads(strict.bodies()[-1])["diagnostics"] == {"previous_message_id": None}
    client.call("proc.exec", pid=pid, program={**TALK, "prompt": {"system": "Another. " + RULES}})
    client.run(pid, "!say more")
    assert json.loads(strict.bodies()[-1])["diagnostics"] == {"previous_message_id": message}
    assert client.get(pid)["cache"]["told"] == "system_changed"


def test_foreign_endpoints_are_not_asked(client):
    """`diagnostics` goes to the default endpoint only."""
    foreign = Strict()
    try:
        elsewhere = {**TALK, "model": {**TALK["model"], "base_url": foreign.url}}
        elsewhere["parameters"] = {"extra_headers": {"x-api-key": "some"}}
        _, row = client.finish(elsewhere, "!say hi")
        assert row["message"] == "hi"
        (body,) = foreign.bodies()
        assert "diagnostics" not in body
        assert "cache_control" in body
    finally:
        foreign.close()
