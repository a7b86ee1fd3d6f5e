"""One line a record, key=value, to stderr.

Law: a record is one line whatever was logged, and no key is in it.
"""

import logging
import sys
import time
from collections.abc import Collection

LEVELS = ("debug", "info", "warning", "error")
PRIORITY = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class Formatter(logging.Formatter):
    """key=value, with everything that could forge a line or a terminal escaped."""

    def __init__(self, secrets: Collection[str], *, journal: bool) -> None:
        super().__init__()
        self._secrets: list[str] = []
        self.hide(secrets)
        self._journal = journal

    def hide(self, secrets: Collection[str]) -> None:
        """Leave these out, too, from now on."""
        # A key is sent without the newline that its file ends in; and one key may begin like another.
        known = {*self._secrets, *(secret.strip() for secret in secrets)} - {""}
        self._secrets = sorted(known, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        fields = f"level={record.levelname.lower()} logger={record.name} msg={quoted(text)}"
        if self._journal:
            return f"<{PRIORITY.get(record.levelno, 6)}>{fields}"
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return f"time={stamp} {fields}"


def quoted(text: str) -> str:
    """A value as one word, or in quotes with control characters escaped."""
    if text and text.isprintable() and not any(char in ' "=\\' for char in text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(char if char.isprintable() else _escape(char) for char in escaped) + '"'


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


def start(level: str, secrets: Collection[str], *, journal: bool) -> None:
    """Log to stderr from here on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(secrets, journal=journal))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("httpx2", "httpcore2", "anthropic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def hide(secrets: Collection[str]) -> None:
    """Leave these out of the log, too, from now on."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, Formatter):
            handler.formatter.hide(secrets)
