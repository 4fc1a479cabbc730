"""`selected_forward_kernel` for Hopper and groups of 8 or 16 heads: the copy engine gathers.

The rows of a (query, group) pair lie together, so that one copy moves them; one warp issues the
copies and four multiply. Partial outputs leave through the buffer that their queries came in.
"""

# Arguments of @gluon.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,assignment"

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.nsa.gluon_interval import tile_descriptor, tile_layout


@gluon.jit
def tile_entries(order_ptr, e, end, QUERIES: gl.constexpr):
    """List entries e, e + 1 … of a tile as numbers of their own, -1 beyond the end.

    All at once: each in front of its copy, one load would wait for the other.
    """
    entries = (gl.load(order_ptr + e, mask=e < end, other=-1),)
    for j in gl.static_range(1, QUERIES):
        entries = entries + (gl.load(order_ptr + e + j, mask=e + j < end, other=-1),)  # noqa: RUF005
    return entries


@gluon.jit
def pair_row(entry, group, past, G: gl.constexpr, HG: gl.constexpr, K: gl.constexpr):
    """First row (query, head) of a list entry in [T * H, D]; `past` the last row beyond the end."""
    return gl.where(entry >= 0, (entry // (G * K) * G + group) * HG, past)


@gluon.jit
def slot_row(entry, entry0, past, HG: gl.constexpr):
    """First row (query, slot, head) of a list entry in the partials; `past` beyond the end."""
    return gl.where(entry >= 0, (entry - entry0) * HG, past)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, loaded, full, empty, order_ptr, begin, end, key0, group,
    past, G: gl.constexpr, HG: gl.constexpr, K: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
    BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    QUERIES: gl.constexpr = BM // HG
    mbarrier.expect(loaded, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [key0, group * D], loaded, k_s)
    tma.async_copy_global_to_shared(v_desc, [key0, group * DV], loaded, v_s)
    for i in range(0, gl.cdiv(end - begin, QUERIES)):
        stage = i % STAGES
        bar = full.index(stage)
        coming = tile_entries(order_ptr, begin + i * QUERIES, end, QUERIES)
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        mbarrier.expect(bar, QUERIES * q_desc.block_type.nbytes)
        for j in gl.static_range(QUERIES):
            row = pair_row(coming[j], group, past, G, HG, K)
            tma.async_copy_global_to_shared(
                q_desc, [row, 0], bar, q_s.index(stage).slice(j * HG, HG)
            )


@gluon.jit
def _consumer(
    part_desc, q_s, k_s, v_s, loaded, full, empty, order_ptr, part_lse_ptr, begin, end, key0,
    key_end, token0, scale_log2, past_part, G: gl.constexpr, HG: gl.constexpr, K: gl.constexpr,
    SELECT: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    QUERIES: gl.constexpr = BM // HG
    dtype: gl.constexpr = q_s.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SELECT, 16])
    wide_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide_v, 2)
    rows = gl.arange(0, BM, gl.SliceLayout(1, scores))
    key = key0 + gl.arange(0, SELECT, gl.SliceLayout(0, scores))
    zero = gl.zeros([BM, SELECT], gl.float32, scores)
    no_out = gl.zeros([BM, DV], gl.float32, wide_v)
    entry0 = token0 * (G * K)
    # A list is in token order, so the block's own queries, the only ones that do not see all of
    # its keys, come first.
    own_end = begin
    if gl.load(order_ptr + begin) // (G * K) < key0 + SELECT:
        own_end = begin + gl.cdiv(SELECT, QUERIES) * QUERIES
    mbarrier.wait(loaded, 0)
    for i in range(0, gl.cdiv(end - begin, QUERIES)):
        stage = i % STAGES
        at = begin + i * QUERIES
        e = at + rows // HG
        ok = e < end
        entry = gl.load(order_ptr + e, mask=ok, other=0)
        leaving = tile_entries(order_ptr, at, end, QUERIES)
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        q = q_s.index(stage)
        s = warpgroup_mma(q, k_s.permute([1, 0]), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        if at < own_end:
            seen = (key[None, :] <= (entry // (G * K))[:, None]) & (key < key_end)[None, :]
            s = gl.where(seen, s, float("-inf"))
        # Rows beyond the piece may see nothing.
        high = gl.maximum(gl.max(s, 1) * scale_log2, -1e30)
        p = gl.exp2(s * scale_log2 - high[:, None])
        total = gl.maximum(gl.sum(p, 1), 1e-30)
        p16 = gl.convert_layout(p.to(dtype), operand)
        o = warpgroup_mma(p16, v_s, no_out, use_acc=False, is_async=True)
        gl.store(part_lse_ptr + (entry - entry0) * HG + rows % HG, high + gl.log2(total), mask=ok)
        share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, wide_v))
        o = warpgroup_mma_wait(0, deps=(o,))
        q.store((o * share[:, None]).to(dtype))
        fence_async_shared()
        for j in gl.static_range(QUERIES):
            row = slot_row(leaving[j], entry0, past_part, HG)
            tma.async_copy_shared_to_global(part_desc, [row, 0], q.slice(j * HG, HG))
        if i > 0:
            # The buffer before this one has left by now.
            tma.store_wait(QUERIES)
            mbarrier.arrive(empty.index((i - 1) % STAGES), count=1)
    tma.store_wait(0)


# Sizes that change with every pack of documents must not each compile a kernel anew.
@gluon.jit(do_not_specialize=("piece0", "NB", "token0", "past", "past_part"))
def selected_forward_tma(
    q_desc,
    k_desc,
    v_desc,
    part_desc,
    part_lse_ptr,
    order_ptr,
    piece_ptr,
    block_ptr,
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
    DV: gl.constexpr,
    BM: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Partial output of every (query, slot) of one piece, normalised, with its log-sum-exp."""
    at = piece_ptr + (piece0 + gl.program_id(0)) * 4
    begin = gl.load(at)
    end = gl.load(at + 1)
    block = gl.load(at + 2)
    group = gl.load(at + 3) // 2
    if begin < end:
        key0 = gl.load(block_ptr + block)
        key_end = gl.load(block_ptr + NB + block)
        dtype: gl.constexpr = q_desc.dtype
        # A buffer is a tile; its queries are slices of HG rows.
        tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], dtype)
        k_s = gl.allocate_shared_memory(dtype, [SELECT, D], k_desc.layout)
        v_s = gl.allocate_shared_memory(dtype, [SELECT, DV], v_desc.layout)
        q_s = gl.allocate_shared_memory(dtype, [STAGES, BM, D], tile)
        loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        mbarrier.init(loaded, count=1)
        for s in gl.static_range(STAGES):
            mbarrier.init(full.index(s), count=1)
            mbarrier.init(empty.index(s), count=1)
        gl.warp_specialize(
            [
                (
                    _consumer,
                    (
                        part_desc, q_s, k_s, v_s, loaded, full, empty, order_ptr, part_lse_ptr,
                        begin, end, key0, key_end, token0, scale_log2, past_part, G, HG, K,
                        SELECT, D, DV, BM, STAGES,
                    ),
                ),
                (
                    _producer,
                    (
                        q_desc, k_desc, v_desc, q_s, k_s, v_s, loaded, full, empty, order_ptr,
                        begin, end, key0, group, past, G, HG, K, D, DV, BM, STAGES,
                    ),
                ),
            ],
            [1],
            [24],
        )  # fmt: skip


def pair_descriptor(x: Tensor, heads: int) -> TensorDescriptor:
    """Describe the rows of a (query, group) pair, or of one of its slots, of [..., D]."""
    D = x.shape[-1]
    layout = tile_layout(64, D, x.dtype)
    return TensorDescriptor(x, [x.numel() // D, D], [D, 1], [heads, D], layout)


def tma_takes(q_THD: Tensor, v_TGD: Tensor, partials: Tensor, *others: Tensor) -> bool:
    """Tell whether the copy engine can gather: whole swizzle patterns of 8 rows, one width."""
    H, D = q_THD.shape[1:]
    heads = H // v_TGD.shape[1]
    contiguous = all(x.is_contiguous() for x in (q_THD, partials, *others))
    return heads in {8, 16} and v_TGD.shape[2] == D and contiguous and partials.shape[0] < 2**31


def launch_forward(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    part: Tensor,
    part_lse: Tensor,
    order: Tensor,
    pieces: Tensor,
    blocks: Tensor,
    scale_log2: float,
    piece0: int,
    n_blocks: int,
    token0: int,
    grid: int,
    slots: int,
    select: int,
    stages: int,
) -> None:
    """Write the partial outputs and log-sum-exps of a chunk; see `selected_partials`."""
    T, H, D = q_THD.shape
    G, DV = v_TGD.shape[1:]
    selected_forward_tma[(grid,)](
        pair_descriptor(q_THD, H // G),
        tile_descriptor(k_TGD, select),
        tile_descriptor(v_TGD, select),
        pair_descriptor(part, H // G),
        part_lse,
        order,
        pieces,
        blocks,
        scale_log2,
        piece0,
        n_blocks,
        token0,
        T * H,
        part.shape[0],
        G=G,
        HG=H // G,
        K=slots,
        SELECT=select,
        D=D,
        DV=DV,
        BM=64,
        STAGES=stages,
        num_warps=4,
        # Two programs of 4 + 1 (counted as 4) warps on a multiprocessor.
        maxnreg=128,
    )
