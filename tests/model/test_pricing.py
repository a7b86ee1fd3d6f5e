"""What a token costs: exact, from a dated table that a config extends, and None where nobody knows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from llmprocd import config
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Usage
from llmprocd.config import Config, PriceTable
from llmprocd.kernel.state import NANO, Image, Reply
from llmprocd.model import pricing
from llmprocd.model.pricing import TABLE, Prices, price

TOKENS = st.integers(0, 10**7)


def image(model: str, provider: str = "anthropic", **more: object) -> Image:
    given_ = {"program": "p", "path": "", "prefix": b'{"model":"m","messages":[', "suffix": b"]}", **more}
    return Image(model=model, provider=provider, **given_)


def cost(rate, *counts: int, **more: int) -> int | None:
    return pricing.cost(rate, Reply(usage=Usage(*counts), **more))


@pytest.mark.parametrize(
    ("model", "dollars"),
    [
        ("claude-haiku-4-5", (1, 5)),
        ("claude-haiku-4-5-20251001", (1, 5)),
        ("claude-sonnet-4-6", (3, 15)),
        ("claude-sonnet-4-20250514", (3, 15)),
        ("claude-sonnet-4-0", (3, 15)),
        ("claude-opus-4-8", (5, 25)),
        ("claude-opus-4-1-20250805", (15, 75)),
        ("claude-opus-4-20250514", (15, 75)),
        ("claude-opus-5-5", (4, 20)),
        ("claude-3-5-haiku-latest", (0.8, 4)),
    ],
)
def test_a_million_tokens_in_and_out(model, dollars):
    """A date or `latest` behind a name changes nothing."""
    rate = Prices().of(image(model))
    assert (cost(rate, 10**6), cost(rate, 0, 10**6)) == tuple(round(NANO * amount) for amount in dollars)


@pytest.mark.parametrize(
    "unknown",
    [
        image("claude-sonnet-9"),
        image("claude-sonnet-4-6-turbo"),
        image("claude-fable-5-2"),
        image("claude"),
        image(""),
        image("claude-haiku-4-5", "script"),
        image("claude-haiku-4-5", "anthropic_bedrock"),
        image("claude-haiku-4-5", base_url="http://127.0.0.1:1"),
        image("claude-opus-4-6", prefix=b'{"model":"claude-opus-4-6","speed":"fast","messages":['),
        image("claude-opus-4-6", prefix=b'{"model":"claude-opus-4-6","inference_geo":"us","messages":['),
    ],
)
def test_what_is_not_known_costs_none(unknown):
    """Never 0: another model, another endpoint, another tariff."""
    rate = Prices().of(unknown)
    assert rate is None
    assert cost(rate, 1000, 1000) is None


def test_a_call_without_usage_costs_none():
    """It has used something."""
    assert cost(TABLE["claude-haiku-4-5"]) is None


def test_each_kind_of_token_has_its_price():
    """Reads a tenth, writes 1.25 times, writes for an hour twice, a search a cent."""
    rate = price(3, 15)
    assert cost(rate, 1) == 3000
    assert cost(rate, 0, 1) == 15_000
    assert cost(rate, 0, 0, 1) == 300
    assert cost(rate, 0, 0, 0, 1) == 3750
    assert cost(rate, 0, 0, 0, 1, written_1h=1) == 6000
    assert cost(rate, 0, 0, 0, 4, written_1h=3) == 3750 + 3 * 6000
    assert cost(rate, 0, 1, searches=3) == 15_000 + 3 * NANO // 100
    assert cost(replace(rate, search=None), 0, 1, searches=1) is None
    assert cost(rate, 0, 0, 0, 1, written_1h=99) == 6000


def test_a_call_is_rounded_up_once():
    """To a billionth of a dollar."""
    rate = price(0.000_25, 0.000_25)
    assert cost(rate, 1) == 1
    assert cost(rate, 1, 1) == 1
    assert cost(rate, 4, 1) == 2


def test_a_long_prompt_costs_more_on_every_token():
    """Reads and writes are part of the prompt; the answer is dearer too."""
    rate = TABLE["claude-haiku-5-5"]
    assert cost(rate, 100_000, 10) == 100_000 * 100 + 10 * 500
    assert cost(rate, 100_001, 10) == 100_001 * 500 + 10 * 2500
    assert cost(rate, 1, 10, 100_000) == 500 + 10 * 2500 + 100_000 * 50


@given(TOKENS, TOKENS, TOKENS, TOKENS, st.sampled_from(sorted(TABLE)))
def test_no_call_costs_more_than_was_reserved_for_it(plain, output, read, written, model):
    """Whatever of the prompt is read from a cache or written into one."""
    rate = TABLE[model]
    cached = image(model, suffix=b'],"cache_control":{"type":"ephemeral","ttl":"1h"}}')
    prompt = plain + read + written
    input_cost, output_price = pricing.most(rate, cached, prompt)
    found = cost(rate, plain, output, read, written, written_1h=written)
    assert (found or 0) <= input_cost - (-output * output_price // 10**6)


def test_without_caching_no_writes_are_reserved():
    assert pricing.most(price(3, 15), image("x"), 10) == (30_000, 15 * NANO)
    marked = image("x", suffix=b'],"cache_control":{"type":"ephemeral"}}')
    assert pricing.most(price(3, 15), marked, 10) == (37_500, 15 * NANO)


def test_every_price_in_the_table_is_whole():
    """And a read is cheaper than a token, a write dearer."""
    for rate in TABLE.values():
        assert 0 < rate.cache_read < rate.input < rate.cache_write < rate.cache_write_1h < rate.output
        assert rate.input % 1000 == 0


# --- the config -------------------------------------------------------------------------------------


def test_a_config_extends_and_replaces():
    """For whatever endpoint serves a model of that name."""
    own = {
        "toy": PriceTable(input=1, output=2),
        "claude-haiku-4-5": PriceTable(
            input=2, output=4, cache_read=1, cache_write=3, cache_write_1h=5, search=20
        ),
    }
    prices = config.prices(Config(prices=own))
    assert prices.of(image("toy", "script")) == price(1, 2)
    assert prices.of(image("toy-20260101", base_url="http://h")) == price(1, 2)
    changed = prices.of(image("claude-haiku-4-5"))
    assert changed is not None
    assert (changed.cache_read, changed.cache_write, changed.cache_write_1h) == (NANO, 3 * NANO, 5 * NANO)
    assert changed.search == NANO // 50
    assert prices.of(image("claude-opus-4-6")) == TABLE["claude-opus-4-6"]


def test_a_free_model_is_free_and_known():
    """0 is what was said, not what is missing."""
    rate = config.prices(Config(prices={"toy": PriceTable(input=0, output=0)})).of(image("toy", "script"))
    assert cost(rate, 10, 10) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[prices."m"]\ninput = 1\n', "output"),
        ('[prices."m"]\ninput = -1\noutput = 1\n', "input"),
        ('[prices."m"]\ninput = 1\noutput = 1\nthinking = 2\n', "thinking"),
        ("[limits]\nsheep = 5\n", "sheep"),
        ('[limits]\nturns = "9:5"\n', "limits.turns"),
    ],
)
def test_a_config_that_says_nonsense_is_refused(tmp_path, text, words):
    """ENOEXEC with the file and what is wrong in it."""
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(KernelError) as caught:
        config.load(str(path))
    assert caught.value.errno is Errno.ENOEXEC
    assert str(path) in caught.value.text
    assert words in caught.value.text


def test_a_config_says_the_limits_of_each_tree(tmp_path):
    """Those of ours stay where it says nothing."""
    path = tmp_path / "c.toml"
    path.write_text('[limits]\nturns = "5:9"\ndepth = "unlimited"\n')
    found = config.tree_limits(config.load(str(path)))
    assert (found["turns"].soft, found["turns"].hard) == (5.0, 9.0)
    assert found["depth"].hard is None
    assert found["procs"] == config.tree_limits(Config())["procs"]
