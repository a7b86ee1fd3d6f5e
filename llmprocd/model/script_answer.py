"""From the parts of an answer to the bytes the API would send, whole or as server-sent events.

Law: the same content streamed and not streamed is the same message.
Law: output_tokens never exceeds max_tokens; what does not fit is cut off and the stop reason says so.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from llmprocd.model import script_cache, script_parse, script_rules
from llmprocd.model.script_cache import PromptUsage
from llmprocd.model.script_parse import BadUse, Block, Fault, Part, Say, Scene, Step, Think, Use
from llmprocd.model.script_rules import ApiError, Json

WORD = re.compile(r"\S+\s*|\s+")
BROKEN_INPUT = '{"command": "echo '
UNFINISHED = "This answer breaks off before its end."
PAGE = b"<html><head><title>502 Bad Gateway</title></head><body>502 Bad Gateway</body></html>\n"
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
SSE = "text/event-stream; charset=utf-8"


class Chunk(msgspec.Struct, frozen=True):
    """Bytes, and the seconds to wait before they are sent."""

    delay: float
    data: bytes


class Answer(msgspec.Struct, frozen=True):
    """An HTTP response: the head after `wait` seconds, then the chunks, and if `dropped` then a reset."""

    status: int
    headers: tuple[tuple[str, str], ...]
    chunks: tuple[Chunk, ...]
    wait: float = 0.0
    streamed: bool = False
    dropped: bool = False
    output_tokens: int = 0

    @property
    def body(self) -> bytes:
        return b"".join(chunk.data for chunk in self.chunks)


class Request(msgspec.Struct, frozen=True):
    """What an answer depends on besides its parts."""

    model: str
    max_tokens: int
    stream: bool
    stop_sequences: tuple[str, ...]
    usage: PromptUsage
    ident: Callable[[str], str]  # an id of its own for each name it is given
    cut: str = "max_tokens"  # the stop reason of an answer that is longer than `max_tokens`
    diagnostics: Json | None = None  # what the message says of the prompt cache, if that was asked for


class Content(msgspec.Struct, frozen=True):
    """One block of an answer: whole, and as it is streamed."""

    whole: Json
    start: Json
    deltas: tuple[Json, ...]
    tokens: int


class Draft(msgspec.Struct, frozen=True):
    """The content of an answer and why it ends."""

    blocks: tuple[Content, ...]
    stop_reason: str
    stop_sequence: str | None = None

    @property
    def tokens(self) -> int:
        return sum(block.tokens for block in self.blocks)


def json_answer(
    status: int, value: Any, headers: Sequence[tuple[str, str]] = (), delay: float = 0.0
) -> Answer:
    """A response that is one JSON value."""
    head = (("content-type", "application/json"), *headers)
    return Answer(status, head, (Chunk(delay, msgspec.json.encode(value)),))


def error_answer(error: ApiError, request_id: str) -> Answer:
    """The response to a request that is refused."""
    value = error_value(error.kind, error.text, request_id)
    if error.code:
        value["error"]["details"] = {"error_code": error.code}
    return json_answer(error.status, value, error.headers)


def error_value(kind: str, text: str, request_id: str) -> Json:
    return {"type": "error", "error": {"type": kind, "message": text}, "request_id": request_id}


def play(
    step: Step, fault: Fault | None, scene: Scene, request: Request, pending: Sequence[str] = ()
) -> Answer:
    """Answer a request with a step, or with the fault that hits it.

    Args:
        step: what is to be said and done.
        fault: what goes wrong this time, if anything.
        scene: the values of the placeholders.
        request: what was asked.
        pending: server tool calls that a pause left open; the answer begins with their results.

    Returns:
        The response.

    Raises:
        ApiError: the fault is an HTTP error.
        ScriptError: the step cannot be read.
    """
    if fault is not None and fault.kind == "fail":
        raise failure(fault)
    if fault is not None and fault.kind == "html":
        return Answer(200, (("content-type", "text/html"),), (Chunk(0.0, PAGE),), wait=step.sleep)
    parts = [*results(pending), *said(step, fault, scene)]
    draft = draft_of(parts, step.stop, request)
    make = streamed if request.stream else whole
    made = make(draft, step, fault, request)
    return msgspec.structs.replace(made, wait=step.sleep, output_tokens=draft.tokens)


def failure(fault: Fault) -> ApiError:
    """The HTTP error a `!fail` stands for."""
    status = int(fault.words[0])
    kind = fault.words[1] if len(fault.words) > 1 else KINDS.get(status, "api_error")
    headers = (("retry-after", fault.retry_after),) if fault.retry_after else ()
    return ApiError(status, kind, f"scripted failure ({status})", headers)


def said(step: Step, fault: Fault | None, scene: Scene) -> list[Part]:
    """The parts of this try: the step's, or those of a fault that has its own."""
    parts: list[Part] = []
    if fault is None or not fault.own:
        parts += [script_parse.part_of(line, scene) for line in step.parts]
    elif fault.kind != "badjson":
        parts.append(Say(UNFINISHED))
    if fault is not None and fault.kind == "badjson":
        parts.append(BadUse(fault.words[0] if fault.words else "bash"))
    return parts


def results(pending: Sequence[str]) -> list[Part]:
    return [
        Block(
            {
                "type": "web_search_tool_result",
                "tool_use_id": use,
                "content": [],
                "caller": {"type": "direct"},
            }
        )
        for use in pending
    ]


# Content


def draft_of(parts: Sequence[Part], stop: str, request: Request) -> Draft:
    """The content that fits into max_tokens and no stop sequence ends, and the stop reason."""
    blocks: list[Content] = []
    if stop == "pause_turn" and not any(is_server_tool(part) for part in parts):
        parts = [*parts, pause(request)]
    for index, planned in enumerate(parts):
        if isinstance(planned, Say) and not planned.text.strip():
            continue
        part, sequence = until_stop(planned, request.stop_sequences)
        left = request.max_tokens - sum(block.tokens for block in blocks)
        block = content_of(part, request, str(index))
        if block.tokens > left:
            blocks += cut(part, request, str(index), left)
            return Draft(tuple(blocks), request.cut)
        if block.deltas or not isinstance(part, Say):
            blocks.append(block)
        if sequence is not None:
            return Draft(tuple(blocks), "stop_sequence", sequence)
    reason = stop or (
        "tool_use" if any(block.whole["type"] == "tool_use" for block in blocks) else "end_turn"
    )
    sequence = next(iter(request.stop_sequences), None) if reason == "stop_sequence" else None
    return Draft(tuple(blocks), reason, sequence)


def is_server_tool(part: Part) -> bool:
    return isinstance(part, Block) and part.value["type"] == "server_tool_use"


def pause(request: Request) -> Block:
    use = script_parse.PAUSE + request.ident("pause")
    return Block({"type": "server_tool_use", "id": use, "name": "web_search", "input": {"query": "more"}})


def until_stop(part: Part, sequences: tuple[str, ...]) -> tuple[Part, str | None]:
    """A text up to the first stop sequence in it, and that sequence."""
    if not isinstance(part, Say):
        return part, None
    hits = [(at, sequence) for sequence in sequences if (at := part.text.find(sequence)) >= 0]
    if not hits:
        return part, None
    at, sequence = min(hits)
    return Say(part.text[:at]), sequence


def cut(part: Part, request: Request, name: str, left: int) -> list[Content]:
    """As much of a part as fits into `left` tokens; nothing of a block that cannot be cut."""
    if isinstance(part, Say):
        text = part.text.encode()[: left * 4].decode(errors="ignore")
        return [text_content(text)] if text.strip() else []
    if isinstance(part, Use) and left > script_cache.count(part.name.encode()):
        used = left - script_cache.count(part.name.encode())
        text = msgspec.json.encode(part.input)[: used * 4].decode(errors="ignore")
        return [use_content(part.name, {}, text, "toolu_" + request.ident(name))]
    return []


def content_of(part: Part, request: Request, name: str) -> Content:
    """A part as a content block. `name` makes a tool call's id differ from the others of the answer."""
    match part:
        case Say(text):
            return text_content(text)
        case Think(text):
            return thinking_content(text, script_rules.signature(request.model, text))
        case Use(tool, value):
            encoded = msgspec.json.encode(value).decode()
            return use_content(tool, value, encoded, "toolu_" + request.ident(name))
        case BadUse(tool):
            return use_content(tool, {}, BROKEN_INPUT, "toolu_" + request.ident(name))
        case Block(value):
            return block_content(value, request, name)


def text_content(text: str) -> Content:
    head = {"type": "text", "text": "", "citations": None}
    deltas = tuple({"type": "text_delta", "text": word} for word in WORD.findall(text))
    return Content(head | {"text": text}, head, deltas, tokens(text))


def cited_content(value: Json) -> Content:
    """A text with the sources of what it says."""
    plain = text_content(value["text"])
    sources = tuple({"type": "citations_delta", "citation": one} for one in value["citations"])
    return Content(
        value, {"type": "text", "text": "", "citations": []}, (*plain.deltas, *sources), plain.tokens
    )


def thinking_content(text: str, signature: str) -> Content:
    head = {"type": "thinking", "thinking": "", "signature": ""}
    words = [{"type": "thinking_delta", "thinking": word} for word in WORD.findall(text)]
    signed = {"type": "signature_delta", "signature": signature}
    deltas = (*words, signed) if signature else tuple(words)
    return Content(head | {"thinking": text, "signature": signature}, head, deltas, tokens(text))


def use_content(
    name: str, value: Json, encoded: str, use: str, *, kind: str = "tool_use", caller: Json | None = None
) -> Content:
    """A tool call; `encoded` is the text its deltas carry, which may be less than JSON."""
    head: Json = {"type": kind, "id": use, "name": name, "input": {}, "caller": caller or {"type": "direct"}}
    size = max(8, -(-len(encoded) // 64))
    pieces = ["", *(encoded[i : i + size] for i in range(0, len(encoded), size))]
    deltas = tuple({"type": "input_json_delta", "partial_json": piece} for piece in pieces)
    return Content(head | {"input": value}, head, deltas, tokens(name) + tokens(encoded))


def block_content(value: Json, request: Request, name: str) -> Content:
    """A block given as it is: streamed by deltas where the API has them, else whole at its start."""
    kind = value["type"]
    if kind == "text" and isinstance(value.get("text"), str):
        return cited_content(value) if value.get("citations") else text_content(value["text"])
    if kind == "thinking" and isinstance(value.get("thinking"), str):
        return thinking_content(value["thinking"], str(value.get("signature") or ""))
    if kind in {"tool_use", "server_tool_use"}:
        prefix = "toolu_" if kind == "tool_use" else "srvtoolu_"
        use = value.get("id") or prefix + request.ident(name)
        encoded = msgspec.json.encode(value.get("input", {})).decode()
        return use_content(
            str(value.get("name")),
            value.get("input", {}),
            encoded,
            use,
            kind=kind,
            caller=value.get("caller"),
        )
    return Content(value, value, (), script_cache.count(msgspec.json.encode(value)))


def tokens(text: str) -> int:
    return script_cache.count(text.encode())


# The message


def message_head(request: Request, usage: Json) -> Json:
    told = {} if request.diagnostics is None else request.diagnostics
    return told | {
        "model": request.model,
        "id": "msg_" + request.ident("message"),
        "type": "message",
        "role": "assistant",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": usage,
    }


def stop_of(draft: Draft) -> Json:
    details = None
    if draft.stop_reason == "refusal":
        details = {"type": "refusal", "category": None, "explanation": "The script says so."}
    return {
        "stop_reason": draft.stop_reason,
        "stop_sequence": draft.stop_sequence,
        "stop_details": details,
        "container": None,
    }


def usage_of(usage: PromptUsage, output: int) -> Json:
    """Usage as a whole message reports it."""
    return delta_usage(usage, output) | {
        "cache_creation": {
            "ephemeral_5m_input_tokens": usage.created_5m,
            "ephemeral_1h_input_tokens": usage.created_1h,
        },
        "service_tier": "standard",
        "inference_geo": None,
    }


def delta_usage(usage: PromptUsage, output: int) -> Json:
    """Usage as message_delta reports it: totals so far, not differences."""
    return {
        "input_tokens": usage.input_tokens,
        "cache_creation_input_tokens": usage.created_5m + usage.created_1h,
        "cache_read_input_tokens": usage.read,
        "output_tokens": output,
        "output_tokens_details": None,
        "server_tool_use": None,
    }


def whole(draft: Draft, step: Step, fault: Fault | None, request: Request) -> Answer:
    """The answer as one JSON body, late by as much as its stream would have been."""
    message = message_head(request, usage_of(request.usage, draft.tokens)) | stop_of(draft)
    message["content"] = [block.whole for block in draft.blocks]
    delay = step.delay * max(0, sum(len(block.deltas) for block in draft.blocks) - 1)
    kind = fault.kind if fault else ""
    if kind == "error":
        raise ApiError(529, *error_words(fault))
    if kind == "nousage":
        message["usage"] = None
    if kind == "stall":
        delay += float(fault.words[0]) if fault else 0.0
    answer = json_answer(200, message, delay=delay)
    if kind == "truncate":
        return msgspec.structs.replace(answer, chunks=(Chunk(delay, answer.body[: len(answer.body) // 2]),))
    if kind == "drop":
        return msgspec.structs.replace(answer, chunks=(Chunk(delay, b""),), dropped=True)
    return answer


def streamed(draft: Draft, step: Step, fault: Fault | None, request: Request) -> Answer:
    """The answer as server-sent events, with its fault in the middle."""
    chunks = events(draft, step, request, count_usage=fault is None or fault.kind != "nousage")
    middle = middle_of(chunks)
    kind = fault.kind if fault else ""
    if fault is not None and kind == "stall":
        chunks[middle] = Chunk(chunks[middle].delay + float(fault.words[0]), chunks[middle].data)
    elif fault is not None and kind in {"drop", "truncate", "error"}:
        chunks = chunks[:middle]
        if kind == "error":
            name, text = error_words(fault)
            chunks.append(event("error", error_value(name, text, "req_" + request.ident("request"))))
    head = (("content-type", SSE), ("cache-control", "no-cache"))
    return Answer(200, head, tuple(chunks), streamed=True, dropped=kind == "drop")


def error_words(fault: Fault | None) -> tuple[str, str]:
    kind = fault.words[0] if fault and fault.words else "overloaded_error"
    return kind, kind.removesuffix("_error").replace("_", " ").capitalize()


def middle_of(chunks: list[Chunk]) -> int:
    """Where half of the deltas have been sent; after message_start if there are none."""
    deltas = [i for i, chunk in enumerate(chunks) if chunk.data.startswith(b"event: content_block_delta")]
    return deltas[len(deltas) // 2] if len(deltas) > 1 else (deltas[0] + 1 if deltas else 1)


def events(draft: Draft, step: Step, request: Request, *, count_usage: bool) -> list[Chunk]:
    """All events of an answer that goes well."""
    first = usage_of(request.usage, 1) if count_usage else {"input_tokens": None, "output_tokens": None}
    chunks = [event("message_start", {"message": message_head(request, first)})]
    ping = [event("ping", {})]
    began = False
    for index, block in enumerate(draft.blocks):
        chunks.append(event("content_block_start", {"index": index, "content_block": block.start}))
        chunks += ping
        ping = []
        for delta in block.deltas:
            pause_s = step.delay if began else 0.0
            chunks.append(event("content_block_delta", {"index": index, "delta": delta}, pause_s))
            began = True
        chunks.append(event("content_block_stop", {"index": index}))
    last: Json = {"delta": stop_of(draft)}
    if count_usage:
        last["usage"] = delta_usage(request.usage, draft.tokens)
    return [*chunks, event("message_delta", last), event("message_stop", {})]


def event(name: str, fields: Json, delay: float = 0.0) -> Chunk:
    data = msgspec.json.encode({"type": name} | fields)
    return Chunk(delay, b"event: " + name.encode() + b"\ndata: " + data + b"\n\n")
