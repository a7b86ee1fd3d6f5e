"""The local model: have it run, or not. People only: it takes most of a machine."""

import os

from llmprocd.abi import calls, paths, weights
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Access
from llmprocd.local import Local, Wish
from llmprocd.machine import Machine
from llmprocd.syscall.caller import Caller, require, require_user


async def sys_local_up(m: Machine, caller: Caller, call: calls.LocalUp) -> calls.LocalInfo:
    """Serve a model, now and after every restart; answers when it is ready."""
    require_user(caller)
    known = weights.MODELS.get(call.model)
    if known is None:
        raise KernelError(Errno.EINVAL, f"model: {call.model!r} is none of {', '.join(weights.MODELS)}")
    path = call.path or f"{paths.cache_dir(os.environ, m.uid)}/{known.file}"
    if not path.startswith("/"):
        raise KernelError(Errno.EINVAL, "path: must be absolute")
    return await _local(m).up(Wish(call.model, path, call.threads))


async def sys_local_down(m: Machine, caller: Caller, _call: calls.LocalDown) -> calls.LocalInfo:
    """Serve it no more; answers when it has ended."""
    require_user(caller)
    return await _local(m).down()


def sys_local_status(m: Machine, caller: Caller, _call: calls.LocalStatus) -> calls.LocalInfo:
    """How it does."""
    require(m.kernel, caller, Access.READ)
    return _local(m).info()


def _local(m: Machine) -> Local:
    if m.local is None:
        raise KernelError(Errno.ENOSYS, "this daemon keeps no local model")
    return m.local
