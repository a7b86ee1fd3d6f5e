"""Limits and prices, from outside: a real daemon, a strict endpoint and its books, the command line."""

import json
import subprocess
import sys

import pytest
from e2ekit import MODEL, Daemon, program, refused, script, use

LIMITED = """\
retry_s = 20
[prices."{model}"]
input = 10
output = 50
cache_read = 1
cache_write = 12.5
[limits]
procs = 40
depth = 4
"""
COUNT = use("calculator", expression="1+1")
USAGE = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


@pytest.fixture(scope="module")
def house(strict, tmp_path_factory):
    """A daemon whose config has a price and limits; its default endpoint is the strict one."""
    daemon = Daemon(tmp_path_factory.mktemp("limited"), strict.url)
    daemon.config.write_text(LIMITED.format(model=MODEL))
    daemon.start()
    yield daemon
    daemon.close()


def ctl(daemon: Daemon, *words: object) -> subprocess.CompletedProcess[str]:
    """What the command line prints, and how it exits."""
    return subprocess.run(
        [sys.executable, "-m", "llmprocctl", "--socket", daemon.socket, *map(str, words)],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
        env=daemon.environment(LLMPROC_NO_AUTOSTART="1"),
    )  # fmt: skip


def turns(count, *more):
    return script(*[COUNT] * count, *more)


def used(client, pid, resource):
    rows = client.call("proc.limits", pid=pid)["limits"]
    return next(row["used"] for row in rows if row["resource"] == resource)


def books(strict):
    return strict._ask("books")


def tree(*tools):
    """A program that may make children which may make children."""
    return program(*tools, tools={"child_access": "admin"}, file_descriptor={"enabled": False})


def dollars(usage):
    prices = zip(USAGE, (10, 50, 1, 12.5), strict=True)
    return sum(usage[name] * price for name, price in prices) / 1e6


def test_a_tree_adds_up_to_the_endpoints_books(client, strict):
    """IN, OUT and cache tokens of all processes together, and the cost at the root."""
    before = books(strict)
    spawned = script(use("spawn", prompt=turns(1, "!say c")), "!say b")
    text = script(use("fork", prompts=[turns(3, "!say a"), spawned]), "!say done")
    pid, row = client.finish(tree("calculator", "fork", "spawn"), text)
    assert row["status"] == 0
    rows = client.call("proc.list", all=True)["procs"]
    after = books(strict)
    total = {name: sum(one["usage"][name] for one in rows) for name in USAGE}
    assert total == {name: after[name] - before[name] for name in USAGE}
    assert row["cost_usd"] == pytest.approx(dollars(total), abs=1e-7)
    assert client.get(pid)["cost_usd"] == row["cost_usd"] == used(client, pid, "cost_usd")
    assert sum(one["turns"] for one in rows) == used(client, pid, "turns")


@pytest.mark.parametrize(("resource", "most"), [("tokens", 6000), ("turns", 8), ("cost_usd", 0.1)])
def test_parallel_children_do_not_overshoot(client, strict, resource, most):
    """They end with 152, and the endpoint was not asked for more. The parent may have room for a word."""
    before = books(strict)
    made = {**tree("calculator", "fork"), "parameters": {"max_tokens": 1000}}
    made["model"] |= {"max_iterations": 50}
    made["prompt"] = {"system": f"<script>{turns(30)}</script>"}
    pid, row = client.finish(made, use("fork", prompts=["go"] * 5), limits={resource: most})
    assert row["status"] in {0, 152}
    rows = [one for one in client.call("proc.list", all=True)["procs"] if one["pid"] != 1]
    assert [one["status"] for one in rows if one["pid"] != pid] == [152] * 5
    assert most / 2 <= used(client, pid, resource) <= most
    after = books(strict)
    assert sum(after[name] - before[name] for name in USAGE) == used(client, pid, "tokens")


def test_a_soft_limit_gives_one_last_turn(client, strict):
    """The model is told; calls are answered with an error; then 152."""
    text = turns(9)
    pid, row = client.finish(program("calculator"), text, limits={"turns": "2:9"})
    assert (row["status"], client.get(pid)["turns"]) == (152, 3)
    kinds = [event["which"] for event in client.events(pid, types=["limit"])]
    assert kinds == ["soft"]
    assert any(event["signal"] == "XCPU" for event in client.events(pid, types=["signal"]))


def test_limits_hold_across_kill_9(fresh):
    """What was used is not forgotten, nor what a removed child has used."""
    fresh.config.write_text(LIMITED.format(model=MODEL))
    fresh.start()
    with fresh.client() as client:
        limits = {"turns": "5:6", "tokens": "1M"}
        pid = client.spawn(tree("calculator", "spawn"), interactive=True, limits=limits)
        client.run(pid, script(use("spawn", prompt=turns(1)), "!say ok"))
        child = client.call("proc.list", all=True, pids=[pid + 1])["procs"][0]
        client.call("proc.remove", pids=[child["pid"]])
        before = client.call("proc.limits", pid=pid)["limits"]
    fresh.restart()
    with fresh.client() as client:
        after = client.call("proc.limits", pid=pid)["limits"]
        assert [row for row in after if row["resource"] != "wall"] == [
            row for row in before if row["resource"] != "wall"
        ]
        assert used(client, pid, "turns") == 4
        client.run(pid, turns(9))
        assert (client.wait(pid)["status"], used(client, pid, "turns")) == (152, 6)


def test_a_fork_bomb_meets_the_configs_limits(client):
    """EAGAIN to the model; the tree ends, and never had more than it may."""
    bomb = script(*[use("fork", prompts=["again"] * 8)] * 2, "!say boom")
    made = {**tree("fork"), "prompt": {"system": f"<script>{bomb}</script>"}}
    pid, _ = client.finish(made, "go")
    rows = [row for row in client.call("proc.list", all=True)["procs"] if row["pid"] != 1]
    assert all(row["status"] == 0 for row in rows)
    refusals = [text for row in rows for text in client.results(row["pid"]) if "EAGAIN" in text]
    assert refusals
    assert max(depth(rows, row["pid"]) for row in rows) == 4
    assert used(client, pid, "procs") == 0


def depth(rows, pid):
    births = {row["pid"]: row["birth"] for row in rows}
    count = 0
    while pid in births:
        pid, count = births[pid], count + 1
    return count


def test_an_unknown_price_is_refused_by_name(client):
    """Under a cost limit; without one its cost is null."""
    other = program(model={"name": "nobody-knows"})
    with refused("EINVAL", "nobody-knows", "not known"):
        client.spawn(other, "!say hi", limits={"cost_usd": 1})
    _, row = client.finish(other, "!say hi")
    assert row["cost_usd"] is None


def test_the_command_line_shows_and_changes_limits(daemon, client):
    """As a table and as JSON; COST in `ps`."""
    pid = ctl(daemon, "spawn", "-i", "--limit", "turns=5:10", "--limit", "fd_bytes=1G", "demo").stdout.strip()
    told = ctl(daemon, "limits", pid, "tokens=200k:400k", "cost_usd=none").stdout.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in told}
    assert cells["RESOURCE"] == ["SOFT", "HARD", "USED"]
    assert cells["turns"] == ["5", "10", "0"]
    assert cells["tokens"] == ["200k", "400k", "0"]
    assert cells["fd_bytes"] == ["-", "1.0G", "0"]
    assert cells["procs"] == ["-", "40", "1"]
    shown = [json.loads(line) for line in ctl(daemon, "limits", "--json", pid).stdout.splitlines()]
    assert {row["resource"] for row in shown} == cells.keys() - {"RESOURCE"}
    assert ctl(daemon, "limits", pid, "turns=9:5").returncode == 1
    costly = client.spawn(program("calculator"), turns(9))
    client.wait(costly)
    cost = ctl(daemon, "ps", "-a", "--no-headers", "-o", "cost", costly).stdout.strip()
    assert cost.startswith("$0.0")
    assert ctl(daemon, "ps", "--no-headers", "-o", "cost", pid).stdout.strip() in {"-", "$0.00"}


def test_run_exits_with_152(daemon):
    """As the process did."""
    ended = ctl(daemon, "run", "-n", "--limit", "turns=1", "demo", turns(3))
    assert ended.returncode == 152
    assert "turns limit" in ended.stderr
