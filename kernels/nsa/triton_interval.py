"""Attention of every token to one interval of keys: the compressed and the sliding branch.

Row t sees the keys [low_t, high_t), both ends never decreasing, so the keys of a tile of rows are
one range whose inner part needs no mask. The compressed branch sees slots, the sliding branch
tokens; packed documents are intervals too. The forward saves the log-sum-exp in base 2.
"""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.nsa.triton_config import TileConfig, pow2
from kernels.nsa.triton_parts import (
    gather_parts,
    load_parts,
    load_tile,
    part_widths,
    row_products,
)

LOG2_E = 1.4426950408889634


@triton.jit
def column_of(index, stride, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """Where a head's or group's columns start: a TMA column, or an offset in elements."""
    if TMA:
        return index * WIDTH
    else:
        return tl.cast(index, tl.int64) * stride


@triton.jit
def _forward_step(
    acc,
    high_water,
    total,
    q,
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
    if MASKED:
        n = n0 + tl.arange(0, BN)
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
def tile_range(low_ptr, high_ptr, first, last, BLOCK: tl.constexpr):
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
def attend_interval(
    q,
    k_src,
    v_src,
    low_ptr,
    high_ptr,
    first,
    last,
    group,
    scale_log2,
    stride_kn,
    stride_kg,
    stride_vn,
    stride_vg,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BX: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Return o [BM, BDV] in fp32 and the base-2 log-sum-exp [BM] of the rows [first, last]."""
    rows = first + tl.arange(0, BM)
    inside = rows <= last
    low = tl.load(low_ptr + rows, mask=inside, other=0)
    high = tl.load(high_ptr + rows, mask=inside, other=0)
    start, stop, full_low, full_high = tile_range(low_ptr, high_ptr, first, last, BN)
    k_column = column_of(group, stride_kg, D, TMA)
    v_column = column_of(group, stride_vg, DV, TMA)
    acc = tl.zeros((BM, BDV), tl.float32)
    # Finite, so that a row that sees nothing never computes inf - inf.
    high_water = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for n0 in range(full_low, full_high, BN):
        acc, high_water, total = _forward_step(
            acc, high_water, total, q, k_src, v_src, k_column, v_column, n0, low, high, stop,
            scale_log2, stride_kn, stride_vn, D, DV, BD, BX, BDV, BN, TMA, False,
        )  # fmt: skip
    before = (full_low - start) // BN
    after = tl.cdiv(tl.maximum(stop - full_high, 0), BN)
    for i in range(0, before + after):
        n0 = tl.where(i < before, start + i * BN, full_high + (i - before) * BN)
        acc, high_water, total = _forward_step(
            acc, high_water, total, q, k_src, v_src, k_column, v_column, n0, low, high, stop,
            scale_log2, stride_kn, stride_vn, D, DV, BD, BX, BDV, BN, TMA, True,
        )  # fmt: skip
    some = total > 0
    safe = tl.where(some, total, 1.0)
    lse = tl.where(some, high_water + tl.log2(safe), 0.0)
    return acc * (1.0 / safe)[:, None], lse


@triton.jit
def interval_forward_kernel(
    q_ptr,
    k_src,
    v_src,
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
    BX: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    """o[t, h] = softmax(q k) v over [low_t, high_t); 0 and a log-sum-exp of 0 where it is empty."""
    head = tl.program_id(0)
    # Later tiles see more compressed slots: the heavy ones go first.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BM
    last = tl.minimum(first + BM, T) - 1
    rows = first + tl.arange(0, BM)
    inside = rows < T
    dv = tl.arange(0, BDV)
    q_at = rows.to(tl.int64) * stride_qt + head * stride_qh
    q = gather_parts(q_ptr, q_at, inside, D, BD, BX)
    o, lse = attend_interval(
        q, k_src, v_src, low_ptr, high_ptr, first, last, head // HG, scale_log2,
        stride_kn, stride_kg, stride_vn, stride_vg, D, DV, BD, BX, BDV, BM, BN, TMA,
    )  # fmt: skip
    tl.store(lse_ptr + head.to(tl.int64) * T + rows, lse, mask=inside)
    tl.store(
        o_ptr + rows.to(tl.int64)[:, None] * stride_ot + head * stride_oh + dv[None, :],
        o.to(o_ptr.dtype.element_ty),
        mask=inside[:, None] & (dv < DV)[None, :],
    )


def tile_source(x_NGD: Tensor, rows: int) -> tuple[Any, bool]:
    """Return a TMA descriptor of [rows, D] tiles of x and True, or x and False where TMA cannot.

    The copy engine wants heads side by side, power-of-two widths and 16-byte aligned rows.
    """
    N, G, D = x_NGD.shape
    wide = x_NGD.stride(0) * x_NGD.element_size()
    if x_NGD.stride(1) != D or pow2(D) != D or wide % 16 or x_NGD.data_ptr() % 16:
        return x_NGD, False
    flat = TensorDescriptor(x_NGD, [N, G * D], [x_NGD.stride(0), 1], [rows, D])
    return flat, True


def tile_sources(rows: int, *tensors: Tensor) -> tuple[list[Any], bool]:
    """Apply `tile_source` to all tensors, with descriptors only if all of them allow it."""
    sources = [tile_source(x, rows) for x in tensors]
    every = all(tma for _, tma in sources)
    return ([source for source, _ in sources] if every else list(tensors)), every


def gluon_takes(*tensors: Tensor) -> bool:
    """Tell whether the copy engine takes all of these; rows of [N, G, D] are 64 or 128 wide.

    Rows of [H, T] must start on 16 bytes: where they do not, the copy is an illegal instruction.
    """
    return all(
        x.data_ptr() % 16 == 0
        and (
            x.is_contiguous() and x.shape[1] * x.element_size() % 16 == 0
            if x.ndim == 2
            else x.shape[2] in {64, 128} and x.stride(1) == x.shape[2] and x.stride(0) % 16 == 0
        )
        for x in tensors
    )


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
    if config.gluon and gluon_takes(q_THD, k_NGD, v_NGD):
        from kernels.nsa.gluon_interval import launch

        launch(q_THD, k_NGD, v_NGD, o, low_T, high_T, lse_HT, scale, config.BN, config.stages)
        return o
    (k, v), tma = tile_sources(config.BN, k_NGD, v_NGD)
    interval_forward_kernel[(H, triton.cdiv(T, config.BM))](
        q_THD,
        k,
        v,
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
        **part_widths(D),
        BDV=pow2(DV),
        BM=config.BM,
        BN=config.BN,
        TMA=tma,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return o
