"""How often the ids of a vocabulary occur where no text is at hand: the law of Zipf and Mandelbrot.

What a table of rows by id costs hangs on how many distinct ids a pass has. Among 16,384 tokens and
32,768 ids this law has 5,800; the source text of Python's standard library has 1,700.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

OFFSET = 2.7
"""Of the rank, which is counted from 1."""


def frequencies(vocabulary: int) -> NDArray[np.float64]:
    """Return the share of each id, the most frequent first, fp64 [vocabulary]: 1 / (rank + 2.7)."""
    share_V: NDArray[np.float64] = 1.0 / (np.arange(1, vocabulary + 1) + OFFSET)
    share_V /= share_V.sum()
    return share_V


def expected_unique(vocabulary: int, tokens: int) -> int:
    """Return the expected number of distinct ids among `tokens`: sum of 1 - (1 - p)^tokens."""
    share_V = frequencies(vocabulary)
    return round(float(-np.expm1(tokens * np.log1p(-share_V)).sum()))
