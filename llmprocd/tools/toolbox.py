"""Names to tools: check a call's arguments, run it, and turn every failure into words.

Law: whatever a tool does, its call has one answer; a tool that raises, is denied or does not exist gives an
error result and the run goes on.
"""

import logging
from collections.abc import Mapping
from typing import Any

import msgspec

from llmprocd.abi.errno import KernelError
from llmprocd.kernel.state import Offer
from llmprocd.tools import calc, fs, shell, trap
from llmprocd.tools.output import Output, Spec, ToolContext, ToolError

log = logging.getLogger("llmprocd.tools")

SPECS: Mapping[str, Spec] = {spec.name: spec for spec in (*fs.SPECS, *shell.SPECS, *calc.SPECS)}

_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
}


def catalog() -> dict[str, Offer]:
    """Every tool that a program can list."""
    offers = {name: trap.offer(name) for name in trap.TRAPS}
    for spec in SPECS.values():
        schema = msgspec.json.encode(spec.input_schema)
        offers[spec.name] = Offer(spec.name, spec.description, schema, spec.access)
    return offers


def has_effects(tool: str) -> bool:
    """May a second run of a call that was cut off do harm? Then it is written down before it starts."""
    if tool in SPECS:
        return not SPECS[tool].pure
    return tool == "fd_to_file"


def arguments(spec: Spec, data: bytes) -> dict[str, Any]:
    """The arguments of a call, checked against the tool's schema; ToolError names the one that is wrong."""
    try:
        checked = msgspec.json.decode(data or b"{}", type=dict[str, Any])
    except msgspec.ValidationError:
        raise ToolError("Invalid arguments: an object is wanted") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ToolError(f"Invalid arguments: not JSON: {error}") from None
    properties: dict[str, dict[str, Any]] = spec.input_schema["properties"]
    for name in spec.input_schema.get("required", ()):
        if name not in checked:
            raise ToolError(f"Missing required argument: {name}")
    for name, value in checked.items():
        if name not in properties:
            raise ToolError(f"Unknown argument: {name}; {spec.name} takes {', '.join(properties)}")
        _check_type(name, value, properties[name].get("type"))
    return checked


def _check_type(name: str, value: Any, kind: str | None) -> None:
    if kind is None:
        return
    wrong_bool = isinstance(value, bool) and kind != "boolean"
    if wrong_bool or not isinstance(value, _JSON_TYPES[kind]):
        raise ToolError(f"Invalid argument: {name} must be of type {kind}")


async def run(spec: Spec, ctx: ToolContext, data: bytes) -> Output:
    """Run a tool. Whatever it raises becomes its answer; a bug in it is logged too."""
    try:
        return await spec.run(ctx, **arguments(spec, data))
    except ToolError as error:
        return Output(text=str(error), is_error=True)
    except KernelError as error:
        return Output(text=str(error), is_error=True)
    except Exception as error:
        log.exception("tool %s failed", spec.name)
        return Output(text=f"Tool '{spec.name}' error: {error}", is_error=True)
