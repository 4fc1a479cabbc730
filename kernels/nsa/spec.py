"""What Native Sparse Attention is made of: block sizes, the compression map, and their arithmetic.

Native Sparse Attention (arXiv 2502.11089), 0-based, positions counted inside one document:

- compressed block i covers tokens [i·d, i·d + l) and is visible to query t iff t >= i·d + l - 1;
- selected block j covers tokens [j·l', (j + 1)·l');
- the window of query t is (t - w, t].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from kernels.documents import Documents

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


class NsaCall(NamedTuple):
    """Everything that one call of NSA computes from; every implementation takes it whole.

    Attributes:
        q_THD: queries [T, H, D]; of a call with `first`, those of the tokens [first, T) alone, and
            so are the gates.
        k_cmp: keys of the compressed branch, one per token, not yet compressed, [T, G, D]; likewise
            k_slc and k_win. Shared K/V is the same tensor three times.
        v_cmp: values of the compressed branch, one per token, [T, G, E]; likewise v_slc and v_win.
        k_slc: keys of the selected branch.
        v_slc: values of the selected branch.
        k_win: keys of the window branch.
        v_win: values of the window branch.
        phi_k: compression of k_cmp; None takes the mean of each block.
        phi_v: compression of v_cmp; None takes the mean of each block.
        gates_TH3: gates of compressed, selected, window after the sigmoid, [T, H, 3].
        docs: document boundaries on q's device; every branch restarts at each document.
        spec: block sizes and counts.
    """

    q_THD: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor
    phi_k: Phi | None
    phi_v: Phi | None
    gates_TH3: Tensor
    docs: Documents
    spec: NsaSpec

    def with_queries_in_front(self, first: int) -> NsaCall:
        """Return the call with a query of zeros for each of `first` tokens in front of the others.

        For kernels that know no queries that begin inside the pack; such a query costs as much as
        any other.
        """
        if first == 0:
            return self
        q_THD, gates_TH3 = (F.pad(x, (0, 0, 0, 0, first, 0)) for x in (self.q_THD, self.gates_TH3))
        return self._replace(q_THD=q_THD, gates_TH3=gates_TH3)
