"""Command lines that are exactly as the table says, parsed without a parser library.

Law: what is parsed here means what click would have read; whatever is in the least unusual (an error,
`--help`, letters run together) is left to click, which costs three times the rest of the command.
"""

from llmprocctl import table, units

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class UnusualError(Exception):
    """Click shall read this command line."""


def parse(argv: list[str]) -> "tuple[dict[str, Any], str, dict[str, Any]] | None":
    """The global options, the command and its arguments.

    Args:
        argv: what followed the program's name.

    Returns:
        None for a command line that click shall read.
    """
    try:
        words = list(argv)
        settings = _options(words, table.GLOBALS, [], leading=True)
        if not words or words[0] not in table.COMMANDS:
            return None
        name = words.pop(0)
        command = table.COMMANDS[name]
        words = table.normalised(name, words)
        operands: list[str] = []
        values = _options(words, command.options, operands)
        return settings, name, values | _operands(operands, command.operands) | command.fixed
    except UnusualError:
        return None


def _options(
    words: list[str], options: tuple[table.Option, ...], operands: list[str], *, leading: bool = False
) -> "dict[str, Any]":
    """The values of options, out of `words`; what is no option is an operand, or ends what is `leading`."""
    known = {name: option for option in options for name in option.names}
    values: dict[str, Any] = {option.dest: option.default for option in options}
    while words:
        word = words[0]
        if len(word) < 2 or not word.startswith("-"):
            if leading:
                break
            operands.append(words.pop(0))
        elif word == "--" and not leading:
            operands += words[1:]
            words.clear()
        else:
            _option(words, known, values)
    return values


def _option(words: list[str], known: dict[str, table.Option], values: "dict[str, Any]") -> None:
    """One option and its value, taken from `words`."""
    name, equals, value = words.pop(0).partition("=")
    option = known.get(name)
    if option is None or (equals and (option.kind == "flag" or not name.startswith("--"))):
        raise UnusualError
    if option.kind == "flag":
        values[option.dest] = True
        return
    if not equals:
        if not words:
            raise UnusualError
        value = words.pop(0)
    if option.kind == "many":
        values[option.dest] += (value,)
        return
    try:
        values[option.dest] = convert(option.kind, value)
    except ValueError:
        raise UnusualError from None


def _operands(given: list[str], operands: tuple[table.Operand, ...]) -> "dict[str, Any]":
    values: dict[str, Any] = {}
    for operand in operands:
        if operand.count == "one":
            if not given:
                raise UnusualError
            values[operand.dest] = given.pop(0)
        elif operand.count == "maybe":
            values[operand.dest] = given.pop(0) if given else ""
        else:
            if operand.count == "some" and not given:
                raise UnusualError
            values[operand.dest] = tuple(given)
            given.clear()
    if given:
        raise UnusualError
    return values


def convert(kind: "table.Kind", text: str) -> "Any":
    """An option's value; ValueError with a sentence."""
    if kind in _RANGES:
        return _number(text, *_RANGES[kind])
    return units.duration(text) if kind == "duration" else text


_RANGES: "dict[str, tuple[int, int]]" = {
    "int": (-(1 << 63), (1 << 63) - 1),
    "count": (0, (1 << 53) - 1),
    "nice": (-20, 19),
}


def _number(text: str, least: int, most: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a valid integer.") from None
    if not least <= number <= most:
        raise ValueError(f"{text} is not in the range from {least} to {most}.")
    return number
