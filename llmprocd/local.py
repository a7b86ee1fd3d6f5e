"""The local model: a server on loopback that the daemon starts, watches and ends.

It is wanted or not (`wish`); what is wanted is written down, so that it is there again after a restart. The
server is a child of the spawner's, so it ends with the daemon however that ends. When it ends by itself it is
started again, later each time.

Law: its key is new with each start, and goes by its stdin to it alone: another user of this machine, who can
reach the port, cannot use it.
"""

import json
import logging
import os
import secrets
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import msgspec
import trio

from llmprocd.abi.calls import LocalInfo
from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import INIT
from llmprocd.model.anthropic import Server
from llmprocd.model.protocol import ModelError
from llmprocd.tools.output import ToolError
from llmprocd.tools.spawner import Running, Spawner, memory_file

_log = logging.getLogger(__name__)

MODULE = "llmprocd.model.local_server"
WINDOW = 8192
"""Tokens that a prompt and its answer may have, in one slot."""

LOADING_S = 300.0
"""How long it may take to load."""

STABLE_S = 60.0
"""After so long a life the next start is a first one again."""

PAUSES = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Seconds before it is started again: by how often it has ended soon."""

_PASSED = ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "PYTHONPATH")
_SPIN = "1000"
"""GOMP_SPINCOUNT. Its threads wait for each other spinning: beside other work they would do little else."""


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to run."""

    model: str
    path: str
    threads: int = 0


class Local:
    """The server of the local model, or none.

    Args:
        spawner: starts it.
        folder: where the wish and the server's log are kept.
        slots: tells how many answers it may give at once.
        command: what to start, with the weights and options behind it; None for our own server.
    """

    def __init__(
        self, spawner: Spawner, folder: str, slots: Callable[[], int], command: Sequence[str] | None = None
    ) -> None:
        self._spawner = spawner
        self._command = command
        self._file = Path(folder, "local.json")
        self._log_path = Path(folder, "local.log")
        self._slots = slots
        self._changed = trio.Event()
        self._scope = trio.CancelScope()
        self._up: Server | None = None
        self._info = LocalInfo(installed=True, state="down")
        self.wish = self._read()

    def info(self) -> LocalInfo:
        """How it does."""
        installed = self._command is not None or find_spec("xllamacpp") is not None
        return msgspec.structs.replace(self._info, installed=installed)

    def server(self) -> Server:
        """Where it answers, and to which key.

        Raises:
            ModelError: EHOSTUNREACH: it does not, now; to be tried again when it is wanted.
        """
        if self._up is not None:
            return self._up
        if self.wish is None:
            raise ModelError(Errno.EHOSTUNREACH, "no local model runs here (llmprocctl local up)")
        why = f": {self._info.reason}" if self._info.reason else ""
        raise ModelError(Errno.EHOSTUNREACH, f"the local model is {self._info.state}{why}", again=True)

    async def up(self, wish: Wish) -> LocalInfo:
        """Have it run, and wait until it does.

        Raises:
            KernelError: ENOSYS the extra is not installed, ENOENT there are no weights, EIO it ended while
                it loaded; it is tried again then, until it is not wanted any more.
        """
        if not self.info().installed:
            raise KernelError(
                Errno.ENOSYS, "the extra 'local' is not installed (pip install 'llmprocd[local]')"
            )
        if not await trio.Path(wish.path).is_file():
            raise KernelError(Errno.ENOENT, f"no weights at {wish.path}")
        if wish != self.wish or self._info.state == "waiting":
            self._want(wish)
        while self._info.state == "starting":
            await self._changed.wait()
        if self.wish == wish and self._up is None:
            raise KernelError(Errno.EIO, f"the local model did not start: {self._info.reason}")
        return self.info()

    async def down(self) -> LocalInfo:
        """Have it run no more, and wait until it has ended."""
        self._want(None)
        while self._info.state != "down":
            await self._changed.wait()
        return self.info()

    async def run(self) -> None:
        """Keep it as it is wanted, until cancelled."""
        while True:
            wish = self.wish
            with trio.CancelScope() as self._scope:
                if wish is None:
                    self._tell(LocalInfo(installed=True, state="down"))
                    await trio.sleep_forever()
                else:
                    await self._keep(wish)

    # --- the wish ----------------------------------------------------------------------------------

    def _want(self, wish: Wish | None) -> None:
        self.wish = wish
        if wish is None:
            self._file.unlink(missing_ok=True)
        else:
            fresh = self._file.with_suffix(".new")
            fresh.write_bytes(msgspec.json.encode(wish))
            fresh.replace(self._file)
            self._tell(self._described(wish, "starting"))
        self._scope.cancel(reason="another wish")

    def _read(self) -> Wish | None:
        if not self._file.is_file():
            return None
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Wish)
        except msgspec.MsgspecError as fault:
            _log.warning("%s: %s", self._file, fault)
            return None

    # --- the server --------------------------------------------------------------------------------

    async def _keep(self, wish: Wish) -> None:
        """Start it again and again."""
        soon = starts = 0
        while True:
            began = trio.current_time()
            self._tell(self._described(wish, "starting", starts, self._info.reason if starts else ""))
            try:
                reason = await self._life(wish, starts)
            finally:
                self._up = None
            starts += 1
            soon = 0 if trio.current_time() - began > STABLE_S else soon + 1
            _log.warning("the local model has ended: %s", reason)
            self._tell(self._described(wish, "waiting", starts, reason))
            await trio.sleep(PAUSES[min(max(soon, 1), len(PAUSES)) - 1])

    async def _life(self, wish: Wish, starts: int) -> str:
        """One server, from its start to its end; why it ended."""
        key = secrets.token_urlsafe(32)
        reader, writer = os.pipe2(os.O_CLOEXEC)
        log = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        async with trio.lowlevel.FdStream(reader) as says:
            try:
                running = await self._start(wish, key, writer, log)
            except ToolError as fault:
                return str(fault)
            finally:
                os.close(writer)
                os.close(log)
            try:
                return await self._watched(wish, starts, running, key, says)
            finally:
                await running.end()

    async def _start(self, wish: Wish, key: str, writer: int, log: int) -> Running:
        slots = str(self._slots())
        options = ("--slots", slots, "--window", str(WINDOW), "--threads", str(wish.threads))
        command = self._command or (sys.executable, "-P", "-m", MODULE)
        env = {name: os.environ[name] for name in _PASSED if name in os.environ}
        with memory_file(key.encode()) as given:
            return await self._spawner.start(
                INIT,
                [*command, wish.path, *options],
                cwd="/",
                env={**env, "GOMP_SPINCOUNT": _SPIN},
                stdin=given.fileno(),
                stdout=writer,
                stderr=log,
            )

    async def _watched(
        self, wish: Wish, starts: int, running: Running, key: str, says: trio.abc.ReceiveStream
    ) -> str:
        """Wait until it can answer, and then until it ends."""
        line = b""
        with trio.move_on_after(LOADING_S):
            while not line.endswith(b"\n") and (part := await says.receive_some(4096)):
                line += part
        if not line.endswith(b"\n"):
            return self._last_words() or f"not loaded within {LOADING_S:g} s"
        url = str(json.loads(line)["url"])
        self._up = Server(url, key, WINDOW)
        up = self._described(wish, "up", starts, self._info.reason)
        self._tell(msgspec.structs.replace(up, url=url, pid=running.os_pid))
        _log.info("the local model is up url=%s pid=%d", url, running.os_pid)
        status = await running.wait()
        return f"it ended with status {status}"

    def _described(self, wish: Wish, state: str, restarts: int = 0, reason: str = "") -> LocalInfo:
        return LocalInfo(
            installed=True,
            state=state,
            model=wish.model,
            path=wish.path,
            slots=self._slots(),
            window=WINDOW,
            restarts=restarts,
            reason=reason,
        )

    def _tell(self, info: LocalInfo) -> None:
        self._info = info
        self._changed.set()
        self._changed = trio.Event()

    def _last_words(self) -> str:
        """The last line of its log that says something."""
        words = ""
        with suppress(FileNotFoundError), self._log_path.open(encoding="utf-8", errors="replace") as log:
            words = next((line.strip() for line in reversed(deque(log, 20)) if line.strip()), "")
        return words[:300]
