"""Rows of a table, each used by many tokens: gather forward, fixed-order segment sum backward.

A batch uses each unique id once in `values_UW` and points to it from every token. The backward adds
up the gradients of a row's tokens in the order of the tokens, in fp32, without atomics, so that the
same batch gives the same bits.

Several layers share one row `[U, L*W]`. Slicing its columns per layer makes autograd build a zero
tensor of the whole size for every layer; `split_layers` makes L views whose gradients are stacked
once.

Shapes: T tokens, U unique rows, W columns, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RowIndex(NamedTuple):
    """Which row every token uses, and the tokens sorted by row (so that nothing sorts twice).

    Attributes:
        inverse_T: row of each token, int64 [T], 0 <= inverse < U.
        order_T: positions of the tokens sorted by row, ties in token order, int64 [T].
        starts_U1: where the tokens of each row begin in `order_T`, int64 [U+1], the last one T.
    """

    inverse_T: Tensor
    order_T: Tensor
    starts_U1: Tensor

    def to(self, device: torch.device) -> RowIndex:
        """Return the same index on another device; to a GPU in one copy that nothing waits for."""
        if device.type != "cuda" or self.inverse_T.is_cuda:
            return RowIndex(*(t.to(device) for t in self))
        sizes = [t.shape[0] for t in self]
        packed = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=True)
        torch.cat(tuple(self), out=packed)
        return RowIndex(*torch.split(packed.to(device, non_blocking=True), sizes))


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
    def forward(
        ctx: Any, values_UW: Tensor, inverse_T: Tensor, order_T: Tensor, starts_U1: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inverse_T, order_T, starts_U1)
        return values_UW.index_select(0, inverse_T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> tuple[Tensor | None, ...]:
        return segment_sum(grad_TW, RowIndex(*ctx.saved_tensors)), None, None, None


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
    return _GatherRows.apply(values_UW, *index)  # type: ignore[no-any-return, no-untyped-call]


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TW: Tensor, values_UW: Tensor, residual_TW: Tensor | None, *index: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TW, values_UW, *index)
        ctx.has_residual = residual_TW is not None
        inverse_T = index[0]
        if x_TW.is_cuda:
            from kernels.rows_triton import modulate_triton

            return modulate_triton(x_TW, values_UW, inverse_T, residual_TW)
        delta_TW = values_UW.index_select(0, inverse_T).to(x_TW.dtype)
        y_TW = torch.addcmul(x_TW, x_TW, delta_TW)
        return y_TW if residual_TW is None else residual_TW + y_TW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> tuple[Tensor | None, ...]:
        x_TW, values_UW, *rest = ctx.saved_tensors
        index = RowIndex(*rest)
        residual = grad_TW if ctx.has_residual else None
        if grad_TW.is_cuda:
            from kernels.rows_triton import modulate_backward_triton

            grads = modulate_backward_triton(grad_TW, x_TW, values_UW, index)
            return *grads, residual, None, None, None
        delta_TW = values_UW.index_select(0, index.inverse_T).to(x_TW.dtype)
        grad_x_TW = torch.addcmul(grad_TW, grad_TW, delta_TW)
        product_TW = grad_TW.float() * x_TW.float()
        return (
            grad_x_TW,
            segment_sum(product_TW, index, dtype=torch.float32).to(values_UW.dtype),
            residual,
            *(None, None, None),
        )


def modulate(
    x_TW: Tensor,
    values_UW: Tensor,
    index: Tensor | RowIndex,
    residual_TW: Tensor | None = None,
) -> Tensor:
    """Return residual + x * (1 + value of the token's row), [T, W], differentiable in all three.

    Computed as x + x * value: in bf16 1 + value itself would lose every value below 1/256. On a GPU
    one kernel each way, with one rounding; the backward sums the rows' gradients in token order.

    Args:
        x_TW: fp32 or bf16.
        values_UW: rows, fp32 or bf16 [U, W], unit stride along W on a GPU.
        index: inverse_T int64 [T], or a `RowIndex` when several calls share it.
        residual_TW: added to the result, of the type of `x_TW`; None adds nothing.
    """
    if not isinstance(index, RowIndex):
        index = row_index(index, values_UW.shape[0])
    return _Modulate.apply(x_TW, values_UW, residual_TW, *index)  # type: ignore[no-any-return, no-untyped-call]


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
