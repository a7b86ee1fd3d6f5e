"""What model calls may use: nobody overshoots, what cannot fit ends, and the books are the endpoint's."""

import json

import pytest
import trio
from machinekit import MODEL, refused, running, script, table, use

from llmprocd.abi.errno import Errno
from llmprocd.config import Config, PriceTable
from llmprocd.store import memory

PRICE = PriceTable(input=10, output=50, cache_read=1, cache_write=12.5, cache_write_1h=20)
PRICED = Config(prices={MODEL: PRICE})
COUNT = use("calculator", expression="1+1")


@pytest.fixture
async def priced(autojump_clock):
    """A machine whose model has a price."""
    async with running(config=PRICED) as house:
        yield house


def program(*tools, **tables):
    """A small prompt, so that what a call may use is mostly its answer."""
    return table(*tools, file_descriptor={"enabled": False}, **tables)


def turns(count, *more):
    """A prompt that takes so many model calls, and then what else is said."""
    return script(*[COUNT] * count, *more)


async def rows(house, pid):
    return {row.resource: row for row in (await house.call("proc.limits", pid=pid)).limits}


async def used(house, pid, resource):
    return (await rows(house, pid))[resource].used


async def until(house, pid, wchan):
    """Let the others run until a process is there and waits for this."""
    with trio.fail_after(60):
        while pid not in house.m.kernel.procs or house.wchan(pid) != wchan:
            await trio.sleep(0.01)


def billed(house):
    """Tokens that the endpoint has in its books."""
    books = house.engine.books
    return sum(
        getattr(books, name)
        for name in (
            "input_tokens",
            "output_tokens",
            "cache_read_input_tokens",
            "cache_creation_input_tokens",
        )
    )


# --- hard -------------------------------------------------------------------------------------------


async def test_turns_end_with_152(autojump_clock, priced):
    """Exactly so many calls are made; what was done is kept, and stderr says why it ended."""
    pid = await priced.spawn(program("calculator"), turns(9), limits={"turns": 3})
    (row,) = (await priced.call("proc.wait", pids=[pid])).procs
    assert (row.status, priced.proc(pid).turns) == (152, 3)
    assert len(await priced.results(pid)) == 3
    assert priced.proc(pid).reason == "the turns limit of 3 is reached"
    assert priced.engine.books.answers == 3


async def test_an_interactive_process_ends_as_well(autojump_clock, priced):
    """Its next run is the one that finds nothing left."""
    pid = await priced.spawn(program(), interactive=True, limits={"turns": 1})
    assert (await priced.call("proc.run", pid=pid, prompt="!say one")).message == "one"
    result = await priced.call("proc.run", pid=pid, prompt="!say two")
    assert (result.status, result.stop_reason, result.api_calls) == (152, "limit", 0)


async def test_a_call_that_does_not_fit_whole_is_shorter(autojump_clock, priced):
    """It is asked with the max_tokens that are left, and ends its process when it is cut off there."""
    pid = await priced.spawn(program(), "!say " + "word " * 400, limits={"tokens": 1300})
    (row,) = (await priced.call("proc.wait", pids=[pid])).procs
    body = json.loads(priced.engine.requests[-1].body)
    assert body["max_tokens"] < 1000
    assert (row.status, await used(priced, pid, "tokens") <= 1000) == (152, True)
    assert row.message.startswith("word word"), "what was said is kept"


async def test_a_call_that_may_be_shorter_and_is_ends_well(autojump_clock, priced):
    """The limit was not reached."""
    ended = await priced.finish(program(), "!say hi", limits={"tokens": 1000})
    assert (ended.status, ended.message) == (0, "hi")


@pytest.mark.parametrize("limits", [{"tokens": 2000}, {"cost_usd": 0.04}, {"turns": 5}])
async def test_no_call_overshoots(autojump_clock, priced, limits):
    """A process that would go on for ever has used at most what it may."""
    pid = await priced.spawn(program("calculator", model={"max_iterations": 99}), turns(60), limits=limits)
    (row,) = (await priced.call("proc.wait", pids=[pid])).procs
    ((resource, most),) = limits.items()
    assert row.status == 152
    assert most / 2 <= await used(priced, pid, resource) <= most


@pytest.mark.parametrize("limits", [{"tokens": 5000}, {"cost_usd": 0.1}, {"turns": 7}])
async def test_children_that_run_at_once_cannot_overshoot_together(autojump_clock, priced, limits):
    """Each of them alone would; what does not fit beside the others waits, and those that are left end."""
    tools = program(
        "calculator",
        "fork",
        model={"max_iterations": 99},
        parameters={"max_tokens": 1000},
        prompt={"system": f"<script>{turns(20)}</script>"},
    )
    pid = await priced.spawn(tools, use("fork", prompts=["go"] * 6), limits=limits)
    await ended(priced, pid)
    ((resource, most),) = limits.items()
    spent = await used(priced, pid, resource)
    assert most / 2 <= spent <= most
    assert billed(priced) == await used(priced, pid, "tokens")
    assert priced.proc(pid).status in {0, 152}, "it may have room for a last word"
    assert [p.status for p in priced.m.kernel.procs.values() if p.pid != pid] == [152] * 6
    assert priced.m.kernel.held == {}


async def ended(house, *pids):
    """Wait until they have ended; not for ever."""
    with trio.fail_after(10_000):
        await house.call("proc.wait", pids=list(pids))


NARROW = {"tokens": 16_000}
"""Room for one call that may say all it wants, not for two."""


async def held(house):
    """A parent with two children of which one has to wait: the parent, that one, and the other."""
    text = use("fork", prompts=["!sleep 50\n!say one", "!sleep 50\n!say two"])
    pid = await house.spawn(program("fork"), text, limits=NARROW)
    children = {pid + 1, pid + 2}
    with trio.fail_after(60):
        while not (
            waiting := [one for one in children & house.m.kernel.procs.keys() if house.wchan(one) == "limit"]
        ):
            await trio.sleep(0.01)
    (waiter,) = waiting
    (other,) = children - {waiter}
    return pid, waiter, other


async def test_who_waits_for_room_is_held(autojump_clock, priced):
    """STAT is D and WCHAN `limit`; the call is made when another one has used less than it might have."""
    pid, waiter, other = await held(priced)
    assert (priced.stat(waiter), priced.wchan(other)) == ("D", "api")
    await ended(priced, pid)
    assert [priced.proc(one).status for one in (waiter, other)] == [0, 0]
    assert priced.proc(pid).status == 0
    assert 100 <= priced.proc(waiter).ended - priced.proc(pid).began < 101, "one after the other"


async def test_a_raised_limit_lets_those_go_who_wait(autojump_clock, priced):
    pid, waiter, other = await held(priced)
    await priced.call("proc.limits", pid=pid, set={"tokens": "1M"})
    await ended(priced, waiter, other)
    assert priced.proc(waiter).ended - priced.proc(pid).began < 51, "side by side"


async def test_a_signal_finds_one_who_waits(autojump_clock, priced):
    """And gives back nothing, since nothing was reserved."""
    _, waiter, other = await held(priced)
    before = priced.m.kernel.held
    await priced.call("proc.signal", pid=waiter, signal="TERM")
    assert (priced.proc(waiter).status, priced.m.kernel.held) == (143, before)
    await ended(priced, other)
    assert priced.proc(other).status == 0


async def test_a_killed_call_gives_its_room_to_who_waits(autojump_clock, priced):
    pid, waiter, other = await held(priced)
    await priced.call("proc.signal", pid=other, signal="KILL")
    await priced.call("proc.remove", pids=[other])
    await ended(priced, waiter)
    assert priced.proc(waiter).status == 0
    assert priced.proc(waiter).ended - priced.proc(pid).began < 52


# --- soft -------------------------------------------------------------------------------------------


async def test_a_soft_limit_gives_one_last_turn_without_tools(autojump_clock, priced):
    """The model is asked to hand back what it has; the same tools are offered."""
    pid = await priced.spawn(program("calculator"), turns(9), limits={"turns": "2:9"})
    (row,) = (await priced.call("proc.wait", pids=[pid])).procs
    assert (row.status, priced.proc(pid).turns) == (152, 3)
    first, *_, last = (json.loads(request.body) for request in priced.engine.requests)
    assert last["tools"] == first["tools"]
    said = [block.get("text", "") for block in last["messages"][-1]["content"]]
    assert any("last turn" in text for text in said)
    assert priced.types(pid).count("limit") == 1


async def test_a_parent_is_told_of_what_its_children_spend(autojump_clock, priced):
    """It finishes when they have come back."""
    text = script(use("fork", prompts=[turns(2), turns(2)]), use("calculator", expression="2"))
    pid = await priced.spawn(program("calculator", "fork"), text, limits={"turns": "4:40"})
    (row,) = (await priced.call("proc.wait", pids=[pid])).procs
    assert row.status == 152
    assert await used(priced, pid, "turns") == 1 + 2 * 3 + 1


# --- the books --------------------------------------------------------------------------------------


async def test_a_tree_of_forks_and_spawns_adds_up_to_the_endpoints_books(autojump_clock, priced):
    """Tokens of each process, and the cost of the whole at its root."""
    text = script(
        use("fork", prompts=[turns(2, "!say a"), script(use("spawn", prompt=turns(1)), "!say b")]), "!say c"
    )
    ended = await priced.finish(program("calculator", "fork", "spawn", tools={"child_access": "admin"}), text)
    assert ended.status == 0
    listed = (await priced.call("proc.list", all=True)).procs
    books = priced.engine.books
    for field in ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
        assert sum(getattr(row.usage, field) for row in listed) == getattr(books, field), field
    dollars = (
        books.input_tokens * 10
        + books.output_tokens * 50
        + books.cache_read_input_tokens
        + books.cache_creation_input_tokens * 12.5
    ) / 1e6
    assert ended.cost_usd == pytest.approx(dollars, abs=1e-8)
    assert (await priced.call("sys.status")).cost_usd == ended.cost_usd


async def test_a_run_costs_what_it_and_its_children_have_cost(autojump_clock, priced):
    pid = await priced.spawn(program("fork"), interactive=True)
    first = await priced.call("proc.run", pid=pid, prompt="!say hi")
    second = await priced.call("proc.run", pid=pid, prompt=use("fork", prompts=["!say a", "!say b"]))
    (row,) = (await priced.call("proc.list", pids=[pid])).procs
    assert 0 < first.cost_usd < second.cost_usd
    assert first.cost_usd + second.cost_usd == pytest.approx(row.cost_usd)


async def test_without_a_price_a_cost_is_none(autojump_clock):
    """Never 0."""
    async with running() as house:
        ended = await house.finish(program(), "!say hi")
        assert ended.cost_usd is None
        assert (await house.call("sys.status")).cost_usd is None


async def test_usage_that_does_not_come_costs_none(autojump_clock, priced):
    """Something was used, and nobody knows how much."""
    assert (await priced.finish(program(), script("!say hi", "!& !nousage"))).cost_usd is None


async def test_an_interrupted_call_is_billed(autojump_clock, priced):
    """Its prompt was read; also when nothing of the answer is kept."""
    pid = await priced.spawn(program(), script("!stall 100", "!& !say late"))
    await priced.until(pid, "api")
    await trio.sleep(50)
    await priced.call("proc.signal", pid=pid, signal="KILL")
    await trio.sleep(1)
    assert priced.proc(pid).status == 137
    assert priced.proc(pid).usage.input_tokens > 0
    assert priced.proc(pid).cost > 0
    assert priced.proc(pid).turns == 0


async def test_a_stream_that_dies_is_billed_and_asked_again(autojump_clock, priced):
    """Its prompt was read twice."""
    pid = await priced.spawn(program(), script("!drop times=1", "!say hi"))
    (row,) = (await priced.call("proc.wait", pids=[pid])).procs
    assert row.message == "hi"
    assert row.usage.input_tokens == 2 * priced.proc(pid).last_call.prompt
    assert priced.proc(pid).turns == 1


async def test_what_dead_streams_have_used_may_leave_no_room(autojump_clock, priced):
    """It ends with 152 instead of asking again."""
    text = script("!drop times=3", "!say hi")
    once = await priced.finish(program(), script("!drop times=0", "!say hi"))
    most = 2 * once.usage.input_tokens + 8192 + 60
    pid = await priced.spawn(program(), text, limits={"tokens": most})
    (row,) = (await priced.call("proc.wait", pids=[pid])).procs
    assert row.status == 152
    assert priced.proc(pid).turns == 0
    assert 0 < await used(priced, pid, "tokens") <= most


async def test_a_spawned_program_brings_its_own_limits(autojump_clock, priced, tmp_path):
    """It is bound by them and by its parent's."""
    path = tmp_path / "child.toml"
    model = f'[model]\nname = "{MODEL}"\nprovider = "script"\n'
    path.write_text(model + '[tools]\nbuiltin = ["calculator"]\n[limits]\nturns = 2\n')
    linked = program("spawn", linked_programs={"worker": str(path)})
    pid = await priced.spawn(
        linked, use("spawn", program_name="worker", prompt=turns(9)), limits={"turns": 90}
    )
    await ended(priced, pid)
    assert (priced.proc(pid + 1).status, priced.proc(pid + 1).turns) == (152, 2)
    assert "status 152" in (await priced.results(pid))[0]["content"]


# --- prices and limits ------------------------------------------------------------------------------


async def test_a_model_without_a_price_is_not_started_under_a_cost_limit(autojump_clock):
    """Its own limit or one above; the sentence says what to do."""
    async with running() as house:
        with refused(Errno.EINVAL, "is not known", f'[prices."{MODEL}"]'):
            await house.spawn(program(), "!say hi", limits={"cost_usd": 1})
        with refused(Errno.EINVAL, "is not known"):
            await house.spawn(program(limits={"cost_usd": 1}), "!say hi")
        pid = await house.spawn(program(), interactive=True)
        with refused(Errno.EINVAL, "is not known"):
            await house.call("proc.limits", pid=pid, set={"cost_usd": 1})


async def test_nor_by_exec_or_by_a_tool(autojump_clock, priced):
    """Whoever is below a cost limit stays priced."""
    other = program(model={"name": "nobody-knows"})
    pid = await priced.spawn(program("spawn"), interactive=True, limits={"cost_usd": 1})
    with refused(Errno.EINVAL, "nobody-knows", "is not known"):
        await priced.call("proc.exec", pid=pid, program=other)
    with refused(Errno.EINVAL, "nobody-knows", f"process {pid}"):
        await priced.call("proc.spawn", by=priced.caller(pid), program=other, prompt="hi")


async def test_a_price_that_is_taken_away_stops_the_spending(autojump_clock, priced):
    """The process rests, and goes on when the price is back."""
    pid = await priced.spawn(program(), interactive=True, limits={"cost_usd": 1})
    priced.m.configure(Config())
    result = await priced.call("proc.run", pid=pid, prompt="!say hi")
    assert result.stop_reason == "error"
    assert "price" in priced.proc(pid).reason
    priced.m.configure(PRICED)
    assert (await priced.call("proc.run", pid=pid, prompt="!say hi")).message == "hi"


async def test_the_configs_limits_bind_every_tree(autojump_clock):
    """Unless a process has its own."""
    async with running(config=Config(limits={"turns": 2})) as house:
        assert (await house.finish(program("calculator"), turns(5))).status == 152
        assert (await house.finish(program("calculator"), turns(5), limits={"turns": 9})).status == 0
        pid = await house.spawn(program(), interactive=True)
        assert (await rows(house, pid))["turns"].hard == 2


# --- procs, depth, descriptors ----------------------------------------------------------------------


async def test_a_fork_bomb_is_bounded(autojump_clock):
    """By procs and by depth; the bomb reads EAGAIN, and all of it ends."""
    bomb = script("!sleep 1", *[use("fork", prompts=["again"] * 5)] * 2, "!say boom")
    async with running(config=Config(limits={"procs": 20, "depth": 4})) as house:
        told = program("fork", tools={"child_access": "admin"}, prompt={"system": f"<script>{bomb}</script>"})
        pid = await house.spawn(told, "go")
        most = 0
        while house.proc(pid).status is None:
            most = max(most, house.m.kernel.total(pid).procs)
            await trio.sleep(0.01)
        assert most <= 20
        assert most > 5
        assert house.m.kernel.living == 0


async def test_a_tool_result_that_has_no_room_is_an_error_that_shows_its_beginning(autojump_clock):
    """EDQUOT; nothing of it is kept, and the next call can be made."""
    long = use("calculator", expression="2**1000")
    async with running() as house:
        tools = table("calculator", file_descriptor={"max_direct_output_chars": 100, "default_page_size": 50})
        pid = await house.spawn(tools, script(long, long, "!say ok"), limits={"fds": 1})
        (row,) = (await house.call("proc.wait", pids=[pid])).procs
        first, second = await house.results(pid)
        assert row.status == 0
        assert "fd:3" in first["content"]
        assert second["is_error"]
        assert "EDQUOT" in second["content"]
        assert len(house.proc(pid).fds) == 1


# --- who may change them ----------------------------------------------------------------------------


async def test_a_tool_reads_limits_and_changes_none(autojump_clock, priced):
    pid = await priced.spawn(program(), interactive=True, limits={"turns": 5})
    tool = priced.caller(pid)
    assert len((await priced.call("proc.limits", by=tool, pid=pid)).limits) == 8
    with refused(Errno.EPERM):
        await priced.call("proc.limits", by=tool, pid=pid, set={"turns": 50})


async def test_a_program_has_limits_and_spawn_overrides_each(autojump_clock, priced):
    """By resource."""
    limited = program(limits={"turns": 5, "tokens": "2k:4k", "fd_bytes": "1M"})
    pid = await priced.spawn(limited, interactive=True, limits={"turns": "7:8"})
    found = {name: (row.soft, row.hard) for name, row in (await rows(priced, pid)).items()}
    assert found["turns"] == (7.0, 8.0)
    assert found["tokens"] == (2000.0, 4000.0)
    assert found["fd_bytes"] == (None, float(1 << 20))


async def test_limits_and_what_was_used_survive_a_restart(autojump_clock):
    """A machine that dies and one that comes after it: the budget is the same."""
    store = memory.Store()
    async with running(store=store, config=PRICED) as house:
        pid = await house.spawn(program("calculator"), interactive=True, limits={"turns": "3:4"})
        await house.call("proc.run", pid=pid, prompt=turns(1))
        before = await rows(house, pid)
        await house.m.wait_durable()
    async with running(store=store.crash(), config=PRICED) as house:
        after = await rows(house, pid)
        assert {n: r for n, r in after.items() if n != "wall"} == {
            n: r for n, r in before.items() if n != "wall"
        }
        await house.call("proc.run", pid=pid, prompt=turns(9))
        (row,) = (await house.call("proc.wait", pids=[pid])).procs
        assert (row.status, house.proc(pid).turns) == (152, 4)


# --- wall -------------------------------------------------------------------------------------------


async def test_a_wall_limit_binds_those_born_below(autojump_clock, priced):
    """A child has no more time than its parent had, also when that has ended."""
    tools = program("fork")
    text = script("!sleep 2", use("fork", prompts=["!sleep 500\n!say late"], wait=False), "!say bye")
    pid = await priced.spawn(tools, text, limits={"wall": 30})
    (row,) = (await priced.call("proc.wait", pids=[pid])).procs
    assert row.status == 0
    (child,) = (await priced.call("proc.wait", pids=[pid + 1])).procs
    assert (child.status, priced.proc(pid + 1).reason) == (124, f"wall-clock limit of 30 s of process {pid}")
    assert 29 <= priced.proc(pid + 1).ended - priced.proc(pid).began <= 31


async def test_a_wall_limit_that_is_set_later_binds_those_that_run(autojump_clock, priced):
    tools = program("fork")
    text = script(use("fork", prompts=["!sleep 500\n!say late"]), "!say bye")
    pid = await priced.spawn(tools, text)
    await until(priced, pid + 1, "api")
    await priced.call("proc.limits", pid=pid, set={"wall": 30})
    (child,) = (await priced.call("proc.wait", pids=[pid + 1])).procs
    assert child.status == 124


async def test_a_wall_limit_of_one_that_has_ended_binds_those_that_run(autojump_clock, priced):
    """It can still be set."""
    text = script(use("fork", prompts=["!sleep 500\n!say late"], wait=False), "!say bye")
    pid = await priced.spawn(program("fork"), text)
    await until(priced, pid + 1, "api")
    await ended(priced, pid)
    await priced.call("proc.limits", pid=pid, set={"wall": 30})
    await ended(priced, pid + 1)
    assert priced.proc(pid + 1).status == 124
