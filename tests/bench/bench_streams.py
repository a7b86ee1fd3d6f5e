"""A thousand processes that stream at once, and what it is like to look at them meanwhile.

A real daemon, a real HTTP model server (the built-in one, as a process of its own) and `proc.list` again and
again beside it. Prints a table; wall times are of this machine in this run. Beside them stands what is left
when the time is taken off in which the daemon could have run and others had the CPU (/proc/PID/schedstat):
what it would be if the daemon had a core of its own.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_daemon import Daemon, call

PROGRAM = """
[model]
name = "script"
provider = "anthropic"
[file_descriptor]
enabled = false
"""

WORDS = "word " * 200
PROMPT = f"!delay {{delay}}\n!say {WORDS}"


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "llmprocd.model.script", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as model:
            assert model.stdout is not None
            url = json.loads(model.stdout.readline())["url"]
            os.environ |= {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "bench"}
            Path(folder, "p.toml").write_text(PROGRAM, encoding="utf-8")
            Path(folder, "config.toml").write_text(f"slots = {count}\n", encoding="utf-8")
            stream(folder, count)
            model.terminate()


def stream(folder: str, count: int) -> None:
    daemon = Daemon(folder, "--config", f"{folder}/config.toml")
    time.sleep(3)
    with daemon.connect() as sock:
        begun, cpu = time.perf_counter(), daemon.cpu()
        for _ in range(count):
            call(sock, "proc.spawn", program=f"{folder}/p.toml", prompt=PROMPT.format(delay=0.05))
        spawned = time.perf_counter() - begun
        delays: list[float] = []
        alone: list[float] = []
        living = count
        while living:
            others, before = queued(daemon.process.pid), time.perf_counter()
            procs = call(sock, "proc.list")["procs"]
            delays.append(1000 * (time.perf_counter() - before))
            others = queued(daemon.process.pid) - others
            alone.append(max(0.0, delays[-1] - others))
            living = sum(proc["stat"] != "Z" for proc in procs)
            time.sleep(0.1)
        took, spent = time.perf_counter() - begun, daemon.cpu() - cpu
        failed = sum(proc["status"] != 0 for proc in call(sock, "proc.list")["procs"])
    print(f"{count} processes, 200 deltas each, one every 50 ms at best: {took:.1f} s, {failed} failed")
    print(
        f"  spawned in {spawned:.2f} s; daemon CPU {1000 * spent / count:.1f} ms a process, "
        f"{spent / took:.0%} of a core"
    )
    for what, times in (("proc.list of all of them", delays), ("with a core of its own", alone)):
        print(
            f"  {what}: median {statistics.median(times):.1f} ms, "
            f"p99 {statistics.quantiles(times, n=100)[98]:.1f} ms, {len(times)} samples"
        )
    print(f"  resident: {daemon.rss() / 1e6:.0f} MB")
    daemon.stop()


def queued(pid: int) -> float:
    """Milliseconds that a process's main thread has waited for a CPU so far."""
    return int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e6


if __name__ == "__main__":
    main()
