"""The script language, as script.py tells it: from the conversation to the step that is to be played.

Law: which step comes next is computed from the messages alone.
"""

import re
from collections.abc import Callable
from typing import Any, cast

import msgspec

from llmprocd.model import script_rules
from llmprocd.model.script_rules import Json

DIRECTIVE = re.compile(r"^!(?:(?P<joined>&)[ \t]*!?)?(?P<word>[A-Za-z0-9_-]+)(?:[ \t]+(?P<rest>.*))?$")
MARKERS = re.compile(r"\A(?:\[m\d+\]\s*)+")
SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
PLACEHOLDER = re.compile(r"\{\{(?:(?P<name>n|model|result)|result:(?P<pattern>.*?))\}\}(?!\})")
ESCAPED = re.compile(r"\\(?P<escape>[nt\\|{])|" + PLACEHOLDER.pattern)
BAR = re.compile(r"\\.|" + PLACEHOLDER.pattern + r"|(?P<bar>\|)")
FIRST_WORD = re.compile(r"((?:" + PLACEHOLDER.pattern + r"|\S)*)\s*(.*)", re.DOTALL)

FAULTS = frozenset(("fail", "drop", "truncate", "error", "badjson", "stall", "html", "nousage"))
TALK = frozenset(("say", "think"))
PAUSE = "srvtoolu_pause"


class ScriptError(ValueError):
    """A line of a script that means nothing."""


class Directive(msgspec.Struct, frozen=True):
    """One line: `!word rest`."""

    word: str
    rest: str = ""
    joined: bool = False


class Fault(msgspec.Struct, frozen=True):
    """Something that goes wrong, `times` tries long (None: always); `own`: with a text of its own."""

    kind: str
    words: tuple[str, ...] = ()
    times: int | None = None
    retry_after: str = ""
    own: bool = False


class Scene(msgspec.Struct, frozen=True):
    """What the placeholders stand for."""

    result: str = ""
    count: int = 0
    model: str = ""


class Say(msgspec.Struct, frozen=True):
    """A text block."""

    text: str


class Think(msgspec.Struct, frozen=True):
    """A thinking block, to be signed."""

    text: str


class Use(msgspec.Struct, frozen=True):
    """A tool call."""

    name: str
    input: Json


class BadUse(msgspec.Struct, frozen=True):
    """A tool call whose input is not JSON."""

    name: str


class Block(msgspec.Struct, frozen=True):
    """A content block, given as it is."""

    value: Json


Part = Say | Think | Use | BadUse | Block


class Step(msgspec.Struct, frozen=True):
    """What one answer is made of."""

    parts: tuple[Directive | Part, ...] = ()
    faults: tuple[Fault, ...] = ()
    stop: str = ""
    sleep: float = 0.0
    delay: float = 0.0


class Cue(msgspec.Struct, frozen=True):
    """The text that governs an answer and how many answers it has had."""

    text: str
    step: int


def cue_of(messages: list[Json]) -> Cue:
    """The latest user text, the last block alone, and how many turns have answered it."""
    step = 0
    for message in reversed(messages):
        content = script_rules.blocks(message["content"])
        if message["role"] == "assistant":
            step += 1 + sum(was_pause(block) for block in content)
            continue
        said = [block["text"] for block in content if block["type"] == "text"]
        texts = [text for text in said if not text.startswith("<context_notice")]
        if texts:
            return Cue(MARKERS.sub("", texts[-1]), step)
    return Cue("", step)


def was_pause(block: Json) -> bool:
    """Whether this block ends a pause: the answer after it was a turn of its own."""
    kind, use = str(block.get("type")), str(block.get("tool_use_id"))
    return kind.endswith("_tool_result") and use.startswith(PAUSE)


def scene_of(request: Json) -> Scene:
    """The placeholders' values for one request."""
    messages: list[Json] = request["messages"]
    for message in reversed(messages):
        for block in reversed(script_rules.blocks(message["content"])):
            if block["type"] == "tool_result":
                return Scene(result_text(block), len(messages), request["model"])
    return Scene("", len(messages), request["model"])


def result_text(block: Json) -> str:
    content = script_rules.blocks(block.get("content") or "")
    return "".join(item["text"] for item in content if item["type"] == "text")


def script_of(request: Json, text: str, fallback: str) -> list[Directive]:
    """The directives that govern: of the user's text, else of the system prompt, else of `fallback`."""
    system = script_rules.blocks(request.get("system") or "")
    embedded = "\n".join(found for block in system for found in SCRIPT.findall(block["text"]))
    for candidate in (text, embedded, fallback):
        if found := directives(candidate):
            return found
    return []


def directives(text: str) -> list[Directive]:
    """The lines of a text that are directives."""
    matches = (DIRECTIVE.match(line.rstrip("\r")) for line in text.split("\n"))
    return [
        Directive(match["word"], (match["rest"] or "").strip(), match["joined"] is not None)
        for match in matches
        if match is not None
    ]


def step_at(script: list[Directive], index: int) -> Step:
    """The step of this number; `!say done` after the last."""
    found = steps(script)
    if index < len(found):
        return found[index]
    return Step((Directive("say", "done"),), delay=found[-1].delay if found else 0.0)


def steps(script: list[Directive]) -> list[Step]:
    """A script cut into the answers it gives. ScriptError for a number or a fault that cannot be read."""
    done: list[Step] = []
    ahead = Step()  # what lines have said so far about the step to come
    for line in script:
        if done and (line.joined or ends_talk(line, done[-1])):
            done[-1] = add(done[-1], line)
            if line.word == "delay":
                ahead = msgspec.structs.replace(ahead, delay=done[-1].delay)
        elif line.word in {"delay", "sleep"} or (line.word in FAULTS and is_passing(line)):
            ahead = add(ahead, msgspec.structs.replace(line, joined=False))
        else:
            done.append(add(ahead, msgspec.structs.replace(line, joined=False)))
            ahead = Step(delay=ahead.delay)
    if ahead.faults or ahead.sleep:
        done.append(add(ahead, Directive("say", "done")))
    return done


def add(step: Step, line: Directive) -> Step:
    """A step with one more line."""
    if line.word == "delay":
        return msgspec.structs.replace(step, delay=seconds(line))
    if line.word == "sleep":
        return msgspec.structs.replace(step, sleep=step.sleep + seconds(line))
    if line.word == "stop":
        return msgspec.structs.replace(step, stop=line.rest or "end_turn", parts=step.parts or silent(line))
    if line.word in FAULTS:
        return msgspec.structs.replace(step, faults=(*step.faults, fault_of(line)))
    if line.word == "empty":
        return step
    return msgspec.structs.replace(step, parts=(*step.parts, line))


def silent(line: Directive) -> tuple[Directive, ...]:
    """What a `!stop` on its own says: nothing where the API says nothing either."""
    return () if line.rest in {"refusal", "pause_turn"} else (Directive("say", "stopped"),)


def ends_talk(line: Directive, step: Step) -> bool:
    """Whether this `!stop` belongs to a step that only says something: nothing could come between the two."""
    talk = bool(step.parts) and all(isinstance(part, Directive) and part.word in TALK for part in step.parts)
    return line.word == "stop" and talk and not step.stop


def is_passing(line: Directive) -> bool:
    return fault_of(line).times is not None


def fault_of(line: Directive) -> Fault:
    words = line.rest.split()
    options = dict(word.split("=", 1) for word in words if "=" in word)
    plain = tuple(word for word in words if "=" not in word)
    if unknown := options.keys() - {"times", "retry_after"}:
        raise ScriptError(f"!{line.word}: unknown option {min(unknown)!r}")
    times = whole(options["times"], line) if "times" in options else None
    if line.word == "fail":
        whole(plain[0] if plain else "", line)
    if line.word == "stall":
        number(plain[0] if plain else "", line)
    return Fault(line.word, plain, times, options.get("retry_after", ""), own=not line.joined)


def seconds(line: Directive) -> float:
    return number(line.rest, line)


def number(text: str, line: Directive) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ScriptError(f"!{line.word}: {text!r} is no number") from None
    if not 0 <= value < 1e9:
        raise ScriptError(f"!{line.word}: {text!r} is out of range")
    return value


def whole(text: str, line: Directive) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ScriptError(f"!{line.word}: {text!r} is no number")
    return int(text)


# Parts of an answer


def part_of(line: Directive | Part, scene: Scene) -> Part:
    """The part a directive adds to an answer; ScriptError if it cannot be read."""
    if not isinstance(line, Directive):
        return line
    match line.word:
        case "say":
            return Say(told(line.rest, scene))
        case "think":
            return Think(told(line.rest, scene))
        case "raw":
            block = json_input(line, scene)
            if not isinstance(block.get("type"), str):
                raise ScriptError("!raw: a content block needs a type")
            return Block(block)
        case "tool":
            name, _, rest = line.rest.partition(" ")
            return Use(name, json_input(Directive(name, rest), scene))
        case _:
            return Use(line.word, tool_input(line, scene))


def tool_input(line: Directive, scene: Scene) -> Json:
    """The input of a tool call: JSON, or what the tool's shorthand says."""
    is_json = line.rest.startswith("{") and not PLACEHOLDER.match(line.rest)
    if is_json or line.word not in SHORTHANDS:
        return json_input(line, scene)
    return SHORTHANDS[line.word](line.rest, scene)


def json_input(line: Directive, scene: Scene) -> Json:
    """A JSON object with placeholders: in its strings, else anywhere."""
    text = line.rest or "{}"
    try:
        value = filled_json(msgspec.json.decode(text), scene)
    except msgspec.DecodeError:
        try:
            value = msgspec.json.decode(filled(text, scene))
        except msgspec.DecodeError as exc:
            raise ScriptError(f"!{line.word}: the input is not JSON: {exc}") from None
    if not isinstance(value, dict):
        raise ScriptError(f"!{line.word}: the input is not a JSON object")
    return cast("Json", value)


def filled_json(value: Any, scene: Scene) -> Any:
    if isinstance(value, str):
        return filled(value, scene)
    if isinstance(value, list):
        return [filled_json(item, scene) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {key: filled_json(item, scene) for key, item in cast("Json", value).items()}
    return value


def filled(text: str, scene: Scene) -> str:
    """A text with its placeholders replaced. ScriptError for a pattern that does not compile."""
    return PLACEHOLDER.sub(lambda match: placeholder(match, scene), text)


def told(text: str, scene: Scene) -> str:
    r"""A text with its placeholders replaced and one level of \n, \t, \|, \{ and \\ taken away."""

    def replace(match: re.Match[str]) -> str:
        escape = match["escape"]
        return {"n": "\n", "t": "\t"}.get(escape, escape) if escape else placeholder(match, scene)

    return ESCAPED.sub(replace, text.strip())


def placeholder(match: re.Match[str], scene: Scene) -> str:
    if match["name"] == "n":
        return str(scene.count)
    if match["name"] == "model":
        return scene.model
    if match["pattern"] is None:
        return scene.result
    try:
        found = re.search(match["pattern"], scene.result)
    except re.error as exc:
        raise ScriptError(f"{match[0]}: {exc}") from None
    if found is None:
        return ""
    return (found[1] or "") if found.re.groups else found[0]


def integer(text: str, what: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise ScriptError(f"!{what}: {text!r} is no number")
    return int(text)


def bash_input(rest: str, scene: Scene) -> Json:
    return {"command": filled(rest, scene)}


def fork_input(rest: str, scene: Scene) -> Json:
    return {"prompts": [told(text, scene) for text in split_prompts(rest)]}


def split_prompts(rest: str) -> list[str]:
    r"""The prompts between bars; `\|` is no bar, and neither is one inside a placeholder."""
    bars = [match.start() for match in BAR.finditer(rest) if match["bar"]]
    return [rest[a + 1 : b] for a, b in zip([-1, *bars], [*bars, len(rest)], strict=True)]


def first_word(rest: str, scene: Scene) -> tuple[str, str]:
    """The first word, and the text after it, both with placeholders replaced."""
    match = FIRST_WORD.fullmatch(rest)
    if match is None:
        raise ScriptError(f"{rest!r} cannot be read")
    return filled(match.group(1), scene), told(match.groups()[-1], scene)


def spawn_input(rest: str, scene: Scene) -> Json:
    return {"prompt": told(rest, scene)}


def goto_input(rest: str, scene: Scene) -> Json:
    position, text = first_word(rest, scene)
    return {"position": position, "message": text}


def send_input(rest: str, scene: Scene) -> Json:
    pid, text = first_word(rest, scene)
    return {"pid": integer(pid, "send"), "message": text}


def exit_input(rest: str, scene: Scene) -> Json:
    status, text = first_word(rest, scene)
    value: Json = {"status": integer(status, "exit")} if status else {}
    return value | ({"message": text} if text else {})


def wait_input(rest: str, scene: Scene) -> Json:
    pids = filled(rest, scene).replace(",", " ").split()
    return {"pids": [integer(pid, "wait") for pid in pids]} if pids else {}


def kill_input(rest: str, scene: Scene) -> Json:
    pid, name = first_word(rest, scene)
    value: Json = {"pid": integer(pid, "kill")}
    return value | ({"signal": name} if name else {})


def read_fd_input(rest: str, scene: Scene) -> Json:
    return {"fd": filled(rest, scene)}


def read_file_input(rest: str, scene: Scene) -> Json:
    return {"file_path": filled(rest, scene)}


SHORTHANDS: dict[str, Callable[[str, Scene], Json]] = {
    "bash": bash_input,
    "fork": fork_input,
    "spawn": spawn_input,
    "goto": goto_input,
    "send": send_input,
    "exit": exit_input,
    "wait": wait_input,
    "kill": kill_input,
    "read_fd": read_fd_input,
    "read_file": read_file_input,
}
