"""The config file: what an operator can set, and what is said about a mistake."""

import pytest

from llmprocd import config
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.config import Config
from llmprocd.keys import Source


def load(tmp_path, text):
    path = tmp_path / "config.toml"
    path.write_text(text)
    return config.load(str(path))


def fault(tmp_path, text):
    with pytest.raises(KernelError) as caught:
        load(tmp_path, text)
    assert caught.value.errno is Errno.ENOEXEC
    assert caught.value.text.startswith(f"{tmp_path}/config.toml: ")
    return caught.value.text


def test_no_file_is_the_defaults():
    made = config.load("")
    assert made == Config()
    assert (made.slots, made.retries, made.retry_s) == (50, 8, 300)
    assert (made.keep_days, made.keep_ended) == (7, 10_000)


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load(tmp_path, "") == Config()


def test_a_file_sets_what_it_names_and_leaves_the_rest(tmp_path):
    made = load(tmp_path, "slots = 3\nretry_s = 20\nkeep_days = 0.5\n")
    assert made == Config(slots=3, retry_s=20, keep_days=0.5)


def test_ended_processes_can_be_kept_for_ever(tmp_path):
    assert load(tmp_path, "keep_days = inf").keep_days == float("inf")


def test_an_endpoint_is_paired_with_the_variable_of_its_key(tmp_path):
    made = load(tmp_path, '[endpoints."http://127.0.0.1:8041"]\napi_key_env = "LOCAL_KEY"\n')
    assert config.key_variables(made) == {"http://127.0.0.1:8041": "LOCAL_KEY"}


def test_an_endpoint_has_bounds_of_its_own_and_need_not_have_a_key(tmp_path):
    made = load(tmp_path, "[endpoints.anthropic]\nslots = 4\nrpm = 50\nitpm = 30000\notpm = 8000\n")
    table = made.endpoints["anthropic"]
    assert (table.slots, table.rpm, table.itpm, table.otpm) == (4, 50, 30_000, 8000)
    assert config.key_variables(made) == {}


def test_a_key_can_be_in_a_file_or_a_credential(tmp_path):
    made = load(
        tmp_path,
        '[endpoints."http://a"]\napi_key_file = "/k"\n[endpoints."http://b"]\napi_key_credential = "b"\n'
        "[endpoints.anthropic_aws]\nplatform_credentials = true\n",
    )
    assert config.key_sources(made) == {
        "http://a": Source(file="/k"),
        "http://b": Source(credential="b"),
        "anthropic_aws": Source(account=True),
    }


def test_the_local_model_answers_one_at_a_time_unless_told_otherwise(tmp_path):
    """So that the second finds what the first has read."""
    assert config.local_slots(Config()) == 1
    assert config.local_slots(load(tmp_path, "[endpoints.local]\nslots = 4\n")) == 4
    assert config.local_slots(load(tmp_path, "slots = 9\n[endpoints.local]\nrpm = 4\n")) == 1


def test_a_config_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().slots = 1


def test_a_file_that_is_not_there_is_enoent(tmp_path):
    with pytest.raises(KernelError) as caught:
        config.load(str(tmp_path / "nothing.toml"))
    assert caught.value.errno is Errno.ENOENT
    assert caught.value.text == f"{tmp_path}/nothing.toml: No such file or directory"


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(KernelError) as caught:
        config.load(str(tmp_path))
    assert "directory" in caught.value.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slots = ", "end of document"),
        ("slots = 1\nslots == 2\n", "line 2"),
        ("slotz = 3", "slotz"),
        ("slots = 0", "slots"),
        ("slots = -1", "slots"),
        ('slots = "3"', "slots"),
        ("slots = 1.5", "slots"),
        ("slots = true", "slots"),
        ("retries = -1", "retries"),
        ("retry_s = 0", "retry_s"),
        ("stall_s = -2", "stall_s"),
        ("retry_s = nan", "retry_s"),
        ("tool_timeout_s = 0", "tool_timeout_s"),
        ("max_procs = 0", "max_procs"),
        ("keep_days = 0", "keep_days"),
        ("keep_ended = 0", "keep_ended"),
        ('endpoints = "x"', "endpoints"),
        ('[endpoints."http://x"]\nslots = 0', "slots"),
        ("[endpoints.anthropic]\nrpm = -1", "rpm"),
        ("[endpoints.anthropic]\ntpm = 1", "tpm"),
        ('[endpoints."http://x"]\napi_key_env = "A"\napi_key = "sk"', "api_key"),
        ('[endpoints."http://x"]\napi_key_env = 3', "api_key_env"),
        ('[endpoints."http://x"]\napi_key_env = "A"\napi_key_file = "/k"', "a key has one place"),
        ('[endpoints."http://x"]\napi_key_file = "k"', "absolute"),
        ('[endpoints."http://x"]\napi_key_credential = "../k"', "must be a name"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, words):
    assert words in fault(tmp_path, text)


def test_a_key_in_the_wrong_place_is_not_repeated(tmp_path):
    """Who writes the key itself into the file finds out, but not in the log."""
    text = '[endpoints."http://x"]\napi_key_env = "A"\napi_key = "sk-ant-secret"'
    assert "sk-ant-secret" not in fault(tmp_path, text)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "config.toml"
    path.write_bytes(b"slots = 3 # \xff")
    with pytest.raises(KernelError) as caught:
        config.load(str(path))
    assert caught.value.errno is Errno.ENOEXEC
