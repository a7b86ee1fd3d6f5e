"""When a model call that failed is made again. The one policy there is: nothing below it retries.

Whether a failure can pass is said where it is known (`ModelError.again`): 408, 409, 429, 5xx, an overloaded
endpoint, a connection that broke or could not be made, a silence, an answer that ended early. Never 400, 401,
403, 404 and 413. Pure: told what time it is, and given its chance.
"""

import msgspec

from llmprocd.model.protocol import ModelError

FIRST, LONGEST = 1.0, 60.0
"""Seconds between the first two attempts, and between any two, at most."""

FARTHEST = 3600.0
"""Seconds: a server that wants to be asked again later than that has refused."""


class Retries(msgspec.Struct, frozen=True):
    """How often one call may be made again, and for how many seconds after it was made first."""

    most: int
    within: float

    def pause(self, error: ModelError, attempt: int, elapsed: float, chance: float) -> float | None:
        """Seconds until the next attempt: as the server said, else longer each time; None if that is none.

        Args:
            error: what came of the last attempt.
            attempt: its number, from 1.
            elapsed: seconds since the first one began.
            chance: from 0 to 1, anew each time: callers that failed together do not come back together.
        """
        if not error.again or attempt > self.most or elapsed > self.within:
            return None
        named = error.retry_after
        if named is None:
            return min(LONGEST, FIRST * 2 ** (attempt - 1)) * (0.75 + 0.25 * chance)
        if named > FARTHEST:
            return None
        return named if error.shared else named + chance * min(1.0, named / 10)


def heeded(error: ModelError) -> float:
    """For how many seconds nobody calls an endpoint that has refused for good, as it wished."""
    named = error.retry_after or 0.0
    return named if named <= FARTHEST else 0.0


def final(error: ModelError, attempt: int) -> ModelError:
    """A failure as it is told when no attempt follows it."""
    if attempt == 1:
        return error
    text = f"{error.text} (asked {attempt} times)"
    return ModelError(
        error.errno, text, again=error.again, retry_after=error.retry_after, shared=error.shared
    )
