"""What a fork and an idle process cost.

Prints a table. CPU time, medians; run it on a quiet machine and compare rows, not runs.
"""

import gc
import resource
import statistics
import time
from pathlib import Path

from llmprocd.abi.types import MessageId
from llmprocd.kernel import proc
from llmprocd.kernel.proc import Birth
from llmprocd.kernel.state import Image, Kernel, Node, Proc

IMAGE = Image("bench", "", "script", "script", b'{"model":"script","messages":[', b"]}")


def grown(k: Kernel, messages: int) -> Proc:
    """A process with a history."""
    p = proc.spawn(k, Birth(image=k.put_image(IMAGE), interactive=True))
    for number in range(messages):
        role = "assistant" if number % 2 else "user"
        node = Node(MessageId(k.take("message")), p.head, role, b'{"type":"text","text":"x"}')
        p = k.put(p.moved(k.add_node(node)))
    k.taken()
    return p


def fork_us(messages: int, rounds: int = 300) -> float:
    """Microseconds of CPU for one fork by a user."""
    k = Kernel()
    p = grown(k, messages)
    spent: list[float] = []
    for _ in range(rounds):
        before = time.process_time_ns()
        proc.fork(k, p.pid, ["go on"])
        spent.append((time.process_time_ns() - before) / 1000)
        k.taken()
    return statistics.median(spent)


def idle_bytes(count: int = 100_000) -> float:
    """Bytes of memory that one resting process takes."""
    k = Kernel()
    image = k.put_image(IMAGE)
    gc.collect()
    before = resident()
    for _ in range(count):
        proc.spawn(k, Birth(image=image, interactive=True))
        k.taken()
    gc.collect()
    return (resident() - before) / count


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def main() -> None:
    print("fork by a user, in the kernel (goal: < 50 us, flat)")
    small = fork_us(10)
    for messages in (10, 100, 1_000, 10_000):
        spent = fork_us(messages)
        print(f"  {messages:>6} messages  {spent:7.1f} us  x{spent / small:.2f}")
    print(f"an idle process: {idle_bytes():.0f} bytes")


if __name__ == "__main__":
    main()
