"""Keys: from the environment, a file or a systemd credential into memory, and nowhere else.

Law: a key goes to the endpoint it is paired with, and to no other. An endpoint is known by its URL, or by
the name of its provider where that provider has one of its own.

A key that came by environment could be read in /proc/PID/environ for as long as the daemon runs. So it is
handed over a pipe to a second execution of the same program, whose environment never had it; then the
process is made undumpable, which closes its memory and environment to others of the same user.
"""

import ctypes
import json
import os
import resource
import stat
import sys
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path

import msgspec

from llmprocd.abi.errno import Errno, KernelError

HANDOVER = "LLMPROCD_KEYS_FD"
ACCOUNT = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
DEFAULTS = {  # the variable that holds the key of a provider's own endpoint
    "anthropic": "ANTHROPIC_API_KEY",
    "anthropic_aws": "ANTHROPIC_AWS_API_KEY",
    "anthropic_foundry": "ANTHROPIC_FOUNDRY_API_KEY",
    "anthropic_bedrock": "AWS_BEARER_TOKEN_BEDROCK",
    "anthropic_bedrock_runtime": "AWS_BEARER_TOKEN_BEDROCK",
}
ALWAYS = (*dict.fromkeys(DEFAULTS.values()), "ANTHROPIC_AUTH_TOKEN", *ACCOUNT)
PR_SET_DUMPABLE = 4
LONGEST = 1 << 16
"""Bytes of a key file."""


class Source(msgspec.Struct, frozen=True):
    """Where an endpoint's key is: in one of these. `account`: it may see what a cloud knows one by."""

    variable: str = ""
    file: str = ""
    credential: str = ""
    account: bool = False


class Keyring:
    """Which key goes to which endpoint.

    Args:
        environ: the daemon's; keys of variables that are paired later are taken out of it.
        known: keys by variable.
    """

    def __init__(self, environ: MutableMapping[str, str], known: Mapping[str, str]) -> None:
        self._environ = environ
        self._known = dict(known)
        self._sources: Mapping[str, Source] = {}
        self._read: dict[str, str] = {}

    def pair(self, sources: Mapping[str, Source]) -> None:
        """Read the keys of these endpoints anew.

        Raises:
            KernelError: ENOENT or EACCES: a file or credential is not there, or others can read it. The old
                pairs stay.
        """
        read = {endpoint: _read(self._environ, source) for endpoint, source in sources.items()}
        for source in sources.values():
            if source.variable not in self._known and self._environ.get(source.variable):
                self._known[source.variable] = self._environ.pop(source.variable)
        self._sources = sources
        self._read = {endpoint: key for endpoint, key in read.items() if key}

    def key(self, endpoint: str, variable: str = "") -> str | None:
        """The key that an endpoint is paired with.

        Args:
            endpoint: a URL, or a provider for its own endpoint.
            variable: the only one it may come from, if the program names one for a URL.
        """
        source, own = self._sources.get(endpoint, Source()), endpoint in DEFAULTS
        if variable and variable != source.variable and not own:
            return None
        if endpoint in self._read:
            return self._read[endpoint]
        return self._known.get(source.variable or DEFAULTS.get(endpoint, ""))

    def account(self, endpoint: str) -> Mapping[str, str] | None:
        """What a cloud knows its users by, for an endpoint that may see it: a URL only if it is paired."""
        if "://" in endpoint and not self._sources.get(endpoint, Source()).account:
            return None
        return {name: self._known[name] for name in ACCOUNT if name in self._known}

    @property
    def secrets(self) -> list[str]:
        """All that must not be told."""
        return [*self._known.values(), *self._read.values()]


def take(environ: MutableMapping[str, str], variables: Collection[str]) -> dict[str, str]:
    """The keys, by variable; executes the program anew if the environment still holds one."""
    if HANDOVER in environ:
        with os.fdopen(int(environ.pop(HANDOVER)), "rb") as source:
            keys: dict[str, str] = json.loads(source.read())
            return keys
    found = {name: environ[name] for name in (*ALWAYS, *variables) if environ.get(name)}
    if found:
        _execute_without(environ, found)
    return {}


def _execute_without(environ: Mapping[str, str], keys: Mapping[str, str]) -> None:
    reader, writer = os.pipe()
    os.write(writer, json.dumps(keys).encode())
    os.close(writer)
    os.set_inheritable(reader, True)
    rest = {name: value for name, value in environ.items() if name not in keys}
    rest[HANDOVER] = str(reader)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], rest)  # noqa: S606  # ourselves


def credential(environ: Mapping[str, str], name: str) -> str:
    """A systemd credential (LoadCredential=), or ""."""
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    path = Path(folder, name)
    return path.read_text(encoding="utf-8").strip() if folder and path.is_file() else ""


def _read(environ: Mapping[str, str], source: Source) -> str:
    """The key in a source's file or credential; "" when it has neither."""
    if source.file:
        return _private_file(source.file)
    if not source.credential:
        return ""
    if found := credential(environ, source.credential):
        return found
    raise KernelError(Errno.ENOENT, f"api_key_credential: systemd has given no {source.credential!r}")


def _private_file(path: str) -> str:
    """What a file holds that nobody else can read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError(Errno.ENOENT, f"api_key_file: {path}: {error.strerror}") from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise KernelError(Errno.EACCES, f"api_key_file: {path} is no regular file")
        if found.st_mode & 0o077 or found.st_uid not in {0, os.getuid()}:
            raise KernelError(Errno.EACCES, f"api_key_file: {path} can be read by others (chmod 600 {path})")
        text = os.read(fd, LONGEST).decode("utf-8", "replace").strip()
    finally:
        os.close(fd)
    if not text:
        raise KernelError(Errno.ENOENT, f"api_key_file: {path} is empty")
    return text


def close_process() -> None:
    """No core dumps, and no look in for others of the same user (prctl(2), PR_SET_DUMPABLE)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
