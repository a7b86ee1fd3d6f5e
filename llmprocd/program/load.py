"""Program files: find, read, link and check them.

Law: what is loaded is what the files say now. A program that was loaded before is given again only while
every file it was read from looks as it did then, and had been still for a moment when it was read.
Law: a program that has faults does not load, and one refusal names them all.
"""

import errno
import os
import platform
import pwd
import stat
import time
import tomllib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from llmprocd.abi import paths
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Access
from llmprocd.kernel import file
from llmprocd.kernel.state import Link, Offer, Paging
from llmprocd.program import lines, schema
from llmprocd.program.lines import Key
from llmprocd.program.schema import Fault, Program, Report, Stamp

BUILTIN = Path(__file__).parent / "builtin"
MAX_FILE = 1 << 20  # bytes
MAX_LINKS = 1000
MAX_CACHED = 256
SETTLED = 100_000_000  # ns; a file younger than this may change again within one tick of its clock
SUFFIXES = (".toml", ".yaml", ".yml")
INLINE = "inline"  # the name of a program that came as a map


class Place(msgspec.Struct, frozen=True):
    """Where a program is: its name, its file as it was asked for, and the file's absolute path."""

    name: str
    shown: str
    path: str
    own: bool = True  # the file is the user's: it is read again at HUP


class Loaded(msgspec.Struct, frozen=True):
    """A program and what is to be said about it; without one, the faults say why."""

    program: Program | None
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]
    text: tuple[str, ...] = ()  # each fault as a line


Texts = tuple[tuple[str, str], ...]
"""Labels and texts of files."""

_cache: dict[tuple[str, str, str, tuple[str, ...]], Loaded] = {}


def load(
    source: str | dict[str, Any], cwd: str, catalog: Mapping[str, Offer]
) -> tuple[Program, tuple[str, ...]]:
    """A program, checked with all that it links to.

    Args:
        source: a path (it holds `/` or ends in .toml), the name of a built-in program, or the tables.
        cwd: absolute; what a relative path, and a map's files, are relative to.
        catalog: the tools there are.

    Returns:
        The program and its warnings, one line each.

    Raises:
        KernelError: ENOENT when there is no such program, ENOEXEC when it has faults: one a line, and as
            `faults` in its data.
    """
    found = _loaded(source, cwd, catalog)
    if found.program is None:
        faults = [msgspec.to_builtins(fault) for fault in found.faults]
        raise KernelError(Errno.ENOEXEC, "\n".join(found.text), faults=faults)
    program = found.program
    if program.variables:
        program = msgspec.structs.replace(program, facts=_facts(program.variables))
    return program, found.warnings


def check(
    path: str | dict[str, Any], cwd: str, catalog: Mapping[str, Offer]
) -> tuple[tuple[Fault, ...], tuple[str, ...]]:
    """All faults and warnings of a program; ENOENT when there is none."""
    found = _loaded(path, cwd, catalog)
    return found.faults, found.warnings


def listed(folders: Iterable[str]) -> list[tuple[str, str, str]]:
    """Name, path and description of the programs in some folders, then of those built in (path "").

    Args:
        folders: the entries of `$LLMPROC_PATH`; the first program of a name hides the others in them.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for folder in folders:
        for name, path in _programs(folder):
            found.setdefault(name, (name, path, _description(_text(path))))
    builtin = [(name, "", _description(_text(path))) for name, path in _programs(str(BUILTIN))]
    return [*found.values(), *builtin]


def fresh(program: Program) -> bool:
    """Do all files of a loaded program still say what they said?"""
    return all(_same(stamp) for stamp in program.stamps)


# --- finding ----------------------------------------------------------------------------------------


def find(source: str, cwd: str) -> Place:
    """Where a program is; ENOENT for a name that is not built in."""
    if "/" in source or source.endswith(SUFFIXES):
        path = _canonical(_below(cwd, source))
        return Place(Path(path).stem, source, path)
    path = BUILTIN / f"{source}.toml"
    names = [name for name, _ in _programs(str(BUILTIN))]
    if source not in names:
        near = _local(source, cwd) or schema.nearest(source, names)
        raise KernelError(Errno.ENOENT, schema.one_line(f"no such program: {source}{near}"))
    return Place(source, path.name, str(path), own=False)


def _local(source: str, cwd: str) -> str:
    """A name that is a file here was meant as a path."""
    names = [name for name, _ in _programs(cwd)]
    return f"; did you mean ./{source}.toml?" if source in names else ""


def _missing(place: Place) -> KernelError:
    folder, _, base = place.path.rpartition("/")
    names = [name for name, _ in _programs(folder or "/")]
    before, slash, _ = place.shown.rpartition("/")
    stem = next((base.removesuffix(end) for end in SUFFIXES if base.endswith(end)), base)
    near = schema.nearest(stem, names, prefix=before + slash, suffix=".toml")
    return KernelError(Errno.ENOENT, schema.one_line(f"no such program: {place.shown}{near}"))


def _programs(folder: str) -> list[tuple[str, str]]:
    """The program files of a folder, by name; none when it cannot be read."""
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208  # names, not paths
    except (OSError, ValueError):
        return []
    return [
        (name.removesuffix(".toml"), f"{folder.rstrip('/')}/{name}")
        for name in names
        if name.endswith(".toml")
    ]


def _description(text: str) -> str:
    """The first comment of a file, `#!` apart."""
    for line in text.splitlines():
        words = line.strip()
        if words and not words.startswith("#"):
            break
        if words.startswith("#") and not words.startswith("#!"):
            return words.lstrip("# ").rstrip()
    return ""


def _text(path: str) -> str:
    try:
        return _read(path)[1].decode("utf-8-sig", errors="replace")
    except OSError:
        return ""


# --- reading, and knowing whether it must be done again ---------------------------------------------


def _read(path: str) -> tuple[Stamp, bytes]:
    """A regular file of at most a mebibyte, and how it looked before it was read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hold the daemon
    except ValueError as error:
        raise FileNotFoundError(errno.ENOENT, str(error)) from error
    try:
        looked = time.time_ns()
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if paths.is_of_a_process(paths.opened(fd)):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        data = _all(fd)
    finally:
        os.close(fd)
    if len(data) > MAX_FILE:
        raise OSError(errno.EFBIG, f"larger than {MAX_FILE} bytes")
    return Stamp(path, _look(info), looked), data


def _all(fd: int) -> bytes:
    """What a file holds, up to one byte more than is taken."""
    pieces: list[bytes] = []
    left = MAX_FILE + 1
    while left and (piece := os.read(fd, left)):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _look(info: os.stat_result) -> tuple[int, ...]:
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _same(stamp: Stamp) -> bool:
    """Does a file look as it did, and was it old enough then for that to mean anything?"""
    try:
        now = _look(os.stat(stamp.path))  # noqa: PTH116  # ten times cheaper than Path
    except (OSError, ValueError):
        return not stamp.found
    return now == stamp.found and stamp.at - max(now[3], now[4]) > SETTLED


def _loaded(source: str | dict[str, Any], cwd: str, catalog: Mapping[str, Offer]) -> Loaded:
    if isinstance(source, dict):
        return _examined(_Reader(catalog, cwd), Place(INLINE, INLINE, f"{cwd}/", own=False), source)
    place = find(source, cwd)
    key = (place.path, place.shown, cwd, tuple(catalog))
    known = _cache.get(key)
    if known is not None and known.program is not None and fresh(known.program):
        return known
    found = _examined(_Reader(catalog, cwd), place)
    _cache.pop(key, None)
    if found.program is not None:
        while len(_cache) >= MAX_CACHED:
            del _cache[next(iter(_cache))]
        _cache[key] = found
    return found


# --- checking a file and all that it links to -------------------------------------------------------


class _Reader:
    """What is read for one program: with what, what it looked like, and which files it was."""

    def __init__(self, catalog: Mapping[str, Offer], cwd: str) -> None:
        self.catalog = catalog
        self.cwd = cwd
        self.stamps: list[Stamp] = []
        self.seen: set[str] = set()

    def stamped(self, path: str) -> bytes:
        try:
            stamp, data = _read(path)
        except OSError:
            self.stamps.append(Stamp(path, (), 0))
            raise
        self.stamps.append(stamp)
        return data


def _examined(reader: _Reader, place: Place, data: dict[str, Any] | None = None) -> Loaded:
    """One program, and what is wrong with it or with anything it links to."""
    reader.seen.add(_real(place.path))
    report, program = _one(reader, place, data)
    _follow(reader, report, program)
    if report.faults or program is None:
        faults = tuple(sorted(report.faults, key=lambda fault: fault.line))
        told = tuple(schema.told(report.file, fault) for fault in faults)
        return Loaded(None, faults, tuple(report.warnings), told)
    program = msgspec.structs.replace(program, stamps=tuple(reader.stamps))
    return Loaded(program, (), tuple(report.warnings))


def _follow(reader: _Reader, report: Report, program: Program | None) -> None:
    """Check what a program links to, at any depth; each fault is one of the link it was reached by."""
    queue = deque((link.path, _site(link)) for link in (program.links if program else ()))
    while queue:
        path, site = queue.popleft()
        if _real(path) in reader.seen:
            continue
        reader.seen.add(_real(path))
        if len(reader.seen) > MAX_LINKS:
            report.fault(site, f"links to more than {MAX_LINKS} programs")
            return
        below, linked = _linked(reader, path)
        report.warnings += below.warnings
        for fault in below.faults:
            report.fault(site, schema.told(below.file, fault))
        queue.extend((link.path, site) for link in (linked.links if linked else ()))


def _site(link: Link) -> Key:
    return ("linked_programs", link.name)


def _linked(reader: _Reader, path: str) -> tuple[Report, Program | None]:
    """A linked program; that it is not there is a fault like any other."""
    try:
        return _one(reader, Place(Path(path).stem, path, path))
    except KernelError as error:
        missing = Report("")
        missing.fault((), error.text)
        return missing, None


def _one(reader: _Reader, place: Place, data: dict[str, Any] | None = None) -> tuple[Report, Program | None]:
    """One file without what it links to. ENOENT when it is not there."""
    if data is not None:
        report = Report(place.shown)
        return report, _program(reader, place, report, data)
    report = Report(place.shown, {})
    text = _toml_text(reader, place, report)
    if text is None:
        return report, None
    try:
        tables = tomllib.loads(text)
        report.lines = lines.find(text)
    except RecursionError:
        report.faults.append(Fault(1, "", "TOML syntax: nested too deeply"))
        return report, None
    except ValueError as error:  # tomllib's own, or a number too long for Python
        report.faults.append(_syntax(text, str(error)))
        return report, None
    program = _program(reader, place, report, tables)
    return report, msgspec.structs.replace(program, description=_description(text))


def _toml_text(reader: _Reader, place: Place, report: Report) -> str | None:
    try:
        data = reader.stamped(place.path)
    except (FileNotFoundError, NotADirectoryError):
        raise _missing(place) from None
    except OSError as error:
        report.faults.append(Fault(1, "", f"cannot be read: {error.strerror}"))
        return None
    if place.path.endswith((".yaml", ".yml")):
        report.faults.append(Fault(1, "", f"YAML is {schema.LATER}; write the same tables as TOML"))
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")  # editors elsewhere put a mark in front
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        report.faults.append(Fault(line, "", "TOML syntax: not UTF-8 text"))
        return None


def _syntax(text: str, error: str) -> Fault:
    """What tomllib complains of, with its line where a line belongs."""
    what, _, where = error.partition(" (at ")
    line, _, column = where.rstrip(")").removeprefix("line ").partition(", column ")
    if line.isdigit():
        return Fault(int(line), "", f"TOML syntax: {what}, column {column}")
    return Fault(text.rstrip("\n").count("\n") + 1, "", f"TOML syntax: {what}")


# --- from tables to a program -----------------------------------------------------------------------


def _program(reader: _Reader, place: Place, report: Report, data: dict[str, Any]) -> Program:
    """All that a file says; what is wrong with it goes to the report."""
    tables, folder = schema.tables(report, data), _folder(place.path)
    schema.model(report, tables.model)
    parameters, headers = schema.parameters(report, tables.parameters, tables.model)
    env, literals = schema.environment(report, tables.env_info)
    ceiling = schema.access(report, ("tools", "child_access"), tables.tools.child_access)
    return Program(
        name=place.name,
        path=place.path if place.own else "",
        provider=tables.model.provider,
        model=tables.model.name,
        base_url=tables.model.base_url,
        api_key_env=tables.model.api_key_env,
        region=tables.model.region,
        project_id=tables.model.project_id,
        parameters=parameters,
        headers=headers,
        system=_system(reader, report, tables.prompt, folder),
        user_prompt=tables.prompt.user,
        tools=schema.tools(report, tables.tools, reader.catalog, _tools_key(data)),
        child_access=Access.WRITE if ceiling is None else ceiling,
        paging=Paging(**msgspec.structs.asdict(tables.file_descriptor)),
        links=_links(report, tables.linked_programs, folder),
        max_iterations=tables.model.max_iterations,
        caching=not tables.model.disable_automatic_caching,
        threads=tables.model.threads and tables.model.provider == "anthropic",
        limits=schema.limits(report, tables.limits),
        preload=_preload(reader, report, tables.preload, folder),
        variables=schema.variables(report, env),
        literals=literals,
        env_vars=tuple(env.env_vars.items()),
    )


def _tools_key(data: dict[str, Any]) -> Key:
    """Under which of its two names a file lists its tools."""
    given: Any = data.get("tools")
    older = isinstance(given, dict) and "enabled" in given and "builtin" not in given
    return ("tools", "enabled" if older else "builtin")


def _system(reader: _Reader, report: Report, prompt: schema.PromptTable, folder: str) -> str:
    """The system prompt; its file wins over a text beside it, but in a map both are a mistake."""
    if not prompt.system_prompt_file:
        return prompt.system
    key = ("prompt", "system_prompt_file")
    if prompt.system and report.lines is None:
        report.fault(key, "is given beside system; one of both, please")
    path = _below(folder, prompt.system_prompt_file)
    try:
        return reader.stamped(path).decode()
    except FileNotFoundError:
        report.fault(key, f"System prompt file not found: {prompt.system_prompt_file} ({path})")
    except OSError as error:
        report.fault(key, f"System prompt file cannot be read: {path}: {error.strerror}")
    except UnicodeDecodeError:
        report.fault(key, f"System prompt file is not UTF-8 text: {path}")
    return ""


def _links(report: Report, value: Any, folder: str) -> tuple[Link, ...]:
    return tuple(
        Link(spec.name, _canonical(_below(folder, spec.path)), spec.description)
        for spec in schema.links(report, value)
    )


def _preload(reader: _Reader, report: Report, spec: schema.PreloadTable, folder: str) -> Texts:
    key = ("preload", "relative_to")
    if not report.choice(key, spec.relative_to, ("program", "cwd")):
        return ()
    found, warnings, stamps = _texts(spec.files, folder if spec.relative_to == "program" else reader.cwd)
    reader.stamps += stamps
    for index, text in warnings:
        report.warn(("preload", "files", index), text)
    return found


def _texts(names: Sequence[str], folder: str) -> tuple[Texts, list[tuple[int, str]], list[Stamp]]:
    """Files as (label, text): what could not be read is a warning and left out."""
    bases = [path.rstrip("/").rpartition("/")[2] for path in names]
    found: list[tuple[str, str]] = []
    warnings: list[tuple[int, str]] = []
    stamps: list[Stamp] = []
    for index, path in enumerate(names):
        full = _below(folder, path)
        try:
            stamp, data = _read(full)
        except OSError as error:
            warnings.append((index, f"{path} is left out: {error.strerror}"))
            stamps.append(Stamp(full, (), 0))
            continue
        stamps.append(stamp)
        label = bases[index] if bases.count(bases[index]) == 1 else path
        found.append((label, file.shown(data)))
    return tuple(found), warnings, stamps


def _folder(path: str) -> str:
    """Where the file itself is: a link to it, as in `~/bin`, does not move what it names."""
    return (_real(path) if os.path.islink(path) else path).rpartition("/")[0]  # noqa: PTH114


def _below(folder: str, path: str) -> str:
    return path if path.startswith("/") else f"{folder}/{path.removeprefix('./')}"


def _canonical(path: str) -> str:
    """A path without links and dots in its folder, so that it stays short however often it is followed."""
    folder, _, base = path.rpartition("/")
    return f"{_real(folder or '/').rstrip('/')}/{base}"


def _real(path: str) -> str:
    return path if "\0" in path else os.path.realpath(path)


def _facts(variables: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """What the variables of `[env_info]` are at this moment, the working directory apart."""
    return tuple((name, FACTS[name]()) for name in variables if name in FACTS)


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a user without an entry, as in many containers
        return str(os.getuid())


FACTS = {
    "platform": lambda: platform.system().lower(),
    "date": lambda: time.strftime("%Y-%m-%d"),
    "python_version": platform.python_version,
    "hostname": platform.node,
    "username": _user,
}
