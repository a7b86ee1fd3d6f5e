"""Who calls, and what he may do: the whole matrix of callers, methods and targets."""

import msgspec
import pytest
import trio
from machinekit import Pushed, refused, running, table

from llmprocd.abi import calls
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Access

ANY, USER = "any", "user"
READ, WRITE, ADMIN = Access.READ, Access.WRITE, Access.ADMIN

NEEDS = {
    "hello": (ANY, {}),
    "sys.api": (ANY, {}),
    "sys.status": (READ, {}),
    "sys.reload": (USER, {}),
    "sys.stop": (USER, {}),
    "proc.spawn": (ADMIN, {"program": table(), "interactive": True}),
    "proc.run": (ADMIN, {"pid": int, "prompt": "hi", "timeout_ms": 0}),
    "proc.list": (READ, {}),
    "proc.get": (READ, {"pid": int}),
    "proc.signal": (ADMIN, {"pid": int, "signal": "STOP"}),
    "proc.wait": (READ, {"pids": [int], "timeout_ms": 0}),
    "proc.send": (WRITE, {"pid": int, "text": "hi"}),
    "proc.fork": (ADMIN, {"pid": int}),
    "proc.goto": (ADMIN, {"pid": int, "to": "m1"}),
    "proc.exec": (ADMIN, {"pid": int, "program": table()}),
    "proc.limits": (READ, {"pid": int}),
    "proc.limits set": (USER, {"pid": int, "set": {"wall": 9}}),
    "proc.renice": (ADMIN, {"pid": int, "nice": 3}),
    "proc.rename": (ADMIN, {"pid": int, "name": "x"}),
    "proc.remove": (ADMIN, {"pids": [int]}),
    "proc.history": (READ, {"pid": int}),
    "fd.list": (READ, {"pid": int}),
    "fd.stat": (READ, {"pid": int, "fd": 1}),
    "fd.read": (READ, {"pid": int, "fd": 1}),
    "fd.write": (WRITE, {"pid": int, "data": "hi"}),
    "events.read": (READ, {}),
    "events.subscribe": (READ, {}),
    "events.unsubscribe": (ANY, {"sub": 1}),
    "prog.list": (READ, {}),
    "prog.check": (READ, {"path": "good"}),
    "store.gc": (USER, {}),
    "local.up": (USER, {"path": "/nowhere"}),
    "local.down": (USER, {}),
    "local.status": (READ, {}),
}
"""What a tool's process must be allowed for each method, and arguments; `int` is the target's pid."""

CALLERS = {"user": None, "read": READ, "write": WRITE, "admin": ADMIN}


def test_the_matrix_names_every_method():
    assert {name.partition(" ")[0] for name in NEEDS} == {call.method for call in calls.CALLS}


def allowed(need, level, target):
    """What the contract says: a user everything; a tool its own subtree, by its level, never the daemon."""
    if level is None or need == ANY:
        return True
    return need != USER and level >= need and target != "foreign"


async def family(house, level):
    """A process of an access level, a child of it, and a stranger, each with one message."""
    pids = {}
    for name in ("own", "child", "foreign"):
        pids[name] = await house.spawn(interactive=True, access=(ADMIN if level is None else level).word)
        await house.call("proc.run", pid=pids[name], prompt="!say hi")
    child = msgspec.structs.replace(house.proc(pids["child"]), ppid=pids["own"], birth=pids["own"])
    house.m.kernel.put(child)
    house.m.commit("test")
    return pids


def filled(params, pid):
    return {key: pid if value is int else [pid] if value == [int] else value for key, value in params.items()}


@pytest.mark.parametrize("target", ["own", "child", "foreign"])
@pytest.mark.parametrize("who", CALLERS)
@pytest.mark.parametrize("method", NEEDS)
async def test_who_may_do_what_to_whom(autojump_clock, machine, method, who, target):
    need, params = NEEDS[method]
    level = CALLERS[who]
    pids = await family(machine, level)
    targeted = int in params.values() or [int] in params.values()
    expected = allowed(need, level, target if targeted else "own")
    caller = machine.caller(None if level is None else pids["own"])
    before, ticket = dict(machine.m.kernel.procs), machine.m.ticket
    verdict = None
    try:
        await machine.call(method.partition(" ")[0], by=caller, **filled(params, pids[target]))
    except KernelError as error:
        verdict = error.errno
    assert (verdict is not Errno.EPERM) == expected, f"{who} {method} {target}: {verdict}"
    if not expected:
        assert (machine.m.kernel.procs, machine.m.ticket) == (before, ticket), (
            "a refused call has changed something"
        )


async def test_the_words_of_a_refusal_by_level(machine):
    pid = await machine.spawn(interactive=True, access="read")
    with refused(Errno.EPERM, "Access denied: this call requires admin access but process has read"):
        machine.begin("proc.fork", by=machine.caller(pid), pid=pid)


async def test_the_words_of_a_refusal_by_place(machine):
    mine, other = await machine.spawn(interactive=True), await machine.spawn(interactive=True)
    with refused(Errno.EPERM, f"process {other} is not in the subtree of process {mine}"):
        machine.begin("proc.signal", by=machine.caller(mine), pid=other, signal="KILL")


async def test_a_tool_cannot_signal_the_daemon(machine):
    pid = await machine.spawn(interactive=True)
    for target in (1, -1):
        with refused(Errno.EPERM):
            machine.begin("proc.signal", by=machine.caller(pid), pid=target, signal="TERM")


async def test_a_tool_of_an_ended_process_may_nothing(machine):
    """What a killed process left running must not go on in its name."""
    pid = await machine.spawn(interactive=True)
    caller = machine.caller(pid)
    await machine.call("proc.signal", pid=pid, signal="KILL")
    for method in ("proc.list", "sys.status", "proc.spawn"):
        more = {"program": table()} if method == "proc.spawn" else {}
        with refused(Errno.EPERM, f"process {pid}, whose tool this is, has ended"):
            await machine.call(method, by=caller, **more)
    await machine.call("proc.remove", pids=[pid])
    with refused(Errno.EPERM):
        await machine.call("proc.list", by=caller)


async def test_a_tool_sees_its_own_subtree_and_nothing_else(autojump_clock, machine):
    pids = await family(machine, READ)
    caller = machine.caller(pids["own"])
    mine = {pids["own"], pids["child"]}
    for more in ({}, {"all": True}, {"pids": list(pids.values())}, {"pids": [1], "all": True}):
        listed = {row.pid for row in (await machine.call("proc.list", by=caller, **more)).procs}
        assert listed <= mine, more
        assert listed == mine or 1 in more.get("pids", ())
    assert {row.pid for row in (await machine.call("fd.list", by=caller)).fds} == mine
    await trio.sleep(1)
    for more in ({}, {"pids": list(pids.values())}):
        page = await machine.call("events.read", by=caller, after_seq=0, **more)
        assert {event["pid"] for event in page.events} == mine, more
    page = await machine.call("events.read", by=caller, after_seq=0, pids=[pids["foreign"]])
    assert page.events == []


async def test_a_subscription_of_a_tool_shows_its_subtree_only(autojump_clock, machine):
    pids = await family(machine, ADMIN)
    push = Pushed()
    caller = machine.caller(pids["own"], push)
    await machine.call("events.subscribe", by=caller, after_seq=0)
    grandchild = (await machine.call("proc.fork", by=caller, pid=pids["child"])).pids[0]
    await machine.call("proc.signal", pid=pids["foreign"], signal="KILL")
    await trio.sleep(1)
    seen = {event["pid"] for _, params, _ in push.notices for event in params["events"]}
    assert seen == {pids["own"], pids["child"], grandchild}
    machine.door.hang_up(caller)


async def test_what_a_tool_starts_is_below_it_and_no_higher(autojump_clock, machine):
    """Born in its subtree, and with the ceiling of children that a model makes."""
    pids = await family(machine, ADMIN)
    caller = machine.caller(pids["own"])
    for method, params in (
        ("proc.spawn", {"program": table(), "interactive": True, "access": "admin"}),
        ("proc.fork", {"pid": pids["own"]}),
        ("proc.fork", {"pid": pids["child"]}),
    ):
        answer = await machine.call(method, by=caller, **params)
        made = machine.proc(answer.pid if method == "proc.spawn" else answer.pids[0])
        assert (made.ppid, made.birth) == (pids["own"], pids["own"])
        assert made.access is WRITE, "child_access is write unless the program says more"
    user = machine.proc(await machine.spawn(interactive=True))
    assert (user.ppid, user.access) == (1, ADMIN)


async def test_a_tool_hands_on_only_what_it_may_read(autojump_clock, machine):
    program = table("calculator", file_descriptor={"max_direct_output_chars": 10, "default_page_size": 10})
    call = '!calculator {"expression":"10**30"}'
    pids = []
    for _ in range(2):
        pid = await machine.spawn(program, interactive=True)
        await machine.call("proc.run", pid=pid, prompt=f"{call}\n!say hi")
        assert list(machine.proc(pid).fds) == [3]
        pids.append(pid)
    mine, other = pids
    caller = machine.caller(mine)
    with refused(Errno.EPERM, "fds", f"process {other} is not in your subtree"):
        await machine.call("proc.spawn", by=caller, program=table(), fds=[f"{other}/fd:3"], interactive=True)
    with refused(Errno.EBADF, "fd:9"):
        await machine.call("proc.spawn", by=caller, program=table(), fds=["fd:9"], interactive=True)
    with refused(Errno.EINVAL, "fds", "twice"):
        await machine.call(
            "proc.spawn", by=caller, program=table(), fds=["fd:3", f"{mine}/fd:3"], interactive=True
        )
    made = await machine.call("proc.spawn", by=caller, program=table(), fds=["fd:3"], interactive=True)
    assert machine.proc(made.pid).fds == machine.proc(mine).fds
    by_user = await machine.call("proc.spawn", program=table(), fds=[f"{other}/fd:3"], interactive=True)
    assert machine.proc(by_user.pid).fds == machine.proc(other).fds


# --- at the door ------------------------------------------------------------------------------------


class Owners:
    """A spawner that knows whose tools some operating-system processes are."""

    def __init__(self, known):
        self.known = known

    async def kill_all(self, owner):
        """Kill none."""

    async def owner(self, os_pid):
        if os_pid not in self.known:
            raise ProcessLookupError(os_pid)
        return self.known[os_pid]


async def test_a_peer_is_a_user_or_the_tool_of_a_process():
    async with running() as house:
        house.m.spawner = Owners({10: None, 11: 7})
        user = await house.door.admit(10, house.m.uid, 5, Pushed())
        assert (user.proc, user.uid, user.gid, str(user)) == (
            None,
            house.m.uid,
            5,
            f"uid {house.m.uid} pid 10",
        )
        tool = await house.door.admit(11, house.m.uid, 5, Pushed())
        assert (tool.proc, str(tool)) == (7, "process 7")


async def test_a_peer_that_is_gone_is_refused():
    """Who cannot be looked up may have been anybody's tool."""
    async with running() as house:
        house.m.spawner = Owners({})
        with refused(Errno.EPERM, "the peer (pid 10) is gone"):
            await house.door.admit(10, house.m.uid, 5, Pushed())


@pytest.mark.parametrize(
    ("shared", "uid", "welcome"), [(False, 4242, False), (False, 0, True), (True, 4242, True)]
)
async def test_another_user_comes_in_only_where_the_socket_is_shared(shared, uid, welcome):
    async with running() as house:
        house.m.shared = shared
        house.m.uid = 1000
        if welcome:
            assert (await house.door.admit(10, uid, 5, Pushed())).uid == uid
        else:
            with refused(Errno.EPERM, "this daemon serves uid 1000, not uid 4242"):
                await house.door.admit(10, uid, 5, Pushed())


async def test_processes_of_two_users_keep_their_request_ids_apart(autojump_clock, machine):
    other = machine.caller()
    other.uid = 4242
    mine = await machine.call("proc.spawn", program=table(), interactive=True, request_id="a")
    theirs = await machine.call("proc.spawn", by=other, program=table(), interactive=True, request_id="a")
    assert mine.pid != theirs.pid
    assert machine.proc(theirs.pid).uid == 4242
