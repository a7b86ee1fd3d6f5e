"""What a program file may say: its tables as strict structs, and what is wrong with one that says otherwise.

Law: nothing unknown is passed over. A table, key, tool, provider or word that is not known is a fault with
the nearest name that is, and all faults of a file are told at once.

LLMProc 0.9 files load unchanged: its other spellings of a key are in `ALIASES`, and what it knows and this
version does not do yet is refused by name. `[parameters]` is the API's business and is passed on as it is,
apart from what the daemon itself writes into a request.
"""

import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, TypeVar, cast
from urllib.parse import urlsplit

import msgspec

from llmprocd.abi.errno import KernelError
from llmprocd.abi.types import Access
from llmprocd.kernel import limits as bounds
from llmprocd.kernel.state import Limit, Link, Offer, Paging
from llmprocd.program.lines import Key

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Amount = int | float | str | None
Full = Annotated[str, msgspec.Meta(min_length=1)]

PROVIDERS = (
    "anthropic", "script", "local", "anthropic_aws", "anthropic_foundry", "anthropic_bedrock",
    "anthropic_bedrock_runtime", "anthropic_vertex",
)  # fmt: skip
LATER_PROVIDERS = ("openai", "azure_openai", "gemini", "gemini_vertex")
EXTRAS: Mapping[str, tuple[str, str]] = {  # the extra that a provider needs, and what it installs
    "local": ("local", "xllamacpp"),
    "anthropic_aws": ("aws", "boto3"),
    "anthropic_bedrock": ("bedrock", "boto3"),
    "anthropic_bedrock_runtime": ("bedrock", "boto3"),
    "anthropic_vertex": ("vertex", "google.auth"),
}
ACCESS = ("read", "write", "admin")
VARIABLES = ("working_directory", "platform", "date", "python_version", "hostname", "username")
SAMPLING = ("temperature", "top_p", "top_k")
MAX_TOKENS = 8192

LATER = "not supported by this version"
ALIASES: Mapping[Key, Mapping[str, str]] = {
    ("prompt",): {"system_prompt": "system", "user_prompt": "user"},
    ("tools",): {"enabled": "builtin"},
}
LATER_KEYS: Mapping[Key, tuple[str, ...]] = {
    (): ("mcp", "sandbox"),
    ("tools",): ("mcp", "functions"),
    ("env_info",): ("commands", "file_map_root", "file_map_max_files", "file_map_show_size"),
}
RESERVED = ("model", "messages", "system", "tools", "stream")

ALIAS = re.compile(r"[a-zA-Z0-9_-]{1,64}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
URL = re.compile(r"https?://[^\s/@?#]+(/[^\s?#]*)?")
HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
FRAMING = (
    "connection",
    "content-length",
    "host",
    "transfer-encoding",
)  # headers that say where a request ends
MAX_DEPTH = 32


# --- the tables -------------------------------------------------------------------------------------


class Table(msgspec.Struct, frozen=True):
    """One table of a file; `required` keys have no true default."""

    required: ClassVar[tuple[str, ...]] = ()


class ModelTable(Table, frozen=True):
    required = ("name", "provider")
    name: Full = ""
    provider: Full = ""
    max_iterations: Positive = 10
    base_url: str = ""
    api_key_env: str = ""
    disable_automatic_caching: bool = False
    threads: bool = False
    region: str = ""
    project_id: str = ""
    display_name: str = ""


class PromptTable(Table, frozen=True):
    system: str = ""
    system_prompt_file: str = ""
    user: str = ""


class ToolsTable(Table, frozen=True):
    builtin: list[Any] = []
    child_access: str = "write"


class ToolTable(Table, frozen=True):
    required = ("name",)
    name: Full = ""
    alias: str = ""
    description: str = ""
    access: str = ""
    param_descriptions: dict[str, str] = {}


class PagingTable(Table, frozen=True):
    enabled: bool = True
    max_direct_output_chars: Positive = 8000
    default_page_size: Positive = 4000
    max_input_chars: Positive = 8000
    page_user_input: bool = True
    enable_references: bool = False


class LinkTable(Table, frozen=True):
    required = ("path",)
    path: Full = ""
    description: str = ""


class LinkSpec(msgspec.Struct, frozen=True):
    """A link as the file has it; its path is still relative."""

    name: str
    path: str
    description: str


class PreloadTable(Table, frozen=True):
    files: list[str] = []
    relative_to: str = "program"


class EnvTable(Table, frozen=True):
    variables: list[str] | str = []
    env_vars: dict[str, str] = {}


class LimitsTable(Table, frozen=True):
    turns: Amount = None
    tokens: Amount = None
    cost_usd: Amount = None
    wall: Amount = None
    procs: Amount = None
    depth: Amount = None
    fds: Amount = None
    fd_bytes: Amount = None


class DemoTable(Table, frozen=True):
    prompts: list[str] = []
    pause_between_prompts: bool = True
    display_name: str = ""


class Tables(msgspec.Struct, frozen=True):
    """A whole file: its tables, and as they came those whose keys are the author's."""

    model: ModelTable = ModelTable()
    prompt: PromptTable = PromptTable()
    tools: ToolsTable = ToolsTable()
    file_descriptor: PagingTable = PagingTable()
    preload: PreloadTable = PreloadTable()
    limits: LimitsTable = LimitsTable()
    demo: DemoTable = DemoTable()
    parameters: Any = {}
    linked_programs: Any = {}
    env_info: Any = {}


# --- what comes out ---------------------------------------------------------------------------------


class Fault(msgspec.Struct, frozen=True):
    """One thing that is wrong with a program file."""

    line: int  # from 1; 0 where there are no lines
    key: str  # dotted; "" when the text is no TOML at all
    text: str


class ToolSpec(msgspec.Struct, frozen=True):
    """One tool as a program wants it offered; "" and None leave what the catalog says."""

    tool: str
    name: str = ""
    description: str = ""
    access: Access | None = None
    param_descriptions: Mapping[str, str] = {}


class Stamp(msgspec.Struct, frozen=True):
    """How a file looked when it was read; `found` is empty for one that could not be."""

    path: str
    found: tuple[int, ...]
    at: int  # when, in nanoseconds of wall time


class Program(msgspec.Struct, frozen=True, kw_only=True):
    """A program file, checked: all that it says, and the texts it names."""

    name: str
    path: str = ""  # absolute; "" for a built-in or a map
    description: str = ""  # its first comment
    provider: str
    model: str
    base_url: str = ""
    api_key_env: str = ""
    region: str = ""
    project_id: str = ""
    parameters: Mapping[str, Any] = {}  # as sent
    headers: tuple[tuple[str, str], ...] = ()
    system: str = ""
    user_prompt: str = ""
    tools: tuple[ToolSpec, ...] = ()
    child_access: Access = Access.WRITE
    paging: Paging = Paging()
    links: tuple[Link, ...] = ()
    max_iterations: int = 10
    caching: bool = True
    threads: bool = False  # the endpoint may hold the conversation
    limits: tuple[tuple[str, Limit], ...] = ()  # by resource
    preload: tuple[tuple[str, str], ...] = ()  # label and text
    variables: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()  # what the variables are, when loaded
    literals: tuple[tuple[str, str], ...] = ()
    env_vars: tuple[tuple[str, str], ...] = ()  # label and name of a variable of the process
    stamps: tuple[Stamp, ...] = ()


# --- telling what is wrong --------------------------------------------------------------------------


class Report:
    """What is wrong with one file, gathered while it is checked."""

    def __init__(self, file: str, lines: Mapping[Key, int] | None = None) -> None:
        self.file = file
        self.lines = lines
        self.faults: list[Fault] = []
        self.warnings: list[str] = []

    def fault(self, key: Key, text: str) -> None:
        self.faults.append(Fault(self.line(key), dotted(key), text))

    def warn(self, key: Key, text: str) -> None:
        self.warnings.append(told(self.file, Fault(self.line(key), dotted(key), text)))

    def unknown(self, key: Key, what: str, word: str, known: Iterable[str]) -> None:
        """A fault that names the word, unless the key ends with it."""
        name = "" if key[-1] == word else f" {word!r}"
        self.fault(key, f"unknown {what}{name}{nearest(word, known)}")

    def choice(self, key: Key, word: str, known: Iterable[str]) -> bool:
        """Is a word one of those known? A fault when not."""
        known = tuple(known)
        if word not in known:
            self.fault(key, f"{word!r} is none of {', '.join(known)}{nearest(word, known)}")
        return word in known

    def line(self, key: Key) -> int:
        """The line of a key, or of the nearest table around it."""
        if self.lines is None:
            return 0
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)


def told(file: str, fault: Fault) -> str:
    """`FILE:LINE: KEY: what is wrong`, always one line."""
    place = f"{file}:{fault.line}" if fault.line else file
    return ": ".join(one_line(part) for part in (place, fault.key, fault.text) if part)


def dotted(key: Key) -> str:
    """A key's path as one would write it."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def nearest(
    word: str, known: Iterable[str], *, cutoff: float = 0.6, prefix: str = "", suffix: str = ""
) -> str:
    """`; did you mean x?`, or nothing when no name is near."""
    if len(word) > 64:  # the comparison is quadratic
        return ""
    close = get_close_matches(word.lower(), known, n=1, cutoff=cutoff)
    return f"; did you mean {prefix}{close[0]}{suffix}?" if close else ""


def one_line(text: str) -> str:
    """A text without what would break a line or a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


NAMES = {
    "int": "an integer",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a table",
    "null": "nothing",
    "datetime": "a date",
    "date": "a date",
    "time": "a time",
    "bytes": "bytes",
}


def human(error: str) -> str:
    """A type error of msgspec in words."""
    error = error.partition(" - at ")[0]
    wanted: list[str] = re.findall(r"`([^`]*)`", error)
    if "of length" in error:
        return "must not be empty"
    if error.endswith(">= 1"):
        return "must be a positive integer"
    if "<=" in error:
        return f"must be at most {error.rpartition(' ')[2]}"
    words = [" or ".join(NAMES.get(name, name) for name in names.split(" | ")) for names in wanted]
    return f"must be {words[0].replace('an integer or a number', 'a number')}, not {words[1]}"


# --- reading the tables -----------------------------------------------------------------------------

T = TypeVar("T", bound=Table)


def table(report: Report, key: Key, value: Any, kind: type[T]) -> T:
    """A table as its struct; what is wrong goes to the report, and has its default here."""
    given = keys(report, key, value)
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    found: dict[str, Any] = {}
    for name, item in given.items():
        if name in LATER_KEYS.get(key, ()):
            report.fault((*key, name), LATER)
            continue
        real = ALIASES.get(key, {}).get(name, name)
        if real not in fields:
            report.unknown(
                (*key, name), "key", name, (*fields, *ALIASES.get(key, ()), *LATER_KEYS.get(key, ()))
            )
        elif real != name and real in given:
            report.fault((*key, name), f"is the older name of {real}, which is given too")
        else:
            _field(report, (*key, name), item, fields[real], found, real)
    for name in kind.required:
        if name not in given:
            report.fault((*key, name), "is missing")
    return kind(**found)


def _field(report: Report, key: Key, value: Any, kind: Any, found: dict[str, Any], name: str) -> None:
    try:
        found[name] = msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        index = re.search(r" - at `\$\[(\d+)\]", str(error))
        report.fault((*key, int(index[1])) if index else key, human(str(error)))


def keys(report: Report, key: Key, value: Any) -> dict[str, Any]:
    """The entries of a table whose names are text; none, and a fault, when it is no table."""
    if not isinstance(value, dict):
        report.fault(key, f"must be a table, not {NAMES.get(_kind(value), _kind(value))}")
        return {}
    given = cast("dict[Any, Any]", value)
    for name in given:
        if not isinstance(name, str):
            report.fault(key, f"key {name!r} must be text")
    return {name: item for name, item in given.items() if isinstance(name, str)}


def _kind(value: Any) -> str:
    name = type(value).__name__
    return {"list": "array", "tuple": "array", "dict": "object", "NoneType": "null"}.get(name, name)


def tables(report: Report, data: dict[str, Any]) -> Tables:
    """The tables of a file; what is wrong with them goes to the report."""
    kinds = {field.name: field.type for field in msgspec.structs.fields(Tables)}
    found: dict[str, Any] = {}
    for name, item in keys(report, (), data).items():
        if name in LATER_KEYS[()]:
            report.fault((name,), LATER)
        elif name not in kinds:
            what = "table" if isinstance(item, dict) else "key"
            report.unknown((name,), what, name, (*kinds, *LATER_KEYS[()]))
        else:
            found[name] = item if kinds[name] is Any else table(report, (name,), item, kinds[name])
    if "model" not in data:
        report.fault(("model",), "is missing")
    return Tables(**found)


# --- what the types cannot say ----------------------------------------------------------------------


def model(report: Report, spec: ModelTable) -> None:
    """Check a model's names."""
    if spec.provider and spec.provider not in (*PROVIDERS, *LATER_PROVIDERS):
        report.unknown(("model", "provider"), "provider", spec.provider, (*PROVIDERS, *LATER_PROVIDERS))
    elif lacks := lacking(spec.provider):
        report.warn(
            ("model", "provider"), f"{spec.provider} {lacks}: the program loads and cannot be spawned"
        )
    if spec.threads and spec.provider and spec.provider != "anthropic":
        report.warn(("model", "threads"), "is for provider anthropic: whole conversations are sent")
    if wrong := _no_address(spec.base_url):
        report.fault(("model", "base_url"), wrong)
    if spec.api_key_env and not VARIABLE.fullmatch(spec.api_key_env):
        report.fault(("model", "api_key_env"), "must be the name of an environment variable")


def _no_address(url: str) -> str:
    """Why a text is not the address of a server; "" when it is one, or empty."""
    if url and not URL.fullmatch(url):
        return "must be an http:// or https:// address without user, query or fragment"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:  # brackets that do not match, or a port that there is not
        return f"is no address: {error}"
    if url and not parts.hostname:
        return "is an address without a host"
    return "is an address with port 0" if port == 0 else ""


def lacking(provider: str) -> str:
    """Why a known provider cannot be used here, now; "" when it can."""
    if provider in LATER_PROVIDERS:
        return f"is {LATER}"
    extra, module = EXTRAS.get(provider, ("", ""))
    if not extra or _is_installed(module):
        return ""
    return f"needs the extra '{extra}', which is not installed (pip install 'llmprocd[{extra}]')"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # nor is the package it would be in
        return False


Headers = tuple[tuple[str, str], ...]


def parameters(report: Report, value: Any, spec: ModelTable) -> tuple[dict[str, Any], Headers]:
    """What goes to the API beside the messages, and the extra headers."""
    given = keys(report, ("parameters",), value)
    extra = _headers(report, given.pop("extra_headers", {}))
    for name, item in given.items():
        key = ("parameters", name)
        if name in RESERVED:
            report.fault(key, "is written by the daemon and cannot be set")
        elif wrong := _unsendable(item):
            report.fault(key, wrong)
    _known_parameters(report, given)
    if spec.provider == "anthropic" and not spec.base_url:
        for name in SAMPLING:
            if given.pop(name, None) is not None:
                report.warn(("parameters", name), "is refused by the default endpoint and left out")
    if "max_completion_tokens" not in given:
        given.setdefault("max_tokens", MAX_TOKENS)
    return given, extra


def _unsendable(value: Any, depth: int = 0) -> str:
    """Why a value has no JSON form; "" when it has one."""
    if depth > MAX_DEPTH:
        return f"is nested deeper than {MAX_DEPTH}"
    if isinstance(value, dict):
        items = cast("dict[Any, Any]", value)
        if not all(isinstance(name, str) for name in items):
            return "has a key that is not text"
        return next(filter(None, (_unsendable(item, depth + 1) for item in items.values())), "")
    if isinstance(value, list):
        return next(filter(None, (_unsendable(item, depth + 1) for item in cast("list[Any]", value))), "")
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) > 2**63:
        return "is too large a number"
    if value is None or isinstance(value, str | int | float):
        return ""
    return f"cannot hold {NAMES.get(_kind(value), _kind(value))}; write it as text"


def _known_parameters(report: Report, given: Mapping[str, Any]) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        if name in given:
            _field(report, ("parameters", name), given[name], Positive, {}, name)
    if "max_tokens" in given and "max_completion_tokens" in given:
        report.fault(("parameters", "max_completion_tokens"), "is the same as max_tokens, which is given too")
    if "reasoning_effort" in given:
        report.choice(
            ("parameters", "reasoning_effort"), str(given["reasoning_effort"]), ("low", "medium", "high")
        )
    thinking = keys(report, ("parameters", "thinking"), given.get("thinking", {}))
    budget: Any = thinking.get("budget_tokens", 1024)
    if type(budget) is not int or budget < 0:
        report.fault(("parameters", "thinking", "budget_tokens"), "must be a positive integer")
    elif 0 < budget < 1024:
        report.warn(("parameters", "thinking", "budget_tokens"), "is below 1024, the least the API takes")


def _headers(report: Report, value: Any) -> Headers:
    key = ("parameters", "extra_headers")
    found: list[tuple[str, str]] = []
    for name, item in keys(report, key, value).items():
        if not HEADER.fullmatch(name):
            report.fault((*key, name), "is no name of a header")
        elif name.lower() in FRAMING:
            report.fault((*key, name), "is written by the daemon and cannot be set")
        elif not (isinstance(item, str) and item.isascii() and item.isprintable()):
            report.fault((*key, name), "must be printable ASCII text on one line")
        else:
            found.append((name, item))
    return tuple(found)


def limits(report: Report, spec: LimitsTable) -> tuple[tuple[str, Limit], ...]:
    """The limits by resource: an amount is the hard one, `"soft:hard"` both."""
    found: dict[str, Limit] = {}
    for resource, value in msgspec.structs.asdict(spec).items():
        if value is None:
            continue
        try:
            found[resource] = bounds.parse(resource, value)
        except KernelError as error:
            report.fault(("limits", resource), error.text.removeprefix(f"limits.{resource}: "))
    return tuple(found.items())


def tools(report: Report, spec: ToolsTable, catalog: Mapping[str, Offer], key: Key) -> tuple[ToolSpec, ...]:
    """The tools that a program lists under a key; each once, and no two under one name."""
    taken: dict[str, str] = {}
    listed: set[str] = set()
    found: list[ToolSpec] = []
    for index, entry in enumerate(spec.builtin):
        tool = _tool(report, (*key, index), entry, catalog)
        name = tool.name or tool.tool
        if tool.tool not in catalog:
            continue
        if tool.tool in listed:
            report.fault((*key, index), f"{tool.tool} is listed twice")
        elif name in taken and name not in catalog:  # a tool's own name was refused as an alias above
            report.fault((*key, index, "alias"), f"{name!r} is the name of {taken[name]} already")
        listed.add(tool.tool)
        taken[name] = tool.tool
        found.append(tool)
    return tuple(found)


def _tool(report: Report, key: Key, entry: Any, catalog: Mapping[str, Offer]) -> ToolSpec:
    if not isinstance(entry, str | dict):
        report.fault(key, f"must be text or a table, not {NAMES.get(_kind(entry), _kind(entry))}")
        return ToolSpec("")
    spec = ToolTable(entry) if isinstance(entry, str) else table(report, key, entry, ToolTable)
    where = key if isinstance(entry, str) else (*key, "name")
    if spec.name not in catalog:
        if spec.name or isinstance(entry, str):
            report.unknown(where, "tool", spec.name, catalog)
        return ToolSpec("")
    if spec.alias and not ALIAS.fullmatch(spec.alias):
        report.fault((*key, "alias"), "must be 1 to 64 of the characters a-z A-Z 0-9 _ -")
    elif spec.alias in catalog and spec.alias != spec.name:
        report.fault((*key, "alias"), f"{spec.alias!r} is the name of another tool")
    known = _parameters_of(catalog[spec.name])
    for name in spec.param_descriptions:
        if name not in known:
            report.unknown((*key, "param_descriptions", name), "parameter", name, known)
    level = access(report, (*key, "access"), spec.access) if spec.access else None
    return ToolSpec(spec.name, spec.alias, spec.description, level, spec.param_descriptions)


def access(report: Report, key: Key, word: str) -> Access | None:
    """The level that a word names."""
    return Access[word.upper()] if report.choice(key, word, ACCESS) else None


def _parameters_of(offer: Offer) -> tuple[str, ...]:
    shape: dict[str, Any] = msgspec.json.decode(offer.input_schema)
    return tuple(shape.get("properties", {}))


def links(report: Report, value: Any) -> tuple[LinkSpec, ...]:
    """The programs that are linked, as they are listed; a path may stand for the table."""
    found: list[LinkSpec] = []
    for name, item in keys(report, ("linked_programs",), value).items():
        key = ("linked_programs", name)
        if not isinstance(item, str | dict):
            report.fault(key, f"must be text or a table, not {NAMES.get(_kind(item), _kind(item))}")
            continue
        link = table(report, key, {"path": item} if isinstance(item, str) else item, LinkTable)
        if "\0" in link.path:
            report.fault(key, "is no path")
        elif link.path:
            found.append(LinkSpec(name, link.path, link.description))
    return tuple(found)


def environment(report: Report, value: Any) -> tuple[EnvTable, tuple[tuple[str, str], ...]]:
    """`[env_info]`: what it asks for, and its literal lines."""
    key = ("env_info",)
    known = tuple(field.name for field in msgspec.structs.fields(EnvTable))
    later = LATER_KEYS[key]
    given = keys(report, key, value)
    spec = table(
        report, key, {name: item for name, item in given.items() if name in (*known, *later)}, EnvTable
    )
    literals: list[tuple[str, str]] = []
    for name, item in given.items():
        if name in (*known, *later):
            continue
        if near := nearest(name, (*known, *later), cutoff=0.8):
            report.fault((*key, name), f"unknown key{near}")
        elif not isinstance(item, str):
            report.fault((*key, name), f"must be text, not {NAMES.get(_kind(item), _kind(item))}")
        else:
            literals.append((name, item))
    return spec, tuple(literals)


def variables(report: Report, spec: EnvTable) -> tuple[str, ...]:
    """The names of `env_info.variables`, without repeats; "all" is every one."""
    if spec.variables == "all":
        return VARIABLES
    found: dict[str, None] = {}
    for name in [spec.variables] if isinstance(spec.variables, str) else spec.variables:
        if name == "file_map":
            report.fault(("env_info", "variables"), f"file_map is {LATER}")
        elif report.choice(("env_info", "variables"), name, (*VARIABLES, "all")):
            found[name] = None
    return VARIABLES if "all" in found else tuple(found)
