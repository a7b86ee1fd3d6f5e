"""What there is to know: `inspect limits programs call api`."""

import os

from llmprocctl import launch, render, units
from llmprocctl import session as sessions
from llmprocctl.client import RefusedError
from llmprocctl.session import Session, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def inspect(session: Session, *, pids: tuple[str, ...], json: bool) -> int:
    """Print all there is about processes, as JSON; with `json` an object a line to a terminal too."""
    from json import dumps

    indent = 2 if render.is_terminal() and not json else None
    for word, pid in session.pids(pids).items():
        try:
            row = session.call("proc.get", pids=[pid])["procs"][0]
            row["descriptors"] = session.call("fd.list", pid=pid)["fds"]
            row["limits"] = session.call("proc.limits", pid=pid)["limits"]
        except RefusedError as error:
            session.fault(word, error)
        else:
            render.put(render.text(dumps(row, ensure_ascii=False, indent=indent)) + "\n")
    return session.status


def limits(session: Session, *, pid: str, changes: tuple[str, ...], quiet: bool, json: bool) -> int:
    """Print the limits of a process, after changing some."""
    changed = launch.pairs(changes, "limits")
    found = session.call("proc.limits", pid=session.pid(pid), set=changed or None)["limits"]
    if json:
        render.put_json(found)
        return 0
    if quiet:
        render.put("".join(f"{row['resource']}\n" for row in found))
        return 0
    rows = [[row["resource"], *(_amount(row, key) for key in ("soft", "hard", "used"))] for row in found]
    render.put_table(rows, ["RESOURCE", "SOFT", "HARD", "USED"])
    return 0


def programs(session: Session, *, words: tuple[str, ...], quiet: bool, json: bool) -> int:
    """Print the programs that can be named, or check files."""
    if not words:
        return _list(session, quiet=quiet, json=json)
    if words[0] != "check" or len(words) < 2:
        raise UsageError(f"{' '.join(words)}: not `check FILE`")
    sound = [_check(session, word, json=json) for word in words[1:]]
    return 0 if all(sound) else sessions.FAILED


def call(session: Session, *, method: str, json: str) -> int:
    """Make a raw call, and print what it gives."""
    params = _params(method, _all_of_stdin() if json == "-" else json)
    try:
        result = session.call(method, **params)
    except RefusedError as error:
        session.fault(method, f"{error.name}: {error.text}" if error.name else error.text)
        return session.status
    except OverflowError as exc:
        raise UsageError(f"{method}: {exc}") from None
    render.put_json([result])
    return 0


def api(session: Session, *, quiet: bool, json: bool) -> int:
    """Print the method table."""
    methods = session.call("sys.api")["methods"]
    if json:
        render.put_json(methods)
    elif quiet:
        render.put("".join(f"{method['name']}\n" for method in methods))
    else:
        rows = [[method["name"], method["help"].partition("\n")[0]] for method in methods]
        render.put_table(rows, ["METHOD", "DOES"])
    return 0


def _list(session: Session, *, quiet: bool, json: bool) -> int:
    """The programs in the order they are looked for: this user's $LLMPROC_PATH, then those built in."""
    known = session.call("prog.list")["programs"]
    told = {row["path"]: row["description"] for row in known}
    found: dict[str, dict[str, Any]] = {}
    for name, path in _on_path():
        found.setdefault(name, {"name": name, "path": path, "description": told.get(path, "")})
    for row in known:
        if not row["path"]:  # what is on the daemon's own path cannot be named from here
            found.setdefault(row["name"], row)
    rows = list(found.values())
    if json:
        render.put_json(rows)
    elif quiet:
        render.put("".join(f"{row['name']}\n" for row in rows))
    else:
        cells = [[render.cell(row[key] or "-") for key in ("name", "path", "description")] for row in rows]
        render.put_table(cells, ["NAME", "PATH", "DESCRIPTION"])
    return 0


def _on_path() -> list[tuple[str, str]]:
    """Names and paths of the program files on $LLMPROC_PATH."""
    found: list[tuple[str, str]] = []
    for folder in filter(None, os.environ.get("LLMPROC_PATH", "").split(":")):
        root = os.path.abspath(folder)  # noqa: PTH100
        try:
            names = sorted(os.listdir(root))  # noqa: PTH208
        except OSError:  # as a shell passes over what it cannot search
            continue
        files = [
            (name.rpartition(".")[0], f"{root}/{name}") for name in names if name.endswith(launch.ENDINGS)
        ]
        found += [(name, path) for name, path in files if os.path.isfile(path)]  # noqa: PTH113
    return found


def _check(session: Session, word: str, *, json: bool) -> bool:
    """Print every fault of a program; whether there is none."""
    path = launch.find(word)
    if "/" not in path and os.path.exists(word):  # noqa: PTH110
        path = os.path.abspath(word)  # noqa: PTH100
    try:
        found = session.call("prog.check", path=path, cwd=os.getcwd())  # noqa: PTH109
    except RefusedError as error:
        session.fault(word, error)
        return False
    if json:
        render.put_json([{"path": path, **found}])
        return found["ok"]
    for fault in found["faults"]:
        place = f"{word}:{fault['line']}: " + (f"{fault['key']}: " if fault["key"] else "")
        render.put(render.cell(place + fault["text"]) + "\n")
    for warning in found["warnings"]:
        session.say(f"{word}: warning: {render.cell(warning)}")
    if found["ok"]:
        render.put(f"{word}: ok\n")
    return found["ok"]


def _params(method: str, text: str) -> "dict[str, Any]":
    from json import loads

    try:
        params: Any = loads(text or "{}")
    except ValueError as exc:
        raise UsageError(f"{method}: the arguments are no JSON: {exc}") from None
    if not text.lstrip().startswith("{") and text:
        raise UsageError(f"{method}: the arguments are no JSON object")
    return params


def _amount(row: "dict[str, Any]", key: str) -> str:
    value, resource = row[key], row["resource"]
    if value is None:
        return "-"
    if resource == "wall":
        return units.span(round(value, 1))
    if resource == "cost_usd":
        return units.dollars(value)
    return units.bytes_(value) if resource == "fd_bytes" else units.count(value)


def _all_of_stdin() -> str:
    parts: list[bytes] = []
    while part := os.read(0, 1 << 16):
        parts.append(part)
    return b"".join(parts).decode(errors="surrogateescape")
