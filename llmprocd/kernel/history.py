"""Nodes: how content becomes bytes, and back.

Law: a message is encoded once in its life, here or by the model that wrote it.
"""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from llmprocd.abi.types import MessageId
from llmprocd.kernel.state import Kernel, Node, ToolResult

_encode = msgspec.json.encode
_BLOCKS = msgspec.json.Decoder(list[dict[str, Any]])


class _Text(msgspec.Struct, tag_field="type", tag="text"):
    text: str


class _Result(msgspec.Struct, tag_field="type", tag="tool_result", omit_defaults=True):
    tool_use_id: str
    content: str
    is_error: bool = False


def text_block(text: str) -> bytes:
    """A text block as JSON."""
    return _encode(_Text(text))


def result_block(result: ToolResult) -> bytes:
    """A tool_result block as JSON; the API refuses an empty text, so that one says so."""
    return _encode(_Result(result.id, result.text if result.text.strip() else "(no output)", result.is_error))


def blocks(node: Node) -> list[dict[str, Any]]:
    """The content of a node, decoded."""
    return _BLOCKS.decode(b"[" + node.body + b"]")


def content(node: Node) -> str:
    """The content of a node as JSON text."""
    return "[" + node.body.decode() + "]"


def text(node: Node) -> str:
    """The text blocks of a node, joined."""
    return "".join(block["text"] for block in blocks(node) if block.get("type") == "text")


def user_node(
    k: Kernel,
    parent: MessageId | None,
    said: str = "",
    results: Sequence[ToolResult] = (),
    *,
    marked: bool = False,
) -> Node:
    """Add a user message: tool results first, then what was said.

    `marked` puts the message's own id before the text, for a model that can `goto` there.
    """
    number = MessageId(k.take("message"))
    parts = [result_block(result) for result in results]
    if said:
        parts.append(text_block(f"[m{number}] {said}" if marked else said))
    node = Node(id=number, parent=parent, role="user", body=b",".join(parts), at=k.now, text=bool(said))
    return k.add_node(node)


_MARK = re.compile(r"\A\[m\d+\] ")


def unmarked(said: str) -> str:
    """What a user said, without the id in front."""
    return _MARK.sub("", said)
