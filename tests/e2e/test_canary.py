"""Keys: the daemon's key is in its memory and in requests to its endpoint, and nowhere else."""

import os
import subprocess
from pathlib import Path

import pytest
from e2ekit import CANARY, program, script, use

BASH = program("bash", "read_file", "read_fd")


@pytest.fixture
def lived(fresh, strict):
    """A daemon in which much has happened, tools still run, and errors have repeated the key."""
    fresh.start(LOCAL_KEY="")
    with fresh.client() as client:
        client.finish(BASH, script("!bash env; seq 9999", "!say done"), cwd=str(fresh.work))
        client.finish(BASH, "!fail 401 authentication_error\n!say {{n}}")
        pid = client.spawn(BASH, "!bash env > env; touch here; sleep 1000", cwd=str(fresh.work))
        while not (fresh.work / "here").exists():
            client.get(pid)
        assert any(CANARY in str(request["headers"]) for request in strict.requests()), (
            "the key was never used"
        )
        yield fresh, client, pid


def test_not_on_disk(lived):
    """State, log and everything that tools wrote."""
    daemon, _, _ = lived
    files = [path for path in daemon.folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        assert CANARY.encode() not in path.read_bytes(), path


def test_not_in_any_environment_or_command_line(lived):
    """Of the daemon, its spawner and its tools, as root reads them in /proc; nor in ps."""
    daemon, _, _ = lived
    looked = 0
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid() or not below(int(process.name), daemon.pid):
            continue
        looked += 1
        for name in ("environ", "cmdline"):
            assert CANARY.encode() not in content(process / name), process
    assert looked >= 3
    said = subprocess.run(["ps", "auxewww"], capture_output=True, check=True).stdout
    lines = [line for line in said.splitlines() if str(daemon.pid).encode() in line.split()[:2]]
    assert lines
    assert CANARY.encode() not in b"".join(lines)


def content(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def below(pid, root):
    """Is a process the root, or a descendant of it?"""
    while pid > 1:
        if pid == root:
            return True
        stat = content(Path(f"/proc/{pid}/stat")).decode()
        pid = int(stat.rpartition(")")[2].split()[1]) if stat else 0
    return False


def test_not_in_anything_the_socket_says(lived):
    """Events, inspect, history, descriptors, status and the method table."""
    _, client, _ = lived
    said = [client.call(method) for method in ("hello", "sys.status", "sys.api", "prog.list", "fd.list")]
    said += [client.events(), client.call("proc.list", all=True)]
    for row in client.call("proc.list", all=True)["procs"][1:]:
        said += [client.get(row["pid"]), client.history(row["pid"], all=True)]
        said += [client.read(row["pid"], fd) for fd in client.fds(row["pid"]) if fd != 0]
    assert CANARY not in str(said)


def test_an_error_that_repeats_the_key_is_redacted(build, strict):
    """Providers do that."""
    daemon = build().start()
    with daemon.client() as client:
        system = {"system": "<script>\n!fail 400 invalid_request_error\n</script>"}
        pid, row = client.finish(program(prompt=system), f"bad key {CANARY[:0]}")
        assert row["status"] == 1
        assert CANARY not in str(client.get(pid))


def test_a_model_cannot_read_it(lived):
    """Not with a tool of the daemon's own, and not with a shell of the same user."""
    daemon, client, _ = lived
    prompt = script(
        use("read_file", file_path=f"/proc/{daemon.pid}/environ"),
        use("read_file", file_path="/proc/self/environ"),
        use("read_file", file_path="/proc/self/mem"),
        use(
            "bash",
            command=f"tr '\\0' '\\n' < /proc/{daemon.pid}/environ; tr '\\0' '\\n' < /proc/$PPID/environ",
        ),
        "!say done",
    )
    pid, row = client.finish(BASH, prompt)
    assert row["message"] == "done"
    assert CANARY not in str(client.results(pid))
