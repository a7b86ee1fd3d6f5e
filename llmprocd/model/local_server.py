"""The local model's server, a process of its own: `python -m llmprocd.model.local_server WEIGHTS`.

llama.cpp's own HTTP server, which speaks the Messages API, on a loopback port that the system chooses. Its
key comes by stdin; when it can answer it says where, in one line of JSON on stdout. What llama.cpp itself has
to say goes to stderr, all of it.

Prompts that were read are kept in memory, also those of conversations that no slot holds at the moment: what
a conversation has in common with any of them is not read again. So a fork begins where its parent stands.
"""

import argparse
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEMPERATURE = 0.2
"""What a small model needs to keep to the point; a request can say otherwise."""

CACHE_MB = 1024
"""For the prompts of conversations that no slot holds."""


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until told to stop."""
    options = _options(argv)
    key = sys.stdin.read().strip()
    out = os.dup(1)
    os.dup2(2, 1)  # llama.cpp writes to both
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    server = _server(options, key)
    os.write(out, json.dumps({"url": server.listening_address}).encode() + b"\n")
    os.close(out)
    while True:
        signal.pause()


def _leave(_number: int, _frame: object) -> None:
    os._exit(0)  # llama.cpp's threads would not let Python end by itself


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("llmprocd.model.local_server", description=__doc__)
    parser.add_argument("weights", help="a GGUF file")
    parser.add_argument("--slots", type=int, default=1, help="answers at once")
    parser.add_argument(
        "--window", type=int, default=8192, help="tokens that a prompt and its answer may have"
    )
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    return parser.parse_args(argv)


def _server(options: argparse.Namespace, key: str) -> Any:
    """Load the weights and listen. The library raises RuntimeError for what it cannot load."""
    library: Any = importlib.import_module("xllamacpp")
    wanted = library.CommonParams()
    wanted.model.path = options.weights
    wanted.model_alias = {"local"}
    wanted.hostnames = ["127.0.0.1"]
    wanted.port = 0
    wanted.api_keys = [key]
    wanted.ui = False
    wanted.n_parallel = options.slots
    wanted.n_ctx = options.window * options.slots
    wanted.cpuparams.n_threads = options.threads or len(os.sched_getaffinity(0))
    wanted.cpuparams_batch.n_threads = wanted.cpuparams.n_threads
    wanted.sampling.temp = TEMPERATURE
    wanted.cache_ram_mib = CACHE_MB
    wanted.use_jinja = True
    wanted.chat_template = Path(__file__).with_name("local.jinja").read_text(encoding="utf-8")
    return library.Server(wanted)


if __name__ == "__main__":
    main()
