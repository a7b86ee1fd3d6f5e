"""The table: state x signal -> action.

Law: a signal is state first; whoever runs the process's step finds out by the epoch and gives up.
"""

from enum import Enum, auto

from msgspec.structs import replace

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import INIT, Pid, ProcState, Signal
from llmprocd.kernel import proc, step
from llmprocd.kernel.state import Kernel, LastTurn, Node, Proc, Reply


class When(Enum):
    """What a process does when the signal arrives."""

    RUNS = 0
    SLEEPS = 1
    STOPPED = 2
    ENDED = 3


class Action(Enum):
    """What the signal does to it."""

    NOTHING = auto()
    INTERRUPT = auto()  # the run ends, then it rests
    TERMINATE = auto()  # the run ends, then it exits 143
    KILL = auto()  # exits 137
    STOP = auto()
    CONTINUE = auto()
    RELOAD = auto()  # the next turn uses the program file as it is now
    LAST_TURN = auto()  # one more model call, then exit 152
    ESRCH = auto()


_A = Action

TABLE: dict[Signal, tuple[Action, Action, Action, Action]] = {
    #                runs             sleeps           stopped          ended
    Signal.INT: (_A.INTERRUPT, _A.INTERRUPT, _A.INTERRUPT, _A.ESRCH),
    Signal.TERM: (_A.TERMINATE, _A.TERMINATE, _A.TERMINATE, _A.ESRCH),
    Signal.KILL: (_A.KILL, _A.KILL, _A.KILL, _A.ESRCH),
    Signal.STOP: (_A.STOP, _A.STOP, _A.NOTHING, _A.ESRCH),
    Signal.CONT: (_A.NOTHING, _A.NOTHING, _A.CONTINUE, _A.ESRCH),
    Signal.HUP: (_A.RELOAD, _A.RELOAD, _A.RELOAD, _A.ESRCH),
    Signal.XCPU: (_A.LAST_TURN, _A.LAST_TURN, _A.LAST_TURN, _A.ESRCH),
    Signal.CHLD: (_A.NOTHING, _A.NOTHING, _A.NOTHING, _A.ESRCH),
}


def when(p: Proc) -> When:
    if not p.live:
        return When.ENDED
    if p.stopped:
        return When.STOPPED
    return When.RUNS if step.running(p) else When.SLEEPS


def action(p: Proc, sig: Signal) -> Action:
    """What a signal would do; ESRCH for an ended process."""
    found = TABLE[sig][when(p).value]
    if found is Action.ESRCH:
        raise KernelError(Errno.ESRCH, f"process {p.label} has ended with status {p.status}", pid=p.pid)
    return found


def allowed(pid: int) -> None:
    """EPERM for init and for everybody at once."""
    if pid in {INIT, -1}:
        what = "the daemon itself" if pid == INIT else "every process at once"
        raise KernelError(Errno.EPERM, f"{what} cannot be signalled; use llmprocctl daemon stop")


def deliver(
    k: Kernel, pid: Pid, sig: Signal, node: Node | None, partial: Reply | None, sender: str = ""
) -> None:
    """Act on a signal. `node` is the head's node where the process is running tools.

    Raises ESRCH, EPERM. RELOAD is left to the caller, who reads the file first.
    """
    allowed(pid)
    p = k.proc(pid)
    what = action(p, sig)
    k.emit("signal", pid, signal=sig.name, sender=sender)
    match what:
        case Action.INTERRUPT:
            proc.interrupt(k, pid, node, partial, verdict=128 + sig)
        case Action.TERMINATE | Action.KILL:
            kept = partial if what is Action.TERMINATE else None
            proc.interrupt(k, pid, node, kept, verdict=128 + sig)
            proc.exit_(k, pid, 128 + sig, reason=f"signal {sig.name}")
        case Action.STOP:
            k.put(replace(p, state=ProcState.STOPPED))
        case Action.CONTINUE:
            k.put(replace(p, state=ProcState.LIVE))
        case Action.LAST_TURN:
            k.put(replace(p, last_turn=LastTurn.DUE if p.last_turn is LastTurn.NO else p.last_turn))
        case Action.NOTHING | Action.RELOAD | Action.ESRCH:
            pass
