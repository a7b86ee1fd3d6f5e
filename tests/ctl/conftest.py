"""The command line as its users run it: a program of its own beside a scripted daemon."""

import pytest
from ctlkit import Ctl
from scripted_daemon import ScriptedDaemon


@pytest.fixture
def daemon(tmp_path):
    scripted = ScriptedDaemon(tmp_path / "llmprocd.sock")
    yield scripted
    scripted.close()


@pytest.fixture
def ctl(tmp_path):
    return Ctl(tmp_path / "llmprocd.sock", tmp_path)


@pytest.fixture
def sent(daemon):
    """The arguments of the calls of one method so far, without request ids."""

    def of(method):
        calls = [arguments for name, arguments in daemon.calls if name == method]
        return [{k: v for k, v in call.items() if k != "request_id"} for call in calls]

    return of
