"""Keys get into memory, and out of everything that others can read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmprocd import keys

KEY = "sk-ant-secret-0123456789"
ROOT = str(Path(__file__).parents[1])

PROGRAM = """
import json, os, sys
from llmprocd import keys
known = keys.take(os.environ, json.loads(sys.argv[1]))
close = "close" in sys.argv
if close:
    keys.close_process()
try:
    environ = open("/proc/self/environ", "rb").read().decode()
except PermissionError:
    environ = "unreadable"
print(json.dumps({
    "known": known, "os_environ": dict(os.environ), "environ": environ, "argv": sys.argv,
    "fds": sorted(map(int, os.listdir("/proc/self/fd")))[:-1], "orig_argv": sys.orig_argv, "pid": os.getpid(),
    "cmdline": open("/proc/self/cmdline", "rb").read().decode(),
}))
sys.stdout.flush()
sys.stdin.readline()
"""


@pytest.fixture
def start(tmp_path):
    """Start a program that takes its keys; what it says, while it still runs."""
    script = tmp_path / "takes_keys.py"
    script.write_text(PROGRAM)
    started = []

    def run(*arguments, variables=(), **environ):
        base = {"PATH": os.environ["PATH"], "PYTHONPATH": ROOT}
        process = subprocess.Popen(
            [sys.executable, "-X", "utf8", str(script), json.dumps(list(variables)), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=base | environ,
        )
        started.append(process)
        said = json.loads(process.stdout.readline())
        assert said["pid"] == process.pid, "it did not execute itself in place"
        return process, said

    yield run
    for process in started:
        process.communicate(b"\n", timeout=30)
        assert process.returncode == 0


def test_a_key_from_the_environment_is_known_and_nowhere_else(start):
    process, said = start("an argument", ANTHROPIC_API_KEY=KEY)
    assert said["known"] == {"ANTHROPIC_API_KEY": KEY}
    assert KEY not in json.dumps([said["os_environ"], said["environ"], said["argv"], said["cmdline"]])
    assert KEY not in Path(f"/proc/{process.pid}/environ").read_text()
    assert said["argv"][2:] == ["an argument"]


def test_no_sign_of_the_handover_is_left(start):
    """Neither a variable that names the pipe nor the pipe itself: tools would inherit them."""
    _, said = start(ANTHROPIC_API_KEY=KEY)
    assert keys.HANDOVER not in said["os_environ"]
    assert said["fds"] == [0, 1, 2]


def test_options_of_the_interpreter_survive_the_second_execution(start):
    _, said = start(ANTHROPIC_API_KEY=KEY)
    assert said["orig_argv"][1:3] == ["-X", "utf8"]


def test_other_variables_survive_the_second_execution(start):
    _, said = start(ANTHROPIC_API_KEY=KEY, LLMPROC_SOCKET="/run/x", EMPTY="")
    assert said["os_environ"]["LLMPROC_SOCKET"] == "/run/x"
    assert said["os_environ"]["EMPTY"] == ""


def test_the_keys_that_the_config_names_are_taken_too(start):
    _, said = start(
        variables=["LOCAL_KEY", "UNSET"], LOCAL_KEY="local", ANTHROPIC_AUTH_TOKEN="token", OTHER="o"
    )
    assert said["known"] == {"LOCAL_KEY": "local", "ANTHROPIC_AUTH_TOKEN": "token"}
    assert "LOCAL_KEY" not in said["environ"]
    assert said["os_environ"]["OTHER"] == "o"


def test_without_a_key_nothing_is_executed_again(start):
    _, said = start(ANTHROPIC_API_KEY="")
    assert said["known"] == {}


def test_any_text_can_be_a_key(start):
    odd = 'ä"\\ \n{}'
    _, said = start(ANTHROPIC_API_KEY=odd)
    assert said["known"] == {"ANTHROPIC_API_KEY": odd}


def test_a_closed_process_lets_nobody_look_in(start):
    """Undumpable: its environment and memory belong to root (proc(5)), and it leaves no core."""
    process, _ = start("close", ANTHROPIC_API_KEY=KEY)
    assert Path(f"/proc/{process.pid}/environ").stat().st_uid == 0
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into everything")
def test_a_closed_process_cannot_be_read_by_its_own_user(start):
    process, said = start("close", ANTHROPIC_API_KEY=KEY)
    assert said["environ"] == "unreadable"
    with pytest.raises(PermissionError):
        Path(f"/proc/{process.pid}/environ").read_text()


def test_a_systemd_credential_is_read_without_its_newline(tmp_path):
    (tmp_path / "anthropic_api_key").write_text(f"{KEY}\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert keys.credential(environ, "anthropic_api_key") == KEY
    assert keys.credential(environ, "another") == ""
    assert keys.credential({}, "anthropic_api_key") == ""
