"""The signals a process knows, by name and number (signal(7)).

The daemon's own table is an enum beside msgspec types; importing that costs `kill` more than the kill.
A test holds the two against each other.
"""

NAMES = {1: "HUP", 2: "INT", 9: "KILL", 15: "TERM", 17: "CHLD", 18: "CONT", 19: "STOP", 24: "XCPU"}


def name(word: str) -> str | None:
    """The name that a word spells (`9`, `TERM`, `SIGTERM`, any case); "0" is the test for existence.

    Returns:
        None when no process knows such a signal.
    """
    text = word.upper().removeprefix("SIG")
    if text in {"0", "EXIT"}:
        return "0"
    if text.isascii() and text.isdecimal():
        return NAMES.get(int(text))
    return text if text in NAMES.values() else None


def number(signal: str) -> int:
    """The number of a name of the table."""
    return next(number for number, known in NAMES.items() if known == signal)


def arguments(words: list[str]) -> list[str]:
    """The arguments of `kill` as other commands write theirs: `-9 7` is `-s 9 7`.

    And `-TERM -42` is `-s TERM -- -42`.

    Args:
        words: what followed `kill`.

    Returns:
        Words of which only the first ones begin with a dash, unless `--` stands before.
    """
    for i, word in enumerate(words):
        if word in {"-s", "--signal"}:
            return words[: i + 2] + _guarded(words[i + 2 :])
        if word == "--" or not word.startswith("-") or word.startswith("--signal="):
            return words
        if name(word[1:]) is not None or _looks_like_one(word[1:]):
            return [*words[:i], "-s", word[1:], *_guarded(words[i + 1 :])]
    return words


def _looks_like_one(word: str) -> bool:
    """`-NOSUCH` and `-99` are meant as signals: it is `kill` that says there is none of that name."""
    return word.isascii() and word.isalnum() and (word.isdecimal() or (len(word) > 1 and word.isupper()))


def _guarded(operands: list[str]) -> list[str]:
    """Once there is a signal, `-42` can only be a process and its descendants."""
    if "--" in operands or not any(_is_tree(word) for word in operands):
        return operands
    return ["--", *operands]


def _is_tree(word: str) -> bool:
    return word.startswith("-") and word[1:].isdecimal()
