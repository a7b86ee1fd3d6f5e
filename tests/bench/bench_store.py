"""How fast the store is: durable commits a second, and how long a boot takes.

    python tests/bench/bench_store.py [FOLDER] [--seconds 3] [--procs 100000] [--nodes 1000000]

The first table has producers that each submit a change (one node of 1 KiB, one process, one event), wait
until it is durable, and go on; beside it the same with one transaction for each change, as a store without
group commit would do it. The second has a state folder with many processes, two files each, and many more
messages, opened cold. Disks differ and are shared: the ratios say more than the numbers.
"""

import argparse
import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import trio

from llmprocd.abi.events import Event
from llmprocd.abi.types import FileId, ImageId, MessageId, Pid, Usage
from llmprocd.kernel.state import At, Change, Counters, File, Image, Kernel, Node, Proc, Run, ToolCall
from llmprocd.store import sqlite, writer

BODY = b'{"type":"text","text":"' + b"x" * 1000 + b'"}'


def proc(pid: int, head: int) -> Proc:
    """A process that has run: a few tool calls, two files, numbers that are not zero."""
    usage = Usage(1200, 340, 56000, 7800)
    calls = (ToolCall("bash", '{"command":"make test"}', is_error=False),) * 3
    return Proc(
        pid=Pid(pid), family=Pid(pid), image=ImageId(1), uid=1000, cwd="/home/user/project", began=1.7e9,
        ended=1.7e9 + 60, head=MessageId(head), at=At.DONE, fds={3: FileId(2 * pid), 4: FileId(2 * pid + 1)},
        run=Run(seq=1, began=1.7e9, ended=1.7e9 + 60, api_calls=4, tool_calls=calls, usage=usage),
        stop_reason="end_turn", turns=4, usage=usage, context_tokens=65340, stdout=2048,
    )  # fmt: skip


def change(n: int, pid: int) -> Change:
    return Change(
        nodes=[Node(MessageId(n), MessageId(n - 1) if n > 1 else None, "assistant", BODY, model="a-model")],
        procs={Pid(pid): proc(pid, n)},
        events=[Event(n, 1.7e9, "api_response", Pid(pid), {"stop_reason": "end_turn"})],
        counters=Counters(message=n + 1),
        why=["infer"],
    )


async def commits(
    folder: str, producers: int, seconds: float, most: int
) -> tuple[float, list[float], float, int]:
    """Changes a second, how long each waited, CPU seconds a change, and the number of transactions."""
    store = sqlite.Store(folder)
    writer.BATCH_CHANGES = most
    waits: list[float] = []
    told: list[int] = []
    store.on_durable = told.append
    number = iter(range(1, 10**9))

    async def produce(pid: int, end: float) -> None:
        while time.perf_counter() < end:
            start = time.perf_counter()
            await store.wait_durable(store.submit(change(next(number), pid)))
            waits.append(time.perf_counter() - start)

    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: store.run(task_status=task_status))
        start, used = time.perf_counter(), cpu()
        async with trio.open_nursery() as crowd:
            for pid in range(2, producers + 2):
                crowd.start_soon(produce, pid, start + seconds)
        took, used = time.perf_counter() - start, cpu() - used
        nursery.cancel_scope.cancel()
    return len(waits) / took, waits, used / len(waits), len(told)


def cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def show_commits(base: Path, seconds: float) -> None:
    print("| producers | | commits/s | changes a commit | p50 ms | p99 ms | CPU us a change |")
    print("|---|---|---|---|---|---|---|")
    for producers in (1, 100, 1000):
        for name, most in (("group commit", 4096), ("one transaction each", 1)):
            folder = str(base / f"commits-{producers}-{most}")
            rate, waits, used, told = trio.run(commits, folder, producers, seconds, most)
            cuts = statistics.quantiles(waits, n=100)
            print(
                f"| {producers} | {name} | {rate:,.0f} | {len(waits) / told:.1f} "
                f"| {cuts[49] * 1e3:.1f} | {cuts[98] * 1e3:.1f} | {used * 1e6:.0f} |",
                flush=True,
            )


def many(procs: int, nodes: int) -> Iterator[Change]:
    """A full store, in changes of a thousand."""
    image = Image("coder", "/home/user/coder.toml", "a-model", "anthropic", b"{" * 4000, b"}")
    yield Change(images={ImageId(1): image}, counters=Counters())
    for first in range(2, procs + 2, 1000):
        pids = range(first, min(first + 1000, procs + 2))
        files = [
            File(FileId(2 * pid + n), 9000, complete=True, origin="bash") for pid in pids for n in (0, 1)
        ]
        yield Change(
            procs={Pid(pid): proc(pid, pid) for pid in pids},
            families={Pid(pid): 5 for pid in pids},
            files={file.id: file for file in files},
        )
    for first in range(1, nodes + 1, 1000):
        yield Change(nodes=[Node(MessageId(n), None, "user", BODY) for n in range(first, first + 1000)])


async def fill(folder: str, procs: int, nodes: int) -> None:
    store = sqlite.Store(folder)
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: store.run(task_status=task_status))
        for n, one in enumerate(many(procs, nodes)):
            ticket = store.submit(one)
            if n % 8 == 0:
                await store.wait_durable(ticket)
        nursery.cancel_scope.cancel()


def show_boot(base: Path, procs: int, nodes: int) -> None:
    folder = str(base / "boot")
    trio.run(fill, folder, procs, nodes)
    size = (base / "boot" / "store.db").stat().st_size
    print(f"\n{procs:,} processes, {2 * procs:,} files, {nodes:,} messages: {size / 1e6:,.0f} MB\n")
    print("| open s | load s | kernel s | CPU s of all | MB of memory |")
    print("|---|---|---|---|---|")
    for _ in range(3):
        before, used = memory(), cpu()
        times = [time.perf_counter()]
        store = sqlite.Store(folder)
        times.append(time.perf_counter())
        saved = store.load()
        times.append(time.perf_counter())
        kernel = Kernel(saved)
        times.append(time.perf_counter())
        assert len(kernel.procs) == procs
        steps = [f"{end - start:.3f}" for start, end in itertools.pairwise(times)]
        print(f"| {' | '.join(steps)} | {cpu() - used:.3f} | {memory() - before:.0f} |", flush=True)
        store.close()


def memory() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="where to put the test files; default a temporary folder")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--procs", type=int, default=100_000)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as base:
        show_commits(Path(base), args.seconds)
        show_boot(Path(base), args.procs, args.nodes)


if __name__ == "__main__":
    main()
