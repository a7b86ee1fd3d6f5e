"""Content to bytes and back."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from kernelkit import UNHURRIED, World

from llmprocd.abi.types import MessageId, ToolUseId
from llmprocd.kernel import history
from llmprocd.kernel.state import At, Kernel, Node, ToolResult, ToolUse, kind

texts = st.text(st.characters(exclude_categories=["Cs"]))


def result(number: int, text: str, *, is_error: bool = False) -> ToolResult:
    return ToolResult(ToolUseId(f"toolu_{number}"), text, is_error)


@UNHURRIED
@given(texts)
def test_a_text_block_holds_the_text(text):
    """Any text comes back as it was."""
    assert msgspec.json.decode(history.text_block(text)) == {"type": "text", "text": text}


@UNHURRIED
@given(texts, st.booleans())
def test_a_result_block_holds_the_answer(text, is_error):
    """The text as it is, but never a blank one, which the API refuses; is_error only where there is one."""
    block = msgspec.json.decode(history.result_block(result(1, text, is_error=is_error)))
    assert block.pop("is_error", False) == is_error
    assert block == {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": text if text.strip() else "(no output)",
    }


def test_a_result_that_is_no_error_does_not_say_so():
    """Equal answers give equal bytes, with nothing in them that is the default."""
    assert b"is_error" not in history.result_block(result(1, "x"))


def test_a_user_message_has_results_first_then_words():
    """The API wants the answers to calls before anything else."""
    k = Kernel()
    k.now = 5.0
    node = history.user_node(k, MessageId(9), "and now?", [result(1, "a"), result(2, "b", is_error=True)])
    assert [block["type"] for block in history.blocks(node)] == ["tool_result", "tool_result", "text"]
    assert (node.id, node.parent, node.role, node.at, node.text) == (1, 9, "user", 5.0, True)
    assert k.change.nodes == [node]


def test_answers_alone_are_not_a_users_words():
    """What only answers calls is told apart from what somebody said."""
    node = history.user_node(Kernel(), MessageId(9), "", [result(1, "a")])
    assert not node.text
    assert history.text(node) == ""


def test_a_marked_message_carries_its_own_id():
    """A model that can goto sees where to."""
    w = World()
    first, second = history.user_node(w.k, None, "one", marked=True), history.user_node(w.k, None, "two")
    assert history.text(first) == f"[m{first.id}] one"
    assert history.text(second) == "two"
    assert history.unmarked(history.text(first)) == "one"
    twice = history.user_node(w.k, None, "[m7] one", marked=True)
    assert history.unmarked(history.text(twice)) == "[m7] one"


@UNHURRIED
@given(texts)
def test_unmarked_takes_away_one_mark_and_nothing_else(text):
    """What the user wrote stays, even if it looks like a mark."""
    node = history.user_node(Kernel(), None, text or "x", marked=True)
    assert history.unmarked(history.text(node)) == (text or "x")


def test_results_alone_are_never_marked():
    """A mark stands before words only."""
    node = history.user_node(Kernel(), MessageId(1), "", [result(1, "a")], marked=True)
    assert b"[m" not in node.body


def test_content_is_the_body_as_a_list():
    """The stored bytes, in brackets: nothing is encoded again."""
    body = b'{"type":"text","text":"a"},{"type":"odd","x":[1, 2]}'
    node = Node(MessageId(1), None, "assistant", body)
    assert history.content(node).encode() == b"[" + body + b"]"
    assert history.blocks(node)[1] == {"type": "odd", "x": [1, 2]}
    assert history.text(node) == "a"


def test_text_joins_only_text_blocks():
    """Thinking and calls are not what was said."""
    body = b'{"type":"thinking","thinking":"hm"},{"type":"text","text":"a"},{"type":"text","text":"b"}'
    assert history.text(Node(MessageId(1), None, "assistant", body)) == "ab"


def test_each_kind_of_node_is_a_place_to_stand():
    """What a head is follows from the node alone."""

    def node(role, **more):
        return Node(MessageId(1), None, role, b"", **more)

    call = ToolUse(ToolUseId("a"), "bash", b"{}")
    assert kind(None) is At.EMPTY
    assert kind(node("user")) is At.USER
    assert kind(node("assistant", stop_reason="end_turn")) is At.DONE
    assert kind(node("assistant", stop_reason="pause_turn")) is At.PAUSE
    assert kind(node("assistant", stop_reason="pause_turn", asks=(call,))) is At.ASKS
