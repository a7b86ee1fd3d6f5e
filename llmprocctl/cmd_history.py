"""The tree of messages: `history fork goto exec`."""

import os

from llmprocctl import launch, render, talk, units
from llmprocctl.client import RefusedError
from llmprocctl.session import Session, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Node: TypeAlias = dict[str, Any]

_PAGE = 200  # messages a reply: each may be long


def history(
    session: Session,
    *,
    pid: str,
    all: bool,  # noqa: A002 - the option's name
    graph: bool,
    quiet: bool,
    json: bool,
) -> int:
    """Print the messages that a process stands on, or those of all its branches."""
    head, nodes = _messages(session, session.pid(pid), every=all or graph)
    marks = [""] * len(nodes)
    if graph:
        nodes, marks = _drawn(nodes)
    if json:
        render.put_json(nodes)
    elif quiet:
        render.put("".join(f"{node['id']}\n" for node in nodes))
    else:
        _print(nodes, marks, head if all or graph else None)
    return 0


def fork(session: Session, *, pid: str, prompts: tuple[str, ...], at: str | None) -> int:
    """Copy a process, and print the pids of the copies."""
    params = {"pid": session.pid(pid), "prompts": list(prompts) or None, "at": at}
    made = launch.once(session, "proc.fork", params)["pids"]
    render.put("".join(f"{child}\n" for child in made))
    return 0


def goto(session: Session, *, pid: str, msg: str, message: str | None, run: bool) -> int:
    """Move a process to another message, and print its old and its new head."""
    if run and message is not None:
        raise UsageError("-m has it go on already: it does not go with --run")
    moved = session.call("proc.goto", pid=session.pid(pid), to=msg, text=message, run=run or None)
    render.put(f"{moved['old_head'] or '-'} -> {moved['head'] or '-'}\n")
    return 0


def exec_(session: Session, *, pid: str, program: str) -> int:
    """Replace the program of a process."""
    target = session.pid(pid)
    try:
        session.call("proc.exec", pid=target, program=launch.find(program), cwd=os.getcwd())  # noqa: PTH109
    except RefusedError as error:
        if error.name in {"ESRCH", "EBUSY", "EPERM"}:
            raise
        refused = launch.cannot_start(program, error)
        session.say(str(refused))
        return refused.status
    return 0


def _messages(session: Session, pid: int, *, every: bool) -> "tuple[str | None, list[Node]]":
    """The head, and all messages, page by page."""
    nodes: list[Node] = []
    after: str | None = None
    while True:
        reply = session.call("proc.history", pid=pid, all=every or None, after=after, limit=_PAGE)
        page: list[Node] = reply["messages"]
        nodes += page
        if len(page) < _PAGE:
            return reply["head"], nodes
        after = page[-1]["id"]


def _drawn(nodes: "list[Node]") -> "tuple[list[Node], list[str]]":
    """The messages as a tree, and what is drawn before each.

    A conversation without branches stays in one column: only where it parts is anything indented.
    """
    by_id = {node["id"]: node for node in nodes}
    children: dict[str, list[str]] = {}
    for node in nodes:
        parent = node["parent"] if node["parent"] in by_id else ""
        children.setdefault(parent, []).append(node["id"])
    drawn: list[tuple[str, str]] = []
    stack = [(root, "", "") for root in reversed(children.get("", []))]
    while stack:
        name, before, below = stack.pop()
        drawn.append((name, before))
        kids = children.get(name, [])
        last = len(kids) - 1
        for i in range(last, -1, -1):
            corner, wall = ("", "") if not last else ("|- ", "|  ") if i < last else ("`- ", "   ")
            stack.append((kids[i], below + corner, below + wall))
    return [by_id[name] for name, _ in drawn], [mark for _, mark in drawn]


def _print(nodes: "list[Node]", marks: list[str], head: str | None) -> None:
    rows: list[list[str]] = []
    for node, mark in zip(nodes, marks, strict=True):
        name = f"{mark}{node['id']}" + (" *" if node["id"] == head else "")
        tokens = "-" if node["tokens"] is None else units.count(node["tokens"])
        rows.append([name, node["role"], tokens, talk.clock(node["at"]), summary(node["content"])])
    render.put_table(rows, ["MSG", "ROLE", "TOKENS", "WHEN", "TEXT"], right=[2])


def summary(content: str) -> str:
    """A message's content blocks (JSON) on one line."""
    from json import loads

    blocks = loads(content)
    if isinstance(blocks, str):
        return render.cell(blocks)
    return render.cell(" ".join(filter(None, (_block(block) for block in blocks))))


def _block(block: "dict[str, Any]") -> str:
    from json import dumps

    kind = block.get("type")
    if kind == "text":
        return str(block["text"])
    if kind == "tool_use":
        return f"{block['name']}({dumps(block['input'], ensure_ascii=False)})"
    if kind == "tool_result":
        content = block.get("content") or ""
        if isinstance(content, str):
            return f"= {content}"
        return f"= {' '.join(_block(part) for part in content)}"
    return f"[{kind}]"
