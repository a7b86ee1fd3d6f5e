"""How many tokens a prompt may have.

What the operator's config says holds first, then what the endpoint itself has said (GET /v1/models), then
this table, which is as old as its date. Of a model that is in none of them the window is not known: nothing
is guessed then.
"""

AS_OF = "2026-11-20"

TABLE = {  # the longest beginning of a name that is here counts
    "claude-haiku-4-5": 200_000,
    "claude-haiku-5": 200_000,
    "claude-sonnet-4-5": 200_000,
    "claude-sonnet-4-6": 1_000_000,
    "claude-sonnet-5": 1_000_000,
    "claude-opus-4-5": 200_000,
    "claude-opus-4-6": 1_000_000,
    "claude-opus-4-7": 1_000_000,
    "claude-opus-4-8": 1_000_000,
    "claude-opus-5": 1_000_000,
    "claude-fable-5": 1_000_000,
    "claude-mythos": 1_000_000,
}


def in_table(model: str) -> int | None:
    """The window of a model by its name, a cloud's too; None for one that is not in the table."""
    known = model.rpartition("anthropic.")[2]  # as in eu.anthropic.claude-...
    names = [name for name in TABLE if known.startswith(name)]
    return TABLE[max(names, key=len)] if names else None


class Windows:
    """What endpoints have said of their models, and what they do not have."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], int] = {}
        self._asked: set[str] = set()
        self._lacks: set[tuple[str, str]] = set()

    def of(self, endpoint: str, model: str) -> int | None:
        """The window of a model at an endpoint, in tokens."""
        return self._said.get((endpoint, model)) or in_table(model)

    def learn(self, endpoint: str, windows: dict[str, int]) -> None:
        """Take over what an endpoint has said."""
        self._said.update({(endpoint, model): window for model, window in windows.items()})

    def to_be_asked(self, endpoint: str) -> bool:
        """True once for each endpoint."""
        new = endpoint not in self._asked
        self._asked.add(endpoint)
        return new

    def has(self, endpoint: str, what: str) -> bool:
        """Whether an endpoint may have something: false once it has said that it has not."""
        return (endpoint, what) not in self._lacks

    def lacks(self, endpoint: str, what: str) -> None:
        """An endpoint does not have that."""
        self._lacks.add((endpoint, what))
