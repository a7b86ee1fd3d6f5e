"""Processes: `spawn kill stop cont wait send renice rm`."""

from llmprocctl import launch, render, signals
from llmprocctl import session as sessions
from llmprocctl.client import RefusedError
from llmprocctl.session import Session, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def spawn(session: Session, *, program: str, prompt: tuple[str, ...], **options: "Any") -> int:
    """Start a process and print its pid."""
    stdin = launch.Stdin()
    words = prompt
    if prompt == ("-",):
        stdin, words = _needed(launch.read_stdin()), ()
    try:
        pid = launch.spawn(session, program=program, words=words, stdin=stdin, **options)
    except launch.CannotStartError as exc:
        session.say(str(exc))
        return exc.status
    finally:
        stdin.close()
    render.put(f"{pid}\n")
    return 0


def kill(session: Session, *, pids: tuple[str, ...], signal: str | None = None, names: bool = False) -> int:
    """Send a signal to processes, or print what signals there are."""
    if names:
        return _print_signals(pids)
    if not pids:
        raise UsageError("of which process? (llmprocctl kill PID...)")
    word = signals.name(signal or "TERM")
    if word is None:
        raise UsageError(f"{signal}: no such signal (there are {' '.join(signals.NAMES.values())})")
    sent: int | str = 0 if word == "0" else word
    trees = tuple(pid[1:] for pid in pids if pid.startswith("-"))
    alone = tuple(pid for pid in pids if not pid.startswith("-"))

    def one(pid: int) -> int:
        return session.client.send("proc.signal", pid=pid, signal=sent)

    def tree(pid: int) -> int:
        return session.client.send("proc.signal", pid=pid, signal=sent, tree=True)

    return session.each(alone, one) | session.each(trees, tree, prefix="-")


def wait(session: Session, *, pids: tuple[str, ...], first: bool, timeout: float | None, json: bool) -> int:
    """Wait for processes to end."""
    asked = _known(session, pids)
    statuses: dict[int, int] = {}
    if asked:
        millis = None if timeout is None else int(timeout * 1000)
        wanted = [*dict.fromkeys(asked.values())]
        try:
            ended = session.call("proc.wait", pids=wanted, any=first or None, timeout_ms=millis)["procs"]
        except RefusedError as error:
            if error.name == "ETIMEDOUT":
                return sessions.TIMED_OUT
            session.fault("", error)
            return sessions.NOT_FOUND if error.name in {"ESRCH", "ECHILD"} else sessions.FAILED
        if json:
            render.put_json(ended)
        statuses = {row["pid"]: row["status"] for row in ended}
    if first and statuses:
        return next(iter(statuses.values()))
    return statuses.get(asked.get(pids[-1], 0), sessions.NOT_FOUND)


def send(session: Session, *, pid: str, text: tuple[str, ...], close: bool) -> int:
    """Send a process its next user message."""
    words: str | None = " ".join(text)
    target = session.pid(pid)
    if text == ("-",):
        return _send_stdin(session, target, close=close)
    if not text:
        if not close:
            raise UsageError("what text? (llmprocctl send PID TEXT...)")
        words = None
    session.call("proc.send", pid=target, text=words, close=close or None)
    return 0


def renice(session: Session, *, nice: str, pids: tuple[str, ...]) -> int:
    """Change how processes are weighed."""
    try:
        level = int(nice)
    except ValueError:
        level = 100
    if not -20 <= level <= 19:
        raise UsageError(f"{nice}: not a number from -20 to 19")
    return session.each(pids, lambda pid: session.client.send("proc.renice", pid=pid, nice=level))


def rm(session: Session, *, pids: tuple[str, ...]) -> int:
    """Remove ended processes."""
    return session.each(pids, lambda pid: session.client.send("proc.remove", pids=[pid]))


def _known(session: Session, words: tuple[str, ...]) -> dict[str, int]:
    """The processes that there are; the others are complained of."""
    asked: dict[str, int] = {}
    for word in words:
        try:
            asked[word] = session.pid(word)
        except UsageError as exc:
            session.say(str(exc))
        except RefusedError as error:
            session.fault(word, error)
    if not asked:
        return {}
    rows = session.call("proc.list", all=True, pids=[*asked.values()])["procs"]
    there = {row["pid"] for row in rows}
    for word, pid in asked.items():
        if pid not in there:
            session.fault(word, "no such process")
    return {word: pid for word, pid in asked.items() if pid in there}


def _print_signals(words: tuple[str, ...]) -> int:
    """`kill -l`: all of them; the name of a number or an exit status, or the number of a name."""
    if not words:
        render.put("".join(f"{number:2} {name}\n" for number, name in signals.NAMES.items()))
    for word in words:
        number = int(word) if word.isdecimal() else 0
        name = signals.name(str(number - 128) if number > 128 else word)
        if name is None or name == "0":
            raise UsageError(f"{word}: no such signal")
        render.put(f"{name if number else signals.number(name)}\n")
    return 0


def _send_stdin(session: Session, pid: int, *, close: bool) -> int:
    """What stdin holds is the message; a long one is written to fd 0 as bytes."""
    stdin = _needed(launch.read_stdin())
    try:
        if not stdin.path:
            session.call("proc.send", pid=pid, text=stdin.text, close=close or None)
            return 0
        with open(stdin.path, "rb") as file:  # noqa: PTH123 - pathlib costs five milliseconds
            data = file.read()
    finally:
        stdin.close()
    if len(data) > launch.LARGEST:
        raise UsageError(f"stdin holds {len(data)} bytes; a message may have {launch.LARGEST}")
    session.call("fd.write", pid=pid, fd=0, data=data, eof=close or None)
    return 0


def _needed(stdin: launch.Stdin) -> launch.Stdin:
    if not stdin.text and not stdin.path:
        raise UsageError("stdin is empty")
    return stdin
