"""Request bodies against an OpenAPI file of the Messages API that others wrote (llm-comply carries it)."""

import importlib.resources
import json
import warnings
from functools import cache
from typing import Any

MOST = 12
"""Bodies that are looked at after each test; the last are the longest conversations."""

LONGEST = 200_000
"""Characters of a body that is looked at: the validator is slow."""


NEWER = ("diagnostics", "thread")
"""Fields of the API, and of the SDK's own types, that are younger than that file."""


@cache
def spec() -> Any:
    import llm_comply

    return llm_comply.SpecLoader(str(importlib.resources.files(llm_comply) / "specs" / "anthropic.json"))


def faults(bodies: list[str]) -> list[str]:
    """What the schema says against them."""
    found: list[str] = []
    for body in [body for body in bodies if len(body) <= LONGEST][-MOST:]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it resolves references in an older way
            value = json.loads(body)
            for name in NEWER:
                value.pop(name, None)
            found += spec().validate(value, "CreateMessageParams")
    return found
