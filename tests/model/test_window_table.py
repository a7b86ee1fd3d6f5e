"""How many tokens a prompt may have: the table, and what endpoints say."""

import pytest

from llmprocd.model.windows import Windows, in_table


@pytest.mark.parametrize(
    ("model", "window"),
    [
        ("claude-sonnet-4-5-20250929", 200_000),
        ("claude-sonnet-4-6", 1_000_000),
        ("claude-sonnet-5-5", 1_000_000),
        ("claude-haiku-4-5", 200_000),
        ("qwen2.5-coder", None),
        ("", None),
    ],
)
def test_the_table_knows_families(model, window):
    """By the longest beginning of the name; of others nothing is guessed."""
    assert in_table(model) == window


def test_what_an_endpoint_says_holds_over_the_table():
    """For this endpoint; another may have another window for the same name."""
    windows = Windows()
    windows.learn("here", {"claude-haiku-4-5": 5})
    assert windows.of("here", "claude-haiku-4-5") == 5
    assert windows.of("there", "claude-haiku-4-5") == 200_000


def test_an_endpoint_is_asked_once():
    """And what it does not have is not asked for again."""
    windows = Windows()
    assert [windows.to_be_asked(name) for name in ("a", "a", "b")] == [True, False, True]
    assert windows.has("a", "count_tokens")
    windows.lacks("a", "count_tokens")
    assert not windows.has("a", "count_tokens")
    assert windows.has("b", "count_tokens")
