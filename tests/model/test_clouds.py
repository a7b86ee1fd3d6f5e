"""The clouds' clients over real HTTP: where they ask, who they say they are, and what they are sent.

No account was to be had: what the real services answer was not seen. The servers here take what the SDK
sends them, and check the signatures with AWS's own library.
"""

import base64
import binascii
import json
import struct
from contextlib import asynccontextmanager

import msgspec
import pytest
from test_anthropic import STREAM, WHOLE, body, endpoint, image, replying

from llmprocd.abi.errno import Errno
from llmprocd.model import clouds
from llmprocd.model.anthropic import Anthropic, NoBacks
from llmprocd.model.protocol import ModelError
from llmprocd.model.sse import Turn

pytest.importorskip("boto3", reason="the extra 'aws' is not installed")
pytest.importorskip("google.auth", reason="the extra 'vertex' is not installed")

AWS = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "aws-secret-0123456789"}
BYTES = ("anthropic_aws", "anthropic_foundry", "anthropic_bedrock")
ALL = tuple(clouds.CLOUDS)


class Backs(NoBacks):
    """An account that may be used anywhere."""

    def __init__(self, known):
        self.known = known

    def account(self, _endpoint):
        return self.known


@asynccontextmanager
async def asking(key="k-123456789", known=None):
    model = Anthropic(lambda _url, _env: key, None, None, backs=Backs(known))
    try:
        yield model
    finally:
        await model.aclose()


def at(provider, url="", region="eu-west-1", project="acme", **more):
    return msgspec.structs.replace(image(url, provider), region=region, project_id=project, **more)


async def ask(model, there, text="hello"):
    turn = Turn("claude-sonnet-5-5", lambda _: None)
    await model.infer(there, body(text, there), turn)
    return turn.reply()


def parsed(request):
    """Path, headers and body of a request."""
    head, _, content = request.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return first.split()[1], headers, content


def frame(payload, **headers):
    """A message of AWS's event streams."""
    encoded = b""
    for name, value in headers.items():
        key = f":{name.replace('_', '-')}".encode()
        encoded += bytes([len(key)]) + key + b"\x07" + struct.pack(">H", len(value)) + value.encode()
    prelude = struct.pack(">II", 16 + len(encoded) + len(payload), len(encoded))
    prelude += struct.pack(">I", binascii.crc32(prelude))
    whole = prelude + encoded + payload
    return whole + struct.pack(">I", binascii.crc32(whole))


def framed(*more):
    """The stream of the tests as the runtime sends it, with more frames in place of its end."""
    events = [part.removeprefix(b"data: ") for part in STREAM.split(b"\n\n") if part]
    frames = [
        frame(
            json.dumps({"bytes": base64.b64encode(event).decode()}).encode(),
            event_type="chunk", content_type="application/json", message_type="event",
        )
        for event in (events[:-1] if more else events)
    ]  # fmt: skip
    content = b"".join([*frames, *more])
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/vnd.amazon.eventstream\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(content) + content


def answer_of(provider):
    return framed() if provider == "anthropic_bedrock_runtime" else WHOLE


# --- what is sent -----------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", BYTES)
async def test_our_bytes_are_sent_as_they_are(provider):
    """Nothing is decoded or encoded on the way; the answer comes as from the API."""
    async with endpoint(replying(WHOLE)) as (url, received, _), asking() as model:
        assert (await ask(model, at(provider, url))).text == "hi"
        path, headers, content = parsed(received[0])
    assert path == "/v1/messages"
    assert content == b"".join(body("hello", at(provider, url)))
    assert headers["content-length"] == str(len(content))


@pytest.mark.parametrize(
    ("provider", "path", "left"),
    [
        ("anthropic_bedrock_runtime", "/model/claude-sonnet-5-5/invoke-with-response-stream", set()),
        (
            "anthropic_vertex",
            "/projects/acme/locations/eu-west-1/publishers/anthropic/models/claude-sonnet-5-5:streamRawPredict",
            {"stream"},
        ),
    ],
)
async def test_others_get_json_and_the_model_in_the_path(provider, path, left):
    """The moving marker stands on the block that it means, and nothing else is changed."""
    async with endpoint(replying(answer_of(provider))) as (url, received, _), asking() as model:
        assert (await ask(model, at(provider, url))).text == "hi"
        asked, _, content = parsed(received[0])
    ours, theirs = json.loads(b"".join(body("hello", at(provider, url)))), json.loads(content)
    assert asked == path
    assert theirs.pop("anthropic_version")
    marker = ours.pop("cache_control")
    ours["messages"][-1]["content"][-1]["cache_control"] = marker
    assert theirs == {name: ours[name] for name in ours if name not in {"model", "stream"} - left}


def test_the_marker_is_not_put_on_what_cannot_carry_it():
    """Thinking and empty texts are passed over, and a marker that is there stays."""
    mine, top = {"type": "ephemeral", "ttl": "1h"}, {"type": "ephemeral"}
    blocks = [
        {"type": "text", "text": "a"},
        {"type": "text", "text": ""},
        {"type": "thinking", "thinking": ""},
    ]
    made = clouds.decoded(json.dumps({"messages": [{"content": blocks}], "cache_control": top}).encode())
    assert made == {"messages": [{"content": [{**blocks[0], "cache_control": top}, *blocks[1:]]}]}
    own = [{"messages": [{"content": [{**blocks[0], "cache_control": mine}]}]}]
    made = clouds.decoded(json.dumps({**own[0], "cache_control": top}).encode())
    assert made == own[0]


async def test_a_failure_inside_frames_is_the_failure_that_it_is():
    """Throttled in the middle of an answer: to be asked again, and everybody's business."""
    fault = frame(
        b'{"message":"slow down"}', exception_type="throttlingException",
        content_type="application/json", message_type="exception",
    )  # fmt: skip
    async with endpoint(replying(framed(fault))) as (url, _, _), asking() as model:
        with pytest.raises(ModelError, match="slow down") as caught:
            await ask(model, at("anthropic_bedrock_runtime", url))
    assert (caught.value.errno, caught.value.again, caught.value.shared) == (Errno.EAGAIN, True, True)


# --- who asks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ALL)
async def test_a_key_is_sent_to_its_endpoint(provider):
    """In the header that the cloud wants; without one, no account is looked for."""
    async with endpoint(replying(answer_of(provider))) as (url, received, _), asking() as model:
        await ask(model, at(provider, url))
        headers = parsed(received[0])[1]
    name, value = (
        ("x-api-key", "k-123456789") if "foundry" in provider else ("authorization", "Bearer k-123456789")
    )
    assert headers[name] == value
    assert headers.get("anthropic-workspace-id") == ("acme" if provider == "anthropic_aws" else None)


@pytest.mark.parametrize(
    ("provider", "service"),
    [
        ("anthropic_aws", "aws-external-anthropic"),
        ("anthropic_bedrock", "bedrock-mantle"),
        ("anthropic_bedrock_runtime", "bedrock"),
    ],
)
async def test_an_account_signs_the_bytes_that_are_sent(provider, service):
    """AWS's own library finds the same signature for what arrived, in the program's region."""
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    async with endpoint(replying(answer_of(provider))) as (url, received, _), asking("", AWS) as model:
        await ask(model, at(provider, url, region="ap-south-2"))
        path, headers, content = parsed(received[0])
    said = dict(part.split("=", 1) for part in headers["authorization"].partition(" ")[2].split(", "))
    assert said["Credential"].split("/")[0::2] == [AWS["AWS_ACCESS_KEY_ID"], "ap-south-2", "aws4_request"]
    signed = {name: headers[name] for name in said["SignedHeaders"].split(";")}
    request = AWSRequest("POST", url + path, data=content, headers=signed)
    request.context["timestamp"] = headers["x-amz-date"]
    signer = SigV4Auth(Credentials(*AWS.values()), service, "ap-south-2")
    expected = signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request)
    assert said["Signature"] == expected
    assert AWS["AWS_SECRET_ACCESS_KEY"].encode() not in received[0]


@pytest.mark.parametrize("provider", ALL)
async def test_without_key_or_account_nothing_is_asked(provider):
    """EACCES already when a program is to start."""
    async with endpoint(replying(WHOLE)) as (url, received, _), asking("", None) as model:
        with pytest.raises(ModelError, match=f"no credentials for {provider}") as caught:
            model.check(at(provider, url))
        assert received == []
    assert caught.value.errno is Errno.EACCES


async def test_variables_of_the_daemon_are_not_sent(monkeypatch):
    """What the SDK would take from the environment is hidden from it."""
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "x-secret: leak")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "leak")
    monkeypatch.setenv("AWS_BEARER_TOKEN_BEDROCK", "leak")
    async with endpoint(replying(WHOLE)) as (url, received, _), asking("", AWS) as model:
        for provider in ("anthropic_aws", "anthropic_bedrock"):
            await ask(model, at(provider, url))
        assert not [request for request in received if b"leak" in request]


async def test_a_refusal_that_repeats_the_secret_is_redacted():
    """Keys and secrets of accounts alike."""
    said = json.dumps({"message": f"bad {AWS['AWS_SECRET_ACCESS_KEY']}"}).encode()
    refusal = b"HTTP/1.1 403 X\r\ncontent-length: %d\r\n\r\n%b" % (len(said), said)
    async with endpoint(replying(refusal)) as (url, _, _), asking("", AWS) as model:
        with pytest.raises(ModelError) as caught:
            await ask(model, at("anthropic_bedrock", url))
    assert "***" in caught.value.text
    assert AWS["AWS_SECRET_ACCESS_KEY"] not in caught.value.text


# --- where ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "host"),
    [
        ("anthropic_aws", "https://aws-external-anthropic.eu-west-1.api.aws"),
        ("anthropic_foundry", "https://acme.services.ai.azure.com/anthropic"),
        ("anthropic_bedrock", "https://bedrock-mantle.eu-west-1.api.aws/anthropic"),
        ("anthropic_bedrock_runtime", "https://bedrock-runtime.eu-west-1.amazonaws.com"),
        ("anthropic_vertex", "https://eu-west-1-aiplatform.googleapis.com/v1"),
    ],
)
async def test_region_and_project_make_the_address(provider, host):
    """The SDK knows where; the program says which."""
    async with asking() as model:
        made = model._endpoint(at(provider))
        await model._imported()
        assert str(model._client(made).base_url).rstrip("/") == host
        assert made.name == provider


@pytest.mark.parametrize("region", ["evil.example/", "eu west", "x@evil.example", "a" * 65, "eu-west-1\n"])
async def test_a_region_cannot_lead_elsewhere(region):
    """It is part of a host's name: a program must not choose who gets the key."""
    async with asking() as model:
        with pytest.raises(ModelError, match=r"model\.region") as caught:
            model.check(at("anthropic_bedrock", region=region))
    assert caught.value.errno is Errno.ENOEXEC


@pytest.mark.parametrize(
    ("provider", "project"),
    [("anthropic_foundry", "evil.example/"), ("anthropic_vertex", "../x"), ("anthropic_aws", "a b")],
)
async def test_nor_can_a_project(provider, project):
    """A part of a host's name, of a path, or of a header."""
    async with asking() as model:
        with pytest.raises(ModelError, match=r"model\.project_id"):
            model.check(at(provider, project=project))


@pytest.mark.parametrize(
    ("provider", "lacking"),
    [
        ("anthropic_aws", "region"),
        ("anthropic_aws", "project_id"),
        ("anthropic_foundry", "project_id"),
        ("anthropic_bedrock", "region"),
        ("anthropic_bedrock_runtime", "region"),
        ("anthropic_vertex", "region"),
        ("anthropic_vertex", "project_id"),
    ],
)
async def test_what_is_missing_is_named(provider, lacking, monkeypatch):
    """A program that cannot be addressed does not start."""
    for variable in ("AWS_REGION", "AWS_DEFAULT_REGION", "CLOUD_ML_REGION"):
        monkeypatch.delenv(variable, raising=False)
    given = {"region": "eu-west-1", "project": "acme"} | {lacking.removesuffix("_id"): ""}
    async with asking() as model:
        with pytest.raises(ModelError, match=f"model.{lacking} is missing"):
            model.check(at(provider, **given))


async def test_the_region_can_be_the_daemons(monkeypatch):
    """As for every other tool of the platform."""
    monkeypatch.setenv("AWS_REGION", "us-gov-1")
    async with asking() as model:
        assert model._endpoint(at("anthropic_bedrock", region="")).account.region == "us-gov-1"


async def test_tokens_are_counted_where_the_cloud_does():
    """Vertex has a path of its own for it, the runtime has none."""
    said = b'{"input_tokens": 7}'
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(said),
        said,
    )
    question = b'{"model":"claude-sonnet-5-5","messages":[{"role":"user","content":[]}]}'
    async with endpoint(replying(answer)) as (url, received, _), asking() as model:
        assert await model.count(at("anthropic_bedrock", url), question) == 7
        assert await model.count(at("anthropic_vertex", url), question) == 7
        assert "count-tokens:rawPredict" in parsed(received[1])[0]
        with pytest.raises(ModelError, match="not supported in Bedrock"):
            await model.count(at("anthropic_bedrock_runtime", url), question)
