"""Secrets stay out of logs, messages and configurations: those in URLs, and those in variables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any

SECRET_NAME = re.compile("SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL|API_KEY", re.IGNORECASE)
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
    values = {v for k, v in os.environ.items() if SECRET_NAME.search(k) and len(v) >= SHORTEST}
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return text


def secret_in(pairs: Iterable[tuple[str, Any]]) -> str | None:
    """Return the first key whose value carries credentials in a URL, or None."""
    for key, value in pairs:
        text = str(value)
        if _IN_URL.search(text) or _SIGNED.search(text):
            return key
    return None
