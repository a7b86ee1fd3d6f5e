"""The prompt cache as the API has it, worked out from the received bytes.

Law: a prefix is known by the hash of the exact bytes of its blocks, in the order tools, system, messages,
with every cache_control taken out: a marker that moves never costs a hit, any other byte does.
A token is four bytes of a block, rounded up. Nothing under 512 tokens is kept. A breakpoint looks back over
20 blocks, itself included. An entry lives for 5 minutes or an hour after its last use; the clock is an
argument.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator

import msgspec

MINIMUM_TOKENS = 512
LOOK_BACK = 20
SHORT, LONG = 300.0, 3600.0
MAX_ENTRIES = 100_000

MARK = re.compile(rb'"cache_control"\s*:\s*(?:null|\{[^{}]*"ephemeral"[^{}]*\})')
MARK_AND_COMMA = re.compile(rb",\s*" + MARK.pattern + rb"|" + MARK.pattern + rb"\s*,?\s*")


class RawMessage(msgspec.Struct, frozen=True):
    role: str
    content: msgspec.Raw


class RawRequest(msgspec.Struct, frozen=True):
    """A request as far as the cache is concerned, every block still in its own bytes."""

    model: str
    messages: list[RawMessage]
    tools: list[msgspec.Raw] = []
    system: msgspec.Raw = msgspec.Raw()
    tool_choice: msgspec.Raw = msgspec.Raw()
    thinking: msgspec.Raw = msgspec.Raw()
    cache_control: msgspec.Raw = msgspec.Raw()


class BlockKind(msgspec.Struct, frozen=True):
    type: str = ""


class PromptBlock(msgspec.Struct, frozen=True):
    """The prefix that ends with this block: hash, tokens, and seconds it is to be kept (0: not marked)."""

    digest: bytes
    tokens: int
    ttl: float = 0.0


class Prompt(msgspec.Struct, frozen=True):
    """A request as the cache sees it."""

    blocks: tuple[PromptBlock, ...]

    @property
    def tokens(self) -> int:
        return self.blocks[-1].tokens

    @property
    def digest(self) -> bytes:
        return self.blocks[-1].digest


class Sections(msgspec.Struct, frozen=True):
    """What a later request is compared with, to say why its prompt was not read from the cache."""

    model: str
    tools: bytes
    system: bytes
    prompt: Prompt


class PromptUsage(msgspec.Struct, frozen=True):
    """Where the tokens of one prompt came from."""

    input_tokens: int
    read: int = 0
    created_5m: int = 0
    created_1h: int = 0


class PromptCache:
    """Prefixes that were marked, with the time at which each is forgotten."""

    def __init__(self) -> None:
        self._entries: OrderedDict[bytes, tuple[float, float]] = OrderedDict()

    def use(self, prompt: Prompt, now: float) -> PromptUsage:
        """Look the prompt up, keep what it marks, and say where its tokens came from. `now` in seconds."""
        marks = [i for i, block in enumerate(prompt.blocks) if block.ttl]
        hit = max((self._look_back(prompt, mark, now) for mark in marks), default=-1)
        kept = [i for i in marks if prompt.blocks[i].tokens >= MINIMUM_TOKENS]
        if hit >= 0:
            self._keep(prompt.blocks[hit].digest, 0.0, now)
        for i in kept:
            self._keep(prompt.blocks[i].digest, prompt.blocks[i].ttl, now)
        return share(prompt, hit, kept)

    def forget(self) -> None:
        self._entries.clear()

    def _look_back(self, prompt: Prompt, mark: int, now: float) -> int:
        for i in range(mark, max(mark - LOOK_BACK, -1), -1):
            expires, _ = self._entries.get(prompt.blocks[i].digest, (now, 0.0))
            if expires > now:
                return i
        return -1

    def _keep(self, digest: bytes, ttl: float, now: float) -> None:
        expires, had = self._entries.pop(digest, (now, 0.0))
        ttl = max(ttl, had if expires > now else 0.0)
        self._entries[digest] = (now + ttl, ttl)
        if len(self._entries) > MAX_ENTRIES:
            self._entries.popitem(last=False)


def share(prompt: Prompt, hit: int, kept: list[int]) -> PromptUsage:
    """Divide a prompt's tokens: read up to `hit`, created up to the last of `kept`, the rest plain input."""
    read = prompt.blocks[hit].tokens if hit >= 0 else 0
    end = max((prompt.blocks[i].tokens for i in kept), default=0)
    long = max((prompt.blocks[i].tokens for i in kept if prompt.blocks[i].ttl == LONG), default=0)
    end, long = max(end, read), max(long, read)
    return PromptUsage(prompt.tokens - end, read, end - long, long - read)


def prompt_of(body: bytes) -> Prompt:
    """The prompt a valid request body holds."""
    request = msgspec.json.decode(body, type=RawRequest)
    hasher = hashlib.blake2b(request.model.encode(), digest_size=20)
    blocks: list[PromptBlock] = []
    tokens, last = 0, -1
    for raw in pieces(request):
        marks = MARK.findall(raw) if b'"cache_control"' in raw else []
        data = MARK_AND_COMMA.sub(b"", raw) if marks else raw
        hasher.update(len(data).to_bytes(8, "big") + data)
        if data.startswith(b"\0"):  # what parts the sections: it counts for the hash, not as a block
            continue
        tokens += count(data)
        blocks.append(PromptBlock(hasher.digest(), tokens, lifetime(marks)))
        if b'thinking"' not in data[:200] or "thinking" not in msgspec.json.decode(data, type=BlockKind).type:
            last = len(blocks) - 1
    automatic = lifetime([bytes(request.cache_control)])
    if automatic and last >= 0:
        blocks[last] = msgspec.structs.replace(blocks[last], ttl=max(automatic, blocks[last].ttl))
    return Prompt(tuple(blocks))


def sections_of(body: bytes, prompt: Prompt) -> Sections:
    """A valid request in the parts that can change."""
    request = msgspec.json.decode(body, type=RawRequest)
    tools = b",".join(MARK_AND_COMMA.sub(b"", bytes(tool)) for tool in request.tools)
    return Sections(request.model, tools, MARK_AND_COMMA.sub(b"", bytes(request.system)), prompt)


def divergence(before: Sections, now: Sections) -> str | None:
    """Why a prompt does not go on from an earlier one, in the API's word; None if it does."""
    for name in ("model", "tools", "system"):
        if getattr(before, name) != getattr(now, name):
            return f"{name}_changed"
    if all(block.digest != before.prompt.digest for block in now.prompt.blocks):
        return "messages_changed"
    return None


def pieces(request: RawRequest) -> Iterator[bytes]:
    """Each block's bytes in prefix order, and between the sections marks that begin with a zero byte."""
    yield from (bytes(tool) for tool in request.tools)
    yield b"\0system"
    yield from content_blocks(bytes(request.system))
    yield b"\0settings" + bytes(request.tool_choice) + bytes(request.thinking)
    for message in request.messages:
        yield b"\0" + message.role.encode()
        yield from content_blocks(bytes(message.content))


def content_blocks(raw: bytes) -> Iterator[bytes]:
    """The bytes of each block of a content field; a string counts as one text block."""
    if raw.startswith(b'"'):
        yield b'{"type":"text","text":' + raw + b"}"
    elif raw:
        yield from (bytes(item) for item in msgspec.json.decode(raw, type=list[msgspec.Raw]))


def count(data: bytes) -> int:
    """Tokens of some bytes: one for every four, rounded up."""
    return (len(data) + 3) // 4


def lifetime(marks: list[bytes]) -> float:
    """Seconds for which the longest of these cache_control values keeps a prefix; 0 without one."""
    return max((LONG if b'"1h"' in mark else SHORT for mark in marks if b'"ephemeral"' in mark), default=0.0)
