"""Bodies as bytes: equal paths, equal bytes."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import MessageId, ToolUseId
from llmprocd.kernel.state import Image, Node, ToolResult
from llmprocd.model.body import Transcript, prefix, tool_results, user_text

THINKS = b'{"type":"thinking","thinking":"hm","signature":"s"}'
REDACTED = b'{"type":"redacted_thinking","data":"x"}'
SAID = b'{ "type":"text", "text":"verbatim \\u00e9" }'
ASKS = b'{"type":"tool_use","id":"t1","name":"bash","input":{ }}'


def node(role, body, model="m", thinks=False):
    return Node(id=MessageId(1), parent=None, role=role, body=body, model=model, thinks=thinks)


def image(model="m", caching=True):
    before, after = prefix(model, {"max_tokens": 5}, "be good", [], caching)
    return Image(program="p", path="", model=model, provider="script", prefix=before, suffix=after)


def messages(*nodes, model="m"):
    return json.loads(b"".join(Transcript.of(nodes, model).pieces(image(model))))["messages"]


def test_a_prefix_holds_all_but_the_messages():
    """Model, parameters, system prompt and tools come before them, the moving cache marker after."""
    tools = [{"name": "bash", "description": "d", "input_schema": {"type": "object"}}]
    parameters = {
        "thinking": {"type": "adaptive"},
        "max_tokens": 9,
        "extra_headers": {"secret": "1"},
        "stream": False,
    }
    before, after = prefix("m", parameters, "sys", tools, True)
    assert json.loads(before + after) == {
        "model": "m",
        "max_tokens": 9,
        "thinking": {"type": "adaptive"},
        "system": [{"type": "text", "text": "sys", "cache_control": {"type": "ephemeral"}}],
        "tools": [*tools[:-1], tools[-1] | {"cache_control": {"type": "ephemeral"}}],
        "stream": True,
        "messages": [],
        "cache_control": {"type": "ephemeral"},
    }
    assert after.startswith(b"]")


def test_a_bare_prefix_is_bare():
    """Without a system prompt, tools and caching there is no trace of them."""
    before, after = prefix("m", {"max_tokens": 9}, "", [], False)
    assert json.loads(before + after) == {"model": "m", "max_tokens": 9, "stream": True, "messages": []}


def test_a_prefix_does_not_depend_on_the_order_of_parameters():
    """The same program gives the same bytes."""
    pairs = [("max_tokens", 9), ("thinking", {}), ("stop_sequences", ["x"])]
    assert prefix("m", dict(pairs), "s", [], True) == prefix("m", dict(reversed(pairs)), "s", [], True)


def test_a_programs_own_cache_marker_is_used():
    """`cache_control` among the parameters says how long to cache; it stands in the body once."""
    hour = {"type": "ephemeral", "ttl": "1h"}
    before, after = prefix("m", {"cache_control": hour}, "s", [], True)
    assert json.loads(before + after)["system"][0]["cache_control"] == hour
    assert after == b'],"cache_control":{"type":"ephemeral","ttl":"1h"}}'
    assert b"cache_control" not in prefix("m", {"cache_control": hour}, "s", [], False)[0]


@pytest.mark.parametrize("name", ["messages", "model", "system", "tools"])
def test_parameters_cannot_say_what_the_program_says(name):
    """A key that would stand twice is refused."""
    with pytest.raises(KernelError, match=name) as caught:
        prefix("m", {name: 1}, "", [], True)
    assert caught.value.errno is Errno.EINVAL


def test_neighbours_of_one_role_become_one_message():
    """Goto with a text, input after an interruption, a paused answer."""
    nodes = [node("user", user_text("a")), node("user", user_text("b")), node("assistant", SAID)]
    joined = messages(*nodes, node("assistant", ASKS), node("user", user_text("c")))
    assert [(m["role"], len(m["content"])) for m in joined] == [("user", 2), ("assistant", 2), ("user", 1)]


def test_results_come_first_in_their_message():
    """Tool results lead a message, whatever order its nodes are in, and keep their own order."""
    results = tool_results([ToolResult(ToolUseId(i), "x") for i in ("t1", "t2")])
    late = tool_results([ToolResult(ToolUseId("t3"), "x", is_error=True)])
    said = user_text('about "type":"tool_result"')
    for bodies in ([results, said, late], [said, results, late], [said + b"," + results, late]):
        content = messages(*(node("user", body) for body in bodies))[0]["content"]
        assert [part.get("tool_use_id") for part in content] == ["t1", "t2", "t3", None]


def test_another_models_thinking_is_left_out():
    """Only the model that signed thinking can read it; all other blocks keep their bytes."""
    body = b",".join([THINKS, SAID, REDACTED, ASKS])
    first = node("user", user_text("a"))
    own = Transcript.of([first, node("assistant", body, thinks=True)], "m")
    assert body in own.pieces(image())[1]
    other = Transcript.of([first, node("assistant", body, thinks=True)], "n").pieces(image("n"))[1]
    assert SAID + b"," + ASKS in other
    assert b"thinking" not in other


def test_a_node_that_held_nothing_else_is_left_out():
    """Then its neighbours meet, and become one message."""
    empty = node("assistant", THINKS, thinks=True)
    joined = messages(node("user", user_text("a")), empty, node("user", user_text("b")), model="n")
    assert [m["role"] for m in joined] == ["user"]


def test_a_transcript_is_for_one_model():
    """A program with another model needs a transcript of its own."""
    with pytest.raises(AssertionError, match="new transcript"):
        Transcript("m").pieces(image("n"))


def test_blank_text_and_no_messages():
    """Nothing blank is sent, and an empty path is an empty list."""
    assert user_text(" \n") == b""
    assert messages() == []
    assert messages(node("user", b"")) == []


BODIES = st.sampled_from(
    [
        ("user", user_text("hello")),
        ("user", user_text("😀")),
        ("assistant", SAID),
        ("assistant", THINKS + b"," + ASKS),
        ("assistant", THINKS),
        ("user", b""),
    ]
)
PATHS = st.lists(BODIES, max_size=12).map(
    lambda path: [node(*part, thinks=THINKS in part[1]) for part in path]
)


@given(PATHS, PATHS, st.sampled_from("mn"))
def test_equal_paths_are_equal_bytes_and_forks_go_on(path, more, model):
    """However a transcript came about, its bytes follow from the path; a child's begin with its parent's."""
    parent = Transcript.of(path, model)
    shown = parent.pieces(image(model))
    child = Transcript.of([*path, *more], model).pieces(image(model))
    assert child[1].startswith(shown[1])
    for each in more:
        parent.append(each)
    assert parent.pieces(image(model)) == child
    roles = [m["role"] for m in json.loads(b"".join(child))["messages"]]
    assert all(a != b for a, b in itertools.pairwise(roles))


def test_a_snapshot_does_not_change():
    """A body being sent is not touched by what is appended meanwhile."""
    transcript = Transcript.of([node("user", user_text("a"))], "m")
    pieces = transcript.pieces(image())
    before = b"".join(pieces)
    transcript.append(node("assistant", SAID))
    assert b"".join(pieces) == before
