"""`ps`: the process table."""

import time

from llmprocctl import render, units
from llmprocctl.session import Session, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    Row: TypeAlias = dict[str, Any]

DEFAULT = "pid,ppid,stat,program,turn,ctx,in,out,cache,cost,time,wchan"


def ps(
    session: Session,
    *,
    pids: tuple[str, ...],
    all: bool,  # noqa: A002 - the option's name
    columns: tuple[str, ...],
    forest: bool,
    sort: str | None,
    no_headers: bool,
    quiet: bool,
    json: bool,
) -> int:
    """Print the process table."""
    chosen = _columns(columns)
    order = _order(sort)
    rows = _rows(session, pids, every=all)
    for key, backwards in reversed(order):
        rows.sort(key=lambda row, key=key: _rank(COLUMNS[key][2](row)), reverse=backwards)
        rows.sort(key=lambda row, key=key: COLUMNS[key][2](row) is None)
    marks = [""] * len(rows)
    if forest:
        rows, marks = _drawn(rows)
    if json:
        render.put_json(rows)
    elif quiet:
        render.put("".join(f"{row['pid']}\n" for row in rows))
    else:
        _print(rows, marks, chosen, headers=not no_headers)
    return session.status


def _rows(session: Session, words: tuple[str, ...], *, every: bool) -> "list[Row]":
    """The rows of the processes named, in that order, or of those that there are, by pid."""
    if not words:
        rows: list[Row] = session.call("proc.list", all=every or None)["procs"]
        rows.sort(key=lambda row: row["pid"])
        return rows
    asked = session.pids(words)
    if not asked:
        return []
    found = {row["pid"]: row for row in session.call("proc.list", all=True, pids=[*asked.values()])["procs"]}
    for word, pid in asked.items():
        if pid not in found:
            session.fault(word, "no such process")
    return [found[pid] for pid in dict.fromkeys(asked.values()) if pid in found]


def _columns(lists: tuple[str, ...]) -> list[tuple[str, str]]:
    """The columns and their headers of `-o` options."""
    chosen: list[tuple[str, str]] = []
    for words in lists or (DEFAULT,):
        names, equals, header = words.partition("=")
        while equals:  # in `pid=,cost=Cost` each header goes on to the next comma
            header, _, words_left = header.partition(",")
            *plain, last = names.split(",")
            chosen += [(_column(name), COLUMNS[_column(name)][0]) for name in plain]
            chosen.append((_column(last), header))
            names, equals, header = words_left.partition("=")
        chosen += [(_column(name), COLUMNS[_column(name)][0]) for name in names.split(",") if names]
    return chosen


def _order(sort: str | None) -> list[tuple[str, bool]]:
    words = sort.split(",") if sort else []
    return [(_column(word.lstrip("+-")), word.startswith("-")) for word in words]


def _column(name: str) -> str:
    word = name.strip().lower().rstrip("%")
    word = _ALIASES.get(word, word)
    if word not in COLUMNS:
        raise UsageError(f"{name}: no such column (there are {', '.join(COLUMNS)})")
    return word


def _drawn(rows: "list[Row]") -> "tuple[list[Row], list[str]]":
    """The rows as a forest, and what is drawn before the program of each."""
    by_pid = {row["pid"]: row for row in rows}
    drawn = render.forest({row["pid"]: row["ppid"] for row in rows})
    return [by_pid[pid] for pid, _ in drawn], [mark for _, mark in drawn]


def _print(rows: "list[Row]", marks: list[str], chosen: list[tuple[str, str]], *, headers: bool) -> None:
    names = [name for name, _ in chosen]
    drawn = names.index("program") if "program" in names else -1
    shows = [COLUMNS[name][3] for name in names]
    values = [COLUMNS[name][2] for name in names]
    lines: list[list[str]] = []
    for row, mark in zip(rows, marks, strict=True):
        cells = [
            "-" if (v := value(row)) is None or v == "" else show(v)
            for value, show in zip(values, shows, strict=True)
        ]
        if drawn >= 0:
            cells[drawn] = mark + cells[drawn]
        lines.append(cells)
    right = [i for i, name in enumerate(names) if COLUMNS[name][1]]
    render.put_table(lines, [header if headers else "" for _, header in chosen], right)


def _rank(value: "Any") -> "tuple[bool, Any]":
    """Texts after numbers, so that the two can be sorted."""
    return isinstance(value, str), 0 if value is None else value


def _input(row: "Row") -> int:
    usage = row["usage"]
    return usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]


def _context(row: "Row") -> float | None:
    window = row.get("context_window")
    return 100 * row["context_tokens"] / window if window else None


def _cache(row: "Row") -> float | None:
    """The part of the input that came from the cache."""
    total = _input(row)
    return 100 * row["usage"]["cache_read_input_tokens"] / total if total else None


def _elapsed(row: "Row") -> float | None:
    began = row.get("started")
    return (row.get("ended") or time.time()) - began if began else None


def _field(name: str) -> "Callable[[Row], Any]":
    return lambda row: row.get(name)


def _percent(value: float) -> str:
    return f"{value:.0f}"


# name: header, is it a number, its value in a row, and how that is shown
COLUMNS: "dict[str, tuple[str, bool, Callable[[Row], Any], Callable[[Any], str]]]" = {
    "pid": ("PID", True, _field("pid"), str),
    "ppid": ("PPID", True, _field("ppid"), str),
    "stat": ("STAT", False, _field("stat"), render.cell),
    "program": ("PROGRAM", False, _field("program"), render.cell),
    "turn": ("TURN", True, _field("turns"), str),
    "ctx": ("CTX%", True, _context, _percent),
    "in": ("IN", True, _input, units.count),
    "out": ("OUT", True, lambda row: row["usage"]["output_tokens"], units.count),
    "cache": ("CACHE%", True, _cache, _percent),
    "cost": ("COST", True, _field("cost_usd"), units.dollars),
    "time": ("TIME", True, _elapsed, units.clock),
    "wchan": ("WCHAN", False, _field("wchan"), render.cell),
    "name": ("NAME", False, _field("name"), render.cell),
    "head": ("HEAD", False, _field("head"), render.cell),
    "nice": ("NI", True, _field("nice"), str),
    "status": ("STATUS", True, _field("status"), str),
    "access": ("ACCESS", False, _field("access"), render.cell),
    "model": ("MODEL", False, _field("model"), render.cell),
    "provider": ("PROVIDER", False, _field("provider"), render.cell),
    "birth": ("BIRTH", True, _field("birth"), str),
    "uid": ("UID", True, _field("uid"), str),
    "cwd": ("CWD", False, _field("cwd"), render.cell),
    "context": ("CONTEXT", True, _field("context_tokens"), units.count),
    "mail": ("MAIL", True, _field("waiting"), str),
    "stop_reason": ("STOP_REASON", False, _field("stop_reason"), render.cell),
    "reason": ("REASON", False, _field("reason"), render.cell),
}
_ALIASES = {
    "turns": "turn",
    "ni": "nice",
    "command": "program",
    "comm": "program",
    "etime": "time",
    "state": "stat",
}
