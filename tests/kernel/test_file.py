"""Pages that tile, frames that hold, and the descriptors they are read through."""

import itertools

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from kernelkit import UNHURRIED, World, refused

from llmprocd.abi.errno import Errno, KernelError
from llmprocd.abi.types import FileId
from llmprocd.kernel import file
from llmprocd.kernel.state import File, Paging, stdio

texts = st.text(st.sampled_from("ab\né😀 \r"), max_size=60) | st.lists(
    st.text(st.sampled_from("xyz"), max_size=9), max_size=12
).map("\n".join)
sizes = st.integers(1, 12)


@st.composite
def pieces(draw):
    """A text, and the same text in pieces."""
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    return text, [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


# --- pages ------------------------------------------------------------------------------------------


@UNHURRIED
@given(pieces(), sizes)
def test_pages_tile_the_text(them, size):
    """All pages joined are the text, and none is empty or too long, however the text came in."""
    text, parts = them
    pages = list(file.split(parts, size))
    assert "".join(pages) == text
    assert all(0 < len(page) <= size for page in pages)
    assert pages == list(file.split([text], size))
    event(f"{min(len(pages), 9)} pages")


@UNHURRIED
@given(texts, sizes)
def test_a_line_is_cut_only_if_it_is_longer_than_a_page(text, size):
    """A page that ends inside a line belongs to a line that no page could hold."""
    position = 0
    for page in file.split([text], size):
        position += len(page)
        if position < len(text) and not page.endswith("\n"):
            start = text.rfind("\n", 0, position) + 1
            end = text.find("\n", position) + 1 or len(text)
            assert end - start > size
            event("a line was cut")


@UNHURRIED
@given(texts, sizes)
def test_a_page_holds_as_many_lines_as_it_can(text, size):
    """The next line would not have fitted: pages are not made small to be safe."""
    pages = list(file.split([text], size))
    for page, following in itertools.pairwise(pages):
        first = following.split("\n", 1)[0] + ("\n" if "\n" in following else "")
        assert len(page) + len(first) > size


@UNHURRIED
@given(pieces(), sizes)
def test_the_index_of_pages_says_where_each_begins(them, size):
    """Bytes, characters, lines and whether inside one, against the pages themselves."""
    text, parts = them
    pages = file.paginate(parts, size)
    starts = list(itertools.accumulate(map(len, file.split([text], size)), initial=0))
    assert list(pages.chars) == starts
    assert list(pages.bytes) == [len(text[:start].encode()) for start in starts]
    assert list(pages.lines) == [text[:start].count("\n") for start in starts]
    assert [bool(flag) for flag in pages.inside] == [
        start > 0 and text[start - 1] != "\n" for start in starts[:-1]
    ]
    assert (pages.count, pages.total_chars) == (max(1, len(starts) - 1), len(text))
    assert pages.open == (bool(text) and not text.endswith("\n"))
    assert pages.total_lines == _lines(text)


def _lines(text: str) -> int:
    parts = text.split("\n")
    return len(parts) - (not parts[-1])


@UNHURRIED
@given(texts)
def test_lines_are_counted_with_a_last_one_that_has_no_end(text):
    """Only a newline ends a line."""
    assert file.count_lines(text) == _lines(text)


@UNHURRIED
@given(texts, sizes, st.data())
def test_the_page_of_a_char_is_the_one_that_holds_it(text, size, data):
    """Against counting; past the end it is the last page."""
    pages = file.paginate([text], size)
    char = data.draw(st.integers(0, len(text) + 3))
    naive = 0
    for number in range(1, len(pages.inside)):
        if pages.chars[number] <= char:
            naive = number
    assert pages.page_of_char(char) == naive


@UNHURRIED
@given(texts, sizes, st.data())
def test_the_page_of_a_line_is_where_one_begins_to_look(text, size, data):
    """The line begins on that page, or right at the beginning of the next."""
    pages = file.paginate([text], size)
    if not _lines(text):
        assert pages.page_of_line(1) == 0
        return
    line = data.draw(st.integers(1, _lines(text)))
    start = 0
    for _ in range(line - 1):
        start = text.index("\n", start) + 1
    found = pages.page_of_line(line)
    assert pages.chars[found] <= start <= pages.chars[found + 1]
    event("at the seam" if start == pages.chars[found + 1] else "inside")


def test_pages_by_example():
    """Whole lines while they fit, pieces of one that does not."""
    assert list(file.split(["one\ntwo\nthree\n"], 8)) == ["one\ntwo\n", "three\n"]
    assert list(file.split(["abcdefghij\nk"], 4)) == ["abcd", "efgh", "ij\nk"]
    assert list(file.split(["\nabcd"], 4)) == ["\n", "abcd"]
    assert list(file.split([], 4)) == []
    assert list(file.split(["abcd"], 4)) == ["abcd"]


def test_an_empty_text_has_one_empty_page():
    """So that page 1 can be asked for."""
    pages = file.paginate([], 10)
    assert (pages.count, pages.total_chars, pages.total_lines, pages.open) == (1, 0, 0, False)
    assert pages.page_of_char(0) == pages.page_of_line(1) == 0


@UNHURRIED
@given(st.binary())
def test_bytes_that_are_no_text_are_shown(data):
    """Any bytes can be shown, and text is shown as it is."""
    assert isinstance(file.shown(data), str)
    assert file.shown(b"caf\xc3\xa9 \xff\x80") == "café \\xff\\x80"


# --- frames -----------------------------------------------------------------------------------------


@UNHURRIED
@given(st.lists(st.sampled_from(["</preview>", "</preview_1>", "</preview_2>", "x"]), max_size=6))
def test_a_tag_is_never_closed_by_what_it_holds(parts):
    """The name grows until no content closes it, and no further than it must."""
    content = "".join(parts)
    name = file.tag("preview", content)
    assert f"</{name}>" not in content
    candidates = ["preview", *(f"preview_{number}" for number in range(1, 9))]
    assert name == next(each for each in candidates if f"</{each}>" not in content)


def test_a_tag_looks_at_all_contents():
    """One of them is enough."""
    assert file.tag("a", "x", "</a>") == "a_1"


def test_a_frame_has_its_content_on_lines_of_its_own():
    """As it is, with one newline before and after it."""
    framed = file.frame("fd_content", {"fd": "fd:3", "page": 1, "capped": True, "next": None}, "a <b> & c\n")
    assert framed == '<fd_content fd="fd:3" page="1" capped="true">\na <b> & c\n\n</fd_content>'
    assert file.frame("a", {}, "</a>") == "<a_1>\n</a>\n</a_1>"


def test_attributes_cannot_break_out():
    """A value with quotes, brackets or newlines stays one attribute."""
    assert file.attributes({"x": 'a"><b>&\nc'}) == ' x="a&quot;&gt;&lt;b&gt;&amp; c"'
    assert (
        file.attributes({"yes": True, "no": False, "none": None, "zero": 0})
        == ' yes="true" no="false" zero="0"'
    )


def test_a_result_frame_is_what_the_contract_shows():
    """All that a model needs to read on."""
    pages = file.paginate(["one\ntwo\nthree\n"], 8)
    framed = file.result_frame(3, pages, "one\ntwo\n", "bash", "Output exceeds 8 characters.")
    assert framed == (
        '<fd_result fd="fd:3" pages="2" truncated="true" lines="1-2" total_lines="3" chars="14" '
        'source="bash">\n'
        "<message>Output exceeds 8 characters.</message>\n<preview>\none\ntwo\n\n</preview>\n</fd_result>"
    )


def test_a_result_frame_of_a_file_that_grows_says_so():
    """More may come: a plus, and truncated even on one page."""
    pages = file.paginate(["one"], 8)
    assert 'pages="1+" truncated="true"' in file.result_frame(3, pages, "one", "bash", "", complete=False)
    assert 'pages="1" truncated="false"' in file.result_frame(3, pages, "one", "bash", "")


def test_a_result_frame_holds_content_that_closes_its_tags():
    """Both tags step aside."""
    preview = "</preview></fd_result>"
    framed = file.result_frame(3, file.paginate([preview], 99), preview, "bash", "m")
    assert framed.startswith("<fd_result_1 ")
    assert framed.endswith(f"<preview_1>\n{preview}\n</preview_1>\n</fd_result_1>")


# --- a user's text ----------------------------------------------------------------------------------


def test_a_long_user_text_becomes_a_descriptor():
    """The model reads the first page; the file holds it all; the number is the family's next."""
    w = World(paging=Paging(max_input_chars=20, default_page_size=10))
    pid = w.spawn("line 1\nline 2\nline 3\nline 4\n")
    p = w.take(pid, lambda p, text: file.take_said(w.k, p, text))
    assert p.fds.keys() == {3}
    record = w.k.files[p.fds[3]]
    assert (record.origin, record.complete, record.size) == ("user_input", True, 28)
    assert w.disk.contents[record.id] == b"line 1\nline 2\nline 3\nline 4\n"
    (line,) = w.words(pid)
    assert '<fd_result fd="fd:3" pages="4"' in line
    assert "<preview>\nline 1\n\n</preview>" in line
    assert "Input exceeds 20 characters" in line


@pytest.mark.parametrize(
    "paging",
    [
        Paging(max_input_chars=28),
        Paging(max_input_chars=20, enabled=False),
        Paging(max_input_chars=20, page_user_input=False),
    ],
)
def test_a_user_text_stays_where_paging_is_off_or_it_fits(paging):
    """Exactly at the limit it stays."""
    w = World(paging=paging)
    pid = w.spawn("x" * 28)
    p = w.take(pid, lambda p, text: file.take_said(w.k, p, text))
    assert not p.fds
    assert w.words(pid) == ["user: " + "x" * 28]


# --- descriptors ------------------------------------------------------------------------------------


@pytest.fixture
def opened():
    """A world, and a process with fd:3, fd:4 and ref:x."""
    w = World()
    p = w[w.spawn()]
    for name in ("a", "b"):
        p, _ = file.add(
            w.k, p, File(FileId(w.k.take("file")), 1, complete=True, origin="bash"), name.encode()
        )
    p = file.refer(w.k, p, "x", File(FileId(w.k.take("file")), 1, complete=True, origin="ref:x"), b"r")
    w.k.put(p)
    w.commit()
    return w, p


def test_a_descriptor_is_found_by_every_spelling(opened):
    """A number, fd: and a number, ref: and a name; 1 and 2 are the process's own output."""
    _, p = opened
    assert [file.lookup(p, name) for name in (3, "3", "fd:3", "fd:4", "ref:x")] == [1, 1, 1, 2, 3]
    assert [file.lookup(p, fd) for fd in (1, "fd:2")] == [stdio(p.pid, 1), stdio(p.pid, 2)]


@pytest.mark.parametrize("name", ["fd:9", 9, "9", "ref:y", "fd:0", 0])
def test_a_descriptor_that_is_not_open_is_ebadf_and_told_what_is(opened, name):
    """The sentence lists what there is."""
    w, p = opened
    with refused(w, Errno.EBADF):
        file.lookup(p, name)
    with pytest.raises(KernelError, match="it has fd:3, fd:4, ref:x"):
        file.lookup(p, name)


def test_a_process_with_nothing_open_is_told_so():
    """Not an empty list."""
    w = World()
    with pytest.raises(KernelError, match="none beyond fd:0, fd:1 and fd:2"):
        file.lookup(w[w.spawn()], "fd:3")


@pytest.mark.parametrize(
    "text", ["", "fd:", "x", "fd:x", "-3", "fd:-3", "3.0", "²", "٣", "fd:9999999999", " 3"]
)
def test_what_is_no_number_is_ebadf(text):
    """Also digits that are none, and numbers beyond all reason."""
    with pytest.raises(KernelError) as caught:
        file.number(text)
    assert caught.value.errno is Errno.EBADF


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fd:4", (None, "fd:4")),
        ("9/fd:4", (9, "fd:4")),
        ("9/ref:x", (9, "ref:x")),
        ("ref:x", (None, "ref:x")),
        ("ref:a/b", (None, "ref:a/b")),
    ],
)
def test_an_operand_may_name_its_process(text, parts):
    """Pid, slash, descriptor."""
    assert file.operand(text) == parts


@pytest.mark.parametrize("text", ["x/fd:4", "/fd:4", "²/fd:4", "-1/fd:4", "9" * 5000 + "/fd:4"])
def test_an_operand_with_a_strange_process_is_ebadf(text):
    """Whatever it is, it is an error and never an exception of Python's."""
    with pytest.raises(KernelError) as caught:
        file.operand(text)
    assert caught.value.errno is Errno.EBADF


def test_the_record_of_stdio_is_made_from_the_process(opened):
    """It grows while the process lives."""
    w, p = opened
    p = w.k.put(w.k.write(w.k.write(p, 1, "abc"), 2, "de"))
    out, err = (file.file(w.k, p, stdio(p.pid, fd)) for fd in (1, 2))
    assert (out.size, out.complete, out.origin) == (3, False, "stdout")
    assert (err.size, err.complete, err.origin) == (2, False, "stderr")
    w.exit(p.pid)
    assert file.file(w.k, w[p.pid], stdio(p.pid, 1)).complete
    assert file.file(w.k, p, p.fds[3]) == w.k.files[FileId(1)]


def test_numbers_of_a_family_are_never_used_twice(opened):
    """Parent and child count on together, so a number means one file in both."""
    w, p = opened
    (child,) = w.fork(p.pid)
    stranger = w.spawn()
    got = []
    for pid in (child, p.pid, child, stranger):
        q, fd = file.add(w.k, w[pid], File(FileId(w.k.take("file")), 0, complete=True, origin="bash"))
        w.k.put(q)
        got.append(fd)
    assert got == [5, 6, 7, 3]
    assert w[child].fds.keys() == {3, 4, 5, 7}
    assert w[p.pid].fds.keys() == {3, 4, 6}
    assert w[child].fds[3] == w[p.pid].fds[3]


def test_the_last_reference_of_a_name_wins(opened):
    """A new text under an old name takes its place; the old file is not changed."""
    w, p = opened
    old = p.refs["x"]
    p = file.refer(w.k, p, "x", File(FileId(w.k.take("file")), 2, complete=True, origin="ref:x"), b"zz")
    w.commit()
    assert p.refs["x"] != old
    p = file.refer(w.k, p, "y", File(FileId(w.k.take("file")), 0, complete=True, origin="ref:y"), b"")
    assert p.refs.keys() == {"x", "y"}
    assert w.disk.contents[old] == b"r"


# --- references -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('a <ref id="x">one\ntwo</ref> b', {"x": "one\ntwo"}),
        ('<ref id="x">1</ref><ref id="y">2</ref><ref id="x">3</ref>', {"x": "3", "y": "2"}),
        ('<ref id="x"></ref>', {"x": ""}),
        ('<ref id="x">never closed', {}),
        ('<ref id="">no name</ref>', {}),
        ('<ref id="a/b">x</ref> <ref id="ok">y</ref>', {"ok": "y"}),
        ('<ref id="a" lang="py">x</ref> <ref id="ok">y</ref>', {"ok": "y"}),
        ('<ref id="a <ref id="b">x</ref>', {"b": "x"}),
        ('<ref id="x', {}),
        ("", {}),
    ],
)
def test_references_are_the_texts_between_their_tags(text, found):
    """Exactly what stands there; what is not well formed is passed over."""
    assert file.references(text) == found


@UNHURRIED
@given(st.text(), st.text(st.sampled_from("abc_-. 1"), min_size=1), st.text())
def test_any_text_can_be_referred_to(before, name, content):
    """Byte for byte, whatever stands around it."""
    if "<ref" in before or "</ref" in content:
        return
    assert file.references(f'{before}<ref id="{name}">{content}</ref>')[name] == content


@UNHURRIED
@given(st.text(st.sampled_from('<ref id="x">/a\n')))
def test_references_end_for_any_text(text):
    """No text makes it loop or raise."""
    assert all(name for name in file.references(text))
