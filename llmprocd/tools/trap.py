"""System calls offered to models as tools: names, arguments and descriptions.

The argument names are those that models know from LLMProc. What each does is in `usertrap.py`, which has
the machine; here is only what a model is told.
"""

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from llmprocd.abi.types import Access
from llmprocd.kernel.state import Offer
from llmprocd.tools.output import ToolError


class Trap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arguments of one system call; the docstring is what the model reads."""


def _says(text: str, **more: Any) -> msgspec.Meta:
    return msgspec.Meta(description=text, **more)


class ForkTool(Trap, frozen=True):
    """Copy yourself: each prompt makes a child that shares this whole conversation and works on its task at
    the same time as the others. By default you wait and read their last messages in prompt order. Fork to
    investigate several things at once from what you know already.
    """

    prompts: Annotated[list[str], _says("one task a child", min_length=1, max_length=10)]
    wait: Annotated[bool, _says("wait for the children; false returns their pids at once")] = True


class SpawnTool(Trap, frozen=True):
    """Start a fresh process that knows nothing of this conversation, give it a prompt, and read its last
    message. A blank program name is your own program.
    """

    prompt: Annotated[str, _says("the whole task, with all it needs to know")]
    program_name: Annotated[str, _says("one of the available programs")] = ""
    additional_preload_files: Annotated[list[str], _says("files whose text is put before the prompt")] = []
    fds: Annotated[list[str], _says("descriptors to hand on, like fd:3")] = []
    wait: Annotated[bool, _says("wait for its end; false returns its pid at once")] = True
    notify: Annotated[bool, _says("with wait=false: its end puts a line into your input")] = False


class WaitTool(Trap, frozen=True):
    """Wait until child processes have ended, and read the status and last message of each."""

    pids: Annotated[list[int], _says("which; none means all your children")] = []
    timeout_s: Annotated[float, _says("give up after so many seconds", ge=0)] | None = None


class KillTool(Trap, frozen=True):
    """Send a signal to one of your descendants."""

    pid: int
    signal: Annotated[str | int, _says("name or number, such as TERM, INT, KILL, STOP, CONT")] = "TERM"


class SendTool(Trap, frozen=True):
    """Send a message to one of your descendants: its next user message."""

    pid: int
    message: str


class GotoTool(Trap, frozen=True):
    """Travel back (or forth) to an earlier message of this conversation, named by the id in front of it, such
    as m12. What came after is forgotten, so put what you learned into the message you take along.
    """

    position: Annotated[str, _says("a message id such as m12")]
    message: Annotated[str, _says("what you tell yourself there: what you learned, what to do instead")]


class ExitTool(Trap, frozen=True):
    """End this process."""

    status: Annotated[int, _says("0 for success", ge=0, le=123)] = 0
    message: Annotated[str, _says("your last words; handed to whoever waits")] = ""


class ReadFd(Trap, frozen=True):
    """Read a descriptor (fd:3, a descendant's 9/fd:4, or ref:name) by page, line or character, or only the
    lines that match a pattern.
    """

    fd: Annotated[str, _says("such as fd:3")]
    mode: Literal["page", "line", "char"] = "page"
    start: Annotated[int, _says("page and line count from 1, char from 0", ge=0)] = 1
    count: Annotated[int, _says("how many pages, lines or characters", ge=1)] = 1
    read_all: Annotated[bool, _says("from the beginning, as much as one answer may hold")] = False
    extract_to_new_fd: Annotated[bool, _says("put what was selected into a new descriptor")] = False
    grep: Annotated[str, _says("only lines that match this extended regular expression")] = ""


class FdToFile(Trap, frozen=True):
    """Write the whole contents of a descriptor to a file."""

    fd: Annotated[str, _says("such as fd:3 or ref:name")]
    file_path: str
    mode: Literal["write", "append"] = "write"
    create: Annotated[bool, _says("false: the file must exist already")] = True
    exist_ok: Annotated[bool, _says("false: the file must not exist yet")] = True


class WriteStderr(Trap, frozen=True):
    """Write a line to this process's log (stderr), which people read and you do not."""

    message: Annotated[str, _says("what to log")]


TRAPS: dict[str, tuple[type[Trap], Access]] = {
    "fork": (ForkTool, Access.ADMIN),
    "spawn": (SpawnTool, Access.ADMIN),
    "wait": (WaitTool, Access.READ),
    "kill": (KillTool, Access.ADMIN),
    "send": (SendTool, Access.WRITE),
    "goto": (GotoTool, Access.READ),
    "exit": (ExitTool, Access.READ),
    "read_fd": (ReadFd, Access.READ),
    "fd_to_file": (FdToFile, Access.WRITE),
    "write_stderr": (WriteStderr, Access.READ),
}

T = TypeVar("T", bound=Trap)


def parse(kind: type[T], data: bytes) -> T:
    """The arguments a model gave; a ToolError names the one that is wrong."""
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise ToolError(f"Invalid arguments: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ToolError(f"Invalid arguments: not JSON: {error}") from None


def offer(name: str) -> Offer:
    """How one of them is offered."""
    kind, access = TRAPS[name]
    schema = _inlined(kind)
    words = " ".join((kind.__doc__ or "").split())
    return Offer(name, words, msgspec.json.encode(schema), access)


def _inlined(kind: type[Trap]) -> dict[str, Any]:
    (reference,), components = msgspec.json.schema_components([kind])
    schema = dict(components[reference["$ref"].rpartition("/")[2]])
    for key in ("title", "description"):
        schema.pop(key, None)
    return {"required": [], **schema}
