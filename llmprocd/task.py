"""The life of one process: fetch the next step, execute it, retire it.

A task exists only while there is a step to run. It has exactly one cancel scope, new for each step. What a
step brings back lands only if nobody has interrupted the process since (`proc.current`); cancelling writes
nothing. So stopping the daemon, a signal, goto and a power cut are one road, and there is no recovery code
but the first lines of `run_tools`.
"""

import math
import random
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

import msgspec
import trio

from llmprocd import budget, crash, outcome, usertrap, window
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Pid, ToolUseId
from llmprocd.endpoint import Grant
from llmprocd.kernel import access, cached, file, limits, proc, step
from llmprocd.kernel.limits import Over
from llmprocd.kernel.proc import ForkCall
from llmprocd.kernel.state import At, Image, Kernel, LastTurn, Node, Proc, ToolResult, ToolUse
from llmprocd.machine import Machine
from llmprocd.model.protocol import ModelError, Reply
from llmprocd.model.sse import Turn
from llmprocd.retry import Retries, final, heeded
from llmprocd.tools import toolbox, trap
from llmprocd.tools.output import Output, ToolError
from llmprocd.window import Outgoing

INTERRUPTED = (
    "Interrupted: the daemon was restarted while this call was running. It may have taken effect, in part or "
    "wholly; check before you repeat it."
)


async def live(m: Machine, pid: Pid) -> None:
    """Run a process's steps until there is none."""
    try:
        while (p := m.kernel.procs.get(pid)) is not None:
            todo = step.next_step(p)
            if isinstance(todo, step.Sleep):
                return
            with m.step(p):
                await execute(m, p, todo)
            await trio.lowlevel.checkpoint()
    finally:
        m.leave(pid)


async def execute(m: Machine, p: Proc, todo: step.Step) -> None:
    """Do one step."""
    match todo:
        case step.Infer():
            await infer(m, p)
        case step.RunTools():
            await run_tools(m, p)
        case step.TakeInput():
            k = m.begin()
            proc.take_input(k, p.pid, lambda taker, text: file.take_said(k, taker, text))
            m.commit("take_input")
        case step.Exit(status):
            proc.exit_(m.begin(), p.pid, status)
            m.commit("exit")
        case step.Sleep():
            pass


# --- the model --------------------------------------------------------------------------------------


async def infer(m: Machine, p: Proc) -> None:
    """One model call, from the wait for a slot to the message in the history."""
    k = m.begin()
    if proc.out_of_iterations(k, p.pid):
        m.commit("max_iterations")
        return
    if p.last_turn is LastTurn.DUE:
        p = proc.last_turn(k, p.pid)
        m.commit("last_turn")
    image = k.image(p)
    p, transcript = await window.told(m, p, image)
    out = await window.outgoing(m, p, image, transcript)
    await m.wait_durable()
    if proc.current(m.kernel, p) is None:
        return
    with budget.reserved(m, p.pid):
        allowed = await budget.allowed(m, p, image, transcript, out)
        if allowed is None:
            return
        m.announce("turn_start", p.pid, head=f"m{p.head}", run=p.run.seq)
        answer = await ask(m, p, image, allowed.out)
        k = m.begin()
        now = proc.current(k, p)
        if answer is not None and now is not None:
            land(m, k, now, image, answer, out, allowed.over)
        elif isinstance(answer, Reply):
            budget.lost(m, p, answer)


def land(
    m: Machine,
    k: Kernel,
    p: Proc,
    image: Image,
    answer: Reply | ModelError,
    out: Outgoing,
    over: Over | None = None,
) -> None:
    """What the model said, or why it did not, becomes the state of the process.

    `over` is the limit that has shortened the answer: if it was cut off there, the process has reached it.
    """
    if isinstance(answer, ModelError):
        spent = limits.overdrawn(k, p.pid)
        if spent is not None:
            proc.exceed(k, p.pid, spent)
        else:
            proc.fail(k, p, window.sentence(image, answer))
        m.commit("infer_failed")
        return
    answer = m.priced(p.pid, answer)
    window.learn(m, image)
    p = msgspec.structs.replace(p, last_call=cached.note(out.sent, answer, k.now))
    if image.paging.enable_references:
        p = take_references(k, p, answer.text)
    p = proc.land(k, p, answer, tuple(ids_with_effects(image, p, answer.asks)))
    if out.threaded:
        m.threads.note(p, answer, k.now, out.previous)
    if p.begun and p.head is not None:
        m.fresh[p.pid] = p.head
    if over is not None and answer.stop_reason == "max_tokens":
        proc.exceed(k, p.pid, over)
    m.commit("infer_landed")


def take_references(k: Kernel, p: Proc, text: str) -> Proc:
    """Keep what an answer has marked as a reference; what there is no room for, stderr tells of."""
    for name, content in file.references(text).items():
        data = content.encode()
        try:
            limits.space(k, p.pid, p.made_bytes - k.proc(p.pid).made_bytes + len(data), fds=0)
        except KernelError as error:
            p = k.write(p, 2, f"ref:{name} was not kept: {error}\n")
            continue
        number = file.FileId(k.take("file"))
        made = file.File(number, len(data), complete=True, origin=f"ref:{name}")
        p = file.refer(k, p, name, made, data)
    return p


async def ask(m: Machine, p: Proc, image: Image, out: Outgoing) -> Reply | ModelError | None:
    """Ask until there is an answer or it is hopeless; None when the process was interrupted or stopped."""
    endpoint = window.endpoint(image)
    began, attempt = 0.0, 0
    while True:
        async with window.together(m, p, out.share), slot(m, p, endpoint, out.size) as grant:
            now = proc.current(m.kernel, p)
            if now is None or now.stopped:
                return None
            attempt += 1
            grant.begin(trio.current_time())
            began = grant.began if attempt == 1 else began  # time in the queue is none of retries
            answer = await attempt_once(m, p, image, out, attempt, grant)
        if not isinstance(answer, ModelError):
            return answer
        if window.refuses_more(m, image, out, answer):
            out = out.bare()
            continue
        if window.refuses_thread(m, p, image, out, answer):
            anew = await window.outgoing(m, p, image, await m.transcript(p))
            out = budget.shortened(image, anew, out.output or image.max_tokens)
            continue
        policy = Retries(m.config.retries, m.config.retry_s)
        pause = policy.pause(answer, attempt, trio.current_time() - began, chance())
        if pause is None:
            if answer.shared:  # the next one is refused as well, until the time that the server named
                m.sched.hold(endpoint, heeded(answer), grant.began)
            return final(answer, attempt)
        await back_off(m, p, endpoint, answer, pause, grant.began)


def slot(m: Machine, p: Proc, endpoint: str, size: int) -> AbstractAsyncContextManager[Grant]:
    """A process's turn at an endpoint, for a request of so many bytes."""
    now = m.kernel.procs.get(p.pid, p)
    return m.sched.slot(
        endpoint,
        root(m.kernel, p),
        now.nice,
        lambda what: m.waits_for(p.pid, what),
        interactive=now.input_open,
        size=size,
    )


async def attempt_once(
    m: Machine, p: Proc, image: Image, out: Outgoing, attempt: int, grant: Grant
) -> Reply | ModelError:
    """One request, and what came of it."""
    m.announce("api_request", p.pid, attempt=attempt, model=image.model)
    warm = partial(m.herd.warm, out.share.marked, out.share.lifetime)
    turn = Turn(image.model, lambda text: shown(m, p.pid, text, attempt), on_begin=warm)
    m.turns[p.pid] = turn
    crash.point("api.before")
    try:
        with m.doing(p.pid, "api"), trio.move_on_after(m.config.call_s):
            await m.model.infer(image, out.pieces, turn, lambda told: grant.heard(told, trio.current_time()))
            crash.point("api.after")
            return turn.reply()
    except ModelError as error:
        return budget.failed(m, p, turn, error)
    except trio.Cancelled:
        budget.lost(m, p, budget.spent(turn))
        raise
    finally:
        del m.turns[p.pid]
        grant.end(turn.usage, trio.current_time(), whole=turn.stopped)
    late = ModelError(Errno.ETIMEDOUT, f"no whole answer within {m.config.call_s:g} s", again=True)
    return budget.failed(m, p, turn, late)


def shown(m: Machine, pid: Pid, text: str, attempt: int) -> None:
    """Text as it comes, for those who look."""
    if m.console.wanted(pid, "text"):
        m.announce("text", pid, text=text, attempt=attempt)


def chance() -> float:
    """From 0 to 1, anew each time."""
    return random.random()  # noqa: S311  # spreads callers out, keeps no secret


async def back_off(
    m: Machine, p: Proc, endpoint: str, error: ModelError, pause: float, asked_at: float
) -> None:
    """Wait before the next attempt; what is everybody's business is waited for in the endpoint's queue."""
    named = error.retry_after
    if error.shared:
        m.sched.hold(endpoint, pause, asked_at, named=named is not None)
        return
    until = trio.current_time() + (named or 0.0)
    what = "backoff" if named is None else lambda: f"retry-after {countdown(until)}s"
    with m.doing(p.pid, what):
        await trio.sleep(pause)


def countdown(until: float) -> int:
    return max(1, math.ceil(until - trio.current_time()))


def root(k: Kernel, p: Proc) -> Pid:
    """The top of the tree that a process was born in: trees share slots fairly."""
    while (parent := k.procs.get(p.birth)) is not None:
        p = parent
    return p.pid


# --- tools ------------------------------------------------------------------------------------------


class Asked(msgspec.Struct, frozen=True):
    """The calls of one turn, in the order in which they are done."""

    plain: tuple[ToolUse, ...]
    forks: tuple[ToolUse, ...]
    gotos: tuple[ToolUse, ...]
    exits: tuple[ToolUse, ...]


def sort(image: Image, p: Proc, asks: Sequence[ToolUse]) -> Asked:
    """Tools first, then all forks, then goto, then exit. A call that is refused is a plain one."""
    last: dict[str, list[ToolUse]] = {"fork": [], "goto": [], "exit": []}
    plain: list[ToolUse] = []
    for call in asks:
        tool = image.tool(call.name)
        kind = tool.tool if tool is not None and not refused(image, p, call) else ""
        last.get(kind, plain).append(call)
    return Asked(tuple(plain), tuple(last["fork"]), tuple(last["goto"]), tuple(last["exit"]))


def ids_with_effects(image: Image, p: Proc, asks: Sequence[ToolUse]) -> list[ToolUseId]:
    """The calls that must be written down before they start."""
    found: list[ToolUseId] = []
    for call in asks:
        tool = image.tool(call.name)
        if tool is not None and not refused(image, p, call) and toolbox.has_effects(tool.tool):
            found.append(call.id)
    return found


async def run_tools(m: Machine, p: Proc) -> None:
    """Run what the model asked for; go on with what is left of it after a restart."""
    assert p.head is not None
    node = await m.node(p.head)
    k = m.begin()
    now = proc.current(k, p)
    if now is None or now.stopped:
        return
    image = k.image(now)
    if m.fresh.pop(p.pid, None) != p.head:
        now = give_up_on_lost(k, now, node)
    now = begin(k, now, node, image)
    m.commit("tools_begun")
    if now is None:
        return
    asked = sort(image, now, proc.unanswered(now, node))
    await m.wait_durable()
    if not may_start(m, p):
        return
    async with trio.open_nursery() as nursery:
        for call in asked.plain:
            nursery.start_soon(one_tool, m, p, node, image, call)
    await fork_goto_exit(m, p, node, asked)


def begin(k: Kernel, p: Proc, node: Node, image: Image) -> Proc | None:
    """Write down what is about to start and is not yet; None when no call of the turn is left.

    Most was written with the answer itself: not after a turn was cut off or held by STOP, nor when the
    program is another by now.
    """
    left = proc.unanswered(p, node)
    if not left:
        proc.retire_tools(k, p, node)
        return None
    ids = tuple(id_ for id_ in ids_with_effects(image, p, left) if id_ not in p.begun)
    return proc.begin_tools(k, p, ids) if ids else p


def may_start(m: Machine, p: Proc) -> bool:
    """Has nobody stopped or interrupted the process while its beginnings went to disk?"""
    now = proc.current(m.kernel, p)
    if now is not None and now.stopped and p.head is not None:
        m.fresh[p.pid] = p.head  # nothing was begun in truth
    return now is not None and not now.stopped


def give_up_on_lost(k: Kernel, p: Proc, node: Node) -> Proc:
    """Calls that had begun in an earlier life and did not end: never run again."""
    for call in proc.unanswered(p, node):
        if call.id in p.begun:
            p = proc.finish_tool(k, p, call, ToolResult(call.id, INTERRUPTED, is_error=True))
    return p


async def one_tool(m: Machine, p: Proc, node: Node, image: Image, call: ToolUse) -> None:
    """Run one call, and land its result."""
    with m.doing(p.pid, f"tool:{call.name}", call.id):
        answer = await call_tool(m, p, image, call)
        result = await outcome.shape(m, image, answer, source=call.name)
    finish(m, p, node, call, result, answer.ended)


def finish(
    m: Machine, p: Proc, node: Node, call: ToolUse, result: outcome.Shaped, ended: Sequence[Pid] = ()
) -> None:
    """Land one result, and collect whose end it tells; the last one of a turn makes the next message.

    All that is one commit.
    """
    k = m.begin()
    now = proc.current(k, p)
    if now is None:
        outcome.discard(m, result)
        return
    result = outcome.within(m, now, result)
    now, text = outcome.keep(k, now, result)
    now = proc.finish_tool(k, now, call, ToolResult(call.id, text, result.is_error))
    proc.collect_all(k, ended)
    if not proc.unanswered(now, node):
        proc.retire_tools(k, now, node)
    limits.notice(k, p.pid)
    m.commit("tool_finished")
    outcome.watch(m, p.pid, result)


async def call_tool(m: Machine, p: Proc, image: Image, call: ToolUse) -> Output:
    """The answer to one call; every way in which it can fail is an answer too."""
    refusal = refused(image, p, call)
    if refusal:
        return Output(text=refusal, is_error=True)
    tool = image.tool(call.name)
    assert tool is not None
    m.announce("tool_start", p.pid, tool=call.name, call=call.id, input=call.input.decode(errors="replace"))
    if tool.tool in trap.TRAPS:
        return await usertrap.run(m, p, tool.tool, call)
    crash.point(f"tool.{tool.tool}.before")
    answer = await outside(m, p, tool.tool, call)
    crash.point(f"tool.{tool.tool}.after")
    return answer


async def outside(m: Machine, p: Proc, name: str, call: ToolUse) -> Output:
    """Run a tool that touches the world, within its deadline."""
    seconds = m.config.tool_timeout_s
    with trio.move_on_after(seconds):
        return await toolbox.run(toolbox.SPECS[name], usertrap.context(m, p), call.input)
    return Output(text=f"ETIMEDOUT: {name} did not end within {seconds:g} s and was stopped", is_error=True)


def refused(image: Image, p: Proc, call: ToolUse) -> str:
    """Why a call cannot be run; "" if it can."""
    tool = image.tool(call.name)
    if tool is None:
        return f"This tool is not available: {call.name}"
    if call.broken:
        return "The arguments did not arrive whole (malformed JSON); nothing was run. Call again."
    return access.denied(tool.access, p.access) if tool.access > p.access else ""


# --- the calls that come last -----------------------------------------------------------------------


async def fork_goto_exit(m: Machine, p: Proc, node: Node, asked: Asked) -> None:
    """All forks of a turn in one commit, then goto, then exit."""
    now = proc.current(m.kernel, p)
    if now is None or now.stopped or not proc.unanswered(now, node):
        return
    new = [call for call in asked.forks if call.id not in now.awaiting]
    if new:
        make_forks(m, now, node, new)
    await gather_children(m, p, node, asked.forks)
    if not await go_to(m, p, node, asked.gotos):
        leave(m, p, node, asked.exits)


def make_forks(m: Machine, p: Proc, node: Node, calls: Sequence[ToolUse]) -> None:
    k = m.begin()
    good: list[ForkCall] = []
    for call in calls:
        try:
            good.append(fork_call(call))
            m.room(sum(len(fork.prompts) for fork in good))
        except (ToolError, KernelError) as error:
            good = [fork for fork in good if fork.ask is not call]
            p = proc.finish_tool(k, p, call, ToolResult(call.id, str(error), is_error=True))
    if good:
        p = proc.fork_model(k, p, node, good)
    if not proc.unanswered(p, node):
        proc.retire_tools(k, p, node)
    m.commit("fork")


def fork_call(call: ToolUse) -> ForkCall:
    args = trap.parse(trap.ForkTool, call.input)
    if any(not prompt.strip() for prompt in args.prompts):
        raise ToolError("Invalid arguments: a prompt is blank")
    return ForkCall(call, tuple(args.prompts), args.wait)


async def gather_children(m: Machine, p: Proc, node: Node, calls: Sequence[ToolUse]) -> None:
    """Wait for the children of each fork that waits, and hand their last messages over."""
    for call in calls:
        now = proc.current(m.kernel, p)
        if now is None or now.stopped:
            return
        if call.id not in now.awaiting:
            continue
        with m.doing(p.pid, "wait", call.id):
            answer = await usertrap.children(m, now.awaiting[call.id])
            result = await outcome.shape(m, m.kernel.image(now), answer, source="fork")
        finish(m, p, node, call, result, answer.ended)


async def go_to(m: Machine, p: Proc, node: Node, calls: Sequence[ToolUse]) -> bool:
    """Travel, if the model asked for it: the first goto wins, a second is an error."""
    for number, call in enumerate(calls):
        if number == 0 and await usertrap.goto(m, p, node, call):
            return True
        if number:
            text = "Only the first goto of a turn is done; this one was not."
            finish(m, p, node, call, outcome.Shaped(text=text, is_error=True))
    return False


def leave(m: Machine, p: Proc, node: Node, calls: Sequence[ToolUse]) -> None:
    """Exit, if the model asked for it: the first wins; its conversation stays valid."""
    k = m.begin()
    now = proc.current(k, p)
    if now is None or now.stopped or now.at is not At.ASKS or not calls:
        return
    try:
        args = trap.parse(trap.ExitTool, calls[0].input)
    except ToolError as error:
        for call in calls:
            finish(m, p, node, call, outcome.Shaped(text=str(error), is_error=True))
        return
    bye = [ToolResult(call.id, f"exiting with status {args.status}") for call in calls]
    now = now.moved(proc.answer(k, now, node, "Not run.", results=bye))
    k.put(proc.end_run(k, now, "exit", verdict=args.status, rest=True))
    proc.exit_(k, now.pid, args.status, farewell=args.message, reason="exit")
    m.commit("exit_tool")
