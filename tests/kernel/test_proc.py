"""Every verb by example, and every way in which it is refused."""

import pytest
from kernelkit import (
    EMPTY,
    GOTO,
    World,
    answer_of,
    ask,
    asking,
    boots_equal,
    fds_of,
    image,
    links_hold,
    paths_hold,
    refused,
    result,
    said,
    tree_holds,
)
from msgspec.structs import replace

from llmprocd.abi.errno import Errno
from llmprocd.abi.types import INIT, Access, FileId, MessageId, Pid, ProcState, Signal, Usage
from llmprocd.kernel import file, proc, step
from llmprocd.kernel.proc import ForkCall
from llmprocd.kernel.state import At, File, LastTurn, Limit, ToolCall
from llmprocd.kernel.step import Exit, Infer, RunTools, Sleep, TakeInput

BLANKS = ["", " ", "\n\t "]
NAMELESS = ["a/b", "%a", "a\n", "\x1b[1m", " a", "a ", "12"]


@pytest.fixture
def w():
    return World()


def todo(w: World, pid: int) -> step.Step:
    return step.next_step(w[pid])


# --- spawn ------------------------------------------------------------------------------------------


def test_spawn_with_a_prompt_takes_it_then_closes(w):
    """The prompt is the only mail, and fd 0 is closed behind it."""
    pid = w.spawn("hello")
    p = w[pid]
    assert ([mail.text for mail in p.inbox], p.input_open, p.at) == (["hello"], False, At.EMPTY)
    assert todo(w, pid) == TakeInput()
    assert (p.family, p.ppid, p.birth, p.state, p.status) == (pid, INIT, INIT, ProcState.LIVE, None)
    assert p.began == 1000.0


def test_spawn_without_a_prompt_is_interactive(w):
    """It sleeps until somebody says something."""
    pid = w.spawn()
    assert (w[pid].input_open, todo(w, pid)) == (True, Sleep("fd:0"))


def test_spawn_interactive_with_a_prompt_keeps_its_input(w):
    """It takes the prompt, and more later."""
    pid = w.spawn("hello", interactive=True)
    assert (w[pid].input_open, todo(w, pid)) == (True, TakeInput())


def test_spawn_passes_on_what_it_was_given(w):
    """Each option is the process's."""
    given = {
        "uid": 7, "access": Access.READ, "name": "bob", "cwd": "/tmp", "env": {"A": "b"}, "nice": 5,
        "fds": {4: FileId(9)}, "limits": {"wall": Limit(1.0, 2.0)},
    }  # fmt: skip
    p = w[w.spawn("x", **given)]
    assert {field: getattr(p, field) for field in given} == given
    assert w.events("spawn") == [{"ppid": INIT, "program": "prog", "name": "bob"}]
    assert w.events("input") == [{"mail": 1, "text": "x"}]


@pytest.mark.parametrize("text", BLANKS)
def test_spawn_refuses_a_blank_prompt(w, text):
    """EINVAL, and no process."""
    number = w.k.put_image(w.image)
    with refused(w, Errno.EINVAL):
        proc.spawn(w.k, proc.Birth(image=number, prompt=text))


@pytest.mark.parametrize("name", NAMELESS)
def test_spawn_refuses_a_name_that_cannot_be_typed(w, name):
    """EINVAL for control characters, slashes, percent signs, edges of space, and numbers."""
    number = w.k.put_image(w.image)
    with refused(w, Errno.EINVAL):
        proc.spawn(w.k, proc.Birth(image=number, name=name))


def test_spawn_refuses_the_name_of_a_living_process(w):
    """EEXIST; once it has ended the name is free."""
    pid = w.spawn(name="bob")
    number = w.k.put_image(w.image)
    with refused(w, Errno.EEXIST):
        proc.spawn(w.k, proc.Birth(image=number, name="bob"))
    w.exit(pid)
    assert w[w.spawn(name="bob")].name == "bob"


def test_spawn_refuses_a_parent_that_has_ended(w):
    """ESRCH: nobody would wait for the child; the same for one that never was."""
    pid = w.spawn()
    w.exit(pid)
    number = w.k.put_image(w.image)
    for ppid in (pid, Pid(99)):
        with refused(w, Errno.ESRCH):
            proc.spawn(w.k, proc.Birth(image=number, ppid=ppid))


@pytest.mark.parametrize("level", list(Access))
def test_spawn_never_gives_a_child_more_than_its_parent(w, level):
    """Whatever was asked for."""
    parent = w.spawn(access=level)
    assert w[w.spawn(ppid=parent, access=Access.ADMIN)].access is level


@pytest.mark.parametrize("limit", [{"depth": Limit(None, 2.0)}, {"procs": Limit(None, 2.0)}])
def test_a_tree_can_only_grow_so_far(w, limit):
    """EAGAIN for spawn and fork beyond a limit; a model is told instead, in each of its calls."""
    deepest = w.asked(ppid=w.spawn(limits=limit))
    number = w.k.put_image(w.image)
    with refused(w, Errno.EAGAIN):
        proc.spawn(w.k, proc.Birth(image=number, ppid=deepest))
    with refused(w, Errno.EAGAIN):
        proc.fork(w.k, deepest)
    living = w.k.living
    w.land(deepest, asking("fork", "fork"))
    first, second = w.node(deepest).asks
    p = w.fork_model(deepest, ForkCall(first, ("a",), wait=True), ForkCall(second, ("b",), wait=False))
    assert (w.k.living, p.at) == (living, At.USER)
    assert w.words(deepest)[-1].count("EAGAIN") == 2


# --- fd 0 -------------------------------------------------------------------------------------------


def test_mail_is_taken_in_order_and_each_begins_a_run(w):
    """Messages that arrive during a run wait."""
    pid = w.spawn()
    assert [w.send(pid, text) for text in ("one", "two", "three")] == [1, 2, 3]
    for seq, text in enumerate(("one", "two", "three"), 1):
        p = w.take(pid)
        assert (p.run.seq, p.run.api_calls, todo(w, pid)) == (seq, 0, Infer())
        assert w.words(pid)[-1] == f"user: {text}"
        w.land(pid, said("ok"))
    assert todo(w, pid) == Sleep("fd:0")


@pytest.mark.parametrize("text", BLANKS)
def test_send_refuses_a_blank_text(w, text):
    """EINVAL: the API would refuse it."""
    pid = w.spawn()
    with refused(w, Errno.EINVAL):
        proc.send(w.k, pid, text)


def test_send_to_a_closed_input_is_epipe(w):
    """Also with close, and for a process that runs."""
    pid = w.asked()
    with refused(w, Errno.EPIPE):
        proc.send(w.k, pid, "more")
    with refused(w, Errno.EPIPE):
        proc.send(w.k, pid, "more", close=True)


def test_a_mailbox_can_be_full(w):
    """EAGAIN when too much waits; one message always may, however long."""
    pid = w.spawn()
    w.send(pid, "x" * (proc.MAILBOX + 1))
    with refused(w, Errno.EAGAIN):
        proc.send(w.k, pid, "y")
    w.take(pid)
    w.send(pid, "x" * (proc.MAILBOX - 1))
    w.send(pid, "y")
    with refused(w, Errno.EAGAIN):
        proc.send(w.k, pid, "z", close=True)


def test_send_to_an_ended_or_unknown_process_is_esrch(w):
    """Nobody is there to read it."""
    pid = w.spawn()
    w.exit(pid)
    for target in (pid, 99):
        with refused(w, Errno.ESRCH):
            proc.send(w.k, target, "x")
        with refused(w, Errno.ESRCH):
            proc.send(w.k, target, None, close=True)


def test_closing_lets_the_waiting_mail_run_then_exits(w):
    """Close comes after the text it came with; closing twice is nothing new."""
    pid = w.spawn()
    assert w.send(pid, "last", close=True) == 1
    assert w.events("input", pid) == [{"mail": 1, "text": "last"}, {"mail": 1, "closed": True}]
    assert w.send(pid, None, close=True) == 1
    assert len(w.events("input", pid)) == 2
    w.take(pid)
    w.land(pid, said("bye"))
    assert todo(w, pid) == Exit(0)


def test_closing_a_resting_process_ends_it_with_its_last_verdict(w):
    """The status is that of its last run."""
    pid = w.asked(None)
    proc.fail(w.k, w[pid], "EIO: gone")
    assert todo(w, pid) == Sleep("fd:0")
    w.send(pid, None, close=True)
    assert todo(w, pid) == Exit(1)


def test_a_run_may_bring_its_own_bound(w):
    """max_iterations of a call holds for that run alone."""
    pid = w.spawn()
    w.send(pid, "a", max_iterations=2)
    w.send(pid, "b")
    assert w.take(pid).run.max_iterations == 2
    w.land(pid, said())
    assert w.take(pid).run.max_iterations == 10


def test_a_new_run_forgets_how_the_last_one_ended(w):
    """Verdict, stop reason and reason are the present run's."""
    pid = w.asked(None)
    proc.fail(w.k, w[pid], "EIO: gone")
    assert (w[pid].verdict, w[pid].stop_reason, w[pid].reason) == (1, "error", "EIO: gone")
    w.send(pid)
    p = w.take(pid)
    assert (p.verdict, p.stop_reason, p.reason, p.run.ended, p.run.began) == (0, "", "", 0.0, w.k.now - 1)


def test_marks_are_put_only_where_the_model_can_travel():
    """A message carries its id if the program offers goto."""
    for tools, words in ((GOTO, "user: [m1] hello"), ((), "user: hello")):
        w = World(tools=tools)
        assert w.words(w.asked()) == [words]


def test_what_is_said_may_be_changed_on_the_way(w):
    """`said` decides what the model reads, and what else the process gets."""
    pid = w.spawn("long")
    p = w.take(pid, lambda p, text: (replace(p, refs={"x": FileId(1)}), text.upper()))
    assert (w.words(pid), dict(p.refs)) == (["user: LONG"], {"x": 1})


# --- a run without a text ---------------------------------------------------------------------------


def test_a_first_run_without_a_text_sends_the_programs_own_prompt():
    """An interactive process does not do that by itself."""
    w = World(user_prompt="do your thing")
    pid = w.spawn()
    assert todo(w, pid) == Sleep("fd:0")
    assert proc.ask_again(w.k, pid, max_iterations=3) == 1
    assert w.take(pid).run.max_iterations == 3
    assert w.words(pid) == ["user: do your thing"]


def test_a_run_without_a_text_asks_again_from_a_user_message(w):
    """Nothing is added to the history."""
    pid = w.asked(None)
    proc.fail(w.k, w[pid], "EIO")
    assert proc.ask_again(w.k, pid) == 2
    assert todo(w, pid) == TakeInput()
    p = w.take(pid)
    assert (w.words(pid), p.run.seq, todo(w, pid)) == (["user: hello"], 2, Infer())


def test_a_run_without_a_text_waits_behind_the_mail(w):
    """It is a run like any other; what the program says by itself is for a process nobody has spoken to."""
    w.image = image(user_prompt="do your thing")
    pid = w.spawn()
    w.send(pid, "hello")
    assert proc.ask_again(w.k, pid) == 2
    assert [(mail.text, mail.again) for mail in w[pid].inbox] == [("hello", False), ("", True)]


def test_a_run_without_a_text_needs_something_to_answer(w):
    """EINVAL after an answer, before any message, and in the middle of tools; ESRCH at an end."""
    rested, empty, (tools, _) = w.rested(), w.spawn(), w.in_tools()
    for pid in (rested, empty, tools):
        with refused(w, Errno.EINVAL):
            proc.ask_again(w.k, pid)
    w.exit(empty)
    with refused(w, Errno.ESRCH):
        proc.ask_again(w.k, empty)


def test_a_run_without_a_text_that_comes_too_late_has_nothing_to_answer(w):
    """What it was to answer has been answered: the run ends at once, and whoever waits for it finds that."""
    pid = w.asked(None)
    seq = proc.ask_again(w.k, pid)
    w.land(pid, said("answered"))
    p = w.take(pid)
    assert (p.run.seq, p.run.stop_reason, p.run.ended > 0) == (seq, "nothing_to_answer", True)
    assert (w.words(pid)[-1], todo(w, pid)) == ("assistant: answered", Sleep("fd:0"))


# --- the model's answer -----------------------------------------------------------------------------


@pytest.mark.parametrize("stop_reason", ["end_turn", "stop_sequence", "max_tokens", "refusal", "a_new_word"])
def test_an_answer_in_words_ends_the_run_with_0(w, stop_reason):
    """Whatever the model stopped for; `stop_reason` says it."""
    pid = w.asked()
    p = w.land(pid, said("hi", stop_reason))
    assert (p.at, p.rest, p.stop_reason, p.run.stop_reason) == (At.DONE, False, stop_reason, stop_reason)
    assert (p.run.ended, p.verdict, todo(w, pid)) == (w.k.now - 1, 0, Exit(0))
    assert w.words(pid) == ["user: hello", "assistant: hi"]
    assert w.events("turn_end", pid) == [{"stop_reason": stop_reason, "run": 1}]


def test_an_answer_is_accounted(w):
    """Turns, calls of the run, tokens and the size of the context."""
    pid = w.asked(None)
    for number in (1, 2):
        p = w.land(pid, said("hi", usage=Usage(10, 5, 3, 2)))
        assert (p.turns, p.usage.input_tokens, p.context_tokens) == (number, 10 * number, 20)
        assert (p.run.api_calls, p.run.usage) == (1, Usage(10, 5, 3, 2))
        w.send(pid)
        w.take(pid)
    assert w.disk.nodes[MessageId(2)].usage == Usage(10, 5, 3, 2)
    told = w.events("api_response", pid)[0]
    assert told == {
        "stop_reason": "end_turn",
        "text": "hi",
        "usage": {
            "input_tokens": 10,
            "output_tokens": 5,
            "cache_read_input_tokens": 3,
            "cache_creation_input_tokens": 2,
        },
    }


def test_what_the_model_says_is_its_stdout(w):
    """One line at least for each message, and the run remembers the last that said something."""
    pid = w.asked(None)
    w.land(pid, asking("bash", text="first"))
    w.finish(pid, w.node(pid).asks[0])
    p = w.land(pid, said("second\n"))
    assert w.disk.contents[FileId(-2 * pid)] == b"first\nsecond\n"
    assert (p.stdout, p.run.spoke) == (13, p.head)
    w.send(pid)
    w.take(pid)
    p = w.land(pid, asking("bash"))
    assert (p.stdout, p.run.spoke) == (13, None)


def test_the_message_is_kept_byte_for_byte(w):
    """Body, model, thinking and stop reason, as they came."""
    pid = w.asked()
    body = b'{"type":"text", "text":"a"},{"type":"new_kind","x":1}'
    p = w.land(pid, replace(said("a", model="m-9", thinks=True), body=body))
    node = w.disk.nodes[p.head]
    assert (node.body, node.model, node.thinks, node.stop_reason) == (body, "m-9", True, "end_turn")
    assert (node.role, node.parent, node.at) == ("assistant", 1, w.k.now - 1)


def test_an_answer_that_filled_the_window_is_a_failure(w):
    """Its text is kept; a closed process exits 1, and its stderr says what to do."""
    pid = w.asked()
    p = w.land(pid, said("as much as", "model_context_window_exceeded"))
    assert (w.words(pid)[-1], p.at, todo(w, pid)) == ("assistant: as much as", At.DONE, Exit(1))
    assert p.reason.startswith("E2BIG: ")
    assert w.disk.contents[FileId(-2 * pid - 1)].decode() == p.reason + "\n"


@pytest.mark.parametrize("stop_reason", ["pause_turn", "compaction"])
def test_a_pause_goes_on(w, stop_reason):
    """The model is asked again from its own message; the run has not ended."""
    pid = w.asked()
    p = w.land(pid, said("hm", stop_reason))
    assert (p.at, p.run.ended, p.run.api_calls, todo(w, pid)) == (At.PAUSE, 0.0, 1, Infer())
    w.land(pid, said("done"))
    assert w.words(pid) == ["user: hello", "assistant: hm", "assistant: done"]


@pytest.mark.parametrize("stop_reason", ["end_turn", "tool_use", "pause_turn", ""])
def test_an_empty_answer_is_not_stored(w, stop_reason):
    """The run ends with it, the head stays, and it is not asked for ever."""
    pid = w.asked()
    p = w.land(pid, replace(EMPTY, stop_reason=stop_reason))
    assert (w.words(pid), p.rest, p.verdict) == (["user: hello"], True, 0)
    assert (p.run.stop_reason, p.turns, todo(w, pid)) == (stop_reason or "end_turn", 1, Exit(0))


@pytest.mark.parametrize("stop_reason", ["max_tokens", "end_turn", "refusal", "pause_turn"])
def test_calls_of_an_answer_that_was_cut_off_get_errors(w, stop_reason):
    """Nothing is run, the conversation is whole, and the run ends with that stop reason."""
    pid = w.asked()
    p = w.land(pid, asking("bash", "fork", stop_reason=stop_reason))
    why = f"Not run: the answer ended with {stop_reason}."
    assert w.words(pid)[-1] == f"user: {why} | {why}"
    assert (p.at, p.rest, p.run.stop_reason, todo(w, pid)) == (At.USER, True, stop_reason, Exit(0))
    paths_hold(w, set())


def test_two_calls_with_one_id_fail_the_run(w):
    """No message could answer both: the answer is not kept, and its tokens are counted."""
    pid = w.asked()
    call = ask("bash")
    p = w.land(pid, answer_of("", (call, replace(call, name="fork")), "tool_use"))
    assert (w.words(pid), p.verdict, p.rest, p.turns) == (["user: hello"], 1, True, 1)
    assert p.reason.startswith("EPROTO: ")


def test_calls_are_begun_in_the_commit_of_the_answer(w):
    """What is written and not answered was cut off."""
    pid, (call, _) = w.in_tools("bash", "read_file")
    p = w[pid]
    assert (p.at, p.begun, p.results, todo(w, pid)) == (At.ASKS, (call.id,), (), RunTools())
    assert (p.run.ended, p.run.api_calls) == (0.0, 1)


def test_a_failure_ends_the_run_and_keeps_the_conversation(w):
    """A closed process exits 1; an open one rests, and the reason is in its stderr."""
    closed, opened = w.asked(), w.asked(None)
    for pid, after in ((closed, Exit(1)), (opened, Sleep("fd:0"))):
        proc.fail(w.k, w[pid], "EIO: the server is gone")
        p = w[pid]
        assert (p.at, p.rest, p.verdict, p.stop_reason) == (At.USER, True, 1, "error")
        assert (p.reason, p.run.stop_reason, todo(w, pid)) == ("EIO: the server is gone", "error", after)
        w.commit()
        assert w.disk.contents[FileId(-2 * pid - 1)] == b"EIO: the server is gone\n"


# --- a step that comes too late ---------------------------------------------------------------------


def test_a_step_lands_while_nobody_has_interfered(w):
    """Mail, STOP and CONT, a new program file or a new name do not get in its way."""
    pid = w.asked(None)
    seen = w[pid]
    w.send(pid)
    w.kill(pid, Signal.STOP)
    w.kill(pid, Signal.CONT)
    proc.reload(w.k, pid, image(model="m-2"))
    proc.rename(w.k, pid, "bob")
    assert proc.current(w.k, seen) == w[pid]


@pytest.mark.parametrize("what", ["goto", "goto back", "int", "exec", "exit", "remove"])
def test_a_step_that_was_overtaken_never_lands(w, what):
    """Not even when the head is moved to where it was."""
    pid = w.rested()
    w.send(pid)
    seen = w.take(pid)
    {
        "goto": lambda: w.goto(pid, 1),
        "goto back": lambda: w.goto(pid, seen.head),
        "int": lambda: w.kill(pid, Signal.INT),
        "exec": lambda: proc.exec_(w.k, pid, w.image),
        "exit": lambda: w.exit(pid),
        "remove": lambda: (w.exit(pid), proc.remove(w.k, pid)),
    }[what]()
    assert proc.current(w.k, seen) is None


def test_a_step_ends_with_the_message_it_was_for(w):
    """When all calls are answered, what still runs for that turn has nowhere to land."""
    pid, (call,) = w.in_tools("bash")
    seen = w[pid]
    w.finish(pid, call)
    assert w[pid].epoch == seen.epoch
    assert proc.current(w.k, seen) is None


# --- max_iterations, the last turn ------------------------------------------------------------------


def test_a_run_is_bounded_in_model_calls():
    """Then a closed process exits 152, an open one rests and takes its next message."""
    w = World(max_iterations=2)
    closed, opened = w.asked(), w.asked(None)
    for pid in (closed, opened):
        for _ in range(2):
            assert not proc.out_of_iterations(w.k, pid)
            w.land(pid, asking("bash"))
            w.finish(pid, w.node(pid).asks[0])
        assert proc.out_of_iterations(w.k, pid)
        p = w[pid]
        assert (p.verdict, p.stop_reason, p.rest) == (152, "max_iterations", True)
        assert p.reason == "max_iterations: 2 model calls in one run"
        assert w.events("limit", pid) == [{"resource": "max_iterations", "hard": 2}]
        assert w.disk.contents[FileId(-2 * pid - 1)].decode() == p.reason + "\n"
    assert (todo(w, closed), todo(w, opened)) == (Exit(152), Sleep("fd:0"))
    w.send(opened)
    w.take(opened)
    assert not proc.out_of_iterations(w.k, opened)


def test_a_pause_counts_as_a_model_call():
    """A model that pauses for ever is stopped too."""
    w = World(max_iterations=2)
    pid = w.asked()
    w.land(pid, said("a", "pause_turn"))
    w.land(pid, said("b", "pause_turn"))
    assert proc.out_of_iterations(w.k, pid)
    assert todo(w, pid) == Exit(152)


def last(w: World, pid: Pid) -> Pid:
    w.kill(pid, Signal.XCPU)
    proc.last_turn(w.k, pid)
    w.commit()
    return pid


def test_the_last_turn_is_announced_to_the_model(w):
    """A message says so, in the same run; then the process exits 152, open or not."""
    pid = last(w, w.asked(None))
    p = w[pid]
    assert (p.last_turn, p.at, p.run.seq, todo(w, pid)) == (LastTurn.ASKED, At.USER, 1, Infer())
    assert w.words(pid) == ["user: hello", f"user: {proc.LAST_TURN}"]
    assert proc.last_turn(w.k, pid) == p, "it is told once"
    w.boot()
    assert proc.last_turn(w.k, pid) == p, "also after a restart"
    w.land(pid, said("all I have"))
    assert (w[pid].last_turn, todo(w, pid)) == (LastTurn.OVER, Exit(152))


@pytest.mark.parametrize("reply", [asking("bash"), asking("bash", stop_reason="max_tokens")])
def test_tools_of_the_last_turn_are_answered_with_an_error(w, reply):
    """The same tools are offered, none is run."""
    pid = last(w, w.asked())
    w.land(pid, reply)
    assert w.words(pid)[-1] == f"user: {proc.LAST_TURN}"
    assert (w[pid].last_turn, todo(w, pid)) == (LastTurn.OVER, Exit(152))


@pytest.mark.parametrize("reply", [EMPTY, said("hm", "pause_turn"), said("x", "max_tokens")])
def test_whatever_the_model_answers_its_last_turn_is_its_last(w, reply):
    """An empty answer, a pause, a cut: exit 152."""
    pid = last(w, w.asked(None))
    w.land(pid, reply)
    assert todo(w, pid) == Exit(152)


def test_the_last_turn_comes_after_the_tools_that_run(w):
    """XCPU in tools: their results first, then the announcement."""
    pid, (call,) = w.in_tools("bash")
    w.kill(pid, Signal.XCPU)
    assert proc.last_turn(w.k, pid).at is At.ASKS
    w.finish(pid, call, "fine")
    proc.last_turn(w.k, pid)
    assert w.words(pid)[-2:] == ["user: fine", f"user: {proc.LAST_TURN}"]
    paths_hold(w, set())


def test_a_sleeping_process_has_its_last_turn_at_its_next_run(w):
    """It sleeps on until somebody speaks."""
    pid = w.rested()
    w.kill(pid, Signal.XCPU)
    proc.last_turn(w.k, pid)
    assert (w[pid].last_turn, todo(w, pid)) == (LastTurn.DUE, Sleep("fd:0"))
    w.send(pid)
    w.take(pid)
    assert proc.last_turn(w.k, pid).last_turn is LastTurn.ASKED


def test_who_leaves_the_announcement_behind_is_told_again(w):
    """After goto the model would not know that it is its last turn."""
    pid = last(w, w.asked(None))
    w.goto(pid, 1, run=True)
    w.take(pid)
    assert w[pid].last_turn is LastTurn.DUE
    proc.last_turn(w.k, pid)
    assert w.words(pid) == ["user: hello", f"user: {proc.LAST_TURN}"]


# --- tools ------------------------------------------------------------------------------------------


def test_results_wait_for_each_other_and_stand_in_the_order_asked(w):
    """One user message with all of them, however they ended."""
    pid, (a, b, c) = w.in_tools("bash", "read_file", "bash")
    w.finish(pid, c, "third")
    w.finish(pid, a, "first", is_error=True)
    assert (w[pid].at, todo(w, pid)) == (At.ASKS, RunTools())
    p = w.finish(pid, b, "second")
    assert w.words(pid)[-1] == "user: first | second | third"
    assert (p.at, p.begun, p.results, p.rest, todo(w, pid)) == (At.USER, (), (), False, Infer())
    assert [call.is_error for call in p.run.tool_calls] == [False, True, False]
    assert p.run.tool_calls[0] == ToolCall("bash", "{}", is_error=False)
    links_hold(w.node(pid), w.disk.nodes[w.node(pid).parent])


def test_a_result_is_told(w):
    """Which call, of which tool, and what it answered."""
    pid, (call,) = w.in_tools("bash")
    w.finish(pid, call, "out", is_error=True)
    assert w.events("tool_end", pid) == [
        {"tool": "bash", "call": call.id, "is_error": True, "text": "out"},
    ]


def test_arguments_that_are_no_text_can_be_told(w):
    """Bytes that are not UTF-8 do not stop a result."""
    pid = w.asked()
    call = ask("bash")
    w.land(pid, asking("bash"))
    p = proc.finish_tool(w.k, w[pid], replace(call, input=b"\xff"), result(call))
    assert p.run.tool_calls[0].input == "\ufffd"


def test_begun_tools_are_written_down_once_each(w):
    """After a restart it is known which had started and which had ended."""
    pid, (a, b, c) = w.in_tools("bash", "bash", "read_file")
    w.finish(pid, a)
    proc.begin_tools(w.k, w[pid], (c.id,))
    w.boot()
    p = w[pid]
    assert p.begun == (a.id, b.id, c.id)
    assert proc.unanswered(p, w.node(pid)) == [b, c]


def test_retiring_early_answers_what_is_missing(w):
    """No call is ever left without an answer."""
    pid, (a, b) = w.in_tools("bash", "bash")
    p = proc.finish_tool(w.k, w[pid], b, result(b, "fine"))
    proc.retire_tools(w.k, p, w.node(pid))
    assert w.words(pid)[-1] == "user: Not run. | fine"
    assert a.id != b.id


# --- fork by a model --------------------------------------------------------------------------------


def forking(w: World, *calls: tuple[tuple[str, ...], bool], others: tuple[str, ...] = (), **more: object):
    """A process whose model asks for forks beside other tools, and the calls."""
    pid = w.asked(**more)
    reply = asking(*others, *["fork"] * len(calls))
    w.land(pid, reply)
    forks = [
        ForkCall(call, prompts, wait)
        for call, (prompts, wait) in zip(reply.asks[len(others) :], calls, strict=True)
    ]
    return pid, reply.asks[: len(others)], forks


def test_a_fork_makes_a_child_for_each_prompt(w):
    """Same history, own answer, the task after it; the parent waits."""
    pid, _, forks = forking(w, (("sum", "mul"), True))
    p = w.fork_model(pid, *forks)
    a, b = p.awaiting[forks[0].ask.id]
    assert (p.at, todo(w, pid)) == (At.ASKS, RunTools())
    for child, prompt in ((a, "sum"), (b, "mul")):
        assert w.words(child) == [
            "user: hello",
            "assistant: fork()",
            f"user: {proc.YOU_ARE_THE_CHILD} | {prompt}",
        ]
        c = w[child]
        assert (c.ppid, c.birth, c.family, todo(w, child)) == (pid, pid, pid, Infer())
        assert (c.input_open, c.inbox, c.run.max_iterations, c.mails) == (False, (), 10, 0)
        assert w.events("fork", child) == [{"ppid": pid, "head": f"m{c.head}", "prompt": prompt}]
    paths_hold(w, set())
    tree_holds(w)
    assert w.disk.nodes[w[a].head].parent == w[pid].head, "nothing was copied"


def test_a_fork_that_does_not_wait_is_answered_with_pids(w):
    """And the parent goes on at once."""
    pid, _, forks = forking(w, (("a", "b"), False))
    p = w.fork_model(pid, *forks)
    assert (w.words(pid)[-1], p.at, dict(p.awaiting)) == ("user: [3,4]", At.USER, {})
    w.boot()
    assert todo(w, pid) == Infer()


def test_several_forks_of_a_turn_are_made_at_once(w):
    """Each child reads its own fork as its birth and every other as its parent's."""
    pid, _, forks = forking(w, (("a", "b"), True), (("c",), False), (("d",), True))
    p = w.fork_model(pid, *forks)
    assert p.awaiting == {forks[0].ask.id: (3, 4), forks[2].ask.id: (6,)}
    theirs = ["made by your parent: pids 3, 4", "made by your parent: pids 5", "made by your parent: pids 6"]
    for child, own in ((3, 0), (4, 0), (5, 1), (6, 2)):
        answers = [*theirs[:own], proc.YOU_ARE_THE_CHILD, *theirs[own + 1 :], "abcd"[child - 3]]
        assert w.words(child)[-1] == "user: " + " | ".join(answers)
    assert [r.id for r in p.results] == [forks[1].ask.id]
    paths_hold(w, set())
    boots_equal(w)


def test_forks_come_after_the_other_tools_of_the_turn(w):
    """The children have their results; a call that comes still later was the parent's."""
    pid, (bash, leave), forks = forking(w, (("a",), True), others=("bash", "exit"))
    w.finish(pid, bash, "42")
    w.fork_model(pid, *forks)
    assert w.words(3)[-1] == f"user: 42 | {proc.NOT_YOURS} | {proc.YOU_ARE_THE_CHILD} | a"
    assert proc.unanswered(w[pid], w.node(pid)) == [leave, forks[0].ask]
    paths_hold(w, set())


def test_a_parent_waits_for_its_children_over_a_restart(w):
    """Whom it waits for is read from the disk; nobody is forked twice."""
    pid, _, forks = forking(w, (("a",), True))
    w.fork_model(pid, *forks)
    w.boot()
    assert w[pid].awaiting == {forks[0].ask.id: (3,)}
    w.land(3, said("4"))
    w.exit(3)
    p = w.finish(pid, forks[0].ask, '[{"id":0}]')
    assert (dict(p.awaiting), w.words(pid)[-1]) == ({}, 'user: [{"id":0}]')


def test_a_fork_that_was_answered_is_waited_for_no_more(w):
    """While the other one of the turn still is."""
    pid, _, forks = forking(w, (("a",), True), (("b",), True))
    w.fork_model(pid, *forks)
    p = w.finish(pid, forks[1].ask)
    assert p.awaiting == {forks[0].ask.id: (3,)}


@pytest.mark.parametrize("ceiling", list(Access))
@pytest.mark.parametrize("level", list(Access))
def test_a_forked_child_is_held_by_the_ceiling(level, ceiling):
    """At most what the program says of children, and at most the parent's."""
    w = World(child_access=ceiling)
    pid, _, forks = forking(w, (("a",), True), access=level)
    w.fork_model(pid, *forks)
    assert w[3].access == min(level, ceiling)


def test_a_child_may_fork_in_its_turn(w):
    """Nested forks: each line waits for its own."""
    pid, _, forks = forking(w, (("a",), True))
    w.fork_model(pid, *forks)
    reply = asking("fork")
    w.land(3, reply)
    w.fork_model(3, ForkCall(reply.asks[0], ("deeper",), wait=True))
    assert (w[4].ppid, w[4].family, w[3].awaiting) == (3, pid, {reply.asks[0].id: (4,)})
    assert w.words(4)[:3] == w.words(3)[:3]
    paths_hold(w, set())
    tree_holds(w)


def test_a_fork_shares_descriptors_and_settings_and_nothing_else(w):
    """Same files, folder, variables and wall limit; own mail, output, account, name and end."""
    given = {"name": "bob", "cwd": "/tmp", "env": {"A": "b"}, "nice": 3, "uid": 7}
    bounds = {"wall": Limit(5.0, 9.0)}
    pid, _, forks = forking(w, (("a",), True), prompt=None, limits=bounds, **given)
    p, _ = file.add(w.k, w[pid], File(FileId(w.k.take("file")), 0, complete=True, origin="bash"))
    w.k.put(replace(p, refs={"x": FileId(1)}, stderr=0))
    w.send(pid, "waits")
    w.fork_model(pid, *forks)
    parent, child = w[pid], w[3]
    shared = (
        "family",
        "uid",
        "cwd",
        "env",
        "image",
        "nice",
        "fds",
        "refs",
        "limits",
        "tips",
        "context_tokens",
    )
    assert all(getattr(child, name) == getattr(parent, name) for name in shared)
    assert (child.name, child.inbox, child.stdout, child.turns, child.usage) == ("", (), 0, 0, Usage())
    assert (child.epoch, child.notify, child.last_turn) == (0, (), LastTurn.NO)
    assert fds_of(w) == {(pid, 3): 1}


def test_prompts_of_forks_are_marked_where_the_model_can_travel():
    """The child can come back to its task."""
    w = World(tools=GOTO)
    pid, _, forks = forking(w, (("a",), True))
    w.fork_model(pid, *forks)
    assert w.words(3)[-1].endswith(f" | [m{w[3].head}] a")


# --- fork by a user ---------------------------------------------------------------------------------


def test_a_user_forks_a_child_that_rests_on_the_same_message(w):
    """Without a prompt: same path, fd 0 open, nothing runs."""
    for pid in (w.rested(), w.asked(None), w.asked(), w.spawn()):
        (child,) = w.fork(pid)
        c = w[child]
        assert (w.words(child), c.head) == (w.words(pid), w[pid].head)
        assert (c.input_open, c.inbox, todo(w, child)) == (True, (), Sleep("fd:0"))
        assert (c.ppid, c.birth, c.family, c.access) == (pid, pid, pid, Access.ADMIN)


def test_each_prompt_makes_a_child(w):
    """Which takes it as its next message; its fd 0 is open if its parent's is."""
    opened, closed = w.rested(), w.asked()
    for pid in (opened, closed):
        children = w.fork(pid, "a", "b")
        for child, prompt in zip(children, "ab", strict=True):
            assert (w[child].input_open, todo(w, child)) == (pid == opened, TakeInput())
            w.take(child)
            assert w.words(child) == [*w.words(pid), f"user: {prompt}"]
            assert w.events("fork", child) == [{"ppid": pid, "head": f"m{w[pid].head}", "prompt": prompt}]


def test_a_fork_of_a_process_without_a_message_has_none(w):
    """It is as empty as its parent."""
    (child,) = w.fork(w.spawn(), "x")
    assert (w[child].head, w[child].at, w[child].rest) == (None, At.EMPTY, False)
    assert w.events("fork", child) == [{"ppid": 2, "head": None, "prompt": "x"}]
    w.take(child)
    assert todo(w, child) == Infer()


def test_a_fork_can_go_wherever_its_parent_had_been(w):
    """Abandoned branches are its own history too, made by a user or by a model."""
    pid = talked(w)
    w.goto(pid, 2)
    (child,) = w.fork(pid)
    assert w[child].tips == w[pid].tips == (6,)
    w.goto(pid, 2, "fork")
    w.take(pid)
    w.land(pid, asking("fork"))
    w.fork_model(pid, ForkCall(w.node(pid).asks[0], ("a",), wait=True))
    assert w[child + 1].tips == w[pid].tips == (6, 2)


def test_a_fork_at_an_earlier_message(w):
    """The child stands there and rests; the parent goes on."""
    pid, _ = w.in_tools("bash")
    (child,) = w.fork(pid, at=w.disk.nodes[MessageId(1)])
    assert (w.words(child), todo(w, child)) == (["user: hello"], Sleep("fd:0"))
    assert todo(w, pid) == RunTools()


def test_an_ended_process_is_resumed_by_a_fork(w):
    """The child is adopted by init at once, and lives in the ended one's subtree."""
    pid = w.asked()
    w.land(pid, said("hi"))
    w.exit(pid)
    (child,) = w.fork(pid, "go on")
    assert (w[child].ppid, w[child].birth, w[child].input_open) == (INIT, pid, False)
    w.take(child)
    assert w.words(child) == ["user: hello", "assistant: hi", "user: go on"]
    tree_holds(w)


def test_a_fork_is_refused_while_tools_are_asked_for(w):
    """EBUSY: the child would run them a second time; also at that very message."""
    pid, _ = w.in_tools("bash")
    node = w.node(pid)
    with refused(w, Errno.EBUSY):
        proc.fork(w.k, pid)
    with refused(w, Errno.EBUSY):
        proc.fork(w.k, pid, ["x"], at=node)


@pytest.mark.parametrize("text", BLANKS)
def test_a_fork_refuses_a_blank_prompt_among_others(w, text):
    """EINVAL, and no child at all."""
    pid = w.rested()
    with refused(w, Errno.EINVAL):
        proc.fork(w.k, pid, ["fine", text])


def test_a_fork_of_nobody_is_esrch(w):
    """Also for a birth parent that is not there, or has ended."""
    pid, ended = w.rested(), w.spawn()
    w.exit(ended)
    with refused(w, Errno.ESRCH):
        proc.fork(w.k, 99)
    for birth in (Pid(99), ended):
        with refused(w, Errno.ESRCH):
            proc.fork(w.k, pid, birth=birth)


@pytest.mark.parametrize("level", list(Access))
def test_a_fork_by_a_tool_is_its_process_s_child(w, level):
    """Whose tool asked for it is the parent, and its ceiling for children holds."""
    caller = w.spawn(access=level)
    below = w.rested(ppid=caller)
    for pid in (caller, below):
        (child,) = w.fork(pid, birth=caller)
        assert (w[child].ppid, w[child].birth, w[child].family) == (caller, caller, w[pid].family)
        assert w[child].access == min(level, Access.WRITE)
    tree_holds(w)


# --- goto -------------------------------------------------------------------------------------------


def talked(w: World, **more: object) -> Pid:
    """m1 user, m2 assistant, m3 user, m4 assistant that asks, m5 results, m6 assistant."""
    pid = w.rested(**more)
    w.send(pid, "work")
    w.take(pid)
    w.land(pid, asking("bash"))
    w.finish(pid, w.node(pid).asks[0])
    w.land(pid, said("done"))
    return pid


def test_goto_moves_the_head_and_rests(w):
    """Back, forth, onto an abandoned branch: nothing is deleted."""
    pid = talked(w)
    p = w.goto(pid, 2)
    assert (p.head, p.at, p.rest, p.tips, todo(w, pid)) == (2, At.DONE, True, (6,), Sleep("fd:0"))
    assert w.events("goto", pid) == [{"old_head": "m6", "head": "m2"}]
    w.send(pid, "other")
    w.take(pid)
    w.land(pid, said("ok"))
    p = w.goto(pid, 6)
    assert (p.head, p.tips) == (6, (6, 8))
    assert w.words(pid)[-1] == "assistant: done"
    w.boot()
    assert w[pid] == p


def test_goto_to_a_user_message_rests_there(w):
    """It does not ask the model again unless told to."""
    pid = talked(w)
    for to in (1, 3, 5):
        w.goto(pid, to)
        assert todo(w, pid) == Sleep("fd:0")
    w.boot()
    assert todo(w, pid) == Sleep("fd:0")


def test_goto_without_a_text_rests_where_fd_0_is_closed_too(w):
    """It neither exits nor asks, in the next life too; a run or a text takes it on, and it ends as ever."""
    for go_on in (lambda pid: proc.ask_again(w.k, pid), lambda pid: w.goto(pid, w[pid].head, "on")):
        pid = w.asked()
        w.goto(pid, w[pid].head)
        assert step.next_step(w[pid]) == Sleep("fd:0")
        w.boot()
        assert step.next_step(w[pid]) == Sleep("fd:0")
        assert "goto" in w[pid].reason
        go_on(pid)
        w.take(pid)
        w.kill(pid, Signal.INT)
        assert step.next_step(w[pid]) == Exit(130)


def test_a_fork_of_a_parked_process_is_not_parked(w):
    pid = w.asked()
    w.goto(pid, w[pid].head)
    (child,) = w.fork(pid)
    w.send(child, None, close=True)
    assert step.next_step(w[child]) == Exit(0)


def test_goto_with_a_text_says_it_next(w):
    """Before the mail that waits."""
    pid = talked(w)
    w.send(pid, "waits")
    p = w.goto(pid, 2, "first")
    assert [mail.text for mail in p.inbox] == ["first", "waits"]
    w.take(pid)
    assert w.words(pid) == ["user: hello", "assistant: hi", "user: first"]


def test_goto_with_run_asks_the_model_again(w):
    """From the user message, without a new text."""
    pid = talked(w)
    w.goto(pid, 3, run=True)
    assert todo(w, pid) == TakeInput()
    w.take(pid)
    assert (w.words(pid), todo(w, pid)) == (["user: hello", "assistant: hi", "user: work"], Infer())


def test_goto_ends_the_run_that_is_under_way(w):
    """In inference and in tools: whoever waits for the run is told."""
    asked, (tools, _) = w.asked(None), w.in_tools("bash", prompt=None)
    for pid in (asked, tools):
        epoch = w[pid].epoch
        first = w.disk.path(w[pid].head)[0].id
        p = w.goto(pid, first)
        assert (p.run.stop_reason, p.run.ended > 0, p.epoch) == ("goto", True, epoch + 1)
        assert (p.begun, p.results, p.rest, p.verdict) == ((), (), True, 0)
        assert w.events("turn_end", pid) == [{"stop_reason": "goto", "run": 1}]


def test_goto_of_a_resting_process_ends_no_run(w):
    """There is none; but the reason why it rested is no more."""
    pid = talked(w)
    w.send(pid)
    w.take(pid)
    proc.fail(w.k, w[pid], "EIO")
    ends = len(w.events("turn_end", pid))
    p = w.goto(pid, 2)
    assert len(w.events("turn_end", pid)) == ends
    assert (p.verdict, p.reason) == (0, "")


def test_goto_to_where_it_stands_is_an_interruption_all_the_same(w):
    """The answer under way was asked for before."""
    pid = w.asked(None)
    epoch = w[pid].epoch
    p = w.goto(pid, 1)
    assert (p.head, p.epoch, p.rest, p.tips) == (1, epoch + 1, True, (1,))
    assert w.goto(pid, 1).tips == (1,)


def test_goto_refuses_what_asks_for_tools(w):
    """EINVAL: the calls would be run again; also for where it stands."""
    pid = talked(w)
    busy, _ = w.in_tools("bash")
    for target, node in ((pid, w.disk.nodes[MessageId(4)]), (busy, w.node(busy))):
        with refused(w, Errno.EINVAL):
            proc.goto(w.k, target, node)


@pytest.mark.parametrize("text", BLANKS)
def test_goto_refuses_a_blank_text(w, text):
    """EINVAL, and the head stays."""
    pid = talked(w)
    with refused(w, Errno.EINVAL):
        proc.goto(w.k, pid, w.disk.nodes[MessageId(2)], text)


def test_goto_can_only_run_from_a_users_message(w):
    """EINVAL at an answer; with a text there is something to answer."""
    pid = talked(w)
    with refused(w, Errno.EINVAL):
        proc.goto(w.k, pid, w.disk.nodes[MessageId(2)], run=True)
    w.goto(pid, 2, "text", run=True)
    assert [mail.text for mail in w[pid].inbox] == ["text"]


def test_goto_of_an_ended_process_is_esrch(w):
    """Fork it."""
    pid = talked(w)
    w.exit(pid)
    for target in (pid, 99):
        with refused(w, Errno.ESRCH):
            proc.goto(w.k, target, w.disk.nodes[MessageId(2)])


def test_a_model_travels_and_goes_on():
    """The run goes on from there with its own words; later results have nowhere to land."""
    w = World(tools=GOTO)
    pid = talked(w)
    w.send(pid, "more")
    w.take(pid)
    w.land(pid, asking("bash", "goto"))
    bash, _ = w.node(pid).asks
    w.finish(pid, bash, "lost")
    was, seen = w[pid], w[pid]
    p = proc.goto_model(w.k, was, w.disk.nodes[MessageId(2)], "I learned")
    assert w.words(pid) == ["user: [m1] hello", "assistant: hi", f"user: [m{p.head}] I learned"]
    assert (p.rest, p.run, p.tips, p.epoch) == (False, was.run, (was.head,), was.epoch + 1)
    assert (p.begun, p.results, todo(w, pid)) == ((), (), Infer())
    assert proc.current(w.k, seen) is None
    assert w.events("goto", pid) == [{"old_head": f"m{was.head}", "head": "m2"}]
    paths_hold(w, set())


def test_a_model_cannot_travel_into_a_call():
    """EINVAL, as for a user."""
    w = World(tools=GOTO)
    pid = talked(w)
    node = w.disk.nodes[MessageId(4)]
    with refused(w, Errno.EINVAL):
        proc.goto_model(w.k, w[pid], node, "x")


# --- exec, HUP --------------------------------------------------------------------------------------


def test_exec_replaces_the_program_and_keeps_the_rest(w):
    """Pid, history, descriptors, mail and limits stay; a call under way is given up and asked again."""
    pid = w.asked(None, limits={"wall": Limit(1.0, 2.0)})
    w.send(pid, "waits")
    was = w[pid]
    p = proc.exec_(w.k, pid, image(program="other", model="m-2"))
    assert p == replace(was, image=p.image, epoch=was.epoch + 1)
    assert (w.k.image(p).model, todo(w, pid)) == ("m-2", Infer())
    assert w.events("exec", pid) == [{"program": "other"}]
    boots_equal(w)


def test_exec_is_refused_while_tools_are_asked_for(w):
    """EBUSY; ESRCH at an end; and no program is stored for it."""
    pid, _ = w.in_tools("bash")
    with refused(w, Errno.EBUSY):
        proc.exec_(w.k, pid, image(model="m-2"))
    ended = w.spawn()
    w.exit(ended)
    for target in (ended, 99):
        with refused(w, Errno.ESRCH):
            proc.exec_(w.k, target, image(model="m-2"))
        with refused(w, Errno.ESRCH):
            proc.reload(w.k, target, image(model="m-2"))


def test_a_reload_interrupts_nothing(w):
    """The next turn uses the new file; also in the middle of tools."""
    pid, _ = w.in_tools("bash")
    was = w[pid]
    p = proc.reload(w.k, pid, image(model="m-2"))
    assert p == replace(was, image=p.image)
    assert proc.current(w.k, was) == p


# --- interruption -----------------------------------------------------------------------------------


def test_interrupt_of_a_process_without_a_run_changes_nothing(w):
    """There is nothing to interrupt; ESRCH at an end."""
    pid = w.rested()
    w.commit()
    was = w[pid]
    assert proc.interrupt(w.k, pid, None, said("x"), verdict=9) == was
    assert not w.k.change
    w.exit(pid)
    with refused(w, Errno.ESRCH):
        proc.interrupt(w.k, pid, None, None, verdict=9)


def test_interrupt_of_a_pause_rests_there(w):
    """The model's own message stays the last; the next message follows it."""
    pid = w.asked(None)
    w.land(pid, said("hm", "pause_turn"))
    proc.interrupt(w.k, pid, None, None, verdict=130)
    assert (w[pid].at, w[pid].rest, todo(w, pid)) == (At.PAUSE, True, Sleep("fd:0"))
    w.send(pid, "go on")
    w.take(pid)
    assert w.words(pid) == ["user: hello", "assistant: hm", "user: go on"]


# --- exit, waiting, adoption ------------------------------------------------------------------------


def test_exit_leaves_what_whoever_waits_needs(w):
    """Status, time, last words; mail is lost, fd 0 is closed."""
    pid = w.rested()
    w.send(pid, "unread")
    p = w.exit(pid, 7, farewell="bye", reason="exit")
    assert (p.state, p.status, p.ended) == (ProcState.ZOMBIE, 7, w.k.now - 1)
    assert (p.farewell, p.reason, p.inbox, p.input_open, p.notify) == ("bye", "exit", (), False, ())
    assert w.events("exit", pid) == [{"status": 7, "reason": "exit"}]
    assert (w.words(pid), todo(w, pid)) == (["user: hello", "assistant: hi"], Sleep("-"))


def test_exit_ends_the_run_that_is_under_way(w):
    """Whoever waits for the run is told; one that had ended keeps how it did."""
    running, done = w.asked(), w.asked()
    w.land(done, said("hi"))
    assert w.exit(running, 5).run.stop_reason == "exit"
    assert w.exit(done, 0).run.stop_reason == "end_turn"
    assert w[running].run.ended > 0
    assert w[running].verdict == 5


def test_exit_keeps_the_reason_for_which_it_rested(w):
    """Nothing better is known."""
    pid = w.asked()
    proc.fail(w.k, w[pid], "EIO: gone")
    assert w.exit(pid, 1).reason == "EIO: gone"


def test_nobody_exits_twice(w):
    """ESRCH: the first status stands."""
    pid = w.spawn()
    w.exit(pid, 3)
    with refused(w, Errno.ESRCH):
        proc.exit_(w.k, pid, 4)
    assert w[pid].status == 3


def test_children_of_an_ended_process_are_adopted(w):
    """Living and ended alike; the birth parent stays for ever."""
    pid = w.spawn()
    alive, dead = w.spawn(ppid=pid), w.spawn(ppid=pid)
    w.exit(dead)
    w.exit(pid)
    assert [(w[child].ppid, w[child].birth) for child in (alive, dead)] == [(INIT, pid), (INIT, pid)]
    tree_holds(w)
    boots_equal(w)


def test_notify_puts_a_line_into_the_parents_input(w):
    """It keeps the parent until the child's end, which is then its next message."""
    pid = w.asked()
    child = w.spawn(ppid=pid, name="kid")
    w.k.put(replace(w[pid], notify=(child,)))
    w.land(pid, said("started"))
    assert todo(w, pid) == Sleep("fd:0"), "it would exit before its child has ended"
    w.exit(child, 4)
    p = w[pid]
    assert (p.notify, [mail.text for mail in p.inbox]) == ((), ["Process 3 (kid) has ended with status 4."])
    assert todo(w, pid) == TakeInput()
    w.take(pid)
    w.land(pid, said("seen"))
    assert todo(w, pid) == Exit(0)


def test_nobody_is_notified_who_did_not_ask(w):
    """Only children that are named, only a parent that lives."""
    pid = w.spawn()
    quiet, named = w.spawn(ppid=pid), w.spawn(ppid=pid)
    w.k.put(replace(w[pid], notify=(named,)))
    w.exit(quiet)
    assert (w[pid].inbox, w[pid].notify) == ((), (named,))
    w.exit(pid)
    w.exit(named)
    assert w[pid].inbox == ()


def test_each_child_is_told_of_once_and_for_itself(w):
    """The end of one does not silence the other."""
    pid = w.spawn()
    first, second = w.spawn(ppid=pid), w.spawn(ppid=pid)
    w.k.put(replace(w[pid], notify=(first, second)))
    w.exit(first)
    assert (w[pid].notify, len(w[pid].inbox)) == ((second,), 1)
    w.exit(second)
    assert (w[pid].notify, len(w[pid].inbox)) == ((), 2)


def test_collecting_hides_and_keeps(w):
    """Once or often: status and history stay."""
    pid = w.spawn()
    w.exit(pid, 3)
    proc.collect(w.k, pid)
    w.commit()
    assert (w[pid].collected, w[pid].status) == (True, 3)
    proc.collect(w.k, pid)
    assert not w.k.change
    with refused(w, Errno.ESRCH):
        proc.collect(w.k, Pid(99))


def test_removal_forgets_an_ended_process(w):
    """ESRCH from then on, also after a restart; its pid is not given again."""
    pid = w.spawn(name="bob")
    w.exit(pid)
    proc.remove(w.k, pid)
    w.boot()
    with refused(w, Errno.ESRCH):
        w.k.proc(pid)
    assert w.spawn() == pid + 1
    assert "bob" not in w.k.names


def test_removal_of_a_living_process_is_ebusy(w):
    """ESRCH for one that is not there."""
    pid = w.spawn()
    with refused(w, Errno.EBUSY):
        proc.remove(w.k, pid)
    with refused(w, Errno.ESRCH):
        proc.remove(w.k, 99)


def test_who_binds_the_living_is_not_removed(w):
    """EBUSY while somebody below an ended process lives and its limits hold for him."""
    pid = w.spawn(limits={"turns": Limit(None, 5.0)})
    child = w.spawn(ppid=pid)
    w.exit(pid)
    with refused(w, Errno.EBUSY):
        proc.remove(w.k, pid)
    w.exit(child)
    proc.remove(w.k, pid)
    assert pid not in w.k.procs


def test_what_the_removed_have_used_is_not_forgotten(w):
    """It counts for those above, also after a restart."""
    top = w.spawn()
    child = w.asked(ppid=top)
    w.land(child, said("hi"))
    used = w.k.total(top)
    assert (used.turns, used.tokens) == (1, 113)
    w.exit(child)
    proc.remove(w.k, child)
    w.boot()
    assert w.k.total(top) == replace(used, procs=1)


def test_a_fork_outlives_the_removal_of_its_parent(w):
    """It shares nodes, and needs no process for them."""
    pid = w.rested()
    (child,) = w.fork(pid)
    w.exit(pid)
    proc.remove(w.k, pid)
    w.boot()
    assert w.words(child) == ["user: hello", "assistant: hi"]
    assert (w[child].family, w[child].birth) == (pid, INIT)


# --- the small ones ---------------------------------------------------------------------------------


def test_a_process_is_reniced_and_renamed(w):
    """One field each."""
    pid = w.spawn()
    was = w[pid]
    proc.renice(w.k, pid, 5)
    proc.rename(w.k, pid, "bob")
    assert w[pid] == replace(was, nice=5, name="bob")
    w.commit()
    proc.rename(w.k, pid, "bob")
    assert not w.k.change, "its own name is no news"
    proc.rename(w.k, pid, "")
    assert (w[pid].name, w.k.names) == ("", {})


@pytest.mark.parametrize("name", NAMELESS)
def test_a_rename_refuses_what_a_spawn_refuses(w, name):
    """EINVAL; EEXIST for a name that is taken."""
    pid, _ = w.spawn(), w.spawn(name="bob")
    with refused(w, Errno.EINVAL):
        proc.rename(w.k, pid, name)
    with refused(w, Errno.EEXIST):
        proc.rename(w.k, pid, "bob")


def test_the_small_ones_refuse_who_is_not_there(w):
    """ESRCH; an ended process is renamed, but not reniced."""
    pid = w.spawn()
    w.exit(pid)
    for target in (pid, 99):
        with refused(w, Errno.ESRCH):
            proc.renice(w.k, target, 1)
    with refused(w, Errno.ESRCH):
        proc.rename(w.k, 99, "x")
    proc.rename(w.k, pid, "late")
    assert w[pid].name == "late"
