"""Message threads: a request brings only what is new, and no conversation can tell."""

import json

import pytest
from e2ekit import Strict, program, script, toml, use

RULES = "Obey this rule, and the ones before it. " * 100
LONG = "words that go on and on, " * 400

TOOLS = program("bash", "calculator", "fork", "goto", prompt={"system": RULES}, model={"threads": True})
PLAIN = program("bash", "calculator", "fork", "goto", prompt={"system": RULES})


def kinds(strict, having=""):
    """What each request said of its thread, in order: create, continue, or nothing at all."""
    return [json.loads(body).get("thread", {}).get("type") for body in strict.bodies(having)]


def said(client, pid):
    """A conversation without what differs by chance: ids of messages and of calls."""
    found = []
    for message in client.history(pid):
        for block in message["content"]:
            kept = {name: block[name] for name in block if name not in {"id", "tool_use_id"}}
            kept["text"] = kept.get("text", "").partition("] ")[2] or kept.get("text", "")
            found.append((message["role"], kept))
    return found


def test_a_conversation_with_tools_sends_only_what_is_new(client, strict):
    """The first request has all, later ones neither the program nor the past; each says beta."""
    turns = [f"!bash seq {n}000 {n}300" for n in range(1, 5)]
    _, row = client.finish(TOOLS, script(*turns, f"!say {LONG}"))
    requests = strict.requests()
    assert kinds(strict) == ["create", *["continue"] * 4]
    assert all(one["target"] == "/v1/messages?beta=true" for one in requests)
    assert all(one["headers"]["anthropic-beta"] == "message-threads-2026-08-12" for one in requests)
    for one in requests[1:]:
        body = json.loads(one["body"])
        assert "system" not in body
        assert "tools" not in body
        (message,) = body["messages"]
        assert [block["type"] for block in message["content"]] == ["tool_result"]
        assert len(one["body"]) < 2500
    assert len(requests[0]["body"]) > 4000
    assert row["usage"]["cache_read_input_tokens"] > 4 * 1000


def test_a_conversation_is_the_same_as_one_without_threads(client, strict):
    """What is said, what is billed, and what the cache gives."""
    rows, talks = [], []
    for one in (PLAIN, TOOLS):
        strict.reset()
        pid = client.spawn(one, "!bash seq 1000\n!say one", interactive=True)
        client.rests(pid)
        client.run(pid, f"!bash echo hi\n!& !calculator {json.dumps({'expression': '6*7'})}\n!say {LONG}")
        client.run(pid, "!say three")
        rows.append(client.get(pid))
        talks.append(said(client, pid))
    assert kinds(strict) == ["create", *["continue"] * 4]
    assert talks[0] == talks[1]
    assert rows[0]["turns"] == rows[1]["turns"] == 5
    bare, threaded = rows[0]["usage"], rows[1]["usage"]
    for name in ("output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"):
        assert abs(bare[name] - threaded[name]) < 20, name


def test_a_child_sends_all_and_its_parent_goes_on(client, strict):
    """An answer can be gone on from once: that is its own process's."""
    pid = client.spawn(TOOLS, "!say one", interactive=True)
    client.rests(pid)
    (child,) = client.call("proc.fork", pid=pid, prompts=["!say child\n!say more"])["pids"]
    client.rests(child)
    client.run(child, "!say child again")
    client.run(pid, "!say parent")
    assert kinds(strict) == ["create", "create", "continue", "continue"]
    first = json.loads(strict.bodies("!say child")[0])
    assert len(first["messages"]) == 3
    assert "tools" in first


def test_a_models_children_send_all(client, strict):
    """The parent goes on from the answer that made them."""
    fork = use("fork", prompts=["!say a child"])
    _, row = client.finish(TOOLS, script(fork, "!say all done"))
    assert row["message"] == "all done"
    assert sorted(kinds(strict)) == ["continue", "create", "create"]


def test_after_goto_all_is_sent(client, strict):
    """Back to an earlier answer, which was gone on from; then on from there."""
    pid = client.spawn(TOOLS, "!say one", interactive=True)
    client.rests(pid)
    client.run(pid, "!say two")
    at = client.history(pid)[1]["id"]
    client.call("proc.goto", pid=pid, to=at, text="!say other")
    client.rests(pid)
    client.run(pid, "!say three")
    assert kinds(strict) == ["create", "continue", "create", "continue"]


def test_goto_to_the_answer_beside_sends_all(client, strict):
    """Two answers to one question: the process goes on from the older, which is not the last call's."""
    pid = client.spawn(TOOLS, "!say one", interactive=True)
    client.rests(pid)
    question, older = (row["id"] for row in client.history(pid))
    client.call("proc.goto", pid=pid, to=question)
    client.run(pid)
    assert client.history(pid)[-1]["id"] != older
    client.call("proc.goto", pid=pid, to=older, text="!say on")
    client.rests(pid)
    assert kinds(strict) == ["create", "create", "create"]


def test_a_forgotten_conversation_is_sent_again(client, strict):
    """The process does not notice: no error, no word on stderr, the same turn."""
    pid = client.spawn(TOOLS, "!say one", interactive=True)
    client.rests(pid)
    strict.forget()
    row = client.run(pid, "!bash echo on\n!say two")
    assert row["message"] == "two"
    assert kinds(strict) == ["create", "continue", "create", "continue"]
    assert client.get(pid)["turns"] == 3
    assert client.read(pid, 2) == b""


def test_an_endpoint_that_forgets_each_time_is_asked_no_more(client, strict):
    """Two in a row; one that was gone on from between them starts the count over."""
    pid = client.spawn(TOOLS, "!say one", interactive=True)
    client.rests(pid)
    for number in range(2):
        strict.forget()
        client.run(pid, f"!say {number}")
        client.run(pid, "!say goes on")
    assert kinds(strict) == ["create", *["continue", "create", "continue"] * 2]
    strict.forget()
    client.run(pid, "!say lost")
    strict.forget()
    client.run(pid, "!say lost again")
    client.run(pid, "!say on")
    assert kinds(strict)[7:] == ["continue", "create", "continue", None, None]


def test_exec_and_hup_with_another_prompt_send_all(client, strict, tmp_path):
    """Tools and system prompt are fixed when a conversation begins to be held."""
    path = tmp_path / "p.toml"
    path.write_text(toml(TOOLS))
    pid = client.spawn(str(path), "!say one", interactive=True)
    client.rests(pid)
    path.write_text(toml({**TOOLS, "prompt": {"system": "Another. " + RULES}}))
    client.signal(pid, "HUP")
    client.run(pid, "!say two")
    client.call("proc.exec", pid=pid, program={**TOOLS, "prompt": {"system": "A third."}})
    client.run(pid, "!say three")
    client.run(pid, "!say four")
    assert kinds(strict) == ["create", "create", "create", "continue"]
    assert '"A third.' in strict.bodies()[2]


def test_after_a_pause_all_is_sent(client, strict):
    """Our side joins the parts of such an answer: the endpoint gets them as they are joined here."""
    client.finish(TOOLS, "!say a\n!stop pause_turn\n!say b")
    assert kinds(strict) == ["create", "create"]


def test_a_killed_daemon_goes_on(fresh, strict):
    """The journal has all: the first request of a new life sends it."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(TOOLS, "!say one", interactive=True)
        client.rests(pid)
    fresh.restart()
    with fresh.client() as client:
        assert client.run(pid, "!say two")["message"] == "two"
        client.run(pid, "!say three")
        client.signal(pid, "KILL")
    assert kinds(strict) == ["create", "create", "continue"]


@pytest.mark.parametrize("fault", ["!drop times=1", "!fail 529 times=1", "!truncate times=1"])
def test_a_call_that_breaks_off_is_made_again(client, strict, fault):
    """The same request once more, and the answer is one."""
    pid = client.spawn(TOOLS, "!say one", interactive=True)
    client.rests(pid)
    assert client.run(pid, f"{fault}\n!say two")["message"] == "two"
    assert kinds(strict) == ["create", "continue", "continue"]
    assert client.get(pid)["turns"] == 2


def test_a_limited_answer_is_limited_when_all_is_sent_again(build, strict):
    """The bound that a limit has set is not lost with the thread."""
    daemon = build().start()
    with daemon.client() as client:
        small = {**TOOLS, "limits": {"tokens": 9000}, "parameters": {"max_tokens": 8000}}
        pid = client.spawn(small, "!say one", interactive=True)
        client.rests(pid)
        strict.forget()
        client.run(pid, "!say two")
    continued, created = (json.loads(body) for body in strict.bodies()[1:])
    assert continued["max_tokens"] == created["max_tokens"] < 8000
    assert (continued["thread"]["type"], created["thread"]["type"]) == ("continue", "create")


@pytest.mark.parametrize(
    ("option", "asked"),
    [(("--without", "thread"), ["create", None, None, None]),
     (("--unthreaded", "cache_control"), ["create", None, None, "create", None])],
)  # fmt: skip
def test_an_endpoint_that_holds_nothing_is_sent_all(build, option, asked):
    """One that knows no threads is asked once, one that will not hold this kind once for each process."""
    endpoint = Strict(*option)
    try:
        daemon = build(url=endpoint.url).start()
        with daemon.client() as client:
            pid = client.spawn(TOOLS, "!bash echo on\n!say one", interactive=True)
            client.rests(pid)
            client.finish(TOOLS, "!say other")
            assert client.read(pid, 2) == b""
        assert kinds(endpoint) == asked
        assert [one["target"] for one in endpoint.requests()] == [
            "/v1/messages?beta=true" if kind else "/v1/messages" for kind in asked
        ]
        assert len(endpoint.refusals()) == asked.count("create")
        assert daemon.log.read_text().count("message thread") == asked.count("create")
    finally:
        endpoint.close()


def test_an_interrupted_call_is_no_trouble(client, strict):
    """The endpoint has gone on from an answer, and the process has not: it is told so, and sends all."""
    pid = client.spawn(TOOLS, "!say one", interactive=True)
    client.rests(pid)
    client.send(pid, "!sleep 300\n!say two")
    client.until_wchan(pid, "api")
    client.until(pid, lambda _: len(strict.requests()) == 2)
    client.signal(pid, "INT")
    client.rests(pid)
    assert client.run(pid, "!say three")["message"] == "three"
    assert kinds(strict) == ["create", "continue", "continue", "create"]


def test_a_turn_of_many_blocks_sends_all(client, strict):
    """Else no marker could stand where the cache ends: nothing of what was said would be read."""
    calls = "\n!& ".join(["!calculator " + json.dumps({"expression": f"1+{n}"}) for n in range(25)])
    pid = client.spawn(TOOLS, f"!say {LONG}", interactive=True)
    client.rests(pid)
    client.run(pid, f"{calls}\n!say {LONG}")
    assert kinds(strict) == ["create", "continue", "create"]
    assert client.get(pid)["cache"]["reason"] == ""


def test_a_beta_of_the_programs_own_stays(client, strict):
    """Both are named."""
    own = {**TOOLS, "parameters": {"extra_headers": {"anthropic-beta": "other-2026-01-01"}}}
    client.finish(own, "!say one")
    (request,) = strict.requests()
    assert request["headers"]["anthropic-beta"] == "other-2026-01-01,message-threads-2026-08-12"


def test_a_program_that_asks_for_none_has_none(client, strict):
    """Nothing of it goes out."""
    client.finish(PLAIN, "!say one")
    (request,) = strict.requests()
    assert request["target"] == "/v1/messages"
    assert "anthropic-beta" not in request["headers"]
    assert kinds(strict) == [None]
