"""What the daemon asks of a model, and what it gets back.

Law: what a model sent goes back to it byte for byte. `Reply.body` holds its content blocks as JSON, each
either the very bytes that came or rebuilt once from its deltas, and is never encoded again.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.kernel.state import Image, Reply

__all__ = ["MOST_TOKENS", "Allowance", "Listener", "Model", "ModelError", "Quota", "Reply", "unheard"]

MOST_TOKENS = 10**9
"""Of one call, and of a window: whoever tells of more has not counted, and sums must fit into 64 bits."""


class ModelError(KernelError):
    """A model call that failed.

    `again` says whether the same request may succeed later, `retry_after` (seconds) when the server named
    a time, and `shared` whether the whole endpoint should hold back rather than this call alone. `code` is
    the endpoint's own word for the reason, where it has one.
    """

    def __init__(
        self,
        errno: Errno,
        text: str,
        *,
        again: bool = False,
        retry_after: float | None = None,
        shared: bool = False,
        code: str = "",
    ) -> None:
        super().__init__(errno, text)
        self.again = again
        self.retry_after = retry_after
        self.shared = shared
        self.code = code


class Allowance(msgspec.Struct, frozen=True):
    """What an endpoint says of one of its limits: so many a minute, so many left, all back in `reset_s`."""

    limit: int | None = None
    left: int | None = None
    reset_s: float | None = None


class Quota(msgspec.Struct, frozen=True):
    """What an endpoint says of its limits, with any answer."""

    requests: Allowance = Allowance()
    input_tokens: Allowance = Allowance()
    output_tokens: Allowance = Allowance()


def unheard(_quota: Quota) -> None:
    """For a caller that asks no one else's leave."""


class Listener(Protocol):
    """Where an answer is gathered while it comes; the caller keeps it when the call is cancelled."""

    @property
    def stopped(self) -> bool:
        """Is it whole? Nothing that comes afterwards, or fails to, counts."""
        ...

    def feed(self, chunk: bytes) -> None: ...


class Model(Protocol):
    """An endpoint that answers requests."""

    async def infer(
        self,
        image: Image,
        body: Sequence[bytes],
        listener: Listener,
        heard: Callable[[Quota], None] = unheard,
    ) -> None:
        """Send one request and feed the listener what comes back, until the stream ends.

        Args:
            image: names the endpoint, the credential and the extra headers.
            body: the request's bytes in pieces, to be sent one after another.
            listener: gets the stream's bytes.
            heard: gets what the headers of the answer, a refusal too, tell of the endpoint's limits.

        Raises:
            ModelError: for every way in which a call can fail.
        """
        ...

    async def windows(self, image: Image) -> dict[str, int]:
        """How many tokens a prompt may have, by the names of the models that the endpoint has.

        Raises:
            ModelError: the endpoint does not say.
        """
        ...

    async def count(self, image: Image, body: bytes) -> int:
        """The tokens of a request, as the endpoint counts them.

        Raises:
            ModelError: the endpoint does not count.
        """
        ...
