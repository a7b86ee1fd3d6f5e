"""Model calls of whole processes: who is next, what a failure does and what is left of it."""

import json
from collections import Counter

import pytest
import trio
from machinekit import running, script, table

from llmprocd.abi.errno import Errno
from llmprocd.config import Config, EndpointTable
from llmprocd.model import script as scripted
from llmprocd.model.script import Engine


class Steps(trio.abc.Instrument):
    """Counts how often tasks were woken."""

    def __init__(self):
        self.count = 0

    def before_task_step(self, task):  # noqa: ARG002  # trio's
        self.count += 1


def bodies(house):
    return [json.loads(request.body) for request in house.engine.requests]


def said(message):
    return [block.get("text") for block in message["content"]]


# --- many -------------------------------------------------------------------------------------------


async def crowd(count, slots):
    """So many processes that want one turn each; how often a task was woken for each of them."""
    steps, began = Steps(), trio.current_time()
    async with running(config=Config(slots=slots), engine=Engine(seed=b"x", keep_bytes=0)) as house:
        trio.lowlevel.add_instrument(steps)
        pids = [await house.spawn(table(), script("!sleep 1", "!say hi")) for _ in range(count)]
        await trio.sleep(0.5)
        most = 0
        while house.m.busy:
            most = max(most, house.m.sched.table()[0].running)
            await trio.sleep(0.5)
        trio.lowlevel.remove_instrument(steps)
        assert {house.proc(pid).status for pid in pids} == {0}
        assert most == slots
        assert trio.current_time() - began < count / slots + 2, "a slot stood empty while somebody waited"
        return steps.count / count


@pytest.mark.slow
async def test_ten_thousand_processes_share_fifty_slots_without_a_storm(autojump_clock):
    """What a turn costs does not grow with how many wait for one."""
    few = await crowd(100, 50)
    many = await crowd(10_000, 50)
    assert many < few + 2, f"{few:.1f} wakeups a process, and in a crowd {many:.1f}"


async def test_a_process_that_waits_for_a_slot_is_held(autojump_clock):
    async with running(config=Config(slots=1)) as house:
        pids = [await house.spawn(table(), script("!sleep 10", "!say hi")) for _ in range(3)]
        await trio.sleep(1)
        assert [(house.stat(pid), house.wchan(pid)) for pid in pids].count(("D", "slot")) == 2


async def test_a_message_to_an_interactive_process_is_before_those_that_run_by_themselves(autojump_clock):
    async with running(config=Config(slots=1)) as house:
        talk = await house.spawn(interactive=True)
        crowd = [await house.spawn(table(), script("!sleep 10", "!say hi")) for _ in range(20)]
        await trio.sleep(1)
        await house.call("proc.send", pid=talk, text="!say now")
        await trio.sleep(11)
        assert house.proc(talk).turns == 1
        assert sum(not house.proc(pid).live for pid in crowd) == 1


async def test_two_users_trees_get_as_much_whoever_has_more_children(autojump_clock):
    """A tree that forks a hundred children shares the slots evenly with one that has two processes."""
    prompt = "!fork " + " | ".join(["!sleep 1\\n!say hi"] * 10)
    async with running(config=Config(slots=1)) as house:
        program = table("fork", tools={"child_access": "admin"})
        big = await house.spawn(program, script(prompt, "!say all"))
        await trio.sleep(3)
        small = await house.spawn(program, script("!sleep 1", "!say hi"))
        await trio.sleep(4.5)
        assert not house.proc(small).live
        assert house.proc(big).live


async def test_cancelled_processes_leave_no_trace_in_the_queue(autojump_clock):
    async with running(config=Config(slots=1)) as house:
        pids = [await house.spawn(table(), script("!sleep 10", "!say hi")) for _ in range(50)]
        await trio.sleep(1)
        for pid in pids[:49]:
            await house.call("proc.signal", pid=pid, signal="KILL")
        await house.call("proc.wait", pids=pids)
        (row,) = house.m.sched.table()
        assert (row.running, row.waiting) == (0, 0)
        assert trio.current_time() < 25


async def test_who_looks_at_one_process_costs_the_others_nothing(autojump_clock):
    """Text and states are told of those processes that somebody looks at, and while he looks."""
    async with running() as house:
        one, other = [await house.spawn(interactive=True) for _ in range(2)]
        with house.m.console.reader([one], None), house.m.console.reader([other], ["exit"]):
            for pid in (one, other):
                await house.call("proc.run", pid=pid, prompt="!say hi")
        await house.call("proc.run", pid=one, prompt="!say hi")
        events, _ = house.m.console.read(0, 1000, None, {"text", "state"})
        assert {event.pid for event in events} == {one}
        assert "".join(event.more.get("text", "") for event in events) == "hi"
        assert house.m.console._looked_at == {}


# --- rates ------------------------------------------------------------------------------------------


async def test_an_endpoint_that_refuses_bursts_answers_everybody_in_the_end(autojump_clock):
    """Sixty processes against twenty requests a second: all get through, each asked a few times at most."""
    async with running(engine=Engine(seed=b"x", rate_limit=20)) as house:
        pids = [await house.spawn(table(), "!say hi") for _ in range(60)]
        await house.call("proc.wait", pids=pids)
        assert {house.proc(pid).status for pid in pids} == {0}
        refused = len(house.engine.refusals)
        house.engine.refusals.clear()
        assert refused < 200
        assert trio.current_time() < 120


async def test_a_configured_rate_is_never_run_into(autojump_clock):
    config = Config(endpoints={"script": EndpointTable(rpm=60)})
    async with running(engine=Engine(seed=b"x", rate_limit=60), config=config) as house:
        pids = [await house.spawn(table(), "!say hi") for _ in range(90)]
        await house.call("proc.wait", pids=pids)
        times = [request.at for request in house.engine.requests]
        assert len(times) == 90
        assert 29 < times[-1] - times[0] < 32
        (row,) = house.m.sched.table()
        assert (row.endpoint, row.rpm, row.rpm_left) == ("script", 60, 0)


class Metered(Engine):
    """An endpoint that tells its limits in the headers of each answer, refusals too."""

    def answer(self, *args):
        answer = super().answer(*args)
        told = (("anthropic-ratelimit-requests-limit", "30"), ("anthropic-ratelimit-requests-remaining", "7"))
        return scripted.msgspec.structs.replace(answer, headers=(*answer.headers, *told))


@pytest.mark.parametrize("prompt", ["!say hi", "!fail 400", "!fail 500 times=1\n!say hi"])
async def test_the_headers_of_every_answer_are_heard(autojump_clock, prompt):
    async with running(engine=Metered(seed=b"x")) as house:
        await house.finish(table(), prompt)
        (row,) = (await house.call("sys.status")).scheduler
        assert row.rpm == 30
        assert row.rpm_left <= 8


# --- failures ---------------------------------------------------------------------------------------


async def test_the_time_that_a_server_named_counts_down(autojump_clock):
    async with running() as house:
        pid = await house.spawn(table(), script("!fail 503 retry_after=12 times=1", "!say hi"))
        await house.until(pid, "retry-after 12s")
        await trio.sleep(5)
        assert (house.stat(pid), house.wchan(pid)) == ("D", "retry-after 7s")


async def test_an_endpoint_that_is_overloaded_holds_everybody(autojump_clock):
    async with running() as house:
        first = await house.spawn(table(), script("!fail 529 times=1", "!say hi"))
        await house.until(first, "backoff")
        second = await house.spawn(table(), "!say hi")
        await trio.sleep(0.1)
        assert (house.stat(second), house.wchan(second)) == ("D", "backoff")


async def test_after_a_hold_processes_come_back_one_after_another(autojump_clock):
    async with running() as house:
        first = await house.spawn(table(), script("!fail 429 retry_after=5 times=1", "!say hi"))
        await house.until(first, "retry-after 5s")
        pids = [await house.spawn(table(), "!say hi") for _ in range(20)]
        await house.call("proc.wait", pids=[first, *pids])
        times = sorted(request.at for request in house.engine.requests)[1:]
        assert times[0] >= 5
        assert times[10] - times[0] > 0.2, "they came back all at once"
        assert len(set(times)) == len(times)


async def test_a_named_time_binds_others_though_no_retry_is_left(autojump_clock):
    async with running(config=Config(retries=0)) as house:
        first = await house.finish(table(), "!fail 429 retry_after=30")
        assert first.status == 1
        second = await house.spawn(table(), "!say hi")
        await house.until(second, "retry-after 30s")
        await house.call("proc.wait", pids=[second])
        assert 30 <= trio.current_time() < 31


async def test_a_stream_that_dies_is_asked_again_and_its_text_is_never_sent_back(autojump_clock):
    async with running() as house:
        pid = await house.spawn(interactive=True)
        for fault in ("!drop times=1", "!truncate times=2", "!error times=1"):
            result = await house.call("proc.run", pid=pid, prompt=script(fault, "!say whole"))
            assert (result.message, result.stop_reason) == ("whole", "end_turn")
        sent = bodies(house)
        assert len(sent) == 2 + 3 + 2
        texts = [said(m) for body in sent for m in body["messages"] if m["role"] == "assistant"]
        assert {tuple(text) for text in texts} == {("whole",)}


async def test_a_stall_has_a_deadline_and_so_has_a_call_that_trickles(autojump_clock):
    """An endpoint that sends a word a minute keeps no process for ever."""
    async with running(config=Config(call_s=600, retries=1, retry_s=1000)) as house:
        ended = await house.finish(table(), script("!delay 60", "!say " + "word " * 100))
        assert ended.status == 1
        assert house.proc(ended.pid).reason == "ETIMEDOUT: no whole answer within 600 s (asked 2 times)"
        assert trio.current_time() < 1210


FINAL = {
    "!fail 400": ("EINVAL", 1),
    "!fail 401": ("EACCES", 1),
    "!fail 403": ("EACCES", 1),
    "!fail 404": ("ENOENT", 1),
    "!fail 413": ("E2BIG", 1),
    "!fail 429": ("EAGAIN", 3),
    "!fail 500": ("EIO", 3),
    "!fail 529": ("EBUSY", 3),
    "!drop": ("EIO", 3),
    "!truncate": ("EIO", 3),
    "!html": ("EPROTO", 1),
}


@pytest.mark.parametrize("fault", FINAL)
async def test_after_a_final_failure_the_conversation_goes_on(autojump_clock, fault):
    """The process rests with an errno and one sentence; the strict endpoint accepts its next message."""
    errno, asked = FINAL[fault]
    async with running(config=Config(retries=2)) as house:
        pid = await house.spawn(interactive=True)
        await house.call("proc.run", pid=pid, prompt="!say first")
        result = await house.call("proc.run", pid=pid, prompt=fault)
        assert (result.stop_reason, house.stat(pid)) == ("error", "S")
        reason = house.proc(pid).reason
        assert reason.startswith(f"{errno}: ")
        assert "\n" not in reason
        assert len(house.engine.requests) == 1 + asked
        result = await house.call("proc.run", pid=pid, prompt="!say again")
        assert result.message == "again"
        assert [m["role"] for m in bodies(house)[-1]["messages"]] == ["user", "assistant", "user"]


async def test_a_failure_in_the_middle_of_a_tool_turn_leaves_the_results(autojump_clock):
    """The calls are answered: nothing is run again, and the next message stands beside the results."""
    async with running(config=Config(retries=1)) as house:
        pid = await house.spawn(table("calculator"), interactive=True)
        prompt = script('!calculator {"expression":"6*7"}', "!fail 500")
        result = await house.call("proc.run", pid=pid, prompt=prompt)
        assert (result.stop_reason, len(result.tool_calls)) == ("error", 1)
        result = await house.call("proc.run", pid=pid, prompt="!say fine")
        assert result.message == "fine"
        last = bodies(house)[-1]["messages"][-1]
        assert [block["type"] for block in last["content"]] == ["tool_result", "text"]
        assert Counter(house.types(pid))["tool_start"] == 1


async def test_a_batch_process_that_failed_is_resumed_by_a_fork(autojump_clock):
    async with running(config=Config(retries=0)) as house:
        ended = await house.finish(table(), script("!fail 401 times=1", "!say mended"))
        assert ended.status == 1
        (child,) = (await house.call("proc.fork", pid=ended.pid, prompts=["!say mended"])).pids
        again = (await house.call("proc.wait", pids=[child])).procs[0]
        assert (again.status, again.message) == (0, "mended")


async def test_interrupting_while_an_endpoint_is_held_leaves_a_valid_conversation(autojump_clock):
    async with running() as house:
        pid = await house.spawn(interactive=True)
        await house.call("proc.send", pid=pid, text=script("!fail 429 retry_after=600 times=1", "!say late"))
        await house.until(pid, "retry-after 600s")
        await house.call("proc.signal", pid=pid, signal="INT")
        await trio.sleep(1)
        assert (house.stat(pid), house.wchan(pid)) == ("S", "fd:0")
        await house.call("proc.send", pid=pid, text="!say hi")
        await trio.sleep(1)
        assert house.wchan(pid)[:11] == "retry-after"
        await trio.sleep(600)
        assert house.proc(pid).turns == 1


def test_every_errno_of_a_failure_is_in_the_vocabulary():
    assert all(errno in Errno.__members__ for errno, _ in FINAL.values())
