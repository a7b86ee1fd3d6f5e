"""Arithmetic: the calculator.

Law: an expression is walked, never evaluated by Python; what is not in the tables below does not exist.
Law: no step makes a number of more than `BITS` bits, so no expression takes long.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import TypeAlias, TypeVar

import trio

from llmprocd.abi.types import Access
from llmprocd.tools import output
from llmprocd.tools.output import Output, Spec, ToolContext, ToolError

Number: TypeAlias = int | float
Function: TypeAlias = Callable[..., object]
K = TypeVar("K", str, type[ast.AST])

BITS = 10_000
LONGEST = 4096
"""Characters of an expression."""


async def calculator(ctx: ToolContext, *, expression: str, precision: int = 6) -> Output:
    """The value of an arithmetic expression, rounded to `precision` (0 to 15) decimal places.

    Raises:
        ToolError: it is no such expression, has no value, or one that is too large.
    """
    del ctx  # numbers are the same for everybody
    await trio.lowlevel.checkpoint()
    if not 0 <= precision <= 15:
        raise ToolError("Precision must be between 0 and 15.")
    return Output(show(evaluate(expression), precision))


def evaluate(expression: str) -> Number:
    """The value of an expression. ToolError if it has none."""
    if len(expression) > LONGEST:
        raise ToolError(f"Calculation error: the expression is longer than {LONGEST} characters")
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ToolError(f"Calculation error: {error.msg}") from None
    except (RecursionError, MemoryError):  # the parser says MemoryError when its own stack is full
        raise ToolError("Calculation error: the expression is nested too deeply") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ToolError(f"Calculation error: {error.args[-1]}") from None


def show(value: Number, precision: int) -> str:
    """A number in decimal digits, without zeros that say nothing. Integers are exact."""
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    text = f"{value:.{precision}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.Name(id=name):
            if name not in CONSTANTS:
                raise ValueError(f"unknown variable: {name}")
            return CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand):
            return _bounded(_named(UNARY, type(op), "operation")(_value(operand)))
        case ast.BinOp(left=left, op=op, right=right):
            return _bounded(_named(BINARY, type(op), "operation")(_value(left), _value(right)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return _bounded(_named(FUNCTIONS, name, "function")(*[_value(arg) for arg in args]))
        case _:
            raise ValueError(f"{type(node).__name__} is not arithmetic")


def _bounded(value: object) -> Number:
    if isinstance(value, complex) or not isinstance(value, int | float):
        raise TypeError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > BITS:
        raise OverflowError("the number is too large")
    return value


def _named(table: Mapping[K, Function], key: K, kind: str) -> Function:
    if key not in table:
        raise ValueError(f"unknown {kind}: {key if isinstance(key, str) else key.__name__}")
    return table[key]


def _pow(base: Number, exponent: Number) -> object:
    """`base ** exponent`, refused before it is computed if it would be too large."""
    if isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1:
        _fits(base.bit_length() * exponent)
    return base**exponent


def _shift(value: Number, by: Number) -> object:
    if not (isinstance(value, int) and isinstance(by, int)):
        raise TypeError("shift of a number that is no integer")
    _fits(value.bit_length() + by)
    return value << by


def _factorial(value: Number) -> int:
    if not isinstance(value, int):
        raise TypeError("factorial of a number that is no integer")
    _fits(value * value.bit_length())
    return math.factorial(value)


def _round(value: Number, digits: Number = 0) -> Number:
    if not isinstance(digits, int):
        raise TypeError("round to a number of places that is no integer")
    _fits(abs(digits) * 4)  # round(1, -n) computes 10**n
    return round(value, digits) if digits else round(value)


def _fits(bits: Number) -> None:
    if bits > BITS:
        raise OverflowError("the number is too large")


UNARY: Mapping[type[ast.AST], Function] = {ast.UAdd: operator.pos, ast.USub: operator.neg}

BINARY: Mapping[type[ast.AST], Function] = {
    ast.Pow: _pow,
    ast.LShift: _shift,
    **{
        op: getattr(operator, name)
        for op, name in (
            *((ast.Add, "add"), (ast.Sub, "sub"), (ast.Mult, "mul"), (ast.Div, "truediv")),
            *((ast.FloorDiv, "floordiv"), (ast.Mod, "mod"), (ast.RShift, "rshift")),
            *((ast.BitXor, "xor"), (ast.BitAnd, "and_"), (ast.BitOr, "or_")),
        )
    },
}

FUNCTIONS: Mapping[str, Function] = {
    "abs": abs,
    "round": _round,
    "min": min,
    "max": max,
    "factorial": _factorial,
    **{
        name: getattr(math, name)
        for name in (
            *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh"),
            *("sqrt", "exp", "log", "log10", "log2", "degrees", "radians", "ceil", "floor", "trunc", "gcd"),
        )
    },
}

CONSTANTS: Mapping[str, Number] = {
    "pi": math.pi,
    "e": math.e,
    "tau": math.tau,
    "inf": math.inf,
    "nan": math.nan,
}

SPECS = (
    Spec(
        name="calculator",
        access=Access.READ,
        description=(
            "Compute an arithmetic expression: + - * / // % ** ^ (xor) & | << >>, "
            f"{', '.join(FUNCTIONS)}, and the constants {', '.join(CONSTANTS)}."
        ),
        input_schema=output.schema(
            ("expression",),
            expression={"type": "string", "description": "For example: sqrt(2) * 10**3"},
            precision={
                "type": "integer",
                "description": "Decimal places of the result.",
                "default": 6,
                "minimum": 0,
                "maximum": 15,
            },
        ),
        run=calculator,
        pure=True,
    ),
)
