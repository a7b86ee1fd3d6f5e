"""A real model on this machine: `local up|down|status`."""

import os

from llmprocctl import render
from llmprocctl.session import Session, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NOT_UP = 3  # as `daemon status` has it


def local(session: Session, *, action: str, model: str | None, threads: int | None, json: bool) -> int:
    """Have a small model run on this machine, or not, or see how it does."""
    if action != "up" and (model or threads is not None):
        raise UsageError(f"{action}: takes neither --model nor --threads")
    if action == "up":
        return _up(session, model, threads or 0, json=json)
    if action == "down":
        session.call("local.down")
        return 0
    if action == "status":
        info = session.call("local.status")
        _show(info, json=json)
        return 0 if info["state"] == "up" else _NOT_UP
    raise UsageError(f"{action}: not one of up, down, status")


def _up(session: Session, name: str | None, threads: int, *, json: bool) -> int:
    from pathlib import Path

    from llmprocctl import weights
    from llmprocd.abi import paths
    from llmprocd.abi.weights import DEFAULT, MODELS

    known = MODELS.get(name or DEFAULT)
    if known is None:
        raise UsageError(f"--model: {name!r} is none of {', '.join(MODELS)}")
    session.starting()
    if not session.call("local.status")["installed"]:
        session.say("the daemon lacks the extra 'local' (pip install 'llmprocd[local]', then start it again)")
        return 1
    try:
        path = weights.fetch(known, Path(paths.cache_dir(os.environ, os.getuid())), session.say)
    except weights.FetchError as exc:
        session.say(str(exc))
        return 1
    _show(session.call("local.up", model=name or DEFAULT, path=str(path), threads=threads), json=json)
    return 0


def _show(info: "dict[str, Any]", *, json: bool) -> None:
    if json:
        render.put_json([info])
    else:
        render.put(f"{line(info)}\n")


def line(info: "dict[str, Any]") -> str:
    """How the model on this machine does, in a line."""
    said = [f"{info['model']} {info['state']}".strip()]
    if info["state"] == "up":
        said += [
            f"pid {info['pid']}",
            f"{info['slots']} slot{'s' * (info['slots'] > 1)} of {info['window']} tokens",
        ]
    if info["restarts"]:
        said.append(f"ended by itself {info['restarts']}x")
    if info["state"] != "up" and info["reason"]:
        said.append(render.cell(info["reason"]))
    if not info["installed"]:
        said.append("the extra 'local' is not installed")
    return ", ".join(said)
