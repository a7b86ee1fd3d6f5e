"""History: the messages of a process."""

import math

from llmprocd.abi import calls
from llmprocd.abi.types import INIT, Access, MessageId, message_id
from llmprocd.kernel import history
from llmprocd.kernel.state import Node
from llmprocd.machine import Machine
from llmprocd.syscall.caller import Caller, require

ENOUGH = 10_000


async def sys_history(m: Machine, caller: Caller, call: calls.History) -> calls.HistoryList:
    """The path to the head, or every branch."""
    require(m.kernel, caller, Access.READ, call.pid)
    if call.pid == INIT and caller.proc is None:
        return calls.HistoryList(None, [])
    p = m.kernel.proc(call.pid)
    head = f"m{p.head}" if p.head is not None else None
    after = message_id(call.after, "after") if call.after else MessageId(0)
    limit = call.limit or ENOUGH
    if call.all:
        tips = [tip for tip in (p.head, *p.tips) if tip is not None]
        nodes = await m.store.tree(tips, after, limit) if tips else []
    else:
        nodes = await m.store.path(p.head) if p.head is not None else []
        nodes = [node for node in nodes if node.id > after][:limit]
    return calls.HistoryList(head, [message(node) for node in nodes])


def message(node: Node) -> calls.MessageInfo:
    """A message as the wire shows it."""
    return calls.MessageInfo(
        id=f"m{node.id}",
        parent=f"m{node.parent}" if node.parent is not None else None,
        role=node.role,
        content=history.content(node),
        tokens=node.usage.output_tokens if node.usage else math.ceil(len(node.body) / 4),
        at=node.at,
    )
