"""One line a record, whatever was logged, and no key in it."""

import io
import logging
import re
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmprocd import log

KEY = "sk-ant-secret-0123456789"
LINE = re.compile(r'time=\S+ level=info logger=llmprocd msg=(?:[^\s"=]+|"(?:[^"\\]|\\.)*")', re.ASCII)


def record(text, *args, level=logging.INFO, exc_info=None, name="llmprocd"):
    return logging.LogRecord(name, level, __file__, 1, text, args, exc_info)


def line(text, *args, secrets=(KEY,), journal=False, **more):
    return log.Formatter(list(secrets), journal=journal).format(record(text, *args, **more))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ready", "msg=ready"),
        ("two words", 'msg="two words"'),
        ("", 'msg=""'),
        ("a=b", 'msg="a=b"'),
        ('say "hi"', r'msg="say \"hi\""'),
        ("back\\slash", r'msg="back\\slash"'),
        ("two\nlines", r'msg="two\nlines"'),
        ("forged\ntime=now level=error", r'msg="forged\ntime=now level=error"'),
        ("\x1b[31mred", r'msg="\x1b[31mred"'),
        ("cr\rback", r'msg="cr\rback"'),
        ("\u202eleft", r'msg="\u202eleft"'),
        ("line\u2028sep", r'msg="line\u2028sep"'),
        ("half \ud800", r'msg="half \ud800"'),
        ("käse", "msg=käse"),
    ],
)
def test_a_value_is_one_word_or_quoted(text, said):
    assert line("%s", text).endswith(said)


def test_a_line_names_time_level_logger_and_message():
    made = record("ready %d", 3, level=logging.WARNING)
    made.created = 0.0
    said = log.Formatter([], journal=False).format(made)
    assert said == 'time=1970-01-01T00:00:00Z level=warning logger=llmprocd msg="ready 3"'


@pytest.mark.parametrize(
    ("level", "priority"),
    [("debug", 7), ("info", 6), ("warning", 4), ("error", 3), ("critical", 2)],
)
def test_the_journal_gets_the_priority_and_keeps_the_time_itself(level, priority):
    said = line("x", journal=True, level=logging.getLevelName(level.upper()))
    assert said == f"<{priority}>level={level} logger=llmprocd msg=x"


@given(st.text())
def test_any_text_is_one_line_of_printable_characters(text):
    said = line("%s", text, secrets=())
    assert said.isprintable()
    assert len(said.splitlines()) == 1
    assert re.fullmatch(LINE.pattern, said) or not said.isascii()


@given(st.text(alphabet='ab\\"\n =\x00é', max_size=12))
def test_what_is_quoted_can_be_read_back(text):
    quoted = log.quoted(text)
    if quoted.startswith('"'):
        inside = quoted[1:-1].replace("é", "\\xe9")
        assert inside.encode().decode("unicode_escape") == text
    else:
        assert quoted == text


def test_a_traceback_is_one_line_too():
    try:
        int(f"no {KEY}\nhere", base=10)
    except ValueError:
        said = line("it broke", exc_info=sys.exc_info())
    assert "\n" not in said
    assert r"it broke\nTraceback" in said
    assert "***" in said
    assert KEY not in said


@pytest.mark.parametrize(
    "text", [KEY, f"Bearer {KEY}", f'{{"key":"{KEY}"}}', f"{KEY}{KEY}", f"http://user:{KEY}@host/"]
)
def test_no_key_is_in_a_line(text):
    said = line("%s", text)
    assert KEY not in said
    assert "***" in said


def test_a_key_that_would_be_escaped_is_redacted_first():
    secret = 'a"key with\\odd=signs'
    assert line("<%s>", secret, secrets=[secret]).endswith("msg=<***>")


def test_a_key_is_redacted_without_the_newline_that_its_file_ended_in():
    """What is sent is the stripped key, so that is what an error can repeat."""
    assert KEY not in line("got %s", KEY, secrets=[f"{KEY}\n"])


def test_the_longer_of_two_keys_goes_whole():
    """One key may begin like another: nothing of the longer one may be left."""
    said = line("%s", "sk-1234-5678", secrets=["sk-1234", "sk-1234-5678"])
    assert said.endswith("msg=***")


def test_an_empty_key_redacts_nothing():
    assert line("ready", secrets=["", " \n"]).endswith("msg=ready")


@pytest.fixture
def root():
    """The root logger, put back as it was."""
    logger = logging.getLogger()
    kept = logger.handlers[:], logger.level
    yield logger
    logger.handlers[:], level = kept
    logger.setLevel(level)


def test_start_logs_to_stderr_at_its_level_and_keeps_libraries_quiet(root, monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    log.start("info", [KEY], journal=False)
    logging.getLogger("llmprocd").debug("not this")
    logging.getLogger("llmprocd").info("this %s", KEY)
    logging.getLogger("httpx2").info("nor this")
    logging.getLogger("anthropic").warning("but this")
    assert [text.partition(" ")[2] for text in err.getvalue().splitlines()] == [
        'level=info logger=llmprocd msg="this ***"',
        'level=warning logger=anthropic msg="but this"',
    ]


def test_starting_twice_does_not_log_twice(root, monkeypatch):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    log.start("info", [], journal=False)
    log.start("warning", [], journal=True)
    logging.getLogger("llmprocd").warning("once")
    assert err.getvalue() == "<4>level=warning logger=llmprocd msg=once\n"


def test_a_key_that_becomes_known_later_is_left_out_too():
    """The config was read again, and names another key."""
    made = log.Formatter([KEY], journal=False)
    made.hide(["another-secret\n", ""])
    assert made.format(record(f"{KEY} another-secret here")).endswith('msg="*** *** here"')
