"""How durations, numbers, sizes and money are read."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprocd.abi import units
from llmprocd.abi.errno import Errno, KernelError


@pytest.mark.parametrize(
    ("parser", "text", "value"),
    [
        (units.duration, "90s", 90.0), (units.duration, "10m", 600.0), (units.duration, 1.5, 1.5),
        (units.duration, "250ms", 0.25), (units.duration, "2h", 7200.0), (units.duration, ".5s", 0.5),
        (units.count, "50", 50.0), (units.count, 50, 50.0), (units.count, "200k", 200_000.0),
        (units.count, "1.5M", 1_500_000.0), (units.count, "2 G", 2e9), (units.count, " 7 ", 7.0),
        (units.size, "64K", 65_536.0), (units.size, "1G", 2.0**30), (units.size, "1.5M", 1.5 * 2**20),
        (units.size, "10", 10.0), (units.size, "1KiB", 1024.0), (units.size, "2mb", 2.0**21),
        (units.dollars, "1.50", 1.5), (units.dollars, "$2", 2.0), (units.dollars, 0.01, 0.01),
    ],
)  # fmt: skip
def test_what_is_read(parser, text, value):
    """A bare number is the smallest unit."""
    assert parser(text) == value


@pytest.mark.parametrize("parser", [units.duration, units.count, units.size, units.dollars])
@pytest.mark.parametrize(
    "text", ["", "x", "-1", -1, True, None, [], "1:2", "1 2", math.inf, math.nan, "1e3", "٣", 2**60]
)
def test_what_is_refused(parser, text):
    """EINVAL that repeats it; never a guess."""
    if parser is units.duration and text == 2**60:
        pytest.skip("a long time, but a time")
    with pytest.raises(KernelError) as caught:
        parser(text, "field")
    assert caught.value.errno is Errno.EINVAL
    assert caught.value.text.startswith("field: ")


@pytest.mark.parametrize("text", ["1.5", 1.5, "1.0000001k", "0.5B"])
def test_halves_of_what_comes_whole_are_refused(text):
    """There is no half token."""
    with pytest.raises(KernelError):
        units.count(text)


@given(st.integers(0, 2**53))
def test_whole_numbers_are_read_exactly(number):
    """As text and as a number."""
    assert units.count(number) == units.count(str(number)) == number
