"""Processes: spawn, run, list, signal, wait, send, fork, exec and the small ones."""

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Awaitable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import msgspec
import trio

from llmprocd import usertrap, window
from llmprocd.abi import calls, paths
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import (
    FIRST_FD,
    INIT,
    Access,
    FileId,
    MessageId,
    Pid,
    Signal,
    access,
    message_id,
    signal,
)
from llmprocd.kernel import access as ceilings
from llmprocd.kernel import file as files
from llmprocd.kernel import limits, proc
from llmprocd.kernel import signal as signals
from llmprocd.kernel.proc import Birth
from llmprocd.kernel.state import NANO, At, File, Image, Kernel, LastCall, Limit, Node, Proc, Request
from llmprocd.machine import Machine
from llmprocd.syscall.caller import Caller, require, require_inside, require_user

# --- spawn ------------------------------------------------------------------------------------------


def sys_spawn(m: Machine, caller: Caller, call: calls.Spawn) -> calls.Spawned | Awaitable[calls.Spawned]:
    """Start a process."""
    require(m.kernel, caller, Access.ADMIN)
    done = repeated(m, caller, call, calls.Spawned)
    if done is not None:
        return done
    m.room(1)
    if call.stdin_path:
        if call.fds:
            raise KernelError(Errno.EINVAL, "fds: cannot be given together with stdin_path")
        return _spawn_with_stdin(m, caller, call)
    return _spawn(m, caller, call, None)


async def _spawn_with_stdin(m: Machine, caller: Caller, call: calls.Spawn) -> calls.Spawned:
    if "\0" in call.stdin_path:
        raise KernelError(Errno.EINVAL, "stdin_path: it holds a NUL character")
    spool = m.store.spool()
    try:
        size = await trio.to_thread.run_sync(partial(_copy, call.stdin_path, spool))
    except OSError as error:
        raise KernelError(Errno.EINVAL, f"stdin_path: {call.stdin_path}: {error.strerror}") from None
    number = FileId(m.kernel.take("file"))
    await m.store.adopt(spool, number)
    done = repeated(m, caller, call, calls.Spawned)
    return done or _spawn(m, caller, call, File(number, size, complete=True, origin="stdin", disk=True))


def _copy(source: str, target: str) -> int:
    """Copy a regular file; a pipe would hold the daemon's end up, and /proc shows the daemon to itself."""
    descriptor = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(descriptor, "rb") as data:
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        if not regular or paths.is_of_a_process(paths.opened(descriptor)):
            raise OSError(errno.EINVAL, "not a regular file")
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
            shutil.copyfileobj(data, out, 1 << 20)
            return out.tell()


def _spawn(m: Machine, caller: Caller, call: calls.Spawn, stdin: File | None) -> calls.Spawned:
    if call.cwd and not call.cwd.startswith("/"):
        raise KernelError(Errno.EINVAL, f"cwd: {call.cwd!r} is no absolute path")
    if call.cwd and not os.path.isdir(call.cwd):  # noqa: PTH112 - pathlib's raises for what cannot be seen
        raise KernelError(Errno.ENOENT, f"cwd: {call.cwd} is no folder")
    k = m.begin()
    image = m.image_of(call.program, call.cwd or "/", call.env)
    bounds = {**dict(image.limits), **limits.parse_all(call.limits)}
    parent = k.proc(caller.proc) if caller.proc is not None else None
    m.affordable(image, parent.pid if parent else INIT, bounds)
    level = access(call.access) if call.access else Access.ADMIN
    prompt = _prompt(call, stdin, image)
    fds = _handed(k, parent, call.fds)
    if stdin is not None:
        fds = {3: stdin.id}
    birth = Birth(
        image=k.put_image(image),
        ppid=parent.pid if parent else INIT,
        uid=caller.uid,
        access=min(level, ceilings.child(parent, k.image(parent))) if parent else level,
        name=call.name,
        cwd=call.cwd or "/",
        env=call.env,
        nice=max(call.nice, parent.nice) if parent else call.nice,
        interactive=call.interactive,
        prompt=prompt,
        fds=fds,
        limits=bounds,
        file=stdin,
    )
    child = proc.spawn(k, birth)
    if fds:
        k.keep_fds(child.family, max(fds) + 1)
    reply = calls.Spawned(child.pid)
    remember(m, caller, call, reply)
    m.commit("spawn")
    return reply


def _prompt(call: calls.Spawn, stdin: File | None, image: Image) -> str | None:
    """What a process is told first, if anything. EINVAL when there is nothing and the caller wants some."""
    if stdin is None and call.prompt is None and not call.interactive:
        if call.needs_prompt and not image.user_prompt:
            raise KernelError(Errno.EINVAL, f"{image.program} has no prompt of its own: give one")
        return image.user_prompt or None
    if stdin is None:
        return call.prompt
    note = f'<stdin fd="fd:3" size="{stdin.size}">Standard input is in fd:3. Use read_fd to read it.</stdin>'
    return f"{call.prompt}\n\n{note}" if call.prompt else note


def _handed(k: Kernel, parent: Proc | None, names: Sequence[str]) -> dict[int, FileId]:
    """The descriptors named in `fds`: a tool's own `fd:3`, or any process's `7/fd:3`."""
    handed: dict[int, FileId] = {}
    for name in names:
        owner, fd = files.operand(name)
        if owner is None and parent is None:
            raise KernelError(Errno.EINVAL, f"fds: {name!r} does not say of which process; write 7/{name}")
        giver = parent if owner is None else k.proc(owner)
        assert giver is not None
        if parent is not None and not ceilings.inside(k, giver.pid, parent.pid):
            raise KernelError(Errno.EPERM, f"fds: process {giver.pid} is not in your subtree")
        number = files.number(fd)
        if number < FIRST_FD:
            raise KernelError(Errno.EBADF, f"fds: fd:{number} is a process's own and cannot be handed on")
        if number in handed:
            raise KernelError(Errno.EINVAL, f"fds: fd:{number} is named twice")
        handed[number] = files.lookup(giver, fd)
    return handed


# --- answering the same request once ----------------------------------------------------------------


def _key(call: calls.Spawn | calls.Fork) -> str:
    name = call.request_id
    if isinstance(name, bytes):
        return name.hex()
    if not isinstance(name, str):
        raise KernelError(Errno.EINVAL, "request_id: must be text or bytes")
    return name


def repeated(m: Machine, caller: Caller, call: calls.Spawn | calls.Fork, kind: type[Any]) -> Any:
    """The answer that the same request had before; None for a new one. EEXIST if it was another request."""
    key = _key(call)
    known = m.kernel.requests.get((caller.uid, key)) if key else None
    if known is None:
        return None
    if known.digest != _digest(call):
        raise KernelError(Errno.EEXIST, f"request_id: {key!r} was used for another request")
    return msgspec.msgpack.decode(known.reply, type=kind)


def remember(m: Machine, caller: Caller, call: calls.Spawn | calls.Fork, reply: msgspec.Struct) -> None:
    """Keep an answer, in the commit of what it answers."""
    key = _key(call)
    if key:
        reply_bytes = msgspec.msgpack.encode(reply)
        m.kernel.put_request(Request(caller.uid, key, _digest(call), reply_bytes, m.kernel.now))


def _digest(call: msgspec.Struct) -> bytes:
    return hashlib.sha256(msgspec.msgpack.encode(_ordered(msgspec.structs.asdict(call)))).digest()


def _ordered(value: Any) -> Any:
    """A value with its maps in one order: a client need not send a map in the same order again."""
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value).items()
        return {key: _ordered(inner) for key, inner in sorted(pairs, key=_encoded_key)}
    return [_ordered(inner) for inner in cast("list[Any]", value)] if isinstance(value, list) else value


def _encoded_key(pair: tuple[Any, Any]) -> bytes:
    return msgspec.msgpack.encode(pair[0])


# --- run, send --------------------------------------------------------------------------------------


def sys_run(m: Machine, caller: Caller, call: calls.RunProc) -> Awaitable[calls.RunResult]:
    """Give a message at once, and wait until its run ends; only the waiting can be given up."""
    require(m.kernel, caller, Access.ADMIN, call.pid)
    k = m.begin()
    iterations = call.max_iterations or 0
    if call.prompt is not None:
        seq = proc.send(k, call.pid, call.prompt, max_iterations=iterations)
    else:
        seq = proc.ask_again(k, call.pid, max_iterations=iterations)
    m.commit("run")
    return _ran(m, call, m.wait_run(Pid(call.pid), seq))


async def _ran(m: Machine, call: calls.RunProc, run: Awaitable[Proc]) -> calls.RunResult:
    with deadline(call.timeout_ms) as scope:
        return await m.run_result(await run)
    assert scope.cancelled_caught
    raise KernelError(Errno.ETIMEDOUT, f"the run of process {call.pid} goes on after {call.timeout_ms} ms")


def deadline(timeout_ms: int | None) -> trio.CancelScope:
    return trio.move_on_after(float("inf") if timeout_ms is None else timeout_ms / 1000)


def sys_send(m: Machine, caller: Caller, call: calls.Send) -> calls.Sent:
    """The next user message."""
    require(m.kernel, caller, Access.WRITE, call.pid)
    if call.text is None and not call.close:
        raise KernelError(Errno.EINVAL, "text: is missing")
    seq = proc.send(m.begin(), call.pid, call.text, close=call.close)
    m.commit("send")
    return calls.Sent(seq)


# --- list -------------------------------------------------------------------------------------------


def sys_list(m: Machine, caller: Caller, call: calls.List) -> calls.ProcList:
    """Processes, by pid."""
    require(m.kernel, caller, Access.READ)
    procs = m.kernel.procs.values() if call.pids is None else _named(m.kernel, call.pids)
    shown = [
        p
        for p in procs
        if (call.all or call.pids is not None or not p.collected)
        and (caller.proc is None or ceilings.inside(m.kernel, p.pid, caller.proc))
    ]
    rows = [info(m, p) for p in sorted(shown, key=lambda p: p.pid)]
    with_init = caller.proc is None and (call.all if call.pids is None else INIT in call.pids)
    return calls.ProcList([init_info(m), *rows] if with_init else rows)


def _named(k: Kernel, pids: Sequence[int | str]) -> list[Proc]:
    found = [k.procs.get(find(k, pid)) for pid in pids]
    return [p for p in found if p is not None]


def find(k: Kernel, pid: int | str) -> Pid:
    """The pid of a pid or a name; 0 when there is none."""
    if isinstance(pid, int):
        return Pid(pid)
    name = pid.removeprefix("%")
    return (
        Pid(int(name)) if name.isascii() and name.isdigit() and len(name) < 19 else k.names.get(name, Pid(0))
    )


async def sys_get(m: Machine, caller: Caller, call: calls.Get) -> calls.ProcList:
    """All there is about processes; with the result of the last run."""
    wanted = [call.pid] if call.pid is not None else call.pids
    if wanted is None:
        return sys_list(m, caller, calls.List(all=call.all))
    rows: list[calls.ProcInfo] = []
    for pid in wanted:
        if pid == INIT and caller.proc is None:
            rows.append(init_info(m))
            continue
        p = m.kernel.procs.get(find(m.kernel, pid))
        if p is None:
            raise KernelError(Errno.ESRCH, f"no such process: {pid}", pid=pid)
        require(m.kernel, caller, Access.READ, p.pid)
        row = info(m, p)
        result = await m.run_result(p) if p.run.began else None
        rows.append(msgspec.structs.replace(row, run=result, cache=cache_info(p.last_call)))
    return calls.ProcList(rows)


def cache_info(call: LastCall | None) -> calls.CacheInfo | None:
    """What the last model call read from the prompt cache."""
    return None if call is None else msgspec.convert(call, calls.CacheInfo, from_attributes=True)


def info(m: Machine, p: Proc) -> calls.ProcInfo:
    """One line of `ps`."""
    image = m.kernel.image(p)
    return calls.ProcInfo(
        pid=p.pid,
        ppid=p.ppid,
        birth=p.birth,
        stat=m.stat(p),
        program=image.program,
        name=p.name,
        model=image.model,
        provider=image.provider,
        uid=p.uid,
        access=p.access.word,
        nice=p.nice,
        cwd=p.cwd,
        head=f"m{p.head}" if p.head is not None else None,
        turns=p.turns,
        context_tokens=p.context_tokens,
        context_window=window.size(m, image),
        usage=p.usage,
        cost_usd=m.kernel.total(p.pid).dollars,
        own_cost_usd=None if p.unpriced else p.cost / NANO,
        started=p.began,
        ended=p.ended or None,
        wchan=m.wchan(p),
        interactive=p.input_open,
        waiting=len(p.inbox),
        collected=p.collected,
        status=p.status,
        stop_reason=p.stop_reason or None,
        reason=p.reason,
        children=list(m.kernel.children.get(p.pid, ())),
        fds=sorted(p.fds),
        run=None,
    )


def init_info(m: Machine) -> calls.ProcInfo:
    """Pid 1 is the daemon itself."""
    return calls.ProcInfo(
        pid=INIT, ppid=0, birth=0, stat="S", program="init", name="init", model="", provider="",
        uid=os.getuid(), access="admin", nice=0, cwd="/", head=None, turns=0, context_tokens=0,
        context_window=None, usage=calls.Usage(), cost_usd=None, own_cost_usd=None, started=m.started,
        ended=None, wchan="-", interactive=False, waiting=0, collected=False, status=None, stop_reason=None,
        reason="", children=list(m.kernel.children.get(INIT, ())), fds=[], run=None,
    )  # fmt: skip


# --- signals ----------------------------------------------------------------------------------------


def sys_signal(m: Machine, caller: Caller, call: calls.SignalProc) -> calls.Empty | Awaitable[calls.Empty]:
    """Send a signal, at once where the messages it needs are in memory."""
    sig = signal(call.signal)
    signals.allowed(call.pid)
    require(m.kernel, caller, Access.ADMIN, call.pid)
    target = m.kernel.proc(call.pid)
    if sig is None:
        return calls.Empty()
    nodes = {head: m.store.node_nowait(head) for head in _heads(m, target, tree=call.tree)}
    known = {head: node for head, node in nodes.items() if node is not None}
    if len(known) < len(nodes):
        return _signal_later(m, caller, call, sig, known)
    return _signal(m, caller, call, sig, known)


async def _signal_later(
    m: Machine, caller: Caller, call: calls.SignalProc, sig: Signal, known: dict[MessageId, Node]
) -> calls.Empty:
    """Fetch the heads first. They are held here: the store's cache may forget the first for the last."""
    while missing := set(_heads(m, m.kernel.proc(call.pid), tree=call.tree)) - known.keys():
        for head in missing:
            known[head] = await m.node(head)
    return _signal(m, caller, call, sig, known)


def _targets(m: Machine, target: Proc, *, tree: bool) -> list[Proc]:
    """The process, and with `tree` all that live below it."""
    if not tree:
        return [target]
    procs = [m.kernel.procs[pid] for pid in ceilings.subtree(m.kernel, target.pid)]
    return [p for p in procs if p.live] or [target]


def _heads(m: Machine, target: Proc, *, tree: bool) -> list[MessageId]:
    """The messages that ask for tools right now: a signal may have to answer them."""
    return [
        p.head for p in _targets(m, target, tree=tree) if p.live and p.at is At.ASKS and p.head is not None
    ]


def _signal(
    m: Machine, caller: Caller, call: calls.SignalProc, sig: Signal, nodes: Mapping[MessageId, Node]
) -> calls.Empty:
    k = m.begin()
    targets = _targets(m, k.proc(call.pid), tree=call.tree)
    images = {p.pid: usertrap.reread(m, p) for p in targets} if sig is Signal.HUP else {}
    for p in targets:
        node = nodes[p.head] if p.live and p.at is At.ASKS and p.head is not None else None
        signals.deliver(k, p.pid, sig, node, m.partial(p.pid), sender=str(caller))
        image = images.get(p.pid)
        if image is not None:
            by_tool = caller.proc is not None
            proc.reload(k, p.pid, ceilings.narrowed(image, k.image(p)) if by_tool else image)
    m.commit(f"signal_{sig.name}")
    return calls.Empty()


# --- wait -------------------------------------------------------------------------------------------


async def sys_wait(m: Machine, caller: Caller, call: calls.Wait) -> calls.EndedList:
    """Wait for ends, and collect them; a timeout collects none."""
    pids = [Pid(pid) for pid in call.pids]
    if not pids:
        raise KernelError(Errno.EINVAL, "pids: is empty")
    for pid in pids:
        require(m.kernel, caller, Access.READ, pid)
        m.kernel.proc(pid)
    found: dict[Pid, Proc] = {}
    with deadline(call.timeout_ms) as scope:
        await m.wait_ended(pids, any_=call.any, ended=found)
    if scope.cancelled_caught:
        raise KernelError(Errno.ETIMEDOUT, f"still running after {call.timeout_ms} ms")
    ended = [found[pid] for pid in pids if pid in found]
    messages = [await m.message(p) for p in ended]
    if call.collect:
        proc.collect_all(m.begin(), [p.pid for p in ended])
        m.commit("collect")
    return calls.EndedList(
        [
            calls.Ended(p.pid, p.status or 0, message, p.usage, _cost(m, p))
            for p, message in zip(ended, messages, strict=True)
        ]
    )


def _cost(m: Machine, p: Proc) -> float | None:
    """What a process and its subtree have cost, in dollars; of one that is gone, it alone."""
    return (m.kernel.total(p.pid) if p.pid in m.kernel.procs else p.used).dollars


# --- fork, goto, exec -------------------------------------------------------------------------------


def sys_fork(m: Machine, caller: Caller, call: calls.Fork) -> calls.Pids | Awaitable[calls.Pids]:
    """Children that share the whole history."""
    require(m.kernel, caller, Access.ADMIN, call.pid)
    done = repeated(m, caller, call, calls.Pids)
    if done is not None:
        return done
    m.room(max(1, len(call.prompts)))
    return _fork_at(m, caller, call) if call.at else _fork(m, caller, call, None)


async def _fork_at(m: Machine, caller: Caller, call: calls.Fork) -> calls.Pids:
    p = m.kernel.proc(call.pid)
    last = call.at == "last"
    node = await nearest_settled(m, p) if last else await own_message(m, p, call.at, "at")
    done = repeated(m, caller, call, calls.Pids)
    return done or _fork(m, caller, call, node)


def _fork(m: Machine, caller: Caller, call: calls.Fork, at: Node | None) -> calls.Pids:
    made = proc.fork(m.begin(), call.pid, call.prompts, at=at, birth=caller.proc)
    reply = calls.Pids([child.pid for child in made])
    remember(m, caller, call, reply)
    m.commit("fork")
    return reply


async def nearest_settled(m: Machine, p: Proc) -> Node | None:
    """The last message of a process that does not ask for tools."""
    head = p.head
    while head is not None:
        node = await m.node(head)
        if not node.asks:
            return node
        head = node.parent
    return None


async def own_message(m: Machine, p: Proc, text: str, field: str) -> Node:
    """A message of a process's own history, on its path or an abandoned branch. Raises ENOENT, EINVAL."""
    number = message_id(text, field)
    tips = [tip for tip in (p.head, *p.tips) if tip is not None]
    if not await m.store.is_ancestor(number, tips):
        raise KernelError(Errno.ENOENT, f"process {p.label} has no message {text}")
    return await m.node(number)


async def sys_goto(m: Machine, caller: Caller, call: calls.Goto) -> calls.Moved:
    """Move the head."""
    require(m.kernel, caller, Access.ADMIN, call.pid)
    proc.require_live(m.kernel, call.pid)
    node = await own_message(m, m.kernel.proc(call.pid), call.to, "to")
    tokens = await window.tokens_at(m, m.kernel.proc(call.pid), node)
    k = m.begin()
    was = k.proc(call.pid).head
    p = proc.goto(k, call.pid, node, call.text, run=call.run, tokens=tokens)
    m.commit("goto")
    return calls.Moved(f"m{was}" if was else None, f"m{p.head}")


def sys_exec(m: Machine, caller: Caller, call: calls.Exec) -> calls.Empty:
    """Replace the program."""
    require(m.kernel, caller, Access.ADMIN, call.pid)
    p = proc.require_live(m.kernel, call.pid)
    image = m.image_of(call.program, call.cwd or p.cwd, p.env)
    if caller.proc is not None:
        image = ceilings.narrowed(image, m.kernel.image(p))
    m.affordable(image, p.birth, p.limits)
    proc.exec_(m.begin(), call.pid, image)
    m.commit("exec")
    return calls.Empty()


# --- the small ones ---------------------------------------------------------------------------------


def sys_limits(m: Machine, caller: Caller, call: calls.Limits) -> calls.LimitList:
    """Show limits, after changing some."""
    require(m.kernel, caller, Access.READ, call.pid)
    if call.pid == INIT and caller.proc is None and not call.set:
        return calls.LimitList([])
    p = m.kernel.proc(call.pid)
    if call.set:
        require_user(caller)
        given = limits.parse_all(call.set)
        _payable(m, p, given)
        p = limits.change(m.begin(), call.pid, given)
        m.commit("limits")
        m.limits_changed(p.pid)
    return calls.LimitList([_limit_info(row) for row in limits.table(m.begin(), p)])


def _payable(m: Machine, p: Proc, given: Mapping[str, Limit]) -> None:
    """Refuse (EINVAL) a cost limit for a tree in which somebody asks a model without a known price."""
    if given.get("cost_usd", Limit()) == Limit():
        return
    for one in map(m.kernel.proc, ceilings.subtree(m.kernel, p.pid)):
        if one.live:
            m.affordable(m.kernel.image(one), one.birth, given)


def _limit_info(row: limits.Row) -> calls.LimitInfo:
    """A row as clients read it: what is counted in whole numbers is one."""
    amounts = (row.limit.soft, row.limit.hard, row.used)
    digits = {"wall": 3, "cost_usd": 9}.get(row.resource)
    return calls.LimitInfo(row.resource, *(None if one is None else round(one, digits) for one in amounts))


def sys_renice(m: Machine, caller: Caller, call: calls.Renice) -> calls.Empty:
    """Weigh a process anew."""
    require(m.kernel, caller, Access.ADMIN, call.pid)
    if caller.proc is not None and call.nice < m.kernel.proc(call.pid).nice:
        raise KernelError(Errno.EPERM, "nice: a process's tools can only raise it")
    proc.renice(m.begin(), call.pid, call.nice)
    m.commit("renice")
    return calls.Empty()


def sys_rename(m: Machine, caller: Caller, call: calls.Rename) -> calls.Empty:
    """Name a process."""
    require(m.kernel, caller, Access.ADMIN, call.pid)
    proc.rename(m.begin(), call.pid, call.name)
    m.commit("rename")
    return calls.Empty()


def sys_remove(m: Machine, caller: Caller, call: calls.Remove) -> calls.Empty:
    """Forget ended processes: all of them, or none if one cannot be."""
    require(m.kernel, caller, Access.ADMIN)
    for pid in call.pids:
        p = m.kernel.proc(pid)
        require_inside(m.kernel, caller, p)
        proc.removable(m.kernel, p)
    k = m.begin()
    for pid in dict.fromkeys(call.pids):
        proc.remove(k, pid)
    m.commit("remove")
    return calls.Empty()
