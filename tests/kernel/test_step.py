"""What a process does next, computed from where it stands."""

import itertools

import pytest

from llmprocd.abi.types import ImageId, MessageId, Pid, ProcState
from llmprocd.kernel import step
from llmprocd.kernel.state import At, LastTurn, Mail, Proc
from llmprocd.kernel.step import Exit, Infer, RunTools, Sleep, TakeInput

MAIL = (Mail(1, "hello"),)


def proc(**more: object) -> Proc:
    head = None if more.get("at", At.EMPTY) is At.EMPTY else MessageId(7)
    return Proc(pid=Pid(2), family=Pid(2), image=ImageId(1), head=head, **more)


@pytest.mark.parametrize(
    ("p", "todo"),
    [
        (proc(inbox=MAIL), TakeInput()),
        (proc(input_open=True), Sleep("fd:0")),
        (proc(), Exit(0)),
        (proc(at=At.USER), Infer()),
        (proc(at=At.USER, inbox=MAIL), Infer()),
        (proc(at=At.USER, rest=True, inbox=MAIL), TakeInput()),
        (proc(at=At.USER, rest=True, input_open=True), Sleep("fd:0")),
        (proc(at=At.USER, rest=True, verdict=130), Exit(130)),
        (proc(at=At.PAUSE), Infer()),
        (proc(at=At.PAUSE, rest=True, input_open=True), Sleep("fd:0")),
        (proc(at=At.ASKS), RunTools()),
        (proc(at=At.ASKS, inbox=MAIL), RunTools()),
        (proc(at=At.DONE, inbox=MAIL), TakeInput()),
        (proc(at=At.DONE, input_open=True), Sleep("fd:0")),
        (proc(at=At.DONE, notify=(Pid(3),)), Sleep("fd:0")),
        (proc(at=At.DONE), Exit(0)),
        (proc(at=At.DONE, verdict=1), Exit(1)),
        (proc(at=At.USER, last_turn=LastTurn.DUE), Infer()),
        (proc(at=At.USER, last_turn=LastTurn.ASKED), Infer()),
        (proc(at=At.DONE, input_open=True, last_turn=LastTurn.DUE), Sleep("fd:0")),
        (proc(at=At.DONE, inbox=MAIL, input_open=True, last_turn=LastTurn.OVER), Exit(152)),
        (proc(at=At.PAUSE, last_turn=LastTurn.OVER), Exit(152)),
    ],
)
def test_the_head_says_what_comes_next(p, todo):
    """The one thing to do, for each place to stand."""
    assert step.next_step(p) == todo


def every() -> list[Proc]:
    """A process in every position there is."""
    return [
        proc(at=at, rest=rest, inbox=inbox, input_open=is_open, last_turn=last, state=state)
        for at, rest, inbox, is_open, last, state in itertools.product(
            At, (False, True), ((), MAIL), (False, True), LastTurn, ProcState
        )
    ]


def test_a_process_told_to_rest_never_asks_the_model():
    """While it rests the step is input, sleep or exit: else it would be asked for ever."""
    resting = [p for p in every() if p.rest and p.at in {At.USER, At.PAUSE, At.DONE}]
    assert resting
    assert not any(isinstance(step.next_step(p), Infer | RunTools) for p in resting)


def test_a_process_that_is_stopped_or_ended_does_nothing():
    """Neither moves by itself, wherever it stands."""
    still = [p for p in every() if p.state is not ProcState.LIVE]
    assert {step.next_step(p) for p in still} == {Sleep("-")}


def test_an_open_input_keeps_a_process_but_for_its_last_turn():
    """With fd 0 open it never exits by itself."""
    kept = [p for p in every() if p.input_open and p.last_turn is not LastTurn.OVER]
    assert not any(isinstance(step.next_step(p), Exit) for p in kept)


def test_running_is_what_infers_or_runs_tools():
    """`running` and `next_step` never disagree about a process that is not held."""
    for p in every():
        if p.state is ProcState.LIVE and p.last_turn is not LastTurn.OVER:
            assert step.running(p) == isinstance(step.next_step(p), Infer | RunTools)


def test_a_stopped_run_is_still_a_run():
    """STOP holds a run, it does not end it; only an end does."""
    assert step.running(proc(at=At.USER, state=ProcState.STOPPED))
    assert not step.running(proc(at=At.USER, state=ProcState.ZOMBIE))
