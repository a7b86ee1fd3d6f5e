"""The file tools: exact bytes, whole writes, and no waiting for what is no file."""

import os
import stat
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import trio

from llmprocd.tools import fs, shell
from llmprocd.tools.output import ToolContext, ToolError
from llmprocd.tools.spawner import Spawner


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The cwd of the process."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def still(work: Path) -> ToolContext:
    """A context for tools that start nothing."""
    (work.parent / "spool").mkdir()
    names = iter(range(1000))
    return ToolContext(7, str(work), {}, None, lambda: str(work.parent / "spool" / str(next(names))))


@pytest.fixture
async def ctx(nursery: trio.Nursery, still: ToolContext) -> AsyncIterator[ToolContext]:
    """A context for tools that start a process."""
    made = Spawner.fork()
    await nursery.start(made.run)
    yield ToolContext(still.pid, still.cwd, still.env, made, still.spool)
    nursery.cancel_scope.cancel()


def spooled(ctx: ToolContext) -> list[Path]:
    return list((Path(ctx.cwd).parent / "spool").iterdir())


async def test_a_short_text_is_read_as_text(still, work):
    """Relative to the cwd or absolute, to the last byte."""
    (work / "a").write_bytes(b"one\r\ntwo")
    for path in ("a", str(work / "a"), "../work/./a"):
        assert (await fs.read_file(still, file_path=path)).text == "one\r\ntwo"
    assert not spooled(still)


@pytest.mark.parametrize("data", [b"x" * 100_000, b"\xff\xfe", b"caf\xc3"])
async def test_what_is_long_or_no_text_is_copied(still, work, data):
    """The spool file holds exactly the file, and is another one."""
    (work / "a").write_bytes(data)
    answer = await fs.read_file(still, file_path="a")
    (work / "a").write_bytes(b"changed")
    assert answer.text == ""
    assert Path(answer.spool).read_bytes() == data


async def test_what_cannot_be_read_is_named(still, work):
    """Missing files, folders, FIFOs, devices and names that are none: a sentence, at once."""
    os.mkfifo(work / "fifo")
    (work / "loop").symlink_to("loop")
    for path, text in [
        ("nope", f"File not found: {work}/nope"),
        (".", "Is a directory"),
        ("fifo", "Not a regular file"),
        ("/dev/zero", "Not a regular file"),
        ("loop", "symbolic links"),
        ("a\0b", "NUL"),
        ("x" * 300, "name too long"),
    ]:
        with pytest.raises(ToolError, match=text), trio.fail_after(20):
            await fs.read_file(still, file_path=path)
    assert not spooled(still)


async def test_permission_is_asked_of_the_system(still, work):
    """What the system refuses, the tool refuses in the same words."""
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (work / "a").touch(0o000)
    with pytest.raises(ToolError, match="Permission denied"):
        await fs.read_file(still, file_path="a")


@pytest.mark.parametrize("path", ["/proc/self/environ", "/proc/{pid}/maps", "/proc/thread-self/environ"])
async def test_the_daemons_own_process_files_are_refused(still, work, path):
    """The file tools run in the daemon, whose environment and memory are not the model's to read."""
    path = path.format(pid=os.getpid())
    (work / "link").symlink_to(path)
    for name in (path, "link"):
        with pytest.raises(ToolError, match="Permission denied"):
            await fs.read_file(still, file_path=name)
    assert (await fs.read_file(still, file_path="/proc/version")).text.startswith("Linux")


async def test_a_cancelled_read_leaves_no_spool(still, work):
    """Half a copy is removed, also when nobody waits for it any more."""
    with (work / "big").open("wb") as file:
        file.truncate(64 << 30)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(fs.read_file, still, file_path="big"))
        with trio.fail_after(20):
            while not spooled(still):
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    with trio.fail_after(20):
        while spooled(still):
            await trio.sleep(0.01)


async def test_a_folder_is_listed(still, work):
    """Folders first, hidden names only if asked for."""
    (work / "sub").mkdir()
    (work / "b").write_bytes(b"x" * 1229)
    (work / ".h").touch()
    (work / "dead").symlink_to("nowhere")
    (work / "loop").symlink_to("loop")
    os.utime(work / "b", (0, 0))
    listing = (await fs.list_dir(still)).text
    assert listing == f"Contents of '{work}':\nd sub\nf b\nf dead\nf loop"
    assert "f .h" in (await fs.list_dir(still, show_hidden=True)).text
    detailed = (await fs.list_dir(still, directory_path=str(work), detailed=True)).text
    assert "\nf b (Size: 1.2 KB, Modified: 19" in detailed
    assert "f dead (Size:" in detailed
    assert "f loop (Size:" in detailed


async def test_a_folder_that_is_none_is_named(still, work):
    """No folder, a file, an empty folder: three answers."""
    (work / "empty").mkdir()
    (work / "file").touch()
    assert (await fs.list_dir(still, directory_path="empty")).text == f"Directory '{work}/empty' is empty."
    with pytest.raises(ToolError, match=f"Directory not found: {work}/nope"):
        await fs.list_dir(still, directory_path="nope")
    with pytest.raises(ToolError, match=f"Path is not a directory: {work}/file"):
        await fs.list_dir(still, directory_path="file")


async def test_names_that_are_no_text_are_listed_as_bytes(still, work):
    """A file name is bytes; nothing of it is lost."""
    Path(os.fsdecode(bytes(work) + b"/\xff")).touch()
    assert Path((await fs.list_dir(still)).spool).read_bytes().endswith(b"\nf \xff")


async def test_a_file_is_written_and_its_folders_made(still, work):
    """What was asked for is there, exactly, and nothing else is."""
    answer = await fs.write_file(still, file_path="a/b/c", content="ä\n")
    assert (work / "a/b/c").read_bytes() == "ä\n".encode()
    assert answer.text == f"Wrote 3 bytes to {work}/a/b/c"
    assert [path.name for path in (work / "a/b").iterdir()] == ["c"]


async def test_an_overwritten_file_keeps_its_mode_and_its_links(still, work):
    """A script stays executable, and a link stays a link to the file that was written."""
    (work / "script").touch(0o755)
    (work / "link").symlink_to("script")
    await fs.write_file(still, file_path="link", content="new")
    assert (work / "link").is_symlink()
    assert (work / "script").read_text() == "new"
    assert stat.S_IMODE((work / "script").stat().st_mode) == 0o755


async def test_a_reader_sees_the_old_or_the_new(still, work):
    """A file is replaced, never emptied first."""
    (work / "a").write_text("old")
    with (work / "a").open() as reader:
        await fs.write_file(still, file_path="a", content="new")
        assert reader.read() == "old"
    assert (work / "a").read_text() == "new"


@pytest.mark.parametrize(
    ("path", "content", "text"),
    [
        (".", "x", "Is a directory"),
        ("fifo", "x", "Not a regular file"),
        ("/dev/null", "x", "Not a regular file"),
        ("file/below", "x", "Not a directory: .*/file/below"),
        ("a", "\ud800", "content: character 0"),
    ],
)
async def test_what_cannot_be_written_is_named(still, work, path, content, text):
    """A refused write leaves nothing behind."""
    os.mkfifo(work / "fifo")
    (work / "file").touch()
    with pytest.raises(ToolError, match=text):
        await fs.write_file(still, file_path=path, content=content)
    assert sorted(path.name for path in work.iterdir()) == ["fifo", "file"]


async def test_an_edit_replaces_what_is_there_once(still, work):
    """Only that, and bytes that are no text stay what they are."""
    (work / "a").write_bytes(b"\xff one\r\ntwo")
    answer = await fs.edit_file(still, file_path="a", old_text="one", new_text="drei")
    assert (work / "a").read_bytes() == b"\xff drei\r\ntwo"
    assert answer.text == f"Replaced 1 occurrence in {work}/a"


async def test_an_edit_that_is_not_unique_says_how_often(still, work):
    """Zero, two, or overlapping: the file is left alone, unless all were meant."""
    (work / "a").write_text("x x aaa")
    for old, text in [("y", "not found"), ("x", "2 times"), ("aa", "2 times"), ("", "empty"), ("z", "same")]:
        with pytest.raises(ToolError, match=text):
            await fs.edit_file(still, file_path="a", old_text=old, new_text="z")
    assert (work / "a").read_text() == "x x aaa"
    answer = await fs.edit_file(still, file_path="a", old_text="x", new_text="y", replace_all=True)
    assert (work / "a").read_text() == "y y aaa"
    assert answer.text == f"Replaced 2 occurrences in {work}/a"


async def test_edits_of_one_file_side_by_side_are_all_made(still, work):
    """The model may ask for several edits in one turn; none undoes another."""
    (work / "a").write_text("".join(f"<{number}>" for number in range(30)))
    async with trio.open_nursery() as nursery:
        for number in range(30):

            async def edit(number: int = number) -> None:
                await fs.edit_file(still, file_path="a", old_text=f"<{number}>", new_text=f"({number})")

            nursery.start_soon(edit)
    assert (work / "a").read_text() == "".join(f"({number})" for number in range(30))


async def test_an_edit_needs_a_file(still, work):
    """A file that is missing is not made."""
    with pytest.raises(ToolError, match="File not found"):
        await fs.edit_file(still, file_path="a", old_text="a", new_text="b")
    assert not list(work.iterdir())


@pytest.fixture
def tree(work: Path) -> Path:
    """A small project."""
    for name, text in {
        "a.py": "import os\nx = 1\n",
        "src/b.py": "x = 22\ny\n",
        "src/deep/c.txt": "x = 333",
        ".hidden.py": "x = 4\n",
        ".git/d.py": "x = 5\n",
        "bin.py": "x = 6\0",
    }.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)
    os.mkfifo(work / "fifo")
    return work


@pytest.mark.parametrize(
    ("pattern", "path", "names"),
    [
        ("*.py", ".", ["a.py", "bin.py"]),
        ("**/*.py", ".", ["a.py", "bin.py", "src/b.py"]),
        ("src/*", ".", ["src/b.py", "src/deep/"]),
        ("*.py", "src", ["src/b.py"]),
    ],
)
@pytest.mark.usefixtures("tree")
async def test_glob_finds_names(ctx, pattern, path, names):
    """As the shell does, with ** for any depth; folders end with a slash."""
    assert (await fs.glob(ctx, pattern=pattern, path=path)).text.split() == names


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/b.py", ["src/b.py"]),
        ("src/**", ["src/", "src/b.py", "src/deep/", "src/deep/c.txt", "src/up/"]),
        ("src/**/deep/*", ["src/deep/c.txt"]),
        ("**/**/b.py", ["src/b.py"]),
        ("**/", ["here/", "src/", "src/deep/", "src/up/"]),
        ("src/up/*.py", ["src/up/a.py", "src/up/bin.py"]),
        ("src/up/**/b.py", ["src/up/src/b.py"]),
        ("../work/**/c.txt", ["../work/src/deep/c.txt"]),
    ],
)
async def test_glob_follows_no_links_downwards(ctx, tree, pattern, names):
    """Two links to a folder above are a tree without end; a link that the pattern names is followed."""
    (tree / "here").symlink_to(".")
    (tree / "src/up").symlink_to("..")
    assert (await fs.glob(ctx, pattern=pattern)).text.split() == names


async def test_glob_takes_absolute_patterns(ctx, tree):
    """With ** too."""
    assert (await fs.glob(ctx, pattern=f"{tree}/**/b.*")).text == f"{tree}/src/b.py\n"


async def test_glob_answers_in_the_terms_it_was_asked(ctx, tree):
    """An absolute path gives absolute names; nothing found is said."""
    assert (await fs.glob(ctx, pattern="b.*", path=str(tree / "src"))).text == f"{tree}/src/b.py\n"
    assert (await fs.glob(ctx, pattern="*.rs")).text == "Nothing matches '*.rs' in ."


@pytest.mark.usefixtures("tree")
async def test_grep_finds_lines(ctx):
    """Text files only, no version control, no FIFO; in a stable order."""
    answer = await fs.grep(ctx, pattern=r"^x = \d+")
    assert answer.text == ".hidden.py:1:x = 4\na.py:2:x = 1\nsrc/b.py:1:x = 22\nsrc/deep/c.txt:1:x = 333\n"
    assert not spooled(ctx)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"path": "src"}, "src/b.py:1:x = 22\nsrc/deep/c.txt:1:x = 333\n"),
        ({"path": "a.py"}, "a.py:2:x = 1\n"),
        ({"path": "bin.py"}, "bin.py:1:x = 6\0\n"),
        ({"glob": "*.txt"}, "src/deep/c.txt:1:x = 333\n"),
        ({"glob": "src/*.py"}, "src/b.py:1:x = 22\n"),
        ({"max_matches": 1}, ".hidden.py:1:x = 4\n[stopped after 1 matches]\n"),
        ({"pattern": "nope"}, "No line matches 'nope' in ."),
    ],
)
@pytest.mark.usefixtures("tree")
async def test_grep_can_be_narrowed(ctx, args, text):
    """By path, by name and by number."""
    assert (await fs.grep(ctx, **{"pattern": "x ="} | args)).text == text


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"pattern": "("}, "pattern: "),
        ({"path": "nope"}, "No such file"),
        ({"path": "fifo"}, "Not a regular file: fifo"),
        ({"max_matches": 0}, "max_matches"),
    ],
)
@pytest.mark.usefixtures("tree")
async def test_grep_refuses_nonsense(ctx, args, text):
    """A bad pattern and a missing path are errors, not empty answers."""
    with pytest.raises(ToolError, match=text):
        await fs.grep(ctx, **{"pattern": "x"} | args)
    assert not spooled(ctx)


async def test_grep_cuts_lines_that_are_very_long(ctx, work):
    """One line of a minified file is not a whole answer."""
    (work / "min.js").write_text("x" * 3_000_000 + "\nfind me x\n")
    lines = (await fs.grep(ctx, pattern="x$")).text.splitlines()
    assert len(lines[0]) < 1100
    assert lines[-1] == "min.js:2:find me x"


async def test_an_exponential_pattern_can_be_stopped(ctx, work):
    """It burns its own process, not the daemon's thread, and is gone when the call is cancelled."""
    (work / "a").write_text("a" * 60 + "!")
    with trio.move_on_after(0.5) as limit:
        await fs.grep(ctx, pattern="(a|a)*$")
    assert limit.cancelled_caught
    assert not ctx.spawner._running


def test_every_tool_is_described_by_its_schema():
    """Its properties are the keywords of the function; those without a default are required."""
    for spec in (*fs.SPECS, *shell.SPECS):
        keywords = spec.run.__annotations__.keys() - {"ctx", "return"}
        assert spec.input_schema["properties"].keys() == keywords
        defaults = spec.run.__kwdefaults__ or {}
        assert set(spec.input_schema["required"]) == keywords - defaults.keys()
        properties = spec.input_schema["properties"].items()
        shown = {key: about["default"] for key, about in properties if "default" in about}
        assert shown == defaults
