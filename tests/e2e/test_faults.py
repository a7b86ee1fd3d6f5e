"""What can go wrong with a model, over real HTTP and the real SDK; and what becomes of the conversation."""

import json

import pytest
from e2ekit import CANARY, program, refused, texts

TALK = program()
BASH = program("bash")
QUICK = "retry_after=0.01"


# --- faults that pass -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        f"!fail 529 overloaded_error {QUICK} times=2",
        f"!fail 429 rate_limit_error {QUICK} times=2",
        f"!fail 500 api_error {QUICK} times=1",
        "!fail 503 times=1",
        "!drop times=1",
        "!truncate times=1",
        "!error overloaded_error times=1",
        "!error api_error times=1",
    ],
)
def test_a_fault_that_passes_is_tried_again(client, fault):
    """The answer is there once; nothing of the failed tries is in the history."""
    pid, row = client.finish(BASH, f"{fault}\n!bash echo x\n!say done")
    assert (row["status"], row["message"]) == (0, "done")
    assert texts(client.history(pid))[-1] == "done"
    assert client.results(pid) == ["x\n[exit 0]"]
    requests = client.events(pid, types=["api_request"])
    assert max(event["attempt"] for event in requests) >= 2
    assert client.get(pid)["turns"] == 2


def test_a_shared_refusal_shows_as_held(build):
    """D, and WCHAN says for how long."""
    daemon = build("retry_s = 7200\n").start()
    with daemon.client() as client:
        pid = client.spawn(TALK, "!fail 429 rate_limit_error retry_after=3600")
        row = client.until(pid, lambda row: row["wchan"].startswith("retry-after"))
        seconds = int(row["wchan"].removeprefix("retry-after ").removesuffix("s"))
        assert (row["stat"], 3000 < seconds <= 3600) == ("D", True)


def test_a_held_process_can_be_interrupted(build):
    """Signals do not wait for the server."""
    daemon = build("retry_s = 7200\nretries = 1000\n").start()
    with daemon.client() as client:
        pid = client.spawn(TALK, "!fail 503", interactive=True)
        client.until(pid, lambda row: row["stat"] == "D")
        client.signal(pid, "INT")
        client.rests(pid)
        assert client.run(pid, "!say next")["message"] == "next"


# --- faults that do not -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("!fail 400 invalid_request_error", "400 invalid_request_error"),
        ("!fail 401 authentication_error", "401 authentication_error"),
        ("!fail 403 permission_error", "403 permission_error"),
        ("!fail 404 not_found_error", "404 not_found_error"),
        ("!fail 413 request_too_large", "413 request_too_large"),
        ("!html", "no event stream"),
    ],
)
def test_a_final_refusal_ends_a_batch_process_with_1(client, fault, words):
    """It is not tried again; the reason is in ps and on stderr."""
    pid, row = client.finish(TALK, fault)
    assert row["status"] == 1
    assert words in client.get(pid)["reason"]
    assert words in client.read(pid, 2).decode()
    assert len(client.events(pid, types=["api_request"])) == 1


def test_a_fault_that_stays_is_given_up(client):
    """After the retries of the config."""
    pid, row = client.finish(TALK, f"!fail 500 api_error {QUICK}")
    assert row["status"] == 1
    assert len(client.events(pid, types=["api_request"])) == 5
    assert "500 api_error" in client.get(pid)["reason"]


def test_the_conversation_is_valid_after_every_fault(client):
    """An interactive process rests, and answers the next message."""
    pid = client.spawn(BASH, interactive=True)
    for fault in [
        "!fail 400",
        "!fail 413 request_too_large",
        "!badjson bash",
        "!empty",
        "!say x\n!& !stop refusal",
    ]:
        client.run(pid, fault)
    assert client.run(pid, "!bash echo fine\n!say done")["message"] == "done"


# --- odd answers ------------------------------------------------------------------------------------


def test_tool_calls_of_an_answer_that_was_cut_off_are_not_run(client, tmp_path):
    """max_tokens with tool_use: error results, and the run ends with that stop reason."""
    pid, row = client.finish(BASH, "!bash touch ran\n!& !stop max_tokens", cwd=str(tmp_path))
    assert row["status"] == 0
    assert client.get(pid)["stop_reason"] == "max_tokens"
    assert not (tmp_path / "ran").exists()
    assert "max_tokens" in client.result(pid)
    (child,) = client.call("proc.fork", pid=pid, prompts=["!say goes on"])["pids"]
    assert client.wait(child)["message"] == "goes on"


def test_a_real_cut_at_max_tokens(client):
    """What came is kept."""
    pid, row = client.finish(program(parameters={"max_tokens": 5}), "!say " + "word " * 100)
    assert row["status"] == 0
    assert client.get(pid)["stop_reason"] == "max_tokens"
    assert 0 < len(row["message"]) < 100


def test_a_refusal_is_an_answer(client):
    """Status 0, its stop reason told."""
    pid = client.spawn(TALK, interactive=True)
    assert client.run(pid, "!say I cannot\n!& !stop refusal")["stop_reason"] == "refusal"
    assert client.run(pid, "!say next")["message"] == "next"


def test_pause_turn_goes_on(client):
    """The answer is sent back, and the model goes on by itself."""
    pid, row = client.finish(TALK, "!say one moment\n!& !stop pause_turn\n!say here it is")
    assert (row["status"], row["message"]) == (0, "here it is")
    assert client.get(pid)["turns"] == 2


def test_an_empty_answer_is_not_stored(client):
    """The API would refuse it in the next request."""
    pid = client.spawn(TALK, interactive=True)
    result = client.run(pid, "!empty")
    assert (result["stop_reason"], result["message"]) == ("end_turn", "")
    assert len(client.history(pid)) == 1
    assert client.run(pid, "!say next")["message"] == "next"


def test_an_answer_without_usage(client):
    """It counts as nothing."""
    pid, row = client.finish(TALK, "!say x\n!& !nousage")
    assert (row["status"], row["message"]) == (0, "x")
    assert client.get(pid)["usage"]["output_tokens"] == 0


def test_several_broken_calls(client, tmp_path):
    """A good call beside a broken one is run."""
    pid, row = client.finish(BASH, "!bash echo good\n!& !badjson bash\n!say done", cwd=str(tmp_path))
    assert row["message"] == "done"
    good, broken = client.results(pid)
    assert good == "good\n[exit 0]"
    assert "JSON" in broken


def test_thinking_goes_back_byte_for_byte(client, strict):
    """Signed thinking is part of the history, and of what is sent."""
    thinking = program("bash", parameters={"thinking": {"type": "adaptive"}, "max_tokens": 4096})
    pid, row = client.finish(thinking, "!think let me see\n!& !bash echo x\n!say done")
    assert row["message"] == "done"
    kinds = [block["type"] for block in client.history(pid)[1]["content"]]
    assert kinds == ["thinking", "tool_use"]
    sent = json.loads(strict.bodies()[-1])["messages"][1]["content"]
    assert sent[0]["signature"]
    assert sent == client.history(pid)[1]["content"]


def test_unknown_blocks_are_kept(client, strict):
    """What is not known here goes back as it came, a cache marker apart."""
    block = '{"type":"text","text":"known","citations":null'
    pid = client.spawn(TALK, interactive=True)
    client.run(pid, f"!raw {block}}}")
    assert client.run(pid, "!say next")["message"] == "next"
    assert block in strict.bodies()[-1]


# --- endpoints --------------------------------------------------------------------------------------


def test_a_stalled_stream_is_tried_again(build):
    """Silence is a failure after `stall_s`."""
    daemon = build("stall_s = 0.5\nretries = 100\n").start()
    with daemon.client() as client:
        _, row = client.finish(TALK, "!stall 30 times=1\n!say done")
        assert row["message"] == "done"
        daemon.config.write_text("retries = 1\n")
        client.call("sys.reload")
        pid, row = client.finish(TALK, "!stall 30")
        assert row["status"] == 1
        assert "no data" in client.get(pid)["reason"]


def test_nobody_answers(build, strict):
    """An endpoint that is not there: retries, then status 1."""
    daemon = build("retries = 1\n", url="http://127.0.0.1:9").start()
    with daemon.client() as client:
        pid, row = client.finish(TALK, "!say x")
        assert row["status"] == 1
        assert "cannot connect" in client.get(pid)["reason"]


def test_no_key_is_sent_to_a_programs_own_endpoint(build, strict):
    """Unless the config pairs them."""
    daemon = build(url="http://127.0.0.1:9").start()
    with daemon.client() as client:
        pid, row = client.finish(program(model={"base_url": strict.url}), "!say x")
        assert row["status"] == 1
        assert "401" in client.get(pid)["reason"]
    (request,) = strict.requests()
    assert CANARY not in str(request)
    assert not {"x-api-key", "authorization"} & set(request["headers"])


def test_an_endpoints_own_key(build, strict):
    """The config pairs an endpoint with a variable; only that key goes there."""
    daemon = build(f'[endpoints."{strict.url}"]\napi_key_env = "LOCAL_KEY"\n', url="http://127.0.0.1:9")
    daemon.start(LOCAL_KEY="local-key-1")
    with daemon.client() as client:
        _, row = client.finish(program(model={"base_url": strict.url}), "!say x")
        assert row["message"] == "x"
    (request,) = strict.requests()
    assert "local-key-1" in str(request["headers"])
    assert CANARY not in str(request)


def test_without_a_key_nothing_starts(build):
    """The spawn is refused with EACCES, before a process is made; the scripted model needs none."""
    daemon = build().start(ANTHROPIC_API_KEY="")
    with daemon.client() as client:
        with refused("EACCES", "ANTHROPIC_API_KEY"):
            client.spawn(TALK, "!say x")
        assert client.call("proc.list", all=True)["procs"][1:] == []
        _, row = client.finish(program(provider="script"), "!say no key needed")
        assert row["message"] == "no key needed"
