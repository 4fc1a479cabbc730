"""Secrets stay out of logs, messages and configurations: those in URLs, and those in variables."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable
from typing import Any

SECRET_NAME = re.compile(
    "SECRET|TOKEN(?!IZER)|PASSW|PASSPHRASE|CREDENTIAL|ACCESS_?KEY|API_?KEY|PRIVATE_?KEY"
    "|_(?:KEY|PAT|PASS|PWD|AUTH)$",
    re.IGNORECASE,
)
"""Names of variables whose values are secrets."""

_IN_URL = re.compile(r"(?<=://)[^/@\s'\"]+(?=@)")
_SIGNED = re.compile(
    r"(?<=[?&])([\w.-]*(?:sign|token|key|secret|credential)[\w.-]*=)[^&\s'\"]+", re.I
)

SHORTEST = 8
"""Characters below which a variable's value is not looked for: it would hide ordinary words."""


def redact(text: str) -> str:
    """Return text without the credentials of URLs and the values of secret variables."""
    text = _SIGNED.sub(r"\1***", _IN_URL.sub("***", text))
    values = {v for k, v in os.environ.items() if SECRET_NAME.search(k)}
    for value in sorted((v for v in values if len(v) >= SHORTEST), key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def secret_in(pairs: Iterable[tuple[str, Any]]) -> str | None:
    """Return the first key whose value carries credentials in a URL, or None."""
    for key, value in pairs:
        text = str(value)
        if _IN_URL.search(text) or _SIGNED.search(text):
            return key
    return None


def guard_output() -> None:
    """Take the secrets out of what this process logs from now on, and its threads' last words.

    Libraries log with handlers and formats of their own, so the record itself is changed.
    """
    make = logging.getLogRecordFactory()

    def redacted(*words: Any, **more: Any) -> logging.LogRecord:
        record = make(*words, **more)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):
            # A call with wrong arguments: logging itself reports it when it writes the record.
            return record
        clean = redact(text)
        if clean != text:
            record.msg, record.args = clean, None
        if record.exc_info and record.exc_info[0] is not None:
            # Handlers take what is here for what they would otherwise write.
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info))).rstrip()
        return record

    def last_words(ended: threading.ExceptHookArgs) -> None:
        if ended.exc_type is SystemExit:
            return
        name = ended.thread.name if ended.thread is not None else "a thread"
        error = ended.exc_value
        lines = traceback.format_exception(ended.exc_type, error, ended.exc_traceback)
        print(redact(f"{name} ended:\n{''.join(lines)}"), file=sys.stderr, flush=True)

    logging.setLogRecordFactory(redacted)
    threading.excepthook = last_words
