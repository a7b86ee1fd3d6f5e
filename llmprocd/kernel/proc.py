"""What can be done with a process.

Law: a verb that raises has changed nothing: all checks come before the first change.
Law: every tool use on a path is answered by exactly the next message. So whoever moves a process off a
node that asks for tools goes through `settle`, and only `land` puts a head on such a node.
Law: a step that has ended lands only if nobody has interrupted the process since (`current`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import (
    INIT,
    Access,
    FileId,
    ImageId,
    MessageId,
    Pid,
    ProcState,
    Signal,
    ToolUseId,
    Usage,
)
from llmprocd.kernel import access, history, limits, step, stop
from llmprocd.kernel.limits import Over
from llmprocd.kernel.state import (
    NOTHING,
    At,
    File,
    Image,
    Kernel,
    LastTurn,
    Limit,
    Mail,
    Node,
    Proc,
    Reply,
    Run,
    ToolCall,
    ToolResult,
    ToolUse,
    Use,
)

MAILBOX = 4 << 20
"""Characters that may wait in fd 0; one message always may. Each commit of a process writes them again."""

LAST_TURN = (
    "A limit of this process has been reached. This is your last turn: hand back what you have now, "
    "in words. Tools are not run any more."
)


# --- birth ------------------------------------------------------------------------------------------


class Birth(msgspec.Struct, frozen=True, kw_only=True):
    """What a new process is given."""

    image: ImageId
    ppid: Pid = INIT
    uid: int = 0
    access: Access = Access.ADMIN
    name: str = ""
    cwd: str = "/"
    env: Mapping[str, str] = {}
    nice: int = 0
    interactive: bool = False
    prompt: str | None = None
    fds: Mapping[int, FileId] = {}
    family: Pid | None = None
    limits: Mapping[str, Limit] = {}
    file: File | None = None  # what `fds` holds that is new


def check_name(k: Kernel, name: str) -> None:
    """EINVAL for a name that cannot be typed, EEXIST for one that a living process has."""
    if any(not char.isprintable() or char in "/%" for char in name) or name != name.strip() or name.isdigit():
        raise KernelError(Errno.EINVAL, f"name: {name!r} cannot be a process's name")
    holder = k.names.get(name)
    if name and holder is not None and k.procs[holder].live:
        raise KernelError(Errno.EEXIST, f"name: process {holder} is called {name!r} already")


def check_text(text: str, field: str = "text") -> None:
    """EINVAL for a text that says nothing: the API refuses it."""
    if not text.strip():
        raise KernelError(Errno.EINVAL, f"{field}: is blank")


def depth(k: Kernel, pid: Pid) -> int:
    count = 0
    while pid != INIT and (proc := k.procs.get(pid)) is not None:
        pid = proc.birth
        count += 1
    return count


def spawn(k: Kernel, birth: Birth) -> Proc:
    """Make a process.

    Raises EINVAL for a blank prompt or a bad name, EEXIST for a name that is taken, EAGAIN when the tree
    is too large or too deep, EDQUOT when there is no room for its file, ESRCH when the parent has ended.
    """
    ceiling = Access.ADMIN if birth.ppid == INIT else require_live(k, birth.ppid).access
    check_name(k, birth.name)
    if birth.prompt is not None:
        check_text(birth.prompt, "prompt")
    limits.room(k, birth.ppid, 1, birth.limits)
    if birth.file is not None:
        limits.space_at_birth(k, birth.ppid, birth.limits, birth.file.size)
    pid = Pid(k.take("pid"))
    proc = Proc(
        pid=pid,
        ppid=birth.ppid,
        birth=birth.ppid,
        family=birth.family or pid,
        uid=birth.uid,
        name=birth.name,
        cwd=birth.cwd,
        env=birth.env,
        image=birth.image,
        access=min(birth.access, ceiling),
        nice=birth.nice,
        began=k.now,
        fds=birth.fds,
        limits=birth.limits,
        made=int(birth.file is not None),
        made_bytes=birth.file.size if birth.file is not None else 0,
        input_open=birth.interactive or birth.prompt is None,
    )
    k.emit("spawn", pid, ppid=birth.ppid, program=k.image(proc).program, name=birth.name)
    if birth.file is not None:
        k.put_file(birth.file)
    if birth.prompt is not None:
        proc = _mail(k, proc, birth.prompt)
    return _born(k, proc)


def _born(k: Kernel, child: Proc) -> Proc:
    """Add a process to the table; those above it may have reached a soft limit by that."""
    k.put(child)
    limits.notice(k, child.pid)
    return k.proc(child.pid)


# --- fd 0 -------------------------------------------------------------------------------------------


def _mail(k: Kernel, p: Proc, text: str, *, max_iterations: int = 0, first: bool = False) -> Proc:
    mail = Mail(p.mails + 1, text, max_iterations, again=not text)
    k.emit("input", p.pid, mail=mail.seq, text=text)
    inbox = (mail, *p.inbox) if first else (*p.inbox, mail)
    return replace(p, inbox=inbox, mails=mail.seq)


def require_live(k: Kernel, pid: int) -> Proc:
    """A process that has not ended; ESRCH."""
    p = k.proc(pid)
    if not p.live:
        raise KernelError(Errno.ESRCH, f"process {p.label} has ended with status {p.status}", pid=p.pid)
    return p


def send(k: Kernel, pid: int, text: str | None, *, close: bool = False, max_iterations: int = 0) -> int:
    """Put a message into fd 0, or close it, or both; the message's number in that mailbox.

    Raises EPIPE when fd 0 is closed, EAGAIN when too much waits in it, EINVAL for a blank text, ESRCH.
    """
    p = require_live(k, pid)
    if text is not None:
        check_text(text)
        if not p.input_open:
            raise KernelError(Errno.EPIPE, f"fd 0 of process {p.label} is closed")
        if p.inbox and len(text) + sum(len(mail.text) for mail in p.inbox) > MAILBOX:
            raise KernelError(Errno.EAGAIN, f"fd 0 of process {p.label} is full; try again later")
        p = _mail(k, p, text, max_iterations=max_iterations)
    if close and p.input_open:
        p = replace(p, input_open=False)
        k.emit("input", p.pid, mail=p.mails, closed=True)
    k.put(p)
    return p.mails


def ask_again(k: Kernel, pid: int, *, max_iterations: int = 0) -> int:
    """A run without a text: the program's own prompt at first, else the model again from a user message.

    Raises EINVAL when the head is no user message.
    """
    p = require_live(k, pid)
    own = k.image(p).user_prompt
    if p.at is At.EMPTY and not p.inbox and own:
        p = _mail(k, p, own, max_iterations=max_iterations)
    elif p.at in {At.USER, At.PAUSE} or p.inbox:
        p = _mail(k, p, "", max_iterations=max_iterations)
    else:
        raise KernelError(Errno.EINVAL, f"prompt: process {p.label} has no user message to answer")
    return k.put(p).mails


def take_input(k: Kernel, pid: Pid, said: Callable[[Proc, str], tuple[Proc, str]]) -> Proc:
    """Make the first message of fd 0 the next user message, and begin its run.

    `said` may turn a long text into a descriptor and what the model reads of it.
    """
    p = k.proc(pid)
    mail, *inbox = p.inbox
    image = k.image(p)
    p = replace(p, inbox=tuple(inbox))
    if not mail.again:
        p, words = said(p, mail.text)
        p = p.moved(history.user_node(k, p.head, words, marked=image.offers("goto")))
    elif p.at not in {At.USER, At.PAUSE}:  # what was to be answered is gone, by goto or another run
        run = Run(seq=mail.seq, began=k.now, ended=k.now, stop_reason="nothing_to_answer")
        return k.put(replace(p, run=run))
    p = k.put(begin_run(k, p, seq=mail.seq, max_iterations=mail.max_iterations))
    limits.notice(k, pid)
    return k.proc(p.pid)


def begin_run(k: Kernel, p: Proc, *, seq: int = 0, max_iterations: int = 0) -> Proc:
    most = max_iterations or k.image(p).max_iterations
    run = Run(seq=seq, began=k.now, max_iterations=most, before=_total(k, p))
    return replace(p, rest=False, parked=False, run=run, verdict=0, stop_reason="", reason="")


def _total(k: Kernel, p: Proc) -> Use:
    """What the subtree of a process has used once `p` is in the table."""
    there = k.procs.get(p.pid)
    return k.total(p.pid) + p.used + (-there.used if there is not None else NOTHING)


# --- the model's turn -------------------------------------------------------------------------------


def current(k: Kernel, seen: Proc) -> Proc | None:
    """The process as it is now, if what was begun for `seen` may still land."""
    p = k.procs.get(seen.pid)
    if p is None or not p.live or p.head != seen.head or p.epoch != seen.epoch:
        return None
    return p


def out_of_iterations(k: Kernel, pid: Pid) -> bool:
    """Rest a process that has used up the model calls of its run."""
    p = k.proc(pid)
    if p.run.api_calls < p.run.max_iterations:
        return False
    reason = f"max_iterations: {p.run.max_iterations} model calls in one run"
    p = k.write(p, 2, reason + "\n")
    k.emit("limit", pid, resource="max_iterations", hard=p.run.max_iterations)
    k.put(end_run(k, p, "max_iterations", verdict=128 + Signal.XCPU, reason=reason, rest=True))
    return True


def end_run(
    k: Kernel, p: Proc, stop_reason: str, *, verdict: int = 0, reason: str = "", rest: bool = False
) -> Proc:
    """The run has come to its natural stopping point."""
    k.emit("turn_end", p.pid, stop_reason=stop_reason, run=p.run.seq)
    run = replace(p.run, ended=k.now, stop_reason=stop_reason, after=_total(k, p))
    rest = rest and p.at is not At.EMPTY
    return replace(p, run=run, verdict=verdict, stop_reason=stop_reason, reason=reason, rest=rest)


def land(k: Kernel, p: Proc, reply: Reply, begun: tuple[ToolUseId, ...] = ()) -> Proc:
    """The model's answer becomes a message (`_landed`), and what it cost counts for all above."""
    _landed(k, p, reply, begun)
    limits.notice(k, p.pid)
    return k.proc(p.pid)


def _landed(k: Kernel, p: Proc, reply: Reply, begun: tuple[ToolUseId, ...]) -> Proc:
    """The model's answer becomes a message, and the head moves to it.

    Calls are run only if the model stopped for them (kernel/stop.py): else they are answered with errors
    and the run ends with that stop reason. An empty answer is not stored.
    """
    p = _account(k, p, reply)
    if len({ask.id for ask in reply.asks}) < len(reply.asks):
        return fail(k, p, "EPROTO: the model gave two of its calls the same id")
    if not reply.body:
        return k.put(_over(_stop(k, p, reply, rest=True)))
    node = _assistant(k, p, reply)
    p = _said(k, p.moved(node), reply.text, node)
    if reply.asks and stop.of(reply.stop_reason).runs_tools and p.last_turn is not LastTurn.ASKED:
        return k.put(p if p.stopped else replace(p, begun=begun))
    if reply.asks:
        why = (
            LAST_TURN
            if p.last_turn is LastTurn.ASKED
            else f"Not run: the answer ended with {reply.stop_reason}."
        )
        p = p.moved(answer(k, p, node, why))
        return k.put(_over(_stop(k, p, reply, rest=True)))
    if p.at is At.PAUSE:
        return k.put(_over(p))
    return k.put(_over(_stop(k, p, reply)))


def _stop(k: Kernel, p: Proc, reply: Reply, *, rest: bool = False) -> Proc:
    """The run ends as the stop reason says."""
    effect = stop.of(reply.stop_reason)
    if effect.fault:
        p = k.write(p, 2, effect.fault + "\n")
    reason = reply.stop_reason or "end_turn"
    return end_run(k, p, reason, verdict=effect.verdict, reason=effect.fault, rest=rest)


def _over(p: Proc) -> Proc:
    return replace(p, last_turn=LastTurn.OVER) if p.last_turn is LastTurn.ASKED else p


def _account(k: Kernel, p: Proc, reply: Reply) -> Proc:
    usage = reply.usage
    k.emit(
        "api_response",
        p.pid,
        stop_reason=reply.stop_reason,
        text=reply.text,
        usage=msgspec.to_builtins(usage),
    )
    return replace(
        _billed(p, usage, reply.cost),
        turns=p.turns + 1,
        context_tokens=usage.total,
        run=replace(p.run, api_calls=p.run.api_calls + 1, usage=p.run.usage + usage),
    )


def _billed(p: Proc, usage: Usage, cost: int | None) -> Proc:
    """One more model call; a price that is not known makes the sum unknown, and is never 0."""
    return replace(p, usage=p.usage + usage, cost=p.cost + (cost or 0), unpriced=p.unpriced + (cost is None))


def charge(k: Kernel, pid: Pid, usage: Usage, cost: int | None) -> None:
    """A model call has used up something, and nothing of it landed: it was cut off, or failed midway."""
    p = k.procs.get(pid)
    if p is not None:
        k.put(_billed(p, usage, cost))
        limits.notice(k, pid)


def _assistant(k: Kernel, p: Proc, reply: Reply) -> Node:
    return k.add_node(
        Node(
            id=MessageId(k.take("message")),
            parent=p.head,
            role="assistant",
            body=reply.body,
            at=k.now,
            model=reply.model,
            thinks=reply.thinks,
            stop_reason=reply.stop_reason,
            asks=reply.asks,
            usage=reply.usage,
        )
    )


def _said(k: Kernel, p: Proc, text: str, node: Node) -> Proc:
    if not text.strip():
        return p
    p = k.write(p, 1, text if text.endswith("\n") else text + "\n")
    return replace(p, run=replace(p.run, spoke=node.id))


def fail(k: Kernel, p: Proc, reason: str) -> Proc:
    """The model call failed for good; the conversation is as valid as before."""
    p = k.write(p, 2, reason + "\n")
    return k.put(end_run(k, p, "error", verdict=1, reason=reason, rest=True))


def exceed(k: Kernel, pid: Pid, over: Over) -> Proc:
    """A hard limit leaves no room for the next model call: the process ends (152)."""
    p = k.proc(pid)
    whose = "" if over.pid == pid else f" of process {k.proc(over.pid).label}"
    reason = f"the {over.resource} limit of {limits.shown(over.resource, over.hard)}{whose} is reached"
    used = limits.used(k, k.proc(over.pid), over.resource)
    k.emit("limit", pid, resource=over.resource, which="hard", limit=over.hard, used=used, of=over.pid)
    p = k.write(p, 2, reason + "\n")
    if not p.run.ended:
        p = end_run(k, p, "limit", verdict=128 + Signal.XCPU, reason=reason, rest=True)
    k.put(p)
    return exit_(k, pid, 128 + Signal.XCPU, reason=reason)


def tell_context(k: Kernel, p: Proc, percent: int, notice: str) -> Proc:
    """Put a notice beside what the model is to read next; "" only notes down how full its window is."""
    if notice:
        p = p.moved(history.user_node(k, p.head, notice))
    return k.put(replace(p, context_told=percent))


def last_turn(k: Kernel, pid: Pid) -> Proc:
    """Tell a process that has reached a soft limit to hand back what it has."""
    p = k.proc(pid)
    if p.last_turn is not LastTurn.DUE or p.at is not At.USER:
        return p
    said = history.user_node(k, p.head, LAST_TURN)
    return k.put(replace(p.moved(said), last_turn=LastTurn.ASKED))


# --- tools ------------------------------------------------------------------------------------------


def begin_tools(k: Kernel, p: Proc, ids: tuple[ToolUseId, ...]) -> Proc:
    """Write down which tools are about to start: what is written and not answered was cut off."""
    return k.put(replace(p, begun=(*p.begun, *ids)))


def finish_tool(k: Kernel, p: Proc, ask: ToolUse, result: ToolResult) -> Proc:
    """One call has its answer."""
    k.emit("tool_end", p.pid, tool=ask.name, call=ask.id, is_error=result.is_error, text=result.text)
    call = ToolCall(ask.name, ask.input.decode(errors="replace"), result.is_error)
    awaiting = {id_: pids for id_, pids in p.awaiting.items() if id_ != ask.id}
    run = replace(p.run, tool_calls=(*p.run.tool_calls, call))
    return k.put(replace(p, results=(*p.results, result), awaiting=awaiting, run=run))


def unanswered(p: Proc, node: Node) -> list[ToolUse]:
    done = {result.id for result in p.results}
    return [ask for ask in node.asks if ask.id not in done]


def answer(
    k: Kernel,
    p: Proc,
    node: Node,
    rest: str,
    *,
    said: str = "",
    marked: bool = False,
    results: Sequence[ToolResult] = (),
) -> Node:
    """The message that answers every call of `node`; calls without a result get the error `rest`."""
    known = {result.id: result for result in (*p.results, *results)}
    answers = [known.get(ask.id) or ToolResult(ask.id, rest, is_error=True) for ask in node.asks]
    return history.user_node(k, node.id, said, answers, marked=marked)


def retire_tools(k: Kernel, p: Proc, node: Node) -> Proc:
    """All calls are answered: the answers become the next user message."""
    return k.put(p.moved(answer(k, p, node, "Not run.")))


# --- fork -------------------------------------------------------------------------------------------


class ForkCall(msgspec.Struct, frozen=True):
    """One `fork` call of a turn."""

    ask: ToolUse
    prompts: tuple[str, ...]
    wait: bool


YOU_ARE_THE_CHILD = (
    "pid 0: you are the child of a fork. You share the whole conversation with your parent up to here. "
    "Do only the task that follows; your last message is handed back to your parent."
)
NOT_YOURS = "Not run: this call was your parent's."


def fork_model(k: Kernel, p: Proc, node: Node, calls: Sequence[ForkCall]) -> Proc:
    """All forks of one turn, in one commit: the children, and the parent's answers or its waiting."""
    p, calls = _with_room(k, p, calls)
    made = {call.ask.id: tuple(Pid(k.take("pid")) for _ in call.prompts) for call in calls}
    theirs = [
        ToolResult(call.ask.id, f"made by your parent: pids {_listed(made[call.ask.id])}") for call in calls
    ]
    for call in calls:
        own = ToolResult(call.ask.id, YOU_ARE_THE_CHILD)
        results = [own if result.id == own.id else result for result in theirs]
        for pid, prompt in zip(made[call.ask.id], call.prompts, strict=True):
            _fork_child(k, p, node, pid, prompt, results)
    p = k.proc(p.pid)
    for call in calls:
        p = _forked(k, p, call, made[call.ask.id])
    return p


def _with_room(k: Kernel, p: Proc, calls: Sequence[ForkCall]) -> tuple[Proc, Sequence[ForkCall]]:
    """Those forks that the limits allow; the others are answered."""
    good: list[ForkCall] = []
    for call in calls:
        try:
            limits.room(k, p.pid, sum(len(one.prompts) for one in (*good, call)))
        except KernelError as error:
            p = finish_tool(k, p, call.ask, ToolResult(call.ask.id, str(error), is_error=True))
        else:
            good.append(call)
    return p, good


def _listed(pids: Sequence[Pid]) -> str:
    return ", ".join(map(str, pids))


def _fork_child(k: Kernel, p: Proc, node: Node, pid: Pid, prompt: str, results: Sequence[ToolResult]) -> None:
    image = k.image(p)
    said = answer(k, p, node, NOT_YOURS, said=prompt, marked=image.offers("goto"), results=results)
    child = begin_run(k, _copied(k, p, pid, ppid=p.pid).moved(said))
    child = replace(child, access=access.child(p, image), input_open=False)
    k.emit("fork", pid, ppid=p.pid, head=f"m{child.head}", prompt=prompt)
    _born(k, child)


def _forked(k: Kernel, p: Proc, call: ForkCall, pids: tuple[Pid, ...]) -> Proc:
    if call.wait:
        return k.put(replace(p, awaiting={**p.awaiting, call.ask.id: pids}))
    text = msgspec.json.encode(pids).decode()
    return finish_tool(k, p, call.ask, ToolResult(call.ask.id, text))


def _copied(k: Kernel, p: Proc, pid: Pid, *, ppid: Pid) -> Proc:
    """What a child shares with its parent: everything but identity, mail, output and account."""
    return Proc(
        pid=pid,
        ppid=ppid,
        birth=ppid,
        family=p.family,
        uid=p.uid,
        cwd=p.cwd,
        env=p.env,
        image=p.image,
        access=p.access,
        nice=p.nice,
        began=k.now,
        head=p.head,
        at=p.at,
        tips=p.tips,
        fds=p.fds,
        refs=p.refs,
        limits=p.limits,
        context_tokens=p.context_tokens,
        context_told=p.context_told,
        last_call=p.last_call,
    )


def fork(
    k: Kernel, pid: int, prompts: Sequence[str] = (), *, at: Node | None = None, birth: Pid | None = None
) -> list[Proc]:
    """Children made by a user, standing where the process stands, or on the settled message `at`.

    Each gets its prompt as next message; without prompts one child rests with fd 0 open. An ended process
    can be forked: that is how one resumes it. `birth` is the process whose tool asked for it: theirs is the
    subtree then, and the ceiling of children that a model makes. Raises ESRCH, EBUSY, EINVAL, EAGAIN.
    """
    p = k.proc(pid)
    settled(p, at, Errno.EBUSY)
    if at is None and p.at is At.ASKS:
        raise KernelError(Errno.EBUSY, f"process {p.label} is running tools; fork it at an earlier message")
    for prompt in prompts:
        check_text(prompt, "prompts")
    if birth is not None:
        require_live(k, birth)
    limits.room(k, birth or p.pid, max(1, len(prompts)))
    return [_fork_user(k, p, prompt, at, birth) for prompt in prompts or [""]]


def _fork_user(k: Kernel, p: Proc, prompt: str, at: Node | None, birth: Pid | None) -> Proc:
    parent = p if birth is None else k.proc(birth)
    level = p.access if birth is None else min(p.access, access.child(parent, k.image(parent)))
    child = _copied(k, p, Pid(k.take("pid")), ppid=parent.pid if parent.live else INIT)
    if at is not None:
        child = child.moved(at)
    child = replace(
        child,
        birth=parent.pid,
        access=level,
        rest=child.head is not None,
        input_open=not prompt or p.input_open,
    )
    k.emit("fork", child.pid, ppid=p.pid, head=child.head and f"m{child.head}", prompt=prompt)
    return _born(k, _mail(k, child, prompt) if prompt else child)


def settled(p: Proc, node: Node | None, errno: Errno) -> None:
    """Refuse a message that asks for tools."""
    if node is not None and node.asks:
        raise KernelError(errno, f"m{node.id} of process {p.label} asks for tools; try a message around it")


# --- goto, exec -------------------------------------------------------------------------------------


PARKED = "moved by goto; it goes on with `goto -m TEXT`, `goto --run` or a run"


def goto(
    k: Kernel, pid: int, node: Node, text: str | None = None, *, run: bool = False, tokens: int | None = None
) -> Proc:
    """Move the head to a settled message of the process's own history (the caller has checked that).

    The text becomes the next user message; without one the process rests there, and does not exit if its
    fd 0 is closed. `tokens` is the size of the conversation up to there. Raises ESRCH, EINVAL.
    """
    p = require_live(k, pid)
    settled(p, node, Errno.EINVAL)
    if text is not None:
        check_text(text)
    if run and text is None and node.role != "user":
        raise KernelError(Errno.EINVAL, f"run: m{node.id} is no user message; say something with a text")
    was = p.head
    p = _moved_away(k, p, node)
    p = replace(p, context_tokens=p.context_tokens if tokens is None else tokens)
    k.emit("goto", p.pid, old_head=f"m{was}" if was else None, head=f"m{node.id}")
    if text is not None:
        p = _mail(k, p, text, first=True)
    elif run:
        p = _mail(k, p, "", first=True)
    elif not p.input_open:
        p = replace(p, parked=True, reason=PARKED)
    return k.put(p)


def _moved_away(k: Kernel, p: Proc, node: Node) -> Proc:
    if step.running(p):
        p = end_run(k, p, "goto")
    told = LastTurn.DUE if p.last_turn is LastTurn.ASKED else p.last_turn  # what it was told is left behind
    p = replace(p.moved(node), rest=True, tips=_tips(p), last_turn=told)
    return replace(p, epoch=p.epoch + 1, verdict=0, reason="")


def goto_model(k: Kernel, p: Proc, node: Node, framed: str, tokens: int | None = None) -> Proc:
    """The model travels in time: the head moves, and the run goes on from there with its message."""
    settled(p, node, Errno.EINVAL)
    k.emit("goto", p.pid, old_head=f"m{p.head}", head=f"m{node.id}")
    said = history.user_node(k, node.id, framed, marked=k.image(p).offers("goto"))
    size = p.context_tokens if tokens is None else tokens
    return k.put(replace(p.moved(said), tips=_tips(p), epoch=p.epoch + 1, context_tokens=size))


def _tips(p: Proc) -> tuple[MessageId, ...]:
    """The roots of a process's branches once its head has left this one."""
    return p.tips if p.head is None or p.head in p.tips else (*p.tips, p.head)


def exec_(k: Kernel, pid: int, image: Image) -> Proc:
    """Replace the program. Raises EBUSY while tools are asked for, ESRCH."""
    p = require_live(k, pid)
    if p.at is At.ASKS:
        raise KernelError(Errno.EBUSY, f"process {p.label} is running tools")
    p = replace(p, image=k.put_image(image), epoch=p.epoch + 1)
    k.emit("exec", p.pid, program=image.program)
    return k.put(p)


def reload(k: Kernel, pid: int, image: Image) -> Proc:
    """SIGHUP: the next turn uses the program file as it is now."""
    p = require_live(k, pid)
    return k.put(replace(p, image=k.put_image(image)))


# --- interruption and end ---------------------------------------------------------------------------


def settle(k: Kernel, p: Proc, node: Node | None, partial: Reply | None, why: str) -> Proc:
    """Leave no call unanswered: streamed text is kept, calls without a result get an error."""
    if p.at is At.ASKS:
        assert node is not None, f"process {p.pid} runs tools: m{p.head} is needed to end that"
        assert node.id == p.head, f"m{node.id} is not the head of process {p.pid}"
        return p.moved(answer(k, p, node, why))
    if partial is None or not partial.body or not step.running(p):
        return p
    p = _account(k, p, partial)
    said = _assistant(k, p, partial)
    p = _said(k, p.moved(said), partial.text, said)
    return p.moved(answer(k, p, said, why)) if partial.asks else p


def interrupt(k: Kernel, pid: int, node: Node | None, partial: Reply | None, *, verdict: int) -> Proc:
    """The run ends here, and the process rests; nothing happens to one that has no run.

    `node` is the head's node, `partial` what has been streamed of the answer under way.
    """
    p = require_live(k, pid)
    if not step.running(p):
        return p
    p = settle(
        k, p, node, partial, "Interrupted: this call was cut off by a signal and may have taken effect."
    )
    p = end_run(k, p, "interrupted", verdict=verdict, reason="interrupted", rest=True)
    return k.put(replace(p, epoch=p.epoch + 1))


def exit_(k: Kernel, pid: int, status: int, *, farewell: str = "", reason: str = "") -> Proc:
    """End a process: its children go to init, and whoever waits for it finds the status."""
    p = require_live(k, pid)
    if step.running(p):
        p = end_run(k, p, p.stop_reason or "exit", verdict=status)
    p = replace(
        p,
        state=ProcState.ZOMBIE,
        status=status,
        ended=k.now,
        epoch=p.epoch + 1,
        inbox=(),
        input_open=False,
        notify=(),
        farewell=farewell or p.farewell,
        reason=reason or p.reason,
    )
    k.put(p)
    k.emit("exit", p.pid, status=status, reason=p.reason)
    for child in list(k.children.get(p.pid, ())):
        k.put(replace(k.procs[child], ppid=INIT))
    _tell_parent(k, p)
    return p


def _tell_parent(k: Kernel, p: Proc) -> None:
    parent = k.procs.get(p.ppid)
    if parent is None or p.pid not in parent.notify:
        return
    parent = replace(parent, notify=tuple(pid for pid in parent.notify if pid != p.pid))
    line = f"Process {p.label} has ended with status {p.status}."
    k.put(_mail(k, parent, line))


def collect(k: Kernel, pid: Pid) -> None:
    """Somebody has waited for an ended process."""
    p = k.proc(pid)
    if not p.collected:
        k.put(replace(p, collected=True))


def collect_all(k: Kernel, pids: Iterable[Pid]) -> None:
    """Somebody has waited for these; one that was removed meanwhile needs no collecting."""
    for pid in pids:
        if pid in k.procs:
            collect(k, pid)


def remove(k: Kernel, pid: int) -> None:
    """Forget an ended process. Raises EBUSY for a living one."""
    p = k.proc(pid)
    removable(k, p)
    for child in list(k.born.get(p.pid, ())):
        k.put(replace(k.procs[child], birth=p.birth))
    above = k.procs.get(p.birth)
    if above is not None:
        k.put(replace(above, gone=above.gone + p.used))
    k.drop(p.pid)


def removable(k: Kernel, p: Proc) -> None:
    """EBUSY for a process that has not ended, or whose limits still bind others."""
    if p.live:
        raise KernelError(Errno.EBUSY, f"process {p.label} has not ended; kill it first")
    if binds(k, p):
        raise KernelError(Errno.EBUSY, f"the limits of process {p.label} bind processes that still live")


def binds(k: Kernel, p: Proc) -> bool:
    """Has a process limits of its own that somebody living is bound by?"""
    return bool(p.limits) and k.total(p.pid).procs > 0


def renice(k: Kernel, pid: int, nice: int) -> None:
    k.put(replace(require_live(k, pid), nice=nice))


def rename(k: Kernel, pid: int, name: str) -> None:
    p = k.proc(pid)
    if name != p.name:
        check_name(k, name)
        k.put(replace(p, name=name))
