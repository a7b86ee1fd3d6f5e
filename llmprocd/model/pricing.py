"""What a token costs.

Law: money is integers: billionths of a dollar, prices for a million tokens. A call is rounded up once.
Law: what is not known costs None, never 0: a model that is not in the table, an endpoint that is not the
API's own, a request whose tariff is another.

The table holds the list prices of the API itself, in US dollars for a million tokens, as its price list
showed them on the day in `AS_OF`. A config's `[prices."MODEL"]` replaces an entry or adds one, for whatever
endpoint serves a model of that name.
"""

import re
from collections.abc import Mapping

import msgspec

from llmprocd.abi.types import Usage
from llmprocd.kernel.state import NANO, Image, Reply

AS_OF = "2026-10-24"

MILLION = 1_000_000


class Price(msgspec.Struct, frozen=True):
    """Of one model, in billionths of a dollar for a million tokens."""

    input: int
    output: int
    cache_read: int
    cache_write: int  # kept for 5 minutes
    cache_write_1h: int
    search: int | None = NANO // 100  # one web search; None: not known
    long_above: int = 0  # tokens of the prompt above which all of a request costs `long`; 0: never
    long: "Price | None" = None

    def of(self, prompt: int) -> "Price":
        """The price for a prompt of so many tokens."""
        return self.long if self.long is not None and prompt > self.long_above else self


def price(
    input_: float,
    output: float,
    *,
    cache_read: float | None = None,
    cache_write: float | None = None,
    cache_write_1h: float | None = None,
) -> Price:
    """A price in dollars for a million tokens; what is left out follows from the input's, as usual."""
    return Price(
        input=_nanos(input_),
        output=_nanos(output),
        cache_read=_nanos(input_ / 10 if cache_read is None else cache_read),
        cache_write=_nanos(input_ * 1.25 if cache_write is None else cache_write),
        cache_write_1h=_nanos(input_ * 2 if cache_write_1h is None else cache_write_1h),
    )


def _nanos(dollars: float) -> int:
    return round(dollars * NANO)


_HAIKU_5_5 = msgspec.structs.replace(price(0.10, 0.50), long_above=100_000, long=price(0.50, 2.50))

TABLE: Mapping[str, Price] = {
    "claude-fable-5-1": price(10, 50, cache_read=0.25),
    "claude-mythos-5-1": price(10, 50, cache_read=0.25),
    "claude-fable-5": price(10, 50),
    "claude-mythos-5": price(10, 50),
    "claude-opus-5-5": price(4, 20, cache_read=0.20),
    "claude-opus-5": price(5, 25),
    "claude-opus-4-8": price(5, 25),
    "claude-opus-4-7": price(5, 25),
    "claude-opus-4-6": price(5, 25),
    "claude-opus-4-5": price(5, 25),
    "claude-opus-4-1": price(15, 75),
    "claude-opus-4": price(15, 75),
    "claude-sonnet-5-5": price(2, 10, cache_read=0.10),
    "claude-sonnet-5": price(2, 10),
    "claude-sonnet-4-6": price(3, 15),
    "claude-sonnet-4-5": price(3, 15),
    "claude-sonnet-4": price(3, 15),
    "claude-3-7-sonnet": price(3, 15),
    "claude-haiku-5-5": _HAIKU_5_5,
    "claude-haiku-4-5": price(1, 5),
    "claude-3-5-haiku": price(0.80, 4),
    "claude-3-haiku": price(0.25, 1.25, cache_read=0.03, cache_write=0.30),
}
"""Models whose price is not known for certain are left out: they cost None."""

_VERSION = re.compile(r"(.+)-(?:\d{8}|0|latest)")  # what may follow the name of an entry
_OTHER_TARIFFS = (b'"speed":"fast"', b'"inference_geo":"us"', b'"service_tier":"priority"')
_LONG_LIVED = b'"ttl":"1h"'


class Prices:
    """The table, and what a config says beside it."""

    def __init__(self, own: Mapping[str, Price] | None = None) -> None:
        self._own = dict(own or {})

    def of(self, image: Image) -> Price | None:
        """What a program's model costs; None when that is not known."""
        found = named(self._own, image.model)
        if found is None and image.provider == "anthropic" and not image.base_url:
            found = named(TABLE, image.model)
        if found is None or any(tariff in image.prefix for tariff in _OTHER_TARIFFS):
            return None
        return found


def named(table: Mapping[str, Price], model: str) -> Price | None:
    """The price under a model's name, with or without its date."""
    versioned = _VERSION.fullmatch(model)
    return table.get(model) or (table.get(versioned[1]) if versioned else None)


def cost(rate: Price | None, reply: Reply) -> int | None:
    """What an answer has cost; None when that is not known.

    An answer whose usage did not come has cost something, and nobody knows what.
    """
    usage = reply.usage
    if rate is None or usage == Usage():
        return None
    rate = rate.of(usage.prompt)
    if reply.searches and rate.search is None:
        return None
    long_lived = min(reply.written_1h, usage.cache_creation_input_tokens)
    total = (
        usage.input_tokens * rate.input
        + usage.output_tokens * rate.output
        + usage.cache_read_input_tokens * rate.cache_read
        + (usage.cache_creation_input_tokens - long_lived) * rate.cache_write
        + long_lived * rate.cache_write_1h
    )
    return -(-total // MILLION) + reply.searches * (rate.search or 0)


def most(rate: Price, image: Image, prompt: int) -> tuple[int, int]:
    """What a prompt of so many tokens costs at most, and a million tokens of the answer to it."""
    rate = rate.of(prompt)
    write = rate.cache_write_1h if _LONG_LIVED in image.prefix + image.suffix else rate.cache_write
    dearest = max(rate.input, write) if _caches(image) else rate.input
    return -(-prompt * dearest // MILLION), rate.output


def _caches(image: Image) -> bool:
    return b'"cache_control":' in image.suffix or b'"cache_control":' in image.prefix
