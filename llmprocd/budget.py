"""What a model call may use: reserved before it, settled when it has ended.

Law: no request is sent whose whole use would not fit into every hard limit above it, beside all that other
calls under way may yet use. What does not fit now and may later waits (D, WCHAN `limit`); what fits only in
part is asked for a shorter answer; what fits in no way is the end of its process (152).
Law: what a call has used counts, also when nothing of its answer lands.

The size of a prompt is known after its answer only. Before that it is taken to be what the endpoint counted
last and half a token for each byte since: less than that hardly any text has.
"""

from collections.abc import Generator
from contextlib import contextmanager

import msgspec

from llmprocd import window
from llmprocd.abi.errno import Errno
from llmprocd.abi.types import Pid, Usage
from llmprocd.kernel import limits, proc
from llmprocd.kernel.limits import Busy, Granted, Need, Over
from llmprocd.kernel.state import Image, Proc, Reply
from llmprocd.machine import Machine
from llmprocd.model import body, pricing
from llmprocd.model.body import Transcript
from llmprocd.model.protocol import ModelError
from llmprocd.model.sse import Turn
from llmprocd.window import Outgoing

BYTES = 2
"""Bytes that a token which nobody has counted is taken to have."""

LEAST_PART = 6
"""A request of so many bytes has at least one token, whatever was counted before: its program may be new."""


class Allowed(msgspec.Struct, frozen=True):
    """A request that may be sent; `over` is the limit that has made its answer shorter."""

    out: Outgoing
    over: Over | None = None


@contextmanager
def reserved(m: Machine, pid: Pid) -> Generator[None]:
    """Give back at the end of the block what was reserved in it, and let those look who wait for that."""
    chain = [p.pid for p in limits.lineage(m.kernel, pid)]
    try:
        yield
    finally:
        limits.release(m.kernel, pid)
        for above in chain:
            m.waits.wakeup(("limit", above))


async def allowed(m: Machine, p: Proc, image: Image, transcript: Transcript, out: Outgoing) -> Allowed | None:
    """Reserve what a request may use, as soon as there is room for it.

    Returns:
        None when it may not be made: the process has ended by that, or was interrupted meanwhile.
    """
    need, counted = needed(m, image, transcript, out), False
    while True:
        k = m.begin()
        if proc.current(k, p) is None:
            return None
        answer = limits.reserve(k, p.pid, need)
        if isinstance(answer, Granted):
            return Allowed(shortened(image, out, answer.output), answer.over)
        if isinstance(answer, Busy):
            m.waits_for(p.pid, "limit")
            await m.waits.sleep(("limit", answer.pid))
        elif not counted and (tokens := await window.count(m, image, transcript)) is not None:
            need, counted = priced(m, image, tokens), True
        else:
            end(m, p, image, answer)
            return None


def needed(m: Machine, image: Image, transcript: Transcript, out: Outgoing) -> Need:
    """What a request may use at most."""
    known = window.after(transcript.answer)
    unknown = transcript.since if known else out.size
    return priced(m, image, max(known - (-unknown // BYTES), out.size // LEAST_PART))


def priced(m: Machine, image: Image, prompt: int) -> Need:
    """What a request with a prompt of so many tokens may use at most."""
    rate = m.prices.of(image)
    need = Need(prompt, image.max_tokens, min(image.least_tokens, image.max_tokens))
    if rate is None:
        return need
    input_cost, output_price = pricing.most(rate, image, prompt)
    return msgspec.structs.replace(need, input_cost=input_cost, output_price=output_price)


def shortened(image: Image, out: Outgoing, output: int) -> Outgoing:
    """The same request for an answer of so many tokens at most."""
    if output >= image.max_tokens:
        return out
    first = body.with_max_tokens(out.pieces[0], image.max_tokens, output)
    return msgspec.structs.replace(out, pieces=[first, *out.pieces[1:]], output=output)


def end(m: Machine, p: Proc, image: Image, over: Over) -> None:
    """No call can be made under a limit any more."""
    k = m.begin()
    now = proc.current(k, p)
    if now is None or now.stopped:
        return
    if over.unpriced:
        proc.fail(k, now, f"EINVAL: the price of {image.model} is not known, and a cost_usd limit binds it")
    else:
        proc.exceed(k, p.pid, over)
    m.commit("limit")


def lost(m: Machine, p: Proc, used: Reply) -> None:
    """A call was cut off, or overtaken: what it has used counts.

    It does already if what there was of its answer has landed. Nothing is written when the daemon stops: the
    process will ask again.
    """
    now = m.kernel.procs.get(p.pid)
    if now is not None and now.epoch != p.epoch and now.turns == p.turns:
        charge(m, p, used)


def failed(m: Machine, p: Proc, turn: Turn, error: ModelError) -> ModelError:
    """A call has failed, perhaps midway: what it has used counts, and may leave no room to ask again."""
    charge(m, p, spent(turn))
    over = limits.overdrawn(m.kernel, p.pid)
    if over is None or not error.again:
        return error
    return ModelError(Errno.EDQUOT, f"{error}; the {over.resource} limit leaves no room to ask again")


def spent(turn: Turn) -> Reply:
    """What a call has used as far as it came, and nothing of its answer."""
    return Reply(usage=turn.usage, written_1h=turn.written_1h, searches=turn.searches)


def charge(m: Machine, p: Proc, used: Reply) -> None:
    """Count what a call has used of which nothing lands."""
    if used.usage == Usage() or p.pid not in m.kernel.procs:
        return
    proc.charge(m.begin(), p.pid, used.usage, m.priced(p.pid, used).cost)
    m.commit("charge")
