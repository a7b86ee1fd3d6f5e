"""llmprocctl as its users run it: a program of its own."""

import os
import subprocess
import sys

import msgspec


class Outcome(msgspec.Struct):
    out: str
    err: str
    status: int
    raw: bytes

    @property
    def lines(self):
        return self.out.splitlines()


class Ctl:
    """Runs llmprocctl against one socket."""

    def __init__(self, path, folder):
        self.path = str(path)
        self.folder = folder
        self.env = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "LLMPROC_SOCKET": self.path,
            "LLMPROC_NO_AUTOSTART": "1",
            "LANG": "C.UTF-8",
            "TZ": "UTC",
        }

    def __call__(self, *words, stdin=None, env=None, **more):
        done = subprocess.run(
            self.command(*words),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            env={**self.env, **(env or {})},
            cwd=self.folder,
            capture_output=True,
            timeout=60,
            check=False,
            **more,
        )
        out = done.stdout.decode("utf-8", "backslashreplace")
        return Outcome(out, done.stderr.decode(), done.returncode, done.stdout)

    def start(self, *words, **more):
        """The same in the background."""
        return subprocess.Popen(
            self.command(*words),
            env=self.env,
            cwd=self.folder,
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
        )

    def command(self, *words):
        return [sys.executable, "-m", "llmprocctl", *map(str, words)]
