"""Gradient of the queries through the compressed and the sliding branch, in one pass over both."""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.nsa.triton_config import TileConfig, pow2
from kernels.nsa.triton_interval import LOG2_E, column_of, load_tile, tile_range, tile_sources


@triton.jit
def _dq_step(
    acc,
    q,
    do,
    lse,
    delta,
    k_src,
    v_src,
    k_column,
    v_column,
    n0,
    low,
    high,
    stop,
    scale_log2,
    stride_kn,
    stride_vn,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    k = load_tile(k_src, n0, k_column, stride_kn, stop, D, BD, BN, TMA, MASKED)
    v = load_tile(v_src, n0, v_column, stride_vn, stop, DV, BDV, BN, TMA, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    p = tl.exp2(s * scale_log2 - lse[:, None])
    ds = p * (dp - delta[:, None])
    if MASKED:
        n = n0 + tl.arange(0, BN)
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        ds = tl.where(visible, ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit
def _dq_branch(
    acc,
    q,
    do,
    k_src,
    v_src,
    lse_ptr,
    delta_ptr,
    low_ptr,
    high_ptr,
    scale_log2,
    first,
    last,
    head,
    T,
    stride_kn,
    stride_kg,
    stride_vn,
    stride_vg,
    HG: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    rows = first + tl.arange(0, BM)
    inside = rows < T
    group = head // HG
    at = head.to(tl.int64) * T + rows
    lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    low = tl.load(low_ptr + rows, mask=inside, other=0)
    high = tl.load(high_ptr + rows, mask=inside, other=0)
    start, stop, full_low, full_high = tile_range(low_ptr, high_ptr, first, last, BN)
    k_column = column_of(group, stride_kg, D, TMA)
    v_column = column_of(group, stride_vg, DV, TMA)
    for n0 in range(full_low, full_high, BN):
        acc = _dq_step(
            acc, q, do, lse, delta, k_src, v_src, k_column, v_column, n0, low, high, stop,
            scale_log2, stride_kn, stride_vn, D, DV, BD, BDV, BN, TMA, False,
        )  # fmt: skip
    before = (full_low - start) // BN
    after = tl.cdiv(tl.maximum(stop - full_high, 0), BN)
    for i in range(0, before + after):
        n0 = tl.where(i < before, start + i * BN, full_high + (i - before) * BN)
        acc = _dq_step(
            acc, q, do, lse, delta, k_src, v_src, k_column, v_column, n0, low, high, stop,
            scale_log2, stride_kn, stride_vn, D, DV, BD, BDV, BN, TMA, True,
        )  # fmt: skip
    return acc


@triton.jit
def interval_grad_q_kernel(
    q_ptr,
    do_ptr,
    dq_ptr,
    k1_src,
    v1_src,
    k2_src,
    v2_src,
    lse_ptr,
    delta_ptr,
    low1_ptr,
    high1_ptr,
    low2_ptr,
    high2_ptr,
    scale,
    scale_log2,
    T,
    H,
    stride_qt,
    stride_qh,
    stride_dt,
    stride_dh,
    stride_k1n,
    stride_k1g,
    stride_v1n,
    stride_v1g,
    stride_k2n,
    stride_k2g,
    stride_v2n,
    stride_v2g,
    HG: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ADD: tl.constexpr,
    TMA: tl.constexpr,
):
    """dq[t, h] of the compressed (FIRST) and the sliding (SECOND) branch, plus what dq held (ADD).

    Both share one accumulator: q and do are read once and dq is rounded once.
    """
    head = tl.program_id(0)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    last = tl.minimum(first + BM, T) - 1
    rows = first + tl.arange(0, BM)
    inside = rows < T
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    q_mask = inside[:, None] & (d < D)[None, :]
    q_at = rows.to(tl.int64)[:, None] * stride_qt + head * stride_qh + d[None, :]
    q = tl.load(q_ptr + q_at, mask=q_mask, other=0.0)
    do = tl.load(
        do_ptr + rows.to(tl.int64)[:, None] * stride_dt + head * stride_dh + dv[None, :],
        mask=inside[:, None] & (dv < DV)[None, :],
        other=0.0,
    )
    acc = tl.zeros((BM, BD), tl.float32)
    if FIRST:
        acc = _dq_branch(
            acc, q, do, k1_src, v1_src, lse_ptr, delta_ptr, low1_ptr, high1_ptr,
            scale_log2, first, last, head, T, stride_k1n, stride_k1g, stride_v1n, stride_v1g,
            HG, D, DV, BD, BDV, BM, BN, TMA,
        )  # fmt: skip
    if SECOND:
        skip = tl.num_programs(0).to(tl.int64) * T
        acc = _dq_branch(
            acc, q, do, k2_src, v2_src, lse_ptr + skip, delta_ptr + skip,
            low2_ptr, high2_ptr, scale_log2, first, last, head, T,
            stride_k2n, stride_k2g, stride_v2n, stride_v2g, HG, D, DV, BD, BDV, BM, BN, TMA,
        )  # fmt: skip
    acc *= scale
    dq_at = dq_ptr + (rows.to(tl.int64)[:, None] * H + head) * D + d[None, :]
    if ADD:
        acc += tl.load(dq_at, mask=q_mask, other=0.0).to(tl.float32)
    tl.store(dq_at, acc.to(dq_ptr.dtype.element_ty), mask=q_mask)


def interval_grad_q(
    dq_THD: Tensor,
    q_THD: Tensor,
    do_THD: Tensor,
    compressed: tuple[Tensor, Tensor, Tensor, Tensor],
    window: tuple[Tensor, Tensor, Tensor, Tensor],
    lse_2HT: Tensor,
    delta_2HT: Tensor,
    scale: float,
    config: TileConfig,
    *,
    branches: tuple[bool, bool] = (True, True),
    add: bool,
) -> None:
    """Write (or add to) dq_THD the gradient through both interval branches.

    `compressed` and `window` are (k, v, low_T, high_T); the [2, H, T] fp32 tensors hold the
    base-2 log-sum-exp folded with the gate and do . o of the compressed, then the sliding branch.
    """
    T, H, D = q_THD.shape
    k1, v1, low1, high1 = compressed
    k2, v2, low2, high2 = window
    G, DV = v1.shape[1:]
    (k1s, v1s, k2s, v2s), tma = tile_sources(config.BN, k1, v1, k2, v2)
    interval_grad_q_kernel[(H, triton.cdiv(T, config.BM))](
        q_THD,
        do_THD,
        dq_THD,
        k1s,
        v1s,
        k2s,
        v2s,
        lse_2HT,
        delta_2HT,
        low1,
        high1,
        low2,
        high2,
        scale,
        scale * LOG2_E,
        T,
        H,
        q_THD.stride(0),
        q_THD.stride(1),
        do_THD.stride(0),
        do_THD.stride(1),
        k1.stride(0),
        k1.stride(1),
        v1.stride(0),
        v1.stride(1),
        k2.stride(0),
        k2.stride(1),
        v2.stride(0),
        v2.stride(1),
        HG=H // G,
        D=D,
        DV=DV,
        BD=pow2(D),
        BDV=pow2(DV),
        BM=config.BM,
        BN=config.BN,
        FIRST=branches[0],
        SECOND=branches[1],
        ADD=add,
        TMA=tma,
        num_warps=config.warps,
        num_stages=config.stages,
    )
