"""Contents of messages, as the daemon makes them."""

from collections.abc import Sequence

from llmprocd.kernel import history
from llmprocd.kernel.state import ToolResult


def user_text(text: str) -> bytes:
    """A user's words."""
    return history.text_block(text)


def tool_results(results: Sequence[ToolResult]) -> bytes:
    """The answers to a message that asked for tools."""
    return b",".join(map(history.result_block, results))
