"""Modulation on a GPU: the kernels of `kernels.modulate`.

Forward: tiles of tokens. Backward: a program takes a piece of a row's tokens, a few at a time, as
most rows have only a few and idle lanes cost as much as busy ones. It writes their gradients and
sums the row's own. Rows of several pieces get their sum from a second kernel, in the order of the
pieces. So the bits depend on the input alone, and the most frequent id is no loop over hundreds of
tokens.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Launcher
from kernels.rows import RowIndex


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _modulate_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    values_ptr,
    inverse_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    WIDTH: tl.constexpr,
    VALUES_STRIDE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    rows = tl.load(inverse_ptr + places, mask=places < tokens, other=0)
    mask = (places < tokens)[:, None] & (columns < WIDTH)[None, :]
    at = places[:, None] * WIDTH + columns[None, :]
    x = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    value = tl.load(values_ptr + rows[:, None] * VALUES_STRIDE + columns[None, :], mask, other=0.0)
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
    pieces_ptr,
    grad_x_ptr,
    grad_values_ptr,
    partial_ptr,
    WIDTH: tl.constexpr,
    VALUES_STRIDE: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    piece = pieces_ptr + tl.program_id(0) * 4
    row = tl.load(piece)
    if row >= 0:
        start = tl.load(piece + 1)
        stop = tl.load(piece + 2)
        slot = tl.load(piece + 3)
        columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        inside = columns < WIDTH
        value = tl.load(values_ptr + row * VALUES_STRIDE + columns, mask=inside, other=0.0)
        value = value.to(tl.float32)[None, :]
        total = tl.zeros([BLOCK_W], dtype=tl.float32)
        for at in range(start, stop, BLOCK_T):
            places = at + tl.arange(0, BLOCK_T)
            tokens = tl.load(order_ptr + places, mask=places < stop, other=0)
            mask = (places < stop)[:, None] & inside[None, :]
            element = tokens[:, None] * WIDTH + columns[None, :]
            grad = tl.load(grad_ptr + element, mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + element, mask, other=0.0).to(tl.float32)
            grad_x = grad + grad * value
            tl.store(grad_x_ptr + element, grad_x.to(grad_x_ptr.dtype.element_ty), mask)
            total += tl.sum(grad * x, axis=0)
        if slot >= 0:
            tl.store(partial_ptr + slot * WIDTH + columns, total, mask=inside)
        else:
            # Perhaps over the row itself, of which this program alone reads these columns.
            target = grad_values_ptr + row * GRAD_STRIDE + columns
            tl.store(target, total.to(grad_values_ptr.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _long_rows_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    long_ptr,
    grad_values_ptr,
    WIDTH: tl.constexpr,
    GRAD_STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    at = long_ptr + tl.program_id(0) * 3
    row = tl.load(at)
    if row >= 0:
        slot = tl.load(at + 1)
        count = tl.load(at + 2)
        columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        inside = columns < WIDTH
        total = tl.zeros([BLOCK_W], dtype=tl.float32)
        for first in range(0, count, BLOCK_P):
            pieces = first + tl.arange(0, BLOCK_P)
            mask = (pieces < count)[:, None] & inside[None, :]
            element = (slot + pieces)[:, None] * WIDTH + columns[None, :]
            total += tl.sum(tl.load(partial_ptr + element, mask, other=0.0), axis=0)
        tl.store(
            grad_values_ptr + row * GRAD_STRIDE + columns,
            total.to(grad_values_ptr.dtype.element_ty),
            mask=inside,
        )


class Tile(NamedTuple):
    """What a program of the backward takes at a time."""

    tokens: int
    columns: int
    warps: int


TILE = Tile(2, 1024, 4)
_forward = Launcher(_modulate_kernel)
_long_rows = Launcher(_long_rows_kernel)


@cache
def _backward(warps: int) -> Launcher:
    return Launcher(_modulate_backward_kernel, warps)


def modulate_triton(
    x_TW: Tensor, values_UW: Tensor, inverse_T: Tensor, residual_TW: Tensor | None
) -> Tensor:
    """Return residual + x * (1 + value), [T, W]; see `kernels.modulate`."""
    x_TW, values_UW = x_TW.contiguous(), _unit_columns(values_UW)
    residual = x_TW if residual_TW is None else residual_TW.contiguous()
    out_TW = torch.empty_like(x_TW)
    tokens, width = x_TW.shape
    if tokens == 0 or width == 0:
        return out_TW
    block_w = min(512, triton.next_power_of_2(width))
    _forward(
        (-(-tokens // 4), -(-width // block_w), 1),
        *(x_TW, values_UW, inverse_T, residual, out_TW, tokens),
        *(width, values_UW.stride(0), residual_TW is not None, 4, block_w),
    )
    return out_TW


def modulate_backward_triton(
    grad_TW: Tensor,
    x_TW: Tensor,
    values_UW: Tensor,
    index: RowIndex,
    *,
    over_values: bool = False,
    tile: Tile = TILE,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x [T, W] and of the rows [U, W]; see `kernels.modulate`.

    Every token belongs to one row, so that a row's programs write its tokens' gradients, too.

    Args:
        grad_TW: of the result.
        x_TW: of the forward pass.
        values_UW: of the forward pass.
        index: of the forward pass; cut into pieces here unless it is.
        over_values: write the rows' gradient over the rows.
        tile: what a program takes at a time.
    """
    grad_TW, x_TW, unit_UW = grad_TW.contiguous(), x_TW.contiguous(), _unit_columns(values_UW)
    grad_x_TW = torch.empty_like(x_TW)
    rows, width = values_UW.shape
    if over_values:
        if unit_UW is not values_UW:
            raise ValueError(f"rows of strides {values_UW.stride()} cannot take their gradient")
        grad_UW = values_UW
    else:
        grad_UW = torch.empty(rows, width, dtype=values_UW.dtype, device=values_UW.device)
    if rows == 0 or width == 0:
        return grad_x_TW, grad_UW
    pieces = index.cut().pieces
    assert pieces is not None
    # Where every row is one piece nothing is written here.
    partial = (
        torch.empty(pieces.slots, width, dtype=torch.float32, device=x_TW.device)
        if pieces.slots
        else grad_UW
    )
    block_w = min(tile.columns, triton.next_power_of_2(width))
    stride = grad_UW.stride(0)
    _backward(tile.warps)(
        (pieces.pieces_P4.shape[0], -(-width // block_w), 1),
        *(grad_TW, x_TW, unit_UW, index.order_T, pieces.pieces_P4, grad_x_TW, grad_UW, partial),
        *(width, unit_UW.stride(0), stride, tile.tokens, block_w),
    )
    if pieces.slots:
        block_w = min(256, triton.next_power_of_2(width))
        _long_rows(
            (pieces.long_J3.shape[0], -(-width // block_w), 1),
            *(partial, pieces.long_J3, grad_UW, width, stride, 8, block_w),
        )
    return grad_x_TW, grad_UW


def _unit_columns(values_UW: Tensor) -> Tensor:
    return values_UW if values_UW.stride(1) == 1 else values_UW.contiguous()
