"""Segment sum and modulation on a GPU.

Segment sum: one program sums a block of columns of one row over the row's tokens.

A frequent id owns hundreds of tokens, so tokens are read in tiles rather than one by one; tiles are
added in order and a tile's own sum is a fixed tree, so the bits depend on the input alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.rows import RowIndex


@triton.jit  # type: ignore[untyped-decorator]
def _segment_sum_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    order_ptr,
    starts_ptr,
    out_ptr,
    width,
    grad_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    start = tl.load(starts_ptr + row)
    end = tl.load(starts_ptr + row + 1)
    total = tl.zeros([BLOCK_W], dtype=tl.float32)
    for at in range(start, end, BLOCK_T):
        places = at + tl.arange(0, BLOCK_T)
        tokens = tl.load(order_ptr + places, mask=places < end, other=0)
        mask = (places < end)[:, None] & (columns < width)[None, :]
        tile = tl.load(grad_ptr + tokens[:, None] * grad_stride + columns[None, :], mask, other=0.0)
        total += tl.sum(tile.to(tl.float32), axis=0)
    tl.store(
        out_ptr + row * width + columns, total.to(out_ptr.dtype.element_ty), mask=columns < width
    )


def segment_sum_triton(
    grad_TW: Tensor, order_T: Tensor, starts_U1: Tensor, dtype: torch.dtype
) -> Tensor:
    """Sum [T, W] over the tokens of each row; see `kernels.rows.segment_sum`.

    Args:
        grad_TW: fp32 or bf16 [T, W], unit stride along W (copied otherwise).
        order_T: token positions sorted by row, int64 [T].
        starts_U1: first place of each row in `order_T`, int64 [U+1].
        dtype: of the result [U, W].
    """
    if grad_TW.stride(1) != 1:
        grad_TW = grad_TW.contiguous()
    rows, width = starts_U1.shape[0] - 1, grad_TW.shape[1]
    out_UW = torch.empty(rows, width, dtype=dtype, device=grad_TW.device)
    if rows == 0 or width == 0:
        return out_UW
    block_w = min(256, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block_w))
    _segment_sum_kernel[grid](
        grad_TW, order_T, starts_U1, out_UW, width, grad_TW.stride(0), BLOCK_T=16, BLOCK_W=block_w
    )
    return out_UW


@triton.jit  # type: ignore[untyped-decorator]
def _modulate_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    values_ptr,
    inverse_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    width,
    values_stride,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    rows = tl.load(inverse_ptr + places, mask=places < tokens, other=0)
    mask = (places < tokens)[:, None] & (columns < width)[None, :]
    at = places[:, None] * width + columns[None, :]
    x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    value = tl.load(values_ptr + rows[:, None] * values_stride + columns[None, :], mask, other=0.0)
    y = x + x * value.to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit  # type: ignore[untyped-decorator]
def _modulate_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    x_ptr,
    values_ptr,
    order_ptr,
    starts_ptr,
    grad_x_ptr,
    grad_values_ptr,
    width,
    values_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = columns < width
    start = tl.load(starts_ptr + row)
    end = tl.load(starts_ptr + row + 1)
    value = tl.load(values_ptr + row * values_stride + columns, mask=inside, other=0.0)
    value = value.to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_W], dtype=tl.float32)
    for at in range(start, end, BLOCK_T):
        places = at + tl.arange(0, BLOCK_T)
        tokens = tl.load(order_ptr + places, mask=places < end, other=0)
        mask = (places < end)[:, None] & inside[None, :]
        element = tokens[:, None] * width + columns[None, :]
        grad = tl.load(grad_ptr + element, mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + element, mask, other=0.0).to(tl.float32)
        total += tl.sum(grad * x, axis=0)
        grad_x = grad + grad * value
        tl.store(grad_x_ptr + element, grad_x.to(grad_x_ptr.dtype.element_ty), mask)
    tl.store(
        grad_values_ptr + row * width + columns,
        total.to(grad_values_ptr.dtype.element_ty),
        mask=inside,
    )


def modulate_triton(
    x_TW: Tensor, values_UW: Tensor, inverse_T: Tensor, residual_TW: Tensor | None
) -> Tensor:
    """Return residual + x * (1 + value), [T, W]; see `kernels.rows.modulate`."""
    x_TW, values_UW = x_TW.contiguous(), _unit_columns(values_UW)
    residual = x_TW if residual_TW is None else residual_TW.contiguous()
    out_TW = torch.empty_like(x_TW)
    tokens, width = x_TW.shape
    if tokens == 0 or width == 0:
        return out_TW
    block_w = min(512, triton.next_power_of_2(width))
    grid = (triton.cdiv(tokens, 4), triton.cdiv(width, block_w))
    _modulate_kernel[grid](
        x_TW,
        values_UW,
        inverse_T,
        residual,
        out_TW,
        tokens,
        width,
        values_UW.stride(0),
        HAS_RESIDUAL=residual_TW is not None,
        BLOCK_T=4,
        BLOCK_W=block_w,
    )
    return out_TW


def modulate_backward_triton(
    grad_TW: Tensor, x_TW: Tensor, values_UW: Tensor, index: RowIndex
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [T, W] and of the rows [U, W]; see `kernels.rows.modulate`.

    Every token belongs to one row, so that a row's program writes its tokens' gradients, too.
    """
    grad_TW, x_TW, values_UW = grad_TW.contiguous(), x_TW.contiguous(), _unit_columns(values_UW)
    grad_x_TW = torch.empty_like(x_TW)
    rows, width = values_UW.shape
    grad_UW = torch.empty(rows, width, dtype=values_UW.dtype, device=values_UW.device)
    if rows == 0 or width == 0:
        return grad_x_TW, grad_UW
    block_w = min(256, triton.next_power_of_2(width))
    _modulate_backward_kernel[(rows, triton.cdiv(width, block_w))](
        grad_TW,
        x_TW,
        values_UW,
        index.order_T,
        index.starts_U1,
        grad_x_TW,
        grad_UW,
        width,
        values_UW.stride(0),
        BLOCK_T=8,
        BLOCK_W=block_w,
    )
    return grad_x_TW, grad_UW


def _unit_columns(values_UW: Tensor) -> Tensor:
    return values_UW if values_UW.stride(1) == 1 else values_UW.contiguous()
