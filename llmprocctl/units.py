"""How durations, sizes, counts and money are written, by people and for them.

Law: what a parser here refuses it refuses with a sentence (ValueError); it never guesses a unit.
"""

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def duration(text: str) -> float:
    """Seconds of `90s`, `10m`, `2h`, `1h30m`; a bare number is seconds.

    Raises ValueError.
    """
    rest, total = text.strip(), 0.0
    if _is_number(rest):
        return float(rest)
    while rest:
        digits = _leading(rest, "0123456789.")
        unit = _leading(rest[len(digits) :], "dhms")
        if not _is_number(digits) or unit not in _SECONDS:
            raise ValueError(f"{text!r} is no duration (they look like 90s, 10m, 2h)")
        total += float(digits) * _SECONDS[unit]
        rest = rest[len(digits) + len(unit) :]
    if not text.strip():
        raise ValueError("an empty text is no duration")
    return total


def size(text: str) -> int:
    """Bytes of `64K`, `1G`, `1.5M`; a bare number is bytes. Raises ValueError."""
    digits = _leading(text.strip(), "0123456789.")
    unit = text.strip()[len(digits) :].upper().removesuffix("B")
    power = {"": 0, "K": 1, "KI": 1, "M": 2, "MI": 2, "G": 3, "GI": 3, "T": 4, "TI": 4}.get(unit)
    if power is None or not _is_number(digits):
        raise ValueError(f"{text!r} is no size (they look like 64K, 1G)")
    return int(float(digits) * 1024**power)


def count(number: float) -> str:
    """A number of tokens in at most four characters: 812, 6.2k, 118k, 3.4M."""
    if number < 1000:
        return f"{number:.0f}"
    for unit in "kMGT":
        number /= 1000
        if number < 9.95:
            return f"{number:.1f}{unit}"
        if number < 999.5:
            return f"{number:.0f}{unit}"
    return f"{number:.0f}T"


def bytes_(number: float) -> str:
    """A number of bytes: 812, 6.2K, 118K, 3.4M."""
    if number < 1024:
        return f"{number:.0f}"
    for unit in "KMGT":
        number /= 1024
        if number < 9.95:
            return f"{number:.1f}{unit}"
        if number < 1023.5:
            return f"{number:.0f}{unit}"
    return f"{number:.0f}T"


def clock(seconds: float) -> str:
    """A time as `ps` writes it: 0:07, 3:12, 1:02:11, 2-03:04:05."""
    minutes, second = divmod(int(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}-{hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def span(seconds: float) -> str:
    """A duration as `duration` reads it: 45s, 3m12s, 10m, 2h."""
    if seconds != int(seconds) and seconds < 60:
        return f"{seconds:g}s"
    left, parts = int(seconds), ""
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        number, left = divmod(left, length)
        parts += f"{number}{unit}" if number else ""
    return parts or "0s"


def dollars(amount: float) -> str:
    """Money: $0.41; four digits while it is less than a cent."""
    return f"${amount:.4f}" if 0 < amount < 0.01 else f"${amount:.2f}"


def _leading(text: str, allowed: str) -> str:
    return text[: len(text) - len(text.lstrip(allowed))]


def _is_number(text: str) -> bool:
    whole, _, part = text.partition(".")
    return (whole + part).isdecimal() and (whole + part).isascii()
