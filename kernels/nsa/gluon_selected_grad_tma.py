"""`selected_backward_kernel` for Hopper and groups of 8 or 16 heads: the copy engine gathers.

The rows of a (query, group) pair lie together, so that one copy moves them; one warp issues all
copies and four multiply. The partial dq leaves through the buffer that its queries came in. No
thread holds an address of a row: dk, dv and dq together take nearly all of its registers.
"""

# Arguments of @gluon.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.nsa.gluon_interval import tile_descriptor
from kernels.nsa.gluon_selected_tma import pair_descriptor, pair_row, slot_row, tile_entries


@gluon.jit
def _copier(
    q_desc, do_desc, k_desc, v_desc, part_desc, q_s, do_s, k_s, v_s, loaded, full_q, full_do,
    done_q, done_do, order_ptr, begin, end, key0, group, token0, past, past_part, G: gl.constexpr,
    HG: gl.constexpr, K: gl.constexpr, D: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """Bring tile i; before its q, take away the partial dq that tile i - 2 left in the buffer."""
    QUERIES: gl.constexpr = BM // HG
    mbarrier.expect(loaded, 2 * k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [key0, group * D], loaded, k_s)
    tma.async_copy_global_to_shared(v_desc, [key0, group * D], loaded, v_s)
    tiles = gl.cdiv(end - begin, QUERIES)
    for i in range(0, tiles + 2):
        stage = i % 2
        parity = (i // 2 & 1) ^ 1
        at = begin + i * QUERIES
        coming = tile_entries(order_ptr, at, end, QUERIES)
        leaving = tile_entries(order_ptr, gl.maximum(at - 2 * QUERIES, begin), end, QUERIES)
        if i < tiles:
            mbarrier.wait(done_do.index(stage), parity)
            bar = full_do.index(stage)
            mbarrier.expect(bar, QUERIES * do_desc.block_type.nbytes)
            for j in gl.static_range(QUERIES):
                row = pair_row(coming[j], group, past, G, HG, K)
                tma.async_copy_global_to_shared(
                    do_desc, [row, 0], bar, do_s.index(stage).slice(j * HG, HG)
                )
        mbarrier.wait(done_q.index(stage), parity)
        if i >= 2:
            for j in gl.static_range(QUERIES):
                row = slot_row(leaving[j], token0 * (G * K), past_part, HG)
                tma.async_copy_shared_to_global(
                    part_desc, [row, 0], q_s.index(stage).slice(j * HG, HG)
                )
            tma.store_wait(0)
        if i < tiles:
            bar = full_q.index(stage)
            mbarrier.expect(bar, QUERIES * q_desc.block_type.nbytes)
            for j in gl.static_range(QUERIES):
                row = pair_row(coming[j], group, past, G, HG, K)
                tma.async_copy_global_to_shared(
                    q_desc, [row, 0], bar, q_s.index(stage).slice(j * HG, HG)
                )


@gluon.jit
def _statistics(order_ptr, lse_ptr, delta_ptr, i, end, group, G: gl.constexpr, HG: gl.constexpr,
                K: gl.constexpr, BM: gl.constexpr):  # fmt: skip
    """Lse and delta of a tile's rows, one per thread; finite beyond the piece."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = gl.arange(0, BM, flat)
    e = i + row // HG
    ok = e < end
    entry = gl.load(order_ptr + e, mask=ok, other=0)
    at = entry // (G * K) * (G * HG) + group * HG + row % HG
    return gl.load(lse_ptr + at, mask=ok, other=0.0), gl.load(delta_ptr + at, mask=ok, other=0.0)


@gluon.jit
def _consumer(  # noqa: PLR0915  (one kernel)
    q_s, do_s, k_s, v_s, ds_s, lse_s, delta_s, loaded, full_q, full_do, done_q, done_do,
    order_ptr, lse_ptr, delta_ptr, dk_part_ptr, dv_part_ptr, dk_sum_ptr, dv_sum_ptr,
    begin, end, key0, key_end, group, alone, number, scale, scale_log2,
    G: gl.constexpr, HG: gl.constexpr, K: gl.constexpr, SELECT: gl.constexpr, D: gl.constexpr,
    BM: gl.constexpr, RESUME: gl.constexpr,
):  # fmt: skip
    QUERIES: gl.constexpr = BM // HG
    dtype: gl.constexpr = q_s.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    by_column: gl.constexpr = gl.SliceLayout(0, scores)
    dk = gl.zeros([SELECT, D], gl.float32, wide)
    dv = gl.zeros([SELECT, D], gl.float32, wide)
    no_scores = gl.zeros([SELECT, BM], gl.float32, scores)
    no_dq = gl.zeros([BM, D], gl.float32, wide)
    # A list is in token order, so the block's own queries, the only ones that do not see all of
    # its keys, come first.
    own_end = begin
    if gl.load(order_ptr + begin) // (G * K) < key0 + SELECT:
        own_end = begin + gl.cdiv(SELECT, QUERIES) * QUERIES
    lse_flat, delta_flat = _statistics(
        order_ptr, lse_ptr, delta_ptr, begin, end, group, G, HG, K, BM
    )
    mbarrier.wait(loaded, 0)
    for i in range(0, gl.cdiv(end - begin, QUERIES)):
        stage = i % 2
        phase = i // 2 & 1
        at = begin + i * QUERIES
        lse_s.store(lse_flat)
        delta_s.store(delta_flat)
        lse_flat, delta_flat = _statistics(
            order_ptr, lse_ptr, delta_ptr, at + QUERIES, end, group, G, HG, K, BM
        )
        q = q_s.index(stage)
        do = do_s.index(stage)
        mbarrier.wait(full_q.index(stage), phase)
        st = warpgroup_mma(k_s, q.permute([1, 0]), no_scores, use_acc=False, is_async=True)
        mbarrier.wait(full_do.index(stage), phase)
        dpt = warpgroup_mma(v_s, do.permute([1, 0]), no_scores, use_acc=False, is_async=True)
        st = warpgroup_mma_wait(1, deps=(st,))
        lse = lse_s.load(by_column)
        # Rows beyond the piece have q = do = 0 and add nothing.
        pt = gl.exp2(st * scale_log2 - lse[None, :])
        if at < own_end:
            column = gl.arange(0, BM, by_column)
            e = at + column // HG
            t = gl.load(order_ptr + e, mask=e < end, other=0) // (G * K)
            key = key0 + gl.arange(0, SELECT, gl.SliceLayout(1, scores))
            seen = (key[:, None] <= t[None, :]) & (key < key_end)[:, None]
            pt = gl.where(seen, pt, 0.0)
        p16 = gl.convert_layout(pt.to(dtype), operand)
        dv = warpgroup_mma(p16, do, dv, is_async=True)
        dpt = warpgroup_mma_wait(1, deps=(dpt,))
        delta = delta_s.load(by_column)
        ds = (pt * (dpt - delta[None, :])).to(dtype)
        ds_s.store(ds)
        fence_async_shared()
        dv = warpgroup_mma_wait(0, deps=(dv,))
        mbarrier.arrive(done_do.index(stage), count=1)
        dk = warpgroup_mma(ds_s, q, dk, is_async=True)
        dq = warpgroup_mma(ds_s.permute([1, 0]), k_s, no_dq, use_acc=False, is_async=True)
        dk, dq = warpgroup_mma_wait(0, deps=(dk, dq))
        q.store(dq.to(dtype))
        fence_async_shared()
        mbarrier.arrive(done_q.index(stage), count=1)
    dk *= scale
    local = gl.arange(0, SELECT, gl.SliceLayout(1, wide))
    d = gl.arange(0, D, gl.SliceLayout(0, wide))
    if alone:
        key = key0 + local
        own = (key < key_end)[:, None]
        to = (key.to(gl.int64) * G + group)[:, None] * D + d[None, :]
        if RESUME:
            dk += gl.load(dk_sum_ptr + to, mask=own, other=0.0)
            dv += gl.load(dv_sum_ptr + to, mask=own, other=0.0)
        gl.store(dk_sum_ptr + to, dk, mask=own)
        gl.store(dv_sum_ptr + to, dv, mask=own)
    else:
        to = (number.to(gl.int64) * SELECT + local)[:, None] * D + d[None, :]
        gl.store(dk_part_ptr + to, dk)
        gl.store(dv_part_ptr + to, dv)


# Sizes that change with every pack of documents must not each compile a kernel anew.
@gluon.jit(do_not_specialize=("piece0", "NB", "token0", "past", "past_part"))
def selected_backward_tma(
    q_desc,
    k_desc,
    v_desc,
    do_desc,
    part_desc,
    lse_ptr,
    delta_ptr,
    dk_part_ptr,
    dv_part_ptr,
    dk_sum_ptr,
    dv_sum_ptr,
    order_ptr,
    piece_ptr,
    block_ptr,
    scale,
    scale_log2,
    piece0,
    NB,
    token0,
    past,
    past_part,
    G: gl.constexpr,
    HG: gl.constexpr,
    K: gl.constexpr,
    SELECT: gl.constexpr,
    D: gl.constexpr,
    BM: gl.constexpr,
    RESUME: gl.constexpr,
):
    """One pass over a piece: its fp32 share of dk and dv, and dq of every (query, slot)."""
    number = gl.program_id(0)
    at = piece_ptr + (piece0 + number) * 4
    begin = gl.load(at)
    end = gl.load(at + 1)
    block = gl.load(at + 2)
    tag = gl.load(at + 3)
    if begin < end:
        group = tag // 2
        alone = tag % 2 == 1
        key0 = gl.load(block_ptr + block)
        key_end = gl.load(block_ptr + NB + block)
        dtype: gl.constexpr = q_desc.dtype
        # A buffer is a tile; its queries are slices of HG rows.
        tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], dtype)
        square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SELECT, BM], dtype)
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        bars: gl.constexpr = mbarrier.MBarrierLayout()
        k_s = gl.allocate_shared_memory(dtype, [SELECT, D], k_desc.layout)
        v_s = gl.allocate_shared_memory(dtype, [SELECT, D], v_desc.layout)
        q_s = gl.allocate_shared_memory(dtype, [2, BM, D], tile)
        do_s = gl.allocate_shared_memory(dtype, [2, BM, D], tile)
        ds_s = gl.allocate_shared_memory(dtype, [SELECT, BM], square)
        lse_s = gl.allocate_shared_memory(gl.float32, [BM], plain)
        delta_s = gl.allocate_shared_memory(gl.float32, [BM], plain)
        loaded = gl.allocate_shared_memory(gl.int64, [1], bars)
        full_q = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
        full_do = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
        done_q = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
        done_do = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
        mbarrier.init(loaded, count=1)
        for s in gl.static_range(2):
            mbarrier.init(full_q.index(s), count=1)
            mbarrier.init(full_do.index(s), count=1)
            mbarrier.init(done_q.index(s), count=1)
            mbarrier.init(done_do.index(s), count=1)
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        q_s, do_s, k_s, v_s, ds_s, lse_s, delta_s, loaded, full_q,
                        full_do, done_q, done_do, order_ptr, lse_ptr, delta_ptr, dk_part_ptr,
                        dv_part_ptr, dk_sum_ptr, dv_sum_ptr, begin, end, key0, key_end, group,
                        alone, number, scale, scale_log2, G, HG, K, SELECT, D,
                        BM, RESUME,
                    ),
                ),
                (
                    _copier,
                    (
                        q_desc, do_desc, k_desc, v_desc, part_desc, q_s, do_s, k_s, v_s, loaded,
                        full_q, full_do, done_q, done_do, order_ptr, begin, end, key0, group,
                        token0, past, past_part, G, HG, K, D, BM,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip


def launch_backward(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    do_THD: Tensor,
    partials: Tensor,
    others: tuple[Tensor, ...],
    scale: float,
    scale_log2: float,
    piece0: int,
    n_blocks: int,
    token0: int,
    grid: int,
    slots: int,
    select: int,
    resume: bool,
) -> None:
    """Write a chunk's partial dq and its share of dk and dv; see `SelectedGrad.chunk`.

    `others` are lse, delta, the partial and the summed dk and dv, order, pieces and blocks.
    """
    T, H, D = q_THD.shape
    G = v_TGD.shape[1]
    selected_backward_tma[(grid,)](
        pair_descriptor(q_THD, H // G),
        tile_descriptor(k_TGD, select),
        tile_descriptor(v_TGD, select),
        pair_descriptor(do_THD, H // G),
        pair_descriptor(partials, H // G),
        *others,
        scale,
        scale_log2,
        piece0,
        n_blocks,
        token0,
        T * H,
        partials.shape[0],
        G=G,
        HG=H // G,
        K=slots,
        SELECT=select,
        D=D,
        BM=64,
        RESUME=resume,
        num_warps=4,
        # Two programs of 4 + 1 (counted as 4) warps on a multiprocessor.
        maxnreg=128,
    )
