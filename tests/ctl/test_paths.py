"""Where the socket and the state are."""
# ruff: noqa: PTH109

import os

import pytest

from llmprocd.abi import paths


def test_a_named_socket_wins_and_is_made_absolute():
    """LLMPROC_SOCKET is before all else."""
    environ = {"LLMPROC_SOCKET": "x/s", "XDG_RUNTIME_DIR": "/run/user/7"}
    assert paths.socket_path(environ, 7) == f"{os.getcwd()}/x/s"


@pytest.mark.parametrize("uid", [0, 7])
def test_the_runtime_directory_is_next(uid):
    """XDG_RUNTIME_DIR, for root too."""
    assert paths.socket_path({"XDG_RUNTIME_DIR": "/run/user/7/"}, uid) == "/run/user/7/llmproc/llmprocd.sock"


@pytest.mark.parametrize("environ", [{}, {"XDG_RUNTIME_DIR": "relative"}, {"LLMPROC_SOCKET": ""}])
def test_root_has_one_in_run(environ):
    """What is empty or relative does not count."""
    assert paths.socket_path(environ, 0) == "/run/llmproc/llmprocd.sock"


def test_a_private_folder_is_made_private(tmp_path):
    """It is this user's alone, and found again."""
    folder = str(tmp_path / "llmproc-7")
    for _ in range(2):
        assert paths.private_folder(folder, os.getuid()) == folder
    assert os.lstat(folder).st_mode & 0o777 == 0o700


def test_folders_are_made_private_at_every_depth(tmp_path):
    """With a umask that lets all in, others could else put theirs in the place of ours."""
    before = os.umask(0)
    try:
        for _ in range(2):
            paths.make_private(str(tmp_path / "a" / "b" / "c"))
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a", "a/b", "a/b/c")] == [0o700] * 3
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(FileExistsError):
        paths.make_private(str(tmp_path / "file"))
    with pytest.raises(NotADirectoryError):
        paths.make_private(str(tmp_path / "file" / "below"))


def test_a_folder_that_others_may_enter_is_refused(tmp_path):
    """Somebody else could have put a socket there."""
    tmp_path.chmod(0o755)
    with pytest.raises(PermissionError, match="alone"):
        paths.private_folder(str(tmp_path), os.getuid())


def test_a_folder_of_another_user_is_refused(tmp_path):
    """Even one with mode 0700."""
    tmp_path.chmod(0o700)
    with pytest.raises(PermissionError, match="alone"):
        paths.private_folder(str(tmp_path), os.getuid() + 1)


def test_a_link_to_a_private_folder_is_refused(tmp_path):
    """Links are not followed: they can be changed afterwards."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(PermissionError, match="alone"):
        paths.private_folder(str(tmp_path / "link"), os.getuid())


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"LLMPROC_STATE_DIR": "/a", "STATE_DIRECTORY": "/b"}, "/a"),
        ({"STATE_DIRECTORY": "/b:/c", "XDG_STATE_HOME": "/d"}, "/b"),
        ({"XDG_STATE_HOME": "/d/", "HOME": "/e"}, "/d/llmproc"),
        ({"XDG_STATE_HOME": "d", "HOME": "/e"}, "/e/.local/state/llmproc"),
    ],
)
def test_the_state_directory(environ, path):
    """The first of four places that is named."""
    assert paths.state_dir(environ, 7) == path


def test_without_a_home_the_user_database_knows():
    """A daemon may be started with an empty environment."""
    assert paths.state_dir({}, 0).endswith("/.local/state/llmproc")


@pytest.mark.parametrize(
    ("environ", "uid", "path"),
    [
        ({}, 0, "/etc/llmproc/config.toml"),
        ({"HOME": "/home/joe"}, 1000, "/home/joe/.config/llmproc/config.toml"),
        ({"HOME": "/home/joe", "XDG_CONFIG_HOME": "/conf/"}, 1000, "/conf/llmproc/config.toml"),
        ({"XDG_CONFIG_HOME": "/conf"}, 0, "/conf/llmproc/config.toml"),
        ({"HOME": "/home/joe", "XDG_CONFIG_HOME": "conf"}, 1000, "/home/joe/.config/llmproc/config.toml"),
    ],
)
def test_where_the_config_is(environ, uid, path):
    """In XDG_CONFIG_HOME or ~/.config; root's in /etc."""
    assert paths.config_path(environ, uid) == path
