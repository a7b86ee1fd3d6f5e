"""SYSCALLS and dispatch: the only place where a call from the socket runs.

A plain handler takes effect and is answered at once. An `async def` one waits, if it is one of WAITS; else
it needs something from the disk first, and what its client sent after it has to wait for that. The answer
carries the last commit there was, so that it leaves when everything it may have seen is on disk.
"""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, cast

import msgspec

from llmprocd.abi import calls
from llmprocd.abi.calls import Call
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Pid
from llmprocd.abi.wire import Answer
from llmprocd.machine import Machine
from llmprocd.syscall import sysfile, syshistory, sysinfo, syslocal, sysproc, sysstore
from llmprocd.syscall.caller import Caller, Pushes

Handler = Callable[[Machine, Caller, Any], Any]

HANDLERS: dict[type[Call[Any]], Handler] = {
    calls.Hello: sysinfo.sys_hello,
    calls.GetStatus: sysinfo.sys_status,
    calls.Reload: sysinfo.sys_reload,
    calls.Stop: sysinfo.sys_stop,
    calls.Spawn: sysproc.sys_spawn,
    calls.RunProc: sysproc.sys_run,
    calls.List: sysproc.sys_list,
    calls.Get: sysproc.sys_get,
    calls.SignalProc: sysproc.sys_signal,
    calls.Wait: sysproc.sys_wait,
    calls.Send: sysproc.sys_send,
    calls.Fork: sysproc.sys_fork,
    calls.Goto: sysproc.sys_goto,
    calls.Exec: sysproc.sys_exec,
    calls.Limits: sysproc.sys_limits,
    calls.Renice: sysproc.sys_renice,
    calls.Rename: sysproc.sys_rename,
    calls.Remove: sysproc.sys_remove,
    calls.History: syshistory.sys_history,
    calls.FdList: sysfile.sys_fd_list,
    calls.FdStat: sysfile.sys_fd_stat,
    calls.FdRead: sysfile.sys_fd_read,
    calls.FdWrite: sysfile.sys_fd_write,
    calls.EventsRead: sysinfo.sys_events_read,
    calls.Subscribe: sysinfo.sys_subscribe,
    calls.Unsubscribe: sysinfo.sys_unsubscribe,
    calls.ProgList: sysinfo.sys_prog_list,
    calls.ProgCheck: sysinfo.sys_prog_check,
    calls.StoreGc: sysstore.sys_gc,
    calls.LocalUp: syslocal.sys_local_up,
    calls.LocalDown: syslocal.sys_local_down,
    calls.LocalStatus: syslocal.sys_local_status,
}

WAITS = frozenset(
    {
        calls.RunProc,
        calls.Wait,
        calls.FdRead,
        calls.EventsRead,
        calls.StoreGc,
        calls.LocalUp,
        calls.LocalDown,
    }
)


def sys_api(_m: Machine, _caller: Caller, _call: calls.Api) -> calls.ApiTable:
    """The method table."""
    return calls.ApiTable([_method(call) for call in calls.CALLS])


def _method(call: type[Call[Any]]) -> calls.MethodInfo:
    params, result = msgspec.json.schema(call), msgspec.json.schema(call.reply)
    return calls.MethodInfo(
        name=call.method,
        help=(call.__doc__ or "").strip(),
        params=msgspec.json.encode(params).decode(),
        result=msgspec.json.encode(result).decode(),
        waits=call in WAITS,
    )


HANDLERS[calls.Api] = sys_api

SYSCALLS: dict[str, tuple[msgspec.msgpack.Decoder[Any], Handler]] = {
    call.method: (msgspec.msgpack.Decoder(call), HANDLERS[call]) for call in calls.CALLS
}

_WAITING = frozenset(call.method for call in WAITS)

NOTHING = b"\x80"
"""An empty map: no arguments."""


class Door:
    """What stands behind the socket."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @property
    def durable(self) -> int:
        return self._machine.store.durable

    async def wait_durable(self, ticket: int) -> None:
        await self._machine.store.wait_durable(ticket)

    async def admit(self, os_pid: int, uid: int, gid: int, push: Pushes) -> Caller:
        """Who connects: a user, or the tool of an LLM process. EPERM for one that may not."""
        m = self._machine
        if uid not in {0, m.uid} and not m.shared:
            raise KernelError(Errno.EPERM, f"this daemon serves uid {m.uid}, not uid {uid}")
        try:
            owner: Pid | None = await m.spawner.owner(os_pid)
        except ProcessLookupError:
            raise KernelError(Errno.EPERM, f"the peer (pid {os_pid}) is gone") from None
        return Caller(os_pid, uid, gid, owner, push)

    def call(self, caller: Caller, method: str, params: bytes) -> Answer | Awaitable[Answer]:
        """Run a call. Raises ENOSYS, EINVAL, and what the call raises."""
        found = SYSCALLS.get(method)
        if found is None:
            raise KernelError(Errno.ENOSYS, f"no such method: {method}")
        decoder, handler = found
        call = _decoded(decoder, params)
        try:
            result: object = handler(self._machine, caller, call)
        except KernelError as error:
            error.ticket = self._machine.ticket
            raise
        if isinstance(result, Coroutine):
            return self._later(cast("Coroutine[Any, Any, object]", result))
        return Answer(result, self._machine.ticket)

    def waits(self, method: str) -> bool:
        """Is it a call that waits for something to happen, and not just for the disk?"""
        return method in _WAITING

    async def _later(self, result: Awaitable[object]) -> Answer:
        try:
            value = await result
        except KernelError as error:
            error.ticket = self._machine.ticket
            raise
        return Answer(value, self._machine.ticket)

    def hang_up(self, caller: Caller) -> None:
        """The client is gone, and with it what it subscribed to."""
        for scope in caller.subs.values():
            scope.cancel(reason="the client hung up")
        caller.subs.clear()


def _decoded(decoder: msgspec.msgpack.Decoder[Any], params: bytes) -> Any:
    try:
        return decoder.decode(params or NOTHING)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        text, _, path = str(error).partition(" - at `$")
        where = path.rstrip("`").lstrip(".")
        for theirs, ours in _WORDS:
            text = text.replace(theirs, ours)
        raise KernelError(Errno.EINVAL, f"{where}: {text}" if where else text, path=where) from None


_WORDS = (
    ("Object contains unknown field", "unknown argument"),
    ("Object missing required field", "missing argument"),
    ("Expected `", "must be `"),
)
