"""How full a model's context window is, and what a process is told of it.

After an answer the endpoint's own numbers count. Before the next request what came since is estimated, by
the bytes a token had in this process's last request; near a threshold the endpoint is asked to count, if it
can. At each threshold the process gets one notice, beside what it is to read next; it can act on that: goto
an earlier message, sum up, hand over. What is sent all the same and does not fit is E2BIG, and the
conversation is as valid as before.
"""

import logging
from collections.abc import Hashable
from contextlib import AbstractAsyncContextManager, nullcontext

import msgspec
import trio

from llmprocd.abi.errno import Errno
from llmprocd.kernel import proc
from llmprocd.kernel.cached import Sent
from llmprocd.kernel.state import At, Image, Node, Proc
from llmprocd.machine import Machine
from llmprocd.model import body, threads
from llmprocd.model.body import Transcript
from llmprocd.model.protocol import ModelError

_log = logging.getLogger(__name__)

THRESHOLDS = (80, 95)
"""Per cent of the window at which a process is told."""

ASKED = frozenset({"anthropic", "local"})
"""Providers whose endpoints are asked for windows and counts; of the others the table must do."""

NEAR = 0.9
"""From this part of a threshold on the endpoint is asked to count."""

BYTES = 4.0
"""Bytes of a token before the endpoint has told of one."""

HAS_NONE = frozenset({Errno.ENOENT, Errno.EINVAL, Errno.EPROTO})
"""What an endpoint that cannot count says: it is not asked again. All else may be another the next time."""

WORTH = 1024
"""Tokens from which on it is better to wait for another's prompt than to write the same."""

COUNT_S = 10.0
"""Seconds that counting, or asking for the windows, may take."""

NOTICE = """\
<context_notice used="{percent}%" tokens="{tokens}" window="{window}">
This conversation fills {percent} % of your context window. Act on it before the window is full: {advice}
</context_notice>"""
GOTO = "use {goto} to return to an earlier message, with a summary of all that has been learned since."
SUM_UP = "come to an end now, or sum up what matters; long outputs need not be read again."


def endpoint(image: Image) -> str:
    """What an endpoint is called here and in the scheduler."""
    return image.base_url or image.provider


def size(m: Machine, image: Image) -> int | None:
    """Tokens that a prompt of a program may have; None when that is not known."""
    return m.config.windows.get(image.model) or m.windows.of(endpoint(image), image.model)


def after(answer: Node | None) -> int:
    """The tokens of a conversation after an answer, as the endpoint counted them; 0 if it did not."""
    return answer.usage.total if answer is not None and answer.usage is not None else 0


def bytes_per_token(p: Proc) -> float:
    """As in the process's last request."""
    last = p.last_call
    return max(1.0, last.sent / last.prompt) if last is not None and last.prompt and last.sent else BYTES


def estimate(p: Proc, image: Image, transcript: Transcript) -> int:
    """Tokens of the next request."""
    counted = after(transcript.answer)
    unknown = transcript.since if counted else len(image.prefix) + len(transcript)
    return counted + round(unknown / bytes_per_token(p))


async def tokens_at(m: Machine, p: Proc, node: Node | None) -> int:
    """Tokens of a conversation that ends at a message, for a process that is to stand there."""
    unseen = 0
    while node is not None and node.usage is None:
        unseen += len(node.body)
        node = await m.node(node.parent) if node.parent is not None else None
    return after(node) + round(unseen / bytes_per_token(p))


# --- before a request -------------------------------------------------------------------------------


async def told(m: Machine, p: Proc, image: Image) -> tuple[Proc, Transcript]:
    """The process and what it is to send, after the notice that may be due."""
    transcript = await m.transcript(p)
    most = size(m, image)
    if most is None or p.at is not At.USER:
        return p, transcript
    tokens = estimate(p, image, transcript)
    if any(p.context_told < step and tokens >= NEAR * step * most / 100 for step in THRESHOLDS):
        tokens = await count(m, image, transcript) or tokens
    percent = round(100 * tokens / most)
    due = max((step for step in THRESHOLDS if percent >= step), default=0)
    now = proc.current(m.kernel, p)
    if due == p.context_told or now is None or now.stopped:
        return p, transcript
    notice = text(image, tokens, most) if due > p.context_told else ""
    p = proc.tell_context(m.begin(), now, due, notice)
    m.commit("context_told")
    return p, await m.transcript(p)


def text(image: Image, tokens: int, most: int) -> str:
    """What a process is told."""
    goto = next((tool.name for tool in image.tools if tool.tool == "goto"), "")
    advice = GOTO.format(goto=goto) if goto else SUM_UP
    return NOTICE.format(percent=round(100 * tokens / most), tokens=tokens, window=most, advice=advice)


async def count(m: Machine, image: Image, transcript: Transcript) -> int | None:
    """The tokens of a request as the endpoint counts them; None if it does not."""
    name = endpoint(image)
    if image.provider not in ASKED or not m.windows.has(name, "count_tokens"):
        return None
    try:
        with trio.move_on_after(COUNT_S):
            return await m.model.count(image, body.counted(transcript.pieces(image)))
    except ModelError as error:
        _log.info("no count_tokens at %s: %s", name, error)
        if error.errno not in HAS_NONE:
            return None
    m.windows.lacks(name, "count_tokens")
    return None


class Share(msgspec.Struct, frozen=True):
    """What a request has in common with others, for the herd."""

    key: Hashable
    marked: tuple[Hashable, ...]  # prompts that are in the cache once it is answered
    cold: bool  # whether much of it is in no cache yet
    lifetime: float


class Outgoing(msgspec.Struct, frozen=True):
    """A request, ready to be sent."""

    pieces: list[bytes]
    sent: Sent
    share: Share
    more: bytes
    threaded: bool = False  # the endpoint is to hold the conversation
    previous: str | None = None  # the answer from which it goes on there
    output: int = 0  # tokens to which the answer is bounded beside the program's own bound; 0: not

    @property
    def size(self) -> int:
        return self.sent.size

    def bare(self) -> "Outgoing":
        """The same without what not every endpoint takes."""
        ending = self.pieces[-1].replace(self.more, b"")
        return msgspec.structs.replace(self, pieces=[*self.pieces[:-1], ending], more=b"")


async def outgoing(m: Machine, p: Proc, image: Image, transcript: Transcript) -> Outgoing:
    """The request of a process whose head is to be answered."""
    assert p.head is not None
    node = await m.node(p.head)
    extra = more(m, p, image)
    common = share(m, p, image, transcript, node)
    threaded = image.threads and m.windows.has(endpoint(image), "thread") and m.threads.wanted(p.pid)
    previous = goes_on(m, p, image, transcript) if threaded else None
    ending = body.thread(previous) + extra if threaded else extra
    if previous is None:
        pieces = transcript.pieces(image, ending)
        length = sum(map(len, pieces))
    else:
        pieces = transcript.continued(image, ending)
        length = len(image.prefix) + len(transcript) + len(image.suffix)
        common = msgspec.structs.replace(common, marked=common.marked[:2])  # no marker before the last text
    noted = sent(m, p, image, transcript, length)
    return Outgoing(pieces, noted, common, extra, threaded, previous)


def goes_on(m: Machine, p: Proc, image: Image, transcript: Transcript) -> str | None:
    """The answer from which an endpoint can go on; None if it is to be sent all.

    A turn so long that looking back would not find what is cached needs a marker that only all can have.
    """
    if not transcript.asks or (image.caching and not transcript.near):
        return None
    return m.threads.previous(p, transcript.answer, m.kernel.now)


def share(m: Machine, p: Proc, image: Image, transcript: Transcript, node: Node) -> Share:
    """What this request has in common with those of siblings: all that was there before the last text."""
    key, program, end = (p.image, node.parent), (p.image, None), (p.image, node.id)
    before = transcript.answer
    asked = (p.image, before.parent) if before is not None else program
    alike = image.caching and (transcript.shared > 0 or before is None)
    known = 0
    if m.herd.is_warm(program):
        known = len(image.prefix)
    if m.herd.is_warm(asked):
        known = len(image.prefix) + transcript.asked
    unknown = len(image.prefix) + transcript.shared - known
    cold = alike and not m.herd.is_warm(key) and unknown > WORTH * bytes_per_token(p)
    marked = (program, end, key) if alike else (program, end)
    return Share(key, marked if image.caching else (), cold, body.lifetime(image))


def together(m: Machine, p: Proc, share_: Share) -> AbstractAsyncContextManager[None]:
    """A request's turn among those that have most of their prompt in common."""
    if not share_.cold:
        return nullcontext()
    return m.herd.turn(share_.key, lambda what: m.waits_for(p.pid, what))


def more(m: Machine, p: Proc, image: Image) -> bytes:
    """What the default endpoint is asked beside: why a prompt was not read from the cache."""
    wanted = image.provider == "anthropic" and not image.base_url and image.caching
    if not wanted or not m.windows.has(endpoint(image), "diagnostics") or b'"diagnostics":' in image.prefix:
        return b""
    last = p.last_call
    alike = last is not None and last.message_id and endpoint(m.kernel.images[last.image]) == endpoint(image)
    return body.diagnostics(last.message_id if last is not None and alike else None)


def sent(m: Machine, p: Proc, image: Image, transcript: Transcript, size: int) -> Sent:
    """What is to be remembered of a request until its answer comes."""
    before = transcript.answer
    changed = ""
    if before is not None and before.model != image.model:
        changed = "model"
    elif p.last_call is not None and p.last_call.image != p.image:
        changed = body.changed(m.kernel.images[p.last_call.image], image)
    lifetime = body.lifetime(image)
    return Sent(p.image, p.head, size, before, changed, caching=image.caching, lifetime=lifetime)


# --- after an answer --------------------------------------------------------------------------------


def refuses_more(m: Machine, image: Image, out: Outgoing, error: ModelError) -> bool:
    """Whether an endpoint has refused what it was asked beside; it is not asked again then."""
    if not (out.more and error.errno is Errno.EINVAL and "diagnostics" in error.text):
        return False
    m.windows.lacks(endpoint(image), "diagnostics")
    return True


def refuses_thread(m: Machine, p: Proc, image: Image, out: Outgoing, error: ModelError) -> bool:
    """Whether an endpoint has refused a request for what it holds, or does not: it is to be made anew."""
    if out.previous is not None and error.code in threads.AGAIN:
        _log.info("process %d: %s: all is sent anew", p.pid, error.code)
        m.threads.forget(p.pid)
        if error.code == "thread_not_found" and m.threads.lost(p.pid):
            _log.warning("process %d: goes on without a message thread: it is lost each time", p.pid)
            m.threads.off(p.pid)
        return True
    if out.threaded and error.code in threads.NEVER:
        _log.warning("process %d: goes on without a message thread: %s", p.pid, error)
        m.threads.off(p.pid)
        return True
    if out.threaded and error.errno is Errno.EINVAL and "thread: Extra inputs" in error.text:
        _log.warning("%s knows no message threads", endpoint(image))
        m.windows.lacks(endpoint(image), "thread")
        return True
    return False


def sentence(image: Image, error: ModelError) -> str:
    """Why a call has failed, and what can be done where there is something."""
    if error.errno is not Errno.E2BIG:
        return str(error)
    return f"E2BIG: the context of {image.model} is full ({error.text}): goto an earlier message to go on"


def learn(m: Machine, image: Image) -> None:
    """Ask an endpoint once, in the background, how large the windows of its models are."""
    if image.provider in ASKED and m.windows.to_be_asked(endpoint(image)):
        m.background(_learn, m, image)


async def _learn(m: Machine, image: Image) -> None:
    name = endpoint(image)
    try:
        with trio.move_on_after(COUNT_S):
            m.windows.learn(name, await m.model.windows(image))
    except ModelError as error:
        _log.info("no list of models at %s: %s", name, error)
