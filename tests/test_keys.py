"""Keys get into memory, and out of everything that others can read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmprocd import keys
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.keys import Keyring, Source

KEY = "sk-ant-secret-0123456789"
ROOT = str(Path(__file__).parents[1])

PROGRAM = """
import json, os, sys
from llmprocd import keys
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.keys import Keyring, Source
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


# --- which key goes where ---------------------------------------------------------------------------

URL = "http://127.0.0.1:8041"


def ring(sources, environ=None, **known):
    """A keyring with these pairs."""
    made = Keyring({} if environ is None else environ, known)
    made.pair(sources)
    return made


def key_file(tmp_path, text=f"{KEY}\n", mode=0o600):
    path = tmp_path / "key"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_a_providers_own_endpoint_has_a_variable_by_default():
    made = ring({}, ANTHROPIC_API_KEY="a", ANTHROPIC_AWS_API_KEY="b", AWS_BEARER_TOKEN_BEDROCK="c")
    assert (made.key("anthropic"), made.key("anthropic_aws"), made.key("anthropic_bedrock")) == (
        "a",
        "b",
        "c",
    )
    assert (made.key("anthropic_vertex"), made.key("anthropic_foundry")) == (None, None)


def test_another_variable_can_be_paired_with_it():
    """Then the usual one is not looked at."""
    made = ring({"anthropic": Source(variable="MINE")}, ANTHROPIC_API_KEY="a", MINE="m")
    assert made.key("anthropic") == "m"


def test_a_url_has_the_key_it_is_paired_with_and_no_other():
    made = ring({URL: Source(variable="LOCAL_KEY")}, ANTHROPIC_API_KEY="a", LOCAL_KEY="l")
    assert (made.key(URL), made.key(URL, "LOCAL_KEY")) == ("l", "l")
    assert made.key(URL, "ANTHROPIC_API_KEY") is None
    assert made.key(f"{URL}/") is None
    assert made.key("https://elsewhere.example") is None


def test_a_key_can_be_in_a_file(tmp_path):
    """A variable that a program names is then not where the key comes from."""
    made = ring({URL: Source(file=key_file(tmp_path))})
    assert made.key(URL) == KEY
    assert made.key(URL, "SOME_VARIABLE") is None
    assert KEY in made.secrets


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_file_that_others_can_read_is_refused(tmp_path, mode):
    """Or write: it is not a secret, or not one's own."""
    with pytest.raises(KernelError, match="can be read by others") as caught:
        ring({URL: Source(file=key_file(tmp_path, mode=mode))})
    assert caught.value.errno is Errno.EACCES
    assert KEY not in caught.value.text


def test_a_key_file_that_is_none_is_named(tmp_path):
    for path, words in (("/no/such/file", "No such file"), (str(tmp_path), "no regular file")):
        with pytest.raises(KernelError, match=words):
            ring({URL: Source(file=path)})
    with pytest.raises(KernelError, match="is empty"):
        ring({URL: Source(file=key_file(tmp_path, "\n"))})


def test_a_fifo_in_place_of_a_key_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(KernelError, match="no regular file"):
        ring({URL: Source(file=str(tmp_path / "pipe"))})


def test_a_key_can_be_a_credential_of_systemd(tmp_path):
    (tmp_path / "gateway").write_text(f"{KEY}\n")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert ring({URL: Source(credential="gateway")}, environ).key(URL) == KEY
    with pytest.raises(KernelError, match="systemd has given no 'other'"):
        ring({URL: Source(credential="other")}, environ)


def test_pairs_that_cannot_be_read_leave_the_old_ones(tmp_path):
    """A reload that fails changes nothing."""
    made = ring({URL: Source(variable="LOCAL_KEY")}, LOCAL_KEY="l")
    with pytest.raises(KernelError):
        made.pair({URL: Source(file="/no/such/file")})
    assert made.key(URL) == "l"


def test_a_variable_that_is_paired_later_is_taken_out_of_the_environment():
    environ = {"LATER": "k", "PATH": "/bin"}
    made = ring({}, environ)
    assert made.key(URL) is None
    made.pair({URL: Source(variable="LATER")})
    assert (made.key(URL), environ) == ("k", {"PATH": "/bin"})
    assert "k" in made.secrets


def test_an_account_is_for_the_clouds_own_endpoints():
    """At another URL only if that is paired with it; of variables only those that belong to it."""
    made = ring(
        {URL: Source(account=True), "http://b": Source(variable="LOCAL_KEY")},
        AWS_ACCESS_KEY_ID="i",
        AWS_SECRET_ACCESS_KEY="s",
        LOCAL_KEY="l",
    )
    account = {"AWS_ACCESS_KEY_ID": "i", "AWS_SECRET_ACCESS_KEY": "s"}
    assert (made.account("anthropic_aws"), made.account(URL)) == (account, account)
    assert (made.account("http://b"), made.account("http://c")) == (None, None)
