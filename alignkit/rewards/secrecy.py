"""Keys and passwords are kept out of what is printed, cached and logged: an endpoint may send back what it was sent."""

from __future__ import annotations

import logging as log
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from alignkit.errors import without_passwords

_SHORTEST = 8  # characters; shorter keys are placeholders such as EMPTY, and may be words of a reply
_LOGGERS = (
    "httpx2",
    "httpcore2.connection",
    "httpcore2.http11",
    "httpcore2.http2",
    "httpcore2.proxy",
    "httpcore2.socks",
)


def without(text: str, key: str) -> str:
    """Return the text with "[key]" for a key, also as it is written in JSON or in a URL."""
    if len(key) < _SHORTEST:
        return text
    escaped = r"\\*".join(map(re.escape, key))  # JSON and repr put backslashes before quotes
    return re.sub(f"{escaped}|{re.escape(quote(key, safe=''))}", "[key]", text)


def redacted(text: str, key: str) -> str:
    """Return the text without the key, and without passwords in URLs: for messages and logs."""
    return without_passwords(without(text, key))


@contextmanager
def logging(key: str) -> Iterator[None]:
    """Inside, what the HTTP client logs is redacted: at the level DEBUG it logs the headers of responses."""
    loggers = [log.getLogger(name) for name in _LOGGERS]

    def hide(record: log.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage(), key), ()
        return True

    for logger in loggers:
        logger.addFilter(hide)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(hide)
