"""Segment sum on a GPU: one program sums a block of columns of one row over the row's tokens.

A frequent id owns hundreds of tokens, so tokens are read in tiles rather than one by one; tiles are
added in order and a tile's own sum is a fixed tree, so the bits depend on the input alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


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
