"""Bodies as bytes: equal paths, equal bytes."""

import itertools
import json

import pytest
from bodykit import tool_results, user_text
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import MessageId, ToolUseId
from llmprocd.kernel import proc
from llmprocd.kernel.state import Image, Node, ToolResult
from llmprocd.model.body import Transcript, changed, counted, diagnostics, prefix

THINKS = b'{"type":"thinking","thinking":"hm","signature":"s"}'
REDACTED = b'{"type":"redacted_thinking","data":"x"}'
SAID = b'{ "type":"text", "text":"verbatim \\u00e9" }'
ASKS = b'{"type":"tool_use","id":"t1","name":"bash","input":{ }}'


def node(role, body, model="m", thinks=False):
    return Node(id=MessageId(1), parent=None, role=role, body=body, model=model, thinks=thinks)


def image(model="m", caching=True):
    before, after = prefix(model, {"max_tokens": 5}, "be good", [], caching)
    return Image("p", "", model, "script", before, after, caching=caching)


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


def test_no_content_and_no_messages():
    """Nothing empty is sent, and an empty path is an empty list."""
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


# --- cache markers ----------------------------------------------------------------------------------

MARK = b',"cache_control":{"type":"ephemeral"}'


def words(text):
    """A user's own words."""
    return Node(MessageId(1), None, "user", user_text(text), text=True)


def said(*texts):
    return node("assistant", b",".join(user_text(text) for text in texts))


def asks(count):
    blocks = (b'{"type":"tool_use","id":"t%d","name":"bash","input":{}}' % i for i in range(count))
    return node("assistant", b",".join(blocks))


def results(count, text=""):
    """The answers of some calls, and beside them a text."""
    answers = tool_results([ToolResult(ToolUseId(f"t{i}"), "x") for i in range(count)])
    body = answers + b"," + user_text(text) if text else answers
    return Node(MessageId(1), None, "user", body, text=bool(text))


def marked(*nodes, tools=True, caching=True):
    """Where the markers stand: a tool, the system prompt, message.block counted from 0, and the end."""
    offered = [{"name": "bash", "description": "d", "input_schema": {"type": "object"}}] if tools else []
    before, after = prefix("m", {"max_tokens": 5}, "be good", offered, caching)
    whole = image(caching=caching)
    whole = replace(whole, prefix=before, suffix=after)
    body = json.loads(b"".join(Transcript.of(nodes, "m").pieces(whole)))
    found = ["tool"] if "cache_control" in body.get("tools", [{}])[-1] else []
    found += ["system"] if "cache_control" in body["system"][0] else []
    for i, message in enumerate(body["messages"]):
        found += [f"{i}.{j}" for j, block in enumerate(message["content"]) if "cache_control" in block]
    return [*found, "end"] if "cache_control" in body else found


def test_the_first_message_needs_no_marker_of_its_own():
    """Tools, system prompt and the end."""
    assert marked(words("a")) == ["tool", "system", "end"]


def test_what_stands_before_the_last_text_is_marked():
    """Siblings of a fork share it."""
    assert marked(words("a"), said("b"), words("c")) == ["tool", "system", "1.0", "end"]
    assert marked(words("a"), words("b")) == ["tool", "system", "0.0", "end"]
    assert marked(words("a"), asks(2), results(2, "task")) == ["tool", "system", "2.1", "end"]


def test_tool_results_alone_need_none():
    """Looking back from the end finds the request before."""
    assert marked(words("a"), asks(2), results(2)) == ["tool", "system", "end"]


@pytest.mark.parametrize(("calls", "far"), [(9, False), (10, True), (40, True)])
def test_the_request_before_is_marked_when_it_is_out_of_sight(calls, far):
    """Looking back spans 20 blocks."""
    assert marked(words("a"), asks(calls), results(calls)) == ["tool", "system", *["0.0"] * far, "end"]


def test_with_both_the_tool_goes_without():
    """Four markers are the most; the system prompt's covers the tools."""
    assert marked(words("a"), asks(12), results(12, "task")) == ["system", "0.0", "2.11", "end"]
    assert marked(words("a"), said(*"abcdefghijklmnopqrst"), words("c")) == ["system", "0.0", "1.19", "end"]


def test_the_answers_to_forks_are_left_to_differ():
    """Parent and children share what was answered before them; the words are the kernel's own."""
    own, other = proc.YOU_ARE_THE_CHILD, "made by your parent: pids 7, 8"
    answers = [ToolResult(ToolUseId(f"t{i}"), text) for i, text in enumerate(["x", own, other])]
    child = Node(MessageId(1), None, "user", tool_results(answers) + b"," + user_text("task"), text=True)
    assert marked(words("a"), asks(3), child) == ["tool", "system", "2.0", "end"]
    alone = Node(MessageId(1), None, "user", tool_results(answers[1:]) + b"," + user_text("t"), text=True)
    assert marked(words("a"), asks(2), alone) == ["tool", "system", "1.1", "end"]


def test_a_notice_is_no_text_of_its_own():
    """What siblings share ends before their task, also for one that is told how full its window is."""
    notice = words("<context_notice>full</context_notice>")
    assert marked(words("a"), said("b"), words("c"), notice) == ["tool", "system", "1.0", "end"]


def test_what_cannot_carry_a_marker_gets_none():
    """Thinking, and kinds that are not known here."""
    for last in (THINKS, b'{"type":"hologram"}'):
        answer = node("assistant", SAID + b"," + last)
        assert marked(words("a"), answer, words("b")) == ["tool", "system", "end"]


def test_without_caching_nothing_is_marked():
    """Not one byte of it."""
    assert marked(words("a"), asks(12), results(12, "task"), caching=False) == []


def test_markers_change_no_other_byte():
    """Taken out, they leave the joined nodes."""
    nodes = [words("a"), asks(12), results(12, "task")]
    pieces = Transcript.of(nodes, "m").pieces(image())
    bare = Transcript.of(nodes, "m").pieces(image(caching=False))
    assert b"".join(pieces).replace(MARK, b"") == b"".join(bare)


def test_what_a_request_says_for_itself_stands_at_its_end():
    """The members of one request come after all that is the path's."""
    body = b"".join(Transcript.of([words("a")], "m").pieces(image(), diagnostics("msg_1")))
    assert json.loads(body)["diagnostics"] == {"previous_message_id": "msg_1"}
    assert body.endswith(b',"diagnostics":{"previous_message_id":"msg_1"}}')


def test_only_what_can_be_counted_is_sent_to_be_counted():
    """No max_tokens, no stream, no marker of the end."""
    body = json.loads(counted(Transcript.of([words("a")], "m").pieces(image())))
    assert sorted(body) == ["messages", "model", "system"]


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("", {"parameters": {"max_tokens": 9}}),
        ("model", {"model": "n"}),
        ("tools", {"tools": [{"name": "b"}]}),
        ("system", {"system": "t"}),
        ("settings", {"parameters": {"thinking": {"type": "adaptive"}}}),
    ],
)
def test_what_two_programs_do_not_share_is_named(part, other):
    """The first that precedes the rest of the prompt."""

    def made(model="m", parameters=None, system="s", tools=({"name": "a"},)):
        before, after = prefix(model, parameters or {"max_tokens": 5}, system, list(tools), True)
        return Image("p", "", model, "script", before, after)

    assert changed(made(), made(**other)) == part
