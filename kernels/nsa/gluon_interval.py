"""`interval_forward_kernel` for Hopper in Gluon, specialised by warps.

One warp copies tiles of keys and values; two groups of four warps, each with 64 queries of its own,
multiply. A group starts the scores of the next tile before the output of this one, so that its
exponentials run beside a product.
"""

# Arguments of @gluon.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from functools import cache

import torch
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.nsa.triton_interval import LOG2_E

GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@cache
def tile_layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, width], GLUON_DTYPES[dtype])


@gluon.jit
def tile_range(low_ptr, high_ptr, first, last, BLOCK: gl.constexpr):
    """Where the tile's keys start and stop, and the blocks in between that every row sees whole."""
    start = gl.load(low_ptr + first) // BLOCK * BLOCK
    stop = gl.load(high_ptr + last)
    full_low = gl.cdiv(gl.load(low_ptr + last), BLOCK) * BLOCK
    full_high = gl.load(high_ptr + first) // BLOCK * BLOCK
    empty = full_low >= full_high
    full_low = gl.where(empty, start, full_low)
    full_high = gl.where(empty, start, full_high)
    return start, stop, full_low, full_high


@gluon.jit
def tile_start(i, start, full_low, full_high, BLOCK: gl.constexpr):
    """Where tile i begins, whole tiles first, and whether it needs a mask."""
    whole = (full_high - full_low) // BLOCK
    j = i - whole
    before = (full_low - start) // BLOCK
    edge = gl.where(j < before, start + j * BLOCK, full_high + (j - before) * BLOCK)
    return gl.where(i < whole, full_low + i * BLOCK, edge), i >= whole


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, loaded, full_k, full_v, empty_k, empty_v, first, head,
    group, start, full_low, full_high, tiles, D: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(loaded, 2 * q_desc.block_type.nbytes)
    for c in gl.static_range(2):
        tma.async_copy_global_to_shared(q_desc, [first + c * 64, head * D], loaded, q_s.index(c))
    for i in range(0, tiles):
        n0, _ = tile_start(i, start, full_low, full_high, BN)
        stage = i % STAGES
        parity = (i // STAGES & 1) ^ 1
        mbarrier.wait(empty_k.index(stage), parity)
        bar = full_k.index(stage)
        mbarrier.expect(bar, k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [n0, group * D], bar, k_s.index(stage))
        mbarrier.wait(empty_v.index(stage), parity)
        bar = full_v.index(stage)
        mbarrier.expect(bar, v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [n0, group * DV], bar, v_s.index(stage))


@gluon.jit
def softmax_step(
    s, high_water, total, i, start, full_low, full_high, low, high, scale_log2, BN: gl.constexpr,
    scores: gl.constexpr,
):  # fmt: skip
    n0, masked = tile_start(i, start, full_low, full_high, BN)
    if masked:
        n = n0 + gl.arange(0, BN, gl.SliceLayout(0, scores))
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        s = gl.where(visible, s, float("-inf"))
    new_high = gl.maximum(high_water, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - new_high[:, None])
    shrink = gl.exp2(high_water - new_high)
    total = total * shrink + gl.sum(p, 1)
    return p, new_high, total, shrink


@gluon.jit
def _consumer(  # noqa: PLR0915  (one kernel)
    c: gl.constexpr,
    q_s, k_s, v_s, loaded, full_k, full_v, empty_k, empty_v, o_ptr, lse_ptr, low_ptr, high_ptr,
    first, head, start, full_low, full_high, tiles, scale_log2, T, stride_ot, stride_oh,
    D: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_s.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    wide_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide_v, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, wide_v)
    rows = first + c * 64 + gl.arange(0, 64, gl.SliceLayout(1, scores))
    low = gl.load(low_ptr + rows, mask=rows < T, other=0)
    high = gl.load(high_ptr + rows, mask=rows < T, other=0)
    q = q_s.index(c)
    # Finite, so that a row that sees nothing never computes inf - inf.
    high_water = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, scores))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, scores))
    zero = gl.zeros([64, BN], gl.float32, scores)
    o = gl.zeros([64, DV], gl.float32, wide_v)

    mbarrier.wait(loaded, 0)
    mbarrier.wait(full_k.index(0), 0)
    s = warpgroup_mma(q, k_s.index(0).permute([1, 0]), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(empty_k.index(0), count=1)
    p, high_water, total, _ = softmax_step(
        s, high_water, total, 0, start, full_low, full_high, low, high, scale_log2, BN, scores
    )
    p16 = gl.convert_layout(p.to(dtype), operand)
    for i in range(1, tiles):
        stage = i % STAGES
        old = (i - 1) % STAGES
        mbarrier.wait(full_k.index(stage), i // STAGES & 1)
        s = warpgroup_mma(q, k_s.index(stage).permute([1, 0]), zero, use_acc=False, is_async=True)
        mbarrier.wait(full_v.index(old), (i - 1) // STAGES & 1)
        o_next = warpgroup_mma(p16, v_s.index(old), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(empty_k.index(stage), count=1)
        p, high_water, total, shrink = softmax_step(
            s, high_water, total, i, start, full_low, full_high, low, high, scale_log2, BN, scores
        )
        o = warpgroup_mma_wait(0, deps=(o_next,))
        mbarrier.arrive(empty_v.index(old), count=1)
        o = o * gl.convert_layout(shrink, by_row)[:, None]
        p16 = gl.convert_layout(p.to(dtype), operand)
    old = (tiles - 1) % STAGES
    mbarrier.wait(full_v.index(old), (tiles - 1) // STAGES & 1)
    o = warpgroup_mma(p16, v_s.index(old), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))

    some = total > 0
    safe = gl.where(some, total, 1.0)
    lse = gl.where(some, high_water + gl.log2(safe), 0.0)
    gl.store(lse_ptr + head.to(gl.int64) * T + rows, lse, mask=rows < T)
    o = o * gl.convert_layout(1.0 / safe, by_row)[:, None]
    if D == DV:
        # Through the queries' tile, so that rows leave in 16-byte pieces.
        rows_v: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
        q.store(o.to(dtype))
        leaving = q.load(rows_v)
        t = first + c * 64 + gl.arange(0, 64, gl.SliceLayout(1, rows_v))
        f = gl.arange(0, DV, gl.SliceLayout(0, rows_v))
        at = t.to(gl.int64)[:, None] * stride_ot + head * stride_oh + f[None, :]
        gl.store(o_ptr + at, leaving, mask=(t < T)[:, None])
    else:
        t = first + c * 64 + gl.arange(0, 64, by_row)
        f = gl.arange(0, DV, gl.SliceLayout(0, wide_v))
        at = t.to(gl.int64)[:, None] * stride_ot + head * stride_oh + f[None, :]
        gl.store(o_ptr + at, o.to(dtype), mask=(t < T)[:, None])


# Sizes that change with every pack of documents must not each compile a kernel anew.
@gluon.jit(do_not_specialize=("T",))
def interval_forward_gluon(
    q_desc,
    k_desc,
    v_desc,
    o_ptr,
    lse_ptr,
    low_ptr,
    high_ptr,
    scale_log2,
    T,
    stride_ot,
    stride_oh,
    HG: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """o[t, h] = softmax(q k) v over [low_t, high_t); 0 and a log-sum-exp of 0 where it is empty."""
    head = gl.program_id(0)
    group = head // HG
    # Later tiles see more compressed slots: the heavy ones go first.
    first = (gl.num_programs(1) - 1 - gl.program_id(1)) * 128
    last = gl.minimum(first + 128, T) - 1
    start, stop, full_low, full_high = tile_range(low_ptr, high_ptr, first, last, BN)
    edges = (full_low - start) // BN + gl.cdiv(gl.maximum(stop - full_high, 0), BN)
    # A tile of rows that see nothing works through one masked tile of keys.
    tiles = gl.maximum((full_high - full_low) // BN + edges, 1)
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], v_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    full_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(full_k.index(s), count=1)
        mbarrier.init(full_v.index(s), count=1)
        mbarrier.init(empty_k.index(s), count=2)
        mbarrier.init(empty_v.index(s), count=2)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    gl.constexpr(0), q_s, k_s, v_s, loaded, full_k, full_v, empty_k, empty_v,
                    o_ptr, lse_ptr, low_ptr, high_ptr, first, head, start, full_low, full_high,
                    tiles, scale_log2, T, stride_ot, stride_oh, D, DV, BN, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    gl.constexpr(1), q_s, k_s, v_s, loaded, full_k, full_v, empty_k, empty_v,
                    o_ptr, lse_ptr, low_ptr, high_ptr, first, head, start, full_low, full_high,
                    tiles, scale_log2, T, stride_ot, stride_oh, D, DV, BN, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, q_s, k_s, v_s, loaded, full_k, full_v, empty_k,
                    empty_v, first, head, group, start, full_low, full_high, tiles, D, DV, BN,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def tile_descriptor(x_NGD: Tensor, rows: int) -> TensorDescriptor:
    """Describe [rows, D] tiles of x, whose heads lie side by side, to the copy engine."""
    N, G, D = x_NGD.shape
    layout = tile_layout(rows, D, x_NGD.dtype)
    return TensorDescriptor(x_NGD, [N, G * D], [x_NGD.stride(0), 1], [rows, D], layout)


def flat_descriptor(x_HT: Tensor, length: int) -> TensorDescriptor:
    """Describe runs of fp32 numbers to the copy engine."""
    layout = gl.NVMMASharedLayout(0, 32, rank=1)
    return TensorDescriptor(x_HT, [x_HT.numel()], [1], [length], layout)


def launch(
    q_THD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    o_THD: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    lse_HT: Tensor,
    scale: float,
    BN: int,
    stages: int,
) -> None:
    """Write o and lse; see `interval_forward`."""
    T, H, D = q_THD.shape
    G, DV = v_NGD.shape[1:]
    interval_forward_gluon[(H, triton.cdiv(T, 128))](
        tile_descriptor(q_THD, 64),
        tile_descriptor(k_NGD, BN),
        tile_descriptor(v_NGD, BN),
        o_THD,
        lse_HT,
        low_T,
        high_T,
        scale * LOG2_E,
        T,
        o_THD.stride(0),
        o_THD.stride(1),
        HG=H // G,
        D=D,
        DV=DV,
        BN=BN,
        STAGES=stages,
        num_warps=4,
    )
