"""`inspect limits programs call api`."""

import json
import os

import pytest


def test_inspect(ctl, daemon):
    """The row, its descriptors and its limits; one object for each process."""
    for pid in (7, 8):
        daemon.add("coder", pid=pid)
    done = ctl("inspect", 7, 99, 8)
    first, second = (json.loads(line) for line in done.lines)
    assert (first["pid"], second["pid"]) == (7, 8)
    assert [row["fd"] for row in first["descriptors"]] == [0, 1, 2]
    assert first["limits"][0]["resource"] == "wall"
    assert (done.status, done.err) == (1, "llmprocctl: inspect: 99: no such process\n")


def test_limits(ctl, daemon, sent):
    """Durations as people write them; changes as they were written."""
    daemon.add("coder", pid=7)
    assert [line.split() for line in ctl("limits", 7).lines] == [
        ["RESOURCE", "SOFT", "HARD", "USED"],
        ["wall", "-", "-", "3m12s"],
    ]
    assert ctl("limits", 7, "wall=5m:10m").lines[1].split() == ["wall", "5m", "10m", "3m12s"]
    assert json.loads(ctl("limits", "--json", 7).out)["used"] == 192.4
    assert sent("proc.limits") == [{"pid": 7}, {"pid": 7, "set": {"wall": "5m:10m"}}, {"pid": 7}]
    assert ctl("limits", 7, "wall").status == 2
    assert ctl("limits", 99).err == "llmprocctl: limits: 99: no such process\n"


def test_programs(ctl, daemon):
    """Those on $LLMPROC_PATH first, then those built in; the first of a name counts."""
    for folder, name in (("a", "coder.toml"), ("a", "notes.txt"), ("b", "coder.yaml"), ("b", "zed.yml")):
        (ctl.folder / folder).mkdir(exist_ok=True)
        (ctl.folder / folder / name).write_text("")
    env = {"LLMPROC_PATH": f"{ctl.folder}/a:none:b"}
    assert ctl("programs", "-q", env=env).lines == ["coder", "zed", "demo"]
    lines = ctl("programs", env=env).lines
    assert lines[0].split() == ["NAME", "PATH", "DESCRIPTION"]
    assert lines[1].split() == ["coder", f"{ctl.folder}/a/coder.toml", "-"]
    assert lines[3].split() == ["demo", "-", "a", "script"]
    assert json.loads(ctl("programs", "--json").out) == {
        "name": "demo",
        "path": "",
        "description": "a script",
    }


def test_what_is_listed_can_be_run(ctl, daemon, sent):
    """A folder with the name of a program is none, and the daemon's own path is not this user's."""
    (ctl.folder / "a" / "coder.toml").mkdir(parents=True)
    (ctl.folder / "a" / "zed.toml").write_text("")
    names = ctl("programs", "-q", env={"LLMPROC_PATH": f"{ctl.folder}/a"}).lines
    assert names == ["zed", "demo"]
    for name in names:
        assert ctl("spawn", name, "x", env={"LLMPROC_PATH": f"{ctl.folder}/a"}).status == 0
    assert [call["program"] for call in sent("proc.spawn")] == [f"{ctl.folder}/a/zed.toml", "demo"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_of_the_path_that_cannot_be_read_is_passed_over(ctl, daemon):
    """As a shell does."""
    (ctl.folder / "a").mkdir(mode=0)
    done = ctl("programs", "-q", env={"LLMPROC_PATH": f"{ctl.folder}/a"})
    assert (done.lines, done.err, done.status) == (["demo"], "", 0)


def test_checking_programs(ctl, daemon):
    """Every fault of every file, and 1 if there is one."""
    for name in ("good.toml", "bad.toml", "bare"):
        (ctl.folder / name).write_text("")
    done = ctl("programs", "check", "good.toml", "bad.toml")
    assert done.lines == [
        "good.toml: ok",
        "bad.toml:3: model.nam: unknown key; did you mean name?",
        "bad.toml:0: no model",
    ]
    assert "llmprocctl: programs: good.toml: warning: temperature is left out" in done.err
    assert done.status == 1
    assert ctl("programs", "check", "bare").status == 0
    assert ctl("programs", "check", "./none.toml").status == 1
    assert json.loads(ctl("programs", "check", "--json", "bad.toml").out)["faults"][0]["line"] == 3


@pytest.mark.parametrize("words", [("check",), ("chek", "x"), ("x",)])
def test_programs_without_sense(ctl, daemon, words):
    """Exit 2."""
    assert ctl("programs", *words).status == 2


def test_call(ctl, daemon, sent):
    """Raw arguments in, the raw result out; bytes as text, or base64 where they are none."""
    daemon.add("coder", pid=7)
    daemon.write(7, 1, "héllo".encode())
    assert json.loads(ctl("call", "fd.read", '{"pid": 7, "fd": 1}').out)["data"] == "héllo"
    daemon.write(7, 1, b"\xff")
    assert (
        json.loads(ctl("call", "fd.read", "-", stdin=b'{"pid": 7, "fd": 1}').out)["data"]
        == "base64:aMOpbGxv/w=="
    )
    assert json.loads(ctl("call", "sys.status").out)["version"] == "0.1.0"
    assert sent("sys.status") == [{}]


def test_calls_that_fail(ctl, daemon):
    """The errno by name, exit 1; arguments that are no JSON object, exit 2."""
    done = ctl("call", "proc.get", '{"pids": [99]}')
    assert (done.status, done.err) == (1, "llmprocctl: call: proc.get: ESRCH: no such process: 99\n")
    assert ctl("call", "no.such").err.startswith("llmprocctl: call: no.such: ENOSYS: ")
    for json_ in ("{", "[1]", "3", '"x"', '{"pids": [18446744073709551616]}'):
        assert ctl("call", "proc.get", json_).status == 2


def test_api(ctl, daemon):
    """The method table."""
    assert [line.split() for line in ctl("api").lines] == [["METHOD", "DOES"], ["proc.list", "List."]]
    assert ctl("api", "-q").lines == ["proc.list"]
    assert json.loads(ctl("api", "--json").out)["waits"] is False
