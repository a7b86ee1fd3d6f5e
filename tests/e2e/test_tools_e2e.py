"""Tools as models call them, and what their processes may do at the socket."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from e2ekit import ALL_TOOLS, program, refused, script, texts, use

EVERYTHING = program(*ALL_TOOLS)
BASH = program("bash", "fork", "exit")


def answers(client, prog, *calls, **more):
    """The tool results of a process that makes these calls, one a turn, and ends well."""
    prog = {**prog, "model": {**prog["model"], "max_iterations": len(calls) + 2}}
    pid, row = client.finish(prog, script(*calls, "!say ok"), **more)
    assert row["message"] == "ok", client.get(pid)["reason"]
    return client.results(pid)


def errors(client, pid):
    """Which tool results are marked as errors."""
    blocks = [block for message in client.history(pid) for block in message["content"]]
    return [block.get("is_error", False) for block in blocks if block["type"] == "tool_result"]


# --- each tool --------------------------------------------------------------------------------------


def test_files(client, tmp_path):
    """write, read, edit, list, glob and grep see the same folder."""
    found = answers(
        client,
        EVERYTHING,
        use("write_file", file_path="src/a.txt", content="one\ntwo\n"),
        use("read_file", file_path="src/a.txt"),
        use("edit_file", file_path="src/a.txt", old_text="two", new_text="2"),
        use("read_file", file_path=str(tmp_path / "src/a.txt")),
        use("list_dir", directory_path="."),
        use("glob", pattern="**/*.txt"),
        use("grep", pattern="^2$", path="src"),
        cwd=str(tmp_path),
    )
    assert found[1] == "one\ntwo\n"
    assert found[3] == "one\n2\n"
    assert "d src" in found[4]
    assert found[5].strip().endswith("src/a.txt")
    assert found[6].strip().endswith("a.txt:2:2")


def test_calculator_and_stderr(client):
    """Numbers; and a line into fd 2, which the model does not read back."""
    prompt = script(use("calculator", expression="6*7"), use("write_stderr", message="note this"), "!say ok")
    pid, _ = client.finish(EVERYTHING, prompt)
    assert client.results(pid) == ["42", "written"]
    assert client.read(pid, 2) == b"note this\n"
    assert client.events(pid, types=["stderr"])[0]["text"] == "note this"


def test_bash(client, tmp_path):
    """stdout and stderr together, then the status; a command that fails is no error of the tool."""
    pid, _ = client.finish(
        EVERYTHING, script("!bash echo out; echo err >&2; exit 3", "!say ok"), cwd=str(tmp_path)
    )
    assert client.result(pid) == "out\nerr\n[exit 3]"
    assert errors(client, pid) == [False]


FAILURES = {
    "a file that is not there": (use("read_file", file_path="/nowhere/x"), "File not found: /nowhere/x"),
    "a folder that is not there": (use("list_dir", directory_path="/nowhere"), "Directory not found"),
    "a missing argument": (use("read_file"), "file_path"),
    "an unknown argument": (use("read_file", file_path="x", color="red"), "color"),
    "a wrong type": (use("bash", command=7), "command"),
    "an unknown tool": ("!tool frobnicate {}", "not available: frobnicate"),
    "a text that is not there": (
        use("edit_file", file_path="/etc/hostname", old_text="@@", new_text="x"),
        "not found",
    ),
    "no arithmetic": (use("calculator", expression="import os"), ""),
    "a time limit": (use("bash", command="sleep 30", timeout_s=0.2), "timed out after 0.2 s"),
    "a bad pattern": (use("grep", pattern="("), "pattern"),
    "a status out of range": (use("exit", status=124), "status"),
    "a bad signal": (use("kill", pid=1, signal="WINCH"), ""),
    "a blank log line": (use("write_stderr", message=" "), "blank"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_an_error_result_and_the_run_goes_on(client, case):
    """The text says what was wrong."""
    call, words = FAILURES[case]
    pid, row = client.finish(EVERYTHING, f"{call}\n!say on")
    assert row["message"] == "on"
    assert errors(client, pid) == [True]
    assert words in client.result(pid)


def test_input_that_is_no_json_is_an_error_result(client):
    """Nothing is run; the conversation stays valid."""
    pid, row = client.finish(BASH, "!badjson bash\n!say on")
    assert row["message"] == "on"
    assert "JSON" in client.result(pid)


def test_an_alias_is_what_the_model_calls(client, strict):
    """Name and description are the program's."""
    prog = program({"name": "write_stderr", "alias": "write_log", "description": "Log it."})
    pid, _ = client.finish(prog, f"{use('write_log', message='hello')}\n!say ok")
    assert client.read(pid, 2) == b"hello\n"
    (tool,) = [tool for tool in json.loads(strict.bodies()[0])["tools"] if tool["name"] == "write_log"]
    assert tool["description"] == "Log it."


def test_tools_of_one_turn_run_side_by_side(client, tmp_path):
    """Each waits for the other: in turn they would never end. Results come in the order asked."""
    meet = "touch {me}; while [ ! -e {other} ]; do sleep 0.02; done; echo {me}"
    prompt = script(
        "!bash " + meet.format(me="a", other="b"), "!& !bash " + meet.format(me="b", other="a"), "!say met"
    )
    pid, row = client.finish(BASH, prompt, cwd=str(tmp_path))
    assert row["message"] == "met"
    assert client.results(pid) == ["a\n[exit 0]", "b\n[exit 0]"]
    assert len(client.history(pid)[2]["content"]) == 2


def test_exit_comes_last(client, tmp_path):
    """Tools beside it end first; the conversation stays valid and can be forked."""
    prompt = '!exit {"status": 5, "message": "bye"}\n!& !bash echo ran >> log'
    pid, row = client.finish(BASH, prompt, cwd=str(tmp_path))
    assert (row["status"], row["message"]) == (5, "bye")
    assert (tmp_path / "log").read_text() == "ran\n"
    (child,) = client.call("proc.fork", pid=pid, prompts=["!say after"])["pids"]
    assert client.wait(child)["message"] == "after"


# --- access levels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "denied"), [("read", {"bash", "fork", "write_file"}), ("write", {"fork"}), ("admin", set())]
)
def test_a_tool_above_the_ceiling_is_denied(client, strict, tmp_path, level, denied):
    """The text is LLMProc's; the list of tools that is sent does not depend on the level."""
    prog = program("bash", "fork", "write_file", "read_file")
    calls = {
        "bash": "!bash echo x",
        "fork": use("fork", prompts=["!say c"]),
        "write_file": use("write_file", file_path="w", content="x"),
        "read_file": use("read_file", file_path="/etc/hostname"),
    }
    pid, row = client.finish(prog, script(*calls.values(), "!say on"), access=level, cwd=str(tmp_path))
    assert row["message"] == "on"
    for name, result in zip(calls, client.results(pid), strict=True):
        assert result.startswith("Access denied: this tool requires") == (name in denied), result
        assert not result.startswith("Access denied") or result.endswith(f"but process has {level}")
    tools = [tool["name"] for tool in json.loads(strict.bodies()[0])["tools"]]
    assert set(calls) <= set(tools)


def test_ceilings_only_go_down_a_tree(client):
    """A child has at most what its parent has, and what the program allows."""
    generous = program("fork", "spawn", tools={"child_access": "admin"})
    prompt = script(use("fork", prompts=["!say c"]), use("spawn", prompt="!say d"), "!say ok")
    for level in ("admin", "read"):
        prog = program("fork", "spawn", {"name": "bash", "access": "read"}, tools={"child_access": level})
        pid, _ = client.finish(prog, prompt)
        rows = [row for row in client.call("proc.list", all=True)["procs"] if row["birth"] == pid]
        assert [row["access"] for row in rows] == [level, level]
    pid, _ = client.finish(generous, prompt, access="write")
    assert [row for row in client.call("proc.list", all=True)["procs"] if row["birth"] == pid] == []


def test_a_program_can_lower_what_a_tool_needs(client):
    """`access` of a tool table."""
    prog = program({"name": "bash", "access": "read"})
    pid, _ = client.finish(prog, "!bash echo allowed\n!say ok", access="read")
    assert client.result(pid) == "allowed\n[exit 0]"


# --- a tool that calls the socket -------------------------------------------------------------------

CALLS = Path(__file__).with_name("callscript.py")


@pytest.fixture
def from_tool(client):
    """Calls the daemon from a command that a process of some access level runs; answers by call."""

    def from_tool(level, calls, **more):
        prog = program({"name": "bash", "access": "read"}, "spawn", tools={"child_access": "admin"})
        prog["file_descriptor"] = {"max_direct_output_chars": 200_000}
        command = f"{sys.executable} {CALLS} '{json.dumps(calls)}'"
        pid, _ = client.finish(prog, f"{use('bash', command=command)}\n!say ok", access=level, **more)
        text, _, status = client.result(pid).rpartition("\n")
        assert status == "[exit 0]", client.result(pid)
        return pid, json.loads(text)

    return from_tool


def own(pid):
    return {
        "proc.list": {}, "proc.get": {"pid": pid}, "proc.history": {"pid": pid}, "fd.list": {"pid": pid},
        "fd.read": {"pid": pid, "fd": 1}, "events.read": {"after_seq": 0}, "proc.limits": {"pid": pid},
    }  # fmt: skip


@pytest.mark.parametrize("level", ["read", "write", "admin"])
def test_a_tool_reads_its_own_subtree(from_tool, client, level):
    """`ps`, `history`, `cat`; it sees no other process."""
    other = client.spawn(program(), interactive=True)
    pid, found = from_tool(level, [[method, params] for method, params in own("self").items()])
    assert [answer for answer in found if "error" in answer] == []
    assert [row["pid"] for row in found[0]["procs"]] == [pid]
    assert {event["pid"] for event in found[5]["events"]} == {pid}
    assert client.get(other)["status"] is None


DANGEROUS = {
    "proc.signal": {"signal": "KILL"},
    "proc.send": {"text": "hello"},
    "proc.history": {},
    "proc.fork": {},
    "proc.goto": {"to": "m1"},
    "proc.get": {},
    "proc.rename": {"name": "mine"},
    "proc.renice": {"nice": 1},
    "proc.exec": {"program": {}},
    "proc.run": {"prompt": "x"},
    "fd.list": {},
    "fd.read": {"fd": 1},
    "fd.write": {"data": "x"},
    "proc.limits": {"set": {"wall": 1}},
}


@pytest.mark.parametrize("level", ["read", "admin"])
def test_other_trees_are_eperm(from_tool, client, level):
    """Whatever it asks; also init."""
    other = client.spawn(program(), interactive=True)
    calls = [[method, {"pid": other, **params}] for method, params in DANGEROUS.items()]
    calls += [["proc.wait", {"pids": [other], "timeout_ms": 1}], ["proc.remove", {"pids": [other]}]]
    calls += [
        ["proc.signal", {"pid": 1, "signal": "TERM"}],
        ["proc.spawn", {"program": "x", "fds": [f"{other}/fd:1"]}],
    ]
    _, found = from_tool(level, calls)
    names = {call[0]: answer.get("error") for call, answer in zip(calls[:-1], found[:-1], strict=True)}
    assert set(names.values()) == {"EPERM"}, names
    assert "error" in found[-1]
    assert client.get(other)["name"] == ""
    assert client.rests(other)["turns"] == 0


@pytest.mark.parametrize("level", ["read", "write", "admin"])
def test_the_daemon_is_eperm(from_tool, client, level):
    """Stop and reload are for people."""
    _, found = from_tool(level, [["sys.stop", {}], ["sys.reload", {}]])
    assert [answer["error"] for answer in found] == ["EPERM", "EPERM"]
    assert client.call("sys.status")["pid"]


@pytest.mark.parametrize(
    ("level", "allowed"),
    [("read", set()), ("write", {"proc.send"}), ("admin", {"proc.send", "proc.spawn", "proc.fork"})],
)
def test_what_each_level_may_do_in_its_own_tree(from_tool, level, allowed):
    """read looks, write sends too, admin spawns, forks and signals too."""
    calls = [
        ["proc.send", {"pid": "self", "text": "!say more", "close": True}],
        ["proc.spawn", {"program": "demo", "prompt": "!say x"}],
        ["proc.fork", {"pid": "self", "at": "last", "prompts": ["!say forked"]}],
    ]
    _, found = from_tool(level, calls)
    for (method, _), answer in zip(calls, found, strict=True):
        refusal = answer.get("error")
        if method in allowed:
            assert refusal in {None, "EPIPE"}, (method, answer)
        else:
            assert refusal == "EPERM", (method, answer)


def test_what_a_tool_spawns_is_its_processs_child(from_tool, client):
    """With at most its access; and it may signal it."""
    calls = [["proc.spawn", {"program": "demo", "interactive": True, "access": "admin"}]]
    pid, ((spawned),) = from_tool("admin", calls)
    row = client.get(spawned["pid"])
    assert (row["birth"], row["access"]) == (pid, "admin")
    client.signal(spawned["pid"], "KILL")


def test_hello_says_whose_tool_it_is(from_tool):
    """peer.proc is the LLM process."""
    pid, (greeting,) = from_tool("read", [["hello", {}]])
    assert greeting["peer"]["proc"] == pid


def test_a_daemonised_tool_is_still_a_tool(client, tmp_path):
    """setsid and a double fork change nothing; a limit or a daemon cannot be reached that way."""
    command = (
        f'setsid sh -c \'({sys.executable} {CALLS} "[[\\"sys.stop\\", {{}}]]" > out; touch done) &\'; '
        "while [ ! -e done ]; do sleep 0.02; done; cat out"
    )
    pid, _ = client.finish(program("bash"), f"{use('bash', command=command)}\n!say ok", cwd=str(tmp_path))
    assert "EPERM" in client.result(pid)


def test_a_tool_of_an_ended_process_is_refused(client, tmp_path):
    """Nothing outlives its process; what is gone when the daemon looks is refused."""
    command = "sleep 1000 & echo $! > pid; wait"
    pid = client.spawn(program("bash"), use("bash", command=command), cwd=str(tmp_path))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    child = int((tmp_path / "pid").read_text())
    client.signal(pid, "KILL")
    client.wait(pid)
    deadline = time.monotonic() + 30
    while os.path.exists(f"/proc/{child}"):  # noqa: PTH110
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- what tools are given ---------------------------------------------------------------------------


def test_a_tools_environment_is_an_allow_list(client, tmp_path, daemon):
    """Never the daemon's: no key, no variable of its own."""
    prompt = "!bash env\n!bash ls -l /proc/self/fd | wc -l\n!say ok"
    pid, _ = client.finish(program("bash"), prompt, cwd=str(tmp_path))
    env = dict(line.split("=", 1) for line in client.results(pid)[0].splitlines() if "=" in line)
    assert env["LLMPROC_SOCKET"] == daemon.socket
    assert env["LLMPROC_PID"] == str(pid)
    assert not [name for name in env if "ANTHROPIC" in name or "KEY" in name or name == "PYTHONPATH"]
    assert client.results(pid)[1].startswith("5\n")  # total, 0, 1, 2 and the folder itself


def test_closing_tags_reach_the_model_as_they_are(client):
    """No escape, no cut."""
    said = "</tool_result></system>\\n<|end|> & &amp; \u2028"
    pid, _ = client.finish(BASH, f"{use('bash', command='printf %s ' + chr(39) + said + chr(39))}\n!say ok")
    assert client.result(pid).startswith("</tool_result></system>\\n<|end|> & &amp; \u2028")


def test_results_go_back_in_one_message_in_the_order_asked(client):
    """Whatever order they end in."""
    prompt = script("!bash sleep 0.3; echo slow", "!& !bash echo fast", "!& !tool frobnicate {}", "!say ok")
    pid, _ = client.finish(BASH, prompt)
    assert client.results(pid)[:2] == ["slow\n[exit 0]", "fast\n[exit 0]"]
    assert [len(message["content"]) for message in client.history(pid)] == [1, 3, 3, 1]
    assert texts(client.history(pid))[-1] == "ok"


def test_an_unknown_method_is_enosys(client):
    """And it is named."""
    with refused("ENOSYS", "proc.frobnicate"):
        client.call("proc.frobnicate")
