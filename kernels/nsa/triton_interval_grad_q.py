"""Gradient of the queries: the compressed and the sliding branch, and the selected partials.

Reading the partials is bound by memory and the rest by arithmetic, so one kernel does both: while
one program reads, its neighbours on the same multiprocessor multiply.
"""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

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
    add_parts,
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

GLUON_CHECKED = {(16, 128), (8, 128), (4, 128), (1, 128), (16, 64), (4, 64), (2, 64)}
"""Query heads per group and head dim at which the Gluon kernel was compared with fp64 on a GPU."""


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
    BX: tl.constexpr,
    BDV: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    k = load_parts(k_src, n0, k_column, stride_kn, stop, D, BD, BX, BN, TMA, MASKED)
    v = load_tile(v_src, n0, v_column, stride_vn, stop, DV, BDV, BN, TMA, MASKED)
    s = row_products(q, k)
    dp = tl.dot(do, tl.trans(v), input_precision="ieee")
    p = tl.exp2(s * scale_log2 - lse[:, None])
    ds = p * (dp - delta[:, None])
    if MASKED:
        n = n0 + tl.arange(0, BN)
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        ds = tl.where(visible, ds, 0.0)
    return add_product(ds.to(v.dtype), k, acc)


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
    BX: tl.constexpr,
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
            scale_log2, stride_kn, stride_vn, D, DV, BD, BX, BDV, BN, TMA, False,
        )  # fmt: skip
    before = (full_low - start) // BN
    after = tl.cdiv(tl.maximum(stop - full_high, 0), BN)
    for i in range(0, before + after):
        n0 = tl.where(i < before, start + i * BN, full_high + (i - before) * BN)
        acc = _dq_step(
            acc, q, do, lse, delta, k_src, v_src, k_column, v_column, n0, low, high, stop,
            scale_log2, stride_kn, stride_vn, D, DV, BD, BX, BDV, BN, TMA, True,
        )  # fmt: skip
    return acc


@triton.jit
def _sum_partials(
    part_ptr,
    selected_ptr,
    rows,
    inside,
    token0,
    group,
    head,
    G: tl.constexpr,
    HG: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BX: tl.constexpr,
    BM: tl.constexpr,
):
    """Sum of the partial dq of the rows' selected blocks, in slot order."""
    pair = ((rows - token0) * G + group).to(tl.int64)
    chosen_at = selected_ptr + (rows.to(tl.int64) * G + group) * K
    part_at = (pair * (K * HG) + head % HG) * D
    acc = zero_parts(BM, BD, BX)
    for i in tl.range(K, loop_unroll_factor=4):
        some = inside & (tl.load(chosen_at + i, mask=inside, other=-1) >= 0)
        part = gather_parts(part_ptr + i * (HG * D), part_at, some, D, BD, BX)
        acc = add_parts(acc, part)
    return acc


# Sizes that change with every pack of documents must not each compile a kernel anew.
@triton.jit(do_not_specialize=("token0", "token_end"))
def interval_grad_q_kernel(
    q_ptr,
    do_ptr,
    dq_ptr,
    part_ptr,
    selected_ptr,
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
    token0,
    token_end,
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
    G: tl.constexpr,
    HG: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BX: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PARTIALS: tl.constexpr,
    TMA: tl.constexpr,
):
    """dq[t, h] of the compressed (FIRST), sliding (SECOND) and selected (PARTIALS) branch.

    They share one sum: q and do are read once and dq is rounded once.
    """
    head = tl.program_id(0)
    # Later tiles see more compressed slots: the heavy ones go first.
    first = token0 + (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    last = tl.minimum(first + BM, token_end) - 1
    rows = first + tl.arange(0, BM)
    inside = rows <= last
    q_at = rows.to(tl.int64) * stride_qt + head * stride_qh
    do_at = rows.to(tl.int64) * stride_dt + head * stride_dh
    q = gather_parts(q_ptr, q_at, inside, D, BD, BX)
    do = load_rows(do_ptr, do_at, inside, DV, BDV)
    # Before the other branches: while they multiply, the registers are theirs.
    if PARTIALS:
        acc = _sum_partials(
            part_ptr, selected_ptr, rows, inside, token0, head // HG, head, G, HG, K, D, BD, BX, BM
        )
    else:
        acc = zero_parts(BM, BD, BX)
    if FIRST:
        acc = _dq_branch(
            acc, q, do, k1_src, v1_src, lse_ptr, delta_ptr, low1_ptr, high1_ptr,
            scale_log2, first, last, head, T, stride_k1n, stride_k1g, stride_v1n, stride_v1g,
            HG, D, DV, BD, BX, BDV, BM, BN, TMA,
        )  # fmt: skip
    if SECOND:
        skip = tl.num_programs(0).to(tl.int64) * T
        acc = _dq_branch(
            acc, q, do, k2_src, v2_src, lse_ptr + skip, delta_ptr + skip,
            low2_ptr, high2_ptr, scale_log2, first, last, head, T,
            stride_k2n, stride_k2g, stride_v2n, stride_v2g, HG, D, DV, BD, BX, BDV, BM, BN, TMA,
        )  # fmt: skip
    dq_at = (rows.to(tl.int64) * (G * HG) + head) * D
    store_parts(dq_ptr, dq_at, scale_parts(acc, scale), inside, D, BD, BX)


def interval_grad_q(
    dq_THD: Tensor,
    q_THD: Tensor,
    do_THD: Tensor,
    partials: Tensor | None,
    selected_TGK: Tensor,
    start_T: Tensor,
    select: int,
    tokens: tuple[int, int],
    compressed: tuple[Tensor, Tensor, Tensor, Tensor],
    window: tuple[Tensor, Tensor, Tensor, Tensor],
    lse_2HT: Tensor,
    delta_2HT: Tensor,
    scale: float,
    config: TileConfig,
    *,
    branches: tuple[bool, bool] = (True, True),
) -> None:
    """Write to dq_THD the gradient of the tokens [begin, end) through the branches.

    `partials` is `SelectedGrad.partials` of exactly these tokens, None to leave that branch out;
    `start_T` the first token of every token's document, `select` the size of a selected block.
    `compressed` and `window` are (k, v, low_T, high_T); the [2, H, T] fp32 tensors hold the
    base-2 log-sum-exp folded with the gate and do . o of the compressed, then the sliding branch.
    """
    T, H, D = q_THD.shape
    k1, v1, low1, high1 = compressed
    k2, v2, low2, high2 = window
    G, DV = v1.shape[1:]
    # A tile that ends before its rows do reads what follows: zeros, or an earlier chunk's leavings.
    whole = T % 64 == 0 or tokens == (0, T)
    checked = D == DV and (H // G, D) in GLUON_CHECKED and whole
    if config.gluon and checked and gluon_takes(q_THD, do_THD, k1, v1, k2, v2):
        from kernels.nsa.gluon_interval_grad_q import launch

        launch(
            dq_THD, q_THD, do_THD, partials, selected_TGK.shape[2], start_T, tokens, compressed,
            window, lse_2HT, delta_2HT, scale, select, config.stages, branches,
        )  # fmt: skip
        return
    (k1s, v1s, k2s, v2s), tma = tile_sources(config.BN, k1, v1, k2, v2)
    interval_grad_q_kernel[(H, triton.cdiv(tokens[1] - tokens[0], config.BM))](
        q_THD,
        do_THD,
        dq_THD,
        q_THD if partials is None else partials,
        selected_TGK,
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
        *tokens,
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
        G=G,
        HG=H // G,
        K=selected_TGK.shape[2],
        D=D,
        DV=DV,
        **part_widths(D),
        BDV=pow2(DV),
        BM=config.BM,
        BN=config.BN,
        FIRST=branches[0],
        SECOND=branches[1],
        PARTIALS=partials is not None,
        TMA=tma,
        num_warps=config.warps,
        num_stages=config.stages,
    )
