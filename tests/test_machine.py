"""The machine: nothing leaves before it is durable, retries, wall limits, run waiters, and what `ps` says."""

import itertools
import json

import pytest
import trio
from machinekit import House, refused, running, script, table, use

from llmprocd.abi.errno import Errno
from llmprocd.abi.types import Access
from llmprocd.config import Config
from llmprocd.model.script import Engine
from llmprocd.tools import output, toolbox
from llmprocd.tools.output import Output, Spec

ANNOUNCED = {"turn_start", "api_request", "tool_start", "text", "state"}
"""Events of what no crash can take back: they are told at once and stored with the next commit."""


class WatchedEngine(Engine):
    """An endpoint that calls somebody whenever a request arrives."""

    def __init__(self, **more):
        super().__init__(seed=b"house", **more)
        self.arrived = []
        self.look = list

    def answer(self, method, target, headers, body, now):
        self.arrived.append((now, self.look()))
        return super().answer(method, target, headers, body, now)


@pytest.fixture
def probe(monkeypatch):
    """A tool with an effect, without a process or a thread; what it saw at each of its starts."""
    seen = []
    looks = []

    async def run(_ctx, *, seconds=0):
        seen.extend(look() for look in looks)
        await trio.sleep(seconds)
        return Output(text=f"probed {len(seen)}")

    schema = output.schema((), seconds={"type": "number"})
    monkeypatch.setitem(toolbox.SPECS, "probe", Spec("probe", Access.READ, "Probe.", schema, run, pure=False))
    return seen, looks


# --- nothing leaves before it is durable ------------------------------------------------------------


async def test_an_answer_waits_for_the_disk(autojump_clock):
    async with running(latency=1) as house:
        answer = house.begin("proc.spawn", program=table(), prompt="!say hi")
        assert answer.ticket == house.m.ticket > house.store.durable
        assert await house.told("proc.list")
        assert trio.current_time() >= 1, "a listing told of a process that a crash would have taken back"


async def test_a_refusal_waits_for_what_it_came_of(autojump_clock):
    """The process has ended in memory; a crash could still bring it back."""
    async with running(latency=1) as house:
        pid = await house.spawn(interactive=True)
        await house.told("proc.list")
        await house.call("proc.signal", pid=pid, signal="KILL")
        with refused(Errno.ESRCH, "has ended") as told:
            house.begin("proc.send", pid=pid, text="hello")
        assert told.error.ticket > house.store.durable


async def test_what_is_durable_already_is_told_at_once(autojump_clock):
    async with running(latency=1) as house:
        await house.spawn(interactive=True)
        await trio.sleep(5)
        answer = house.begin("proc.list")
        assert answer.ticket <= house.store.durable


async def test_no_request_leaves_before_its_message_is_durable(autojump_clock):
    engine = WatchedEngine()
    async with running(latency=1, engine=engine) as house:
        engine.look = lambda: house.store.durable == house.m.ticket
        ended = await house.finish(table("calculator"), script('!calculator {"expression":"1"}', "!say hi"))
        assert ended.status == 0
    assert [whole for _, whole in engine.arrived] == [True, True]
    assert engine.arrived[0][0] >= 1


async def test_no_tool_starts_before_its_start_is_durable(autojump_clock, probe):
    """What began and did not finish must be known after a crash, so that it is never run again."""
    seen, looks = probe
    async with running(latency=1) as house:
        pid = await house.spawn(table("probe"), script("!probe", "!& !probe", "!say {{result}}"))
        looks.append(lambda: (house.store._safe.procs[pid].begun, house.store._safe.procs[pid].head))
        ended = (await house.call("proc.wait", pids=[pid])).procs[0]
        assert ended.message == "probed 2"
    (begun, head), again = seen
    assert again == (begun, head)
    assert len(begun) == 2, "both calls were written down before either started"
    assert head == 2


async def test_no_event_is_seen_before_it_is_durable(autojump_clock, probe):
    """All but what was announced is on disk when a reader first sees it, and the order never breaks."""
    async with running(latency=0.3) as house:
        seen, after = [], 0
        with trio.move_on_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(house.finish, table("probe"), script('!probe {"seconds":1}', "!say hi"))
                while "exit" not in [event["type"] for event in seen]:
                    page = await house.call("events.read", after_seq=after, wait_ms=60_000)
                    safe = {event.seq for event in house.store._safe.events}
                    early = [e for e in page.events if e["type"] not in ANNOUNCED and e["seq"] not in safe]
                    assert early == []
                    seen += page.events
                    after = page.next_seq
    assert [event["seq"] for event in seen] == sorted({event["seq"] for event in seen})
    types = [event["type"] for event in seen if event["type"] not in {"text", "state"}]
    assert types == [
        "spawn", "input", "turn_start", "api_request", "api_response", "tool_start", "tool_end",
        "turn_start", "api_request", "api_response", "turn_end", "exit",
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [number * 0.35 for number in range(1, 24)])
async def test_whatever_was_answered_is_there_after_a_power_cut(autojump_clock, probe, cut):
    """Cut at many points: what a client was told of is there, and no tool with effects ran twice."""
    told = []
    engine = Engine(seed=b"house")

    async def client(house):
        for number in range(4):
            answer = await house.told(
                "proc.spawn",
                program=table("probe"),
                prompt=script('!probe {"seconds":0.2}', f"!say {number}"),
            )
            told.append((answer["pid"], None))
            row = await house.told("proc.wait", pids=[answer["pid"]])
            told.append((answer["pid"], row["procs"][0]["status"]))

    async with running(latency=0.3, engine=engine) as house, trio.open_nursery() as nursery:
        nursery.start_soon(client, house)
        await trio.sleep(cut)
        after = house.store.crash()
        nursery.cancel_scope.cancel()
    async with running(store=after, engine=engine) as house:
        for pid, status in told:
            assert pid in house.m.kernel.procs, "an acknowledged process is gone"
            if status is not None:
                assert house.proc(pid).status == status, "an acknowledged end is gone"
        living = [pid for pid, p in house.m.kernel.procs.items() if p.live]
        if living:
            await house.call("proc.wait", pids=living)
        for pid in house.m.kernel.procs:
            assert house.proc(pid).status == 0
            (result,) = await house.results(pid)
            assert result["content"].startswith(("probed", "Interrupted: the daemon was restarted"))
        seen, _ = probe
        assert len(seen) <= len(house.m.kernel.procs)


async def test_event_numbers_go_on_after_a_restart(autojump_clock):
    async with running() as house:
        await house.finish(table(), "!say hi")
        await trio.sleep(1)
        last = house.m.console.visible
        store = house.store
    async with running(store=store.crash()) as house:
        assert house.m.console.visible >= last
        page = await house.call("events.read", after_seq=0)
        assert [event["type"] for event in page.events][-1] == "exit"
        assert page.next_seq >= last


# --- retries ----------------------------------------------------------------------------------------


def attempts(house: House, pid):
    events, _ = house.m.console.read(0, 10_000, {pid}, {"api_request"})
    return [event.more["attempt"] for event in events]


def waits(engine):
    times = [request.at for request in engine.requests]
    return [after - before for before, after in itertools.pairwise(times)]


async def test_a_failure_of_the_server_is_tried_again_with_growing_pauses(autojump_clock, machine):
    ended = await machine.finish(table(), script("!fail 500 times=5", "!say hi"))
    assert (ended.status, ended.message) == (0, "hi")
    assert attempts(machine, ended.pid) == [1, 2, 3, 4, 5, 6]
    for attempt, pause in enumerate(waits(machine.engine), 1):
        assert 0.25 * 2**attempt <= pause <= 0.5 * 2**attempt, "the pause doubles, with jitter below it"
    bodies = {request.body for request in machine.engine.requests}
    assert len(bodies) == 1, "each attempt sends the same bytes"


async def test_while_it_waits_for_the_next_attempt_a_process_is_held(autojump_clock, machine):
    pid = await machine.spawn(table(), script("!fail 500 times=3", "!say hi"))
    await machine.until(pid, "backoff")
    assert machine.stat(pid) == "D"
    (row,) = (await machine.call("proc.list")).procs
    assert (row.stat, row.wchan) == ("D", "backoff")
    assert machine.m.sched.table()[0].running == 0, "it kept its slot while it waited"


async def test_a_named_time_is_waited_for_by_the_whole_endpoint(autojump_clock, machine):
    """429 holds everybody: another process's first call waits too, and nobody calls before its time."""
    first = await machine.spawn(table(), script("!fail 429 retry_after=12 times=1", "!say one"))
    await machine.until(first, "retry-after 12s")
    assert machine.stat(first) == "D"
    second = await machine.spawn(table(), "!say two")
    await trio.sleep(5)
    assert (machine.stat(second), machine.wchan(second)[:11]) == ("D", "retry-after")
    (row,) = machine.m.sched.table()
    assert 6 < row.held_s <= 7
    await machine.call("proc.wait", pids=[first, second])
    times = [request.at for request in machine.engine.requests]
    assert len(times) == 3
    assert min(times[1:]) >= times[0] + 12


async def test_a_failure_of_one_call_does_not_hold_the_endpoint(autojump_clock, machine):
    first = await machine.spawn(table(), script("!fail 500 times=6", "!say one"))
    await machine.until(first, "backoff")
    began = trio.current_time()
    ended = await machine.finish(table(), "!say two")
    assert ended.message == "two"
    assert trio.current_time() - began < 0.1


async def test_retries_end_after_eight(autojump_clock, machine):
    ended = await machine.finish(table(), "!fail 500")
    assert ended.status == 1
    assert attempts(machine, ended.pid) == list(range(1, 10)), "the call and eight retries"
    assert "500" in machine.proc(ended.pid).reason
    stderr = await machine.call("fd.read", pid=ended.pid, fd=2)
    assert b"500" in stderr.data


async def test_retries_end_after_the_configured_time(autojump_clock):
    async with running(config=Config(retry_s=10, retries=1000)) as house:
        ended = await house.finish(table(), "!fail 500")
        assert ended.status == 1
        times = [request.at for request in house.engine.requests]
        assert 10 < times[-1] - times[0] < 40, "the attempt under way when the time ran out was the last"


async def test_five_minutes_of_named_times_are_enough(autojump_clock, machine):
    ended = await machine.finish(table(), "!fail 429 retry_after=90")
    assert ended.status == 1
    assert len(machine.engine.requests) == 5


async def test_time_in_the_queue_is_not_time_of_retries(autojump_clock):
    """Whoever waited an hour for a slot has as many retries as anybody."""
    async with running(config=Config(slots=1)) as house:
        await house.spawn(table(), script("!sleep 3600", "!say long"))
        await trio.sleep(1)
        ended = await house.finish(table(), script("!fail 500 times=3", "!say hi"))
        assert (ended.status, ended.message) == (0, "hi")


async def test_no_retries_are_no_retries(autojump_clock):
    async with running(config=Config(retries=0)) as house:
        ended = await house.finish(table(), script("!fail 500 times=1", "!say hi"))
        assert ended.status == 1
        assert len(house.engine.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413])
async def test_what_can_never_succeed_is_asked_once(autojump_clock, machine, status):
    ended = await machine.finish(table(), f"!fail {status}")
    assert ended.status == 1
    assert attempts(machine, ended.pid) == [1]
    assert str(status) in machine.proc(ended.pid).reason


@pytest.mark.parametrize("fault", ["!drop", "!truncate", "!error", "!fail 529", "!fail 408"])
async def test_every_passing_failure_is_tried_again(autojump_clock, machine, fault):
    ended = await machine.finish(table(), script(f"{fault} times=2", "!say whole"))
    assert (ended.status, ended.message) == (0, "whole")
    assert attempts(machine, ended.pid) == [1, 2, 3]


async def test_a_signal_ends_the_waiting_for_the_next_attempt(autojump_clock, machine):
    pid = await machine.spawn(table(), "!fail 500")
    await machine.until(pid, "backoff")
    await machine.call("proc.signal", pid=pid, signal="TERM")
    ended = (await machine.call("proc.wait", pids=[pid])).procs[0]
    assert ended.status == 143
    asked = len(machine.engine.requests)
    await trio.sleep(1000)
    assert len(machine.engine.requests) == asked


async def test_stop_holds_the_next_attempt_and_cont_lets_it_go(autojump_clock, machine):
    pid = await machine.spawn(table(), script("!fail 500 times=1", "!say hi"))
    await machine.until(pid, "backoff")
    await machine.call("proc.signal", pid=pid, signal="STOP")
    await trio.sleep(100)
    assert (machine.stat(pid), len(machine.engine.requests)) == ("T", 1)
    await machine.call("proc.signal", pid=pid, signal="CONT")
    ended = (await machine.call("proc.wait", pids=[pid])).procs[0]
    assert ended.message == "hi"


async def test_more_callers_than_slots_wait_for_one(autojump_clock):
    async with running(config=Config(slots=2)) as house:
        pids = [await house.spawn(table(), script("!sleep 10", "!say hi")) for _ in range(5)]
        await trio.sleep(1)
        assert sorted(house.wchan(pid) for pid in pids) == ["api", "api", "slot", "slot", "slot"]
        assert sorted(house.stat(pid) for pid in pids) == ["D", "D", "D", "R", "R"]
        await house.call("proc.wait", pids=pids)
        assert 30 <= trio.current_time() < 31


# --- wall limits ------------------------------------------------------------------------------------


def limit_events(house, pid):
    events, _ = house.m.console.read(0, 10_000, {pid}, {"limit"})
    return [(event.at - house.proc(pid).began, event.more["which"]) for event in events]


async def test_a_hard_wall_limit_ends_a_process_at_once(autojump_clock, machine):
    pid = await machine.spawn(table(), script("!sleep 1000", "!say late"), limits={"wall": "5s"})
    ended = (await machine.call("proc.wait", pids=[pid])).procs[0]
    assert ended.status == 124
    assert trio.current_time() == pytest.approx(5, abs=0.1)
    assert machine.proc(pid).reason == "wall-clock limit of 5 s"
    await trio.sleep(1)
    assert limit_events(machine, pid) == [(pytest.approx(5, abs=0.1), "hard")]


async def test_a_soft_wall_limit_asks_for_what_there_is(autojump_clock):
    """One last turn with the same tools, in which calls are refused; then 152."""
    engine = Engine("\n".join(["!sleep 2", '!calculator {"expression":"1"}'] * 5), seed=b"house")
    async with running(engine=engine) as house:
        pid = await house.spawn(table("calculator"), "work", limits={"wall": "3:60"})
        ended = (await house.call("proc.wait", pids=[pid])).procs[0]
        assert ended.status == 152
        first, *_, last = [json.loads(request.body) for request in engine.requests]
        assert "This is your last turn" in json.dumps(last["messages"][-1])
        assert last["tools"] == first["tools"]
        assert (await house.results(pid))[-1]["is_error"]
        assert trio.current_time() < 15


async def test_a_soft_limit_rings_once(autojump_clock, machine):
    """Also where no hard one follows: each later commit of the process must not ring it again."""
    pids = [await machine.spawn(interactive=True, limits={"wall": wall}) for wall in ("5:1000", "5:")]
    await machine.call("proc.limits", pid=pids[0], set={"wall": "5:2000"})
    await trio.sleep(10)
    for number in range(5):
        for pid in pids:
            await machine.call("proc.renice", pid=pid, nice=number)
        await trio.sleep(1)
    for pid in pids:
        assert limit_events(machine, pid) == [(pytest.approx(5, abs=0.1), "soft")]


async def test_a_sleeping_process_has_its_last_turn_at_its_next_run(autojump_clock, machine):
    pid = await machine.spawn(table(), interactive=True, limits={"wall": "5:1000"})
    await trio.sleep(10)
    assert machine.stat(pid) == "S"
    await machine.call("proc.send", pid=pid, text="!say one")
    ended = (await machine.call("proc.wait", pids=[pid])).procs[0]
    assert ended.status == 152


async def test_a_wall_limit_is_moved_while_it_runs(autojump_clock, machine):
    pid = await machine.spawn(table(), interactive=True, limits={"wall": "10s"})
    await trio.sleep(5)
    answer = await machine.call("proc.limits", pid=pid, set={"wall": "30s"})
    (row,) = [row for row in answer.limits if row.resource == "wall"]
    assert (row.soft, row.hard, row.used) == (None, 30, pytest.approx(5, abs=0.1))
    await machine.call("proc.wait", pids=[pid])
    assert trio.current_time() == pytest.approx(30, abs=0.1)
    assert machine.proc(pid).status == 124


async def test_a_wall_limit_that_has_passed_already_ends_the_process_now(autojump_clock, machine):
    pid = await machine.spawn(table(), interactive=True)
    await trio.sleep(50)
    await machine.call("proc.limits", pid=pid, set={"wall": 20})
    await machine.call("proc.wait", pids=[pid])
    assert machine.proc(pid).status == 124
    assert trio.current_time() == pytest.approx(50, abs=0.1)


async def test_a_stopped_process_meets_its_hard_limit_too(autojump_clock, machine):
    pid = await machine.spawn(table(), interactive=True, limits={"wall": 5})
    await machine.call("proc.signal", pid=pid, signal="STOP")
    await machine.call("proc.wait", pids=[pid])
    assert (machine.proc(pid).status, trio.current_time()) == (124, pytest.approx(5, abs=0.1))


async def test_a_wall_limit_survives_a_restart(autojump_clock):
    async with running() as house:
        pid = await house.spawn(table(), interactive=True, limits={"wall": 20})
        await trio.sleep(5)
        store = house.store
    async with running(store=store.crash()) as house:
        await house.call("proc.wait", pids=[pid])
        assert house.proc(pid).status == 124
        assert trio.current_time() == pytest.approx(20, abs=0.2)


async def test_a_clock_that_is_set_back_ends_no_wall_limit(autojump_clock, machine, monkeypatch):
    pids = [await machine.spawn(table(), interactive=True, limits={"wall": wall}) for wall in ("20", "10:20")]
    await trio.sleep(5)
    clock = machine.m._clock
    monkeypatch.setattr(machine.m, "_clock", lambda: clock() - 5)
    with trio.fail_after(1000):
        await machine.call("proc.wait", pids=pids)
    assert trio.current_time() == pytest.approx(25, abs=0.1)
    assert [machine.proc(pid).status for pid in pids] == [124, 124]
    assert limit_events(machine, pids[1])[0] == (pytest.approx(10, abs=0.1), "soft")


async def test_an_ended_process_leaves_no_alarm(autojump_clock, machine):
    await machine.finish(table(), "!say hi", limits={"wall": 100})
    await trio.sleep(1)
    assert machine.m._alarms == {}
    await trio.sleep(1000)


# --- waiting for runs -------------------------------------------------------------------------------


async def test_each_queued_run_gets_its_own_result_in_order(autojump_clock, machine):
    pid = await machine.spawn(table("calculator"), interactive=True)
    results, order = {}, []

    async def one(name, prompt):
        results[name] = await machine.call("proc.run", pid=pid, prompt=prompt)
        order.append(name)

    async with trio.open_nursery() as nursery:
        for number in range(4):
            calls = [use("calculator", expression=f"{number}")] * number
            nursery.start_soon(one, number, script(*calls, "!sleep 1", f"!say answer {number}"))
            await trio.sleep(0.01)
    assert order == [0, 1, 2, 3]
    for number in range(4):
        result = results[number]
        assert (result.message, result.stop_reason) == (f"answer {number}", "end_turn")
        assert result.api_calls == number + 1
        assert [(call.name, call.is_error) for call in result.tool_calls] == [("calculator", False)] * number
        assert result.duration_ms >= 1000
        assert result.status is None


async def test_runs_are_queued_in_the_order_in_which_they_were_asked_for(autojump_clock, machine):
    """Whatever order their waiting begins in; and what was sent after them comes after them."""
    pid = await machine.spawn(table(), interactive=True)
    runs = [machine.begin("proc.run", pid=pid, prompt=f"!say {number}") for number in range(3)]
    machine.begin("proc.send", pid=pid, text="!say last", close=True)
    assert [(await run).result.message for run in reversed(runs)] == ["2", "1", "0"]
    assert (await machine.call("proc.wait", pids=[pid])).procs[0].message == "last"
    late = await machine.spawn(table(), interactive=True)
    run = machine.begin("proc.run", pid=late, prompt="!say never")
    machine.begin("proc.signal", pid=late, signal="KILL")
    machine.begin("proc.remove", pids=[late])
    assert (await run).result.status == 137
    assert machine.m._runs == {}


async def test_a_run_on_a_busy_process_comes_after_what_waits(autojump_clock, machine):
    pid = await machine.spawn(table(), interactive=True)
    await machine.call("proc.send", pid=pid, text=script("!sleep 5", "!say first"))
    await machine.call("proc.send", pid=pid, text="!say second")
    result = await machine.call("proc.run", pid=pid, prompt="!say mine")
    assert result.message == "mine"
    read = await machine.call("fd.read", pid=pid, fd=1)
    assert read.data == b"first\nsecond\nmine\n"


async def test_an_interrupted_run_answers_its_own_waiter_only(autojump_clock, machine):
    pid = await machine.spawn(table(), interactive=True)
    results = []

    async def one(prompt):
        results.append(await machine.call("proc.run", pid=pid, prompt=prompt))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, script("!sleep 1000", "!say late"))
        await machine.until(pid, "api")
        nursery.start_soon(one, "!say next")
        await trio.sleep(1)
        await machine.call("proc.signal", pid=pid, signal="INT")
    assert [result.stop_reason for result in results] == ["interrupted", "end_turn"]
    assert results[1].message == "next"
    assert trio.current_time() < 10


async def test_the_end_of_a_process_answers_all_who_wait_for_its_runs(autojump_clock, machine):
    pid = await machine.spawn(table(), interactive=True)
    results = []

    async def one(prompt):
        results.append(await machine.call("proc.run", pid=pid, prompt=prompt))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(one, script("!sleep 1000", "!say late"))
        await trio.sleep(1)
        await machine.call("proc.signal", pid=pid, signal="KILL")
    assert [result.status for result in results] == [137] * 3
    assert machine.m._runs == {}


async def test_a_timeout_ends_the_waiting_and_not_the_run(autojump_clock, machine):
    pid = await machine.spawn(table(), interactive=True)
    with refused(Errno.ETIMEDOUT, f"the run of process {pid} goes on after 500 ms"):
        await machine.call("proc.run", pid=pid, prompt=script("!sleep 5", "!say done"), timeout_ms=500)
    assert machine.m._runs == {}
    assert machine.stat(pid) == "R"
    await machine.until(pid, "fd:0")
    assert (await machine.call("fd.read", pid=pid, fd=1)).data == b"done\n"


async def test_a_waiter_that_hangs_up_leaves_nothing_behind(autojump_clock, machine):
    pid = await machine.spawn(table(), interactive=True)
    with trio.move_on_after(1):
        await machine.call("proc.run", pid=pid, prompt=script("!sleep 5", "!say done"))
    assert machine.m._runs == {}
    result = await machine.call("proc.run", pid=pid, prompt="!say more")
    assert result.message == "more"


async def test_a_run_result_of_a_failed_run_says_why(autojump_clock, machine):
    pid = await machine.spawn(table("calculator", model={"max_iterations": 2}), interactive=True)
    call = '!calculator {"expression":"1/0"}'
    result = await machine.call("proc.run", pid=pid, prompt=script(call, call, call))
    assert (result.stop_reason, result.api_calls, result.status) == ("max_iterations", 2, None)
    assert [call.is_error for call in result.tool_calls] == [True, True]
    result = await machine.call("proc.run", pid=pid, prompt="!fail 400")
    assert (result.stop_reason, result.message, result.api_calls) == ("error", "", 0)
    (row,) = (await machine.call("proc.get", pid=pid)).procs
    assert "400" in row.reason


async def test_a_run_may_have_more_or_fewer_iterations_than_the_program(autojump_clock, machine):
    pid = await machine.spawn(table("calculator", model={"max_iterations": 2}), interactive=True)
    call = '!calculator {"expression":"1"}'
    more = await machine.call("proc.run", pid=pid, prompt=script(*[call] * 5, "!say hi"), max_iterations=9)
    assert (more.stop_reason, more.api_calls) == ("end_turn", 6)
    fewer = await machine.call("proc.run", pid=pid, prompt=script(call, "!say hi"), max_iterations=1)
    assert (fewer.stop_reason, fewer.api_calls) == ("max_iterations", 1)


# --- what ps says -----------------------------------------------------------------------------------


async def test_letters_and_channels_of_each_state(autojump_clock, machine, probe):
    said = {}

    async def note(name, pid):
        await trio.sleep(0.01)
        said[name] = (machine.stat(pid), machine.wchan(pid))

    resting = await machine.spawn(interactive=True)
    await note("rests", resting)
    calls = await machine.spawn(table(), script("!sleep 99", "!say hi"))
    await note("calls", calls)
    works = await machine.spawn(table("probe"), script('!probe {"seconds":99}', "!say hi"))
    await note("works", works)
    waits_ = await machine.spawn(table("fork"), script("!fork !sleep 99\\n!say hi"))
    await trio.sleep(0.1)
    await note("waits", waits_)
    await machine.call("proc.signal", pid=calls, signal="STOP")
    await note("stopped in a call", calls)
    await machine.call("proc.signal", pid=resting, signal="STOP")
    await note("stopped", resting)
    await machine.call("proc.signal", pid=works, signal="KILL")
    await note("ended", works)
    assert said == {
        "rests": ("S", "fd:0"),
        "calls": ("R", "api"),
        "works": ("R", "tool:probe"),
        "waits": ("S", "wait"),
        "stopped in a call": ("T", "api"),
        "stopped": ("T", "-"),
        "ended": ("Z", "-"),
    }


async def test_a_turn_with_a_waiting_and_a_working_tool_works(autojump_clock, machine, probe):
    """STAT says R and WCHAN names the tool as long as one of them does something."""
    program = table("probe", "spawn")
    prompt = script('!probe {"seconds":5}', "!& !spawn !sleep 50\\n!say hi", "!say done")
    pid = await machine.spawn(program, prompt)
    await trio.sleep(1)
    assert (machine.stat(pid), machine.wchan(pid)) == ("R", "tool:probe")
    await trio.sleep(10)
    assert (machine.stat(pid), machine.wchan(pid)) == ("S", "wait")


async def test_state_changes_are_told_to_those_who_look(autojump_clock, machine):
    """`state` and `text` events cost nothing while nobody looks."""
    await machine.finish(table(), "!say unseen")
    await trio.sleep(1)
    events, _ = machine.m.console.read(0, 1000, None, {"state", "text"})
    assert events == []
    with machine.m.console.reader(None, None):
        await machine.finish(table(), "!say seen")
    events, _ = machine.m.console.read(0, 1000, None, {"state", "text"})
    assert [event.more["wchan"] for event in events if event.type == "state"] == ["api"]
    assert "".join(event.more["text"] for event in events if event.type == "text") == "seen"


# --- its own books ----------------------------------------------------------------------------------


async def test_an_idle_process_is_a_record_and_no_task(autojump_clock, machine):
    for _ in range(50):
        await machine.spawn(interactive=True)
    pid = await machine.spawn(interactive=True)
    await machine.call("proc.run", pid=pid, prompt="!say hi")
    await trio.sleep(1)
    assert machine.m._tasks == set()
    assert machine.m._steps == {}
    assert machine.m._doing == {}
    assert machine.m.turns == {}
    assert machine.m.busy == 0


async def test_an_ended_process_leaves_nothing_in_the_books(autojump_clock, machine, probe):
    for sig in ("TERM", "KILL"):
        for text in (script("!sleep 99", "!say hi"), script('!probe {"seconds":99}', "!say hi"), "!fail 500"):
            pid = await machine.spawn(table("probe"), text, limits={"wall": 1000})
            await trio.sleep(1)
            await machine.call("proc.signal", pid=pid, signal=sig)
            await machine.call("proc.wait", pids=[pid])
    await trio.sleep(1)
    m = machine.m
    books = (m._tasks, m._steps, m._doing, m._runs, m._ends, m._alarms, m._transcripts, m.turns, m.fresh)
    assert [len(book) for book in books] == [0] * len(books)
    assert m.waits._sleepers == {}
    assert [(row.running, row.waiting) for row in m.sched.table()] == [(0, 0)]


async def test_kept_transcripts_are_bounded(autojump_clock, machine, monkeypatch):
    """A long conversation that idles leaves memory when others need the room, and is fetched again."""
    monkeypatch.setattr("llmprocd.machine.TRANSCRIPTS", 30_000)
    pids = [await machine.spawn(interactive=True) for _ in range(5)]
    for turn in range(3):
        for pid in pids:
            await machine.call("proc.run", pid=pid, prompt=f"turn {turn} of {pid} " + "x" * 5000)
            assert machine.m._kept == sum(kept[2] for kept in machine.m._transcripts.values())
            assert machine.m._kept <= 30_000
    for pid in pids:
        body = next(r.body for r in reversed(machine.engine.requests) if b"of %d " % pid in r.body)
        said = [m["content"][0]["text"][:12] for m in json.loads(body)["messages"] if m["role"] == "user"]
        assert said == [f"turn {turn} of {pid} "[:12] for turn in range(3)]


async def test_a_full_house_takes_no_more(autojump_clock):
    async with running(config=Config(max_procs=2)) as house:
        pid = await house.spawn(interactive=True)
        await house.spawn(interactive=True)
        with refused(Errno.EAGAIN, "2 living processes"):
            await house.spawn(interactive=True)
        with refused(Errno.EAGAIN):
            await house.call("proc.fork", pid=pid)
        await house.call("proc.signal", pid=pid, signal="KILL")
        await house.spawn(interactive=True)


async def test_a_full_disk_takes_no_more(autojump_clock, machine, monkeypatch):
    """Spawns and forks are refused first, so that what lives can still write down how it ends."""
    pid = await machine.spawn(interactive=True)
    monkeypatch.setattr(machine.store, "free", lambda: 1 << 20)
    with refused(Errno.ENOSPC, "nearly full"):
        await machine.spawn(interactive=True)
    with refused(Errno.ENOSPC):
        await machine.call("proc.fork", pid=pid)
    result = await machine.call("proc.run", pid=pid, prompt="!say hi")
    assert result.message == "hi"


async def test_a_bug_in_a_step_ends_the_daemon(autojump_clock):
    """What is no KernelError must not be survived with half a change in memory."""

    async def broken(_m, _pid):
        raise ZeroDivisionError("a bug")

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True, allow_unwrapped=True):
        async with running(live=broken) as house:
            await house.spawn(table(), "!say hi")
            await trio.sleep_forever()


async def test_a_reconfigured_machine_uses_the_new_config(autojump_clock):
    async with running(config=Config(slots=1)) as house:
        pids = [await house.spawn(table(), script("!sleep 10", "!say hi")) for _ in range(3)]
        await trio.sleep(1)
        house.m.configure(Config(slots=3))
        await trio.sleep(1)
        assert [house.wchan(pid) for pid in pids] == ["api"] * 3
