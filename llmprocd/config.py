"""Config: frozen, from one TOML file."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from llmprocd.abi.errno import Errno, KernelError

Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class EndpointKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pairs an endpoint with the variable that holds its key."""

    api_key_env: str


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an operator can set."""

    endpoints: dict[str, EndpointKey] = {}
    slots: Positive = 50  # model calls at once, an endpoint
    retries: Annotated[int, msgspec.Meta(ge=0)] = 8  # of one model call
    retry_s: Seconds = 300.0  # for so long at most
    stall_s: Seconds = 120.0  # without a byte from the model
    tool_timeout_s: Seconds = 600.0  # of one tool call
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
        return msgspec.convert(tomllib.loads(Path(path).read_text(encoding="utf-8")), Config)
    except OSError as error:
        raise KernelError(Errno.ENOENT, f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise KernelError(Errno.ENOEXEC, f"{path}: {error}") from None


def key_variables(config: Config) -> Mapping[str, str]:
    """The variable that holds each endpoint's key."""
    return {url: endpoint.api_key_env for url, endpoint in config.endpoints.items()}
