"""Every stop reason has an effect, and the table has every stop reason that the SDK knows."""

from typing import get_args

import pytest
from anthropic.types.beta import BetaStopReason
from anthropic.types.stop_reason import StopReason
from kernelkit import World, asking, said

from llmprocd.kernel import stop
from llmprocd.kernel.state import At
from llmprocd.kernel.step import Exit, Infer, RunTools, next_step

EFFECTS = {
    "end_turn": Exit(0),
    "tool_use": Exit(0),  # without a call in the answer
    "max_tokens": Exit(0),
    "stop_sequence": Exit(0),
    "pause_turn": Infer(),
    "compaction": Infer(),
    "refusal": Exit(0),
    "model_context_window_exceeded": Exit(1),
    "a word of tomorrow": Exit(0),
}


@pytest.fixture
def asked():
    """A world, and a process in it that waits for the model."""
    w = World()
    return w, w.asked()


def test_no_word_of_the_sdk_is_missing():
    """Also those of its beta interface."""
    assert set(get_args(StopReason)) | set(get_args(BetaStopReason)) == set(stop.STOPS)
    assert set(EFFECTS) - set(stop.STOPS) == {"a word of tomorrow"}


@pytest.mark.parametrize(("reason", "step"), EFFECTS.items())
def test_what_follows_an_answer_in_words(asked, reason, step):
    """The run goes on, or ends with that stop reason and the status that it stands for."""
    w, pid = asked
    p = w.land(pid, said("so", reason))
    assert next_step(p) == step
    assert p.stop_reason == ("" if step == Infer() else reason)


@pytest.mark.parametrize("reason", EFFECTS)
def test_calls_are_run_for_tool_use_alone(asked, reason):
    """In any other answer they were cut off: they get errors, and the run ends."""
    w, pid = asked
    p = w.land(pid, asking("read_file", stop_reason=reason))
    if reason == "tool_use":
        assert next_step(p) == RunTools()
    else:
        assert (p.at, p.rest, p.stop_reason) == (At.USER, True, reason)
        assert next_step(p) == Exit(stop.of(reason).verdict)


def test_a_full_window_is_said_in_a_sentence(asked):
    """The answer is kept, and stderr and `reason` say what has happened and what can be done."""
    w, pid = asked
    p = w.land(pid, said("so far", "model_context_window_exceeded"))
    assert p.reason.startswith("E2BIG: ")
    assert "goto" in p.reason
    assert p.stderr == len(p.reason) + 1
