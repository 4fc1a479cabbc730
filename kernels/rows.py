"""Rows of a table, each used by many tokens: gather forward, fixed-order segment sum backward.

A batch uses each unique id once in `values_UW` and points to it from every token. The backward adds
up the gradients of a row's tokens in the order of the tokens, in fp32, without atomics, so that the
same batch gives the same bits.

Several layers share one row `[U, L*W]`. Slicing its columns per layer makes autograd build a zero
tensor of the whole size for every layer; `split_layers` makes L views whose gradients are stacked
once.

Shapes: T tokens, U unique rows, W columns, L layers, P pieces of rows, J long rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 16
"""Tokens that one program of a GPU takes of a row."""


class Pieces(NamedTuple):
    """Rows cut into pieces of at most `PIECE` tokens, so that a frequent id is no long loop.

    Attributes:
        pieces_P4: (row, first place in `order_T`, end, slot of its partial sum), int64 [P, 4]; slot
            -1 where the piece is the whole row, row -1 where there is no piece.
        long_J3: rows of several pieces: (row, slot of the first, pieces), int64 [J, 3]; row -1
            where there is none.
        slots: partial sums in all, or a bound.
    """

    pieces_P4: Tensor
    long_J3: Tensor
    slots: int

    @classmethod
    def of(cls, starts_U1: Tensor, tokens: int) -> Pieces:
        """Cut rows; on a GPU nothing is waited for, and the sizes are bounds.

        Args:
            starts_U1: of a `RowIndex`.
            tokens: T.
        """
        rows = starts_U1.shape[0] - 1
        # A row without a token is a piece, too: its sum of 0 must be written.
        count_U = ((starts_U1.diff() + (PIECE - 1)) // PIECE).clamp_(min=1)
        end_U = count_U.cumsum(0)
        long_U = count_U > 1
        slots_U = torch.where(long_U, count_U, 0)
        slot_U = slots_U.cumsum(0) - slots_U
        if starts_U1.is_cuda or rows == 0:
            pieces, longs = rows + tokens // PIECE, min(rows, tokens // PIECE)
            slots = 2 * (tokens // PIECE)
            by_length = count_U.argsort(descending=True, stable=True)[:longs]
        else:
            pieces, slots = int(end_U[-1]), int(slots_U.sum())
            by_length = long_U.nonzero()[:, 0]
        piece_P = torch.arange(pieces, device=starts_U1.device)
        row_P = torch.searchsorted(end_U, piece_P, right=True)
        inside_P = row_P.clamp(max=max(rows - 1, 0))
        number_P = piece_P - (end_U - count_U)[inside_P]
        first_P = starts_U1[inside_P] + number_P * PIECE
        stop_P = torch.minimum(first_P + PIECE, starts_U1[inside_P + 1])
        slot_P = torch.where(long_U[inside_P], slot_U[inside_P] + number_P, -1)
        row_P = torch.where(row_P < rows, row_P, -1)
        long_J = torch.where(long_U[by_length], by_length, -1)
        return cls(
            torch.stack((row_P, first_P, stop_P, slot_P), dim=1),
            torch.stack((long_J, slot_U[by_length], count_U[by_length]), dim=1),
            slots,
        )


class RowIndex(NamedTuple):
    """Which row every token uses, and the tokens sorted by row (so that nothing sorts twice).

    Attributes:
        inverse_T: row of each token, int64 [T], 0 <= inverse < U.
        order_T: positions of the tokens sorted by row, ties in token order, int64 [T].
        starts_U1: where the tokens of each row begin in `order_T`, int64 [U+1], the last one T.
        pieces: the rows cut up, for a GPU; None where nobody has asked yet.
    """

    inverse_T: Tensor
    order_T: Tensor
    starts_U1: Tensor
    pieces: Pieces | None = None

    def cut(self) -> RowIndex:
        """Return the same index with its pieces."""
        if self.pieces is not None:
            return self
        return self._replace(pieces=Pieces.of(self.starts_U1, self.order_T.shape[0]))

    def to(self, device: torch.device) -> RowIndex:
        """Return the same index on another device; to a GPU in one copy that nothing waits for."""
        tensors = [*self[:3], *(self.pieces[:2] if self.pieces is not None else ())]
        if device.type != "cuda" or self.inverse_T.is_cuda:
            moved = [t.to(device) for t in tensors]
        else:
            sizes = [t.numel() for t in tensors]
            packed = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
            torch.cat([t.reshape(-1) for t in tensors], out=packed)
            parts = torch.split(packed.to(device, non_blocking=True), sizes)
            moved = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
        pieces = None if self.pieces is None else Pieces(moved[3], moved[4], self.pieces.slots)
        return RowIndex(moved[0], moved[1], moved[2], pieces)


def unique_ids(ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sorted unique ids [U] and every token's place among them [T], all int64."""
    unique_U, inverse_T = torch.unique(ids_T, sorted=True, return_inverse=True)
    return unique_U, inverse_T


def unique_index(ids_T: Tensor) -> tuple[Tensor, RowIndex]:
    """Return the sorted unique ids [U] and the index of the tokens that use them, from one sort.

    The same as `unique_ids` and then `row_index`.
    """
    sorted_T, order_T = torch.sort(ids_T, stable=True)
    first_T = torch.ones_like(sorted_T, dtype=torch.bool)
    torch.ne(sorted_T[1:], sorted_T[:-1], out=first_T[1:])
    starts_U = first_T.nonzero()[:, 0]
    inverse_T = torch.empty_like(order_T)
    inverse_T[order_T] = first_T.cumsum(0).sub_(1)
    starts_U1 = torch.cat((starts_U, starts_U.new_tensor([ids_T.shape[0]])))
    return sorted_T[starts_U], RowIndex(inverse_T, order_T, starts_U1)


def row_index(inverse_T: Tensor, rows: int) -> RowIndex:
    """Sort tokens by row; no host synchronisation.

    Args:
        inverse_T: row of each token, int64 [T].
        rows: U, an upper bound of `inverse_T`.
    """
    sorted_T, order_T = torch.sort(inverse_T, stable=True)
    edges = torch.arange(rows + 1, dtype=inverse_T.dtype, device=inverse_T.device)
    return RowIndex(inverse_T, order_T, torch.searchsorted(sorted_T, edges))


def segment_sum(
    grad_TW: Tensor,
    index: RowIndex,
    *,
    dtype: torch.dtype | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Sum `grad_TW` over the tokens of each row, in token order, accumulated in fp32.

    Args:
        grad_TW: fp32 or bf16 [T, W].
        index: the tokens of each row.
        dtype: of the result; default that of `grad_TW`.
        implementation: "naive" (fp64 oracle), "torch" (embedding_bag), "triton" (GPU), or "auto".

    Returns:
        [U, W]; rows without a token are 0.

    Raises:
        ValueError: unknown implementation, or an index of another number of tokens.
    """
    if grad_TW.dim() != 2 or grad_TW.shape[0] != index.order_T.shape[0]:
        raise ValueError(
            f"segment_sum: gradient of shape {tuple(grad_TW.shape)} for an index of "
            f"{index.order_T.shape[0]} tokens"
        )
    dtype = dtype or grad_TW.dtype
    if implementation == "auto":
        implementation = "triton" if grad_TW.is_cuda else "torch"
    if implementation == "naive":
        return _segment_sum_naive(grad_TW, index, dtype)
    if implementation == "triton":
        from kernels.rows_triton import segment_sum_triton

        return segment_sum_triton(grad_TW, index.order_T, index.starts_U1, dtype)
    if implementation != "torch":
        raise ValueError(
            f"segment_sum: implementation {implementation!r} is none of auto, naive, torch, triton"
        )
    if index.order_T.shape[0] == 0:
        return grad_TW.new_zeros((index.starts_U1.shape[0] - 1, grad_TW.shape[1]), dtype=dtype)
    # Summing bf16 into fp32 needs fp32 terms here: embedding_bag's result has its input's type.
    weight = grad_TW.to(dtype) if dtype == torch.float32 else grad_TW
    return torch.embedding_bag(
        weight.contiguous(), index.order_T, index.starts_U1, False, 0, False, None, True
    )[0].to(dtype)


def _segment_sum_naive(grad_TW: Tensor, index: RowIndex, dtype: torch.dtype) -> Tensor:
    rows = index.starts_U1.shape[0] - 1
    out_UW = torch.zeros(rows, grad_TW.shape[1], dtype=torch.float64, device=grad_TW.device)
    for token, row in enumerate(index.inverse_T.tolist()):
        out_UW[row] += grad_TW[token].double()
    return out_UW.to(dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_UW: Tensor, index: RowIndex) -> Tensor:
        ctx.index = index
        return values_UW.index_select(0, index.inverse_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> tuple[Tensor | None, ...]:
        return segment_sum(grad_TW, ctx.index), None


def gather_rows(values_UW: Tensor, index: Tensor | RowIndex) -> Tensor:
    """Return the row of every token, [T, W], differentiable in `values_UW`.

    The backward is a segment sum in fixed order. It makes a gradient of the shape of `values_UW`,
    so give it one layer's columns (see `split_layers`), not a slice of all layers' rows.

    Args:
        values_UW: rows, fp32 or bf16 [U, W], any strides.
        index: inverse_T int64 [T], or a `RowIndex` when several gathers share it.
    """
    if not isinstance(index, RowIndex):
        index = row_index(index, values_UW.shape[0])
    return _GatherRows.apply(values_UW, index)  # type: ignore[no-any-return, no-untyped-call]


def split_layers(values_UW: Tensor, layers: int) -> tuple[Tensor, ...]:
    """Return views [U, W] of the columns of each layer of rows [U, L*W], without a copy.

    The backward stacks the layers' gradients once: L*W columns are written once, whatever L.

    Raises:
        ValueError: the width is no multiple of `layers`.
    """
    rows, width = values_UW.shape
    if layers < 1 or width % layers:
        raise ValueError(f"rows of {width} columns do not split into {layers} layers")
    return values_UW.view(rows, layers, width // layers).unbind(1)
