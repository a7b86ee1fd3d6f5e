"""The simulated prompt cache: what is read, what is created, what is forgotten."""

import json

import pytest

from llmprocd.model import script_cache
from llmprocd.model.script_cache import PromptCache

MARK = {"type": "ephemeral"}
HOUR = {"type": "ephemeral", "ttl": "1h"}
BIG = "x" * 4096


def block(text=BIG, mark=None):
    return {"type": "text", "text": text} | ({"cache_control": mark} if mark else {})


def body(*content, **fields):
    return json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": list(content)}], **fields}
    ).encode()


def use(cache, data, now=0.0):
    prompt = script_cache.prompt_of(data)
    usage = cache.use(prompt, now)
    total = usage.input_tokens + usage.read + usage.created_5m + usage.created_1h
    assert total == prompt.tokens
    return usage


def test_without_a_marker_nothing_is_kept():
    """All tokens are plain input, each time."""
    cache = PromptCache()
    for _ in range(2):
        usage = use(cache, body(block()))
        assert (usage.read, usage.created_5m) == (0, 0)


def test_a_marked_prefix_is_created_and_then_read():
    """What follows the marker stays plain input."""
    cache = PromptCache()
    first = use(cache, body(block(mark=MARK), block("tail")))
    second = use(cache, body(block(mark=MARK), block("other")))
    assert first.created_5m == second.read > 1024
    assert second.created_5m == 0
    assert second.input_tokens == script_cache.count(json.dumps(block("other")).encode())


def test_the_automatic_marker_moves_along():
    """Each turn reads what the turn before created, although the top-level marker is at another block."""
    cache, content = PromptCache(), [block()]
    before = use(cache, body(*content, cache_control=MARK))
    for i in range(5):
        content.append(block(f"turn {i} " + BIG))
        usage = use(cache, body(*content, cache_control=MARK))
        assert usage.read == before.read + before.created_5m
        assert usage.input_tokens == 0
        before = usage


def test_a_marker_that_moves_costs_nothing_but_any_other_byte_does():
    """Prefixes are compared without cache_control, wherever it stands in a block; all else is exact."""
    cache = PromptCache()
    use(cache, body(block(mark=MARK), block("b", mark=MARK)))
    assert use(cache, body(block(), block("b", mark=HOUR))).read > 1024
    first_key = {"cache_control": MARK, "type": "text", "text": BIG}
    assert use(cache, body(first_key, block("b", mark=MARK))).read > 1024
    assert use(cache, body(block(BIG + "y", mark=MARK))).read == 0
    spaced = body(block(mark=MARK)).replace(b'"type": "text"', b'"type":  "text"')
    assert use(cache, spaced).read == 0


def test_a_string_is_one_text_block():
    """Both spellings of a message are the same prefix."""
    cache = PromptCache()
    data = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": BIG}], "cache_control": MARK},
        separators=(",", ":"),
    )
    use(cache, data.encode())
    as_block = json.dumps(
        json.loads(data) | {"messages": [{"role": "user", "content": [block()]}]}, separators=(",", ":")
    )
    assert use(cache, as_block.encode()).read > 1024


def test_text_that_speaks_of_cache_control_is_no_marker():
    """Quoted JSON inside a text is text."""
    cache = PromptCache()
    data = body(block(BIG + json.dumps({"cache_control": MARK})))
    use(cache, data)
    assert use(cache, data).read == 0


def test_less_than_512_tokens_is_never_kept():
    """Silently, as the API does it."""
    cache = PromptCache()
    size = 512 * 4 - len(json.dumps(block("")))
    for text, created in (("x" * (size - 4), 0), ("x" * size, 512)):
        assert use(cache, body(block(text, mark=MARK))).created_5m == created


@pytest.mark.parametrize(("behind", "read"), [(19, True), (20, False)])
def test_a_breakpoint_looks_back_over_20_blocks(behind, read):
    """Itself included; what lies further back is not found."""
    cache = PromptCache()
    use(cache, body(block(), cache_control=MARK))
    more = [block(str(i)) for i in range(behind)]
    assert (use(cache, body(block(), *more, cache_control=MARK)).read > 0) is read


@pytest.mark.parametrize(("mark", "life"), [(MARK, 300), (HOUR, 3600)])
def test_entries_live_from_their_last_use(mark, life):
    """Five minutes or an hour, and reading starts the time again."""
    cache, data = PromptCache(), body(block(mark=mark))
    use(cache, data, 0)
    assert use(cache, data, life - 1).read > 0
    assert use(cache, data, 2 * life - 2).read > 0
    assert use(cache, data, 3 * life).read == 0


def test_both_lifetimes_are_told_apart():
    """What is created up to the last hour's marker is the hour's, the rest is the five minutes'."""
    usage = use(PromptCache(), body(block(mark=HOUR), block("b" + BIG, mark=MARK), block("c")))
    assert usage.created_1h == pytest.approx(usage.created_5m, abs=20)
    assert usage.input_tokens > 0


def test_models_tools_and_settings_have_caches_of_their_own():
    """The order is tools, system, messages: a change in front costs everything behind it."""
    tools = [{"name": "a", "input_schema": {"type": "object"}, "cache_control": MARK, "description": BIG}]
    cache = PromptCache()
    full = use(cache, body(block(mark=MARK), system="s", tools=tools)).created_5m
    assert use(cache, body(block(mark=MARK), system="s", tools=tools)).read == full
    part = use(cache, body(block(mark=MARK), system="t", tools=tools))
    assert 1024 < part.read < full
    assert (
        use(cache, body(block(mark=MARK), system="s", tools=tools, tool_choice={"type": "any"})).read
        == part.read
    )
    assert use(cache, body(block(mark=MARK), system="s", tools=tools, model="n")).read == 0


def test_the_automatic_marker_passes_over_thinking():
    """A thinking block cannot end a cached prefix."""
    messages = [
        {"role": "user", "content": BIG},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": BIG, "signature": "s"}]},
    ]
    data = json.dumps({"model": "m", "messages": messages, "cache_control": MARK}).encode()
    usage = use(PromptCache(), data)
    assert usage.created_5m == pytest.approx(usage.input_tokens, abs=20)
