"""The calculator: what it computes, and what it refuses at once."""

import pytest

from llmprocd.tools import calc
from llmprocd.tools.output import ToolContext, ToolError

CTX = ToolContext(7, "/", {}, None, str)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 + 3", "5"),
        ("10 // 3", "3"),
        ("2 ** 3", "8"),
        ("7 ^ 2", "5"),
        ("6 & 3 | 8", "10"),
        ("1 << 10 >> 2", "256"),
        ("sqrt(16)", "4"),
        ("sin(pi/2)", "1"),
        ("log(e)", "1"),
        ("log(8, 2)", "3"),
        ("-3 + +1", "-2"),
        ("1/3", "0.333333"),
        ("100.0", "100"),
        ("-1e-9", "0"),
        ("2**200", str(2**200)),
        ("2**-1", "0.5"),
        ("10**15 + 1", "1000000000000001"),
        ("max(1, min(5, 3), gcd(12, 18))", "6"),
        ("factorial(20)", "2432902008176640000"),
        ("round(2.567, 1)", "2.6"),
        ("round(7.6)", "8"),
        ("inf", "Infinity"),
        ("-inf", "-Infinity"),
        ("nan", "NaN"),
        ("  1\n", "1"),
    ],
)
async def test_it_computes(expression, value):
    """Numbers come out as a person would write them."""
    assert (await calc.calculator(CTX, expression=expression)).text == value


@pytest.mark.parametrize(
    ("expression", "precision", "value"),
    [("100", 0, "100"), ("100.0", 0, "100"), ("2/3", 0, "1"), ("2/3", 3, "0.667"), ("1/8", 15, "0.125")],
)
async def test_precision_counts_decimal_places(expression, precision, value):
    """Zeros before the point are digits, only those after it can go."""
    assert (await calc.calculator(CTX, expression=expression, precision=precision)).text == value


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9",
        "-(9**9)**9**9",
        "2**100000",
        "factorial(100000)",
        "factorial(factorial(7))",
        "1 << 10**9",
        "round(1, -10**9)",
        "9" * 4000 + "*" + "9" * 90,
        "1+" * 2000 + "1",
        "-" * 4000 + "1",
        "(" * 500 + "1" + ")" * 500,
        "1" * 5000,
        "*".join(["2**9999"] * 9),
    ],
)
async def test_what_would_take_long_is_refused(expression):
    """No expression makes a number that is too large, not on the way to a small one either."""
    with pytest.raises(ToolError, match="Calculation error"):
        await calc.calculator(CTX, expression=expression)


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("", "invalid syntax"),
        ("2 +", "invalid syntax"),
        ("x + 1", "unknown variable: x"),
        ("print(1)", "unknown function: print"),
        ("~1", "unknown operation: Invert"),
        ("2 @ 2", "unknown operation: MatMult"),
        ("__import__('os')", "unknown function: __import__"),
        ("(1).real", "Attribute"),
        ("pi.hex()", "Call"),
        ("[x for x in (1,)]", "ListComp"),
        ("True", "Constant"),
        ("'a' * 9", "Constant"),
        ("1j", "Constant"),
        ("1 if 1 else 2", "IfExp"),
        ("round(number=1)", "Call"),
        ("1/0", "zero"),
        ("sqrt(-1)", "domain"),
        ("(-8)**(1/3)", "real number"),
        ("exp(10000)", "range"),
        ("sin()", "argument"),
        ("factorial(2.5)", "integer"),
        ("1.5 << 1", "integer"),
        ("2.0**10000", "error: Numerical result out of range"),
        ("1\0", "null"),
    ],
)
async def test_what_is_no_arithmetic_is_refused(expression, text):
    """Names, attributes, calls and whatever else Python knows do not exist here; faults are said in words."""
    with pytest.raises(ToolError, match=text):
        await calc.calculator(CTX, expression=expression)


@pytest.mark.parametrize("precision", [-1, 16])
async def test_precision_has_bounds(precision):
    """A double has no more than fifteen decimal places worth showing."""
    with pytest.raises(ToolError, match="between 0 and 15"):
        await calc.calculator(CTX, expression="1", precision=precision)
