"""System calls made by models: what each does, what each answers, and that none can end the daemon."""

import json
import tracemalloc
from pathlib import Path

import msgspec
import pytest
import trio
from machinekit import running, script, table, use

from llmprocd import usertrap
from llmprocd.config import Config
from llmprocd.kernel import proc
from llmprocd.store import memory
from llmprocd.tools.spawner import Spawner

SMALL = {"max_direct_output_chars": 40, "default_page_size": 10}


async def answer_of(house, program, *lines, **more):
    """The answer to the last call of a script, as the model read it; and the pid."""
    with trio.fail_after(60):
        pid = await house.spawn(program, script(*lines, "!say done"), **more)
        await house.call("proc.wait", pids=[pid])
    result = (await house.results(pid))[-1]
    return result["content"], result.get("is_error", False), pid


# --- bugs -------------------------------------------------------------------------------------------


async def test_a_bug_that_changed_nothing_is_an_answer(autojump_clock, machine, monkeypatch, caplog):
    """And told to the operator; the process and the daemon go on."""

    async def wrong(_m, _p, _call):
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError("division by zero")

    monkeypatch.setitem(usertrap.TRAPS, "wait", wrong)
    text, is_error, pid = await answer_of(machine, table("wait"), use("wait"))
    assert (text, is_error) == ("Tool 'wait' error: division by zero", True)
    assert machine.proc(pid).status == 0
    assert "system call wait failed" in caplog.text


async def test_a_bug_in_the_middle_of_a_change_ends_the_daemon(autojump_clock, monkeypatch):
    """Before anything of it is written: it is restarted into its last commit."""

    async def wrong(m, p, _call):
        await trio.lowlevel.checkpoint()
        proc.renice(m.begin(), p.pid, 7)
        raise ZeroDivisionError("division by zero")

    monkeypatch.setitem(usertrap.TRAPS, "wait", wrong)
    store = memory.Store()
    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with running(store=store) as house:
            await house.spawn(table("wait"), use("wait"))
            await trio.sleep(60)
    assert [p.nice for p in store.load().procs] == [0]


# --- spawn ------------------------------------------------------------------------------------------


async def test_a_spawned_child_knows_nothing_and_answers_with_its_last_message(autojump_clock, machine):
    text, is_error, pid = await answer_of(machine, table("spawn"), use("spawn", prompt="!say found it"))
    assert (text, is_error) == ("found it", False)
    (child,) = [p for p in machine.m.kernel.procs.values() if p.birth == pid]
    assert (child.birth, child.collected, child.access.word, child.family) == (pid, True, "write", child.pid)
    rows = (await machine.call("proc.history", pid=child.pid)).messages
    assert [row.role for row in rows] == ["user", "assistant"]


async def test_a_failed_child_is_an_error_that_names_its_status(autojump_clock, machine):
    text, is_error, _ = await answer_of(
        machine, table("spawn", "exit"), use("spawn", prompt="!exit 3 no luck")
    )
    assert is_error
    assert text == "process 3 ended with status 3: no luck"


async def test_without_waiting_the_answer_is_the_pid(autojump_clock, machine):
    text, is_error, pid = await answer_of(
        machine, table("spawn"), use("spawn", prompt="!sleep 50\n!say hi", wait=False)
    )
    assert (text, is_error) == (str(pid + 1), False)


async def test_with_notify_the_end_of_the_child_is_a_line_of_input(autojump_clock, machine):
    pid = await machine.spawn(
        table("spawn"),
        script(use("spawn", prompt="!sleep 5\n!say hi", wait=False, notify=True), "!say waiting"),
    )
    await machine.until(pid, "fd:0")
    assert not machine.proc(pid).input_open, "it stays for the line alone"
    (row,) = (await machine.call("proc.wait", pids=[pid])).procs
    assert row.message == f"You said: Process {pid + 1} has ended with status 0."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": "x", "program_name": "expert"}, "Program 'expert' not found"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": "x", "fds": ["fd:9"]}, "fd:9"),
        ({"prompt": "x", "fds": ["nine"]}, "'nine'"),
        (
            {"prompt": "x", "additional_preload_files": ["/no/such/file"]},
            "/no/such/file: No such file or directory",
        ),
        ({"prompt": "x", "additional_preload_files": ["/tmp"]}, "/tmp"),
        ({"prompt": "x", "additional_preload_files": ["a\0b"]}, "NUL"),
        ({"prompt": "x", "additional_preload_files": ["x" * 5000]}, "additional_preload_files"),
        ({"prompt": "x", "additional_preload_files": ["/proc/self/environ"]}, "additional_preload_files"),
        ({"prompt": "x", "additional_preload_files": ["/dev/zero"]}, "additional_preload_files"),
    ],
)
async def test_a_spawn_that_cannot_be_is_an_answer_and_starts_nothing(machine, arguments, said):
    text, is_error, pid = await answer_of(machine, table("spawn"), use("spawn", **arguments))
    assert is_error
    assert said in text
    assert list(machine.m.kernel.procs) == [pid]


async def test_preloaded_files_stand_before_the_prompt(machine, tmp_path):
    (tmp_path / "a.txt").write_text("the facts </file>")
    text, is_error, pid = await answer_of(
        machine,
        table("spawn"),
        use("spawn", prompt="!say ok", additional_preload_files=["a.txt"]),
        cwd=str(tmp_path),
    )
    assert (text, is_error) == ("ok", False)
    (first, *_) = (await machine.call("proc.history", pid=pid + 1)).messages
    (block,) = json.loads(first.content)
    assert block["text"] == '<file_1 path="a.txt">\nthe facts </file>\n</file_1>\n!say ok'


# --- wait, kill, send -------------------------------------------------------------------------------

CHILD = use("spawn", prompt="!sleep 5\n!say hi", wait=False)


async def test_wait_tells_of_all_children(autojump_clock, machine):
    program = table("spawn", "wait", "exit")
    bad = use("spawn", prompt="!exit 4 bye", wait=False)
    text, is_error, pid = await answer_of(machine, program, CHILD, bad, "!wait")
    assert not is_error
    rows = {row["pid"]: row for row in json.loads(text)}
    assert (rows[pid + 1]["status"], rows[pid + 1]["message"]) == (0, "hi")
    assert (rows[pid + 2]["status"], rows[pid + 2]["message"], rows[pid + 2]["error"]) == (4, "bye", True)
    assert machine.proc(pid + 1).collected


async def test_a_child_is_collected_in_the_commit_that_tells_of_it(autojump_clock, machine):
    """Not while a long answer is on its way into a file: a crash, or INT, would lose the child's end."""
    tables = {"file_descriptor": {"page_user_input": False}, "parameters": {"max_tokens": 50_000}}
    child = use("spawn", prompt=f"!sleep 5\n!say {'x' * 100_000}", wait=False)
    parent = await machine.spawn(
        table("spawn", "wait", **tables), script(child, "!wait", "!sleep 9", "!say ok")
    )
    await machine.until(parent, "wait")
    (pid,) = machine.m.kernel.children[parent]
    await machine.call("proc.wait", pids=[pid], collect=False)
    while not machine.proc(pid).collected:
        await trio.lowlevel.checkpoint()
    assert json.loads((await machine.results(parent))[0]["content"]) == pid
    assert len(await machine.results(parent)) == 2


@pytest.mark.parametrize("seconds", [0, 2.5])
async def test_wait_gives_up_in_time(autojump_clock, machine, seconds):
    """Zero seconds are a look, not for ever."""
    text, _, pid = await answer_of(machine, table("spawn", "wait"), CHILD, use("wait", timeout_s=seconds))
    assert json.loads(text) == [{"pid": pid + 1, "status": None, "message": "still running"}]
    assert trio.current_time() == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("wait", {"pids": [2]}),
        ("kill", {"pid": 2}),
        ("send", {"pid": 2, "message": "x"}),
        ("read_fd", {"fd": "2/fd:1"}),
    ],
)
async def test_a_model_reaches_its_descendants_and_nobody_else(autojump_clock, machine, tool, arguments):
    stranger = await machine.spawn(interactive=True)
    assert stranger == 2
    before = machine.proc(stranger)
    text, is_error, _ = await answer_of(machine, table(tool), use(tool, **arguments))
    assert is_error
    assert "EPERM: process 2 is not a descendant of process 3" in text
    assert machine.proc(stranger) == before


@pytest.mark.parametrize("pid", [99, 0, -1, 1, 10**30])
async def test_a_pid_that_is_nobodys_is_an_answer(autojump_clock, machine, pid):
    for tool, arguments in (
        ("kill", {"pid": pid}),
        ("send", {"pid": pid, "message": "x"}),
        ("wait", {"pids": [pid]}),
    ):
        text, is_error, _ = await answer_of(machine, table(tool), use(tool, **arguments))
        assert is_error
        assert text.startswith(("ESRCH", "EPERM")), text


async def test_a_descendant_is_killed(autojump_clock, machine):
    text, is_error, pid = await answer_of(machine, table("spawn", "kill"), CHILD, "!kill {{result}} TERM")
    assert (text, is_error) == (f"sent TERM to process {pid + 1}", False)
    assert machine.proc(pid + 1).status == 143
    assert trio.current_time() < 1


async def test_a_signal_that_is_none_is_an_answer(autojump_clock, machine):
    text, is_error, _ = await answer_of(machine, table("spawn", "kill"), CHILD, "!kill {{result}} STAB")
    assert (text, is_error) == ("EINVAL: unknown signal: STAB", True)


async def test_a_message_to_a_child_whose_fd_0_is_closed_is_epipe(autojump_clock, machine):
    text, is_error, pid = await answer_of(machine, table("spawn", "send"), CHILD, "!send {{result}} more")
    assert is_error
    assert text == f"EPIPE: fd 0 of process {pid + 1} is closed"


# --- stderr -----------------------------------------------------------------------------------------


async def test_a_line_for_people_goes_to_stderr_and_into_the_events(autojump_clock, machine):
    _, _, pid = await answer_of(machine, table("write_stderr"), use("write_stderr", message="a\nnote\n\n"))
    assert (await machine.call("fd.read", pid=pid, fd=2)).data == b"a\nnote\n"
    await trio.sleep(1)
    page = await machine.call("events.read", after_seq=0, types=["stderr"])
    assert [event["text"] for event in page.events] == ["a\nnote\n\n"]


# --- descriptors ------------------------------------------------------------------------------------


def paged(*tools, **paging):
    return table("calculator", *tools, file_descriptor={**SMALL, **paging})


def writer():
    """Answers of fd_to_file are short enough to stay whole."""
    return paged("fd_to_file", max_direct_output_chars=900)


BIG = use("calculator", expression="10**99")
BIGGER = use("calculator", expression="10**999")


async def test_a_long_answer_becomes_a_descriptor_with_its_first_page(autojump_clock, machine):
    text, is_error, pid = await answer_of(machine, paged(), BIG)
    assert not is_error
    assert text == (
        '<fd_result fd="fd:3" pages="10" truncated="true" lines="1-1" total_lines="1" chars="100" '
        'source="calculator">\n'
        "<message>Output exceeds 40 characters. Use read_fd to read more pages.</message>\n"
        "<preview>\n1000000000\n</preview>\n</fd_result>"
    )
    assert (await machine.call("fd.read", pid=pid, fd=3)).data == b"1" + b"0" * 99


async def test_pages_that_a_model_reads_are_the_content(autojump_clock, machine):
    text, is_error, _ = await answer_of(machine, paged(), BIG, use("read_fd", fd="fd:3", start=2, count=2))
    assert not is_error
    head, body, tail = text.split("\n")
    assert (body, tail) == ("0" * 20, "</fd_content>")
    assert 'page="2-3"' in head
    assert 'continued="true"' in head


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"fd": "fd:9"}, "fd:9"),
        ({"fd": "three"}, "'three'"),
        ({"fd": "99/fd:3"}, "99"),
        ({"fd": "x/fd:3"}, "'x' is no pid"),
        ({"fd": "9" * 50 + "/fd:3"}, "pid"),
        ({"fd": "fd:3", "start": 11}, "Invalid page number: 11. Valid range: 1-10"),
        ({"fd": "fd:3", "start": 0}, "Invalid page number: 0"),
        ({"fd": "fd:3", "mode": "line", "start": 2}, "Invalid line start position: 2. Valid range: 1-1"),
        ({"fd": "fd:3", "mode": "char", "start": 101}, "Invalid character start position: 101"),
        ({"fd": "fd:3", "start": 10**30}, "Invalid page number"),
    ],
)
async def test_what_cannot_be_read_is_an_answer(autojump_clock, machine, arguments, said):
    text, is_error, _ = await answer_of(machine, paged(), BIG, use("read_fd", **arguments))
    assert is_error
    assert said in text


async def test_what_is_read_under_another_name_becomes_no_descriptor(autojump_clock, machine):
    """It is the tool that caps its answers, not its name."""
    program = paged({"name": "read_fd", "alias": "more"})
    text, is_error, _ = await answer_of(machine, program, BIG, use("more", fd="fd:3", start=2, count=2))
    assert not is_error
    assert text.startswith('<fd_content fd="fd:3" page="2-3"')


@pytest.mark.parametrize("mode", ["page", "line", "char"])
async def test_any_count_may_be_asked_for(autojump_clock, machine, mode):
    text, is_error, _ = await answer_of(
        machine, paged(), BIG, use("read_fd", fd="fd:3", mode=mode, count=10**30)
    )
    assert not is_error
    assert 'capped="true"' in text


async def test_a_selection_becomes_a_descriptor_of_its_own(autojump_clock, machine):
    text, is_error, pid = await answer_of(
        machine,
        paged(),
        BIG,
        use("read_fd", fd="fd:3", mode="char", start=0, count=3, extract_to_new_fd=True),
    )
    assert not is_error
    assert 'new_fd="fd:4"' in text
    assert (await machine.call("fd.read", pid=pid, fd=4)).data == b"100"


async def test_a_large_selection_is_never_whole_in_memory(machine, tmp_path):
    """It is copied from file to file, however long it is."""
    data = "é".encode() * 8_000_000
    (tmp_path / "in").write_bytes(data)
    pid = await machine.spawn(table(), interactive=True, stdin_path=str(tmp_path / "in"))
    call = use("read_fd", fd="fd:3", mode="char", start=1, count=10**9, extract_to_new_fd=True)
    tracemalloc.start()
    try:
        await machine.call("proc.run", pid=pid, prompt=script(call, "!say done"))
        assert tracemalloc.get_traced_memory()[1] < len(data) / 2
    finally:
        tracemalloc.stop()
    assert 'content_size="7999999"' in (await machine.results(pid))[-1]["content"]
    assert Path(machine.m.store.disk_path(machine.proc(pid).fds[4])).read_bytes() == data[2:]


async def test_many_lines_that_match_are_never_all_in_memory(tmp_path):
    """An answer holds the first of them, an extraction goes from file to file."""
    data = b"a line\n" * 1_000_000
    (tmp_path / "in").write_bytes(data)
    first, all_ = (
        use("read_fd", fd="fd:3", grep="a"),
        use("read_fd", fd="fd:3", grep="a", extract_to_new_fd=True),
    )
    async with running(spawner=Spawner.fork()) as house:
        pid = await house.spawn(table(), interactive=True, stdin_path=str(tmp_path / "in"))
        tracemalloc.start()
        try:
            await house.call("proc.run", pid=pid, prompt=script(first, all_, "!say done"))
            assert tracemalloc.get_traced_memory()[1] < len(data)
        finally:
            tracemalloc.stop()
        text, extracted = [result["content"] for result in await house.results(pid)]
        assert text.startswith('<fd_content fd="fd:3" grep="a" truncated="false" capped="true"')
        assert "\n1:a line\n2:a line\n" in text
        found = await house.call("fd.read", pid=pid, fd=4, page=2)
        assert 'new_fd="fd:4"' in extracted
        assert (found.lines, found.data.count(b":a line\n")) == (1_000_000, found.data.count(b"\n"))
        assert not list(Path(house.m.store.spool()).parent.iterdir())


async def test_a_pattern_that_takes_for_ever_is_stopped(tmp_path):
    """As any tool is that does not end within its deadline."""
    (tmp_path / "in").write_bytes(b"a" * 60 + b"!")
    async with running(config=Config(tool_timeout_s=0.2), spawner=Spawner.fork()) as house:
        pid = await house.spawn(table(), interactive=True, stdin_path=str(tmp_path / "in"))
        call = use("read_fd", fd="fd:3", grep="(a|a)*$")
        with trio.fail_after(60):
            await house.call("proc.run", pid=pid, prompt=script(call, "!say done"))
        (result,) = await house.results(pid)
        assert (result["content"], result["is_error"]) == ("[timed out after 0.2 s]", True)


async def test_a_descriptor_is_written_to_a_file_exactly(machine, tmp_path):
    target = tmp_path / "new" / "out"
    text, is_error, _ = await answer_of(
        machine, writer(), BIGGER, use("fd_to_file", fd="fd:3", file_path=str(target))
    )
    assert not is_error
    assert 'size_bytes="1000"' in text
    assert target.read_text() == "1" + "0" * 999


async def test_a_descriptor_is_appended_to_a_file(machine, tmp_path):
    (tmp_path / "out").write_text("before ")
    await answer_of(
        machine,
        writer(),
        BIGGER,
        use("fd_to_file", fd="fd:3", file_path="out", mode="append"),
        cwd=str(tmp_path),
    )
    assert (tmp_path / "out").read_text() == "before 1" + "0" * 999


async def test_of_two_who_make_a_file_side_by_side_one_is_told_it_exists(machine, tmp_path):
    """Calls of one turn run at once; neither overwrites what the other wrote."""
    call = use("fd_to_file", fd="fd:3", file_path="new", exist_ok=False)
    answer = await answer_of(machine, writer(), BIGGER, f"{call}\n!& {call}", cwd=str(tmp_path))
    results = (await machine.results(answer[2]))[1:]
    assert sorted(result.get("is_error", False) for result in results) == [False, True]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"file_path": "there", "exist_ok": False}, "already exists"),
        ({"file_path": "new", "create": False}, "doesn't exist"),
        ({"file_path": "."}, "no regular file"),
        ({"file_path": "there/below"}, "there"),
        ({"file_path": "a\0b"}, "NUL"),
        ({"file_path": "x" * 300}, "too long"),
        ({"file_path": "/dev/full"}, "no regular file"),
        ({"file_path": "/proc/version"}, ""),
        ({"file_path": "/proc/nothing"}, ""),
        ({"file_path": "/proc/self/mem"}, ""),
        ({"file_path": ""}, ""),
        ({"fd": "fd:7"}, "fd:7"),
    ],
)
async def test_a_file_that_cannot_be_written_is_an_answer(machine, tmp_path, more, said):
    """Whatever path a model names: the daemon lives, and the model reads why not."""
    (tmp_path / "there").write_text("kept")
    arguments = {"fd": "fd:3", "file_path": "out", **more}
    text, is_error, _ = await answer_of(
        machine, writer(), BIGGER, use("fd_to_file", **arguments), cwd=str(tmp_path)
    )
    assert is_error
    assert said in text
    assert (tmp_path / "there").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there"]


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "tool", "allowed"),
    [
        ("read", "send", False),
        ("read", "kill", False),
        ("read", "spawn", False),
        ("read", "fork", False),
        ("read", "write_stderr", True),
        ("write", "kill", False),
        ("write", "send", True),
        ("admin", "kill", True),
    ],
)
async def test_a_tool_above_the_process_is_denied_and_offered_all_the_same(
    autojump_clock, machine, access, tool, allowed
):
    arguments = {
        "send": {"pid": 9, "message": "x"},
        "kill": {"pid": 9},
        "spawn": {"prompt": "x"},
        "fork": {"prompts": ["x"]},
        "write_stderr": {"message": "x"},
    }
    text, is_error, _ = await answer_of(machine, table(tool), use(tool, **arguments[tool]), access=access)
    needs = "write" if tool == "send" else "admin"
    denied = f"Access denied: this tool requires {needs} access but process has {access}"
    assert (text == denied) == (not allowed)
    assert is_error or allowed
    offered = [row["name"] for row in json.loads(machine.engine.requests[0].body)["tools"]]
    assert offered == [tool, "read_fd"], "the list of tools never depends on the access level"


async def test_broken_arguments_are_answered_and_not_run(autojump_clock, machine):
    text, is_error, _ = await answer_of(machine, table("spawn"), "!badjson spawn")
    assert is_error
    assert "malformed JSON" in text


async def test_an_unknown_tool_is_answered(autojump_clock, machine):
    text, is_error, _ = await answer_of(machine, table("spawn"), use("teleport"))
    assert (text, is_error) == ("This tool is not available: teleport", True)


async def test_a_full_house_is_an_answer_too(autojump_clock, machine):
    machine.m.config = msgspec.structs.replace(machine.m.config, max_procs=1)
    for call in (use("spawn", prompt="x"), use("fork", prompts=["a", "b"])):
        text, is_error, _ = await answer_of(machine, table("spawn", "fork"), call)
        assert is_error
        assert text.startswith("EAGAIN")
