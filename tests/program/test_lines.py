"""Where keys stand in TOML."""

import tomllib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmprocd.program import lines


def paths(value: Any, key: lines.Key = ()) -> set[lines.Key]:
    """Every way into a parsed document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: set[lines.Key] = {key} if key else set()
    for name, item in items:
        found |= paths(item, (*key, name))
    return found


EVERYTHING = '''#!/usr/bin/env -S x
# [not.a.table]
top = 1  # trailing [comment]
"quoted \\"key\\"" = "a ] } # b"
'literal.key' = 'c:\\'
date = 1979-05-27 07:32:00
[ a . b ]
text = """
x = 1
[no]
\\""" still "" here""""
raw = \'\'\'
it\'s [no] \'\'\'\'
x.y."z w" = { p = [1, {q = "}"}], r.s = true, e = {} }
list = [
  "one", # , ]
  [ ["deep"], ],
  { k = 1 },
]
[[many]]
n = 1
[many.sub]
m = 1
[[many]]
[[many.inner]]
v = 1
[[many.inner]]
v = 2
[last]'''


def test_every_key_of_a_document_that_uses_everything_is_found():
    """The scanner finds the paths that the parser finds, and no others."""
    assert set(lines.find(EVERYTHING)) == paths(tomllib.loads(EVERYTHING))


@pytest.mark.parametrize(
    ("key", "line"),
    [
        (("top",), 3),
        (('quoted "key"',), 4),
        (("a",), 7),
        (("a", "b", "raw"), 12),
        (("a", "b", "x", "y", "z w", "p", 1, "q"), 14),
        (("a", "b", "list", 1, 0, 0), 17),
        (("a", "b", "list", 2, "k"), 18),
        (("many",), 20),
        (("many", 0, "sub", "m"), 23),
        (("many", 1, "inner", 1, "v"), 28),
        (("last",), 29),
    ],
)
def test_a_key_has_the_line_it_stands_on(key, line):
    """Strings of many lines, comments and nested tables do not shift the count."""
    assert lines.find(EVERYTHING)[key] == line


NAME = st.sampled_from(["a", "b", "c", '"q.r"', "'l # t'"])
SCALAR = st.sampled_from(
    ["1", "-2.5e3", "true", '"s\\"]"', "'l}'", '"""m\n"x" \\""""', "'''n\n[x]'''", "07:32:00"]
)
VALUE = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: "[\n" + ", # c ]\n".join(items) + "\n]"),
        st.dictionaries(NAME, inner, max_size=3).map(
            lambda items: "{ " + ", ".join(f"{name} = {item}" for name, item in items.items()) + " }"
        ),
    ),
    max_leaves=6,
)
STATEMENT = st.one_of(
    st.tuples(st.lists(NAME, min_size=1, max_size=3), VALUE).map(
        lambda pair: f"{'.'.join(pair[0])} = {pair[1]}"
    ),
    st.lists(NAME, min_size=1, max_size=3).map(lambda names: f"[{' . '.join(names)}]"),
    st.lists(NAME, min_size=1, max_size=2).map(lambda names: f"[[{'.'.join(names)}]] # x"),
    st.just("# [c]\n"),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STATEMENT, max_size=6).map("\n".join))
def test_the_scanner_agrees_with_the_parser_on_any_document(text):
    """Whatever tomllib accepts has the same paths here."""
    try:
        expected = paths(tomllib.loads(text))
    except tomllib.TOMLDecodeError:
        return
    assert set(lines.find(text)) == expected
