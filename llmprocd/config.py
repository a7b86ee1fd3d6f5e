"""Config: frozen, from one TOML file."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.kernel import limits
from llmprocd.kernel.state import NANO, Limit
from llmprocd.keys import Source
from llmprocd.model import pricing
from llmprocd.model.pricing import Price, Prices

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Dollars = Annotated[float, msgspec.Meta(ge=0, le=1_000_000)]
KEY_PLACES = "api_key_env, api_key_file or api_key_credential"
LOCAL_SLOTS = 1
"""Answers at once of the local model. With more, children of a fork would begin side by side, and all but one
read the whole prompt first: one after another takes a fifth of the time (measured)."""


class EndpointTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One endpoint: where its key is, and what may be asked of it.

    Its name is its URL, or its provider's for a provider's own (`anthropic` is the default one).
    """

    api_key_env: str = ""  # a variable of the daemon's
    api_key_file: str = ""  # a file that nobody else can read; absolute
    api_key_credential: str = ""  # a systemd credential (LoadCredential=)
    platform_credentials: bool = (
        False  # a cloud's endpoint at this URL may be asked with the daemon's account
    )
    slots: Positive | None = None  # model calls at once
    rpm: Positive | None = None  # requests in a minute
    itpm: Positive | None = None  # input tokens in a minute, those read from a cache not counted
    otpm: Positive | None = None  # output tokens in a minute


class PriceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model costs, in dollars for a million tokens; of a web search, in dollars for a thousand."""

    input: Dollars
    output: Dollars
    cache_read: Dollars | None = None  # a tenth of input
    cache_write: Dollars | None = None  # 1.25 times input
    cache_write_1h: Dollars | None = None  # twice input
    search: Dollars | None = None


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator can set."""

    endpoints: dict[str, EndpointTable] = {}
    slots: Positive = 50  # model calls at once, an endpoint
    retries: Annotated[int, msgspec.Meta(ge=0)] = 8  # of one model call
    retry_s: Seconds = 300.0  # for so long at most
    stall_s: Seconds = 120.0  # without a byte from the model
    call_s: Seconds = 3600.0  # of one model call, however much it sends
    tool_timeout_s: Seconds = 600.0  # of one tool call
    limits: dict[str, Any] = {}  # of each tree of processes, as in a program's [limits]
    prices: dict[str, PriceTable] = {}  # by model
    windows: dict[str, Positive] = {}  # tokens that a model's prompt may have, by its name
    max_procs: Positive = 100_000  # living ones
    keep_days: Seconds = 7.0  # ended processes
    keep_ended: Positive = 10_000


def load(path: str) -> Config:
    """Read a config file; an empty path is the defaults.

    Raises ENOEXEC with the file and what is wrong in it.
    """
    if not path:
        return Config()
    try:
        found = msgspec.convert(tomllib.loads(Path(path).read_text(encoding="utf-8")), Config)
        limits.parse_all(found.limits)
        _check(found.endpoints)
    except OSError as error:
        raise KernelError(Errno.ENOENT, f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise KernelError(Errno.ENOEXEC, f"{path}: {_fault(str(error))}") from None
    except KernelError as error:
        raise KernelError(Errno.ENOEXEC, f"{path}: {error.text}") from None
    return found


def tree_limits(config: Config) -> dict[str, Limit]:
    """The limits of each tree of processes: those of the config, else some that a runaway meets."""
    return {**limits.DEFAULTS, **limits.parse_all(config.limits)}


def local_slots(config: Config) -> int:
    """How many answers the local model's server gives at once."""
    return config.endpoints.get("local", EndpointTable()).slots or LOCAL_SLOTS


def prices(config: Config) -> Prices:
    """What models cost: as the config says, else as the table does."""
    return Prices({model: _price(table) for model, table in config.prices.items()})


def _fault(text: str) -> str:
    """A decoder's words as an operator reads them: the key first."""
    text, _, where = text.partition(" - at `$.")
    for theirs, ours in (("Object contains unknown field", "unknown key"), ("Expected `", "must be `")):
        text = text.replace(theirs, ours)
    return f"{where.rstrip('`')}: {text}" if where else text


def _price(table: PriceTable) -> Price:
    search = None if table.search is None else round(table.search * NANO / 1000)
    made = pricing.price(
        table.input,
        table.output,
        cache_read=table.cache_read,
        cache_write=table.cache_write,
        cache_write_1h=table.cache_write_1h,
    )
    return made if search is None else msgspec.structs.replace(made, search=search)


def key_sources(config: Config) -> Mapping[str, Source]:
    """Where each endpoint's key is."""
    return {
        name: Source(
            table.api_key_env, table.api_key_file, table.api_key_credential, table.platform_credentials
        )
        for name, table in config.endpoints.items()
    }


def key_variables(config: Config) -> Mapping[str, str]:
    """The variable that holds each endpoint's key."""
    return {url: endpoint.api_key_env for url, endpoint in config.endpoints.items() if endpoint.api_key_env}


def _check(endpoints: Mapping[str, EndpointTable]) -> None:
    for name, table in endpoints.items():
        if sum(map(bool, (table.api_key_env, table.api_key_file, table.api_key_credential))) > 1:
            raise KernelError(Errno.ENOEXEC, f'endpoints."{name}": a key has one place: {KEY_PLACES}')
        if table.api_key_file and not table.api_key_file.startswith("/"):
            raise KernelError(Errno.ENOEXEC, f'endpoints."{name}".api_key_file: must be an absolute path')
        if "/" in table.api_key_credential:
            raise KernelError(Errno.ENOEXEC, f'endpoints."{name}".api_key_credential: must be a name')
