"""Descriptors over the wire: exact bytes, pages, lines and patterns of every kind of file."""

import pytest
import trio
from machinekit import refused, running, script, table, use

from llmprocd.abi.errno import Errno
from llmprocd.tools.spawner import Spawner

PAGED = table(
    "calculator", "write_stderr", file_descriptor={"max_direct_output_chars": 20, "default_page_size": 10}
)
BIG = '!calculator {"expression":"10**50"}'


async def with_fd(machine):
    """A process that has an fd 3 with a long number in it."""
    pid = await machine.spawn(PAGED, interactive=True)
    await machine.call("proc.run", pid=pid, prompt=script(BIG, "!say hi"))
    return pid


async def test_a_process_has_three_descriptors_from_the_start(machine):
    pid = await machine.spawn(interactive=True)
    rows = (await machine.call("fd.list", pid=pid)).fds
    assert [(row.fd, row.mode, row.type, row.size, row.name) for row in rows] == [
        (0, "r", "MBOX", 0, "mailbox"),
        (1, "w", "LOG", 0, "stdout"),
        (2, "w", "LOG", 0, "stderr"),
    ]
    assert all(row.pid == pid for row in rows)


async def test_an_output_that_became_a_file_is_listed_and_exact(autojump_clock, machine):
    pid = await with_fd(machine)
    (row,) = [row for row in (await machine.call("fd.list")).fds if row.fd == 3]
    assert (row.pid, row.mode, row.type, row.name, row.complete) == (pid, "r", "BLOB", "calculator", True)
    data = (await machine.call("fd.read", pid=pid, fd=3)).data
    assert data == b"1" + b"0" * 50
    assert row.size == len(data)
    assert await machine.call("fd.stat", pid=pid, fd=3) == row


@pytest.mark.parametrize("name", [3, "3", "fd:3"])
async def test_a_descriptor_has_several_spellings(autojump_clock, machine, name):
    pid = await with_fd(machine)
    assert (await machine.call("fd.read", pid=pid, fd=name, count=2)).data == b"10"
    assert (await machine.call("fd.stat", pid=pid, fd=name)).fd == 3


@pytest.mark.parametrize(
    "name", [9, -1, "fd:9", "fd:-1", "fd:", "", "three", "fd:3x", "ref:x", "ref:", "²", "9" * 5000]
)
async def test_a_descriptor_that_is_not_there_is_ebadf(autojump_clock, machine, name):
    pid = await with_fd(machine)
    for method in ("fd.read", "fd.stat"):
        with refused(Errno.EBADF):
            await machine.call(method, pid=pid, fd=name)


async def test_the_refusal_says_which_there_are(autojump_clock, machine):
    pid = await with_fd(machine)
    with refused(Errno.EBADF, f"process {pid} has no fd:9; it has fd:3"):
        await machine.call("fd.read", pid=pid, fd=9)


async def test_fd_0_can_be_written_and_not_read(machine):
    pid = await machine.spawn(interactive=True)
    for name in (0, "0", "fd:0"):
        with refused(Errno.EBADF, "mailbox"):
            await machine.call("fd.read", pid=pid, fd=name)
        assert (await machine.call("fd.stat", pid=pid, fd=name)).type == "MBOX"
    with refused(Errno.EBADF, "cannot be written"):
        await machine.call("fd.write", pid=pid, fd=1, data="x")


async def test_bytes_are_read_from_any_offset(autojump_clock, machine):
    pid = await with_fd(machine)
    whole = b"1" + b"0" * 50
    for offset, count in ((0, 51), (0, 1), (1, 3), (49, 9), (50, 1), (51, 5), (99, 5), (0, 0), (2**53, 1)):
        read = await machine.call("fd.read", pid=pid, fd=3, offset=offset, count=count)
        assert read.data == whole[offset : offset + count]
        assert (read.offset, read.size) == (offset, 51)
        assert read.eof == (offset + len(read.data) >= 51)


async def test_an_answer_holds_a_chunk_at_most(machine, tmp_path):
    data = bytes(range(256)) * 3000
    (tmp_path / "in").write_bytes(data)
    pid = await machine.spawn(table(), "!say hi", stdin_path=str(tmp_path / "in"))
    got, answers = b"", 0
    while True:
        read = await machine.call("fd.read", pid=pid, fd=3, offset=len(got), count=10_000_000)
        got += read.data
        answers += 1
        assert len(read.data) <= 262_144
        if read.eof:
            break
    assert (got, answers) == (data, 3)


async def test_pages_and_lines_are_those_a_model_reads(autojump_clock, machine):
    program = table(file_descriptor={"default_page_size": 10})
    pid = await machine.spawn(program, interactive=True)
    for text in ("a long first line", "b", "ä"):
        await machine.call("proc.run", pid=pid, prompt=f"!say {text}")
    whole = "a long first line\nb\nä\n"
    assert (await machine.call("fd.read", pid=pid, fd=1)).data.decode() == whole
    pages = [await machine.call("fd.read", pid=pid, fd=1, page=page) for page in (1, 2, 3)]
    assert [page.data.decode() for page in pages] == ["a long fir", "st line\nb\n", "ä\n"]
    assert [(page.page, page.pages, page.offset) for page in pages] == [(1, 3, 0), (2, 3, 10), (3, 3, 20)]
    line = await machine.call("fd.read", pid=pid, fd=1, line=2, lines=2)
    assert line.data.decode() == "b\nä\n"
    assert not line.eof, "it still grows"


async def test_stdout_ends_with_the_process(autojump_clock, machine):
    ended = await machine.finish(table(), "!say hi")
    read = await machine.call("fd.read", pid=ended.pid, fd=1)
    assert (read.data, read.eof) == (b"hi\n", True)
    assert (await machine.call("fd.read", pid=ended.pid, fd=1, page=1)).eof
    assert (await machine.call("fd.read", pid=ended.pid, fd=1, line=1)).eof


async def test_stderr_holds_what_was_logged_and_what_went_wrong(autojump_clock, machine):
    pid = await machine.spawn(PAGED, interactive=True)
    await machine.call("proc.run", pid=pid, prompt=script('!write_stderr {"message":"note"}', "!say hi"))
    await machine.call("proc.run", pid=pid, prompt="!fail 400")
    lines = (await machine.call("fd.read", pid=pid, fd=2)).data.decode().splitlines()
    assert lines[0] == "note"
    assert "400" in lines[1]


async def test_a_follower_of_stdout_is_woken_by_what_is_written(autojump_clock, machine):
    pid = await machine.spawn(interactive=True)
    got = []

    async def follow():
        offset = 0
        while True:
            read = await machine.call("fd.read", pid=pid, fd=1, offset=offset, wait_ms=3_600_000)
            got.append((trio.current_time(), read.data))
            offset += len(read.data)
            if read.eof:
                return

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        for number in range(3):
            await trio.sleep(10)
            await machine.call("proc.run", pid=pid, prompt=f"!say {number}")
        await trio.sleep(10)
        await machine.call("proc.signal", pid=pid, signal="KILL")
    assert [(round(at), data) for at, data in got] == [(10, b"0\n"), (20, b"1\n"), (30, b"2\n"), (40, b"")]


async def test_a_follower_waits_no_longer_than_it_said(autojump_clock, machine):
    pid = await machine.spawn(interactive=True)
    read = await machine.call("fd.read", pid=pid, fd=1, wait_ms=5000)
    assert (read.data, read.eof, trio.current_time()) == (b"", False, 5)


async def test_what_is_read_is_durable_when_it_is_told(autojump_clock):
    async with running(latency=1) as house:
        pid = await house.spawn(interactive=True)
        await house.until(pid, "fd:0")
        await house.call("proc.send", pid=pid, text="!say hi")
        answer = await house.begin("fd.read", pid=pid, fd=1, wait_ms=60_000)
        assert answer.result.data == b"hi\n"
        assert answer.ticket > house.store.durable


async def test_writing_to_fd_0_is_sending(autojump_clock, machine):
    pid = await machine.spawn(interactive=True)
    assert (await machine.call("fd.write", pid=pid, data=b"!say \xc3\xa4")).count == 7
    await machine.call("fd.write", pid=pid, data="!say b", eof=True)
    await machine.call("proc.wait", pids=[pid])
    assert (await machine.call("fd.read", pid=pid, fd=1)).data.decode() == "ä\nb\n"
    with refused(Errno.ESRCH):
        await machine.call("fd.write", pid=pid, data="more")


async def test_an_end_of_file_alone_closes_fd_0(autojump_clock, machine):
    pid = await machine.spawn(interactive=True)
    await machine.call("fd.write", pid=pid, eof=True)
    (row,) = (await machine.call("proc.wait", pids=[pid])).procs
    assert row.status == 0


async def test_references_are_descriptors(autojump_clock, machine):
    pid = await machine.spawn(table(file_descriptor={"enable_references": True}), interactive=True)
    await machine.call("proc.run", pid=pid, prompt='!say see <ref id="plan">one\\ntwo</ref>')
    assert (await machine.call("fd.read", pid=pid, fd="ref:plan")).data == b"one\ntwo"
    assert "ref:plan" in [row.fd for row in (await machine.call("fd.list", pid=pid)).fds]
    assert (await machine.call("fd.stat", pid=pid, fd="ref:plan")).size == 7


async def holding(house, tmp_path, data):
    """A process whose fd 3 holds these bytes."""
    (tmp_path / "in").write_bytes(data)
    return await house.spawn(table(), interactive=True, stdin_path=str(tmp_path / "in"))


async def test_a_line_longer_than_an_answer_comes_in_parts(machine, tmp_path):
    """None over 256 KiB, each of whole characters; `offset` goes on within the line."""
    text = "x" + "\u00e9" * 300_000
    pid = await holding(machine, tmp_path, f"first\n{text}\nlast".encode())
    got: list[bytes] = []
    while not got or not got[-1].endswith(b"last"):
        offset = sum(map(len, got))
        part = await machine.call("fd.read", pid=pid, fd=3, line=2, lines=9, offset=offset)
        assert len(part.data) <= 262_144
        assert part.data.decode()
        assert (part.offset, part.eof) == (offset, part.data.endswith(b"last"))
        got.append(part.data)
    assert b"".join(got).decode() == text + "\nlast"
    assert (await machine.call("fd.read", pid=pid, fd=3, line=1, lines=2)).data == b"first\n"
    assert (await machine.call("fd.read", pid=pid, fd=3, line=3, offset=99)).data == b""


async def test_a_pattern_gives_the_lines_that_match_as_they_are(tmp_path):
    """Also long ones, with other line ends in them, with colons, and bytes that are no text."""
    lines = [
        b"one: 1\n",
        b"two\x0cthree: 3\n",
        b"four\rfive: 5\n",
        "six\u2028seven: 7\n".encode(),
        b"\xff: 8\n",
        b"nul\0ten: 9\n",
        b"x" * 2000 + b": 9\n",
    ]
    async with running(spawner=Spawner.fork()) as house:
        pid = await holding(house, tmp_path, b"".join(line + b"other\n" for line in lines))
        read = await house.call("fd.read", pid=pid, fd=3, grep=": [0-9]")
        assert read.data == b"".join(lines).replace(b"\xff", b"\\xff")
        assert (await house.call("fd.read", pid=pid, fd=3, grep="nothing")).data == b""
        part = await house.call("fd.read", pid=pid, fd=3, grep=": [0-9]", offset=5, count=4)
        assert (part.data, part.eof) == (read.data[5:9], False)
        with refused(Errno.EINVAL, "grep"):
            await house.call("fd.read", pid=pid, fd=3, grep="(")


async def test_a_search_goes_on_when_the_process_ends(tmp_path):
    """The end of a process kills its tools; a user's search is none of them."""
    async with running(spawner=Spawner.fork()) as house:
        pid = await holding(house, tmp_path, b"a line\n" * 1000)
        found = []

        async def search():
            found.append(await house.call("fd.read", pid=pid, fd=3, grep="line"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(search)
            while not house.m.spawner._running:
                await trio.lowlevel.checkpoint()
            await house.call("proc.signal", pid=pid, signal="KILL")
        assert found[0].data == b"a line\n" * 1000


async def test_a_growing_file_is_followed_to_its_end():
    """A command in the background writes on after its call was answered."""
    command = "for i in 1 2 3; do echo line $i; sleep 0.2; done"
    program = table("bash")
    async with running(spawner=Spawner.fork()) as house:
        pid = await house.spawn(program, interactive=True)
        call = use("bash", command=command, background=True)
        await house.call("proc.run", pid=pid, prompt=script(call, "!say started"))
        stat = await house.call("fd.stat", pid=pid, fd=3)
        assert (stat.type, stat.complete) == ("GROW", False)
        got = b""
        with trio.fail_after(60):
            while True:
                read = await house.call("fd.read", pid=pid, fd=3, offset=len(got), wait_ms=30_000)
                got += read.data
                if read.eof:
                    break
        assert got.startswith(b"line 1\nline 2\nline 3\n")
        stat = await house.call("fd.stat", pid=pid, fd=3)
        assert (stat.type, stat.complete, stat.size) == ("BLOB", True, len(got))
        await house.call("proc.signal", pid=pid, signal="KILL")
