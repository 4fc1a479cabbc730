"""Which of two subjects is slower, and how sure that is: turns in balanced order, paired ratios.

Machines drift: clocks, neighbours, temperatures. A ratio is of two neighbouring turns; every other
pair goes the other way round (A B, B A, ...), so that a drift cancels in the median. What is
reported is the median of the ratios with an interval by order statistics, which assumes nothing
about their distribution.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import comb
from typing import Any

Turn = Callable[[], Mapping[str, Any]]
"""Takes a turn; the result holds "seconds" of a step and "steps", the seconds of each."""

COVERAGE = 0.95
FEWEST_PAIRS = 6
"""With fewer, no interval of order statistics reaches 95 %."""


def median_interval(values: Sequence[float], coverage: float = COVERAGE) -> tuple[float, float]:
    """Return an interval that holds the median of their distribution.

    Order statistics k and n + 1 - k, with the largest k whose interval holds it with `coverage`;
    the smallest and the largest value where there are too few of them (fewer than 6 for 95 %).
    """
    ordered, n = sorted(values), len(values)
    k, tail = 1, 0.5**n
    while k < n - k and 1.0 - 2.0 * (tail + comb(n, k) * 0.5**n) >= coverage:
        tail += comb(n, k) * 0.5**n
        k += 1
    return ordered[k - 1], ordered[n - k]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Python's garbage collector out of a turn: collect before, for both sides alike."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def take_turns(
    ours: Turn, theirs: Turn, pairs: int
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Take `pairs` pairs of turns (ours, theirs), every other one in the other order."""
    found = []
    for i in range(pairs):
        turns = {}
        for turn in (ours, theirs) if i % 2 == 0 else (theirs, ours):
            with quiet():
                turns[turn] = turn()
        found.append((turns[ours], turns[theirs]))
    return found


def compare(ours: Turn, theirs: Turn, pairs: int) -> dict[str, Any]:
    """Return how `theirs` compares with `ours`.

    Returns:
        ms and plain_ms: medians of a step of theirs and ours; ratio, low, high: median of the
        paired ratios and its interval; ratios: all of them, sorted; step_ratio: the same of the
        turns' median steps, which a single slow step does not move; spread: of theirs, relative;
        parts and plain_parts: medians of whatever else the turns say.
    """
    turns = take_turns(ours, theirs, pairs)
    ratios = [b["seconds"] / a["seconds"] for a, b in turns]
    by_step = [statistics.median(b["steps"]) / statistics.median(a["steps"]) for a, b in turns]
    low, high = median_interval(ratios)
    times = [b["seconds"] for _, b in turns]
    return {
        "ms": 1e3 * statistics.median(times),
        "plain_ms": 1e3 * statistics.median(a["seconds"] for a, _ in turns),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "ratios": sorted(ratios),
        "step_ratio": statistics.median(by_step),
        "spread": (max(times) - min(times)) / statistics.median(times),
        "peak_gib": max(b["peak"] for _, b in turns) / 2**30,
        "parts": _medians([b for _, b in turns]),
        "plain_parts": _medians([a for a, _ in turns]),
    }


def _medians(turns: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = {name for turn in turns for name, value in turn.items() if isinstance(value, float)}
    return {n: statistics.median(turn.get(n, 0.0) for turn in turns) for n in sorted(names)}


def verdict(found: Mapping[str, Any], bar: float) -> str:
    """Say whether a ratio keeps below `bar`, as far as its interval tells."""
    if len(found["ratios"]) < FEWEST_PAIRS:
        return "undecided"
    if found["high"] <= bar:
        return "met"
    return "not met" if found["low"] > bar else "undecided"
