"""Words of the command line that cannot be are refused where they are read, by option."""

from __future__ import annotations

import math
import shlex
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


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


class Variant(NamedTuple):
    """What a benchmark compares: a name, and the overrides that make it from the configuration."""

    name: str
    overrides: Sequence[str]


def variant(known: Mapping[str, Sequence[str]]) -> Callable[[str], Variant]:
    """Return an argparse type: a known variant's name, or `NAME=--key value …` of one's own."""

    def read(text: str) -> Variant:
        if text in known:
            return Variant(text, known[text])
        name, is_new, overrides = text.partition("=")
        if not (name and is_new):
            names = ", ".join(map(repr, known))
            raise ArgumentTypeError(f"{text!r} is none of {names}, and not 'NAME=--key value ...'")
        return Variant(name, shlex.split(overrides))

    return read
