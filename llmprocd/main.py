"""Boot and stop.

Boot: config, keys, lock, spawner, store, kernel, machine, socket; READY; then the SDK is imported, in a
thread, since nobody should wait for that. Stop: the listener closes, connections get a moment, the tasks are
cancelled; nothing is written that a crash would not have written too.
"""

import argparse
import contextlib
import gc
import logging
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import msgspec
import trio

from llmprocd import __version__, config, keys, listen, log, server, systemd, task
from llmprocd.abi import calls, paths
from llmprocd.abi.errno import KernelError
from llmprocd.config import Config
from llmprocd.kernel.state import Image, Kernel
from llmprocd.keys import Keyring
from llmprocd.local import Local
from llmprocd.machine import Machine
from llmprocd.model import body, script
from llmprocd.model.anthropic import Anthropic, Server
from llmprocd.program import load, prompt
from llmprocd.store.protocol import StoreFailed
from llmprocd.store.sqlite import Store
from llmprocd.syscall import sweep, sysalarm
from llmprocd.syscall.dispatch import Door
from llmprocd.tools import toolbox
from llmprocd.tools.spawner import Spawner, SpawnerError

_log = logging.getLogger("llmprocd")

GRACE_S = 0.05
"""How long connections have to end when the daemon stops."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon in the foreground; its exit status."""
    options = _options(argv)
    try:
        settings = config.load(options.config)
    except KernelError as error:
        sys.stderr.write(f"llmprocd: {error.text}\n")
        return 1
    variables = list(config.key_variables(settings).values())
    known = keys.take(os.environ, variables)
    credential = keys.credential(os.environ, "anthropic_api_key")
    if credential:
        known.setdefault("ANTHROPIC_API_KEY", credential)
    keyring = Keyring(os.environ, known)
    try:
        keyring.pair(config.key_sources(settings))
    except KernelError as error:
        sys.stderr.write(f"llmprocd: {options.config}: {error.text}\n")
        return 1
    log.start(options.log_level, keyring.secrets, journal=_is_journal())
    try:
        return _locked(options, settings, keyring)
    except StoreFailed as error:
        _log.critical("%s", error)
        return 1


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    usual = paths.config_path(os.environ, os.getuid())
    parser = argparse.ArgumentParser("llmprocd", description="Run language-model conversations as processes.")
    parser.add_argument("--socket", default="", metavar="PATH", help="where to listen")
    parser.add_argument("--state-dir", default="", metavar="DIR", help="what must survive is kept here")
    parser.add_argument("--config", default="", metavar="FILE", help=f"TOML (default: {usual}, if there)")
    parser.add_argument("--log-level", default="info", choices=log.LEVELS, help="default: info")
    parser.add_argument("--version", action="version", version=f"llmprocd {__version__}")
    options = parser.parse_args(argv)
    if not options.config and Path(usual).is_file():
        options.config = usual
    return options


def _is_journal() -> bool:
    """Is stderr the journal's? (systemd.exec(5), JOURNAL_STREAM)."""
    stream = os.environ.get("JOURNAL_STREAM", "")
    status = os.fstat(2)
    return stream == f"{status.st_dev}:{status.st_ino}"


def _locked(options: argparse.Namespace, settings: Config, keyring: Keyring) -> int:
    """Be the only daemon of this socket and of this state directory; then run."""
    with _usable():
        handed = systemd.listen_fds(os.environ)
        given = listen.handed(handed[0]) if handed else None
        name = given.getsockname() if given else options.socket or paths.socket_path(os.environ, os.getuid())
        path = str(Path(name).absolute())
        state = str(Path(options.state_dir or paths.state_dir(os.environ, os.getuid())).absolute())
        paths.make_private(state)
        os.environ["LLMPROC_SOCKET"] = path
        notifier = systemd.Notifier(os.environ)
        locks = [listen.lock(str(Path(state, "llmprocd"))), *([] if given else [listen.lock(path)])]
    spawner = Spawner.fork()
    keys.close_process()
    _many_files()
    sys.setswitchinterval(SWITCH_S)
    gc.set_threshold(*GARBAGE)
    store = Store(state)
    with _usable():
        listener = given or listen.bind(path)
    inode = 0 if given else Path(path).stat().st_ino
    daemon = Daemon(settings, options.config, keyring, store, spawner, path, state, notifier)
    try:
        return trio.run(daemon.run, listener)
    finally:
        listener.close()
        if inode:
            listen.unbind(path, inode)
        for lock in locks:
            os.close(lock)


@contextlib.contextmanager
def _usable() -> Generator[None]:
    """A place that cannot be used is told in a sentence: it is the caller's mistake, not a bug."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise SystemExit(f"llmprocd: {what}") from None


def _many_files() -> None:
    """Each model call and each client is a descriptor: allow as many as the system does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


GARBAGE = (10_000, 10, 100)
"""When the collector looks for cycles: rarely through everything, which with a thousand streams takes longer
than anybody wants to wait for `ps`."""

SWITCH_S = 0.0005
"""How long the writer's thread may keep the loop waiting; Python's own 5 ms would be seen in every answer."""


class Daemon:
    """The pieces, joined."""

    def __init__(
        self,
        settings: Config,
        config_path: str,
        keyring: Keyring,
        store: Store,
        spawner: Spawner,
        path: str,
        state: str,
        notifier: systemd.Notifier,
    ) -> None:
        self.config_path = config_path
        self.keyring = keyring
        self.settings = settings
        self.store = store
        self.spawner = spawner
        self.notifier = notifier
        self.catalog = toolbox.catalog()
        self.engine = script.Engine(keep_bytes=0)
        url = os.environ.get("ANTHROPIC_BASE_URL") or None
        self.local = Local(spawner, state, lambda: config.local_slots(self.settings))
        self.model = Anthropic(self.key, url, self._script, settings.stall_s, self)
        kernel = Kernel(store.load())
        self.machine = Machine(kernel, store, settings, self.model, spawner, task.live, self.image)
        self.machine.local = self.local
        gc.freeze()  # what was loaded stays: the collector need not look at it again and again
        self.machine.identify(path, state, secrets.token_hex(8), self)

    def key(self, base_url: str, variable: str) -> str | None:
        """The key for an endpoint: a provider's own, or the one that the config pairs with it."""
        return self.keyring.key(base_url or "anthropic", variable)

    def account(self, endpoint: str) -> Mapping[str, str] | None:
        """The variables of the daemon's account at a cloud, if they may be used there."""
        return self.keyring.account(endpoint)

    def server(self) -> Server:
        """The local model's. Raises ModelError when it does not answer now."""
        return self.local.server()

    def _script(self) -> Any:
        from llmprocd.model.script_transport import ScriptTransport

        return ScriptTransport(self.engine)

    def image(self, source: str | dict[str, Any], cwd: str, env: Mapping[str, str]) -> Image:
        """A program made ready to run. Raises ENOENT, ENOEXEC, EACCES (no key)."""
        program, warnings = load.load(source, cwd, self.catalog)
        for warning in warnings:
            _log.warning("%s", warning)
        made = prompt.image(program, self.catalog, cwd=cwd, prefix=body.prefix, env=env)
        self.model.check(made)
        return made

    def programs(self) -> list[tuple[str, str, str]]:
        """Name, path and description of the programs there are."""
        folders = os.environ.get("LLMPROC_PATH", "")
        return load.listed(folder for folder in folders.split(":") if folder)

    def check(self, path: str, cwd: str) -> calls.Checked:
        """Every fault of a program file."""
        faults, warnings = load.check(path, cwd, self.catalog)
        rows = [msgspec.convert(msgspec.to_builtins(fault), calls.FaultInfo) for fault in faults]
        return calls.Checked(not faults, rows, list(warnings))

    def reload(self) -> None:
        """Read the config again. Raises ENOENT, ENOEXEC; the old one stays then."""
        self.notifier.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            settings = config.load(self.config_path)
            self.keyring.pair(config.key_sources(settings))
            log.hide(self.keyring.secrets)
            self.settings = settings
            self.machine.configure(settings)
        finally:
            self.notifier.tell("READY=1")

    # --- running -----------------------------------------------------------------------------------

    async def run(self, listener: socket.socket) -> int:
        """Serve until told to stop; the exit status."""
        m = self.machine
        m.shared = listen.is_shared(m.socket)
        m.on_alarm = partial(sysalarm.ring, m)
        status = 1
        try:
            async with trio.open_nursery() as outer:
                await outer.start(self.store.run)
                await outer.start(self.spawner.run)
                async with trio.open_nursery() as nursery:
                    await nursery.start(m.run)
                    await nursery.start(partial(server.serve, listener, Door(m)))
                    await nursery.start(self._signals)
                    nursery.start_soon(self._watchdog)
                    nursery.start_soon(sweep.run, m)
                    nursery.start_soon(self._warm)
                    nursery.start_soon(self.local.run)
                    self._ready()
                    await m.stopping.wait()
                    self._stop(nursery)
                await self.model.aclose()
                status = 0
                outer.cancel_scope.cancel(reason="the daemon stops")
        except* (StoreFailed, SpawnerError) as group:
            for error in _leaves(group):
                _log.critical("%s", error)
            status = 1
        _log.info("stopped")
        return status

    async def _warm(self) -> None:
        """Have the SDK ready before it is needed; it stays, so the collector need not look at it either."""
        await self.model.warm()
        gc.freeze()

    def _ready(self) -> None:
        m = self.machine
        _log.info("ready socket=%s state=%s processes=%d", m.socket, m.state_dir, m.kernel.living)
        self.notifier.tell("READY=1", f"STATUS={m.kernel.living} processes")
        fd = os.environ.pop("LLMPROC_READY_FD", "")
        if fd:
            with os.fdopen(int(fd), "wb") as starter:
                starter.write(b"READY\n")

    def _stop(self, nursery: trio.Nursery) -> None:
        _log.info("stopping")
        self.notifier.tell("STOPPING=1")
        nursery.cancel_scope.deadline = trio.current_time() + GRACE_S

    async def _signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as arrived:
            task_status.started()
            async for number in arrived:
                if number != signal.SIGHUP:
                    self.machine.stopping.set()
                    continue
                try:
                    self.reload()
                except KernelError as error:
                    _log.warning("config not reloaded: %s", error.text)

    async def _watchdog(self) -> None:
        """Feed the watchdog from this loop: one that hangs shall miss it."""
        interval = self.notifier.watchdog_s / 2 if self.notifier.watchdog_s else 10.0
        said = ""
        while True:
            m = self.machine
            status = f"STATUS={m.kernel.living} processes, {m.busy} running"
            self.notifier.tell("WATCHDOG=1", *([status] if status != said else []))
            said = status
            await trio.sleep(interval)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        inner = cast("BaseExceptionGroup[BaseException]", error)
        found.extend(_leaves(inner) if isinstance(error, BaseExceptionGroup) else [error])
    return found
