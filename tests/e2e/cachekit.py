"""What the prompt cache does with the requests that an endpoint received, worked out from their bytes."""

from typing import Any

from e2ekit import Strict

from llmprocd.model import script_cache
from llmprocd.model.script_cache import PromptCache, PromptUsage

LEAST = script_cache.MINIMUM_TOKENS


class Seen:
    """One request: what it shares with earlier ones, and what of that came from the cache; in tokens."""

    def __init__(self, body: str, common: int, tokens: int, usage: PromptUsage) -> None:
        self.body = body
        self.common = common
        self.tokens = tokens
        self.usage = usage

    @property
    def read(self) -> int:
        return self.usage.read

    @property
    def written(self) -> int:
        return self.usage.created_5m + self.usage.created_1h

    @property
    def share(self) -> float:
        """The part of what had been sent before that was read; 1 when nothing worth it had been."""
        return self.read / self.common if self.common >= LEAST else 1.0


def seen(strict: Strict, having: str = "") -> list[Seen]:
    """Every request that arrived, in order."""
    cache = PromptCache()
    known: set[bytes] = set()
    found: list[Seen] = []
    for request in strict.requests():
        body: str = request["body"]
        prompt = script_cache.prompt_of(body.encode())
        common = max((block.tokens for block in prompt.blocks if block.digest in known), default=0)
        found.append(Seen(body, common, prompt.tokens, cache.use(prompt, request["at"])))
        known.update(block.digest for block in prompt.blocks)
    return [one for one in found if having in one.body]


def all_read(strict: Strict, at_least: int) -> list[Seen]:
    """All requests; of what each shares with earlier ones at least 95 % must come from the cache.

    `at_least` so many of them must share something: else nothing has been tested.
    """
    requests = seen(strict)
    for number, one in enumerate(requests):
        assert one.share >= 0.95, (
            f"request {number}: {one.read} of {one.common} tokens read: {one.body[-300:]}"
        )
    assert sum(one.common >= LEAST for one in requests) >= at_least
    return requests


def billed(rows: list[Any]) -> dict[str, int]:
    """The usage of some processes, added up."""
    names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return {name: sum(row["usage"][name] for row in rows) for name in names}
