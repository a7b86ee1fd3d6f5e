"""What the headers of an answer tell of an endpoint's limits.

Any answer may carry them, refusals too. What cannot be read is as if it were not there.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

from llmprocd.model.protocol import Allowance, Quota

_PREFIX = "anthropic-ratelimit-"
_MOST = 10**12  # of anything in a minute: what is more is no limit


def quota_of(headers: Mapping[str, str], now: float) -> Quota:
    """The limits that headers tell; `now` is wall time."""
    return Quota(
        _allowance(headers, "requests", now),
        _allowance(headers, "input-tokens", now),
        _allowance(headers, "output-tokens", now),
    )


def exhausted_for(quota: Quota) -> float | None:
    """Seconds until nothing is used up any more; None if nothing is, or nobody knows."""
    resets = [
        allowance.reset_s
        for allowance in (quota.requests, quota.input_tokens, quota.output_tokens)
        if allowance.left == 0 and allowance.reset_s is not None
    ]
    return max(resets, default=None)


def _allowance(headers: Mapping[str, str], what: str, now: float) -> Allowance:
    return Allowance(
        _count(headers.get(f"{_PREFIX}{what}-limit", "")),
        _count(headers.get(f"{_PREFIX}{what}-remaining", "")),
        _seconds(headers.get(f"{_PREFIX}{what}-reset", ""), now),
    )


def _count(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        return None
    return int(text) if int(text) <= _MOST else None


def _seconds(text: str, now: float) -> float | None:
    """Seconds from now to a time as in RFC 3339."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return None
    return max(0.0, at.replace(tzinfo=at.tzinfo or UTC).timestamp() - now)
