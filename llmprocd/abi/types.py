"""The small words everything else is made of."""

from enum import Enum, IntEnum
from typing import NewType

import msgspec

from llmprocd.abi.errno import Errno, KernelError

Pid = NewType("Pid", int)
Fd = NewType("Fd", int)
MessageId = NewType("MessageId", int)
FileId = NewType("FileId", int)
ImageId = NewType("ImageId", int)
ToolUseId = NewType("ToolUseId", str)

INIT = Pid(1)
"""The daemon itself: it adopts, and is never signalled."""

STDIN, STDOUT, STDERR = Fd(0), Fd(1), Fd(2)
FIRST_FD = Fd(3)


class Access(IntEnum):
    """What a process may do; a ceiling that only goes down a tree."""

    READ = 0
    WRITE = 1
    ADMIN = 2

    @property
    def word(self) -> str:
        return self.name.lower()


class Signal(IntEnum):
    """Signals a process knows, with Linux's numbers (signal(7))."""

    HUP = 1
    INT = 2
    KILL = 9
    TERM = 15
    CHLD = 17
    CONT = 18
    STOP = 19
    XCPU = 24


class ProcState(Enum):
    """What is stored of a process's state; the other letters of STAT are computed."""

    LIVE = "live"
    STOPPED = "stopped"
    ZOMBIE = "zombie"


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one model call, or of many added up."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0

    @property
    def prompt(self) -> int:
        """Tokens that were read, from the cache or not."""
        return self.input_tokens + self.cache_read_input_tokens + self.cache_creation_input_tokens

    @property
    def total(self) -> int:
        """All of them."""
        return self.prompt + self.output_tokens

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_read_input_tokens + other.cache_read_input_tokens,
            self.cache_creation_input_tokens + other.cache_creation_input_tokens,
        )


def access(word: str, field: str = "access") -> Access:
    """The access level that a word names; EINVAL for any other word."""
    try:
        return Access[word.upper()]
    except KeyError:
        raise KernelError(Errno.EINVAL, f"{field}: {word!r} is none of read, write, admin") from None


def signal(name: str | int) -> Signal | None:
    """The signal of a name or number, `SIG` optional; None is signal 0, the test for existence.

    EINVAL for a signal that no process knows.
    """
    text = str(name).upper().removeprefix("SIG")
    if text in {"0", "EXIT"}:
        return None
    for sig in Signal:
        if text in {sig.name, str(sig.value)}:
            return sig
    raise KernelError(Errno.EINVAL, f"unknown signal: {name}")


def message_id(text: str, field: str = "to") -> MessageId:
    """The id that `m42` spells; EINVAL for anything else."""
    digits = text.removeprefix("m")
    if not (text.startswith("m") and digits.isascii() and digits.isdigit() and len(digits) <= 18):
        raise KernelError(Errno.EINVAL, f"{field}: {text!r} is no message id (they look like m42)")
    return MessageId(int(digits))
