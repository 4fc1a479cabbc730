"""The picture of expert load over time: a column per recorded step, a row per expert.

Colour says an expert's load relative to a balanced one: black is dead, dark blue below, green at 1,
yellow at the top of the scale and beyond.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

TOP = 3.0
"""Load relative to a balanced one at which the colour scale ends."""

ANCHORS = np.array(
    [
        [0, 0, 0],
        [59, 28, 98],
        [49, 84, 140],
        [33, 145, 140],
        [72, 186, 110],
        [160, 218, 57],
        [220, 226, 60],
        [253, 231, 37],
        [255, 250, 190],
    ],
    dtype=np.float64,
)
"""Evenly spaced colours of the scale, RGB, of rising lightness so that it also reads in grey."""


def colour(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Map relative loads (any shape) to RGB uint8 [..., 3]; unknown (NaN) is mid grey."""
    at = np.clip(np.nan_to_num(values) / TOP, 0.0, 1.0) * (len(ANCHORS) - 1)
    steps = np.arange(len(ANCHORS))
    rgb = np.stack([np.interp(at, steps, ANCHORS[:, c]) for c in range(3)], axis=-1)
    rgb[np.isnan(values)] = 128
    return rgb.round().astype(np.uint8)


class LoadHistory:
    """Loads of one layer's experts over the run, thinned to a bounded number of columns."""

    def __init__(self, most: int = 256) -> None:
        """Keep at most `most` columns; when there are more, neighbours are averaged in pairs."""
        self.most = most
        self.columns: list[tuple[int, NDArray[np.float64]]] = []
        self._each = 1
        self._open: list[NDArray[np.float64]] = []
        self._open_step = 0

    def add(self, step: int, load: Iterable[float]) -> None:
        """Add the load of every expert at a step; only the ratio between experts matters."""
        values = np.asarray(list(load), dtype=np.float64)
        total = np.nansum(values)
        values = values * (len(values) / total) if total > 0 else np.zeros_like(values)
        if self._open and len(self._open[0]) != len(values):
            self._flush()
        if not self._open:
            self._open_step = step
        self._open.append(values)
        if len(self._open) == self._each:
            self._flush()

    def _flush(self) -> None:
        self.columns.append((self._open_step, np.mean(self._open, axis=0)))
        self._open = []
        if len(self.columns) > self.most:
            columns, self.columns = self.columns, []
            self._each *= 2
            for i in range(0, len(columns), 2):
                pair = columns[i : i + 2]
                same = len({len(v) for _, v in pair}) == 1
                kept = np.mean([v for _, v in pair], axis=0) if same else pair[-1][1]
                self.columns.append((pair[0][0], kept))

    def image(self) -> NDArray[np.uint8]:
        """Draw what was added so far: uint8 [height, width, 3], steps from left to right.

        Every expert and step is a rectangle of some pixels, so that a browser's smoothing does not
        blur a small picture; experts that did not exist yet are grey.
        """
        columns = list(self.columns)
        if self._open:
            columns.append((self._open_step, np.mean(self._open, axis=0)))
        if not columns:
            raise ValueError("no load was added yet: there is nothing to draw")
        experts = max(len(v) for _, v in columns)
        grid = np.full((experts, len(columns)), np.nan)
        for x, (_, values) in enumerate(columns):
            grid[: len(values), x] = values
        tall = max(1, 256 // experts)
        wide = max(1, 512 // len(columns))
        return colour(grid).repeat(tall, axis=0).repeat(wide, axis=1)
