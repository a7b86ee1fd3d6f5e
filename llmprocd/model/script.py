r"""The built-in model: a small Messages API endpoint that plays scripts. For tests, demos and dry runs.

Law: it has no memory of conversations, but of those it is asked to hold (script_threads.py). What it answers
follows from the request, except for two things: how often a fault with `times=` has struck, and which prompts
are cached.
Law: a body that the real API would refuse is refused (script_rules.py), with its status and in its words.
This file does no I/O and reads no clock: bytes in, an Answer out. script_transport.py lets an Anthropic
client talk to it in process; script_http.py serves it:

    python -m llmprocd.model.script --port 0        prints {"url": "http://127.0.0.1:PORT"}

# What governs an answer

The latest *user text*: of the last user message that has a text block, the last text block alone, without
`[m12] ` markers in front; a `<context_notice>` is none. Its lines that begin with `!` and a word are
*directives*; other lines mean nothing. A text without directives leaves the word to `<script>...</script>` in
the system prompt, then to the endpoint's own script (`--script FILE`). Without any script the answer is
`You said: TEXT`, with a thinking block before it if `thinking.display` is `summarized`; if `tool_choice`
asks for a tool, it is a call of that one, or of the first, with the smallest input its schema requires.

Each directive is one *step*: one answer, one turn. The number of the step is the number of assistant messages
after the governing text (a pause that was continued counts as one more). After the last step every answer is
`done`. A line that cannot be read is a 400 when its step comes.

    !& ...          joins the step before it: text and tools, or several tools, in one answer
                    (`!& bash ls` and `!& !bash ls` are the same)

# What a step can say and do

    !say TEXT       text, streamed word by word
    !think TEXT     a signed thinking block; join what follows it
    !raw {block}    a content block as it is
    !NAME {json}    a call of the tool NAME with that input; without one {}
    !tool NAME {json}   the same, for tools named like a directive
    !stop REASON    ends the step with this stop reason. It needs no `!&` after a step that only says
                    something; as a step of its own it says `stopped` (refusal and pause_turn: nothing).
                    pause_turn adds a call of a server tool if there is none, and the answer after it begins
                    with that call's result
    !empty          an answer without content (also what is left of `!say` with a blank text)

Shorthands, where the rest does not begin with `{`:

    !bash COMMAND   {"command": COMMAND}          !fork A | B | C    {"prompts": ["A", "B", "C"]}
    !spawn PROMPT   {"prompt": PROMPT}            !goto m3 TEXT      {"position": "m3", "message": TEXT}
    !send 7 TEXT    {"pid": 7, "message": TEXT}   !exit [3 [TEXT]]   {"status": 3, "message": TEXT}
    !wait 7 8       {"pids": [7, 8]}              !kill 7 TERM       {"pid": 7, "signal": "TERM"}
    !read_fd fd:3   {"fd": "fd:3"}                !read_file PATH    {"file_path": PATH}

In say, think, fork, spawn, goto, send and exit, `\n` `\t` `\|` `\{` and `\\` are escapes, taken away one
level at a time, so that a child's prompt can hold directives: `!fork !say a\n!say b | !exit {"status":3}`.
Placeholders, everywhere: `{{result}}` is the text of the last tool result, `{{result:REGEX}}` the first match
in it, or its first group (nothing if none), `{{n}}` the number of messages received, `{{model}}` the model.
JSON is read first and its strings are filled; if it is not JSON, it is filled first. In a prompt,
`\{{result}}` keeps the placeholder for the child.

# Time and faults

    !delay S        S seconds between the deltas of the next step and all later ones (joined: this one too)
    !sleep S        S seconds before the first byte of the next step (joined: of this one)

    !fail STATUS [TYPE] [retry_after=S]   an HTTP error
    !drop           the connection is reset after some text
    !truncate       the stream ends cleanly, without message_stop
    !error [TYPE]   an error event in mid-stream (overloaded_error); not streamed, status 529
    !html           status 200 and a web page
    !badjson [NAME] a tool call whose input is not JSON
    !stall S        silence for S seconds in mid-stream, then the rest
    !nousage        no usage

A fault alone is a step; while the client keeps no answer, it strikes again. With `times=N` it strikes the
first N tries of the step after it, and then that step is played in the same call (a client that keeps the
answer of a fault has had that step). Joined, it strikes the step's own text rather than a text of the
fault's. Faults of one step strike in order. Tries are counted for each conversation: the same request is the
next try, and a success starts over.

# Tokens

Four bytes are a token, rounded up for each block: of the JSON received, of the text (or of a call's name and
input) sent. Usage tells what the prompt cache would (script_cache.py). An answer longer than `max_tokens` is
cut off there, one that contains a stop sequence ends before it. A prompt longer than the window (`--window`)
is refused, an answer that would not fit beside it is cut off with `model_context_window_exceeded`.

`/_script/forget` makes it forget the conversations that it holds.
`/_script/requests`, `refusals` and `books` tell what came, what was refused, and what has been billed.
"""

import hashlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, cast

import msgspec

from llmprocd.model import script_answer, script_cache, script_parse, script_rules, script_threads
from llmprocd.model.script_answer import Answer
from llmprocd.model.script_parse import Fault, Say, Scene, ScriptError, Step, Think, Use
from llmprocd.model.script_rules import ApiError, Json

MODELS = ("script", "claude-opus-5-5", "claude-sonnet-5-5", "claude-haiku-5-5")
MAX_RECEIVED = 10_000
MAX_COMPARED = 1_000
KEEP_BYTES = 64 * 1024 * 1024
MAX_CONVERSATIONS = 100_000
WINDOW = 1_000_000


class Received(msgspec.Struct, frozen=True):
    """A request as it came; header names in small letters, `at` in seconds of the caller's clock."""

    at: float
    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Books(msgspec.Struct):
    """What has been billed: answers, and their tokens."""

    answers: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0

    def enter(self, usage: script_cache.PromptUsage, output: int) -> None:
        self.answers += 1
        self.input_tokens += usage.input_tokens
        self.output_tokens += output
        self.cache_read_input_tokens += usage.read
        self.cache_creation_input_tokens += usage.created_5m + usage.created_1h


class Engine:
    """One endpoint.

    Args:
        script: what governs when neither the user's text nor the system prompt holds a script.
        key: the only key that is accepted; None accepts every key that is not empty.
        rate_limit: requests a second before 429; None for no limit.
        seed: makes the ids the same in each run; None makes them the only ones of their kind.
        keep_bytes: how much of what was received `requests` remembers; the newest request always stays.
        window: tokens that prompt and answer may have together.
        without: fields and paths that this endpoint does not have: "diagnostics", "thread", "count_tokens",
            "models".
        unthreaded: fields that it does not take in a request of a thread.
    """

    def __init__(
        self,
        script: str = "",
        *,
        key: str | None = None,
        rate_limit: float | None = None,
        seed: bytes | None = None,
        keep_bytes: int = KEEP_BYTES,
        window: int = WINDOW,
        without: Collection[str] = (),
        unthreaded: Collection[str] = (),
    ) -> None:
        self.script = script
        self.key = key
        self.rate_limit = rate_limit
        self.keep_bytes = keep_bytes
        self.window = window
        self.without = frozenset(without)
        self.unthreaded = frozenset(unthreaded)
        self.books = Books()
        self.requests: list[Received] = []
        self.refusals: list[str] = []
        self._seed = os.urandom(16) if seed is None else seed
        self._serial = 0
        self._bytes = 0
        self._cache = script_cache.PromptCache()
        self._threads = script_threads.Threads()
        self._tries: OrderedDict[bytes, int] = OrderedDict()
        self._answered: OrderedDict[str, script_cache.Sections] = OrderedDict()
        self._allowance = (rate_limit or 0.0, float("-inf"))

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes, now: float) -> Answer:
        """Answer one HTTP request.

        Args:
            method: GET, POST, ...
            target: path and query.
            headers: their names in any case.
            body: all of it.
            now: seconds, of any clock that only grows.

        Returns:
            The response; a refusal is one too.
        """
        named = {name.lower(): value for name, value in headers.items()}
        path = target.partition("?")[0]
        if path.startswith("/_script/"):
            return self._inspect(method, path)
        self._serial += 1
        self._record(Received(now, method, target, named, body))
        request_id = "req_" + self.ident("request", b"")
        try:
            answer = self._route(method, path, named, body, now)
        except ApiError as error:
            if error.code not in script_threads.LOST:  # no mistake of the client's
                self._refused(error.text)
            answer = script_answer.error_answer(error, request_id)
        return msgspec.structs.replace(answer, headers=(*answer.headers, ("request-id", request_id)))

    def forget(self) -> None:
        """Forget what was received, refused, cached and tried."""
        self.requests.clear()
        self.refusals.clear()
        self._bytes = 0
        self.books = Books()
        self._cache.forget()
        self._threads.forget()
        self._tries.clear()
        self._answered.clear()

    def ident(self, name: str, digest: bytes) -> str:
        """An id for something of the present request."""
        material = self._seed + self._serial.to_bytes(8, "big") + digest + name.encode()
        return "01" + hashlib.blake2b(material, digest_size=11).hexdigest()

    def _route(self, method: str, path: str, headers: dict[str, str], body: bytes, now: float) -> Answer:
        self._check_key(headers)
        if self.without.intersection(path.split("/")):
            raise ApiError(404, "not_found_error", "Not Found")
        if path == "/v1/messages" and method == "POST":
            self._check_rate(now)
            return self._messages(headers, body, now)
        if path == "/v1/messages/count_tokens" and method == "POST":
            return count_tokens(body)
        if path.startswith("/v1/models") and method == "GET":
            return models(path, self.window)
        if path in {"/v1/messages", "/v1/messages/count_tokens", "/v1/models"}:
            raise ApiError(405, "invalid_request_error", "Method Not Allowed")
        raise ApiError(404, "not_found_error", "Not Found")

    def _messages(self, headers: dict[str, str], body: bytes, now: float) -> Answer:
        request = script_rules.parse(body)
        for name in self.without.intersection(request):
            script_rules.refuse(f"{name}: Extra inputs are not permitted")
        thread = script_threads.asked(request, headers)
        if thread is None:
            request.pop("thread", None)  # a null
            return self._converse(request, body, now)
        script_threads.check_supported(request, self.unthreaded)
        body = self._threads.whole(thread, request["model"], body, now)
        answer = self._converse(script_rules.parse(body), body, now)
        self._threads.hold(thread, body, answer, now)
        return answer

    def _converse(self, request: Json, body: bytes, now: float) -> Answer:
        """Answer a request that has all of a conversation."""
        script_rules.check_create(request)
        script_rules.check_signatures(request)
        prompt = script_cache.prompt_of(body)
        if prompt.tokens > self.window:
            script_rules.refuse(f"prompt is too long: {prompt.tokens} tokens > {self.window} maximum")
        told = self._compare(request, body, prompt)
        try:
            step, scene = choose(request, self.script)
            fault = self._strike(prompt.digest, step.faults)
            return self._play(request, step, fault, scene, prompt, now, told)
        except ScriptError as exc:
            raise ApiError(400, "invalid_request_error", f"script: {exc}") from exc

    def _play(
        self,
        request: Json,
        step: Step,
        fault: Fault | None,
        scene: Scene,
        prompt: script_cache.Prompt,
        now: float,
        told: Json | None,
    ) -> Answer:
        last = request["messages"][-1]
        pending: list[str] = []
        if last["role"] == "assistant":
            pending = script_rules.pending_server_tools(script_rules.blocks(last["content"]))
        left = self.window - prompt.tokens
        asked = script_answer.Request(
            model=request["model"],
            max_tokens=min(request["max_tokens"], left),
            stream=request.get("stream", False),
            stop_sequences=tuple(request.get("stop_sequences") or ()),
            usage=self._cache.use(prompt, now),
            ident=lambda name: self.ident(name, prompt.digest),
            cut="max_tokens" if request["max_tokens"] <= left else "model_context_window_exceeded",
            diagnostics=told,
        )
        try:
            answer = script_answer.play(step, fault, scene, asked, pending)
            self.books.enter(asked.usage, answer.output_tokens)
        except ApiError as error:  # a scripted failure is no refusal
            failed = script_answer.error_answer(error, "req_" + asked.ident("request"))
            return msgspec.structs.replace(failed, wait=step.sleep)
        return answer

    def _compare(self, request: Json, body: bytes, prompt: script_cache.Prompt) -> Json | None:
        """What `diagnostics` of a message says; None if the request did not ask."""
        asked = cast("Json | None", request.get("diagnostics"))
        if asked is None:
            return None
        now = script_cache.sections_of(body, prompt)
        self._answered["msg_" + self.ident("message", prompt.digest)] = now
        if len(self._answered) > MAX_COMPARED:
            self._answered.popitem(last=False)
        name = asked.get("previous_message_id")
        if name is None:
            return {"diagnostics": None}
        before = self._answered.get(name)
        if before is None:
            return {"diagnostics": {"cache_miss_reason": {"type": "previous_message_not_found"}}}
        why = script_cache.divergence(before, now)
        missed = {"type": why, "cache_missed_input_tokens": before.prompt.tokens}
        return {"diagnostics": {"cache_miss_reason": missed} if why else None}

    def _strike(self, digest: bytes, faults: Sequence[Fault]) -> Fault | None:
        """The fault that hits this try, if any; one try more is counted while they last."""
        tried = self._tries.pop(digest, 0)
        passed = 0
        for fault in faults:
            passed += fault.times if fault.times is not None else tried + 1
            if tried < passed:
                self._tries[digest] = tried + 1
                if len(self._tries) > MAX_CONVERSATIONS:
                    self._tries.popitem(last=False)
                return fault
        return None

    def _check_key(self, headers: dict[str, str]) -> None:
        given = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not given:
            raise ApiError(401, "authentication_error", "x-api-key header is required")
        if self.key is not None and given != self.key:
            raise ApiError(401, "authentication_error", "invalid x-api-key")

    def _check_rate(self, now: float) -> None:
        if self.rate_limit is None:
            return
        left, since = self._allowance
        left = min(max(self.rate_limit, 1.0), left + (now - since) * self.rate_limit)
        self._allowance = (left - 1.0 if left >= 1.0 else left, now)
        if left >= 1.0:
            return
        wait = (1.0 - left) / self.rate_limit
        headers = (
            ("retry-after", str(max(1, -int(-wait // 1)))),
            ("retry-after-ms", str(max(1, round(wait * 1000)))),
        )
        text = f"This request would exceed your rate limit of {self.rate_limit:g} requests per second."
        raise ApiError(429, "rate_limit_error", text, headers)

    def _record(self, received: Received) -> None:
        self.requests.append(received)
        self._bytes += len(received.body)
        while len(self.requests) > MAX_RECEIVED or (self._bytes > self.keep_bytes and len(self.requests) > 1):
            self._bytes -= len(self.requests.pop(0).body)

    def _refused(self, text: str) -> None:
        self.refusals.append(text)
        del self.refusals[:-MAX_RECEIVED]

    def _inspect(self, method: str, path: str) -> Answer:
        if (method, path) == ("GET", "/_script/requests"):
            shown = [
                msgspec.structs.asdict(received) | {"body": received.body.decode(errors="replace")}
                for received in self.requests
            ]
            return script_answer.json_answer(200, shown)
        if (method, path) == ("GET", "/_script/refusals"):
            return script_answer.json_answer(200, self.refusals)
        if (method, path) == ("GET", "/_script/books"):
            return script_answer.json_answer(200, msgspec.structs.asdict(self.books))
        if (method, path) == ("POST", "/_script/forget"):
            self._threads.forget()
            return script_answer.json_answer(200, {})
        if (method, path) == ("POST", "/_script/reset"):
            self.forget()
            return script_answer.json_answer(200, {})
        return script_answer.json_answer(404, {"error": f"{method} {path}: no such thing"})


def choose(request: Json, fallback: str) -> tuple[Step, Scene]:
    """The step a valid request is to be answered with, and the values of its placeholders."""
    cue = script_parse.cue_of(request["messages"])
    scene = script_parse.scene_of(request)
    script = script_parse.script_of(request, cue.text, fallback)
    if not script:
        return unscripted(request, cue.text), scene
    return script_parse.step_at(script, cue.step), scene


def unscripted(request: Json, text: str) -> Step:
    """The step without a script: an echo, or the tool call that was demanded."""
    choice = cast("Json", request.get("tool_choice") or {})
    if choice.get("type") in {"any", "tool"}:
        tools: list[Json] = request["tools"]
        tool = next((tool for tool in tools if tool["name"] == choice.get("name")), tools[0])
        return Step((Use(tool["name"], smallest(tool)),))
    echo = Say(f"You said: {text}")
    thinking = cast("Json", request.get("thinking") or {})
    if thinking.get("display") == "summarized":
        return Step((Think("The user said something; I shall repeat it."), echo))
    return Step((echo,))


def smallest(tool: Json) -> Json:
    """The least input that has all the properties a tool's schema requires."""
    schema = cast("Json", tool.get("input_schema") or {})
    properties: Json = schema.get("properties") or {}
    least: dict[Any, Any] = {
        "string": "x", "integer": 0, "number": 0, "boolean": False, "array": [], "object": {},
    }  # fmt: skip
    names: list[str] = schema.get("required") or []
    kinds: dict[str, Any] = {name: properties[name].get("type") for name in names if name in properties}
    return {name: least.get(kinds.get(name), "x") for name in names}


def count_tokens(body: bytes) -> Answer:
    """The answer of /v1/messages/count_tokens."""
    request = script_rules.parse(body)
    script_rules.check_count(request)
    return script_answer.json_answer(200, {"input_tokens": script_cache.prompt_of(body).tokens})


def models(path: str, window: int) -> Answer:
    """The answer of /v1/models and /v1/models/NAME."""
    if path == "/v1/models":
        page = {
            "data": [model_info(name, window) for name in MODELS],
            "has_more": False,
            "first_id": MODELS[0],
            "last_id": MODELS[-1],
        }
        return script_answer.json_answer(200, page)
    name = path.removeprefix("/v1/models/")
    if name not in MODELS:
        raise ApiError(404, "not_found_error", f"model: {name}")
    return script_answer.json_answer(200, model_info(name, window))


def model_info(name: str, window: int) -> Json:
    return {
        "type": "model",
        "id": name,
        "display_name": name.replace("-", " ").title(),
        "created_at": "2026-01-01T00:00:00Z",
        "lifecycle": "active",
        "max_input_tokens": window,
        "max_tokens": script_rules.MAX_OUTPUT,
        "capabilities": None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Serve over loopback HTTP until SIGTERM or SIGINT; returns the exit status."""
    from llmprocd.model import script_http

    serve: Callable[[Sequence[str]], int] = script_http.main
    return serve(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
