"""The local model's server is started, watched and ended; what runs here in its place only answers so far."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import trio

from llmprocd import local
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.local import Local, Wish
from llmprocd.model.protocol import ModelError
from llmprocd.tools.spawner import Spawner

STAND_IN = """
import json, os, sys, time
key, weights = sys.stdin.read(), sys.argv[1]
if "broken" in open(weights).read():
    sys.exit("cannot load " + weights)
told = {"url": "http://127.0.0.1:1/", "key": key, "argv": sys.argv[1:], "env": dict(os.environ)}
with open(weights + ".lives", "a") as lives:
    lives.write(json.dumps(told) + "\\n")
print(json.dumps(told), flush=True)
time.sleep(600)
"""


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("good")
    return path


@pytest.fixture
async def keep(nursery, tmp_path):
    """Makes what keeps the server, and has it run."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    spawner = Spawner.fork()
    await nursery.start(spawner.run)

    def made():
        kept = Local(spawner, str(tmp_path), lambda: 3, [sys.executable, str(script)])
        nursery.start_soon(kept.run)
        return kept

    yield made
    nursery.cancel_scope.cancel()


def wish(weights):
    return Wish("0.5b", str(weights), 2)


def lives(weights):
    """What each start of the server was given."""
    path = Path(f"{weights}.lives")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def until(condition):
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.01)


def is_running(pid):
    return Path(f"/proc/{pid}").exists()


async def test_it_is_up_when_the_call_returns(keep, weights):
    """With its weights, as many slots as configured, and the cores that were asked for."""
    kept = keep()
    info = await kept.up(wish(weights))
    assert (info.state, info.model, info.slots, info.restarts) == ("up", "0.5b", 3, 0)
    assert is_running(info.pid)
    (life,) = lives(weights)
    assert life["argv"] == [str(weights), "--slots", "3", "--window", "8192", "--threads", "2"]
    assert life["env"]["GOMP_SPINCOUNT"] == "1000"
    assert (kept.server().url, kept.server().key) == ("http://127.0.0.1:1/", life["key"])


async def test_its_key_is_in_nothing_that_others_can_read(keep, weights):
    """It goes by stdin; a port on loopback is open to every user of the machine."""
    kept = keep()
    info = await kept.up(wish(weights))
    key = kept.server().key
    assert len(key) > 30
    for name in ("cmdline", "environ"):
        assert key not in Path(f"/proc/{info.pid}/{name}").read_text()
    assert key not in str(info)


async def test_the_daemons_variables_are_not_passed_on(keep, weights, monkeypatch):
    """An allow-list, as for tools."""
    monkeypatch.setenv("SOME_SECRET", "s")
    await keep().up(wish(weights))
    assert "SOME_SECRET" not in lives(weights)[0]["env"]


async def test_one_that_ends_is_started_again_with_another_key(mock_clock, keep, weights, monkeypatch):
    """While it is away, who asks is told to ask again."""
    mock_clock.rate = 1
    monkeypatch.setattr(local, "PAUSES", (3600.0,))
    kept = keep()
    info = await kept.up(wish(weights))
    first = kept.server().key
    os.kill(info.pid, signal.SIGKILL)
    await until(lambda: kept.info().state == "waiting")
    with pytest.raises(ModelError, match="ended with status 137") as caught:
        kept.server()
    assert (caught.value.errno, caught.value.again) == (Errno.EHOSTUNREACH, True)
    mock_clock.jump(3600)
    await until(lambda: kept.info().state == "up")
    assert kept.server().key != first
    assert kept.info().restarts == 1


async def test_down_ends_it(keep, weights):
    """And whoever asks then is told what to do."""
    kept = keep()
    info = await kept.up(wish(weights))
    assert (await kept.down()).state == "down"
    assert not is_running(info.pid)
    with pytest.raises(ModelError, match="llmprocctl local up") as caught:
        kept.server()
    assert not caught.value.again


async def test_up_again_changes_nothing(keep, weights):
    """The same model is the same server."""
    kept = keep()
    first = await kept.up(wish(weights))
    assert (await kept.up(wish(weights))).pid == first.pid
    assert len(lives(weights)) == 1


async def test_another_model_takes_its_place(keep, weights, tmp_path):
    """There is one server."""
    kept = keep()
    first = await kept.up(wish(weights))
    other = tmp_path / "other.gguf"
    other.write_text("good")
    info = await kept.up(Wish("1.5b", str(other)))
    assert (info.model, info.state) == ("1.5b", "up")
    assert not is_running(first.pid)


async def test_what_was_wanted_is_there_after_a_restart(keep, weights, nursery):
    """Until it is not wanted any more."""
    await keep().up(wish(weights))
    again = keep()
    await until(lambda: again.info().state == "up")
    assert again.wish == wish(weights)
    await again.down()
    assert keep().wish is None


async def test_one_that_cannot_load_says_why(keep, weights):
    """The last line of its log; nothing claims to be up."""
    weights.write_text("broken")
    kept = keep()
    with pytest.raises(KernelError, match=f"cannot load {weights}") as caught:
        await kept.up(wish(weights))
    assert caught.value.errno is Errno.EIO
    assert kept.info().state == "waiting"
    await kept.down()


async def test_without_weights_nothing_is_wanted(keep, tmp_path):
    """ENOENT, and no file that would start it with the next daemon."""
    kept = keep()
    with pytest.raises(KernelError, match="no weights at") as caught:
        await kept.up(wish(tmp_path / "nothing"))
    assert caught.value.errno is Errno.ENOENT
    assert kept.wish is None
    assert not (tmp_path / "local.json").exists()


async def test_a_wish_that_cannot_be_read_is_none(keep, tmp_path):
    """A broken file does not keep the daemon from starting."""
    (tmp_path / "local.json").write_text('{"model": 3}')
    assert keep().wish is None
