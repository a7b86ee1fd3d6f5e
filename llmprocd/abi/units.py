"""How durations, numbers, sizes and money are written: `90s 10m 2h`, `200k`, `1G`, `1.50`."""

import math
import re

from llmprocd.abi.errno import Errno, KernelError

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(ms|s|m|h|d|)", re.ASCII)
_NUMBER = re.compile(r"(\d{1,16}(?:\.\d{1,9})?)\s?([a-zA-Z]{0,3})", re.ASCII)
_THOUSANDS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
_POWERS = {
    f"{letter}{ending}": 1024.0**power
    for power, letter in enumerate(("", "K", "M", "G", "T"))
    for ending in ("", "B", "IB")
    if letter or ending != "IB"
}
_LARGEST = 2.0**53  # as a double counts exactly


def duration(text: str | float, field: str = "duration") -> float:
    """Seconds; EINVAL for what is no duration."""
    if isinstance(text, (int, float)) and not isinstance(text, bool) and math.isfinite(text) and text >= 0:
        return float(text)
    found = _DURATION.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None:
        raise KernelError(Errno.EINVAL, f"{field}: {text!r} is no duration (they look like 90s, 10m, 2h)")
    return float(found[1]) * _SECONDS[found[2]]


def count(text: str | float, field: str = "count") -> float:
    """A whole number of `50`, `200k`, `1.5M` (thousands); EINVAL for anything else."""
    return _scaled(text, field, _THOUSANDS, "number (they look like 50, 200k)")


def size(text: str | float, field: str = "size") -> float:
    """Bytes of `64K`, `1G` (powers of 1024), a bare number is bytes; EINVAL for anything else."""
    return _scaled(text, field, _POWERS, "size (they look like 64K, 1G)")


def dollars(text: str | float, field: str = "cost") -> float:
    """Dollars of `1.50`, `$1.50`; EINVAL for anything else."""
    plain = text.strip().removeprefix("$") if isinstance(text, str) else text
    found = _number(plain, {"": 1.0})
    if found is None:
        raise KernelError(Errno.EINVAL, f"{field}: {text!r} is no amount of dollars (they look like 1.50)")
    return found


def _scaled(text: str | float, field: str, units: dict[str, float], what: str) -> float:
    found = _number(text, units)
    if found is None or found != int(found):
        raise KernelError(Errno.EINVAL, f"{field}: {text!r} is no {what}")
    return found


def _number(text: object, units: dict[str, float]) -> float | None:
    """A number that is not negative, with a unit behind it; None for anything else."""
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        return float(text) if 0 <= text <= _LARGEST else None
    if not isinstance(text, str):
        return None
    found = _NUMBER.fullmatch(text.strip())
    unit = units.get(found[2].upper()) if found else None
    if found is None or unit is None:
        return None
    value = round(float(found[1]) * unit, 6)
    return value if value <= _LARGEST else None
