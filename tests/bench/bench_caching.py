"""What the prompt cache saves, and what it costs to have it saved.

    python tests/bench/bench_caching.py

A daemon against the strict endpoint, which bills as the API does. First the share of prompt tokens that came
from the cache, for a few ways to work; then the CPU time of placing the markers, in milliseconds.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "e2e"), str(Path(__file__).parents[2])]

from e2ekit import Client, Daemon, Strict, program, script, use  # noqa: E402

from llmprocd.abi.types import MessageId  # noqa: E402
from llmprocd.kernel.history import text_block  # noqa: E402
from llmprocd.kernel.state import Image, Node  # noqa: E402
from llmprocd.model.body import Transcript, prefix  # noqa: E402

RULES = "Obey this rule, and the ones before it. " * 100
TOOLS = program("bash", "calculator", "fork", prompt={"system": RULES})
LONG = "words that go on and on, " * 250


def tool_turns(client: Client) -> None:
    """One process, twenty tools one after another."""
    client.spawn({**TOOLS, "model": {**TOOLS["model"], "max_iterations": 30}}, interactive=True)
    pid = max(row["pid"] for row in client.call("proc.list")["procs"])
    client.run(pid, script(*(f"!bash seq {n}000 {n}300" for n in range(20)), "!say done"))


def talk(client: Client) -> None:
    """One process, ten texts of 1,500 tokens."""
    pid = client.spawn(TOOLS, interactive=True)
    for number in range(10):
        client.run(pid, f"!say {number} {LONG}")


def fork_many(client: Client) -> None:
    """A history of 12,000 tokens, and fifty children at once."""
    pid = client.spawn(TOOLS, interactive=True)
    for number in range(4):
        client.run(pid, f"!say {number} {LONG}")
    children = client.call("proc.fork", pid=pid, prompts=[f"!say {n}" for n in range(50)])["pids"]
    for child in children:
        client.rests(child)


def models_fork(client: Client) -> None:
    """A model that forks ten children beside thirty other calls."""
    sums = "\n!& ".join('!calculator {"expression":"1+1"}' for _ in range(30))
    prompts = [f"!bash echo {n}\\n!say {n}" for n in range(10)]
    client.finish(
        TOOLS, script("!bash seq 1 1000", f"{sums}\n!& {use('fork', prompts=prompts)}", "!say done")
    )


def shares() -> list[tuple[str, float, int]]:
    """Per cent of the prompt tokens that were read, and how many there were, by way of working."""
    rows: list[tuple[str, float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        for work in (tool_turns, talk, fork_many, models_fork):
            strict = Strict()
            daemon = Daemon(Path(folder, work.__name__), strict.url).start()
            with daemon.client() as client:
                work(client)
                books = strict.books()
                daemon.sweep(client)
            daemon.close()
            strict.close()
            whole = sum(books.values()) - books["answers"] - books["output_tokens"]
            rows.append((str(work.__doc__), 100 * books["cache_read_input_tokens"] / whole, whole))
    return rows


def path(messages: int) -> list[Node]:
    body = text_block("The quick brown fox. " * 50)
    kinds = ("user", "assistant")
    return [Node(MessageId(i), None, kinds[i % 2], body, model="m", text=i % 2 == 0) for i in range(messages)]


def cpu(work: Callable[[], object], repeat: int = 200) -> float:
    samples: list[float] = []
    for _ in range(9):
        began = time.process_time()
        for _ in range(repeat):
            work()
        samples.append((time.process_time() - began) / repeat)
    return statistics.median(samples) * 1e3


def main() -> None:
    print(f"{'read from the cache':62}{'%':>7}{'tokens':>10}")
    for name, share, tokens in shares():
        print(f"{name:62}{share:7.1f}{tokens:10,}")
    print(f"\n{'CPU of a body':62}{'ms':>7}")
    for messages in (20, 1_000, 10_000):
        transcript = Transcript.of(path(messages - 1), "m")
        for caching in (False, True):
            before, after = prefix("m", {"max_tokens": 9}, "be good", [], caching)
            image = Image("p", "", "m", "script", before, after, caching=caching)
            repeat = max(20, 20_000 // messages)
            spent = cpu(lambda image=image, t=transcript: t.pieces(image), repeat)
            name = f"{messages:,} messages of 1 KB, markers {'placed' if caching else 'left out'}"
            print(f"{name:62}{spent:7.3f}")


if __name__ == "__main__":
    main()
