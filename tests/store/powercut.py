"""What a disk may hold after the power has gone.

A program is run under strace, and its writes, syncs and renames are played again up to a random one. What
had been synced is there; of what had not, some is there, some is not, and some is torn at 512 bytes. A name
is there once its folder was synced (or, for a new file, the file itself); later names are there or not, in
the order they were made. Only what SQLite and the blobs use is modelled.
"""

import random
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

CALLS = (
    "openat,pwrite64,write,fsync,fdatasync,ftruncate,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat"
)
SECTOR = 512


def record(argv: Sequence[str], trace: Path, cwd: Path, seconds: float) -> list[tuple]:
    """Run a program for a while under strace, end it with kill -9; its operations, in order."""
    strace = ["strace", "-f", "-y", "-xx", "-s", "10000000", "-o", str(trace), "-e", f"trace={CALLS}"]
    child = subprocess.Popen([*strace, *argv], cwd=cwd, stdout=subprocess.PIPE)
    child.stdout.readline()  # it has begun
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        traced = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        subprocess.run(["kill", f"-{signal.SIGKILL}", *traced], check=True)
    child.stdout.close()
    child.wait()
    with trace.open() as lines:
        return list(operations(lines))


LINE = re.compile(r"(\w+)\((.*)\)\s+= (\d+)")
DESCRIPTOR = re.compile(r"^(\d+)<([^>]*)>")
STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


def operations(lines: Iterator[str]) -> Iterator[tuple]:
    """The calls of a trace that succeeded, each as (what, path or number, ...)."""
    begun: dict[str, str] = {}
    for line in lines:
        thread, rest = line.rstrip("\n").split(maxsplit=1)
        if rest.endswith(" <unfinished ...>"):
            begun[thread] = rest.removesuffix(" <unfinished ...>")
            continue
        if rest.startswith("<... "):
            rest = begun.pop(thread, "") + rest.split(" resumed>", 1)[1]
        match = LINE.match(rest)
        if match:
            yield from operation(match[1], match[2], int(match[3]))


def operation(name: str, args: str, result: int) -> Iterator[tuple]:
    """One call of a trace, if it is of interest."""
    strings = [bytes.fromhex(text.replace("\\x", "")) for text in STRING.findall(args)]
    descriptor = DESCRIPTOR.match(args)
    path = decoded(descriptor[2]) if descriptor else ""
    if name == "write" and descriptor and descriptor[1] == "1":
        if strings[0].strip().isdigit():
            yield "ack", int(strings[0])
    elif name == "write":
        yield "append", path, strings[0][:result]
    elif name == "pwrite64":
        yield "write", path, strings[0][:result], int(args.rsplit(",", 1)[1])
    elif name in {"fsync", "fdatasync"}:
        yield "sync", path
    elif name == "ftruncate":
        yield "truncate", path, int(args.rsplit(",", 1)[1])
    elif name == "openat" and "O_CREAT" in args:
        yield "create", strings[0].decode()
    elif name.startswith("rename"):
        yield "rename", strings[0].decode(), strings[1].decode()
    elif name.startswith("unlink"):
        yield "unlink", strings[0].decode()


def decoded(path: str) -> str:
    """A path as `strace -y -xx` prints it."""
    return bytes.fromhex(path.replace("\\x", "")).decode() if path.startswith("\\x") else path


class Inode:
    """A file: what of it is on the disk for sure, and what was done since."""

    def __init__(self) -> None:
        self.sure = bytearray()
        self.later: list[tuple[bytes, int] | int] = []  # writes, and truncations
        self.size = 0

    def do(self, what: tuple[bytes, int] | int) -> None:
        self.later.append(what)
        self.size = what if isinstance(what, int) else max(self.size, what[1] + len(what[0]))

    def sync(self) -> None:
        for what in self.later:
            put(self.sure, what)
        self.later.clear()

    def image(self, chance: random.Random, variant: int) -> bytes:
        """What may be there: variant 0 what is sure, 1 everything, else anything between."""
        image = bytearray(self.sure)
        for what in self.later if variant else ():
            luck = chance.random()
            if variant == 1 or luck < 0.4:
                put(image, what)
            elif luck < 0.7 and not isinstance(what, int):
                tear(image, what, chance)
        return bytes(image)


def put(image: bytearray, what: tuple[bytes, int] | int) -> None:
    """Write or truncate."""
    if isinstance(what, int):
        del image[what:]
        image.extend(bytes(what - len(image)))
        return
    data, offset = what
    image.extend(bytes(max(0, offset - len(image))))
    image[offset : offset + len(data)] = data


def tear(image: bytearray, what: tuple[bytes, int], chance: random.Random) -> None:
    """Write some of the sectors."""
    data, offset = what
    for at in range(0, len(data), SECTOR):
        if chance.random() < 0.5:
            put(image, (data[at : at + SECTOR], offset + at))


class Disk:
    """Files and their names below a folder, at one moment of a trace."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.names: dict[str, Inode] = {}  # as the program sees them
        self.sure: dict[str, Inode] = {}  # as they are on the disk
        self.later: list[tuple[str, Inode | None]] = []  # names given (or taken) since, in order
        self.acked: set[int] = set()

    def do(self, what: str, path, *more) -> None:
        """Play one operation."""
        if what == "ack":
            self.acked.add(path)
        elif not path.startswith(self.root) or path.endswith("-shm"):
            return
        elif what in {"write", "append", "truncate"} and path in self.names:
            self.change(self.names[path], what, *more)
        elif what == "create" and path not in self.names:
            self.name(path, Inode())
        elif what == "sync":
            self.sync(path)
        elif what == "rename":
            self.name(more[0], self.names[path])
            self.name(path, None)
        elif what == "unlink":
            self.name(path, None)

    def change(self, inode: Inode, what: str, *more) -> None:
        if what == "append":
            inode.do((more[0], inode.size))
        else:
            inode.do(more[0] if what == "truncate" else more)

    def name(self, path: str, inode: Inode | None) -> None:
        self.later.append((path, inode))
        if inode is None:
            self.names.pop(path, None)
        else:
            self.names[path] = inode

    def sync(self, path: str) -> None:
        """A file's bytes and its first name, or the names in a folder, are there for sure now."""
        inode = self.names.get(path)
        if inode is not None:
            inode.sync()
        kept = []
        for name, given in self.later:
            first = given is not None and given is inode and inode not in self.sure.values()
            if first or (inode is None and str(Path(name).parent) == path):
                self.settle(self.sure, name, given)
            else:
                kept.append((name, given))
        self.later = kept

    @staticmethod
    def settle(names: dict[str, Inode], name: str, inode: Inode | None) -> None:
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode

    def image(self, chance: random.Random, variant: int) -> dict[str, bytes]:
        """The files that may be there, by name below the root."""
        names = dict(self.sure)
        many = {0: 0, 1: len(self.later)}.get(variant, chance.randint(0, len(self.later)))
        for name, inode in self.later[:many]:
            self.settle(names, name, inode)
        return {name[len(self.root) + 1 :]: inode.image(chance, variant) for name, inode in names.items()}


def states(
    trace: Sequence[tuple], root: str, count: int, seed: int, variants: int = 4
) -> Iterator[tuple[dict[str, bytes], set[int]]]:
    """Crash states at random moments: the files, and what had been acknowledged."""
    chance = random.Random(seed)
    disk = Disk(root)
    done = 0
    for cut in sorted(chance.choices(range(1, len(trace) + 1), k=count // variants)):
        for one in trace[done:cut]:
            disk.do(*one)
        done = cut
        for variant in range(variants):
            yield disk.image(chance, variant), set(disk.acked)
