"""The daemon from outside: durable spawns, `llmprocctl ps`, restart with many processes, memory.

Prints a table. Wall times are of this machine in this run; CPU times and ratios say more.
"""

import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import trio

from llmprocd.kernel import proc
from llmprocd.kernel.proc import Birth
from llmprocd.kernel.state import Image, Kernel
from llmprocd.store.sqlite import Store

IMAGE = Image("bench", "", "script", "script", b'{"model":"script","messages":[', b"]}")


class Daemon:
    """A daemon in a folder."""

    def __init__(self, folder: str, *options: str) -> None:
        self.path = f"{folder}/s"
        reader, writer = os.pipe()
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "llmprocd"),
                *("--socket", self.path, "--state-dir", f"{folder}/state"),
                *options,
            ],
            env={**os.environ, "LLMPROC_READY_FD": str(writer)},
            pass_fds=[writer],
            stderr=subprocess.DEVNULL,
        )
        os.close(writer)
        os.read(reader, 6)
        self.boot_s = time.perf_counter() - begun

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        return sock

    def rss(self) -> int:
        text = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii")
        return int(text.split()[1]) * resource.getpagesize()

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def call(sock: socket.socket, method: str, **params: object) -> Any:
    sock.sendall(msgspec.msgpack.encode([0, 1, method, [params]]))
    data = sock.recv(1 << 20)
    while True:
        try:
            return msgspec.msgpack.decode(data)[3]
        except msgspec.DecodeError:
            data += sock.recv(1 << 20)


def spawns(daemon: Daemon, clients: int, each: int) -> tuple[float, float]:
    """Durable spawns a second, and microseconds of the daemon's CPU for one."""

    def client() -> None:
        with daemon.connect() as sock:
            for _ in range(each):
                call(sock, "proc.spawn", program="demo", interactive=True)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    cpu, begun = daemon.cpu(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = clients * each
    return total / (time.perf_counter() - begun), 1e6 * (daemon.cpu() - cpu) / total


def child_cpu(args: list[str], env: dict[str, str]) -> float:
    """Milliseconds of CPU of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(args, env=env, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def ps(daemon: Daemon) -> tuple[float, float]:
    """CPU of `llmprocctl ps`, and of a bare interpreter."""
    env = {**os.environ, "LLMPROC_SOCKET": daemon.path}
    command = [str(Path(sys.executable).parent / "llmprocctl"), "ps"]
    bare = [sys.executable, "-I", "-S", "-c", "pass"]
    rounds = [(child_cpu(command, env), child_cpu(bare, env)) for _ in range(15)]
    return statistics.median(r[0] for r in rounds), statistics.median(r[1] for r in rounds)


async def fill(folder: str, count: int) -> None:
    """A state folder with many resting processes."""
    store = Store(f"{folder}/state")
    k = Kernel(store.load())
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        image = k.put_image(IMAGE)
        for number in range(count):
            proc.spawn(k, Birth(image=image, interactive=True))
            if number % 500 == 499:
                ticket = store.submit(k.taken())
                await store.wait_durable(ticket)
        await store.wait_durable(store.submit(k.taken()))
        nursery.cancel_scope.cancel()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(folder)
        print(f"boot of an empty daemon, exec to READY: {1000 * daemon.boot_s:.0f} ms")
        time.sleep(3)  # the SDK is imported after READY
        spawns(daemon, 1, 100)
        median, bare = ps(daemon)
        ratio = median / bare
        print(f"llmprocctl ps, 100 processes: {median:.1f} ms CPU, {ratio:.2f} x python -I -S -c pass")
        for clients in (1, 10, 100):
            rate, cpu = spawns(daemon, clients, 2000 // clients)
            print(f"durable spawns, {clients:>3} clients: {rate:7.0f} /s, {cpu:6.1f} us CPU each")
        daemon.stop()
    with tempfile.TemporaryDirectory() as folder:
        empty = Daemon(folder)
        empty.stop()
        trio.run(fill, folder, 100_000)
        full = Daemon(folder)
        time.sleep(3)
        extra = full.boot_s - empty.boot_s
        each = (full.rss() - 90e6) / 100_000
        print(f"restart with 100,000 processes: {1000 * extra:.0f} ms over an empty boot")
        resident = full.rss() / 1e6
        print(f"resident with 100,000 idle processes: {resident:.0f} MB (about {each:.0f} bytes each)")
        full.stop()


if __name__ == "__main__":
    main()
