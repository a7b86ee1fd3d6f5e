"""Descriptors: long outputs as files, read exactly by users and page by page by models."""

import itertools
import random
import re
import threading
import time

import pytest
from e2ekit import program, refused, script, texts, use

LIMIT, PAGE = 2000, 900
PAGING = {"max_direct_output_chars": LIMIT, "default_page_size": PAGE, "max_input_chars": LIMIT}
READER = program(
    "bash", "read_file", "read_fd", "fd_to_file", "fork", "spawn",
    model={"max_iterations": 500}, file_descriptor=PAGING,
)  # fmt: skip


def frame(text):
    """Attributes and content of the outermost frame of a tool result."""
    found = re.fullmatch(r"<(?P<tag>\w+)(?P<pairs>[^>]*)>\n(?P<body>.*)\n</(?P=tag)>", text, re.DOTALL)
    assert found, text[:300]
    return dict(re.findall(r'(\w+)="([^"]*)"', found["pairs"])), found["body"]


def preview(text):
    """Attributes of an <fd_result>, and the page that is in it."""
    pairs, body = frame(text)
    found = re.fullmatch(r"<message>[^\n]*</message>\n<(preview\w*)>\n(.*)\n</\1>", body, re.DOTALL)
    assert found, body[:300]
    return pairs, found[2]


CONTENTS = {
    "lines": "".join(f"line {n} of the file\n" for n in range(1, 600)),
    "no newline at the end": "word " * 1000 + "\nlast",
    "one long line": "abcdefghij" * 700,
    "empty lines": "\n" * 3000,
    "wide characters": "".join(f"{n} äöü €uro 漢字 😀\n" for n in range(300)),
    "carriage returns": "".join(f"dos {n}\r\n" for n in range(500)),
    "odd separators": "".join(f"a\x0bb\x0cc\x1cd\x85e\u2028f{n}\n" for n in range(300)),
    "closing tags": "</fd_content>\n</fd_content_1>\n</preview>\n</fd_result>\n<&>'\"\n" * 100,
    "exactly one over": "x" * (LIMIT + 1),
}


@pytest.fixture(params=CONTENTS)
def content(request):
    return CONTENTS[request.param]


@pytest.fixture
def opened(client, tmp_path):
    """Opens a text as fd:3 of a new process, and gives the pid and what the model read."""

    def opened(content, prog=READER):
        path = tmp_path / "content"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        pid = client.spawn(prog, interactive=True, cwd=str(tmp_path))
        client.run(pid, "!read_file content\n!say ok")
        return pid, client.result(pid)

    return opened


def asked(client, pid, **arguments):
    """What the model reads when it calls read_fd."""
    assert client.run(pid, f"{use('read_fd', **arguments)}\n!say ok")["message"] == "ok"
    return client.result(pid)


# --- when an output becomes a file ------------------------------------------------------------------


def test_a_short_result_stays_as_it_is(opened, client):
    """Up to the limit, in characters, nothing becomes a file."""
    pid, result = opened("€" * LIMIT)
    assert result == "€" * LIMIT
    assert 3 not in client.fds(pid)


def test_the_first_page_stands_in_the_result(opened, content):
    """With its size, and exactly as it is."""
    _, result = opened(content)
    pairs, page = preview(result)
    assert content.startswith(page)
    assert 0 < len(page) <= PAGE
    assert int(pairs["chars"]) == len(content)
    assert int(pairs["total_lines"]) == content.count("\n") + (not content.endswith("\n"))
    assert pairs["fd"] == "fd:3"
    assert pairs["source"] == "read_file"
    assert pairs["truncated"] == "true"


def test_all_pages_joined_are_the_content(opened, client, content):
    """As the model reads them; a line is cut only if it is longer than a page."""
    pid, result = opened(content)
    count = int(preview(result)[0]["pages"])
    calls = "\n!& ".join(use("read_fd", fd="fd:3", start=n)[1:] for n in range(1, count + 1))
    client.run(pid, f"!{calls}\n!say ok")
    pages = [frame(text) for text in client.results(pid)[1:]]
    assert "".join(body for _, body in pages) == content
    for (_, body), (pairs, _) in itertools.pairwise(pages):
        assert (pairs["continued"] == "true") == (not body.endswith("\n"))
        assert body.endswith("\n") or len(body) == PAGE
    assert [pairs["page"] for pairs, _ in pages] == [str(n) for n in range(1, count + 1)]


def test_users_read_exact_bytes(opened, client, content):
    """By offset, in pieces of any size, and by page."""
    pid, result = opened(content)
    data = content.encode()
    assert client.read(pid, 3) == data
    assert client.call("fd.stat", pid=pid, fd="fd:3")["size"] == len(data)
    pieces = [client.call("fd.read", pid=pid, fd=3, offset=at, count=777) for at in range(0, len(data), 777)]
    assert b"".join(piece["data"] for piece in pieces) == data
    assert [piece["eof"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    count = int(preview(result)[0]["pages"])
    pages = [client.call("fd.read", pid=pid, fd=3, page=n)["data"] for n in range(1, count + 1)]
    assert b"".join(pages) == data
    with refused("EINVAL", "page"):
        client.call("fd.read", pid=pid, fd=3, page=count + 1)


def test_bytes_that_are_no_text(opened, client):
    """Users get them as they are; a model sees \\xNN."""
    data = bytes(range(256)) * 40
    pid, result = opened(data)
    assert client.read(pid, 3) == data
    count = int(preview(result)[0]["pages"])
    calls = "\n".join(use("read_fd", fd="fd:3", start=n) for n in range(1, count + 1))
    client.run(pid, f"{calls}\n!say ok")
    shown = "".join(frame(text)[1] for text in client.results(pid)[1:])
    assert shown == data.decode(errors="backslashreplace")
    client.run(
        pid, f"{use('fd_to_file', fd='fd:3', file_path='copy')}\n!bash cmp content copy && echo same\n!say ok"
    )
    assert client.result(pid) == "same\n[exit 0]"


def test_an_error_text_becomes_a_file_too(client):
    """Every result does, whatever made it; it is still an error."""
    small = program(
        "read_file", "read_fd", file_descriptor={"max_direct_output_chars": 200, "default_page_size": 100}
    )
    pid, _ = client.finish(small, f"{use('read_file', file_path='x' * 300)}\n!say ok")
    (block,) = client.history(pid)[2]["content"]
    assert block["is_error"] is True
    assert preview(block["content"])[1].startswith(("File name too long", "File not found"))


def test_turned_off_results_stay_whole(client, tmp_path):
    """`enabled = false`."""
    whole = program("read_file", file_descriptor={"enabled": False})
    (tmp_path / "long").write_text("y\n" * 50_000)
    pid, _ = client.finish(whole, "!read_file long\n!say ok", cwd=str(tmp_path))
    assert client.result(pid) == "y\n" * 50_000


# --- read_fd ----------------------------------------------------------------------------------------


def test_lines(opened, client):
    """Whole lines, counted from 1."""
    content = CONTENTS["wide characters"]
    pid, _ = opened(content)
    lines = content.splitlines(keepends=True)
    for start, count in [(1, 1), (7, 3), (150, 20), (299, 5), (300, 1)]:
        pairs, body = frame(asked(client, pid, fd="fd:3", mode="line", start=start, count=count))
        assert body == "".join(lines[start - 1 : start - 1 + count])
        assert pairs["lines"] == f"{start}-{min(300, start + count - 1)}"
        data = client.call("fd.read", pid=pid, fd=3, line=start, lines=count)["data"]
        assert data.decode() == body


def test_characters(opened, client):
    """Counted from 0; it says whether it begins and ends inside a line."""
    content = CONTENTS["wide characters"]
    pid, _ = opened(content)
    for start, count in [(0, 1), (0, 500), (899, 3), (1000, 1900), (len(content) - 5, 100)]:
        pairs, body = frame(asked(client, pid, fd="fd:3", mode="char", start=start, count=count))
        assert body == content[start : start + count]
        assert pairs["continued"] == str(bool(start) and content[start - 1] != "\n").lower()
        ends_inside = start + count < len(content) and not body.endswith("\n")
        assert pairs["truncated"] == str(ends_inside).lower()


def test_several_pages(opened, client):
    """`count` pages at once."""
    content = CONTENTS["lines"]
    pid, result = opened(content)
    pairs, body = frame(asked(client, pid, fd="fd:3", start=2, count=2))
    assert content.startswith(preview(result)[1] + body)
    assert pairs["page"] == "2-3"


def chain(client, pid, **arguments):
    """All that a selection holds, following `next`; and the longest answer."""
    text, longest = "", 0
    for _ in range(100):
        pairs, body = frame(asked(client, pid, **arguments))
        text += body
        longest = max(longest, len(body))
        if "next" not in pairs:
            return text, longest
        assert pairs["capped"] == "true"
        arguments = {"fd": arguments["fd"]}
        for word in pairs["next"].split():
            key, _, value = word.partition("=")
            arguments[key] = int(value) if value.isdigit() else value
    raise AssertionError(f"it has no end: {arguments}")


@pytest.mark.parametrize("name", ["lines", "one long line", "wide characters", "closing tags"])
@pytest.mark.parametrize("arguments", [{"read_all": True}, {"count": 5}, {"mode": "line", "count": 200}])
def test_what_is_capped_can_be_read_on(opened, client, name, arguments):
    """An answer holds at most `max_direct_output_chars`; following `next` joins to the whole."""
    content = CONTENTS[name]
    pid, _ = opened(content)
    text, longest = chain(client, pid, fd="fd:3", **arguments)
    assert longest <= LIMIT
    if "read_all" in arguments:
        assert text == content
    elif "mode" in arguments:
        assert text == "".join(re.findall(r"[^\n]*\n|[^\n]+", content)[:200])
    else:
        assert text == "".join(
            client.call("fd.read", pid=pid, fd=3, page=n)["data"].decode() for n in range(1, 6)
        )


def test_grep(opened, client):
    """Numbered lines that match; none is no error; a bad pattern is."""
    pid, _ = opened(CONTENTS["lines"])
    _, body = frame(asked(client, pid, fd="fd:3", grep="line 57[0-3] "))
    assert body.splitlines() == [f"{n}:line {n} of the file" for n in range(570, 574)]
    assert asked(client, pid, fd="fd:3", grep="(")
    assert client.history(pid)[-2]["content"][0]["is_error"] is True
    data = client.call("fd.read", pid=pid, fd=3, grep="line 57[0-3] ")["data"]
    assert data.decode() == "".join(f"line {n} of the file\n" for n in range(570, 574))


def test_extract(opened, client):
    """A selection becomes a descriptor of its own."""
    content = CONTENTS["lines"]
    pid, _ = opened(content)
    pairs, _ = frame(asked(client, pid, fd="fd:3", mode="line", start=10, count=150, extract_to_new_fd=True))
    assert pairs["new_fd"] == "fd:4"
    assert client.read(pid, 4).decode() == "".join(content.splitlines(keepends=True)[9:159])
    pairs, body = frame(asked(client, pid, fd="fd:4"))
    assert body.startswith("line 10 ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"fd": "fd:99"}, "no fd:99"),
        ({"fd": "three"}, "three"),
        ({"fd": "ref:none"}, "no ref:none"),
        ({"fd": "fd:0"}, "fd:0"),
        ({"fd": "999/fd:3"}, "999"),
        ({"fd": "fd:3", "start": 999}, "Valid range: 1-"),
        ({"fd": "fd:3", "start": 0}, "Valid range: 1-"),
        ({"fd": "fd:3", "mode": "line", "start": 99999}, "Valid range: 1-"),
        ({"fd": "fd:3", "mode": "char", "start": 999999}, "Valid range: 0-"),
        ({"fd": "fd:3", "mode": "word"}, "word"),
        ({"fd": "fd:3", "count": 0}, "count"),
        ({"fd": "fd:3", "pages": 1}, "pages"),
        ({}, "fd"),
    ],
    ids=str,
)
def test_a_read_that_cannot_be_is_an_error_result(opened, client, arguments, words):
    """It says what there is instead."""
    pid, _ = opened(CONTENTS["lines"])
    assert words in asked(client, pid, **arguments)
    assert client.history(pid)[-2]["content"][0]["is_error"] is True


# --- fd_to_file -------------------------------------------------------------------------------------


def test_fd_to_file(opened, client, tmp_path):
    """Writes exact bytes; its flags refuse what they forbid."""
    content = CONTENTS["carriage returns"]
    pid, _ = opened(content)

    def write(**arguments):
        client.run(pid, f"{use('fd_to_file', fd='fd:3', **arguments)}\n!say ok")
        return client.result(pid)

    pairs, _ = frame(write(file_path="new/copy"))
    assert pairs["success"] == "true"
    assert (tmp_path / "new/copy").read_bytes() == content.encode()
    assert "already exists" in write(file_path="new/copy", exist_ok=False)
    assert "create=False" in write(file_path="other", create=False)
    assert not (tmp_path / "other").exists()
    write(file_path="new/copy", mode="append")
    assert (tmp_path / "new/copy").read_bytes() == content.encode() * 2
    assert "no regular file" in write(file_path="new")


# --- whose it is ------------------------------------------------------------------------------------


def test_forks_share_descriptors_and_numbers(opened, client):
    """fd:3 is one file in parent and child; a new one gets the family's next number."""
    content = CONTENTS["lines"]
    pid, _ = opened(content)
    (child,) = client.call("proc.fork", pid=pid)["pids"]
    assert client.read(child, 3) == content.encode()
    for one, number in [(child, 4), (pid, 5), (child, 6)]:
        client.run(one, "!read_file content\n!say ok")
        assert max(fd for fd in client.fds(one) if isinstance(fd, int)) == number
    assert 5 not in client.fds(child)
    assert 4 not in client.fds(pid)


def test_a_model_reads_its_descendants_descriptors(client, tmp_path):
    """As `9/fd:4`; nobody else's."""
    make = script("!bash seq 3000", "!say made")
    prompt = script(
        use("fork", prompts=[make]), '!read_fd {"fd": "{{result:"pid":([0-9]+)}}/fd:3"}', "!say {{result}}"
    )
    _, row = client.finish(READER, prompt, cwd=str(tmp_path))
    pairs, body = frame(row["message"])
    assert body.startswith("1\n2\n3\n")
    child = int(pairs["fd"].partition("/")[0])
    other = client.spawn(READER, interactive=True)
    assert "EPERM" in asked(client, other, fd=f"{child}/fd:3")


def test_descriptors_of_an_ended_process_stay_readable(client):
    """Until it is removed."""
    pid, _ = client.finish(READER, "!bash seq 3000\n!say ok")
    expected = "".join(f"{n}\n" for n in range(1, 3001)) + "[exit 0]"
    assert client.read(pid, 3).decode() == expected
    assert [fd for fd in client.fds(pid) if isinstance(fd, int) and fd > 2] == [3]


def test_descriptors_survive_a_restart(fresh, tmp_path):
    """Small and large ones, byte for byte; also stdout."""
    fresh.start()
    with fresh.client() as client:
        prompt = script("!bash seq 3000", "!bash seq 300000", "!say all is well")
        pid, _ = client.finish(READER, prompt)
        before = [client.read(pid, fd) for fd in (1, 3, 4)]
        rows = client.fds(pid)
    fresh.restart()
    with fresh.client() as client:
        assert [client.read(pid, fd) for fd in (1, 3, 4)] == before
        assert client.fds(pid) == rows
        assert len(before[2]) > 1_900_000
        (child,) = client.call("proc.fork", pid=pid, prompts=["!bash seq 3000\n!say ok"])["pids"]
        client.wait(child)
        assert 5 in client.fds(child)


def test_what_only_removed_processes_had_is_freed(fresh):
    """On the disk too; a fork keeps what it shares, in this life and the next."""
    fresh.start()
    blobs = fresh.state / "blobs"
    with fresh.client() as client:
        pid, _ = client.finish(READER, script("!bash seq 300000", "!say all is well"))
        (child,) = client.call("proc.fork", pid=pid)["pids"]
        client.send(child, "!bash seq 300000 -1 1\n!say here too")
        client.rests(child)
        whole, both = client.read(child, 3), sorted(path.name for path in blobs.iterdir())
        client.call("proc.remove", pids=[pid])
        assert client.call("store.gc") == {"files": 0, "messages": 0, "bytes": 0}
        assert sorted(path.name for path in blobs.iterdir()) == both
    fresh.restart()
    with fresh.client() as client:
        assert client.read(child, 3) == whole
        assert texts(client.history(child))[-1] == "here too"
        client.call("proc.signal", pid=child, signal="KILL")
        client.wait(child)
        client.call("proc.remove", pids=[child])
        would = client.call("store.gc", dry_run=True)
        assert (would["files"], would["messages"]) == (2, 8)
        assert would["bytes"] > 2 * len(whole)
        assert sorted(path.name for path in blobs.iterdir()) == both
        assert client.call("store.gc") == would
        assert list(blobs.iterdir()) == []


# --- long input, references -------------------------------------------------------------------------


def test_a_long_user_message_becomes_a_descriptor(client):
    """The model reads the first page of it."""
    pid = client.spawn(READER, interactive=True)
    text = "".join(f"input line {n}\n" for n in range(400)) + "!say never"
    client.send(pid, text)
    client.until(pid, lambda row: row["turns"] == 1)
    pairs, page = preview(texts(client.history(pid))[0])
    assert pairs["source"] == "user_input"
    assert text.startswith(page)
    assert client.read(pid, 3).decode() == text


def test_a_long_message_stays_whole_if_the_program_says_so(client):
    """`page_user_input = false`."""
    whole = program("read_fd", file_descriptor={"page_user_input": False})
    text = "word " * 4000 + "\n!say got it"
    pid, row = client.finish(whole, text)
    assert row["message"] == "got it"
    assert texts(client.history(pid))[0] == text


def test_references(client):
    """Text inside <ref> in an answer can be read and written at once; the last of one name wins."""
    with_refs = program("read_fd", "fd_to_file", "bash", file_descriptor={"enable_references": True})
    said = '<ref id="code">print(1)\\n</ref> and <ref id="code">print(2)\\n</ref>'
    prompt = script(
        f"!say {said}", f"!& {use('fd_to_file', fd='ref:code', file_path='out.py')}",
        use("read_fd", fd="ref:code"), "!say ok",
    )  # fmt: skip
    pid, _ = client.finish(with_refs, prompt, cwd="/tmp")
    assert client.read(pid, "ref:code") == b"print(2)\n"
    assert frame(client.result(pid))[1] == "print(2)\n"


# --- growing files ----------------------------------------------------------------------------------


def test_a_command_in_the_background_grows_a_file(client, tmp_path):
    """The model goes on; the file says that it grows, and is complete when the command ends."""
    command = (
        "for n in 1 2 3; do echo part $n; sleep 0.2; done; while [ ! -e go ]; do sleep 0.05; done; echo end"
    )
    pid = client.spawn(READER, interactive=True, cwd=str(tmp_path))
    call = use("bash", command=command, background=True)
    assert client.run(pid, f"{call}\n!say started")["message"] == "started"
    assert "fd:3" in client.result(pid)
    deadline = time.monotonic() + 30
    while b"part 3" not in client.read(pid, 3):
        assert time.monotonic() < deadline
    assert client.fds(pid)[3]["complete"] is False
    pairs, body = frame(asked(client, pid, fd="fd:3"))
    assert (pairs["pages"], pairs["partial"]) == ("1+", "true")
    assert body == "part 1\npart 2\npart 3\n"
    follow = client.begin("fd.read", pid=pid, fd=3, offset=len(body), wait_ms=30_000)
    (tmp_path / "go").touch()
    assert client.end(follow)["data"].startswith(b"end")
    client.until(pid, lambda _: client.fds(pid)[3]["complete"])
    assert client.read(pid, 3) == b"part 1\npart 2\npart 3\nend\n[exit 0]"
    pairs, _ = frame(asked(client, pid, fd="fd:3"))
    assert pairs["pages"] == "1"
    assert "partial" not in pairs


def test_a_growing_file_is_complete_after_a_crash(fresh):
    """Its command died with the daemon; what it had said is there, and nobody waits for more."""
    fresh.start()
    with fresh.client() as client:
        pid = client.spawn(READER, interactive=True)
        client.run(pid, f"{use('bash', command='echo before; sleep 100', background=True)}\n!say started")
        while client.read(pid, 3) != b"before\n":
            time.sleep(0.01)
    fresh.restart()
    with fresh.client() as client:
        assert client.fds(pid)[3]["complete"] is True
        assert client.read(pid, 3).startswith(b"before\n")
        part = client.call("fd.read", pid=pid, fd=3, offset=1 << 20, wait_ms=30_000)
        assert part["eof"] is True


def test_follow_stdout(client):
    """fd.read with wait_ms returns when more has been said."""
    pid = client.spawn(program(), interactive=True)
    follow = client.begin("fd.read", pid=pid, fd=1, wait_ms=30_000)
    client.send(pid, "!say hello")
    assert client.end(follow)["data"] == b"hello\n"
    client.call("proc.send", pid=pid, close=True)
    assert client.call("fd.read", pid=pid, fd=1, offset=6, wait_ms=30_000)["eof"] is True


# --- size -------------------------------------------------------------------------------------------


def test_50_megabytes_hold_nobody_up(client, daemon, tmp_path):
    """Another client's `proc.list` is answered all the while."""
    worst, done = [0.0], threading.Event()

    def look():
        with daemon.client() as other:
            while not done.is_set():
                began = time.monotonic()
                other.call("proc.list")
                worst[0] = max(worst[0], time.monotonic() - began)
                time.sleep(0.005)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        command = "!bash seq 1 7000000 | head -c 50000000"
        read = use("read_fd", fd="fd:3", mode="line", start=3_000_000, count=2)
        pid = client.spawn(READER, f"{command}\n{read}\n!say ok", cwd=str(tmp_path))
        assert client.wait(pid)["message"] == "ok"
        assert frame(client.result(pid))[1] == "3000000\n3000001\n"
        assert client.fds(pid)[3]["size"] >= 50_000_000
    finally:
        done.set()
        watcher.join()
    assert worst[0] < 5.0, "one answer waited for the large output"


def test_random_reads_of_a_random_text(opened, client):
    """Whatever is selected is what the text has there."""
    chance = random.Random(7)
    alphabet = "ab\n\n é漢😀</>&\r"
    content = "".join(chance.choice(alphabet) * chance.choice((1, 1, 1, 400)) for _ in range(600))
    assert len(content) > LIMIT
    pid, _ = opened(content)
    for _ in range(15):
        start = chance.randrange(len(content))
        count = chance.randrange(1, LIMIT)
        _, body = frame(asked(client, pid, fd="fd:3", mode="char", start=start, count=count))
        assert content.startswith(body, start)
        assert len(body) == min(count, len(content) - start)
