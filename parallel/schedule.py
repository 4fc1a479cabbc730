"""Learning rate as a function of the optimizer step: warm-up, then cosine or WSD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass
class ScheduleConfig:
    """How the learning rate goes over a run.

    Attributes:
        kind: "cosine" decays from the warm-up's end to the last step; "wsd" (warm-up, stable,
            decay) stays at the peak and falls linearly in the last `decay_fraction` of the steps.
        warmup: steps in which the rate rises linearly to its peak.
        decay_fraction: share of all steps in which "wsd" decays.
        min_lr_ratio: the rate at the end, as a share of the peak.
    """

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup: int = 20
    decay_fraction: float = 0.2
    min_lr_ratio: float = 0.1

    def validate(self, total_steps: int) -> None:
        """Raise ValueError, naming the key, when a value cannot be meant for so many steps."""
        if self.kind not in ("cosine", "wsd"):
            raise ValueError(f"engine.schedule.kind {self.kind!r} is none of cosine, wsd")
        if not 0 <= self.warmup <= total_steps:
            raise ValueError(
                f"engine.schedule.warmup {self.warmup} must lie in 0 … {total_steps}, the run's "
                "steps"
            )
        if not 0.0 <= self.decay_fraction <= 1.0:
            raise ValueError(
                f"engine.schedule.decay_fraction {self.decay_fraction} must lie in 0 … 1"
            )
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ValueError(f"engine.schedule.min_lr_ratio {self.min_lr_ratio} must lie in 0 … 1")


def learning_rate_factor(cfg: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the share of the peak rate that applies in a step.

    Args:
        cfg: the schedule.
        step: optimizer steps applied before this one, so that the first step has 0.
        total_steps: steps of the whole run; later ones stay at the minimum.
    """
    if step < cfg.warmup:
        return (step + 1) / cfg.warmup
    if step >= total_steps:
        return cfg.min_lr_ratio
    if cfg.kind == "cosine":
        progress = (step - cfg.warmup) / (total_steps - cfg.warmup)
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        start = max(total_steps - round(cfg.decay_fraction * total_steps), cfg.warmup)
        share = 1.0 if step < start else 1.0 - (step - start) / (total_steps - start)
    return cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * share
