"""The clouds that serve the same models, through the SDK's own clients for them.

| provider | client of the SDK | is sent | knows one by | project_id |
| --- | --- | --- | --- | --- |
| anthropic_aws | AsyncAnthropicAWS | our bytes | a key, or the AWS account (SigV4) | the workspace |
| anthropic_foundry | AsyncAnthropicFoundry | our bytes | a key | the resource |
| anthropic_bedrock | AsyncAnthropicBedrockMantle | our bytes | a key, or the AWS account | - |
| anthropic_bedrock_runtime | AsyncAnthropicBedrock | JSON | a key, or the AWS account | - |
| anthropic_vertex | AsyncAnthropicVertex | JSON | an access token, or Google's defaults | the project |

Those that take JSON move the model's name from the body to the path. Our bytes are decoded for them once a
request, and the SDK copies and encodes them again. That grows with the conversation: a turn on 1,000
messages of 1 KB costs 10 to 12 ms of CPU, where bytes cost 0.3 and signed bytes 1.3 (measured). They know no
marker at the top level, so that one is put where it would have pointed: on the last block. The runtime's
stream comes in AWS's frames; the SDK takes those apart, one at a time.

A signed request (SigV4) is joined in one piece, and signed in a thread. No account was to be had: none of
this has been seen by the real services.

Law: the region and the project are part of an address: what could lead to another host is refused.
Law: a cloud's client sees of the environment what the platform's own tools see, and none of our variables.
Law: an account is used at a cloud's own endpoint; at a URL of a program's choice only if it is paired.
"""

import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING, Any, cast

import msgspec

from llmprocd.abi.errno import Errno
from llmprocd.kernel.state import Image
from llmprocd.model import sse
from llmprocd.model.protocol import ModelError

if TYPE_CHECKING:
    import httpx2

    Options = dict[str, Any]

_REGION = re.compile(r"[a-z0-9-]{1,64}")
_PROJECT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.:-]{0,127}")
_RESOURCE = re.compile(r"[A-Za-z0-9-]{1,63}")
_FAULTS = {
    "throttlingException": "rate_limit_error",
    "validationException": "invalid_request_error",
    "modelTimeoutException": "timeout_error",
    "serviceUnavailableException": "overloaded_error",
}
_UNMARKED = frozenset({"thinking", "redacted_thinking"})


class Cloud(msgspec.Struct, frozen=True):
    """What is peculiar to one provider."""

    make: Callable[["Account", "Options"], Any]
    region: tuple[str, ...] = ("AWS_REGION", "AWS_DEFAULT_REGION")  # variables; none: it has no regions
    project: str = ""  # the variable that names what is billed; "": it bills nothing else
    by_account: bool = True  # are there credentials of the platform?
    json: bool = False
    frames: bool = False


class Account(msgspec.Struct, frozen=True):
    """Who asks which cloud, where."""

    provider: str
    url: str  # "": the cloud's own
    key: str
    region: str
    project: str
    aws: tuple[str, str, str] = ("", "", "")  # access key, secret, session token; the secret last two

    @property
    def cloud(self) -> Cloud:
        return CLOUDS[self.provider]


def account(image: Image, url: str, key: str, platform: Mapping[str, str] | None) -> Account:
    """Who asks a cloud for a program.

    Args:
        image: of the program.
        url: where, if not at the cloud's own endpoint.
        key: "" for none.
        platform: the variables of an account that may be used there; None if none may.

    Raises:
        ModelError: ENOEXEC no region or project where one is needed, or one that cannot be; EACCES nothing
            to be known by.
    """
    cloud, name = CLOUDS[image.provider], image.provider
    if not key and (platform is None or not cloud.by_account):
        raise ModelError(
            Errno.EACCES, f"no credentials for {name}: pair it with a key in the daemon's config"
        )
    region = image.region or next(filter(None, map(os.environ.get, cloud.region)), "")
    project = image.project_id or os.environ.get(cloud.project, "")
    wanted = _RESOURCE if name == "anthropic_foundry" else _PROJECT
    _require("region", region, _REGION, optional=not cloud.region or bool(url and key and not cloud.json))
    _require("project_id", project, wanted, optional=not cloud.project or bool(url and not _billed(name)))
    return Account(name, url, key, region, project, _aws_account({} if key else platform or {}))


def _aws_account(known: Mapping[str, str]) -> tuple[str, str, str]:
    access, secret = known.get("AWS_ACCESS_KEY_ID", ""), known.get("AWS_SECRET_ACCESS_KEY", "")
    return (access, secret, known.get("AWS_SESSION_TOKEN", "")) if access and secret else ("", "", "")


def _billed(provider: str) -> bool:
    """Does its address need the project wherever it is?"""
    return provider in {"anthropic_aws", "anthropic_vertex"}


def _require(name: str, value: str, shape: re.Pattern[str], *, optional: bool) -> None:
    if value and not shape.fullmatch(value):
        raise ModelError(Errno.ENOEXEC, f"model.{name}: {value!r} cannot be one")
    if not value and not optional:
        raise ModelError(Errno.ENOEXEC, f"model.{name} is missing")


def client(who: Account, http_client: "httpx2.AsyncClient") -> Any:
    """The SDK's client for an account.

    Raises:
        ModelError: EACCES, when the SDK knows better.
    """
    common: Options = {
        "base_url": who.url or None,
        "timeout": http_client.timeout,
        "max_retries": 0,
        "http_client": http_client,
        "open_telemetry": False,
    }
    with told(who):
        return who.cloud.make(who, common)


# --- what is sent and what comes back ---------------------------------------------------------------


def content(who: Account, pieces: Sequence[bytes]) -> dict[str, Any]:
    """A request's body as its client wants it."""
    whole = b"".join(pieces)
    return {"body": decoded(whole)} if who.cloud.json else {"content": whole}


def decoded(whole: bytes) -> dict[str, Any]:
    """A body as objects, with the moving marker on the block that it means."""
    body: dict[str, Any] = msgspec.json.decode(whole)
    marker = body.pop("cache_control", None)
    if marker is None or not body.get("messages"):
        return body
    for block in reversed(cast("list[dict[str, Any]]", body["messages"][-1]["content"])):
        if block.get("type") not in _UNMARKED and (block.get("type") != "text" or block.get("text")):
            block.setdefault("cache_control", marker)
            break
    return body


async def chunks(who: Account, client_: Any, response: "httpx2.Response") -> AsyncIterator[bytes]:
    """A response's stream as server-sent events, in bytes."""
    raw: Any = response.aiter_raw()
    async with aclosing(raw) as parts:
        if not who.cloud.frames:
            async for part in parts:
                yield part
            return
        decoder = client_._make_sse_decoder()  # noqa: SLF001  # there is no public name for it
        async with aclosing(decoder.aiter_bytes(parts)) as events:
            async for event in events:
                said = event.data.replace("\n", " ") if event.event != "error" else _fault(event.data)
                yield b"data: %b\n\n" % said.encode()


def _fault(data: str) -> str:
    """A failure inside AWS's stream, by the name that the API has for it."""
    for theirs, ours in _FAULTS.items():
        data = data.replace(f'"type": "{theirs}"', f'"type": "{ours}"')
    return data


@contextmanager
def told(who: Account | None) -> Generator[None]:
    """What goes wrong before a cloud is asked at all, mostly for lack of somebody to be, as a ModelError."""
    if who is None:
        yield
        return
    import anthropic

    try:
        yield
    except anthropic.APIError:
        raise
    except (anthropic.AnthropicError, ValueError, RuntimeError, *_library_faults()) as fault:
        said = sse.plain(str(fault)) or type(fault).__name__
        raise ModelError(Errno.EACCES, f"{who.provider}: {said}") from None


def _library_faults() -> tuple[type[Exception], ...]:
    """The exceptions of the platforms' own libraries, of those that have been imported."""
    kinds: list[type[Exception]] = []
    for module, name in (
        ("botocore.exceptions", "BotoCoreError"),
        ("google.auth.exceptions", "GoogleAuthError"),
    ):
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return tuple(kinds)


# --- the clients ------------------------------------------------------------------------------------


def _sdk() -> Any:
    import anthropic

    return anthropic


def _aws(who: Account, common: "Options") -> Any:
    return _sdk().AsyncAnthropicAWS(**common, **_signing(who), workspace_id=who.project)


def _foundry(who: Account, common: "Options") -> Any:
    where = {} if who.url else {"resource": who.project}
    return _sdk().AsyncAnthropicFoundry(**common, **where, api_key=who.key)


def _mantle(who: Account, common: "Options") -> Any:
    return _sdk().AsyncAnthropicBedrockMantle(**common, **_signing(who))


def _runtime(who: Account, common: "Options") -> Any:
    return _sdk().AsyncAnthropicBedrock(**common, **_signing(who))


def _vertex(who: Account, common: "Options") -> Any:
    return _sdk().AsyncAnthropicVertex(
        **common, region=who.region, project_id=who.project, access_token=who.key or None
    )


def _signing(who: Account) -> "Options":
    """How an AWS client shows who asks: its library looks for an account where we know of none."""
    access, secret, token = who.aws
    return {
        "api_key": who.key or None,
        "aws_region": who.region or None,
        "aws_access_key": access or None,
        "aws_secret_key": secret or None,
        "aws_session_token": token or None,
    }


CLOUDS = {
    "anthropic_aws": Cloud(_aws, project="ANTHROPIC_AWS_WORKSPACE_ID"),
    "anthropic_foundry": Cloud(_foundry, region=(), project="ANTHROPIC_FOUNDRY_RESOURCE", by_account=False),
    "anthropic_bedrock": Cloud(_mantle),
    "anthropic_bedrock_runtime": Cloud(_runtime, json=True, frames=True),
    "anthropic_vertex": Cloud(
        _vertex, region=("CLOUD_ML_REGION",), project="ANTHROPIC_VERTEX_PROJECT_ID", json=True
    ),
}
