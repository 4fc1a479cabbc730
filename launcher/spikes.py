"""Steps whose loss or gradient norm is not finite, or far from the run's own recent ones.

Such a step is not applied: weights, tables, optimizer states, controllers and schedule stay as they
are. The judgement needs nothing but the step's loss and global gradient norm, which every rank
knows anyway, so that all ranks judge alike and none waits for another. Its statistics are part of
every checkpoint.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NORMAL = 1.4826
"""From the median absolute deviation to the standard deviation of a normal distribution."""

FLOOR = 0.01
"""Least spread of the losses, relative to their median: a loss that hardly moves has no outliers
within it."""

ENOUGH = 32
"""Steps after which outliers can be told, if the window is not smaller."""


class SpikeError(ValueError):
    """The run spikes again and again; the message says at which steps and what to do."""


@dataclass
class SpikeConfig:
    """Which steps are not applied, and when the run goes back.

    Attributes:
        loss_sigma: a loss this many standard deviations (by the median absolute deviation) above
            the median of the window is an outlier; 0 takes every finite loss.
        norm_factor: a gradient norm this many times the median of the window is an outlier; 0 takes
            every finite norm.
        window: applied steps that the medians go over. Nothing is an outlier before 32 of them, or
            before the window is full when it is smaller.
        patience: spikes within `span` steps after which the run goes back to the newest checkpoint
            before the first of them, and on with the data behind the last.
        span: see patience.
        max_rollbacks: times that the run may go back to the same checkpoint; then it saves and
            ends with an error.
    """

    loss_sigma: float = 10.0
    norm_factor: float = 20.0
    window: int = 128
    patience: int = 3
    span: int = 10
    max_rollbacks: int = 2

    def __post_init__(self) -> None:
        """Raise ValueError, naming the key, when a value cannot be meant."""
        for key in ("loss_sigma", "norm_factor", "max_rollbacks"):
            if getattr(self, key) < 0:
                raise ValueError(f"spikes.{key} {getattr(self, key)} must not be negative")
        if 0 < self.norm_factor <= 1:
            raise ValueError(f"spikes.norm_factor {self.norm_factor} must be above 1, or 0 for off")
        if self.window < 4:
            raise ValueError(f"spikes.window {self.window} must be at least 4")
        if not 1 <= self.patience <= self.span:
            raise ValueError(
                f"spikes.patience {self.patience} must be at least 1 and at most spikes.span "
                f"{self.span}"
            )


class SpikeWatch:
    """Judges every step of a run before it is applied.

    Attributes:
        reason: why the step judged last is a spike; empty when it is none.
        fruitless: runs of spikes without a checkpoint to go back to, since a step was applied.
    """

    def __init__(self, cfg: SpikeConfig) -> None:
        """Start without any statistics."""
        self.cfg = cfg
        self.reason = ""
        self.fruitless = 0
        self._losses: deque[float] = deque(maxlen=cfg.window)
        self._norms: deque[float] = deque(maxlen=cfg.window)
        self._spikes: list[int] = []

    def accept(self, step: int, loss: float, norm: float) -> bool:
        """Return whether a step is to be applied, and take it into the statistics if so.

        Args:
            step: number of the step.
            loss: of all ranks, nats per label.
            norm: global gradient norm before clipping.
        """
        self._spikes = [s for s in self._spikes if s > step - self.cfg.span]
        self.reason = self._judge(loss, norm)
        if self.reason:
            self._spikes.append(step)
            return False
        self._losses.append(loss)
        self._norms.append(norm)
        self.fruitless = 0
        return True

    @property
    def run_of_spikes(self) -> list[int]:
        """The steps of a run of spikes, when there are enough of them to go back; else empty."""
        return self._spikes if len(self._spikes) >= self.cfg.patience else []

    def forget_run(self) -> None:
        """Count spikes anew, where there is no checkpoint to go back to."""
        self._spikes = []
        self.fruitless += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as plain values."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "spikes": list(self._spikes),
            "fruitless": self.fruitless,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the statistics of `state_dict`."""
        self._losses = deque(state["losses"], maxlen=self.cfg.window)
        self._norms = deque(state["norms"], maxlen=self.cfg.window)
        self._spikes, self.fruitless = list(state["spikes"]), int(state["fruitless"])
        self.reason = ""

    def _judge(self, loss: float, norm: float) -> str:
        cfg = self.cfg
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"{name} is not finite"
        if len(self._losses) < min(ENOUGH, cfg.window):
            return ""
        middle = statistics.median(self._losses)
        spread = NORMAL * statistics.median(abs(x - middle) for x in self._losses)
        spread = max(spread, FLOOR * abs(middle))
        if cfg.loss_sigma and loss > middle + cfg.loss_sigma * spread:
            return f"loss {loss:.4g} is {(loss - middle) / spread:.3g} sigma above {middle:.4g}"
        middle = statistics.median(self._norms)
        if cfg.norm_factor and norm > cfg.norm_factor * middle:
            return f"gradient norm {norm:.4g} is {norm / max(middle, 1e-30):.3g} times {middle:.4g}"
        return ""


def undone_skips(row: Mapping[str, Any]) -> list[int]:
    """Return the skipped steps whose own lines a rollback, which this line tells, has undone."""
    event = row.get("event") or {}
    event = event.get("behind", event)
    return list(event.get("skipped", [])) if event.get("kind") == "rollback" else []
