"""Attention of every token to one interval of keys: the compressed and the sliding branch.

Row t sees the keys [low_t, high_t), both ends never decreasing, so the keys of a tile of rows are
one range whose inner part needs no mask. The compressed branch sees slots, the sliding branch
tokens; packed documents are intervals too. The forward saves the log-sum-exp in base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.nsa.triton_config import TileConfig, pow2


@triton.jit
def _forward_step(
    acc,
    high_water,
    total,
    q,
    k_ptr,
    v_ptr,
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
    MASKED: tl.constexpr,
):
    n = n0 + tl.arange(0, BN)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    k_at = k_ptr + n.to(tl.int64)[:, None] * stride_kn + d[None, :]
    v_at = v_ptr + n.to(tl.int64)[:, None] * stride_vn + dv[None, :]
    if MASKED:
        k = tl.load(k_at, mask=(n < stop)[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(v_at, mask=(n < stop)[:, None] & (dv < DV)[None, :], other=0.0)
    else:
        if BD == D:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=(d < D)[None, :], other=0.0)
        if BDV == DV:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=(dv < DV)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        s = tl.where(visible, s, float("-inf"))
    new_high = tl.maximum(high_water, tl.max(s, 1) * scale_log2)
    p = tl.exp2(s * scale_log2 - new_high[:, None])
    shrink = tl.exp2(high_water - new_high)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    return acc, new_high, total


@triton.jit
def _tile_range(low_ptr, high_ptr, first, last, BLOCK: tl.constexpr):
    """Where the tile's keys start and stop, and the blocks in between that every row sees whole."""
    start = tl.load(low_ptr + first) // BLOCK * BLOCK
    stop = tl.load(high_ptr + last)
    full_low = tl.cdiv(tl.load(low_ptr + last), BLOCK) * BLOCK
    full_high = tl.load(high_ptr + first) // BLOCK * BLOCK
    empty = full_low >= full_high
    full_low = tl.where(empty, start, full_low)
    full_high = tl.where(empty, start, full_high)
    return start, stop, full_low, full_high


@triton.jit
def interval_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    low_ptr,
    high_ptr,
    scale_log2,
    T,
    stride_qt,
    stride_qh,
    stride_kn,
    stride_kg,
    stride_vn,
    stride_vg,
    stride_ot,
    stride_oh,
    HG: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """o[t, h] = softmax(q k) v over [low_t, high_t); 0 and a log-sum-exp of 0 where it is empty."""
    head = tl.program_id(0)
    group = (head // HG).to(tl.int64)
    # Later tiles see more compressed slots: the heavy ones go first.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    last = tl.minimum(first + BM, T) - 1
    rows = first + tl.arange(0, BM)
    inside = rows < T
    low = tl.load(low_ptr + rows, mask=inside, other=0)
    high = tl.load(high_ptr + rows, mask=inside, other=0)
    start, stop, full_low, full_high = _tile_range(low_ptr, high_ptr, first, last, BN)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    q = tl.load(
        q_ptr + rows.to(tl.int64)[:, None] * stride_qt + head * stride_qh + d[None, :],
        mask=inside[:, None] & (d < D)[None, :],
        other=0.0,
    )
    k_ptr += group * stride_kg
    v_ptr += group * stride_vg
    acc = tl.zeros((BM, BDV), tl.float32)
    # Finite, so that a row that sees nothing never computes inf - inf.
    high_water = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for n0 in range(full_low, full_high, BN):
        acc, high_water, total = _forward_step(
            acc, high_water, total, q, k_ptr, v_ptr, n0, low, high, stop, scale_log2,
            stride_kn, stride_vn, D, DV, BD, BDV, BN, False,
        )  # fmt: skip
    before = (full_low - start) // BN
    after = tl.cdiv(tl.maximum(stop - full_high, 0), BN)
    for i in range(0, before + after):
        n0 = tl.where(i < before, start + i * BN, full_high + (i - before) * BN)
        acc, high_water, total = _forward_step(
            acc, high_water, total, q, k_ptr, v_ptr, n0, low, high, stop, scale_log2,
            stride_kn, stride_vn, D, DV, BD, BDV, BN, True,
        )  # fmt: skip
    some = total > 0
    safe = tl.where(some, total, 1.0)
    acc = acc / safe[:, None]
    lse = tl.where(some, high_water + tl.log2(safe), 0.0)
    tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse, mask=inside)
    tl.store(
        o_ptr + rows.to(tl.int64)[:, None] * stride_ot + head * stride_oh + dv[None, :],
        acc.to(o_ptr.dtype.element_ty),
        mask=inside[:, None] & (dv < DV)[None, :],
    )


@triton.jit
def _dq_step(
    acc,
    q,
    do,
    lse,
    delta,
    gate,
    k_ptr,
    v_ptr,
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
    MASKED: tl.constexpr,
):
    n = n0 + tl.arange(0, BN)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    k_at = k_ptr + n.to(tl.int64)[:, None] * stride_kn + d[None, :]
    v_at = v_ptr + n.to(tl.int64)[:, None] * stride_vn + dv[None, :]
    if MASKED:
        k = tl.load(k_at, mask=(n < stop)[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(v_at, mask=(n < stop)[:, None] & (dv < DV)[None, :], other=0.0)
    else:
        if BD == D:
            k = tl.load(k_at)
        else:
            k = tl.load(k_at, mask=(d < D)[None, :], other=0.0)
        if BDV == DV:
            v = tl.load(v_at)
        else:
            v = tl.load(v_at, mask=(dv < DV)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    p = tl.exp2(s * scale_log2 - lse[:, None])
    ds = p * ((dp - delta[:, None]) * gate[:, None])
    if MASKED:
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        ds = tl.where(visible, ds, 0.0)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit
def _dq_branch(
    acc,
    q,
    do,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    gate_ptr,
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
):
    rows = first + tl.arange(0, BM)
    inside = rows < T
    group = (head // HG).to(tl.int64)
    at = head.to(tl.int64) * T + rows
    lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
    low = tl.load(low_ptr + rows, mask=inside, other=0)
    high = tl.load(high_ptr + rows, mask=inside, other=0)
    start, stop, full_low, full_high = _tile_range(low_ptr, high_ptr, first, last, BN)
    k_ptr += group * stride_kg
    v_ptr += group * stride_vg
    for n0 in range(full_low, full_high, BN):
        acc = _dq_step(
            acc, q, do, lse, delta, gate, k_ptr, v_ptr, n0, low, high, stop, scale_log2,
            stride_kn, stride_vn, D, DV, BD, BDV, BN, False,
        )  # fmt: skip
    before = (full_low - start) // BN
    after = tl.cdiv(tl.maximum(stop - full_high, 0), BN)
    for i in range(0, before + after):
        n0 = tl.where(i < before, start + i * BN, full_high + (i - before) * BN)
        acc = _dq_step(
            acc, q, do, lse, delta, gate, k_ptr, v_ptr, n0, low, high, stop, scale_log2,
            stride_kn, stride_vn, D, DV, BD, BDV, BN, True,
        )  # fmt: skip
    return acc


@triton.jit
def interval_grad_q_kernel(
    q_ptr,
    do_ptr,
    dq_ptr,
    k1_ptr,
    v1_ptr,
    k2_ptr,
    v2_ptr,
    lse_ptr,
    delta_ptr,
    gate_ptr,
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
            acc, q, do, k1_ptr, v1_ptr, lse_ptr, delta_ptr, gate_ptr, low1_ptr, high1_ptr,
            scale_log2, first, last, head, T, stride_k1n, stride_k1g, stride_v1n, stride_v1g,
            HG, D, DV, BD, BDV, BM, BN,
        )  # fmt: skip
    if SECOND:
        skip = tl.num_programs(0).to(tl.int64) * T
        acc = _dq_branch(
            acc, q, do, k2_ptr, v2_ptr, lse_ptr + skip, delta_ptr + skip, gate_ptr + skip,
            low2_ptr, high2_ptr, scale_log2, first, last, head, T,
            stride_k2n, stride_k2g, stride_v2n, stride_v2g, HG, D, DV, BD, BDV, BM, BN,
        )  # fmt: skip
    acc *= scale
    dq_at = dq_ptr + (rows.to(tl.int64)[:, None] * H + head) * D + d[None, :]
    if ADD:
        acc += tl.load(dq_at, mask=q_mask, other=0.0).to(tl.float32)
    tl.store(dq_at, acc.to(dq_ptr.dtype.element_ty), mask=q_mask)


@triton.jit
def _dkv_step(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    gate_ptr,
    m0,
    head,
    low,
    high,
    T,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_dt,
    stride_dh,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    MASKED: tl.constexpr,
):
    rows = m0 + tl.arange(0, BM)
    d = tl.arange(0, BD)
    e = tl.arange(0, BDV)
    q_at = q_ptr + rows.to(tl.int64)[:, None] * stride_qt + head * stride_qh + d[None, :]
    do_at = do_ptr + rows.to(tl.int64)[:, None] * stride_dt + head * stride_dh + e[None, :]
    at = head.to(tl.int64) * T + rows
    if MASKED:
        inside = rows < T
        q = tl.load(q_at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        do = tl.load(do_at, mask=inside[:, None] & (e < DV)[None, :], other=0.0)
        lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
    else:
        if BD == D:
            q = tl.load(q_at)
        else:
            q = tl.load(q_at, mask=(d < D)[None, :], other=0.0)
        if BDV == DV:
            do = tl.load(do_at)
        else:
            do = tl.load(do_at, mask=(e < DV)[None, :], other=0.0)
        lse = tl.load(lse_ptr + at)
        delta = tl.load(delta_ptr + at)
        gate = tl.load(gate_ptr + at)
    st = tl.dot(k, tl.trans(q), input_precision="ieee")
    pt = tl.exp2(st * scale_log2 - lse[None, :]) * gate[None, :]
    if MASKED:
        visible = (rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None])
        pt = tl.where(visible, pt, 0.0)
    dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")
    dpt = tl.dot(v, tl.trans(do), input_precision="ieee")
    dst = pt * (dpt - delta[None, :])
    dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def interval_grad_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
    gate_ptr,
    low_ptr,
    high_ptr,
    scale,
    scale_log2,
    T,
    NK,
    stride_qt,
    stride_qh,
    stride_dt,
    stride_dh,
    stride_kn,
    stride_kg,
    stride_vn,
    stride_vg,
    G: tl.constexpr,
    HG: tl.constexpr,
    SPLIT_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """dk, dv [splits, NK, G, D] of a tile of keys seen by the tokens [low_n, high_n).

    A program sums over SPLIT_HEADS query heads of the group; one loop runs over (head, tile), so
    that short ranges keep the pipeline full.
    """
    group = tl.program_id(0) % G
    split = tl.program_id(0) // G
    first = tl.program_id(1) * BN
    last = tl.minimum(first + BN, NK) - 1
    n = first + tl.arange(0, BN)
    inside = n < NK
    low = tl.load(low_ptr + n, mask=inside, other=0)
    high = tl.load(high_ptr + n, mask=inside, other=0)
    start, stop, full_low, full_high = _tile_range(low_ptr, high_ptr, first, last, BM)
    if last < first + BN - 1:
        full_low = start
        full_high = start
    d = tl.arange(0, BD)
    e = tl.arange(0, BDV)
    wide_group = group.to(tl.int64)
    k = tl.load(
        k_ptr + wide_group * stride_kg + n.to(tl.int64)[:, None] * stride_kn + d[None, :],
        mask=inside[:, None] & (d < D)[None, :],
        other=0.0,
    )
    v = tl.load(
        v_ptr + wide_group * stride_vg + n.to(tl.int64)[:, None] * stride_vn + e[None, :],
        mask=inside[:, None] & (e < DV)[None, :],
        other=0.0,
    )
    head0 = group * HG + split * SPLIT_HEADS
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BDV), tl.float32)
    full = (full_high - full_low) // BM
    for i in range(0, full * SPLIT_HEADS):
        head = head0 + i // full
        m0 = full_low + (i % full) * BM
        dk, dv = _dkv_step(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr, m0, head, low, high, T,
            scale_log2, stride_qt, stride_qh, stride_dt, stride_dh, D, DV, BD, BDV, BM, False,
        )  # fmt: skip
    before = (full_low - start) // BM
    rest = before + tl.cdiv(tl.maximum(stop - full_high, 0), BM)
    for i in range(0, rest * SPLIT_HEADS):
        head = head0 + i // rest
        j = i % rest
        m0 = tl.where(j < before, start + j * BM, full_high + (j - before) * BM)
        dk, dv = _dkv_step(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, gate_ptr, m0, head, low, high, T,
            scale_log2, stride_qt, stride_qh, stride_dt, stride_dh, D, DV, BD, BDV, BM, True,
        )  # fmt: skip
    row = (split.to(tl.int64) * NK + n) * G + group
    tl.store(
        dk_ptr + row[:, None] * D + d[None, :],
        (dk * scale).to(dk_ptr.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    tl.store(
        dv_ptr + row[:, None] * DV + e[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=inside[:, None] & (e < DV)[None, :],
    )


LOG2_E = 1.4426950408889634


def interval_forward(
    q_THD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    lse_HT: Tensor,
    scale: float,
    config: TileConfig,
) -> Tensor:
    """Return o [T, H, DV] in q's dtype; write the base-2 log-sum-exp, fp32, to lse_HT."""
    T, H, D = q_THD.shape
    G, DV = v_NGD.shape[1:]
    o = q_THD.new_empty(T, H, DV)
    interval_forward_kernel[(H, triton.cdiv(T, config.BM))](
        q_THD,
        k_NGD,
        v_NGD,
        o,
        lse_HT,
        low_T,
        high_T,
        scale * LOG2_E,
        T,
        q_THD.stride(0),
        q_THD.stride(1),
        k_NGD.stride(0),
        k_NGD.stride(1),
        v_NGD.stride(0),
        v_NGD.stride(1),
        o.stride(0),
        o.stride(1),
        HG=H // G,
        D=D,
        DV=DV,
        BD=pow2(D),
        BDV=pow2(DV),
        BM=config.BM,
        BN=config.BN,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return o


def interval_grad_q(
    dq_THD: Tensor,
    q_THD: Tensor,
    do_THD: Tensor,
    compressed: tuple[Tensor, Tensor, Tensor, Tensor],
    window: tuple[Tensor, Tensor, Tensor, Tensor],
    lse_2HT: Tensor,
    delta_2HT: Tensor,
    gate_2HT: Tensor,
    scale: float,
    config: TileConfig,
    *,
    branches: tuple[bool, bool] = (True, True),
    add: bool,
) -> None:
    """Write (or add to) dq_THD the gradient through both interval branches.

    `compressed` and `window` are (k, v, low_T, high_T); the [2, H, T] fp32 tensors hold the base-2
    log-sum-exp, do . o and the gate of the compressed, then the sliding branch.
    """
    T, H, D = q_THD.shape
    k1, v1, low1, high1 = compressed
    k2, v2, low2, high2 = window
    G, DV = v1.shape[1:]
    interval_grad_q_kernel[(H, triton.cdiv(T, config.BM))](
        q_THD,
        do_THD,
        dq_THD,
        k1,
        v1,
        k2,
        v2,
        lse_2HT,
        delta_2HT,
        gate_2HT,
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
        num_warps=config.warps,
        num_stages=config.stages,
    )


def interval_grad_kv(
    q_THD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    do_THD: Tensor,
    lse_HT: Tensor,
    delta_HT: Tensor,
    gate_HT: Tensor,
    low_N: Tensor,
    high_N: Tensor,
    scale: float,
    config: TileConfig,
    splits: int,
) -> tuple[Tensor, Tensor]:
    """Return dk [N, G, D] and dv [N, G, DV] of keys seen by the tokens [low_n, high_n).

    With `splits` > 1 the group's heads are dealt to that many programs, whose fp32 partial sums
    are added in a fixed order, and the result is fp32; otherwise it has k's dtype.
    """
    T, H, D = q_THD.shape
    NK, G, DV = v_NGD.shape
    dtype = torch.float32 if splits > 1 else k_NGD.dtype
    dk = torch.empty(splits, NK, G, D, dtype=dtype, device=q_THD.device)
    dv = torch.empty(splits, NK, G, DV, dtype=dtype, device=q_THD.device)
    interval_grad_kv_kernel[(G * splits, triton.cdiv(NK, config.BN))](
        q_THD,
        k_NGD,
        v_NGD,
        do_THD,
        dk,
        dv,
        lse_HT,
        delta_HT,
        gate_HT,
        low_N,
        high_N,
        scale,
        scale * LOG2_E,
        T,
        NK,
        q_THD.stride(0),
        q_THD.stride(1),
        do_THD.stride(0),
        do_THD.stride(1),
        k_NGD.stride(0),
        k_NGD.stride(1),
        v_NGD.stride(0),
        v_NGD.stride(1),
        G=G,
        HG=H // G,
        SPLIT_HEADS=H // G // splits,
        D=D,
        DV=DV,
        BD=pow2(D),
        BDV=pow2(DV),
        BM=config.BM,
        BN=config.BN,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits == 1:
        return dk[0], dv[0]
    return dk.sum(0), dv.sum(0)
