"""Every tool call has one answer: checked arguments, and every failure in words."""

import json
import logging

import msgspec
import pytest
import trio

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import Access
from llmprocd.model import script_rules
from llmprocd.tools import output, toolbox, trap
from llmprocd.tools.output import Output, Spec, ToolContext, ToolError

CTX = ToolContext(7, "/", {}, None, lambda: "")

PROPERTIES = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "deep": {"type": "boolean"},
    "names": {"type": "array"},
    "map": {"type": "object"},
    "any": {},
}


def spec(run, name="probe"):
    return Spec(name, Access.READ, "d", output.schema(("text",), **PROPERTIES), run, pure=True)


async def echo(_ctx, **arguments):
    return Output(text=json.dumps(arguments))


async def run(data, tool=echo):
    return await toolbox.run(spec(tool), CTX, data)


# --- arguments --------------------------------------------------------------------------------------


async def test_checked_arguments_reach_the_tool_by_name():
    given = {"text": "a", "count": 3, "ratio": 0.5, "deep": False, "names": [], "map": {}, "any": None}
    answer = await run(msgspec.json.encode(given))
    assert json.loads(answer.text) == given
    assert not answer.is_error


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Missing required argument: text"),
        ({"txt": "a"}, "Missing required argument: text"),
        ({"text": "a", "txt": 1}, "Unknown argument: txt; probe takes text, count, ratio"),
        ({"text": 3}, "Invalid argument: text must be of type string"),
        ({"text": None}, "Invalid argument: text must be of type string"),
        ({"text": "a", "count": "3"}, "count must be of type integer"),
        ({"text": "a", "count": 3.5}, "count must be of type integer"),
        ({"text": "a", "count": True}, "count must be of type integer"),
        ({"text": "a", "ratio": True}, "ratio must be of type number"),
        ({"text": "a", "deep": 1}, "deep must be of type boolean"),
        ({"text": "a", "names": "x"}, "names must be of type array"),
        ({"text": "a", "map": []}, "map must be of type object"),
    ],
)
async def test_a_wrong_argument_is_named_and_nothing_is_run(given, said):
    ran = []

    async def tool(_ctx, **arguments):
        ran.append(arguments)
        return Output()

    answer = await run(msgspec.json.encode(given), tool)
    assert answer.is_error
    assert said in answer.text
    assert ran == []


@pytest.mark.parametrize("data", [b"[]", b"3", b"null", b'"x"'])
async def test_arguments_that_are_no_object_are_refused(data):
    assert (await run(data)).text == "Invalid arguments: an object is wanted"


@pytest.mark.parametrize(
    "data", [b"{", b'{"text": "\xff"}', b'{"text": "\\ud800"}', b'{"text":' + b"[" * 5000]
)
async def test_arguments_that_are_no_json_are_refused(data):
    answer = await run(data)
    assert answer.is_error
    assert answer.text.startswith("Invalid arguments: not JSON: ")


async def test_no_bytes_are_no_arguments():
    assert (await run(b"")).text == "Missing required argument: text"


# --- failures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ToolError("No such folder: x"), "No such folder: x"),
        (KernelError(Errno.EDQUOT, "fds: 256"), "EDQUOT: fds: 256"),
    ],
)
async def test_what_a_tool_says_of_a_failure_is_its_answer(error, said, caplog):
    async def tool(_ctx, **_):
        raise error

    answer = await run(b'{"text":"a"}', tool)
    assert (answer.text, answer.is_error) == (said, True)
    assert caplog.records == []


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero"), OSError(5, "broken"), RecursionError("deep")]
)
async def test_a_bug_in_a_tool_is_an_answer_and_is_logged(error, caplog):
    async def tool(_ctx, **_):
        raise error

    with caplog.at_level(logging.ERROR):
        answer = await run(b'{"text":"a"}', tool)
    assert answer.is_error
    assert answer.text == f"Tool 'probe' error: {error}"
    (record,) = caplog.records
    assert record.exc_info[1] is error


async def test_a_cancelled_tool_is_no_failed_tool(autojump_clock, caplog):
    """Cancellation is not an answer: it goes on up."""

    async def tool(_ctx, **_):
        await trio.sleep_forever()

    with trio.move_on_after(1) as scope:
        await run(b'{"text":"a"}', tool)
    assert scope.cancelled_caught
    assert caplog.records == []


# --- the catalog ------------------------------------------------------------------------------------


def test_the_catalog_holds_each_tool_once():
    catalog = toolbox.catalog()
    assert set(catalog) == set(toolbox.SPECS) | set(trap.TRAPS)
    assert not set(toolbox.SPECS) & set(trap.TRAPS)
    assert all(offer.name == name for name, offer in catalog.items())


def test_the_strict_endpoint_accepts_all_offers_at_once():
    tools = [
        {"name": offer.name, "description": offer.description, "input_schema": json.loads(offer.input_schema)}
        for offer in toolbox.catalog().values()
    ]
    request = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "tools": tools}
    script_rules.check_create(request)


@pytest.mark.parametrize("name", sorted(toolbox.SPECS))
def test_a_built_in_tool_takes_just_what_its_schema_says(name):
    """A property without a parameter would raise when a model first gives it."""
    tool = toolbox.SPECS[name]
    code = tool.run.__code__
    keywords = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    assert set(tool.input_schema["properties"]) == set(keywords)
    optional = set(tool.run.__kwdefaults__ or ())
    assert set(tool.input_schema["required"]) == set(keywords) - optional
    kinds = {shape.get("type") for shape in tool.input_schema["properties"].values()}
    assert kinds <= set(toolbox._JSON_TYPES)


@pytest.mark.parametrize("name", sorted(toolbox.SPECS))
def test_a_default_in_a_schema_is_the_default_of_the_tool(name):
    tool = toolbox.SPECS[name]
    for key, shape in tool.input_schema["properties"].items():
        if "default" in shape:
            assert tool.run.__kwdefaults__[key] == shape["default"]


@pytest.mark.parametrize(
    ("name", "access"),
    [
        ("read_file", Access.READ),
        ("list_dir", Access.READ),
        ("calculator", Access.READ),
        ("glob", Access.READ),
        ("grep", Access.READ),
        ("write_file", Access.WRITE),
        ("edit_file", Access.WRITE),
        ("bash", Access.WRITE),
    ],
)
def test_access_is_as_the_contract_says(name, access):
    assert toolbox.catalog()[name].access is access


@pytest.mark.parametrize(
    ("name", "effects"),
    [
        ("bash", True),
        ("write_file", True),
        ("edit_file", True),
        ("fd_to_file", True),
        ("read_file", False),
        ("list_dir", False),
        ("glob", False),
        ("grep", False),
        ("calculator", False),
        ("read_fd", False),
        ("spawn", False),
        ("nothing_known", False),
    ],
)
def test_what_must_be_written_down_before_it_starts(name, effects):
    """Effect and answer of a system call are one commit; a pure tool may run again; the rest may do harm."""
    assert toolbox.has_effects(name) is effects
