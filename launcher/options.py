"""Numbers of the command line that cannot be are refused where they are read, by option."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable


def whole(least: int) -> Callable[[str], int]:
    """Return an argparse type: whole numbers from `least` on."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise ArgumentTypeError(f"expected a whole number, found {text!r}") from None
        if number < least:
            raise ArgumentTypeError(f"{number} must be at least {least}")
        return number

    return read


def above_zero(text: str) -> float:
    """An argparse type: finite numbers above 0."""
    try:
        number = float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number, found {text!r}") from None
    if not 0 < number < math.inf:
        raise ArgumentTypeError(f"{text} must be above 0")
    return number
