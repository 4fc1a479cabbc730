"""Where packed documents begin and end: the description of a packed sequence that all share."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from kernels.transfer import to_device


class Documents:
    """Boundaries of B documents packed into one sequence of T tokens.

    The lengths are kept on the host, so that no kernel has to read them back from the device.

    Attributes:
        lengths: length in tokens of each document, host ints, all >= 1, sum T.
        device: where the tensors below live.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        """Describe documents of these lengths; raises ValueError on none, or one below 1."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"documents need a token at least, got lengths {list(lengths)[:8]}")
        self.lengths = tuple(int(n) for n in lengths)
        self.device = _indexed(device)
        self._parts: dict[tuple[int, int], tuple[int, Documents]] = {}

    def to(self, device: torch.device | str) -> Documents:
        """Return the same boundaries with their tensors on another device."""
        device = _indexed(device)
        return self if device == self.device else Documents(self.lengths, device)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First token of each document, host ints, length B."""
        out, at = [], 0
        for n in self.lengths:
            out.append(at)
            at += n
        return tuple(out)

    @property
    def total(self) -> int:
        """T, tokens in all documents together."""
        return self.starts[-1] + self.lengths[-1]

    @property
    def longest(self) -> int:
        """Length in tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Cumulative lengths, int32 [B+1]."""
        ends = torch.tensor([*self.starts, self.total], dtype=torch.int32)
        return to_device(ends, self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Position of every token in its own document, int32 [T]."""
        parts = [torch.arange(n, dtype=torch.int32) for n in self.lengths]
        return to_device(torch.cat(parts), self.device)

    def seen_by(self, first: int, stop: int) -> tuple[int, Documents]:
        """Return what the tokens [first, stop) may look at: whole documents up to `stop`.

        Returns:
            The first token of the document of token `first`, and the documents from there on, the
            last one cut at `stop`; made once, so that what others keep with them is, too.

        Raises:
            ValueError: no such tokens.
        """
        if not 0 <= first < stop <= self.total:
            raise ValueError(f"tokens {first}..{stop} of documents of {self.total} tokens")
        if (first, stop) not in self._parts:
            at = bisect_right(self.starts, first) - 1
            last = bisect_left(self.starts, stop)
            lengths = list(self.lengths[at:last])
            lengths[-1] = stop - self.starts[last - 1]
            self._parts[first, stop] = self.starts[at], Documents(lengths, self.device)
        return self._parts[first, stop]


def _indexed(device: torch.device | str) -> torch.device:
    """Name the device as its tensors do: "cuda" is the current one, "cuda:0" or another."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
