"""`importance_kernel` for Hopper in Gluon, specialised by warps.

One warp copies the queries of head after head; two groups of four warps, each with 64 queries of
its own, multiply and add up probabilities: an exponential costs as much as its share of the
product, so that the groups have to take turns.
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

from kernels.nsa.gluon_interval import flat_descriptor, tile_descriptor
from kernels.nsa.triton_interval import LOG2_E


@gluon.jit
def _producer(
    q_desc, k_desc, lse_desc, q_s, k_s, lse_s, loaded, full, empty, first, n0, group, heads, T,
    HG: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(loaded, BN // 128 * k_desc.block_type.nbytes)
    for b in gl.static_range(BN // 128):
        tma.async_copy_global_to_shared(k_desc, [n0 + b * 128, group * D], loaded, k_s.index(b))
    for i in range(0, heads):
        stage = i % STAGES
        head = group * HG + i
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, 2 * (q_desc.block_type.nbytes + lse_desc.block_type.nbytes))
        for c in gl.static_range(2):
            m0 = first + c * 64
            tma.async_copy_global_to_shared(q_desc, [m0, head * D], bar, q_s.index(stage * 2 + c))
            tma.async_copy_global_to_shared(
                lse_desc, [head * T + m0], bar, lse_s.index(stage * 2 + c)
            )


@gluon.jit
def _store(
    acc, own_ptr, next_ptr, low, high, n0, m0, chunk, chunk_end, group, heads, NB,
    G: gl.constexpr, RATIO: gl.constexpr, OVERLAP: gl.constexpr, scores: gl.constexpr,
):  # fmt: skip
    """Fold 128 slots to selected blocks, see `importance_kernel`, and store."""
    out: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    J: gl.constexpr = 128 // RATIO
    n = n0 + gl.arange(0, 128, gl.SliceLayout(0, scores))
    visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
    acc = gl.where(visible, acc, 0.0)
    whole = gl.convert_layout(gl.sum(gl.reshape(acc, [64, J, RATIO]), 2), out)
    row = m0 + gl.arange(0, 64, gl.SliceLayout(1, out))
    j = n0 // RATIO + gl.arange(0, J, gl.SliceLayout(0, out))
    at = ((row - chunk).to(gl.int64)[:, None] * G + group) * NB + j[None, :]
    mask = (row < chunk_end)[:, None] & (j < NB)[None, :] & (heads > 0)
    if OVERLAP:
        edge = gl.where((n % RATIO == RATIO - 1)[None, :], acc, 0.0)
        final = gl.convert_layout(gl.sum(gl.reshape(edge, [64, J, RATIO]), 2), out)
        gl.store(own_ptr + at, 2.0 * whole - final, mask=mask)
        gl.store(next_ptr + at, final, mask=mask)
    else:
        gl.store(own_ptr + at, whole, mask=mask)


@gluon.jit
def _consumer(
    c: gl.constexpr,
    q_s, k_s, lse_s, loaded, full, empty, own_ptr, next_ptr, low_ptr, high_ptr, first, n0, chunk,
    chunk_end, group, heads, scale_log2, NB, G: gl.constexpr, RATIO: gl.constexpr,
    OVERLAP: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    zero = gl.zeros([64, 128], gl.float32, scores)
    acc0 = gl.zeros([64, 128], gl.float32, scores)
    acc1 = gl.zeros([64, 128], gl.float32, scores)
    mbarrier.wait(loaded, 0)
    for i in range(0, heads):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        q = q_s.index(stage * 2 + c)
        s = warpgroup_mma(q, k_s.index(0).permute([1, 0]), zero, use_acc=False, is_async=True)
        lse = lse_s.index(stage * 2 + c).load(by_row)
        s = warpgroup_mma_wait(0, deps=(s,))
        acc0 += gl.exp2(s * scale_log2 - lse[:, None])
        if BN == 256:
            s = warpgroup_mma(q, k_s.index(1).permute([1, 0]), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            acc1 += gl.exp2(s * scale_log2 - lse[:, None])
        mbarrier.arrive(empty.index(stage), count=1)
    m0 = first + c * 64
    row = m0 + gl.arange(0, 64, by_row)
    low = gl.load(low_ptr + row, mask=row < chunk_end, other=0)
    high = gl.load(high_ptr + row, mask=row < chunk_end, other=0)
    _store(
        acc0, own_ptr, next_ptr, low, high, n0, m0, chunk, chunk_end, group, heads, NB, G, RATIO,
        OVERLAP, scores,
    )  # fmt: skip
    if BN == 256:
        _store(
            acc1, own_ptr, next_ptr, low, high, n0 + 128, m0, chunk, chunk_end, group, heads, NB,
            G, RATIO, OVERLAP, scores,
        )  # fmt: skip


# Sizes that change with every pack of documents must not each compile a kernel anew.
@gluon.jit(do_not_specialize=("T", "chunk", "chunk_end", "NB"))
def importance_gluon(
    q_desc,
    k_desc,
    lse_desc,
    own_ptr,
    next_ptr,
    low_ptr,
    high_ptr,
    scale_log2,
    T,
    chunk,
    chunk_end,
    NB,
    G: gl.constexpr,
    HG: gl.constexpr,
    RATIO: gl.constexpr,
    OVERLAP: gl.constexpr,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fold a tile of probabilities, summed over the group's heads; see `importance_kernel`."""
    group = gl.program_id(2)
    first = chunk + gl.program_id(1) * 128
    last = gl.minimum(first + 128, chunk_end) - 1
    n0 = gl.program_id(0) * BN
    start = gl.load(low_ptr + first)
    stop = gl.load(high_ptr + last)
    # A tile that nobody sees has no heads to work through and stores nothing.
    heads = gl.where((n0 < stop) & (n0 + BN > start), HG, 0)
    dtype: gl.constexpr = q_desc.dtype
    q_s = gl.allocate_shared_memory(dtype, [STAGES * 2, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [BN // 128, 128, D], k_desc.layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 64], lse_desc.layout)
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
                    gl.constexpr(0), q_s, k_s, lse_s, loaded, full, empty, own_ptr, next_ptr,
                    low_ptr, high_ptr, first, n0, chunk, chunk_end, group, heads, scale_log2, NB,
                    G, RATIO, OVERLAP, BN, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    gl.constexpr(1), q_s, k_s, lse_s, loaded, full, empty, own_ptr, next_ptr,
                    low_ptr, high_ptr, first, n0, chunk, chunk_end, group, heads, scale_log2, NB,
                    G, RATIO, OVERLAP, BN, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, lse_desc, q_s, k_s, lse_s, loaded, full, empty, first, n0,
                    group, heads, T, HG, D, BN, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch_importance(
    q_THD: Tensor,
    k_NGD: Tensor,
    lse_HT: Tensor,
    own: Tensor,
    following: Tensor,
    low_T: Tensor,
    high_T: Tensor,
    scale: float,
    tokens: tuple[int, int],
    reach: int,
    ratio: int,
    overlap: bool,
    BN: int,
    stages: int,
) -> None:
    """Score the tokens [begin, end) against the compressed slots below `reach`.

    `own` and `following` are the two planes of `select_blocks`' scratch, fp32 [tokens, G, NB].
    """
    T, H, D = q_THD.shape
    G = k_NGD.shape[1]
    grid = (triton.cdiv(reach, BN), triton.cdiv(tokens[1] - tokens[0], 128), G)
    importance_gluon[grid](
        tile_descriptor(q_THD, 64),
        tile_descriptor(k_NGD, 128),
        flat_descriptor(lse_HT, 64),
        own,
        following,
        low_T,
        high_T,
        scale * LOG2_E,
        T,
        *tokens,
        own.shape[2],
        G=G,
        HG=H // G,
        RATIO=ratio,
        OVERLAP=overlap,
        D=D,
        BN=BN,
        STAGES=stages,
        num_warps=4,
    )
