"""Turns are balanced, intervals honest, and the collector stays out of them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from launcher.bench_tables_report import report
from launcher.bench_turns import compare, median_interval, verdict


@pytest.mark.parametrize(("count", "k"), [(1, 1), (5, 1), (6, 1), (8, 1), (9, 2), (10, 2), (20, 6)])
def test_interval_is_that_of_order_statistics(count: int, k: int) -> None:
    assert median_interval(range(count)) == (k - 1, count - k)


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(4000, 10, generator=generator).exp()
    inside = sum(low <= 1.0 <= high for low, high in map(median_interval, draws.tolist()))
    assert 0.96 < inside / 4000 < 0.99


def drifting(log: list[str]) -> Callable[[str, float], Callable[[], dict[str, Any]]]:
    """Subjects on a machine that gets 5 % slower with every turn."""

    def subject(name: str, seconds: float) -> Callable[[], dict[str, Any]]:
        def turn() -> dict[str, Any]:
            assert not gc.isenabled()
            log.append(name)
            now = seconds * 1.05 ** len(log)
            return {"seconds": now, "steps": [now, now], "peak": 2.0**30, "host x": now}

        return turn

    return subject


def test_turns_are_balanced_and_a_drift_cancels() -> None:
    log: list[str] = []
    subject = drifting(log)
    found = compare(subject("a", 1.0), subject("b", 1.1), 8)
    assert "".join(log) == "abba" * 4
    assert found["ratio"] == pytest.approx(1.1, rel=2e-3)
    assert found["step_ratio"] == pytest.approx(1.1, rel=2e-3)
    assert found["low"] == pytest.approx(1.1 / 1.05) and found["high"] == pytest.approx(1.1 * 1.05)
    assert gc.isenabled()


def test_verdict_goes_by_the_interval() -> None:
    enough = {"ratios": [1.0] * 6}
    assert verdict({**enough, "low": 0.99, "high": 1.01}, 1.015) == "met"
    assert verdict({**enough, "low": 1.02, "high": 1.04}, 1.015) == "not met"
    assert verdict({**enough, "low": 1.00, "high": 1.04}, 1.015) == "undecided"
    assert verdict({"ratios": [1.0] * 5, "low": 0.99, "high": 1.01}, 1.015) == "undecided"


def test_report_says_where_the_time_goes_and_which_goal_is_met() -> None:
    log: list[str] = []
    subject = drifting(log)
    setting = {"device": "cpu", "world": 1, "layers": 2, "width": 8, "vocab": 9, "tokens": 5}
    setting |= {"unique_rows": 4.0, "unique_bytes": 128.0}
    found = compare(subject("a", 1.0), subject("b", 1.2), 6)
    text = report({"setting": setting, "rows-host": found, "zero3": {"error": "no memory"}})
    assert "goal 1.015: not met" in text
    assert "host ms more: x +" in text
    assert "zero3          failed: no memory" in text
