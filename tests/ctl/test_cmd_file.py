"""`fd` and `cat`."""
# ruff: noqa: E501

import json
import os
import time

import pytest


@pytest.fixture
def files(daemon):
    """Two processes; 7 has an fd 3 and a reference."""
    for pid in (7, 9):
        daemon.add("coder", pid=pid, name=f"p{pid}")
    daemon.files[7, 3] = [b"third\n", True, "bash"]
    daemon.files[7, "ref:a/b"] = [b"referred\n", True, "ref:a/b"]
    daemon.files[7, 4] = [b"x" * 200_000, False, "bash"]
    return daemon


def test_fd(ctl, files):
    """As lsof; of one process or of all."""
    lines = ctl("fd", 7).lines
    assert lines[0].split() == ["PROGRAM", "PID", "FD", "MODE", "TYPE", "SIZE", "NAME"]
    assert lines[4].split() == ["coder", "7", "3", "r", "FILE", "6", "bash"]
    assert lines[6].split() == ["coder", "7", "4", "r", "FILE", "195K+", "bash"]
    assert len(ctl("fd").lines) == 10
    assert ctl("fd", "-q", "%p7").lines == ["7/fd:0", "7/fd:1", "7/fd:2", "7/fd:3", "7/ref:a/b", "7/fd:4"]
    assert json.loads(ctl("fd", "--json", 7).lines[3])["name"] == "bash"
    assert ctl("fd", 99).err == "llmprocctl: fd: 99: no such process\n"


@pytest.mark.parametrize("size", [0, 1, 262_143, 262_144, 262_145, 524_288, 3_000_001])
@pytest.mark.parametrize("complete", [True, False])
def test_cat_is_exact(ctl, files, size, complete):
    """Any bytes, at every border of a chunk, whether the file still grows or not."""
    data = os.urandom(size)
    files.files[7, 5] = [data, complete, "bash"]
    done = ctl("cat", "7/fd:5")
    assert done.raw == data
    assert done.status == 0


def test_several_descriptors(ctl, files):
    """In the order asked; one that is not there does not keep the others."""
    done = ctl("cat", "7/ref:a/b", "7/fd:99", "%p7/fd:3", "99/fd:3")
    assert done.out == "referred\nthird\n"
    assert done.status == 1
    assert done.err.splitlines() == [
        "llmprocctl: cat: 7/fd:99: process 7 has no fd 99",
        "llmprocctl: cat: 99/fd:3: no such process",
    ]


def test_cat_follows(ctl, files):
    """-f waits for what is written, until the descriptor is complete."""
    files.write(7, 1, b"one\n")
    following = ctl.start("cat", "-f", "7/fd:1")
    assert following.stdout.readline() == b"one\n"
    files.write(7, 1, b"two\n")
    assert following.stdout.readline() == b"two\n"
    time.sleep(0.05)
    assert following.poll() is None
    files.end(7, 0)
    assert following.communicate(timeout=30) == (b"", b"")
    assert following.returncode == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--page", 2], {"page": 2}),
        (["--lines", "3-7"], {"line": 3, "lines": 5, "offset": 0}),
        (["--lines", "3"], {"line": 3, "lines": 1, "offset": 0}),
        (["--lines", "3-"], {"line": 3, "lines": (1 << 40) - 2, "offset": 0}),
        (["--grep", "a.*b"], {"grep": "a.*b", "offset": 0}),
    ],
)
def test_parts(ctl, files, sent, words, part):
    """Pages, lines and matches are the daemon's to find."""
    assert ctl("cat", *words, "7/fd:3").status == 0
    assert sent("fd.read") == [{"pid": 7, "fd": 3, **part}]


@pytest.mark.parametrize(
    "words",
    [
        ["--page", "0", "7/fd:3"], ["--lines", "7-3", "7/fd:3"], ["--lines", "0-3", "7/fd:3"], ["--lines", "x", "7/fd:3"],
        ["--page", "1", "--grep", "x", "7/fd:3"], ["-f", "--page", "1", "7/fd:3"], ["3"], ["7/3"], ["fd:x"], ["7/fd:-1"],
        ["ref:"], ["%/fd:3"], ["x/fd:3"],
    ],
)  # fmt: skip
def test_cat_without_sense(ctl, files, words):
    """Exit 2, and nothing is read."""
    assert ctl("cat", *words).status == 2
    assert "fd.read" not in {name for name, _ in files.calls}


def test_a_bare_descriptor_of_a_named_process(ctl, files):
    """-p is first, before the environment."""
    files.files[9, 3] = [b"ninth\n", True, "bash"]
    assert ctl("cat", "-p", "%p9", "fd:3", env={"LLMPROC_PID": "7"}).out == "ninth\n"
    assert ctl("cat", "-p", "9", "7/fd:3").out == "third\n"


def test_a_bare_descriptor_inside_a_tool(ctl, files):
    """Then $LLMPROC_PID."""
    files.files[9, 3] = [b"ninth\n", True, "bash"]
    files.owner = 7
    assert ctl("cat", "fd:3", env={"LLMPROC_PID": "9"}).out == "ninth\n"


def test_a_bare_descriptor_of_the_process_whose_tool_calls(ctl, files):
    """Then whom the daemon knows the caller to belong to."""
    files.files[9, 3] = [b"ninth\n", True, "bash"]
    files.owner = 9
    assert ctl("cat", "fd:3").out == "ninth\n"


def test_a_bare_descriptor_that_only_one_has(ctl, files):
    """Then the only one: not collected, and this user's."""
    assert ctl("cat", "fd:3").out == "third\n"
    assert ctl("cat", "ref:a/b").out == "referred\n"
    files.files[9, 3] = [b"ninth\n", True, "bash"]
    files.procs[9]["collected"] = True
    assert ctl("cat", "fd:3").out == "third\n"
    files.procs[9].update(collected=False, uid=os.getuid() + 1)
    assert ctl("cat", "fd:3").out == "third\n"


def test_a_bare_descriptor_that_several_have(ctl, files):
    """It is never guessed: exit 2 and the candidates."""
    files.files[9, 3] = [b"ninth\n" * 20_000, True, "git diff"]
    done = ctl("cat", "fd:3")
    assert (done.out, done.status) == ("", 2)
    assert done.err.splitlines() == [
        "llmprocctl: cat: fd:3: which process? 2 have one",
        "  7/fd:3  bash  6  coder",
        "  9/fd:3  git diff  117K  coder",
    ]


def test_a_bare_descriptor_that_nobody_has(ctl, files):
    """The same."""
    done = ctl("cat", "fd:77")
    assert (done.status, done.err) == (2, "llmprocctl: cat: fd:77: which process? none has one\n")
