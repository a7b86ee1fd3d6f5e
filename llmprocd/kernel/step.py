"""What a process does next.

Law: the step is computed from the process's head and from nothing else that could disagree with it.
Law: only a model's reply puts a head on a node that asks for tools.
"""

import msgspec

from llmprocd.abi.types import Signal
from llmprocd.kernel.state import At, LastTurn, Proc


class Infer(msgspec.Struct, frozen=True):
    """Ask the model."""


class RunTools(msgspec.Struct, frozen=True):
    """Run what the model asked for, or wait for what runs."""


class TakeInput(msgspec.Struct, frozen=True):
    """Make the next message of fd 0 a user message."""


class Sleep(msgspec.Struct, frozen=True):
    """Nothing to do until somebody does something."""

    wchan: str


class Exit(msgspec.Struct, frozen=True):
    """End."""

    status: int


Step = Infer | RunTools | TakeInput | Sleep | Exit


def next_step(p: Proc) -> Step:
    """The one thing that a process has to do now."""
    if not p.live or p.stopped:
        return Sleep("-")
    if p.last_turn is LastTurn.OVER:
        return Exit(128 + Signal.XCPU)
    if p.at is At.ASKS:
        return RunTools()
    if p.at in {At.USER, At.PAUSE} and not p.rest:
        return Infer()
    if p.inbox:
        return TakeInput()
    if p.input_open or p.notify or p.parked:
        return Sleep("fd:0")
    return Exit(p.verdict)


def running(p: Proc) -> bool:
    """Is a run under way, stopped or not?"""
    return p.live and (p.at is At.ASKS or (p.at in {At.USER, At.PAUSE} and not p.rest))
