"""The table of signals, cell by cell: what becomes of the process, not only which action is named."""

import pytest
from kernelkit import World, asking, boots_equal, image, paths_hold, refused, said
from msgspec.structs import replace

from llmprocd.abi.errno import Errno
from llmprocd.abi.types import INIT, ProcState, Signal, Usage
from llmprocd.kernel import proc, signal, step
from llmprocd.kernel.signal import Action, When
from llmprocd.kernel.state import At, LastTurn, Proc

CUT = "Interrupted: this call was cut off by a signal and may have taken effect."


@pytest.fixture
def w():
    return World()


def same_but(p: Proc, was: Proc, **changed: object) -> None:
    """A process is what it was, but for the fields named."""
    assert p == replace(was, **changed)


def stop(w: World, pid: int) -> Proc:
    return w.kill(pid, Signal.STOP)


# --- the shape of the table -------------------------------------------------------------------------


def test_every_signal_has_a_row_with_every_state():
    """No signal can arrive for which there is no rule."""
    assert set(signal.TABLE) == set(Signal)
    assert {len(row) for row in signal.TABLE.values()} == {len(When)}


def test_states_are_told_apart(w):
    """Running, sleeping, stopped and ended are what the columns say."""
    runs, sleeps, stopped, ended = w.asked(), w.rested(), w.asked(), w.spawn()
    stop(w, stopped)
    w.exit(ended)
    tools, _ = w.in_tools()
    states = [signal.when(w[pid]) for pid in (runs, tools, sleeps, stopped, ended)]
    assert states == [When.RUNS, When.RUNS, When.SLEEPS, When.STOPPED, When.ENDED]


@pytest.mark.parametrize("sig", list(Signal))
def test_an_ended_process_takes_no_signal(w, sig):
    """Every signal to an ended process is ESRCH."""
    pid = w.spawn()
    w.exit(pid, 3)
    with refused(w, Errno.ESRCH):
        w.kill(pid, sig)


@pytest.mark.parametrize("sig", list(Signal))
def test_a_process_that_never_was_takes_no_signal(w, sig):
    """Every signal to an unknown pid is ESRCH."""
    with refused(w, Errno.ESRCH):
        signal.deliver(w.k, 99, sig, None, None)


@pytest.mark.parametrize("sig", list(Signal))
@pytest.mark.parametrize("pid", [INIT, -1])
def test_the_daemon_and_everybody_are_out_of_reach(w, pid, sig):
    """Pid 1 and -1 are refused, whatever the signal."""
    with refused(w, Errno.EPERM):
        signal.deliver(w.k, pid, sig, None, None)


@pytest.mark.parametrize("sig", list(Signal))
@pytest.mark.parametrize("where", ["runs", "tools", "sleeps", "stopped", "stopped in tools"])
def test_each_signal_is_told_and_leaves_a_valid_conversation(w, sig, where):
    """Whatever arrives whenever: one event says so, every call is answered or still to be run, it boots."""
    pid = {"runs": w.asked, "sleeps": w.rested, "stopped": w.asked}.get(where, lambda: w.in_tools()[0])()
    if "stopped" in where:
        stop(w, pid)
        w.disk.events.clear()
    w.kill(pid, sig, said("half"))
    assert w.events("signal", pid) == [{"signal": sig.name, "sender": "uid 0"}]
    paths_hold(w, set())
    boots_equal(w)


# --- INT --------------------------------------------------------------------------------------------


def test_int_in_inference_keeps_what_was_streamed(w):
    """The partial answer becomes the message, and the process rests on it."""
    pid = w.asked(None)
    epoch = w[pid].epoch
    p = w.kill(pid, Signal.INT, said("half an ans", "interrupted"))
    assert w.words(pid) == ["user: hello", "assistant: half an ans"]
    assert (p.at, p.rest, p.epoch) == (At.DONE, True, epoch + 1)
    assert (p.verdict, p.stop_reason, p.reason, p.status) == (130, "interrupted", "interrupted", None)
    assert (p.run.stop_reason, p.run.ended > 0, p.state) == ("interrupted", True, ProcState.LIVE)
    assert step.next_step(p) == step.Sleep("fd:0")
    assert w.events("turn_end", pid) == [{"stop_reason": "interrupted", "run": 1}]
    assert w.disk.contents[proc.FileId(-2 * pid)] == b"half an ans\n"


def test_int_in_inference_counts_the_tokens_of_the_answer_it_keeps(w):
    """What was streamed has been paid for."""
    pid = w.asked(None)
    p = w.kill(pid, Signal.INT, said("half", "interrupted"))
    assert p.usage == p.run.usage == Usage(100, 10, 1, 2)
    assert (p.turns, p.run.api_calls) == (1, 1)
    assert w.events("api_response", pid)[-1]["text"] == "half"


@pytest.mark.parametrize("partial", [None, said("", "interrupted")])
def test_int_before_the_first_word_leaves_the_question(w, partial):
    """With nothing streamed the head stays on the user's message, and rests there."""
    pid = w.asked(None)
    p = w.kill(pid, Signal.INT, partial)
    assert w.words(pid) == ["user: hello"]
    assert (p.at, p.rest, p.turns) == (At.USER, True, 0)
    assert step.next_step(p) == step.Sleep("fd:0")
    w.boot()
    assert step.next_step(w[pid]) == step.Sleep("fd:0"), "it would ask again after a restart"


def test_int_answers_the_calls_that_had_streamed_whole(w):
    """A kept call is answered with an error, so that the conversation goes on."""
    pid = w.asked(None)
    p = w.kill(pid, Signal.INT, asking("bash", text="let me", stop_reason="interrupted"))
    assert w.words(pid) == ["user: hello", "assistant: let me | bash()", f"user: {CUT}"]
    assert (p.at, p.rest) == (At.USER, True)
    assert step.next_step(p) == step.Sleep("fd:0")


def test_int_in_tools_keeps_results_and_answers_the_rest(w):
    """Calls that ended keep their results, the others get an error; partial text is none of theirs."""
    pid, (first, second) = w.in_tools("bash", "bash", prompt=None)
    w.finish(pid, second, "fine")
    p = w.kill(pid, Signal.INT, said("stale"))
    assert w.words(pid)[-1] == f"user: {CUT} | fine"
    assert (p.at, p.rest, p.begun, p.results, dict(p.awaiting)) == (At.USER, True, (), (), {})
    assert p.verdict == 130
    assert first.id != second.id


def test_int_ends_a_process_whose_input_is_closed_and_empty(w):
    """Without input to come it exits 130."""
    pid = w.asked()
    assert step.next_step(w.kill(pid, Signal.INT, said("half"))) == step.Exit(130)


def test_int_lets_waiting_mail_have_its_run(w):
    """The run ends; the message that waits begins the next."""
    pid = w.asked(None)
    w.send(pid, "next")
    p = w.kill(pid, Signal.INT)
    assert step.next_step(p) == step.TakeInput()
    p = w.take(pid)
    assert (p.rest, p.verdict, p.reason, p.run.seq) == (False, 0, "", 2)


def test_int_sleeping_does_nothing(w):
    """A process that has no run has nothing to interrupt."""
    pid = w.rested()
    was = w[pid]
    same_but(w.kill(pid, Signal.INT), was)


def test_int_stopped_ends_the_run_and_stays_stopped(w):
    """As when running; but nothing new starts until CONT."""
    pid = w.asked(None)
    stop(w, pid)
    p = w.kill(pid, Signal.INT, said("half"))
    assert (p.state, p.at, p.rest, p.verdict) == (ProcState.STOPPED, At.DONE, True, 130)
    assert step.next_step(p) == step.Sleep("-")
    assert step.next_step(w.kill(pid, Signal.CONT)) == step.Sleep("fd:0")


def test_int_stopped_and_closed_exits_at_cont(w):
    """The end waits for CONT too."""
    pid = w.asked()
    stop(w, pid)
    w.kill(pid, Signal.INT)
    assert step.next_step(w.kill(pid, Signal.CONT)) == step.Exit(130)


# --- TERM and KILL ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("sig", "status"), [(Signal.TERM, 143), (Signal.KILL, 137)])
@pytest.mark.parametrize("where", ["runs", "sleeps", "stopped", "tools"])
def test_term_and_kill_end_a_process_wherever_it_is(w, sig, status, where):
    """The status is 128 and the signal, at once."""
    pid = {"runs": w.asked, "sleeps": w.rested, "stopped": w.rested}.get(where, lambda: w.in_tools()[0])()
    if where == "stopped":
        stop(w, pid)
    epoch, now = w[pid].epoch, w.k.now
    p = w.kill(pid, sig)
    assert (p.state, p.status, p.ended, p.reason) == (ProcState.ZOMBIE, status, now, f"signal {sig.name}")
    assert p.epoch > epoch
    assert (p.inbox, p.input_open) == ((), False)
    assert w.events("exit", pid) == [{"status": status, "reason": f"signal {sig.name}"}]
    assert step.next_step(p) == step.Sleep("-")


def test_term_keeps_what_was_streamed_and_kill_does_not(w):
    """TERM is INT and an exit; KILL asks for nothing more."""
    polite, rude = w.asked(), w.asked()
    w.kill(polite, Signal.TERM, said("half"))
    w.kill(rude, Signal.KILL, said("half"))
    assert w.words(polite) == ["user: hello", "assistant: half"]
    assert w.words(rude) == ["user: hello"]


@pytest.mark.parametrize("sig", [Signal.TERM, Signal.KILL])
def test_term_and_kill_answer_calls_so_that_the_process_can_be_forked(w, sig):
    """An ended process is resumed by a fork: its conversation is whole."""
    pid, (call,) = w.in_tools("bash")
    w.kill(pid, sig)
    assert w.words(pid)[-1] == f"user: {CUT}"
    assert w[pid].at is At.USER
    (child,) = w.fork(pid)
    assert w.words(child) == w.words(pid)
    assert call.id in {block["tool_use_id"] for block in _last_blocks(w, child)}


def _last_blocks(w: World, pid: int) -> list[dict]:
    return proc.history.blocks(w.node(pid))


# --- STOP and CONT ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["runs", "sleeps"])
def test_stop_is_a_gate_and_no_cancel(w, where):
    """Only the state changes: what is under way may land."""
    pid = w.asked() if where == "runs" else w.rested()
    was = w[pid]
    p = stop(w, pid)
    same_but(p, was, state=ProcState.STOPPED)
    assert proc.current(w.k, was) == p, "a call that is under way could not land"
    assert step.next_step(p) == step.Sleep("-")


def test_stop_stopped_does_nothing(w):
    """Once is enough."""
    pid = w.asked()
    same_but(stop(w, pid), stop(w, pid))


@pytest.mark.parametrize("where", ["runs", "sleeps"])
def test_cont_does_nothing_to_a_process_that_is_not_stopped(w, where):
    """CONT without STOP is silent."""
    pid = w.asked() if where == "runs" else w.rested()
    was = w[pid]
    same_but(w.kill(pid, Signal.CONT), was)


def test_cont_goes_on_where_stop_held(w):
    """After STOP and CONT the process is what it was, also with a restart between."""
    pid = w.asked()
    was = w[pid]
    stop(w, pid)
    w.boot()
    assert w[pid].stopped
    same_but(w.kill(pid, Signal.CONT), was)
    assert step.next_step(w[pid]) == step.Infer()


def test_an_answer_lands_while_stopped_and_its_tools_wait(w):
    """Nothing new starts: the calls are not even written down as begun."""
    pid = w.asked()
    stop(w, pid)
    reply = asking("bash")
    p = w.land(pid, reply, (reply.asks[0].id,))
    assert (p.at, p.begun, p.state) == (At.ASKS, (), ProcState.STOPPED)
    assert step.next_step(p) == step.Sleep("-")
    assert step.next_step(w.kill(pid, Signal.CONT)) == step.RunTools()


def test_a_stopped_process_takes_mail_goto_and_exec_for_later(w):
    """They work at once and take effect at CONT."""
    pid = w.rested()
    stop(w, pid)
    w.send(pid, "later")
    w.goto(pid, 1, "now")
    proc.exec_(w.k, pid, image(model="m-2"))
    w.commit()
    assert step.next_step(w[pid]) == step.Sleep("-")
    w.kill(pid, Signal.CONT)
    assert step.next_step(w.take(pid)) == step.Infer()
    assert w.words(pid) == ["user: hello", "user: now"]
    assert w.k.image(w[pid]).model == "m-2"


# --- HUP, XCPU, CHLD --------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["runs", "sleeps", "stopped"])
def test_hup_is_left_to_whoever_reads_the_file(w, where):
    """The table says RELOAD, and the process is as it was until `reload`."""
    pid = w.rested() if where == "sleeps" else w.asked()
    if where == "stopped":
        stop(w, pid)
    was = w[pid]
    assert signal.action(was, Signal.HUP) is Action.RELOAD
    same_but(w.kill(pid, Signal.HUP), was)
    proc.reload(w.k, pid, image(model="m-2"))
    w.commit()
    same_but(w[pid], was, image=w[pid].image)
    assert w.k.image(w[pid]).model == "m-2"
    assert proc.current(w.k, was) is not None, "the turn under way is not given up"


@pytest.mark.parametrize("where", ["runs", "sleeps", "stopped"])
def test_xcpu_makes_the_next_turn_the_last(w, where):
    """Nothing is cancelled; the next model call is announced as the last."""
    pid = w.rested() if where == "sleeps" else w.asked()
    if where == "stopped":
        stop(w, pid)
    was = w[pid]
    same_but(w.kill(pid, Signal.XCPU), was, last_turn=LastTurn.DUE)


@pytest.mark.parametrize("stage", list(LastTurn))
def test_xcpu_never_takes_a_process_back_on_its_way_out(w, stage):
    """A second XCPU finds it asked already, or done."""
    pid = w.asked()
    w.k.put(replace(w[pid], last_turn=stage))
    after = w.kill(pid, Signal.XCPU).last_turn
    assert after is (LastTurn.DUE if stage is LastTurn.NO else stage)


@pytest.mark.parametrize("where", ["runs", "sleeps", "stopped"])
def test_chld_changes_nothing(w, where):
    """It wakes whoever waits, outside of the kernel."""
    pid = w.rested() if where == "sleeps" else w.asked()
    if where == "stopped":
        stop(w, pid)
    was = w[pid]
    same_but(w.kill(pid, Signal.CHLD), was)


# --- what must be at hand ---------------------------------------------------------------------------


def test_tools_are_not_interrupted_without_their_message(w):
    """Whoever signals a process in its tools must bring the node: calls left unanswered poison a history."""
    pid, _ = w.in_tools()
    wrong = w.disk.nodes[1]
    for node in (None, wrong):
        with pytest.raises(AssertionError):
            signal.deliver(w.k, pid, Signal.INT, node, None)
