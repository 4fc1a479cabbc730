"""The learning rate rises, holds and falls where the configuration says."""

from __future__ import annotations

import pytest

from parallel.schedule import ScheduleConfig, learning_rate_factor


def test_warm_up_is_linear_and_starts_above_zero() -> None:
    cfg = ScheduleConfig(warmup=4)
    factors = [learning_rate_factor(cfg, step, 100) for step in range(5)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_passes_the_middle_at_half_and_ends_at_the_minimum() -> None:
    cfg = ScheduleConfig(warmup=0, min_lr_ratio=0.1)
    assert learning_rate_factor(cfg, 0, 100) == 1.0
    assert learning_rate_factor(cfg, 50, 100) == pytest.approx(0.55)
    factors = [learning_rate_factor(cfg, step, 100) for step in range(101)]
    assert factors == sorted(factors, reverse=True)
    assert factors[99] < 0.101
    assert factors[100] == learning_rate_factor(cfg, 1000, 100) == 0.1


def test_wsd_is_stable_then_falls_linearly() -> None:
    cfg = ScheduleConfig(kind="wsd", warmup=10, decay_fraction=0.2, min_lr_ratio=0.0)
    factors = [learning_rate_factor(cfg, step, 100) for step in range(101)]
    assert set(factors[9:81]) == {1.0}
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == 0.0


def test_warm_up_of_the_whole_run_and_no_decay_are_possible() -> None:
    assert learning_rate_factor(ScheduleConfig(warmup=10), 9, 10) == 1.0
    assert learning_rate_factor(ScheduleConfig(kind="wsd", decay_fraction=0.0), 99, 100) == 1.0


@pytest.mark.parametrize(
    ("cfg", "key"),
    [
        (ScheduleConfig(warmup=101), "warmup 101"),
        (ScheduleConfig(decay_fraction=1.5), "decay_fraction 1.5"),
        (ScheduleConfig(min_lr_ratio=-1.0), "min_lr_ratio"),
        (ScheduleConfig(kind="linear"), "kind 'linear'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_values_are_refused_by_name(cfg: ScheduleConfig, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        cfg.validate(100)
