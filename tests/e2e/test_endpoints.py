"""Whom a daemon asks and with which key, from outside: key files, and the clouds' clients."""

import pytest
from e2ekit import CANARY, program, refused, script, use

OTHER = "sk-other-canary-5d21"


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "key"
    path.write_text(f"{OTHER}\n")
    path.chmod(0o600)
    return path


def paired(strict, key_file):
    return f'[endpoints."{strict.url}"]\napi_key_file = "{key_file}"\n'


def test_a_key_from_a_file_goes_to_its_endpoint(build, strict, key_file):
    """And into no log, whatever is said."""
    daemon = build(paired(strict, key_file), url="http://127.0.0.1:9").start()
    with daemon.client() as client:
        _, row = client.finish(program(model={"base_url": strict.url}), "!say x")
        assert row["message"] == "x"
    (request,) = strict.requests()
    assert OTHER in request["headers"]["authorization"]
    assert CANARY not in str(request)
    daemon.stop()
    assert OTHER not in daemon.log.read_text()


def test_a_key_file_that_others_can_read_stops_the_daemon_at_once(build, strict, key_file):
    """It says which, and what to do."""
    key_file.chmod(0o644)
    daemon = build(paired(strict, key_file))
    assert not daemon.launch()
    assert daemon.ended() == 1
    assert f"{key_file} can be read by others (chmod 600 {key_file})" in daemon.log.read_text()


def test_a_reload_reads_the_key_anew_or_keeps_the_old_one(build, strict, key_file):
    """Keys are changed without a restart."""
    daemon = build(paired(strict, key_file), url="http://127.0.0.1:9").start()
    with daemon.client() as client:
        key_file.chmod(0o640)
        with refused("EACCES", "can be read by others"):
            client.call("sys.reload")
        client.finish(program(model={"base_url": strict.url}), "!say x")
        key_file.chmod(0o600)
        key_file.write_text("sk-new-key-77")
        client.call("sys.reload")
        client.finish(program(model={"base_url": strict.url}), "!say x")
    old, new = (request["headers"]["authorization"] for request in strict.requests())
    assert (OTHER in old, "sk-new-key-77" in new) == (True, True)


@pytest.mark.parametrize("provider", ["anthropic_aws", "anthropic_foundry", "anthropic_bedrock"])
def test_a_conversation_through_a_clouds_client(build, strict, key_file, provider):
    """Tools and all, past a server that refuses what the real API refuses."""
    if provider != "anthropic_foundry":
        pytest.importorskip("boto3", reason="the extra 'aws' is not installed")
    daemon = build(paired(strict, key_file), url="http://127.0.0.1:9").start()
    model = {"base_url": strict.url, "region": "eu-west-1", "project_id": "acme"}
    with daemon.client() as client:
        asked = script(use("calculator", expression="6*7"), "!say It is {{result}}.")
        pid, row = client.finish(program("calculator", provider=provider, model=model), asked)
        assert row["message"] == "It is 42."
        assert client.get(pid)["provider"] == provider
    assert len(strict.requests()) == 2
    assert strict.refusals() == []


def test_a_cloud_without_credentials_is_refused_at_spawn(build):
    """EACCES, before there is a process."""
    daemon = build().start()
    with daemon.client() as client:
        with refused("EACCES", "no credentials for anthropic_foundry"):
            client.spawn(program(provider="anthropic_foundry", model={"project_id": "acme"}), "hi")
        assert client.call("proc.list", all=True)["procs"][1:] == []


def test_without_a_local_model_a_program_of_it_is_refused(build):
    """In words that help."""
    pytest.importorskip("xllamacpp", reason="the extra 'local' is not installed")
    daemon = build().start()
    with daemon.client() as client, refused("EHOSTUNREACH", "llmprocctl local up"):
        client.spawn(program(provider="local"), "hi")
