"""Where the daemon's socket and its state are: one answer for the daemon and for its clients.

Law: what another user could have put there is never used; it is an error that names it.
Imported on the way of every `llmprocctl ps`: the standard library's `os` and nothing else.
"""
# pathlib and contextlib cost more than the rest of this module
# ruff: noqa: PTH100, PTH102, PTH110, PTH112, PTH115, PTH120, SIM105

import os

TYPE_CHECKING = False  # `typing` costs more than the rest of this module
if TYPE_CHECKING:
    from collections.abc import Mapping

SOCKET_NAME = "llmprocd.sock"


def socket_path(environ: "Mapping[str, str]", uid: int) -> str:
    """The socket of this user's daemon.

    Args:
        environ: the environment; LLMPROC_SOCKET and XDG_RUNTIME_DIR count.
        uid: the user's number.

    Returns:
        An absolute path; nothing need be there. Raises PermissionError when the folder in /tmp, which is
        made if there is no runtime directory, is not this user's alone.
    """
    given = environ.get("LLMPROC_SOCKET", "")
    if given:
        return os.path.abspath(given)
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        return f"{runtime.rstrip('/')}/llmproc/{SOCKET_NAME}"
    if uid == 0:
        return f"/run/llmproc/{SOCKET_NAME}"
    return f"{private_folder(f'/tmp/llmproc-{uid}', uid)}/{SOCKET_NAME}"  # noqa: S108 - checked


def state_dir(environ: "Mapping[str, str]", uid: int) -> str:
    """Where the daemon keeps what must survive.

    Args:
        environ: the environment; LLMPROC_STATE_DIR, STATE_DIRECTORY, XDG_STATE_HOME and HOME count.
        uid: the user's number.

    Returns:
        An absolute path; nothing need be there.
    """
    given = environ.get("LLMPROC_STATE_DIR", "") or environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return os.path.abspath(given)
    home = environ.get("XDG_STATE_HOME", "")
    if home.startswith("/"):
        return f"{home.rstrip('/')}/llmproc"
    return f"{_home(environ, uid)}/.local/state/llmproc"


def cache_dir(environ: "Mapping[str, str]", uid: int) -> str:
    """Where what can be fetched again is kept: the weights of local models.

    Args:
        environ: the environment; XDG_CACHE_HOME and HOME count.
        uid: the user's number.

    Returns:
        An absolute path; nothing need be there.
    """
    home = environ.get("XDG_CACHE_HOME", "")
    if home.startswith("/"):
        return f"{home.rstrip('/')}/llmproc"
    return f"{_home(environ, uid)}/.cache/llmproc"


def config_path(environ: "Mapping[str, str]", uid: int) -> str:
    """The config file of this user's daemon.

    Args:
        environ: the environment; XDG_CONFIG_HOME and HOME count.
        uid: the user's number; root's is in /etc.

    Returns:
        An absolute path; nothing need be there.
    """
    home = environ.get("XDG_CONFIG_HOME", "")
    if uid == 0 and not home:
        return "/etc/llmproc/config.toml"
    folder = home.rstrip("/") if home.startswith("/") else f"{_home(environ, uid)}/.config"
    return f"{folder}/llmproc/config.toml"


def opened(fd: int) -> str:
    """The path of an open file, links resolved."""
    return os.readlink(f"/proc/self/fd/{fd}")


def is_of_a_process(path: str) -> bool:
    """Is a path, links resolved, a file of /proc/PID?

    The kernel lets a process at its own: whatever the daemon opens there for others shows its own memory,
    and the keys in it.
    """
    pid, slash, _ = path.removeprefix("/proc/").partition("/")
    return path.startswith("/proc/") and pid.isdecimal() and slash == "/"


def private_folder(path: str, uid: int) -> str:
    """A folder in a place where everybody may write: made if missing, and checked without following links."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass  # checked below, whoever made it
    found = os.lstat(path)
    if found.st_mode & 0o170077 != 0o040000 or found.st_uid != uid:
        raise PermissionError(f"{path} is not a folder of this user's alone (mode 0700)")
    return path


def make_private(path: str) -> None:
    """Make a folder, and those above it that are missing, for this user alone whatever the umask; OSError."""
    if not path or os.path.isdir(path):
        return
    above = os.path.dirname(path)
    if not os.path.exists(above):
        make_private(above)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):  # another was quicker if it is
            raise


def _home(environ: "Mapping[str, str]", uid: int) -> str:
    home = environ.get("HOME", "")
    if not home.startswith("/"):
        import pwd

        home = pwd.getpwuid(uid).pw_dir
    return home.rstrip("/")
