"""A fork of a warm conversation on a real model: how long until it says something, and what it had to read.

Needs the extra `local` and weights that `llmprocctl local up` has fetched; says so and ends without them.
Takes a minute or two of all cores (LLMPROC_TEST_THREADS=1: of one).
"""

import os
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench_daemon import Daemon, call

from llmprocd.abi import paths
from llmprocd.abi.weights import MODELS

NAME = os.environ.get("LLMPROC_TEST_MODEL", "0.5b")
THREADS = int(os.environ.get("LLMPROC_TEST_THREADS", "0"))
WEIGHTS = Path(paths.cache_dir(os.environ, os.getuid()), MODELS[NAME].file)
CHILDREN = 3
KNOWN = " ".join(f"Box {number} holds {number * 7 % 50} marbles." for number in range(80))
PROGRAM = {
    "model": {"name": "local", "provider": "local"},
    "parameters": {"max_tokens": 24, "temperature": 0},
    "prompt": {"system": f"You answer in one short sentence. What you know: {KNOWN}"},
}


def events(sock: socket.socket, pid: int, after: int, until: str) -> list[dict[str, Any]]:
    """Events of a process after a number, up to one of a type; texts are told only while somebody waits."""
    found: list[dict[str, Any]] = []
    while not any(event["type"] == until for event in found):
        page = call(sock, "events.read", after_seq=after, pids=[pid], wait_ms=600_000)
        found += page["events"]
        after = page["next_seq"]
    return found


def turn(sock: socket.socket, pid: int, after: int) -> tuple[int, int, float]:
    """The next turn of a process: tokens from the cache, tokens read anew, seconds to the first word."""
    found = events(sock, pid, after, "turn_end")
    asked = next(event["at"] for event in found if event["type"] == "api_request")
    said = next(event["at"] for event in found if event["type"] in {"text", "api_response"})
    cache = call(sock, "proc.get", pid=pid)["procs"][0]["cache"]
    return cache["read"], cache["prompt"] - cache["read"], said - asked


def last(sock: socket.socket) -> int:
    """The number of the last event there was."""
    number: int = call(sock, "events.read")["next_seq"]
    return number


def rows(sock: socket.socket) -> list[tuple[str, int, int, float]]:
    """Cold, warm, forked, and cold again with what is known in another order."""
    after = last(sock)
    parent = call(sock, "proc.spawn", program=PROGRAM, interactive=True, prompt="How many are in box 3?")[
        "pid"
    ]
    found = [("a first turn, cold", *turn(sock, parent, after))]
    after = last(sock)
    call(sock, "proc.send", pid=parent, text="And how many are in box 5?")
    found.append(("its second turn", *turn(sock, parent, after)))
    after = last(sock)
    prompts = [f"And in box {number}?" for number in range(10, 10 + CHILDREN)]
    for number, child in enumerate(call(sock, "proc.fork", pid=parent, prompts=prompts)["pids"], 1):
        found.append((f"fork {number} of {CHILDREN}", *turn(sock, child, after)))
    other = {**PROGRAM, "prompt": {"system": f"What you know: {KNOWN} You answer in one short sentence."}}
    after = last(sock)
    pid = call(sock, "proc.spawn", program=other, prompt="How many are in box 10?")["pid"]
    found.append(("a fresh process for the same", *turn(sock, pid, after)))
    return found


def main() -> None:
    if find_spec("xllamacpp") is None or not WEIGHTS.exists():
        print(f"not run: it needs the extra 'local', and {WEIGHTS} (llmprocctl local up)")
        return
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(folder)
        try:
            with daemon.connect() as sock:
                call(sock, "local.up", model=NAME, path=str(WEIGHTS), threads=THREADS)
                print(f"{MODELS[NAME].title}, {THREADS or os.cpu_count()} threads")
                print(f"{'':30}{'cached':>8}{'read':>8}{'first word':>14}")
                for what, cached, read, seconds in rows(sock):
                    print(f"{what:30}{cached:8}{read:8}{seconds:12.2f} s")
        finally:
            daemon.stop()


if __name__ == "__main__":
    main()
