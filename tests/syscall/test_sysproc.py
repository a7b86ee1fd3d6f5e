"""The calls about processes: spawn, run, list, signal, wait, send, fork, goto, exec and the small ones."""

import json

import msgspec
import pytest
import trio
from machinekit import refused, running, script, table

from llmprocd.abi.errno import Errno
from llmprocd.abi.types import Access
from llmprocd.kernel.state import Limit

# --- spawn ------------------------------------------------------------------------------------------


async def test_a_spawn_gives_the_process_what_was_asked_for(machine):
    pid = await machine.spawn(
        table(),
        interactive=True,
        name="worker",
        cwd="/tmp",
        env={"A": "1"},
        nice=5,
        access="write",
        limits={"wall": "1m:1h"},
    )
    p = machine.proc(pid)
    assert (p.name, p.cwd, p.env, p.nice, p.access) == ("worker", "/tmp", {"A": "1"}, 5, Access.WRITE)
    assert p.limits == {"wall": Limit(60, 3600)}
    assert (p.ppid, p.birth, p.family, p.uid, p.input_open) == (1, 1, pid, machine.m.uid, True)


async def test_a_prompt_closes_fd_0_and_no_prompt_leaves_it_open(autojump_clock, machine):
    ended = await machine.finish(table(), "!say hi")
    assert ended.status == 0
    assert machine.proc(await machine.spawn(table())).input_open


async def test_an_interactive_process_keeps_fd_0_open_after_its_prompt(autojump_clock, machine):
    pid = await machine.spawn(table(), "!say hi", interactive=True)
    await machine.until(pid, "fd:0")
    assert (await machine.call("fd.read", pid=pid, fd=1)).data == b"hi\n"


async def test_the_programs_own_prompt_is_used_where_none_is_given(autojump_clock, machine):
    program = table(prompt={"user": "!say from the program"})
    pid = await machine.spawn(program)
    (row,) = (await machine.call("proc.wait", pids=[pid])).procs
    assert row.message == "from the program"
    assert (await machine.finish(program, "!say given")).message == "given"


async def test_an_interactive_process_does_not_send_the_programs_prompt_by_itself(autojump_clock, machine):
    pid = await machine.spawn(table(prompt={"user": "!say from the program"}), interactive=True)
    await trio.sleep(10)
    assert machine.engine.requests == []
    assert (await machine.call("proc.run", pid=pid)).message == "from the program"


@pytest.mark.parametrize(
    ("program", "errno", "words"),
    [
        ("no-such-program", Errno.ENOENT, "no-such-program"),
        ("./nothing.toml", Errno.ENOENT, "nothing.toml"),
        ({"model": {"name": "x", "provider": "script"}, "tolls": {}}, Errno.ENOEXEC, "tolls"),
        ({}, Errno.ENOEXEC, "model"),
    ],
)
async def test_a_program_that_cannot_be_loaded_starts_nothing(machine, program, errno, words):
    with refused(errno, words):
        machine.begin("proc.spawn", program=program, interactive=True)
    assert machine.m.kernel.procs == {}


async def test_a_relative_path_is_relative_to_the_cwd(machine, tmp_path):
    (tmp_path / "mine.toml").write_text('[model]\nname = "script"\nprovider = "script"\n')
    pid = await machine.spawn("./mine.toml", cwd=str(tmp_path), interactive=True)
    assert machine.m.kernel.image(machine.proc(pid)).path == str(tmp_path / "mine.toml")


async def test_a_name_belongs_to_one_living_process(autojump_clock, machine):
    pid = await machine.spawn(interactive=True, name="x")
    with refused(Errno.EEXIST, f"process {pid} is called 'x' already"):
        await machine.spawn(interactive=True, name="x")
    await machine.call("proc.signal", pid=pid, signal="KILL")
    assert await machine.spawn(interactive=True, name="x") != pid


async def test_a_long_stdin_becomes_a_descriptor_that_holds_it_alone(machine, tmp_path):
    (tmp_path / "in").write_bytes(b"\x00data\xff" * 30_000)
    pid = await machine.spawn(table(), "!say look", stdin_path=str(tmp_path / "in"))
    with trio.fail_after(30):
        await machine.call("proc.wait", pids=[pid])
    stat = await machine.call("fd.stat", pid=pid, fd=3)
    assert (stat.size, stat.name, stat.complete) == (180_000, "stdin", True)
    assert (await machine.call("fd.read", pid=pid, fd=3, count=6)).data == b"\x00data\xff"
    rows = (await machine.call("proc.history", pid=pid)).messages
    assert "fd:3" in rows[0].content
    assert "data" not in rows[0].content


# --- the same request -------------------------------------------------------------------------------


async def test_the_same_request_gives_the_same_answer(autojump_clock, machine):
    first = await machine.spawn(table(), "!say hi", request_id="r1")
    assert await machine.spawn(table(), "!say hi", request_id="r1") == first
    await machine.call("proc.wait", pids=[first])
    assert await machine.spawn(table(), "!say hi", request_id="r1") == first
    assert await machine.spawn(table(), "!say hi", request_id="r2") != first
    assert await machine.spawn(table(), "!say hi") != await machine.spawn(table(), "!say hi")
    assert machine.types(first).count("spawn") == 1


@pytest.mark.parametrize(
    "other", [{"prompt": "!say ho"}, {"nice": 1}, {"env": {"A": "1"}}, {"interactive": True}]
)
async def test_the_same_id_for_another_request_is_eexist(autojump_clock, machine, other):
    pid = await machine.spawn(table(), "!say hi", request_id="r1")
    with refused(Errno.EEXIST, "request_id", "'r1'"):
        await machine.spawn(table(), **{"prompt": "!say hi", "request_id": "r1", **other})
    assert list(machine.m.kernel.procs) == [pid]


async def test_the_order_of_a_map_does_not_make_another_request(machine):
    """Many languages send a map in another order each time."""
    tables = table()
    first = await machine.spawn(tables, interactive=True, env={"A": "1", "B": "2"}, request_id="r1")
    turned = {name: dict(reversed(list(tables[name].items()))) for name in reversed(list(tables))}
    again = await machine.spawn(turned, interactive=True, env={"B": "2", "A": "1"}, request_id="r1")
    assert again == first


async def test_a_map_with_keys_that_do_not_compare_is_another_request(machine):
    await machine.spawn(interactive=True, request_id="r1")
    with refused(Errno.EEXIST):
        await machine.spawn({"model": {1: 2, b"a": 3}}, interactive=True, request_id="r1")


async def test_a_duplicate_while_the_first_is_not_durable_joins_it(autojump_clock):
    """Both are answered with one pid, and neither before it is on disk."""
    async with running(latency=5) as house:
        answers, times = [], []

        async def client():
            answer = await house.told("proc.spawn", program=table(), interactive=True, request_id="r")
            answers.append(answer["pid"])
            times.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(client)
            await trio.sleep(1)
            nursery.start_soon(client)
        assert answers == [answers[0]] * 2
        assert min(times) >= 5
        assert len(house.m.kernel.procs) == 1


async def test_a_request_that_a_crash_took_back_is_done_anew(autojump_clock):
    """Answer and effect are one commit: after the crash both are there, or neither is."""
    async with running(latency=5) as house:
        await house.spawn(interactive=True, request_id="lost")
        await trio.sleep(1)
        after = house.store.crash()
    async with running(store=after) as house:
        assert house.m.kernel.procs == {}
        kept = await house.told("proc.spawn", program=table(), interactive=True, request_id="lost")
        after = house.store.crash()
    async with running(store=after) as house:
        assert await house.spawn(interactive=True, request_id="lost") == kept["pid"]
        assert list(house.m.kernel.procs) == [kept["pid"]]


async def test_a_fork_is_made_once_a_request_too(autojump_clock, machine):
    pid = await machine.spawn(interactive=True)
    first = await machine.call("proc.fork", pid=pid, prompts=["!say a", "!say b"], request_id=b"\x00\xff")
    again = await machine.call("proc.fork", pid=pid, prompts=["!say a", "!say b"], request_id=b"\x00\xff")
    assert first == again
    assert len(machine.m.kernel.procs) == 3


@pytest.mark.parametrize("at", ["last", "m1"])
async def test_a_fork_at_a_message_is_made_once_a_request_too(autojump_clock, machine, at):
    """Also when it comes again while the message is being fetched for the first."""
    pid = await machine.spawn(table(), interactive=True)
    await machine.call("proc.run", pid=pid, prompt="!say one")
    first, again = [machine.begin("proc.fork", pid=pid, at=at, request_id="r") for _ in range(2)]
    assert (await first).result == (await again).result
    assert len(machine.m.kernel.procs) == 2


async def test_a_repeated_request_is_answered_also_when_the_house_is_full(autojump_clock, machine):
    pid = await machine.spawn(interactive=True, request_id="r")
    machine.m.config = msgspec.structs.replace(machine.m.config, max_procs=1)
    assert await machine.spawn(interactive=True, request_id="r") == pid


async def test_a_refused_request_is_not_remembered(machine):
    with refused(Errno.EINVAL):
        await machine.spawn(table(), " ", request_id="r")
    assert await machine.spawn(interactive=True, request_id="r")


# --- list, get --------------------------------------------------------------------------------------


async def test_a_listing_leaves_out_what_was_collected_unless_asked(autojump_clock, machine):
    ended = await machine.finish(table(), "!say hi")
    lives = await machine.spawn(interactive=True)

    async def listed(**more):
        return [row.pid for row in (await machine.call("proc.list", **more)).procs]

    assert await listed() == [lives]
    assert await listed(all=True) == [1, ended.pid, lives]
    assert await listed(pids=[ended.pid]) == [ended.pid]
    assert await listed(pids=[99, lives, 1]) == [1, lives]
    assert await listed(pids=[]) == []


async def test_a_process_is_found_by_its_name(machine):
    pid = await machine.spawn(interactive=True, name="wörker")
    for name in ("wörker", "%wörker", str(pid), f"%{pid}"):
        (row,) = (await machine.call("proc.get", pid=name)).procs
        assert row.pid == pid
        assert [row.pid for row in (await machine.call("proc.list", pids=[name])).procs] == [pid]


@pytest.mark.parametrize("name", ["nobody", "%nobody", "", "%", "²", "9" * 5000, "٣", "-1", "1.5", "3 "])
async def test_a_name_that_nobody_has_is_esrch(machine, name):
    """Whatever a client takes for a pid or a name: it is refused in words, and the daemon lives."""
    await machine.spawn(interactive=True)
    with refused(Errno.ESRCH, "no such process"):
        await machine.call("proc.get", pid=name)
    assert (await machine.call("proc.list", pids=[name])).procs == []


async def test_the_refusal_repeats_the_name(machine):
    with refused(Errno.ESRCH, "no such process: nobody"):
        await machine.call("proc.get", pid="nobody")


async def test_get_tells_of_the_last_run(autojump_clock, machine):
    pid = await machine.spawn(table("calculator"), interactive=True)
    (row,) = (await machine.call("proc.get", pid=pid)).procs
    assert row.run is None
    await machine.call("proc.run", pid=pid, prompt=script('!calculator {"expression":"1"}', "!say hi"))
    (row,) = (await machine.call("proc.get", pid=pid)).procs
    assert (row.run.message, row.run.api_calls, row.run.stop_reason) == ("hi", 2, "end_turn")
    assert row.usage == row.run.usage
    assert (row.head, row.turns, row.context_tokens > 0) == ("m4", 2, True)


async def test_get_without_a_pid_is_a_listing(machine):
    pid = await machine.spawn(interactive=True)
    assert (await machine.call("proc.get")).procs == (await machine.call("proc.list")).procs
    assert [row.pid for row in (await machine.call("proc.get", all=True)).procs] == [1, pid]


async def test_pid_1_is_the_daemon(machine):
    pid = await machine.spawn(interactive=True)
    (init,) = (await machine.call("proc.list", pids=[1])).procs
    assert (init.pid, init.ppid, init.program, init.stat, init.children) == (1, 0, "init", "S", [pid])


# --- signals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sig", [15, "15", "TERM", "SIGTERM", "term", "sigterm"])
async def test_a_signal_is_a_name_or_a_number(autojump_clock, machine, sig):
    pid = await machine.spawn(interactive=True)
    await machine.call("proc.signal", pid=pid, signal=sig)
    assert machine.proc(pid).status == 143


async def test_signal_0_tests_that_a_process_exists(autojump_clock, machine):
    ended = await machine.finish(table(), "!say hi")
    for sig in (0, "0", "EXIT"):
        await machine.call("proc.signal", pid=ended.pid, signal=sig)
    with refused(Errno.ESRCH, "has ended with status 0"):
        await machine.call("proc.signal", pid=ended.pid, signal="TERM")


@pytest.mark.parametrize("pid", [1, -1])
async def test_the_daemon_and_everybody_cannot_be_signalled(machine, pid):
    with refused(Errno.EPERM, "cannot be signalled"):
        await machine.call("proc.signal", pid=pid, signal=0)


async def test_a_tree_is_signalled_whole(autojump_clock, machine):
    """Children that were forked from children too, and those that an ended parent left behind."""
    top = await machine.spawn(interactive=True)
    (child,) = (await machine.call("proc.fork", pid=top)).pids
    (grandchild,) = (await machine.call("proc.fork", pid=child)).pids
    other = await machine.spawn(interactive=True)
    await machine.call("proc.signal", pid=child, signal="KILL")
    assert machine.proc(grandchild).ppid == 1
    await machine.call("proc.signal", pid=top, signal="STOP", tree=True)
    assert [machine.stat(pid) for pid in (top, child, grandchild, other)] == ["T", "Z", "T", "S"]
    await machine.call("proc.signal", pid=top, signal="KILL")
    await machine.call("proc.signal", pid=top, signal="TERM", tree=True)
    assert machine.proc(grandchild).status == 143
    assert machine.stat(other) == "S"
    with refused(Errno.ESRCH):
        await machine.call("proc.signal", pid=top, signal="TERM", tree=True)


async def test_int_keeps_what_was_streamed(autojump_clock, machine):
    pid = await machine.spawn(interactive=True)
    await machine.call("proc.send", pid=pid, text=script("!delay 1", "!say one two three four"))
    await trio.sleep(2.5)
    await machine.call("proc.signal", pid=pid, signal="INT")
    await machine.until(pid, "fd:0")
    assert (machine.stat(pid), trio.current_time()) == ("S", pytest.approx(2.5, abs=0.1))
    rows = (await machine.call("proc.history", pid=pid)).messages
    assert [row.role for row in rows] == ["user", "assistant"]
    assert json.loads(rows[1].content)[0]["text"].startswith("one two")
    await trio.sleep(100)
    assert len(machine.engine.requests) == 1
    assert (await machine.call("proc.run", pid=pid, prompt="!say again")).message == "again"


async def test_a_signal_needs_messages_that_are_not_in_memory(autojump_clock, machine, monkeypatch):
    """After a restart the head is on disk only: it is fetched first, and the signal acts all the same."""
    pid = await machine.spawn(table("fork"), "!fork !sleep 99\\n!say hi")
    await machine.until(pid, "wait")
    monkeypatch.setattr(machine.store, "node_nowait", _Forgetful(machine.store, machine.proc(pid).head))
    answer = machine.begin("proc.signal", pid=pid, signal="INT")
    assert not hasattr(answer, "result"), "it had to wait"
    await answer
    assert (await machine.results(pid))[-1]["content"].startswith("Interrupted")


class _Forgetful:
    """A cache that has not seen one node before it was asked for."""

    def __init__(self, store, number):
        self.read = store.node_nowait
        self.unseen = number

    def __call__(self, number):
        if number == self.unseen:
            self.unseen = None
            return None
        return self.read(number)


async def test_hup_reads_the_program_file_again(autojump_clock, machine, tmp_path):
    path = tmp_path / "p.toml"
    text = '[model]\nname = "script"\nprovider = "script"\n[prompt]\nsystem = "be %s"\n'
    path.write_text(text % "old")
    pid = await machine.spawn(str(path), interactive=True)
    await machine.call("proc.run", pid=pid, prompt="!say one")
    path.write_text(text % "new")
    await machine.call("proc.signal", pid=pid, signal="HUP")
    await machine.call("proc.run", pid=pid, prompt="!say two")
    first, second = [json.loads(request.body) for request in machine.engine.requests]
    assert ("old" in json.dumps(first["system"]), "new" in json.dumps(second["system"])) == (True, True)
    assert len(second["messages"]) == 3


async def test_hup_refuses_a_bad_file_and_the_old_program_stays(autojump_clock, machine, tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('[model]\nname = "script"\nprovider = "script"\n')
    pid = await machine.spawn(str(path), interactive=True)
    before = machine.proc(pid)
    path.write_text("[modle]\n")
    with refused(Errno.ENOEXEC, "modle"):
        await machine.call("proc.signal", pid=pid, signal="HUP")
    assert machine.proc(pid) == before
    other = await machine.spawn(interactive=True)
    await machine.call("proc.signal", pid=other, signal="HUP")


# --- wait -------------------------------------------------------------------------------------------


async def test_all_who_wait_get_the_same_answer(autojump_clock, machine):
    pid = await machine.spawn(table(), script("!sleep 5", "!say hi"))
    rows = []

    async def waiter(collect):
        rows.append((await machine.call("proc.wait", pids=[pid], collect=collect)).procs)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(waiter, number % 2 == 0)
    rows.append((await machine.call("proc.wait", pids=[pid])).procs)
    assert rows == [rows[0]] * 11
    assert (rows[0][0].status, rows[0][0].message) == (0, "hi")


async def test_waiting_collects_unless_it_shall_not(autojump_clock, machine):
    pid = await machine.spawn(table(), "!say hi")
    await machine.call("proc.wait", pids=[pid], collect=False)
    assert not machine.proc(pid).collected
    await machine.call("proc.wait", pids=[pid])
    assert machine.proc(pid).collected


async def test_a_timeout_collects_none(autojump_clock, machine):
    done = await machine.spawn(table(), "!say hi")
    busy = await machine.spawn(interactive=True)
    await trio.sleep(1)
    with refused(Errno.ETIMEDOUT, "500 ms"):
        await machine.call("proc.wait", pids=[done, busy], timeout_ms=500)
    assert not machine.proc(done).collected
    with refused(Errno.ETIMEDOUT):
        await machine.call("proc.wait", pids=[busy], timeout_ms=0)
    assert (await machine.call("proc.wait", pids=[done], timeout_ms=0)).procs[0].status == 0


async def test_any_is_answered_by_the_first(autojump_clock, machine):
    pids = [await machine.spawn(table(), script(f"!sleep {s}", "!say hi")) for s in (50, 5, 20)]
    (row,) = (await machine.call("proc.wait", pids=pids, any=True)).procs
    assert row.pid == pids[1]
    assert trio.current_time() < 10
    assert [machine.proc(pid).collected for pid in pids] == [False, True, False]
    rows = (await machine.call("proc.wait", pids=pids)).procs
    assert [row.pid for row in rows] == pids
    assert trio.current_time() == pytest.approx(50, abs=1)


async def test_a_wait_names_the_status_and_the_last_words(autojump_clock, machine):
    pid = await machine.spawn(table("exit"), "!exit 7 good bye")
    (row,) = (await machine.call("proc.wait", pids=[pid])).procs
    assert (row.status, row.message) == (7, "good bye")
    assert row.usage.output_tokens > 0
    assert row.cost_usd is None


# --- send -------------------------------------------------------------------------------------------


async def test_messages_are_numbered_and_taken_in_order(autojump_clock, machine):
    pid = await machine.spawn(interactive=True)
    sent = [(await machine.call("proc.send", pid=pid, text=f"!say {n}")).seq for n in range(5)]
    assert sent == [1, 2, 3, 4, 5]
    await machine.call("proc.send", pid=pid, close=True)
    await machine.call("proc.wait", pids=[pid])
    assert (await machine.call("fd.read", pid=pid, fd=1)).data == b"0\n1\n2\n3\n4\n"


async def test_a_closed_fd_0_is_epipe(autojump_clock, machine):
    pid = await machine.spawn(table(), script("!sleep 9", "!say hi"))
    with refused(Errno.EPIPE, f"fd 0 of process {pid} is closed"):
        await machine.call("proc.send", pid=pid, text="more")
    with refused(Errno.EPIPE):
        await machine.call("proc.run", pid=pid, prompt="more")


async def test_the_last_message_can_close_fd_0(autojump_clock, machine):
    pid = await machine.spawn(interactive=True)
    await machine.call("proc.send", pid=pid, text="!say bye", close=True)
    (row,) = (await machine.call("proc.wait", pids=[pid])).procs
    assert (row.status, row.message) == (0, "bye")


async def test_an_acknowledged_message_survives_a_crash(autojump_clock):
    async with running(latency=1) as house:
        pid = await house.spawn(interactive=True)
        await house.told("proc.send", pid=pid, text=script("!sleep 50", "!say hi"))
        after = house.store.crash()
    async with running(store=after) as house:
        await house.until(pid, "fd:0")
        assert (await house.call("fd.read", pid=pid, fd=1)).data == b"hi\n"


# --- fork, goto, exec -------------------------------------------------------------------------------


async def two_turns(machine):
    pid = await machine.spawn(table("calculator"), interactive=True)
    await machine.call("proc.run", pid=pid, prompt="!say one")
    await machine.call("proc.run", pid=pid, prompt=script('!calculator {"expression":"1"}', "!say two"))
    return pid  # m1 user, m2 one, m3 user, m4 asks, m5 results, m6 two


async def test_a_fork_shares_history_and_goes_its_own_way(autojump_clock, machine):
    pid = await two_turns(machine)
    made = (await machine.call("proc.fork", pid=pid, prompts=["!say left", "!say right"])).pids
    for child in made:
        await machine.until(child, "fd:0")
        assert machine.proc(child).ppid == pid
    texts = [(await machine.call("fd.read", pid=child, fd=1)).data for child in made]
    assert texts == [b"left\n", b"right\n"]
    bodies = [json.loads(request.body)["messages"] for request in machine.engine.requests[-2:]]
    assert bodies[0][:6] == bodies[1][:6]
    assert len(bodies[0]) == 7
    assert machine.proc(pid).head == 6


async def test_a_fork_at_a_message_stands_there(autojump_clock, machine):
    pid = await two_turns(machine)
    (child,) = (await machine.call("proc.fork", pid=pid, at="m2")).pids
    assert machine.proc(child).head == 2
    await trio.sleep(10)
    assert machine.wchan(child) == "fd:0"
    with refused(Errno.EBUSY, "m4", "asks for tools"):
        await machine.call("proc.fork", pid=pid, at="m4")
    with refused(Errno.ENOENT, f"process {pid} has no message m99"):
        await machine.call("proc.fork", pid=pid, at="m99")


async def test_a_fork_while_tools_run_is_at_the_last_settled_message(autojump_clock, machine):
    pid = await machine.spawn(table("fork"), interactive=True)
    await machine.call("proc.run", pid=pid, prompt="!say one")
    await machine.call("proc.send", pid=pid, text="!fork !sleep 99\\n!say hi")
    await machine.until(pid, "wait")
    with refused(Errno.EBUSY, "is running tools"):
        await machine.call("proc.fork", pid=pid)
    (child,) = (await machine.call("proc.fork", pid=pid, at="last")).pids
    assert machine.proc(child).head == 3


async def test_an_ended_process_is_resumed_by_a_fork(autojump_clock, machine):
    ended = await machine.finish(table(), "!say hi")
    (child,) = (await machine.call("proc.fork", pid=ended.pid, prompts=["!say again"])).pids
    (row,) = (await machine.call("proc.wait", pids=[child])).procs
    assert row.message == "again"
    assert (machine.proc(child).ppid, machine.proc(child).birth) == (1, ended.pid)


async def test_goto_moves_back_and_forth_and_forgets_nothing(autojump_clock, machine):
    pid = await two_turns(machine)
    moved = await machine.call("proc.goto", pid=pid, to="m2")
    assert (moved.old_head, moved.head) == ("m6", "m2")
    await trio.sleep(10)
    asked = len(machine.engine.requests)
    assert machine.wchan(pid) == "fd:0"
    moved = await machine.call("proc.goto", pid=pid, to="m6")
    assert moved.head == "m6"
    await machine.call("proc.goto", pid=pid, to="m2", text="!say other")
    await machine.until(pid, "fd:0")
    assert len(machine.engine.requests) == asked + 1
    everything = (await machine.call("proc.history", pid=pid, all=True)).messages
    assert [row.id for row in everything] == [f"m{n}" for n in range(1, 9)]
    path = (await machine.call("proc.history", pid=pid)).messages
    assert [row.id for row in path] == ["m1", "m2", "m7", "m8"]


async def test_goto_drops_the_answer_that_is_on_its_way(autojump_clock, machine):
    """Also when it moves the head to where it was."""
    pid = await machine.spawn(interactive=True)
    await machine.call("proc.run", pid=pid, prompt="!say one")
    await machine.call("proc.send", pid=pid, text=script("!sleep 10", "!say late"))
    await trio.sleep(1)
    await machine.call("proc.goto", pid=pid, to="m3")
    await trio.sleep(100)
    assert machine.proc(pid).head == 3
    rows = (await machine.call("proc.history", pid=pid, all=True)).messages
    assert [row.id for row in rows] == ["m1", "m2", "m3"]
    assert (await machine.call("proc.run", pid=pid)).message == "late"


async def test_goto_elsewhere_is_refused(autojump_clock, machine):
    pid = await two_turns(machine)
    other = await machine.spawn(interactive=True)
    await machine.call("proc.run", pid=other, prompt="!say hi")
    with refused(Errno.EINVAL, "m4", "asks for tools"):
        await machine.call("proc.goto", pid=pid, to="m4")
    with refused(Errno.ENOENT, f"process {pid} has no message m7"):
        await machine.call("proc.goto", pid=pid, to="m7")
    with refused(Errno.EINVAL, "no user message"):
        await machine.call("proc.goto", pid=pid, to="m2", run=True)
    await machine.call("proc.signal", pid=pid, signal="KILL")
    with refused(Errno.ESRCH, "has ended"):
        await machine.call("proc.goto", pid=pid, to="m2")


async def test_goto_and_send_on_a_stopped_process_take_effect_at_cont(autojump_clock, machine):
    pid = await two_turns(machine)
    await machine.call("proc.signal", pid=pid, signal="STOP")
    await machine.call("proc.goto", pid=pid, to="m2", text="!say other")
    await machine.call("proc.send", pid=pid, text="!say more")
    asked = len(machine.engine.requests)
    await trio.sleep(100)
    assert (machine.stat(pid), len(machine.engine.requests)) == ("T", asked)
    await machine.call("proc.signal", pid=pid, signal="CONT")
    await machine.until(pid, "fd:0")
    assert (await machine.call("fd.read", pid=pid, fd=1)).data.endswith(b"other\nmore\n")


async def test_exec_replaces_the_program_and_keeps_the_rest(autojump_clock, machine):
    pid = await two_turns(machine)
    await machine.call("proc.exec", pid=pid, program=table(prompt={"system": "be brief"}))
    await machine.call("proc.run", pid=pid, prompt="!say three")
    body = json.loads(machine.engine.requests[-1].body)
    assert "be brief" in json.dumps(body["system"])
    assert len(body["messages"]) == 7
    assert machine.proc(pid).pid == pid


@pytest.mark.parametrize("signalled", [True, False], ids=["HUP", "exec"])
async def test_a_tool_cannot_raise_the_ceiling_of_children_with_another_program(
    autojump_clock, machine, tmp_path, signalled
):
    """What its process may hand on stays: child_access only goes down when no person asks."""
    program = tmp_path / "p.toml"
    text = '[model]\nname = "script"\nprovider = "script"\n[tools]\nchild_access = "{}"\n'
    program.write_text(text.format("read"))
    pid = await machine.spawn(str(program), interactive=True)
    program.write_text(text.format("admin"))
    tool = machine.caller(pid)
    if signalled:
        await machine.call("proc.signal", by=tool, pid=pid, signal="HUP")
    else:
        await machine.call("proc.exec", by=tool, pid=pid, program=str(program))
    assert machine.m.kernel.image(machine.proc(pid)).child_access is Access.READ
    await machine.call("proc.signal", pid=pid, signal="HUP")
    assert machine.m.kernel.image(machine.proc(pid)).child_access is Access.ADMIN


async def test_exec_is_refused_while_tools_run(autojump_clock, machine):
    pid = await machine.spawn(table("fork"), "!fork !sleep 99\\n!say hi")
    await machine.until(pid, "wait")
    with refused(Errno.EBUSY, "is running tools"):
        await machine.call("proc.exec", pid=pid, program=table())


# --- the small ones ---------------------------------------------------------------------------------


async def test_who_needs_a_prompt_is_refused_without_one(machine):
    """Before there is a process; the program's own will do. Who does not has fd 0 open then."""
    with refused(Errno.EINVAL, "inline has no prompt of its own: give one"):
        await machine.call("proc.spawn", program=table(), needs_prompt=True)
    assert machine.m.kernel.procs == {}
    own = table(prompt={"user": "!say mine"})
    (pid,) = [(await machine.call("proc.spawn", program=own, needs_prompt=True)).pid]
    assert (await machine.call("proc.wait", pids=[pid])).procs[0].message == "mine"
    assert machine.proc(await machine.spawn()).input_open


async def test_limits_are_shown_with_what_was_used(autojump_clock, machine):
    pid = await machine.spawn(interactive=True, limits={"wall": "10m:1h"})
    await trio.sleep(90)
    rows = {row.resource: row for row in (await machine.call("proc.limits", pid=pid)).limits}
    assert (rows["wall"].soft, rows["wall"].hard, rows["wall"].used) == (600, 3600, 90)
    with refused(Errno.EINVAL, "'sheep'"):
        await machine.call("proc.limits", pid=pid, set={"sheep": 1})


async def test_what_is_counted_is_told_in_whole_numbers(machine):
    """And time is not."""
    pid = await machine.spawn(interactive=True)
    changes = {"turns": "5:10", "wall": "2.5", "fd_bytes": "1K"}
    rows = (await machine.told("proc.limits", pid=pid, set=changes))["limits"]
    told = {row["resource"]: (row["soft"], row["hard"]) for row in rows}
    assert repr([told[name] for name in changes]) == "[(5, 10), (None, 2.5), (None, 1024)]"


async def test_a_removed_process_is_unknown(autojump_clock, machine):
    ended = await machine.finish(table(), "!say hi")
    lives = await machine.spawn(interactive=True)
    with refused(Errno.EBUSY, f"process {lives} has not ended; kill it first"):
        await machine.call("proc.remove", pids=[ended.pid, lives])
    assert ended.pid in machine.m.kernel.procs, "all of them, or none"
    await machine.call("proc.remove", pids=[ended.pid, ended.pid])
    with refused(Errno.ESRCH):
        await machine.call("proc.get", pid=ended.pid)


async def test_who_waits_finds_the_status_also_of_one_that_is_removed_at_once(autojump_clock, machine):
    pid = await machine.spawn(interactive=True)

    async def remover():
        await trio.sleep(5)
        await machine.call("proc.signal", pid=pid, signal="KILL")
        await machine.call("proc.remove", pids=[pid])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(remover)
        (row,) = (await machine.call("proc.wait", pids=[pid])).procs
    assert (row.pid, row.status) == (pid, 137)


async def test_a_process_is_renamed_and_reniced(machine):
    pid = await machine.spawn(interactive=True)
    await machine.call("proc.rename", pid=pid, name="new")
    await machine.call("proc.renice", pid=pid, nice=-3)
    (row,) = (await machine.call("proc.get", pid="%new")).procs
    assert (row.name, row.nice) == ("new", -3)
    await machine.call("proc.rename", pid=pid, name="")
    with refused(Errno.ESRCH):
        await machine.call("proc.get", pid="%new")
