"""Keys: from the environment or a systemd credential into memory, and nowhere else.

A key that came by environment could be read in /proc/PID/environ for as long as the daemon runs. So it is
handed over a pipe to a second execution of the same program, whose environment never had it; then the
process is made undumpable, which closes its memory and environment to others of the same user.
"""

import ctypes
import json
import os
import resource
import sys
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path

HANDOVER = "LLMPROCD_KEYS_FD"
ALWAYS = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
PR_SET_DUMPABLE = 4


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


def close_process() -> None:
    """No core dumps, and no look in for others of the same user (prctl(2), PR_SET_DUMPABLE)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
