"""Rows between tokens and pairs: out to a token's pairs, and summed back, in a fixed order.

Both go token by token: a token's row is read (or written) once, however many experts it fired, and
the rows of its pairs are touched in the order of the experts. No atomics, and nothing behind the
last group is read or written.

Shapes: T tokens, P rows, K slots of a token, W columns of a row, E experts, C width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _spread_kernel(  # type: ignore[no-untyped-def]
    x_ptr, slot_ptr, token_ptr, end_ptr, rows_ptr, T,
    W: tl.constexpr, K: tl.constexpr, ALIGN: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    columns = tl.arange(0, BLOCK_W)
    mask = columns < W
    if pid < T:
        t = pid.to(tl.int64)
        row = tl.load(x_ptr + t * W + columns, mask=mask, other=0.0)
        for k in range(K):
            place = tl.load(slot_ptr + t * K + k)
            if place >= 0:
                tl.store(rows_ptr + place.to(tl.int64) * W + columns, row, mask=mask)
    else:
        # Every PARTS-th padding row of one expert.
        part = pid - T
        end = tl.load(end_ptr + part // PARTS)
        start = 0
        if part >= PARTS:
            start = tl.load(end_ptr + part // PARTS - 1)
        zero = tl.zeros([BLOCK_W], dtype=rows_ptr.dtype.element_ty)
        for back in range(1 + part % PARTS, ALIGN, PARTS):
            padding = end - back
            if padding >= start:  # noqa: SIM102 (both sides of an `and` would be evaluated)
                if tl.load(token_ptr + padding) < 0:
                    tl.store(rows_ptr + padding.to(tl.int64) * W + columns, zero, mask=mask)


def spread_triton(
    x_TW: Tensor, slot_TK: Tensor, token_P: Tensor, ends_E: Tensor, align: int
) -> Tensor:
    """Copy every token's row to the rows of its pairs, [P, W]; padding rows become zero.

    Args:
        x_TW: contiguous rows.
        slot_TK: see `Routing`.
        token_P: see `Routing`.
        ends_E: see `Routing`.
        align: of the groups.
    """
    (T, W), P, K = x_TW.shape, token_P.shape[0], slot_TK.shape[1]
    x_PW = torch.empty(P, W, dtype=x_TW.dtype, device=x_TW.device)
    parts = 8
    block = triton.next_power_of_2(W)
    _spread_kernel[(T + (ends_E.shape[0] * parts if align > 1 else 0),)](
        x_TW, slot_TK, token_P, ends_E, x_PW, T,
        W=W, K=K, ALIGN=align, PARTS=parts, BLOCK_W=block,
        num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return x_PW


@triton.jit  # type: ignore[untyped-decorator]
def _norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, norm_ptr, W: tl.constexpr, BLOCK_W: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_W)
    x = tl.load(x_ptr + t * W + columns, mask=columns < W, other=0.0).to(tl.float32)
    tl.store(norm_ptr + t, tl.sqrt(tl.sum(x * x, axis=0)))


def norm_triton(x_TW: Tensor) -> Tensor:
    """Norm of every row, fp32 [T]."""
    T, W = x_TW.shape
    norm_T = torch.empty(T, dtype=torch.float32, device=x_TW.device)
    block = triton.next_power_of_2(W)
    _norm_kernel[(T,)](x_TW, norm_T, W=W, BLOCK_W=block, num_warps=max(1, min(8, block // 512)))
    return norm_T


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, slot_ptr, gate_ptr, out_ptr,
    W: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_W)
    mask = columns < W
    total = tl.zeros([BLOCK_W], dtype=tl.float32)
    # Unrolled and without branches, so that the rows are fetched at the same time.
    for k in tl.static_range(K):
        place = tl.load(slot_ptr + t * K + k)
        gate = tl.load(gate_ptr + t * K + k)
        # A row of weight 0 (explored) is not fetched.
        width = tl.where((place >= 0) & (gate != 0), W, 0)
        row_at = rows_ptr + place.to(tl.int64) * W + columns
        row = tl.load(row_at, mask=columns < width, other=0.0)
        row = row.to(tl.float32)
        if WEIGHTED:
            row *= gate
        total += row
    tl.store(out_ptr + t * W + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine_triton(rows_PW: Tensor, slot_TK: Tensor, gate_TK: Tensor, weighted: bool) -> Tensor:
    """Sum every token's fired rows, times their gates if `weighted`, fp32 inside; [T, W]."""
    (T, K), W = slot_TK.shape, rows_PW.shape[1]
    out_TW = torch.empty(T, W, dtype=rows_PW.dtype, device=rows_PW.device)
    block = triton.next_power_of_2(W)
    _combine_kernel[(T,)](
        rows_PW, slot_TK, gate_TK, out_TW, W=W, K=K, WEIGHTED=weighted, BLOCK_W=block,
        num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return out_TW


@triton.jit  # type: ignore[untyped-decorator]
def _combine_dx_kernel(  # type: ignore[no-untyped-def]
    rows_ptr, slot_ptr, gate_ptr, x_ptr, a_ptr, centre_ptr, w_ptr, out_ptr, T,
    C: tl.constexpr, E: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    experts = tl.arange(0, BLOCK_E)
    token_mask, column_mask, expert_mask = tokens < T, columns < C, experts < E
    wide = tokens.to(tl.int64)
    mask = token_mask[:, None] & column_mask[None, :]
    a = tl.load(
        a_ptr + wide[:, None] * E + experts[None, :],
        mask=token_mask[:, None] & expert_mask[None, :],
        other=0.0,
    )
    w = tl.load(
        w_ptr + experts[:, None] * C + columns[None, :],
        mask=expert_mask[:, None] & column_mask[None, :],
        other=0.0,
    )
    if HALF:
        # Two bf16 parts of an fp32 factor: the product keeps 16 bits of it.
        high = a.to(tl.bfloat16)
        low = (a - high.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(low, w)
        total = tl.dot(high, w, total)
    else:
        total = tl.dot(a, w.to(tl.float32), input_precision="ieee")
    at = wide[:, None] * C + columns[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    centre = tl.load(centre_ptr + tokens, mask=token_mask, other=0.0)
    total -= x * centre[:, None]
    for k in tl.static_range(K):
        place = tl.load(slot_ptr + wide * K + k, mask=token_mask, other=-1)
        gate = tl.load(gate_ptr + wide * K + k, mask=token_mask, other=0.0)
        has = ((place >= 0) & (gate != 0))[:, None] & column_mask[None, :]
        row_at = rows_ptr + place.to(tl.int64)[:, None] * C + columns[None, :]
        total += tl.load(row_at, mask=has, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine_dx_triton(
    rows_PC: Tensor,
    slot_TK: Tensor,
    gate_TK: Tensor,
    x_TC: Tensor,
    a_TE: Tensor,
    centre_T: Tensor,
    direction_EC: Tensor,
) -> Tensor:
    """Gradient of x: its fired rows summed, plus the cosines' part a @ direction - centre * x.

    Args:
        rows_PC: gradient rows, their gates included.
        slot_TK: see `Routing`.
        gate_TK: see `Routing`; only tells fired rows from explored ones.
        x_TC: tokens.
        a_TE: gradient of the cosines times both inverse norms, fp32.
        centre_T: sum over experts of gradient * cosine, times 1 / |x|^2, fp32.
        direction_EC: the experts' directions.
    """
    (T, C), E, K = x_TC.shape, a_TE.shape[1], slot_TK.shape[1]
    out_TC = torch.empty_like(x_TC)
    half = x_TC.dtype == torch.bfloat16 and direction_EC.dtype == torch.bfloat16
    # An fp32 product has no tensor core and keeps its operands in registers.
    block_t, block_c = 16, min(128 if half else 32, max(16, triton.next_power_of_2(C)))
    _combine_dx_kernel[(triton.cdiv(T, block_t), triton.cdiv(C, block_c))](
        rows_PC, slot_TK, gate_TK, x_TC, a_TE, centre_T, direction_EC, out_TC, T,
        C=C, E=E, K=K, HALF=half, BLOCK_T=block_t, BLOCK_C=block_c,
        BLOCK_E=max(16, triton.next_power_of_2(E)), num_warps=4,
    )  # fmt: skip
    return out_TC
