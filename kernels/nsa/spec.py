"""What Native Sparse Attention is made of: block sizes, the compression map, and their arithmetic.

Native Sparse Attention (arXiv 2502.11089), 0-based, positions counted inside one document:

- compressed block i covers tokens [i·d, i·d + l) and is visible to query t iff t >= i·d + l - 1;
- selected block j covers tokens [j·l', (j + 1)·l');
- the window of query t is (t - w, t].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

EMPTY_LSE = 0.0
"""Log-sum-exp of a query that sees nothing in a branch; its output there is 0. Finite, so that
exp(score - lse) of a masked score stays 0 and never becomes NaN."""


class Phi(NamedTuple):
    """Compression map φ of one of K and V (eq. 7), the same for every KV group.

    phi(block)_e = sum_i (x[i] + position[i]) @ weight[i], over the l tokens i of the block.

    Attributes:
        weight_lDD: [l, D, D], input channel before output channel.
        position_lD: intra-block position term [l, D].
    """

    weight_lDD: Tensor
    position_lD: Tensor


@dataclass(frozen=True)
class NsaSpec:
    """Sizes of Native Sparse Attention, in tokens and in blocks (defaults: paper section 4.1).

    Attributes:
        block: l, tokens of a compressed block.
        stride: d, tokens between the starts of compressed blocks.
        select: l', tokens of a selected block.
        selected: n, selected blocks per query, forced ones included.
        initial: first blocks of the document that are always selected.
        local: last blocks up to the query's own one that are always selected.
        window: w, tokens of the sliding window, the query's own one included.
    """

    block: int = 32
    stride: int = 16
    select: int = 64
    selected: int = 16
    initial: int = 1
    local: int = 2
    window: int = 512

    def __post_init__(self) -> None:
        """Refuse sizes for which eq. 9 has no meaning; raises ValueError that names the field."""
        for name in ("block", "stride", "select", "selected", "local", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"NsaSpec.{name} must be >= 1, got {getattr(self, name)}")
        if self.initial < 0:
            raise ValueError(f"NsaSpec.initial must be >= 0, got {self.initial}")
        for name in ("block", "select"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"NsaSpec.{name} = {getattr(self, name)} must be a multiple of "
                    f"NsaSpec.stride = {self.stride} (eq. 9 counts strides)"
                )
        if self.initial + self.local > self.selected:
            raise ValueError(
                f"NsaSpec.selected = {self.selected} leaves no room for initial = {self.initial} "
                f"and local = {self.local} forced blocks"
            )

    def compressed_blocks(self, tokens: int) -> int:
        """N: complete compressed blocks among the first `tokens` tokens of a document."""
        return 0 if tokens < self.block else (tokens - self.block) // self.stride + 1

    def selection_blocks(self, tokens: int) -> int:
        """How many selected blocks the first `tokens` tokens touch, the last one perhaps partly."""
        return -(-tokens // self.select)

    @property
    def importance_offsets(self) -> tuple[int, ...]:
        """Offsets i - j·l'/d of the compressed blocks that score block j; -1 … 3 by default."""
        return tuple(range(1 - self.block // self.stride, self.select // self.stride))

    @property
    def importance_weights(self) -> tuple[int, ...]:
        """Weight of each of `importance_offsets` (eq. 9); 1, 2, 2, 2, 1 by default.

        The weight is the number of pairs (m, n), 0 <= m < l'/d, 0 <= n < l/d, with offset = m - n,
        that is the number of strides that the compressed and the selected block share. (The paper
        prints the index as l'/d·j - m - n; taken literally it scores a block by tokens before it.)
        """
        strides, per_block = self.select // self.stride, self.block // self.stride
        return tuple(
            sum(0 <= m - offset < per_block for m in range(strides))
            for offset in self.importance_offsets
        )
