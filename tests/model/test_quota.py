"""Limits as the headers of an answer tell them."""

import pytest

from llmprocd.model.protocol import Allowance, Quota
from llmprocd.model.quota import exhausted_for, quota_of

NOW = 1_764_000_000.0  # 2025-11-24T16:00:00Z


def told(**headers):
    return {f"anthropic-ratelimit-{name.replace('_', '-')}": value for name, value in headers.items()}


def test_limits_what_is_left_and_when_it_comes_back():
    headers = told(
        requests_limit="50",
        requests_remaining="49",
        requests_reset="2025-11-24T16:00:01Z",
        input_tokens_limit="30000",
        input_tokens_remaining="29000",
        input_tokens_reset="2025-11-24T17:00:30+01:00",
        output_tokens_limit="8000",
    )
    assert quota_of(headers, NOW) == Quota(
        Allowance(50, 49, 1.0), Allowance(30_000, 29_000, 30.0), Allowance(8000, None, None)
    )


def test_no_headers_tell_nothing():
    assert quota_of({}, NOW) == Quota()
    assert exhausted_for(Quota()) is None


@pytest.mark.parametrize("value", ["", "many", "-1", "1.5", "1e9", "٣", "9" * 19, "9" * 5000])
def test_what_is_no_number_is_nothing(value):
    assert quota_of(told(requests_limit=value, requests_remaining=value), NOW) == Quota()


@pytest.mark.parametrize("value", ["", "soon", "60", "2025-13-01T00:00:00Z", "\0"])
def test_what_is_no_time_is_nothing(value):
    assert quota_of(told(requests_reset=value), NOW).requests.reset_s is None


def test_a_time_without_a_zone_is_utc_and_one_that_is_past_is_now():
    assert quota_of(told(requests_reset="2025-11-24T16:00:02"), NOW).requests.reset_s == 2
    assert quota_of(told(requests_reset="2020-01-01T00:00:00Z"), NOW).requests.reset_s == 0


def test_what_is_used_up_is_waited_for():
    """The last of those that are used up decides; what is left of the others does not matter."""
    quota = Quota(Allowance(50, 0, 7.0), Allowance(1000, 0, 20.0), Allowance(1000, 5, 50.0))
    assert exhausted_for(quota) == 20
