"""Processes by their users: spawn, wait, signals, exec and the small calls, over the real socket."""

import time
from pathlib import Path

import pytest
from e2ekit import ALL_TOOLS, program, refused, script, texts, toml, until_there

TALK = program()
BASH = program("bash")


# --- spawn ------------------------------------------------------------------------------------------


def test_a_process_with_a_prompt_runs_and_ends_with_0(client):
    """A batch process: one prompt, one answer, exit 0."""
    pid, row = client.finish(TALK, "!say hello")
    assert (row["pid"], row["status"], row["message"]) == (pid, 0, "hello")
    assert texts(client.history(pid)) == ["!say hello", "hello"]


def test_its_text_is_its_stdout(client):
    """fd 1 holds what the assistant said, whole lines."""
    pid, _ = client.finish(TALK, "!say one\ntwo")
    assert client.read(pid, 1) == b"one\n"


def test_an_interactive_process_takes_one_message_after_another(client):
    """With fd 0 open it sleeps between runs, and exits when fd 0 is closed."""
    pid = client.spawn(TALK, interactive=True)
    assert client.run(pid, "!say one")["message"] == "one"
    assert client.rests(pid)["stat"] == "S"
    client.send(pid, "!say two", close=True)
    assert client.wait(pid)["message"] == "two"
    with refused("ESRCH"):
        client.send(pid, "more")


def test_messages_wait_in_order(client):
    """What is sent during a run starts a run of its own afterwards, in the order sent."""
    pid = client.spawn(TALK, "!sleep 0.3\n!say first", interactive=True)
    for number in range(3):
        client.send(pid, f"!say number {number}")
    client.until(pid, lambda row: row["turns"] == 4)
    said = [text for text in texts(client.history(pid)) if not text.startswith("!")]
    assert said == ["first", "number 0", "number 1", "number 2"]


def test_sending_to_a_closed_mailbox_is_epipe(client):
    """A batch process takes no messages."""
    pid = client.spawn(TALK, "!sleep 60\n!say x")
    with refused("EPIPE", "closed"):
        client.send(pid, "more")


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_a_blank_text_is_einval(client, text):
    """A text that says nothing cannot be sent or spawned with."""
    pid = client.spawn(TALK, interactive=True)
    with refused("EINVAL", "blank"):
        client.send(pid, text)
    with refused("EINVAL", "blank"):
        client.spawn(TALK, text)


def test_without_a_prompt_the_programs_own_is_used(client):
    """`prompt.user` is the prompt of a process that was given none."""
    pid = client.spawn(program(prompt={"user": "!say from the program"}))
    assert client.wait(pid)["message"] == "from the program"


def test_without_any_prompt_fd_0_stays_open(client):
    """The API leaves fd 0 open then."""
    pid = client.spawn(TALK)
    assert client.rests(pid)["interactive"] is True
    assert client.run(pid, "!say late")["message"] == "late"


def test_an_interactive_process_does_not_send_the_programs_prompt_by_itself(client):
    """A run without a text does."""
    pid = client.spawn(program(prompt={"user": "!say own"}), interactive=True)
    assert client.rests(pid)["turns"] == 0
    assert client.run(pid)["message"] == "own"


def test_names_are_unique_among_the_living(client):
    """A name can be given again once its process has ended, and `%name` finds it."""
    first = client.spawn(TALK, interactive=True, name="reviewer")
    with refused("EEXIST", "reviewer"):
        client.spawn(TALK, interactive=True, name="reviewer")
    assert client.get("%reviewer")["pid"] == first
    client.signal(first, "TERM")
    client.wait(first)
    second = client.spawn(TALK, interactive=True, name="reviewer")
    assert client.call("proc.list", pids=["%reviewer"])["procs"][0]["pid"] == second


@pytest.mark.parametrize("name", ["a/b", "a\nb", "a\x1b[2J", "7"])
def test_a_name_that_cannot_be_typed_is_einval(client, name):
    """Control characters, slashes and mere numbers are refused."""
    with refused("EINVAL", "name"):
        client.spawn(TALK, "!say x", name=name)


def test_a_request_id_makes_spawn_safe_to_repeat(client, daemon):
    """The same id and arguments give the same pid, from any connection; other arguments EEXIST."""
    pid = client.spawn(TALK, "!say once", request_id="abc")
    with daemon.client() as other:
        assert other.spawn(TALK, "!say once", request_id="abc") == pid
    with refused("EEXIST", "abc"):
        client.spawn(TALK, "!say twice", request_id="abc")


@pytest.mark.parametrize(
    ("more", "errno"),
    [
        ({"program": "/nowhere/x.toml"}, "ENOENT"),
        ({"program": "no-such-program"}, "ENOENT"),
        ({"program": {"model": {"name": "x"}}}, "ENOEXEC"),
        ({"program": {"model": {"name": "x", "provider": "anthropic"}, "tolls": {}}}, "ENOEXEC"),
        ({"program": TALK, "access": "root"}, "EINVAL"),
        ({"program": TALK, "fds": ["99/fd:3"]}, "ESRCH"),
        ({"program": TALK, "limits": {"speed": 3}}, "EINVAL"),
        ({"program": TALK, "color": "red"}, "EINVAL"),
        ({}, "EINVAL"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_spawn_that_cannot_be_is_refused(client, more, errno):
    """And no process is left of it."""
    with refused(errno):
        client.call("proc.spawn", **more, prompt="!say x")
    assert client.call("proc.list", all=True)["procs"][1:] == []


def test_faults_of_a_program_file_come_all_at_once(client, tmp_path):
    """Each with its file, line and key."""
    path = tmp_path / "bad.toml"
    path.write_text('[model]\nname = "x"\nprovidr = "anthropic"\n[tools]\nbuiltin = ["bsh"]\n')
    with refused("ENOEXEC", f"{path}:3", "provider", "bsh", "bash"):
        client.spawn(str(path), "hello")


def test_a_tools_environment_and_folder_are_the_processs(client, tmp_path):
    """`cwd` and `env` of the spawn; LLMPROC_PID is its pid."""
    command = "!bash pwd; echo $GREETING; echo $LLMPROC_PID"
    pid, _ = client.finish(BASH, command, cwd=str(tmp_path), env={"GREETING": "hi"})
    assert client.result(pid).split("\n") == [str(tmp_path), "hi", str(pid), "[exit 0]"]


# --- wait -------------------------------------------------------------------------------------------


def test_wait_any_returns_with_the_first(client):
    """The others run on."""
    slow = client.spawn(TALK, "!sleep 30\n!say slow")
    fast = client.spawn(TALK, "!say fast")
    rows = client.wait(slow, fast, any=True)
    assert [row["pid"] for row in rows] == [fast]
    assert client.get(slow)["status"] is None


def test_a_wait_that_times_out_collects_nobody(client):
    """ETIMEDOUT, and the ended one is still listed."""
    slow = client.spawn(TALK, "!sleep 30\n!say slow")
    fast = client.spawn(TALK, "!say fast")
    client.until(fast, lambda row: row["stat"] == "Z")
    with refused("ETIMEDOUT"):
        client.wait(slow, fast, timeout_ms=50)
    assert fast in [row["pid"] for row in client.call("proc.list")["procs"]]


def test_all_who_wait_get_the_same_answer(client, daemon):
    """Also who comes late; a collected process is hidden from the plain list only."""
    pid = client.spawn(TALK, "!sleep 0.2\n!say x")
    with daemon.client() as other:
        mine = client.begin("proc.wait", pids=[pid])
        theirs = other.begin("proc.wait", pids=[pid])
        assert client.end(mine) == other.end(theirs) == client.call("proc.wait", pids=[pid])
    assert client.call("proc.list")["procs"] == []
    assert client.get(pid)["status"] == 0
    assert client.call("proc.list", all=True)["procs"][-1]["pid"] == pid


def test_a_look_need_not_collect(client):
    """collect=false leaves the process in the list."""
    pid, _ = client.spawn(TALK, "!say x"), None
    client.wait(pid, collect=False)
    assert [row["pid"] for row in client.call("proc.list")["procs"]] == [pid]


def test_an_unknown_pid_is_esrch(client):
    """Every call says so; only the list leaves it out."""
    for method, more in [
        ("proc.get", {}), ("proc.signal", {"signal": 0}), ("proc.send", {"text": "x"}), ("proc.fork", {}),
        ("proc.goto", {"to": "m1"}), ("proc.history", {}), ("fd.list", {}), ("fd.read", {"fd": 1}),
        ("proc.renice", {"nice": 1}), ("proc.rename", {"name": "x"}), ("proc.limits", {}),
        ("proc.exec", {"program": TALK}), ("proc.run", {"prompt": "x"}),
    ]:  # fmt: skip
        with refused("ESRCH", "99999"):
            client.call(method, pid=99999, **more)
    with refused("ESRCH"):
        client.call("proc.wait", pids=[99999])
    assert client.call("proc.list", pids=[99999])["procs"] == []


# --- exit statuses ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "status", "stop_reason"),
    [
        ("!say x", 0, "end_turn"),
        ("!say x\n!& !stop max_tokens", 0, "max_tokens"),
        ("!say x\n!& !stop refusal", 0, "refusal"),
        ("!fail 400 invalid_request_error", 1, "error"),
        ("!exit 0 bye", 0, "exit"),
        ("!exit 123 bye", 123, "exit"),
        ("!bash true\n!bash true\n!bash true", 152, "max_iterations"),
    ],
)
def test_how_a_run_ends_is_the_exit_status(client, prompt, status, stop_reason):
    """0, 1, what the process asked for, 152."""
    pid, row = client.finish(program("bash", "exit", model={"max_iterations": 2}), prompt)
    assert row["status"] == status
    assert client.get(pid)["stop_reason"] == stop_reason


def test_a_wall_clock_limit_is_124(client):
    """As timeout(1) has it."""
    pid = client.spawn(TALK, "!sleep 30\n!say x", limits={"wall": 0.2})
    assert client.wait(pid)["status"] == 124
    assert "wall" in client.get(pid)["reason"]


def test_last_words_are_the_message_of_exit(client):
    """The `exit` tool's message is what who waits reads."""
    _, row = client.finish(program("exit"), '!say thinking\n!& !exit {"status": 3, "message": "gave up"}')
    assert (row["status"], row["message"]) == (3, "gave up")


def test_an_interactive_process_rests_where_a_batch_one_exits(client):
    """max_iterations and a failed call end the run, not the process; the reason is told."""
    pid = client.spawn(program("bash", model={"max_iterations": 1}), interactive=True)
    assert client.run(pid, "!bash true\n!say never")["stop_reason"] == "max_iterations"
    row = client.rests(pid)
    assert "max_iterations" in row["reason"]
    assert b"max_iterations" in client.read(pid, 2)
    assert client.run(pid, "!fail 400 invalid_request_error")["stop_reason"] == "error"
    assert "invalid_request_error" in client.rests(pid)["reason"]
    assert client.run(pid, "!say better")["message"] == "better"


# --- signals ----------------------------------------------------------------------------------------

BUSY = {
    "in a model call": ("!sleep 30\n!say late", "api"),
    "in a tool": ("!bash sleep 30\n!say late", "tool:bash"),
}


@pytest.fixture(params=BUSY)
def busy(request, client):
    """A batch process that is in a model call, or in a tool."""
    prompt, wchan = BUSY[request.param]
    pid = client.spawn(BASH, prompt)
    client.until_wchan(pid, wchan)
    return pid


@pytest.mark.parametrize(
    ("sig", "status"), [("INT", 130), ("TERM", 143), ("KILL", 137), (9, 137), ("SIGTERM", 143)]
)
def test_a_signal_ends_a_running_batch_process(client, busy, sig, status):
    """130, 143, 137; its conversation stays valid and can be resumed by a fork."""
    client.signal(busy, sig)
    assert client.wait(busy)["status"] == status
    (child,) = client.call("proc.fork", pid=busy, prompts=["!say resumed"])["pids"]
    assert client.wait(child)["message"] == "resumed"


@pytest.mark.parametrize(("sig", "status"), [("TERM", 143), ("KILL", 137)])
def test_a_signal_ends_a_sleeping_process(client, sig, status):
    """A process at fd 0 ends too; INT does nothing to it."""
    pid = client.spawn(TALK, interactive=True)
    client.signal(pid, "INT")
    assert client.rests(pid)["stat"] == "S"
    client.signal(pid, sig)
    assert client.wait(pid)["status"] == status


@pytest.mark.parametrize(("sig", "status"), [("TERM", 143), ("KILL", 137)])
def test_a_signal_ends_a_stopped_process(client, busy, sig, status):
    """Also one that is stopped in the middle of something."""
    client.signal(busy, "STOP")
    assert client.get(busy)["stat"] == "T"
    client.signal(busy, sig)
    assert client.wait(busy)["status"] == status


def test_int_on_a_stopped_process_ends_the_run_and_it_stays_stopped(client, busy):
    """It exits at CONT, since fd 0 is closed and empty."""
    client.signal(busy, "STOP")
    client.signal(busy, "INT")
    assert client.get(busy)["stat"] == "T"
    client.signal(busy, "CONT")
    assert client.wait(busy)["status"] == 130


@pytest.mark.parametrize("sig", ["INT", "TERM", "KILL", "STOP", "CONT", "HUP", "XCPU", "CHLD"])
def test_an_ended_process_takes_no_signal_but_0(client, sig):
    """ESRCH, as kill(2) says; 0 tests that it is there."""
    pid, _ = client.finish(TALK, "!say x")
    with refused("ESRCH"):
        client.signal(pid, sig)
    client.signal(pid, 0)


def test_stop_is_a_gate_and_no_cancel(client, tmp_path):
    """What is under way lands; the next step waits for CONT."""
    go = tmp_path / "go"
    pid = client.spawn(BASH, f"!bash {until_there(go)}; echo ran >> log\n!say done", cwd=str(tmp_path))
    client.until_wchan(pid, "tool:bash")
    client.signal(pid, "STOP")
    go.touch()
    row = client.until(pid, lambda row: row["wchan"] == "-")
    assert (row["stat"], row["turns"]) == ("T", 1)
    assert (tmp_path / "log").read_text() == "ran\n"
    assert "[exit 0]" in client.result(pid)
    client.signal(pid, "CONT")
    assert client.wait(pid)["message"] == "done"
    assert (tmp_path / "log").read_text() == "ran\n"


def test_a_stopped_process_says_what_is_landing(client, strict):
    """STAT is T at once; WCHAN still says `api`."""
    with strict.held():
        pid = client.spawn(BASH, "!bash echo x\n!say done")
        client.until_wchan(pid, "api")
        client.signal(pid, "STOP")
        row = client.get(pid)
        assert (row["stat"], row["wchan"]) == ("T", "api")
    client.until(pid, lambda row: row["turns"] == 1)
    assert client.get(pid)["stat"] == "T"
    client.signal(pid, "CONT")
    assert client.wait(pid)["message"] == "done"
    assert client.result(pid) == "x\n[exit 0]"


def test_int_keeps_the_text_that_was_streamed(client):
    """It becomes the assistant's message; the run goes on from there with the next text."""
    pid = client.spawn(TALK, "!& !delay 1\n!say " + "word " * 200, interactive=True)
    said = client.call("events.read", after_seq=0, pids=[pid], types=["text"], wait_ms=60_000)
    assert said["events"]
    client.signal(pid, "INT")
    client.rests(pid)
    kept = texts(client.history(pid))[-1]
    assert kept.startswith("word")
    assert len(kept) < 1000
    assert client.read(pid, 1).decode().startswith(kept)
    assert client.run(pid, "!say and now")["message"] == "and now"


def test_int_answers_open_tool_calls(client):
    """Those that ended keep their results; the others are told that they were cut off."""
    pid = client.spawn(BASH, "!bash echo quick\n!& !bash sleep 30\n!say late", interactive=True)
    client.until_event(pid, "tool_end")
    client.signal(pid, "INT")
    client.rests(pid)
    quick, cut = client.results(pid)
    assert quick == "quick\n[exit 0]"
    assert "nterrupted" in cut
    assert client.run(pid, "!say next")["message"] == "next"


def test_int_is_for_one_run(client):
    """A message that waits is the next run."""
    pid = client.spawn(TALK, "!sleep 30\n!say x", interactive=True)
    client.send(pid, "!say second")
    client.until_wchan(pid, "api")
    client.signal(pid, "INT")
    client.until(pid, lambda row: row["turns"] == 1)
    assert client.rests(pid)["stop_reason"] == "end_turn"
    assert client.get(pid)["run"]["message"] == "second"


def test_a_killed_processs_tools_leave_nothing(client, tmp_path):
    """Grandchildren in sessions of their own die too."""
    inner = "setsid sh -c 'sh -c \"echo $$ >> pids; sleep 1000\" & wait' & sleep 1000 & wait"
    pid = client.spawn(BASH, f"!bash echo $$ >> pids; {inner}", cwd=str(tmp_path))
    pids = tmp_path / "pids"
    while not (pids.exists() and pids.read_text().count("\n") == 2):
        time.sleep(0.01)
    client.signal(pid, "KILL")
    client.wait(pid)
    deadline = time.monotonic() + 30
    while any(alive(int(line)) for line in pids.read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid):
    """Is there such a process, and is it no zombie?"""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_hup_reads_the_program_file_again(client, tmp_path, strict):
    """The next turn uses it; the history stays; a bad file is refused and the old program stays."""
    path = tmp_path / "p.toml"
    path.write_text(toml(program(prompt={"system": "You are old."})))
    pid = client.spawn(str(path), interactive=True)
    client.run(pid, "!say one")
    path.write_text(toml(program(prompt={"system": "You are new."})))
    client.signal(pid, "HUP")
    client.run(pid, "!say two")
    path.write_text("[model]\nnonsense = 1\n")
    with refused("ENOEXEC", "nonsense"):
        client.signal(pid, "HUP")
    client.run(pid, "!say three")
    systems = ["old" if "You are old" in body else "new" for body in strict.bodies()]
    assert systems == ["old", "new", "new"]
    assert len(client.history(pid)) == 6


def test_xcpu_asks_for_one_last_turn(client, strict, tmp_path):
    """The model is asked to hand back what it has, with the same tools; then 152."""
    go = tmp_path / "go"
    pid = client.spawn(BASH, f"!bash {until_there(go)}\n!bash echo again\n!say never")
    client.until_wchan(pid, "tool:bash")
    client.signal(pid, "XCPU")
    go.touch()
    assert client.wait(pid)["status"] == 152
    assert "last turn" in texts(client.history(pid))[-2]
    bodies = strict.bodies()
    assert len({body[: body.index('"messages"')] for body in bodies}) == 1


def test_xcpu_answers_the_calls_of_the_last_turn(client, tmp_path):
    """Tools are not run in it."""
    again = "A limit"  # the text of the last turn has no script, so the system prompt's is played
    system = "<script>\n!bash echo no >> ran\n</script>"
    go = tmp_path / "go"
    pid = client.spawn(program("bash", prompt={"system": system}), f"!bash {until_there(go)}\n{again}")
    client.until_wchan(pid, "tool:bash")
    client.signal(pid, "XCPU")
    go.touch()
    assert client.wait(pid)["status"] == 152
    assert "not run" in client.result(pid).lower()


@pytest.mark.parametrize("pid", [1, -1])
def test_init_and_everybody_cannot_be_signalled(client, pid):
    """EPERM."""
    with refused("EPERM"):
        client.signal(pid, "TERM")


def test_an_unknown_signal_is_einval(client):
    """And names it."""
    pid = client.spawn(TALK, interactive=True)
    with refused("EINVAL", "WINCH"):
        client.signal(pid, "WINCH")


def test_a_tree_signal_reaches_every_descendant(client):
    """`kill -- -PID`: children, and their children."""
    top = client.spawn(program(*ALL_TOOLS, tools={"child_access": "admin"}),
                       "!fork !fork !sleep 60 | !sleep 60")  # fmt: skip
    client.until_wchan(top, "wait")
    children = client.until(top, lambda row: len(row["children"]) == 2)["children"]
    grandchildren = client.until(children[0], lambda row: len(row["children"]) == 1)["children"]
    client.signal(top, "TERM", tree=True)
    assert {row["status"] for row in client.wait(top, *children, *grandchildren)} == {143}


# --- across a restart -------------------------------------------------------------------------------


def test_stopped_stays_stopped_and_the_rest_goes_on(fresh, strict):
    """After kill -9 the stopped process waits for CONT, the running one ends by itself."""
    fresh.start()
    with fresh.client() as client:
        go = fresh.work / "go"
        stopped = client.spawn(BASH, f"!bash {until_there(go)}\n!say after")
        client.until_wchan(stopped, "tool:bash")
        client.signal(stopped, "STOP")
        go.touch()
        client.until_wchan(stopped, "-")
        ended = client.spawn(TALK, "!say over")
        client.wait(ended)
        with strict.held():
            runs = client.spawn(TALK, "!say asked again")
            client.until_wchan(runs, "api")
            fresh.kill()
    fresh.start()
    with fresh.client() as client:
        assert client.get(stopped)["stat"] == "T"
        assert client.wait(runs)["message"] == "asked again"
        assert client.get(ended)["status"] == 0
        client.signal(stopped, "CONT")
        assert client.wait(stopped)["message"] == "after"


def test_a_resting_process_rests_after_a_restart_too(fresh, strict):
    """It makes no model call until there is new input."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TALK, "!sleep 30\n!say x", interactive=True)
        client.until_wchan(pid, "api")
        client.signal(pid, "INT")
        client.rests(pid)
        asked = len(strict.requests())
    fresh.restart()
    with fresh.client() as client:
        assert client.rests(pid)["stat"] == "S"
        assert client.run(pid, "!say awake")["message"] == "awake"
        assert len(strict.requests()) == asked + 1


def test_a_stop_of_the_daemon_is_a_crash_with_manners(fresh, strict):
    """SIGTERM: exit 0; what was running goes on at the next start."""
    fresh.start()
    with strict.held(), fresh.client() as client:
        pid = client.spawn(BASH, "!say resumed")
        client.until_wchan(pid, "api")
        assert fresh.stop() == 0
    assert not Path(fresh.socket).exists()
    fresh.start()
    with fresh.client() as client:
        assert client.wait(pid)["message"] == "resumed"


# --- the small calls --------------------------------------------------------------------------------


def test_children_of_an_ended_process_are_adopted(client):
    """ppid is 1 then; the birth parent stays."""
    top = client.spawn(program("fork"), '!fork {"prompts": ["!sleep 30"], "wait": false}\n!say done')
    client.wait(top)
    (child,) = [row for row in client.call("proc.list")["procs"] if row["birth"] == top]
    assert child["ppid"] == 1
    client.signal(top, 0)
    client.signal(child["pid"], "KILL")


def test_exec_keeps_the_history(client, strict):
    """Another program, the same process."""
    pid = client.spawn(program(prompt={"system": "first"}), interactive=True)
    client.run(pid, "!say one")
    client.call("proc.exec", pid=pid, program=program("bash", prompt={"system": "second"}))
    client.run(pid, "!bash echo tools\n!say two")
    assert client.result(pid) == "tools\n[exit 0]"
    assert "second" in strict.bodies()[-1]
    assert "!say one" in strict.bodies()[-1]


def test_exec_leaves_out_what_only_the_old_model_can_read(client, strict):
    """Signed thinking stays in the history and is not sent to another model."""
    thinking = {"thinking": {"type": "adaptive"}, "max_tokens": 4096}
    pid = client.spawn(program(parameters=thinking), interactive=True)
    client.run(pid, "!think secret{{n}} thoughts\n!& !say one")
    client.call("proc.exec", pid=pid, program=program(model={"name": "claude-opus-5-5"}))
    assert client.run(pid, "!say two")["message"] == "two"
    assert "secret1 thoughts" in str(client.history(pid))
    assert "secret1 thoughts" not in strict.bodies()[-1]


def test_exec_is_refused_while_tools_run(client):
    """EBUSY; nothing has changed."""
    pid = client.spawn(BASH, "!bash sleep 30")
    client.until_wchan(pid, "tool:bash")
    with refused("EBUSY"):
        client.call("proc.exec", pid=pid, program=TALK)


def test_renice_and_rename(client):
    """Both show in the list; a taken name is EEXIST, a value out of range EINVAL."""
    pid = client.spawn(TALK, interactive=True, name="old")
    other = client.spawn(TALK, interactive=True, name="other")
    client.call("proc.renice", pid=pid, nice=7)
    client.call("proc.rename", pid=pid, name="new")
    row = client.get("%new")
    assert (row["pid"], row["nice"]) == (pid, 7)
    with refused("EEXIST"):
        client.call("proc.rename", pid=other, name="new")
    with refused("EINVAL"):
        client.call("proc.renice", pid=pid, nice=40)
    assert client.call("proc.list", pids=["%old"])["procs"] == []


def test_remove_forgets_an_ended_process(client):
    """And refuses a living one, leaving the others alone."""
    ended, _ = client.finish(TALK, "!say x")
    living = client.spawn(TALK, interactive=True)
    with refused("EBUSY"):
        client.call("proc.remove", pids=[ended, living])
    assert client.get(ended)["status"] == 0
    client.call("proc.remove", pids=[ended])
    with refused("ESRCH"):
        client.get(ended)


def test_a_fork_outlives_the_removal_of_its_parent(client):
    """The history they shared is still there."""
    parent, _ = client.finish(TALK, "!say remember this")
    (child,) = client.call("proc.fork", pid=parent)["pids"]
    client.call("proc.remove", pids=[parent])
    assert texts(client.history(child)) == ["!say remember this", "remember this"]
    assert client.run(child, "!say still here")["message"] == "still here"


def test_run_gives_its_result(client):
    """Calls, tools, usage and the stop reason of that run alone."""
    pid = client.spawn(BASH, interactive=True)
    client.run(pid, "!say before")
    result = client.run(pid, script("!bash echo hi", "!& !bash exit 3", "!say done"))
    assert (result["api_calls"], result["message"], result["stop_reason"]) == (2, "done", "end_turn")
    assert [call["name"] for call in result["tool_calls"]] == ["bash", "bash"]
    assert result["usage"]["output_tokens"] > 0
    assert "status" not in result


def test_run_that_times_out_stops_only_the_waiting(client, strict):
    """The run goes on."""
    pid = client.spawn(TALK, interactive=True)
    with strict.held(), refused("ETIMEDOUT"):
        client.run(pid, "!say late", timeout_ms=20)
    client.until(pid, lambda row: row["turns"] == 1)
    assert client.rests(pid)["run"]["message"] == "late"


def test_a_run_on_a_busy_process_comes_after_what_waits(client, daemon):
    """Each caller gets the result of its own message."""
    pid = client.spawn(TALK, "!sleep 0.3\n!say zero", interactive=True)
    with daemon.client() as other:
        first = client.begin("proc.run", pid=pid, prompt="!say one")
        client.call("proc.get", pid=pid)
        second = other.begin("proc.run", pid=pid, prompt="!say two")
        assert client.end(first)["message"] == "one"
        assert other.end(second)["message"] == "two"


def test_pids_are_never_used_twice(fresh):
    """Not even after removal and a restart."""
    fresh.start()
    with fresh.client() as client:
        first, _ = client.finish(TALK, "!say x")
        client.call("proc.remove", pids=[first])
    fresh.restart()
    with fresh.client() as client:
        assert client.spawn(TALK, "!say x") > first
