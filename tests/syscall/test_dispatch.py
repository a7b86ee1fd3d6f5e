"""The method table: every call has a handler and schemas, and a wrong argument is named."""

import json

import msgspec
import pytest
from machinekit import refused, table

from llmprocd.abi import calls
from llmprocd.abi.errno import Errno
from llmprocd.abi.types import Usage
from llmprocd.abi.wire import Answer
from llmprocd.syscall import dispatch

CONTRACT = {
    "hello",
    "sys.api",
    "sys.status",
    "sys.reload",
    "sys.stop",
    "proc.spawn",
    "proc.run",
    "proc.list",
    "proc.get",
    "proc.signal",
    "proc.wait",
    "proc.send",
    "proc.fork",
    "proc.goto",
    "proc.exec",
    "proc.limits",
    "proc.renice",
    "proc.rename",
    "proc.remove",
    "proc.history",
    "fd.list",
    "fd.stat",
    "fd.read",
    "fd.write",
    "events.read",
    "events.subscribe",
    "events.unsubscribe",
    "prog.list",
    "prog.check",
}


def test_the_methods_are_at_least_those_of_the_contract():
    assert set(dispatch.SYSCALLS) >= CONTRACT


@pytest.mark.parametrize("call", calls.CALLS, ids=lambda call: call.method)
def test_every_call_has_a_handler_help_and_schemas(call):
    assert call in dispatch.HANDLERS
    decoder, handler = dispatch.SYSCALLS[call.method]
    assert handler is dispatch.HANDLERS[call]
    assert decoder.type is call
    info = dispatch._method(call)
    assert info.name == call.method
    assert info.help.endswith(".")
    params = json.loads(info.params)
    named = params["$defs"][params["$ref"].rpartition("/")[2]]
    assert set(named["properties"]) == {field.encode_name for field in msgspec.structs.fields(call)}
    assert named["additionalProperties"] is False
    assert "$ref" in json.loads(info.result)


def test_no_two_calls_have_one_name():
    names = [call.method for call in calls.CALLS]
    assert len(names) == len(set(names))
    assert set(dispatch.HANDLERS) == set(calls.CALLS)


async def test_the_method_table_is_what_is_answered(machine):
    answer = await machine.told("sys.api")
    assert [row["name"] for row in answer["methods"]] == [call.method for call in calls.CALLS]
    waits = {row["name"] for row in answer["methods"] if row["waits"]}
    waiting = {"proc.run", "proc.wait", "fd.read", "events.read", "store.gc", "local.up", "local.down"}
    assert waits == waiting


async def test_calls_that_need_not_wait_take_effect_at_once(machine):
    """Only so are calls that follow one another on a connection answered in the order sent."""
    pid = await machine.spawn(interactive=True)
    for method, params in (
        ("proc.send", {"text": "!sleep 9"}),
        ("proc.list", {}),
        ("proc.rename", {"name": "x"}),
        ("proc.renice", {"nice": 3}),
        ("proc.signal", {"signal": "STOP"}),
        ("proc.fork", {}),
        ("fd.list", {}),
        ("fd.write", {"data": "more"}),
        ("proc.limits", {}),
        ("sys.status", {}),
    ):
        whose = {} if method in {"proc.list", "sys.status"} else {"pid": pid}
        assert isinstance(machine.begin(method, **whose, **params), Answer), method


async def test_an_unknown_method_is_enosys(machine):
    with refused(Errno.ENOSYS, "no such method: proc.destroy"):
        machine.begin("proc.destroy")


@pytest.mark.parametrize("params", [b"", b"\x80"])
async def test_no_arguments_are_an_empty_map(machine, params):
    assert machine.door.call(machine.user, "proc.list", params).result == calls.ProcList([])


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("proc.send", {"pid": 7, "txt": "a"}, ["unknown argument", "txt"]),
        ("proc.send", {}, ["missing argument", "pid"]),
        ("proc.send", {"pid": "7"}, ["pid", "int", "str"]),
        ("proc.send", {"pid": None}, ["pid", "int"]),
        ("proc.send", {"pid": 7.0}, ["pid"]),
        ("proc.send", {"pid": True}, ["pid"]),
        ("proc.spawn", {}, ["missing argument", "program"]),
        ("proc.spawn", {"program": 3}, ["program"]),
        ("proc.spawn", {"program": "x", "nice": 20}, ["nice"]),
        ("proc.spawn", {"program": "x", "nice": -21}, ["nice"]),
        ("proc.spawn", {"program": "x", "env": {"A": 1}}, ["env"]),
        ("proc.spawn", {"program": "x", "fds": "fd:3"}, ["fds"]),
        ("proc.spawn", {"program": "x", "fds": [3]}, ["fds[0]"]),
        ("proc.run", {"pid": 7, "max_iterations": 0}, ["max_iterations"]),
        ("proc.run", {"pid": 7, "timeout_ms": -1}, ["timeout_ms"]),
        ("proc.wait", {"pids": 7}, ["pids"]),
        ("proc.wait", {"pids": [7, "8"]}, ["pids[1]"]),
        ("proc.wait", {"pids": []}, ["pids", "empty"]),
        ("proc.history", {"pid": 7, "limit": 0}, ["limit"]),
        ("proc.list", {"all": 1}, ["all"]),
        ("fd.read", {"pid": 7, "fd": 1, "offset": -1}, ["offset"]),
        ("fd.read", {"pid": 7, "fd": 1, "count": "x"}, ["count"]),
        ("fd.read", {"pid": 7, "fd": None}, ["fd"]),
        ("fd.read", {"pid": 7, "fd": 1, "page": 0}, ["page"]),
        ("events.read", {"max": 0}, ["max"]),
        ("events.read", {"types": ["exits"]}, ["types", "'exits'"]),
        ("events.subscribe", {"types": ["exits"]}, ["types", "'exits'"]),
        ("hello", {"errors": "json"}, ["errors", "'json'", "array, nvim, string"]),
    ],
)
async def test_a_wrong_argument_is_einval_and_named(machine, method, params, words):
    with refused(Errno.EINVAL, *words) as told:
        await machine.call(method, **params)
    assert "`$" not in told.error.text, "that is the decoder's language, not a stranger's"


@pytest.mark.parametrize(
    "params", [b"\x93\x01", b"\xc1", b"\x81\xa3pid", b"\x81\xa1\xff\x01", b"\x90", b"\x07", b"\xc0"]
)
async def test_what_is_no_map_is_einval(machine, params):
    with refused(Errno.EINVAL):
        machine.door.call(machine.user, "proc.send", params)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("limits", {"wall": "soon"}, ["limits.wall", "'soon'", "90s, 10m, 2h"]),
        ("limits", {"wall": "9:5"}, ["limits.wall", "above the hard one"]),
        ("limits", {"wall": -1}, ["limits.wall"]),
        ("limits", {"wall": True}, ["limits.wall"]),
        ("limits", {"wall": None}, ["limits.wall"]),
        ("limits", {"wall": [1]}, ["limits.wall"]),
        ("limits", {"wall": {}}, ["limits.wall"]),
        ("limits", {"sheep": 3}, ["limits", "'sheep'"]),
        ("access", "root", ["access", "'root'", "read, write, admin"]),
        ("access", "READ ", ["access"]),
        ("name", "a/b", ["name"]),
        ("name", "a\nb", ["name"]),
        ("name", "\x1b[31m", ["name"]),
        ("name", "12", ["name"]),
        ("name", " x", ["name"]),
        ("name", "%x", ["name"]),
        ("prompt", "", ["prompt", "blank"]),
        ("prompt", " \n\t", ["prompt", "blank"]),
        ("fds", ["fd:3"], ["fds", "7/fd:3"]),
        ("request_id", 5, ["request_id", "text or bytes"]),
        ("stdin_path", "/no/such/file", ["stdin_path", "/no/such/file", "No such file"]),
        ("stdin_path", "/", ["stdin_path"]),
        ("stdin_path", "/x\0y", ["stdin_path"]),
    ],
)
async def test_a_wrong_value_at_spawn_is_einval_and_changes_nothing(machine, field, value, words):
    with refused(Errno.EINVAL, *words):
        await machine.spawn(table(), **{"interactive": True, field: value})
    assert machine.m.kernel.procs == {}


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("proc.send", {"text": " "}, ["text", "blank"]),
        ("proc.send", {}, ["text"]),
        ("proc.run", {"prompt": ""}, ["text", "blank"]),
        ("proc.run", {}, ["prompt", "no user message"]),
        ("proc.signal", {"signal": "STAB"}, ["unknown signal: STAB"]),
        ("proc.signal", {"signal": 99}, ["unknown signal: 99"]),
        ("proc.fork", {"prompts": ["good", " "]}, ["prompts", "blank"]),
        ("proc.fork", {"at": "12"}, ["at", "m42"]),
        ("proc.goto", {"to": "x"}, ["to", "'x'", "m42"]),
        ("proc.history", {"after": "9"}, ["after", "'9'"]),
        ("proc.rename", {"name": "a\x07"}, ["name"]),
        ("proc.limits", {"set": {"wall": "never"}}, ["limits.wall"]),
        ("fd.read", {"fd": 1, "page": 9}, ["page", "9", "beyond the last"]),
        ("fd.read", {"fd": 1, "line": 9}, ["line", "9", "beyond the last"]),
        ("fd.write", {"data": 3}, ["data", "bytes or text"]),
        ("fd.write", {"data": b"\xff"}, ["data", "UTF-8"]),
        ("fd.write", {"data": ""}, ["data", "empty"]),
        ("fd.write", {"data": "  "}, ["blank"]),
    ],
)
async def test_a_wrong_value_for_a_process_is_einval_and_changes_nothing(machine, method, params, words):
    pid = await machine.spawn(interactive=True)
    before = machine.proc(pid)
    with refused(Errno.EINVAL, *words):
        await machine.call(method, pid=pid, **params)
    assert machine.m.kernel.procs == {pid: before}


@pytest.mark.parametrize(
    "method",
    [
        ("proc.run", {"prompt": "a"}),
        ("proc.get", {}),
        ("proc.signal", {"signal": 0}),
        ("proc.send", {"text": "a"}),
        ("proc.fork", {}),
        ("proc.goto", {"to": "m1"}),
        ("proc.exec", {"program": "x"}),
        ("proc.limits", {}),
        ("proc.renice", {"nice": 1}),
        ("proc.rename", {"name": "x"}),
        ("proc.history", {}),
        ("fd.list", {}),
        ("fd.stat", {"fd": 1}),
        ("fd.read", {"fd": 1}),
        ("fd.write", {"data": "x"}),
    ],
    ids=lambda pair: pair[0],
)
@pytest.mark.parametrize("pid", [99, 0, -7, 2**62])
async def test_an_unknown_pid_is_esrch(machine, method, pid):
    name, more = method
    if name == "proc.fork" and pid == 0:
        more = {}
    with refused(Errno.ESRCH, f"no such process: {pid}"):
        await machine.call(name, pid=pid, **more)


@pytest.mark.parametrize("method", ["proc.wait", "proc.remove"])
async def test_an_unknown_pid_among_others_is_esrch(machine, method):
    ended = await machine.finish(table(), "!say hi")
    with refused(Errno.ESRCH, "no such process: 99"):
        await machine.call(method, pids=[ended.pid, 99])
    assert ended.pid in machine.m.kernel.procs


def test_usage_adds_up():
    """The four counters of the contract, none of them lost."""
    assert Usage(1, 2, 3, 4) + Usage(10, 20, 30, 40) == Usage(11, 22, 33, 44)
