"""What the Messages API refuses, so that a client's mistake shows before it meets the real one.

Law: a check returns nothing and changes nothing; it raises ApiError or the request is good.
Stricter than the API in one thing: two messages of one role in a row are refused, not joined.
"""

import base64
import binascii
import hashlib
import hmac
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import msgspec

Json = dict[str, Any]

MAX_BODY = 32 * 1024 * 1024
MAX_OUTPUT = 128_000
MAX_MESSAGES = 100_000
MAX_BREAKPOINTS = 4

COMMON_FIELDS = frozenset(
    ("model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control")
)
CREATE_FIELDS = COMMON_FIELDS | frozenset(
    (
        "max_tokens", "container", "diagnostics", "inference_geo", "metadata", "service_tier", "speed",
        "stop_sequences", "stream",
    )
)  # fmt: skip
SAMPLING_FIELDS = ("temperature", "top_p", "top_k")

TOOL_NAME = re.compile(r"^[a-zA-Z0-9_-]{1,128}$")
TOOL_USE_ID = re.compile(r"^[a-zA-Z0-9_-]+$")
PROPERTY_KEY = re.compile(r"^[a-zA-Z0-9_.-]{1,64}$")
WORDS = {str: "string", dict: "dictionary", list: "list", bool: "boolean", int: "integer"}


class Shape(msgspec.Struct, frozen=True):
    """The fields one kind of block may have."""

    roles: tuple[str, ...]
    required: dict[str, type]
    optional: dict[str, type] = {}


BOTH, USER, ASSISTANT = ("user", "assistant"), ("user",), ("assistant",)
SHAPES = {
    "text": Shape(BOTH, {"text": str}, {"citations": list, "cache_control": dict}),
    "image": Shape(USER, {"source": dict}, {"cache_control": dict}),
    "document": Shape(
        USER, {"source": dict}, {"title": str, "context": str, "citations": dict, "cache_control": dict}
    ),
    "search_result": Shape(
        USER, {"source": str, "title": str, "content": list}, {"citations": dict, "cache_control": dict}
    ),
    "container_upload": Shape(USER, {"file_id": str}, {"cache_control": dict}),
    "tool_result": Shape(
        USER, {"tool_use_id": str}, {"content": object, "is_error": bool, "cache_control": dict}
    ),
    "tool_use": Shape(
        ASSISTANT,
        {"id": str, "name": str, "input": dict},
        {"caller": dict, "toolset_name": str, "cache_control": dict},
    ),
    "thinking": Shape(ASSISTANT, {"thinking": str, "signature": str}),
    "redacted_thinking": Shape(ASSISTANT, {"data": str}),
}
IN_RESULTS = ("text", "image", "document", "search_result", "tool_reference")
TOOL_FIELDS = {
    "name": str,
    "description": str,
    "input_schema": dict,
    "type": str,
    "cache_control": dict,
    "strict": bool,
    "eager_input_streaming": bool,
    "defer_loading": bool,
    "allowed_callers": list,
    "input_examples": list,
}
IMAGE_TYPES = ("image/jpeg", "image/png", "image/gif", "image/webp")


class ApiError(Exception):
    """An HTTP error of the API: status, type and the sentence it says."""

    def __init__(
        self, status: int, kind: str, text: str, headers: tuple[tuple[str, str], ...] = (), code: str = ""
    ) -> None:
        super().__init__(text)
        self.status = status
        self.kind = kind
        self.text = text
        self.headers = headers
        self.code = code  # more exact than the type, for a program to read


def parse(body: bytes) -> Json:
    """The JSON object a request body holds; ApiError 413 if it is too large, 400 if it is none."""
    if len(body) > MAX_BODY:
        raise ApiError(413, "request_too_large", "Request exceeds the maximum size")
    try:
        value: Any = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        refuse(f"The request body is not valid JSON: {exc}")
    if not isinstance(value, dict):
        refuse("The request body is not a JSON object")
    return cast("Json", value)


def check_create(request: Json) -> None:
    """Refuse what POST /v1/messages refuses; ApiError 400, or 404 for a model that is not there."""
    check_fields(request, CREATE_FIELDS, ("model", "max_tokens", "messages"))
    check_max_tokens(request["max_tokens"])
    check_rest(request)
    check_thinking(request.get("thinking"), request["max_tokens"])


def check_count(request: Json) -> None:
    """Refuse what POST /v1/messages/count_tokens refuses; errors as for check_create."""
    check_fields(request, COMMON_FIELDS, ("model", "messages"))
    check_rest(request)


def signature(model: str, text: str) -> str:
    """The signature of a thinking block: only this text, by this model, has it."""
    mac = hmac.new(b"llmprocd script model", f"{model}\0{text}".encode(), hashlib.sha256)
    return base64.b64encode(mac.digest()).decode()


def pending_server_tools(content: list[Json]) -> list[str]:
    """The ids of server tool calls among these blocks that have no result after them."""
    answered = {
        block.get("tool_use_id") for block in content if str(block.get("type")).endswith("_tool_result")
    }
    return [
        block["id"]
        for block in content
        if block.get("type") == "server_tool_use" and block.get("id") not in answered
    ]


def blocks(content: Any) -> list[Json]:
    """Content as a list of blocks; a string is one text block."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return cast("list[Json]", content)


def refuse(text: str) -> NoReturn:
    raise ApiError(400, "invalid_request_error", text)


# The top of the request


def check_fields(request: Json, allowed: frozenset[str], required: tuple[str, ...]) -> None:
    for name in SAMPLING_FIELDS:
        if name in request:
            refuse(f"{name}: this parameter is not supported by this API version")
    for name in request:
        if name not in allowed:
            refuse(f"{name}: Extra inputs are not permitted")
    for name in required:
        if name not in request:
            refuse(f"{name}: Field required")


def check_max_tokens(value: Any) -> None:
    expect(value, int, "max_tokens")
    if value < 0:
        refuse("max_tokens: Input should be greater than or equal to 0")
    if value > MAX_OUTPUT:
        refuse(f"max_tokens: {value} > {MAX_OUTPUT}, which is the maximum allowed number of output tokens")


def check_rest(request: Json) -> None:
    expect(request["model"], str, "model")
    if not request["model"]:
        refuse("model: String should have at least 1 character")
    for name, check in SIMPLE_CHECKS.items():
        if request.get(name) is not None:
            check(request[name], name)
        elif name in request and name not in NULLABLE:
            refuse(f"{name}: Input should not be null")
    check_messages(request["messages"])
    check_tool_choice(request)
    check_breakpoints(request)
    if request["model"].startswith("no-such"):
        raise ApiError(404, "not_found_error", f"model: {request['model']}")


def check_bool(value: Any, where: str) -> None:
    expect(value, bool, where)


def check_string(value: Any, where: str) -> None:
    expect(value, str, where)


def check_object(value: Any, where: str) -> None:
    expect(value, dict, where)


def check_stop_sequences(value: Any, where: str) -> None:
    for i, item in enumerate(as_list(value, where)):
        expect(item, str, f"{where}.{i}")
        if not item.strip():
            refuse(f"{where}: each stop sequence must contain non-whitespace")


def check_metadata(value: Any, where: str) -> None:
    check_members(value, where, {"user_id": str})


def check_output_config(value: Any, where: str) -> None:
    check_members(value, where, {"effort": str, "format": dict})
    one_of(value.get("effort", "high"), ("low", "medium", "high", "xhigh", "max"), f"{where}.effort")


def check_service_tier(value: Any, where: str) -> None:
    one_of(value, ("auto", "standard_only"), where)


def check_speed(value: Any, where: str) -> None:
    one_of(value, ("standard", "fast"), where)


def check_system(value: Any, where: str) -> None:
    if isinstance(value, str):
        return
    for i, block in enumerate(as_list(value, where)):
        member = as_object(block, f"{where}.{i}")
        one_of(member.get("type"), ("text",), f"{where}.{i}.type")
        check_shape(member, f"{where}.{i}")
        if not member["text"].strip():
            refuse(f"{where}: text content blocks must be non-empty")


def check_thinking(value: Any, max_tokens: int) -> None:
    if value is None:
        return
    check_members(
        value, "thinking", {"type": str, "budget_tokens": int, "display": str, "block_binding": dict}
    )
    one_of(value.get("type"), ("enabled", "disabled", "adaptive"), "thinking.type")
    one_of(value.get("display", "omitted"), ("omitted", "summarized"), "thinking.display")
    if value["type"] != "enabled":
        return
    if "budget_tokens" not in value:
        refuse("thinking.enabled.budget_tokens: Field required")
    if value["budget_tokens"] < 1024:
        refuse("thinking.enabled.budget_tokens: Input should be greater than or equal to 1024")
    if max_tokens <= value["budget_tokens"]:
        refuse("`max_tokens` must be greater than `thinking.budget_tokens`")


def check_tool_choice(request: Json) -> None:
    choice = request.get("tool_choice")
    if choice is None:
        return
    members = {"type": str, "name": str, "disable_parallel_tool_use": bool}
    check_members(choice, "tool_choice", members)
    one_of(choice.get("type"), ("auto", "any", "tool", "none"), "tool_choice.type")
    tools: list[Json] = request.get("tools") or []
    if not tools and choice["type"] != "none":
        refuse("tool_choice: tool_choice may only be specified while providing tools")
    if choice["type"] == "tool" and choice.get("name") not in {tool.get("name") for tool in tools}:
        refuse(f"tool_choice: Tool '{choice.get('name')}' not found in provided tools")


def check_tools(value: Any, where: str) -> None:
    seen: set[str] = set()
    for i, item in enumerate(as_list(value, where)):
        tool = as_object(item, f"{where}.{i}")
        check_tool(tool, f"{where}.{i}")
        if tool["name"] in seen:
            refuse("tools: Tool names must be unique.")
        seen.add(tool["name"])


def check_tool(tool: Json, where: str) -> None:
    if tool.get("type") not in {None, "custom"}:
        check_member(tool, "name", str, where)
        return
    where = f"{where}.custom"
    check_members(tool, where, TOOL_FIELDS)
    check_member(tool, "name", str, where)
    if not TOOL_NAME.match(tool["name"]):
        refuse(f"{where}.name: String should match pattern '{TOOL_NAME.pattern}'")
    check_member(tool, "input_schema", dict, where)
    check_input_schema(tool["input_schema"], f"{where}.input_schema")


def check_input_schema(schema: Json, where: str) -> None:
    if "type" not in schema:
        refuse(f"{where}.type: Field required")
    one_of(schema["type"], ("object",), f"{where}.type")
    if schema.keys() & {"oneOf", "allOf", "anyOf"}:
        refuse(f"{where}: input_schema does not support oneOf, allOf, or anyOf at the top level")
    for key in as_object(schema.get("properties") or {}, f"{where}.properties"):
        if not PROPERTY_KEY.match(key):
            refuse(f"{where}.properties: Property keys should match pattern '{PROPERTY_KEY.pattern}'")
    for i, name in enumerate(as_list(schema.get("required") or [], f"{where}.required")):
        expect(name, str, f"{where}.required.{i}")


def check_diagnostics(value: Any, where: str) -> None:
    check_members(value, where, {"previous_message_id": str})


SIMPLE_CHECKS: dict[str, Callable[[Any, str], None]] = {
    "system": check_system,
    "tools": check_tools,
    "stream": check_bool,
    "stop_sequences": check_stop_sequences,
    "metadata": check_metadata,
    "output_config": check_output_config,
    "service_tier": check_service_tier,
    "speed": check_speed,
    "inference_geo": check_string,
    "diagnostics": check_diagnostics,
    "thinking": check_object,
    "tool_choice": check_object,
}
NULLABLE = frozenset(("speed", "inference_geo", "diagnostics"))


# Messages


def check_messages(value: Any) -> None:
    messages = as_list(value, "messages")
    if not messages:
        refuse("messages: at least one message is required")
    if len(messages) > MAX_MESSAGES:
        refuse(f"messages: List should have at most {MAX_MESSAGES} items")
    for i, message in enumerate(messages):
        check_message(as_object(message, f"messages.{i}"), f"messages.{i}")
    check_roles(messages)
    for i, message in enumerate(messages):
        check_content(message, i)
    check_last(messages[-1])
    check_tool_pairs(messages)


def check_message(message: Json, where: str) -> None:
    for name in message:
        if name not in {"role", "content"}:
            refuse(f"{where}.{name}: Extra inputs are not permitted")
    for name in ("role", "content"):
        if name not in message:
            refuse(f"{where}.{name}: Field required")
    if message["role"] == "system":
        refuse(
            'messages: Unexpected role "system". The Messages API accepts a top-level `system` parameter, '
            'not "system" as an input message role.'
        )
    one_of(message["role"], BOTH, f"{where}.role")
    if not isinstance(message["content"], str):
        as_list(message["content"], f"{where}.content")


def check_roles(messages: list[Json]) -> None:
    if messages[0]["role"] != "user":
        refuse('messages: first message must use the "user" role')
    for before, after in itertools.pairwise(messages):
        if before["role"] == after["role"]:
            refuse(
                'messages: roles must alternate between "user" and "assistant", '
                f'but found multiple "{after["role"]}" roles in a row'
            )


def check_content(message: Json, index: int) -> None:
    if not message["content"]:
        refuse(f"messages.{index}: {message['role']} messages must have non-empty content")
    for j, item in enumerate(blocks(message["content"])):
        where = f"messages.{index}.content.{j}"
        block = as_object(item, where)
        check_block(block, message["role"], where)
        if block["type"] == "thinking":
            continue
        check_text(block)


def check_block(block: Json, role: str, where: str) -> None:
    check_member(block, "type", str, where)
    kind = block["type"]
    shape = SHAPES.get(kind)
    if shape is None:
        if role == "assistant":
            return  # what the API itself sent goes back as it came, also kinds that are not known here
        expected = ", ".join(f"'{name}'" for name, known in SHAPES.items() if role in known.roles)
        refuse(
            f"{where}: Input tag '{kind}' found using 'type' does not match any of the expected tags: "
            f"{expected}"
        )
    if role not in shape.roles:
        refuse(f"{where}: `{kind}` blocks can only be in `{shape.roles[0]}` messages")
    check_shape(block, where)
    if kind in SPECIAL_CHECKS:
        SPECIAL_CHECKS[kind](block, where)


def check_shape(block: Json, where: str) -> None:
    shape = SHAPES[block["type"]]
    where = f"{where}.{block['type']}"
    for name in shape.required:
        if name not in block:
            refuse(f"{where}.{name}: Field required")
    for name, value in block.items():
        kind = shape.required.get(name) or shape.optional.get(name)
        if kind is not None:
            if value is not None or name in shape.required:
                expect(value, kind, f"{where}.{name}")
        elif name != "type":
            refuse(f"{where}.{name}: Extra inputs are not permitted")


def check_text(block: Json) -> None:
    if block["type"] == "text":
        if not block["text"]:
            refuse("messages: text content blocks must be non-empty")
        if not block["text"].strip():
            refuse("messages: text content blocks must contain non-whitespace text")


def check_tool_use(block: Json, where: str) -> None:
    for name, pattern in (("id", TOOL_USE_ID), ("name", TOOL_NAME)):
        if not pattern.match(block[name]):
            refuse(f"{where}.tool_use.{name}: String should match pattern '{pattern.pattern}'")


def check_tool_result(block: Json, where: str) -> None:
    content = block.get("content")
    if block.get("is_error") and not content:
        refuse(f"{where}: content cannot be empty if `is_error` is true")
    if content is None or isinstance(content, str):
        return
    for i, item in enumerate(as_list(content, f"{where}.tool_result.content")):
        inner = f"{where}.tool_result.content.{i}"
        member = as_object(item, inner)
        one_of(member.get("type"), IN_RESULTS, f"{inner}.type")
        if member["type"] in SHAPES:
            check_block(member, "user", inner)
        check_text(member)


def check_image(block: Json, where: str) -> None:
    source = block["source"]
    one_of(source.get("type"), ("base64", "url", "file"), f"{where}.image.source.type")
    if source["type"] != "base64":
        return
    where = f"{where}.image.source.base64"
    one_of(source.get("media_type"), IMAGE_TYPES, f"{where}.media_type")
    try:
        base64.b64decode(str(source.get("data")), validate=True)
    except binascii.Error:
        refuse(f"{where}.data: invalid base64 data")


SPECIAL_CHECKS: dict[str, Callable[[Json, str], None]] = {
    "tool_use": check_tool_use,
    "tool_result": check_tool_result,
    "image": check_image,
}


def check_signatures(request: Json) -> None:
    """Refuse thinking that this model did not think or that was changed since; ApiError 400."""
    for i, message in enumerate(request["messages"]):
        for j, block in enumerate(blocks(message["content"])):
            if block["type"] != "thinking":
                continue
            if not hmac.compare_digest(
                block["signature"].encode(), signature(request["model"], block["thinking"]).encode()
            ):
                refuse(f"messages.{i}.content.{j}: Invalid `signature` in `thinking` block")


def check_last(message: Json) -> None:
    if message["role"] == "user":
        return
    content = blocks(message["content"])
    if content[-1]["type"] == "text" and content[-1]["text"] != content[-1]["text"].rstrip():
        refuse("messages: final assistant content cannot end with trailing whitespace")
    if not pending_server_tools(content):
        refuse(
            "This model does not support assistant message prefill (prefill not supported). "
            "The conversation must end with a user message."
        )


def check_tool_pairs(messages: list[Json]) -> None:
    seen: set[str] = set()
    for i, message in enumerate(messages):
        content = blocks(message["content"])
        if message["role"] == "assistant":
            check_asked(content, i, seen)
            check_server_tools(content, i, last=i == len(messages) - 1)
            asked = {block["id"]: None for block in content if block["type"] == "tool_use"}
            check_answered(asked, blocks(messages[i + 1]["content"]) if i + 1 < len(messages) else [], i)
        else:
            check_results(content, i, blocks(messages[i - 1]["content"]) if i else [])


def check_asked(content: list[Json], index: int, seen: set[str]) -> None:
    for j, block in enumerate(content):
        if block["type"] != "tool_use":
            continue
        if block["id"] in seen:
            refuse(f"messages.{index}.content.{j}: `tool_use` ids must be unique")
        seen.add(block["id"])


def check_server_tools(content: list[Json], index: int, *, last: bool) -> None:
    pending = pending_server_tools(content)
    if pending and not last:
        refuse(
            f"messages.{index}: server tool use with id {pending[0]} was found "
            "without a corresponding result block"
        )


def check_answered(asked: dict[str, None], answer: list[Json], index: int) -> None:
    given = {block.get("tool_use_id") for block in answer if block["type"] == "tool_result"}
    missing = [use for use in asked if use not in given]
    if missing:
        refuse(
            f"messages.{index}: `tool_use` ids were found without `tool_result` blocks immediately after: "
            f"{', '.join(missing)}. Each `tool_use` block must have a corresponding `tool_result` block "
            "in the next message."
        )


def check_results(content: list[Json], index: int, before: list[Json]) -> None:
    asked = {block["id"] for block in before if block["type"] == "tool_use"}
    given: set[str] = set()
    others = False
    for j, block in enumerate(content):
        if block["type"] != "tool_result":
            others = True
            continue
        use = block["tool_use_id"]
        if use not in asked:
            refuse(
                f"messages.{index}.content.{j}: unexpected `tool_use_id` found in `tool_result` blocks: "
                f"{use}. Each `tool_result` block must have a corresponding `tool_use` block in the previous "
                "message."
            )
        if use in given:
            refuse(
                f"messages.{index}.content.{j}: each tool_use must have a single result. "
                f"Found multiple `tool_result` blocks with id: {use}"
            )
        if others:
            refuse(
                f"messages.{index}: `tool_result` blocks must come before all other content of the message"
            )
        given.add(use)


# Cache breakpoints


def check_breakpoints(request: Json) -> None:
    count, short = 0, False
    for where, mark in breakpoints(request):
        check_cache_control(mark, where)
        count += 1
        if mark.get("ttl") == "1h" and short:
            refuse(
                f"{where}.ttl: a ttl='1h' cache_control block must not come after a ttl='5m' cache_control "
                "block. Note that blocks are processed in the following order: `tools`, `system`, `messages`."
            )
        short = short or mark.get("ttl") != "1h"
    if count > MAX_BREAKPOINTS:
        refuse(f"A maximum of {MAX_BREAKPOINTS} blocks with cache_control may be provided. Found {count}.")


def breakpoints(request: Json) -> Iterator[tuple[str, Json]]:
    """Every cache_control in the order of the prefix, the automatic one last, each with its place."""
    for where, block in marked_blocks(request):
        if block.get("cache_control") is not None:
            yield f"{where}.cache_control", block["cache_control"]
    if request.get("cache_control") is not None:
        yield "cache_control", request["cache_control"]


def marked_blocks(request: Json) -> Iterator[tuple[str, Json]]:
    for i, tool in enumerate(request.get("tools") or []):
        yield f"tools.{i}", tool
    for i, block in enumerate(blocks(request.get("system") or [])):
        yield f"system.{i}", block
    for i, message in enumerate(request["messages"]):
        for j, block in enumerate(blocks(message["content"])):
            if block["type"] == "tool_result":
                for k, inner in enumerate(blocks(block.get("content") or [])):
                    yield f"messages.{i}.content.{j}.content.{k}", inner
            yield f"messages.{i}.content.{j}", block


def check_cache_control(mark: Any, where: str) -> None:
    check_members(mark, where, {"type": str, "ttl": str})
    one_of(mark.get("type"), ("ephemeral",), f"{where}.type")
    one_of(mark.get("ttl", "5m"), ("5m", "1h"), f"{where}.ttl")


# Small words


def expect(value: Any, kind: type, where: str) -> None:
    if kind is int and isinstance(value, bool):
        refuse(f"{where}: Input should be a valid integer")
    if not isinstance(value, kind):
        refuse(f"{where}: Input should be a valid {WORDS[kind]}")


def one_of(value: Any, words: tuple[str, ...], where: str) -> None:
    if value not in words:
        refuse(f"{where}: Input should be {' or '.join(repr(word) for word in words)}")


def as_list(value: Any, where: str) -> list[Any]:
    expect(value, list, where)
    return cast("list[Any]", value)


def as_object(value: Any, where: str) -> Json:
    expect(value, dict, where)
    return cast("Json", value)


def check_member(value: Json, name: str, kind: type, where: str) -> None:
    if name not in value:
        refuse(f"{where}.{name}: Field required")
    expect(value[name], kind, f"{where}.{name}")


def check_members(value: Any, where: str, members: dict[str, type]) -> None:
    for name, item in as_object(value, where).items():
        if name not in members:
            refuse(f"{where}.{name}: Extra inputs are not permitted")
        if item is not None:
            expect(item, members[name], f"{where}.{name}")
