"""Gradient of the keys and values of the compressed and of the sliding branch."""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.nsa.triton_config import TileConfig, pow2
from kernels.nsa.triton_interval import (
    LOG2_E,
    column_of,
    gluon_takes,
    tile_range,
    tile_sources,
)
from kernels.nsa.triton_parts import (
    add_product,
    gather_parts,
    load_parts,
    load_rows,
    load_tile,
    part_widths,
    row_products,
    scale_parts,
    store_parts,
    zero_parts,
)


@triton.jit
def _dkv_step(
    dk,
    dv,
    k,
    v,
    q_src,
    do_src,
    lse_ptr,
    delta_ptr,
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
    BX: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    q_column = column_of(head, stride_qh, D, TMA)
    do_column = column_of(head, stride_dh, DV, TMA)
    q = load_parts(q_src, m0, q_column, stride_qt, T, D, BD, BX, BM, TMA, MASKED)
    do = load_tile(do_src, m0, do_column, stride_dt, T, DV, BDV, BM, TMA, MASKED)
    rows = m0 + tl.arange(0, BM)
    at = head.to(tl.int64) * T + rows
    if MASKED:
        inside = rows < T
        lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    else:
        lse = tl.load(lse_ptr + at)
        delta = tl.load(delta_ptr + at)
    st = row_products(k, q)
    pt = tl.exp2(st * scale_log2 - lse[None, :])
    if MASKED:
        visible = (rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None])
        pt = tl.where(visible, pt, 0.0)
    dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")
    dpt = tl.dot(v, tl.trans(do), input_precision="ieee")
    dst = pt * (dpt - delta[None, :])
    dk = add_product(dst.to(do.dtype), q, dk)
    return dk, dv


@triton.jit
def interval_grad_kv_kernel(
    q_src,
    k_ptr,
    v_ptr,
    do_src,
    dk_ptr,
    dv_ptr,
    lse_ptr,
    delta_ptr,
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
    BX: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
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
    start, stop, full_low, full_high = tile_range(low_ptr, high_ptr, first, last, BM)
    if last < first + BN - 1:
        full_low = start
        full_high = start
    wide_n = n.to(tl.int64)
    wide_group = group.to(tl.int64)
    k_at = wide_n * stride_kn
    k = gather_parts(k_ptr + wide_group * stride_kg, k_at, inside, D, BD, BX)
    v = load_rows(v_ptr + wide_group * stride_vg, wide_n * stride_vn, inside, DV, BDV)
    head0 = group * HG + split * SPLIT_HEADS
    dk = zero_parts(BN, BD, BX)
    dv = tl.zeros((BN, BDV), tl.float32)
    full = (full_high - full_low) // BM
    for i in range(0, full * SPLIT_HEADS):
        head = head0 + i // full
        m0 = full_low + (i % full) * BM
        dk, dv = _dkv_step(
            dk, dv, k, v, q_src, do_src, lse_ptr, delta_ptr, m0, head, low, high, T,
            scale_log2, stride_qt, stride_qh, stride_dt, stride_dh, D, DV, BD, BX, BDV, BM, TMA,
            False,
        )  # fmt: skip
    before = (full_low - start) // BM
    rest = before + tl.cdiv(tl.maximum(stop - full_high, 0), BM)
    for i in range(0, rest * SPLIT_HEADS):
        head = head0 + i // rest
        j = i % rest
        m0 = tl.where(j < before, start + j * BM, full_high + (j - before) * BM)
        dk, dv = _dkv_step(
            dk, dv, k, v, q_src, do_src, lse_ptr, delta_ptr, m0, head, low, high, T,
            scale_log2, stride_qt, stride_qh, stride_dt, stride_dh, D, DV, BD, BX, BDV, BM, TMA,
            True,
        )  # fmt: skip
    row = (split.to(tl.int64) * NK + n) * G + group
    store_parts(dk_ptr, row * D, scale_parts(dk, scale), inside, D, BD, BX)
    store_parts(dv_ptr, row * DV, (dv,), inside, DV, BDV, 0)


def interval_grad_kv(
    q_THD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    do_THD: Tensor,
    lse_HT: Tensor,
    delta_HT: Tensor,
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
    if config.gluon and gluon_takes(q_THD, k_NGD, v_NGD, do_THD, lse_HT, delta_HT):
        from kernels.nsa.gluon_interval_grad_kv import launch

        launch(
            q_THD, k_NGD, v_NGD, do_THD, lse_HT, delta_HT, dk, dv, low_N, high_N, scale,
            splits, config.stages,
        )  # fmt: skip
        return (dk[0], dv[0]) if splits == 1 else (dk.sum(0), dv.sum(0))
    (q, do), tma = tile_sources(config.BM, q_THD, do_THD)
    interval_grad_kv_kernel[(G * splits, triton.cdiv(NK, config.BN))](
        q,
        k_NGD,
        v_NGD,
        do,
        dk,
        dv,
        lse_HT,
        delta_HT,
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
        **part_widths(D),
        BDV=pow2(DV),
        BM=config.BM,
        BN=config.BN,
        TMA=tma,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits == 1:
        return dk[0], dv[0]
    return dk.sum(0), dv.sum(0)
