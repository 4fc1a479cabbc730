"""A tensor that grows token by token: what decoding caches are made of."""

from __future__ import annotations

from torch import Tensor


class TokenBuffer:
    """Rows [length, …] with room for more, which at least doubles; rows past the length are 0."""

    def __init__(self, least: int = 256) -> None:
        """Start empty; the first row takes room for `least` rows."""
        self.least = least
        self.length = 0
        self._rows: Tensor | None = None

    def _reserve(self, end: int, like: Tensor) -> Tensor:
        if self._rows is None or end > self._rows.shape[0]:
            grown = like.new_zeros(max(end, 2 * self.length, self.least), *like.shape[1:])
            if self._rows is not None:
                grown[: self.length] = self._rows[: self.length]
            self._rows = grown
        return self._rows

    def append(self, rows: Tensor) -> None:
        """Add rows [n, …]; the first call decides trailing shape, dtype and device."""
        end = self.length + rows.shape[0]
        self._reserve(end, rows if self._rows is None else self._rows)[self.length : end] = rows
        self.length = end

    def view(self, begin: int, end: int) -> Tensor:
        """Rows [begin, end); those past the length are 0.

        Raises:
            IndexError: nothing was ever appended, so that the rows have no shape.
        """
        if self._rows is None:
            raise IndexError(f"rows {begin} … {end} of a buffer to which nothing was appended")
        return self._reserve(end, self._rows)[begin:end]
