"""`interval_grad_kv_kernel` for Hopper in Gluon, specialised by warps.

One warp copies tiles of q and do; two groups of four warps, each with 64 keys of its own, multiply.
They are not in step, so that one multiplies while the other computes exponentials.
"""

# Arguments of @gluon.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.nsa.gluon_interval import flat_descriptor, tile_descriptor, tile_range
from kernels.nsa.triton_interval import LOG2_E


@gluon.jit
def _producer(
    q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, k_s, v_s, q_s, do_s, lse_s, delta_s,
    loaded, full, empty, first, group, head0, start, full_low, full_high, tiles, rest, T,
    HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(loaded, 2 * (k_desc.block_type.nbytes + v_desc.block_type.nbytes))
    for c in gl.static_range(2):
        tma.async_copy_global_to_shared(k_desc, [first + c * 64, group * D], loaded, k_s.index(c))
        tma.async_copy_global_to_shared(v_desc, [first + c * 64, group * DV], loaded, v_s.index(c))
    whole = tiles * HEADS
    before = (full_low - start) // BM
    for i in range(0, whole + rest * HEADS):
        inner = i < whole
        n = gl.where(inner, i, i - whole)
        per_head = gl.maximum(gl.where(inner, tiles, rest), 1)
        head = head0 + n // per_head
        j = n % per_head
        edge = gl.where(j < before, start + j * BM, full_high + (j - before) * BM)
        m0 = gl.where(inner, full_low + j * BM, edge)
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(
            bar,
            q_desc.block_type.nbytes + do_desc.block_type.nbytes + 2 * lse_desc.block_type.nbytes,
        )
        tma.async_copy_global_to_shared(q_desc, [m0, head * D], bar, q_s.index(stage))
        tma.async_copy_global_to_shared(do_desc, [m0, head * DV], bar, do_s.index(stage))
        tma.async_copy_global_to_shared(lse_desc, [head * T + m0], bar, lse_s.index(stage))
        tma.async_copy_global_to_shared(delta_desc, [head * T + m0], bar, delta_s.index(stage))


@gluon.jit
def _step(
    dk, dv, k, v, q_s, do_s, lse_s, delta_s, full, empty, i, m0, low, high, scale_log2,
    BM: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, scores: gl.constexpr,
    wide_k: gl.constexpr, wide_v: gl.constexpr,
):  # fmt: skip
    stage = i % STAGES
    dtype: gl.constexpr = q_s.dtype
    mbarrier.wait(full.index(stage), i // STAGES & 1)
    q = q_s.index(stage)
    do = do_s.index(stage)
    zero = gl.zeros([64, BM], gl.float32, scores)
    st = warpgroup_mma(k, q.permute([1, 0]), zero, use_acc=False, is_async=True)
    dpt = warpgroup_mma(v, do.permute([1, 0]), zero, use_acc=False, is_async=True)
    lse = lse_s.index(stage).load(gl.SliceLayout(0, scores))
    delta = delta_s.index(stage).load(gl.SliceLayout(0, scores))
    st = warpgroup_mma_wait(1, deps=(st,))
    pt = gl.exp2(st * scale_log2 - lse[None, :])
    if MASKED:
        row = m0 + gl.arange(0, BM, gl.SliceLayout(0, scores))
        visible = (row[None, :] >= low[:, None]) & (row[None, :] < high[:, None])
        pt = gl.where(visible, pt, 0.0)
    p16 = gl.convert_layout(pt.to(dtype), gl.DotOperandLayout(0, wide_v, 2))
    dv = warpgroup_mma(p16, do, dv, is_async=True)
    dpt = warpgroup_mma_wait(1, deps=(dpt,))
    ds = (pt * (dpt - delta[None, :])).to(dtype)
    ds = gl.convert_layout(ds, gl.DotOperandLayout(0, wide_k, 2))
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv


@gluon.jit
def _consumer(
    c: gl.constexpr,
    k_s, v_s, q_s, do_s, lse_s, delta_s, loaded, full, empty, dk_ptr, dv_ptr, low_ptr, high_ptr,
    first, group, split, start, full_low, full_high, tiles, rest, scale, scale_log2, NK,
    G: gl.constexpr, HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    wide_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    wide_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    own = first + c * 64
    n = own + gl.arange(0, 64, gl.SliceLayout(1, scores))
    low = gl.load(low_ptr + n, mask=n < NK, other=0)
    high = gl.load(high_ptr + n, mask=n < NK, other=0)
    k = k_s.index(c)
    v = v_s.index(c)
    dk = gl.zeros([64, D], gl.float32, wide_k)
    dv = gl.zeros([64, DV], gl.float32, wide_v)
    mbarrier.wait(loaded, 0)
    whole = tiles * HEADS
    before = (full_low - start) // BM
    for i in range(0, whole):
        dk, dv = _step(
            dk, dv, k, v, q_s, do_s, lse_s, delta_s, full, empty, i, 0, low, high, scale_log2,
            BM, STAGES, False, scores, wide_k, wide_v,
        )  # fmt: skip
    for i in range(0, rest * HEADS):
        j = i % rest
        m0 = gl.where(j < before, start + j * BM, full_high + (j - before) * BM)
        dk, dv = _step(
            dk, dv, k, v, q_s, do_s, lse_s, delta_s, full, empty, whole + i, m0, low, high,
            scale_log2, BM, STAGES, True, scores, wide_k, wide_v,
        )  # fmt: skip
    nk = own + gl.arange(0, 64, gl.SliceLayout(1, wide_k))
    nv = own + gl.arange(0, 64, gl.SliceLayout(1, wide_v))
    d = gl.arange(0, D, gl.SliceLayout(0, wide_k))
    e = gl.arange(0, DV, gl.SliceLayout(0, wide_v))
    dk_row = (split.to(gl.int64) * NK + nk) * G + group
    dv_row = (split.to(gl.int64) * NK + nv) * G + group
    gl.store(
        dk_ptr + dk_row[:, None] * D + d[None, :],
        (dk * scale).to(dk_ptr.dtype.element_ty),
        mask=(nk < NK)[:, None],
    )
    gl.store(
        dv_ptr + dv_row[:, None] * DV + e[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=(nv < NK)[:, None],
    )


# Sizes that change with every pack of documents must not each compile a kernel anew.
@gluon.jit(do_not_specialize=("T", "NK"))
def interval_grad_kv_gluon(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    lse_desc,
    delta_desc,
    dk_ptr,
    dv_ptr,
    low_ptr,
    high_ptr,
    scale,
    scale_log2,
    T,
    NK,
    G: gl.constexpr,
    HG: gl.constexpr,
    HEADS: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """dk, dv [splits, NK, G, D] of 128 keys seen by the tokens [low_n, high_n), by HEADS heads."""
    group = gl.program_id(0) % G
    split = gl.program_id(0) // G
    first = gl.program_id(1) * 128
    last = gl.minimum(first + 128, NK) - 1
    start, stop, full_low, full_high = tile_range(low_ptr, high_ptr, first, last, BM)
    # A tile beyond the last key would need a mask everywhere.
    short = last < first + 127
    full_low = gl.where(short, start, full_low)
    full_high = gl.where(short, start, full_high)
    tiles = (full_high - full_low) // BM
    rest = (full_low - start) // BM + gl.cdiv(gl.maximum(stop - full_high, 0), BM)
    head0 = group * HG + split * HEADS
    dtype: gl.constexpr = q_desc.dtype
    k_s = gl.allocate_shared_memory(dtype, [2, 64, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 64, DV], v_desc.layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, BM, DV], do_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], lse_desc.layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BM], delta_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    gl.constexpr(0), k_s, v_s, q_s, do_s, lse_s, delta_s, loaded, full, empty,
                    dk_ptr, dv_ptr, low_ptr, high_ptr, first, group, split, start, full_low,
                    full_high, tiles, rest, scale, scale_log2, NK, G, HEADS, D, DV, BM, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    gl.constexpr(1), k_s, v_s, q_s, do_s, lse_s, delta_s, loaded, full, empty,
                    dk_ptr, dv_ptr, low_ptr, high_ptr, first, group, split, start, full_low,
                    full_high, tiles, rest, scale, scale_log2, NK, G, HEADS, D, DV, BM, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, k_s, v_s, q_s, do_s,
                    lse_s, delta_s, loaded, full, empty, first, group, head0, start, full_low,
                    full_high, tiles, rest, T, HEADS, D, DV, BM, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch(
    q_THD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    do_THD: Tensor,
    lse_HT: Tensor,
    delta_HT: Tensor,
    dk: Tensor,
    dv: Tensor,
    low_N: Tensor,
    high_N: Tensor,
    scale: float,
    splits: int,
    stages: int,
) -> None:
    """Write dk [splits, N, G, D] and dv [splits, N, G, DV]; see `interval_grad_kv`."""
    T, H, D = q_THD.shape
    NK, G, DV = v_NGD.shape
    BM = 64
    interval_grad_kv_gluon[(G * splits, triton.cdiv(NK, 128))](
        tile_descriptor(q_THD, BM),
        tile_descriptor(k_NGD, 64),
        tile_descriptor(v_NGD, 64),
        tile_descriptor(do_THD, BM),
        flat_descriptor(lse_HT, BM),
        flat_descriptor(delta_HT, BM),
        dk,
        dv,
        low_N,
        high_N,
        scale,
        scale * LOG2_E,
        T,
        NK,
        G=G,
        HG=H // G,
        HEADS=H // G // splits,
        D=D,
        DV=DV,
        BM=BM,
        STAGES=stages,
        num_warps=4,
    )
