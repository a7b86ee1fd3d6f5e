"""Endpoints that refuse or answer nonsense: a clear sentence, an errno, a process that goes on afterwards."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from e2ekit import Daemon, program, texts, toml

KEY = "sk-local-7c1b"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Welcome</title></head>\n<body><h1>It works!</h1></body></html>\n"
USAGE = {"input_tokens": 12, "output_tokens": 3}


def stream(text="fine", first=None, last=None):
    """A whole answer; `first` and `last` are what its two events say of usage, as JSON."""
    begun = '{"type":"message_start","message":{"id":"msg_1","content":[]%s}}' % (first or "")
    ended = '{"type":"message_delta","delta":{"stop_reason":"end_turn"}%s}' % (last or "")
    events = [
        begun,
        '{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}',
        '{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":'
        + json.dumps(text)
        + "}}",
        '{"type":"content_block_stop","index":0}',
        ended,
        '{"type":"message_stop"}',
    ]
    return 200, "text/event-stream", "".join(f"data: {event}\n\n" for event in events).encode()


def error(status, kind, text, **more):
    body = {"type": "error", "error": {"type": kind, "message": text, **more}}
    return status, "application/json", json.dumps(body).encode()


class Handler(BaseHTTPRequestHandler):
    """Answers what the test says."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.endswith("/count_tokens"):
            self.server.counted += 1
            status, kind, data = self.server.count()
        else:
            self.server.bodies.append(body)
            status, kind, data = self.server.answer(body, self.headers)
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *_):
        """Say nothing."""


class Endpoint(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.bodies = []
        self.answer = lambda _body, _headers: stream()
        self.counted = 0
        self.count = lambda: error(404, "not_found_error", "no such page")
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,))
        self.thread.start()

    def always(self, answer):
        self.answer = lambda _body, _headers: answer

    def close(self):
        self.shutdown()
        self.thread.join()
        self.server_close()


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.close()


@pytest.fixture
def paired(endpoint, tmp_path):
    """A daemon that has a key for the endpoint, and few retries."""
    daemon = Daemon(tmp_path / "paired", "http://127.0.0.1:9")
    lines = ["retries = 1", f'[endpoints."{endpoint.url}"]', 'api_key_env = "LOCAL_KEY"']
    daemon.config.write_text("\n".join(lines) + "\n")
    daemon.start(LOCAL_KEY=KEY)
    yield daemon
    daemon.close()


@pytest.fixture
def client(paired):
    with paired.client() as connection:
        yield connection


def at(endpoint, name="good-model"):
    return program(model={"base_url": endpoint.url, "name": name})


def run(client, pid, prompt="hello"):
    return client.call("proc.run", pid=pid, prompt=prompt)


def failed(client, pid, *words):
    """A run fails with one line on stderr, whose words are these."""
    result = run(client, pid)
    assert (result["stop_reason"], result.get("status")) == ("error", None)
    lines = client.read(pid, 2).decode().splitlines()
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    assert "<" not in lines[0], "markup is no sentence"
    (row,) = client.call("proc.list", pids=[pid])["procs"]
    assert (row["stat"], row["wchan"]) == ("S", "fd:0")


def goes_on(client, endpoint, pid):
    """What was mended is all it takes: the next message is answered, and the conversation is whole."""
    result = run(client, pid, "again")
    assert (result["message"], result["stop_reason"]) == ("fine", "end_turn")
    sent = endpoint.bodies[-1]["messages"]
    assert [message["role"] for message in sent] == ["user"]
    assert [block["text"] for block in sent[0]["content"]] == ["hello", "again"]
    assert texts(client.history(pid))[-1] == "fine"


def only(name):
    """An endpoint that knows one model."""

    def answer(body, _headers):
        model = body["model"]
        return stream() if model == name else error(404, "not_found_error", f"model: {model}")

    return answer


def test_an_unknown_model_is_enoent_and_exec_mends_it(client, endpoint):
    endpoint.answer = only("good-model")
    pid = client.call("proc.spawn", program=at(endpoint, "nonesuch"), interactive=True)["pid"]
    failed(client, pid, "ENOENT: ", "404", "model: nonesuch")
    client.call("proc.exec", pid=pid, program=at(endpoint))
    goes_on(client, endpoint, pid)


def test_an_unknown_model_is_mended_in_the_file_too(client, endpoint, paired):
    """HUP: the next turn uses the program file as it is now."""
    endpoint.answer = only("good-model")
    path = paired.folder / "p.toml"
    path.write_text(toml(at(endpoint, "nonesuch")))
    pid = client.call("proc.spawn", program=str(path), interactive=True)["pid"]
    failed(client, pid, "ENOENT: ")
    path.write_text(toml(at(endpoint)))
    client.signal(pid, "HUP")
    goes_on(client, endpoint, pid)


def test_a_process_that_ended_so_is_resumed_by_a_fork(client, endpoint):
    """Without an open fd 0 the failure is the end: status 1, and a fork has the same history."""
    endpoint.always(error(404, "not_found_error", "model: good-model"))
    pid = client.call("proc.spawn", program=at(endpoint), prompt="hello")["pid"]
    row = client.wait(pid)
    assert row["status"] == 1
    endpoint.always(stream())
    (child,) = client.call("proc.fork", pid=pid, prompts=["again"])["pids"]
    row = client.wait(child)
    assert (row["status"], row["message"]) == (0, "fine")
    assert [block["text"] for block in endpoint.bodies[-1]["messages"][0]["content"]] == ["hello", "again"]


def test_a_refused_key_is_eacces_and_the_right_one_mends_it(client, endpoint, paired):
    """The daemon gets keys when it starts: started again with the right one, the process goes on."""

    def answer(_body, headers):
        right = headers["authorization"] == "Bearer sk-right"
        return stream() if right else error(401, "authentication_error", f"invalid key {KEY}")

    endpoint.answer = answer
    pid = client.call("proc.spawn", program=at(endpoint), interactive=True)["pid"]
    failed(client, pid, "EACCES: ", "401", "invalid key ***")
    assert len(endpoint.bodies) == 1
    client.close()
    paired.stop()
    paired.start(LOCAL_KEY="sk-right")
    with paired.client() as again:
        goes_on(again, endpoint, pid)


@pytest.mark.parametrize(
    ("status", "errno", "asked"),
    [(200, "EPROTO", 1), (404, "ENOENT", 1), (502, "EIO", 2), (301, "EPROTO", 1)],
)
def test_a_web_page_is_no_model(client, endpoint, status, errno, asked):
    """A base_url that is somebody's web site, a proxy's error page, or a redirect."""
    endpoint.always((status, "text/html; charset=utf-8", PAGE))
    pid = client.call("proc.spawn", program=at(endpoint), interactive=True)["pid"]
    failed(client, pid, f"{errno}: ", "redirect" if status == 301 else 'a web page, "Welcome"')
    assert len(endpoint.bodies) == asked
    endpoint.always(stream())
    goes_on(client, endpoint, pid)


def test_nobody_there_is_ehostunreach(client, endpoint):
    """The port is closed: it may be open again later, so it is asked again, and then it is final."""
    pid = client.call("proc.spawn", program=at(endpoint), interactive=True)["pid"]
    closed = program(model={"base_url": "http://127.0.0.1:1", "name": "good-model"})
    client.call("proc.exec", pid=pid, program=closed)
    failed(client, pid, "EHOSTUNREACH: ", "http://127.0.0.1:1", "asked 2 times")
    client.call("proc.exec", pid=pid, program=at(endpoint))
    goes_on(client, endpoint, pid)


@pytest.mark.parametrize(
    ("first", "last", "usage"),
    [
        ("", "", (0, 0)),
        (',"usage":null', ',"usage":null', (0, 0)),
        (',"usage":{}', "", (0, 0)),
        (',"usage":{"input_tokens":null,"output_tokens":null}', ',"usage":{"output_tokens":3}', (0, 3)),
        (
            ',"usage":{"input_tokens":12,"cache_read_input_tokens":null}',
            ',"usage":{"output_tokens":3}',
            (12, 3),
        ),
        (',"usage":{"input_tokens":12,"output_tokens":1}', ',"usage":{"output_tokens":null}', (12, 1)),
        (',"usage":{"input_tokens":12,"new_tokens":{"a":1}}', ',"usage":{"output_tokens":3}', (12, 3)),
    ],
)
def test_usage_may_be_missing_or_null(client, endpoint, first, last, usage):
    """The answer counts all the same; what nobody counted is 0."""
    endpoint.always(stream(first=first, last=last))
    pid = client.call("proc.spawn", program=at(endpoint), interactive=True)["pid"]
    result = run(client, pid)
    assert (result["message"], result["stop_reason"]) == ("fine", "end_turn")
    assert (result["usage"]["input_tokens"], result["usage"]["output_tokens"]) == usage


@pytest.mark.parametrize(
    "usage", ['"many"', "[1]", '{"input_tokens":"12"}', '{"input_tokens":-5}', '{"input_tokens":1e30}']
)
def test_usage_that_is_nonsense_is_told_of_or_ignored(client, endpoint, usage):
    """Whatever it says: the books hold no negative number, and the next answer counts."""
    endpoint.always(stream(first=f',"usage":{usage}'))
    pid = client.call("proc.spawn", program=at(endpoint), interactive=True)["pid"]
    result = run(client, pid)
    assert result["stop_reason"] in {"end_turn", "error"}
    assert result["usage"]["input_tokens"] >= 0
    endpoint.always(stream())
    assert run(client, pid, "again")["message"] == "fine"


@pytest.mark.parametrize(
    ("refusal", "asked"),
    [
        ((429, "rate_limit_error", "slow down"), 2),
        ((503, "api_error", "not now"), 2),
        ((401, "authentication_error", "who are you?"), 2),
        ((400, "invalid_request_error", "prompt is too long"), 2),
        ((404, "not_found_error", "no such page"), 1),
    ],
)
def test_only_an_endpoint_that_cannot_count_is_asked_no_more(client, endpoint, refusal, asked):
    """What passes, or is one conversation's own, says nothing of the next count."""
    endpoint.count = lambda: error(*refusal)
    small = at(endpoint) | {"limits": {"tokens": 2000}, "parameters": {"max_tokens": 10}}
    for _ in range(2):
        pid = client.call("proc.spawn", program=small, prompt="a b c d " * 1000)["pid"]
        (row,) = client.call("proc.wait", pids=[pid])["procs"]
        assert row["status"] == 152
    assert (endpoint.counted, endpoint.bodies) == (asked, [])


@pytest.mark.parametrize("status", [400, 409])
@pytest.mark.parametrize("code", ["thread_already_continued", "thread_continue_in_flight"])
def test_a_thread_that_is_gone_on_with_elsewhere_is_left(client, endpoint, status, code):
    """All is sent at once, whatever the status: no retry is spent on it."""

    def answer(body, _headers):
        if body["thread"]["type"] == "create":
            return stream()
        return error(status, "invalid_request_error", "thread: no", details={"error_code": code})

    endpoint.answer = answer
    threaded = program(model={"base_url": endpoint.url, "name": "good-model", "threads": True})
    pid = client.call("proc.spawn", program=threaded, interactive=True)["pid"]
    assert [run(client, pid)["message"] for _ in range(3)] == ["fine"] * 3
    kinds = [body["thread"]["type"] for body in endpoint.bodies]
    assert kinds == ["create", "continue", "create", "continue", "create"]
    assert [len(body["messages"]) for body in endpoint.bodies] == [1, 1, 3, 1, 5]
    assert client.read(pid, 2) == b""
