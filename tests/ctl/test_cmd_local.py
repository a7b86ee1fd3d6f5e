"""`local`, with weights that are there already: fetching them is tested beside this."""

import json

import pytest

from llmprocd.abi.weights import MODELS


@pytest.fixture
def cache(ctl, tmp_path):
    """A cache with what stands for the small model's weights."""
    folder = tmp_path / "cache" / "llmproc"
    folder.mkdir(parents=True)
    ctl.env["XDG_CACHE_HOME"] = str(folder.parent)
    (folder / MODELS["0.5b"].file).write_text("weights")
    return folder


def test_up_names_the_weights(ctl, daemon, sent, cache):
    """The daemon is told where they are: its own user may be another."""
    done = ctl("local", "up", "--threads", "1")
    assert (done.out, done.status) == ("0.5b up, pid 77, 2 slots of 8192 tokens\n", 0)
    assert sent("local.up") == [{"model": "0.5b", "path": f"{cache}/{MODELS['0.5b'].file}", "threads": 1}]


def test_status_tells_whether_it_is_up(ctl, daemon, cache):
    """As `daemon status` does: 0 and 3."""
    done = ctl("local", "status")
    assert (done.out, done.status) == ("down\n", 3)
    assert ctl("local", "up").status == 0
    done = ctl("local", "status", "--json")
    assert (json.loads(done.out)["pid"], done.status) == (77, 0)
    assert ctl("daemon", "status").lines[-1] == "  local model: 0.5b up, pid 77, 2 slots of 8192 tokens"
    assert (ctl("local", "down").status, ctl("local", "status").status) == (0, 3)


def test_one_that_ended_says_why(ctl, daemon):
    """And that it is not started by somebody's wish alone."""
    daemon.local = {
        **daemon.local,
        "state": "waiting",
        "model": "0.5b",
        "restarts": 2,
        "reason": "out of\nmemory",
    }
    assert ctl("local", "status").out == "0.5b waiting, ended by itself 2x, out of\\nmemory\n"


def test_without_the_extra_nothing_is_fetched(ctl, daemon, sent, tmp_path):
    """Half a gigabyte for nothing would be unkind."""
    ctl.env["XDG_CACHE_HOME"] = str(tmp_path / "empty")
    daemon.local = {**daemon.local, "installed": False}
    done = ctl("local", "up")
    assert (done.status, "pip install 'llmprocd[local]'" in done.err) == (1, True)
    assert not (tmp_path / "empty").exists()
    assert sent("local.up") == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sideways",), "not one of up, down, status"),
        (("up", "--model", "70b"), "none of 0.5b, 1.5b"),
        (("down", "--model", "0.5b"), "takes neither"),
        (("status", "--threads", "0"), "takes neither"),
    ],
)
def test_what_cannot_be_meant_is_a_mistake_of_usage(ctl, daemon, words, said):
    done = ctl("local", *words)
    assert (done.status, said in done.err) == (2, True)
