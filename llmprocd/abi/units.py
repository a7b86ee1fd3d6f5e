"""How durations are written: `90s 10m 2h`, a bare number is seconds."""

import math
import re

from llmprocd.abi.errno import Errno, KernelError

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m|h|d|)", re.ASCII)


def duration(text: str | float, field: str = "duration") -> float:
    """Seconds; EINVAL for what is no duration."""
    if isinstance(text, (int, float)) and not isinstance(text, bool) and math.isfinite(text) and text >= 0:
        return float(text)
    found = _DURATION.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise KernelError(Errno.EINVAL, f"{field}: {text!r} is no duration (they look like 90s, 10m, 2h)")
    return float(found[1]) * _SECONDS[found[2]]
