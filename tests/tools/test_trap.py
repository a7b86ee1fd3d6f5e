"""What a model is told about system calls, and what it is told when it gets one wrong."""

import json

import msgspec
import pytest

from llmprocd.abi.types import Access
from llmprocd.model import script_rules
from llmprocd.tools import trap
from llmprocd.tools.output import ToolError

CONTRACT = {
    "fork": (Access.ADMIN, {"prompts": True, "wait": False}),
    "spawn": (
        Access.ADMIN,
        {
            "prompt": True,
            "program_name": False,
            "additional_preload_files": False,
            "fds": False,
            "wait": False,
            "notify": False,
        },
    ),
    "wait": (Access.READ, {"pids": False, "timeout_s": False}),
    "kill": (Access.ADMIN, {"pid": True, "signal": False}),
    "send": (Access.WRITE, {"pid": True, "message": True}),
    "goto": (Access.READ, {"position": True, "message": True}),
    "exit": (Access.READ, {"status": False, "message": False}),
    "read_fd": (
        Access.READ,
        {
            "fd": True,
            "mode": False,
            "start": False,
            "count": False,
            "read_all": False,
            "extract_to_new_fd": False,
            "grep": False,
        },
    ),
    "fd_to_file": (
        Access.WRITE,
        {"fd": True, "file_path": True, "mode": False, "create": False, "exist_ok": False},
    ),
    "write_stderr": (Access.READ, {"message": True}),
}
"""Names, access levels and arguments (required or not), as users and models know them."""

LEAST = {
    "prompts": ["a"],
    "prompt": "a",
    "pid": 7,
    "message": "a",
    "position": "m1",
    "fd": "fd:3",
    "file_path": "a",
}


def schema(name):
    return json.loads(trap.offer(name).input_schema)


def least(name):
    """The fewest arguments a call can have."""
    return {key: LEAST[key] for key, required in CONTRACT[name][1].items() if required}


def parse(name, **arguments):
    return trap.parse(trap.TRAPS[name][0], msgspec.json.encode(arguments))


def test_the_traps_are_those_of_the_contract():
    assert set(trap.TRAPS) == set(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
def test_a_trap_offers_the_arguments_of_the_contract(name):
    access, arguments = CONTRACT[name]
    offered = trap.offer(name)
    assert offered.access is access
    assert set(schema(name)["properties"]) == set(arguments)
    assert set(schema(name)["required"]) == {key for key, required in arguments.items() if required}
    assert schema(name)["additionalProperties"] is False


@pytest.mark.parametrize("name", CONTRACT)
def test_the_strict_endpoint_accepts_each_offer(name):
    offered = trap.offer(name)
    tool = {"name": name, "description": offered.description, "input_schema": schema(name)}
    request = {
        "model": "m",
        "max_tokens": 10,
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [tool],
    }
    script_rules.check_create(request)


def references(value):
    if isinstance(value, dict):
        yield from (key for key in value if key == "$ref")
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


@pytest.mark.parametrize("name", CONTRACT)
def test_a_schema_stands_alone(name):
    """A reference to a definition that is not sent would leave the model guessing."""
    assert list(references(schema(name))) == []


@pytest.mark.parametrize("name", CONTRACT)
def test_the_description_is_one_paragraph_of_whole_sentences(name):
    said = trap.offer(name).description
    assert said.endswith(".")
    assert "\n" not in said
    assert "  " not in said


@pytest.mark.parametrize("name", CONTRACT)
def test_the_fewest_arguments_are_enough(name):
    made = parse(name, **least(name))
    for key, value in least(name).items():
        assert getattr(made, key) == value


@pytest.mark.parametrize("name", CONTRACT)
def test_an_unknown_argument_is_named(name):
    with pytest.raises(ToolError, match="verbose"):
        parse(name, **least(name), verbose=True)


@pytest.mark.parametrize(
    ("name", "missing"), [(name, key) for name, (_, keys) in CONTRACT.items() for key in keys if keys[key]]
)
def test_a_missing_argument_is_named(name, missing):
    given = least(name)
    del given[missing]
    with pytest.raises(ToolError, match=missing):
        parse(name, **given)


@pytest.mark.parametrize(
    ("name", "wrong", "named"),
    [
        ("fork", {"prompts": []}, "prompts"),
        ("fork", {"prompts": ["x"] * 11}, "prompts"),
        ("fork", {"prompts": "x"}, "prompts"),
        ("fork", {"prompts": [3]}, "prompts"),
        ("fork", {"prompts": None}, "prompts"),
        ("wait", {"pids": ["7"]}, "pids"),
        ("wait", {"timeout_s": -1}, "timeout_s"),
        ("kill", {"pid": "7"}, "pid"),
        ("kill", {"pid": 7.5}, "pid"),
        ("exit", {"status": 124}, "status"),
        ("exit", {"status": -1}, "status"),
        ("read_fd", {"fd": 3}, "fd"),
        ("read_fd", {"mode": "paragraph"}, "mode"),
        ("read_fd", {"start": -1}, "start"),
        ("read_fd", {"count": 0}, "count"),
        ("read_fd", {"read_all": "yes"}, "read_all"),
        ("fd_to_file", {"mode": "prepend"}, "mode"),
        ("spawn", {"wait": 1}, "wait"),
    ],
)
def test_a_wrong_value_is_named(name, wrong, named):
    with pytest.raises(ToolError) as caught:
        parse(name, **{**least(name), **wrong})
    assert str(caught.value).startswith("Invalid arguments: ")
    assert f"$.{named}" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"{", b"[]", b"3", b'"x"', b"null", b'{"message": "\xff"}', b'{"message": "\\ud800"}', b"[" * 5000],
)
@pytest.mark.parametrize("name", CONTRACT)
def test_what_is_no_object_is_refused_in_words(name, data):
    """Whatever bytes a model's arguments are, its call has an answer."""
    with pytest.raises(ToolError, match=r"^Invalid arguments: "):
        trap.parse(trap.TRAPS[name][0], data)


def test_no_arguments_at_all_are_an_empty_object():
    assert trap.parse(trap.ExitTool, b"") == trap.ExitTool(status=0, message="")
    assert trap.parse(trap.WaitTool, b"").pids == []
