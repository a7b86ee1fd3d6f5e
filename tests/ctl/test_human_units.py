"""Durations, sizes, counts and money."""
# ruff: noqa: E501

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprocctl import units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86_400), ("45", 45), ("1.5", 1.5), ("0.5m", 30), ("250ms", 0.25), ("1h30m", 5400)],
)  # fmt: skip
def test_durations(text, seconds):
    """A number with a unit, several of them, or a bare number of seconds."""
    assert units.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", " ", "x", "10x", "m", "-5", "1.2.3s", "5 s m", "inf", "nan", "1e3", "٣s"]
)
def test_what_is_no_duration_is_refused(text):
    """No unit is guessed."""
    with pytest.raises(ValueError, match="duration"):
        units.duration(text)


@given(st.integers(0, 10**7))
def test_a_span_is_read_back(seconds):
    """What `span` writes `duration` reads."""
    assert units.duration(units.span(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "size"), [("64K", 65_536), ("1G", 1 << 30), ("12", 12), ("1.5M", 3 << 19), ("2KiB", 2048), ("3kb", 3072), ("7B", 7)]
)  # fmt: skip
def test_sizes(text, size):
    """Powers of 1024."""
    assert units.size(text) == size


@pytest.mark.parametrize("text", ["", "K", "1X", "1 i", "-1K"])
def test_what_is_no_size_is_refused(text):
    """No unit is guessed."""
    with pytest.raises(ValueError, match="size"):
        units.size(text)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (6200, "6.2k"), (9949, "9.9k"), (9960, "10k"), (118_400, "118k"), (999_600, "1.0M"), (3_400_000, "3.4M")],
)  # fmt: skip
def test_counts(number, text):
    """At most four characters, and never 1000k."""
    assert units.count(number) == text


@given(st.integers(0, 10**13))
def test_no_count_is_wide(number):
    """A column of counts stays a column."""
    assert len(units.count(number)) <= 4
    assert len(units.bytes_(number)) <= 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (192, "3:12"), (3731, "1:02:11"), (183_845, "2-03:04:05"), (-3, "0:00")],
)
def test_clocks(seconds, text):
    """As ps writes times."""
    assert units.clock(seconds) == text


@pytest.mark.parametrize(
    ("amount", "text"), [(0, "$0.00"), (0.41, "$0.41"), (0.0042, "$0.0042"), (12.345, "$12.35")]
)
def test_money(amount, text):
    """Cents; fractions of them while there is no whole one."""
    assert units.dollars(amount) == text
