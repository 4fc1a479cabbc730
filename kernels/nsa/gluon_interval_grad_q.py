"""`interval_grad_q_kernel` for Hopper in Gluon, specialised by warps.

One warp copies, two groups of four warps, each with 64 queries of its own, multiply. The partials
of the selected branch come through the same buffers as keys and values, two slots at a time, and a
product with a matrix of ones and zeros adds them up: that takes no registers, and the copies run
far ahead, so that memory and arithmetic are busy together.
"""

# Arguments of @gluon.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.nsa.gluon_interval import tile_descriptor, tile_range, tile_start
from kernels.nsa.triton_interval import LOG2_E


@gluon.jit
def _copy_tiles(
    k_desc, v_desc, k_s, v_s, full, empty, done, tiles, start, full_low, full_high, group,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for j in range(0, tiles):
        n0, _ = tile_start(j, start, full_low, full_high, BN)
        i = done + j
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [n0, group * D], bar, k_s.index(stage))
        tma.async_copy_global_to_shared(v_desc, [n0, group * D], bar, v_s.index(stage))


@gluon.jit
def _producer(
    q_desc, do_desc, part_desc, k1_desc, v1_desc, k2_desc, v2_desc, q_s, do_s, k_s, v_s, loaded,
    full, empty, first, local, head, group, pairs, tiles1, start1, full_low1, full_high1, tiles2,
    start2, full_low2, full_high2, HG: gl.constexpr, K: gl.constexpr, D: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(loaded, 4 * q_desc.block_type.nbytes)
    for c in gl.static_range(2):
        at = [first + c * 64, head * D]
        tma.async_copy_global_to_shared(q_desc, at, loaded, q_s.index(c))
        tma.async_copy_global_to_shared(do_desc, at, loaded, do_s.index(c))
    for i in range(0, pairs):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, 4 * part_desc.block_type.nbytes)
        for h in gl.static_range(2):
            column = ((group * K + 2 * i + h) * HG + head % HG) * D
            tma.async_copy_global_to_shared(
                part_desc, [local, column], bar, k_s.index(stage).slice(h * 64, 64)
            )
            tma.async_copy_global_to_shared(
                part_desc, [local + 64, column], bar, v_s.index(stage).slice(h * 64, 64)
            )
    _copy_tiles(
        k1_desc, v1_desc, k_s, v_s, full, empty, pairs, tiles1, start1, full_low1, full_high1,
        group, D, BN, STAGES,
    )  # fmt: skip
    _copy_tiles(
        k2_desc, v2_desc, k_s, v_s, full, empty, pairs + tiles1, tiles2, start2, full_low2,
        full_high2, group, D, BN, STAGES,
    )  # fmt: skip


@gluon.jit
def _branch(
    acc, q, do, k_s, v_s, full, empty, done, tiles, start, full_low, full_high, lse_ptr, delta_ptr,
    low_ptr, high_ptr, rows, inside, scale_log2, BN: gl.constexpr, STAGES: gl.constexpr,
    scores: gl.constexpr, operand: gl.constexpr,
):  # fmt: skip
    lse = gl.load(lse_ptr + rows, mask=inside, other=0.0)
    delta = gl.load(delta_ptr + rows, mask=inside, other=0.0)
    low = gl.load(low_ptr + rows, mask=inside, other=0)
    high = gl.load(high_ptr + rows, mask=inside, other=0)
    zero = gl.zeros([64, BN], gl.float32, scores)
    for j in range(0, tiles):
        n0, masked = tile_start(j, start, full_low, full_high, BN)
        i = done + j
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        k = k_s.index(stage)
        v = v_s.index(stage)
        s = warpgroup_mma(q, k.permute([1, 0]), zero, use_acc=False, is_async=True)
        dp = warpgroup_mma(do, v.permute([1, 0]), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        p = gl.exp2(s * scale_log2 - lse[:, None])
        dp = warpgroup_mma_wait(0, deps=(dp,))
        ds = p * (dp - delta[:, None])
        if masked:
            n = n0 + gl.arange(0, BN, gl.SliceLayout(0, scores))
            visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
            ds = gl.where(visible, ds, 0.0)
        a = gl.convert_layout(ds.to(k_s.dtype), operand)
        acc = warpgroup_mma(a, k, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage), count=1)
    return acc


@gluon.jit
def _consumer(
    c: gl.constexpr,
    q_s, do_s, k_s, v_s, loaded, full, empty, dq_ptr, lse_ptr, delta_ptr, start_ptr, low1_ptr,
    high1_ptr, low2_ptr, high2_ptr, first, token_end, head, pairs, tiles1, start1, full_low1,
    full_high1, tiles2, start2, full_low2, full_high2, scale, scale_log2, T, H,
    K: gl.constexpr, SELECT: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_s.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    local = gl.arange(0, 64, gl.SliceLayout(1, scores))
    rows = first + c * 64 + local
    inside = rows < token_end
    acc = gl.zeros([64, D], gl.float32, wide)
    # The slots of a query are used from the first on.
    used = (rows - gl.load(start_ptr + rows, mask=inside, other=0)) // SELECT + 1
    used = gl.where(inside, gl.minimum(used, K), 0)
    column = gl.arange(0, BN, gl.SliceLayout(0, scores))
    mbarrier.wait(loaded, 0)
    for i in range(0, pairs):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        same = (column % 64)[None, :] == local[:, None]
        real = (2 * i + column // 64)[None, :] < used[:, None]
        one = gl.where(same & real, 1.0, 0.0).to(dtype)
        a = gl.convert_layout(one, operand)
        if c == 0:
            acc = warpgroup_mma(a, k_s.index(stage), acc, is_async=True)
        else:
            acc = warpgroup_mma(a, v_s.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage), count=1)
    q = q_s.index(c)
    do = do_s.index(c)
    at = head.to(gl.int64) * T
    acc = _branch(
        acc, q, do, k_s, v_s, full, empty, pairs, tiles1, start1, full_low1, full_high1,
        lse_ptr + at, delta_ptr + at, low1_ptr, high1_ptr, rows, inside, scale_log2, BN, STAGES,
        scores, operand,
    )  # fmt: skip
    at += H.to(gl.int64) * T
    acc = _branch(
        acc, q, do, k_s, v_s, full, empty, pairs + tiles1, tiles2, start2, full_low2, full_high2,
        lse_ptr + at, delta_ptr + at, low2_ptr, high2_ptr, rows, inside, scale_log2, BN, STAGES,
        scores, operand,
    )  # fmt: skip
    # Through the queries' tile, so that rows leave in 16-byte pieces.
    out: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q.store((acc * scale).to(dtype))
    leaving = q.load(out)
    t = first + c * 64 + gl.arange(0, 64, gl.SliceLayout(1, out))
    d = gl.arange(0, D, gl.SliceLayout(0, out))
    to = (t.to(gl.int64) * H + head)[:, None] * D + d[None, :]
    gl.store(dq_ptr + to, leaving, mask=(t < token_end)[:, None])


# Sizes that change with every pack of documents must not each compile a kernel anew.
@gluon.jit(do_not_specialize=("T", "token0", "token_end"))
def interval_grad_q_gluon(
    q_desc,
    do_desc,
    part_desc,
    k1_desc,
    v1_desc,
    k2_desc,
    v2_desc,
    dq_ptr,
    lse_ptr,
    delta_ptr,
    start_ptr,
    low1_ptr,
    high1_ptr,
    low2_ptr,
    high2_ptr,
    scale,
    scale_log2,
    T,
    token0,
    token_end,
    HG: gl.constexpr,
    K: gl.constexpr,
    SELECT: gl.constexpr,
    D: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    FIRST: gl.constexpr,
    SECOND: gl.constexpr,
    PARTIALS: gl.constexpr,
):
    """dq[t, h] of the compressed (FIRST), sliding (SECOND) and selected (PARTIALS) branch."""
    head = gl.program_id(0)
    H = gl.num_programs(0)
    group = head // HG
    # Later tiles see more compressed slots: the heavy ones go first.
    first = token0 + (gl.num_programs(1) - 1 - gl.program_id(1)) * 128
    last = gl.minimum(first + 128, token_end) - 1
    pairs = gl.to_tensor(0)
    if PARTIALS:
        rows = first + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
        position = rows - gl.load(start_ptr + rows, mask=rows <= last, other=2147483647)
        pairs = (gl.minimum(gl.max(position, 0) // SELECT + 1, K) + 1) // 2
    start1, stop1, full_low1, full_high1 = tile_range(low1_ptr, high1_ptr, first, last, BN)
    start2, stop2, full_low2, full_high2 = tile_range(low2_ptr, high2_ptr, first, last, BN)
    tiles1 = gl.to_tensor(0)
    tiles2 = gl.to_tensor(0)
    if FIRST:
        tiles1 = gl.cdiv(gl.maximum(stop1 - full_high1, 0), BN) + (full_high1 - start1) // BN
    if SECOND:
        tiles2 = gl.cdiv(gl.maximum(stop2 - full_high2, 0), BN) + (full_high2 - start2) // BN
    dtype: gl.constexpr = q_desc.dtype
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], q_desc.layout)
    do_s = gl.allocate_shared_memory(dtype, [2, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], k1_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], v1_desc.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [1], bars)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    mbarrier.init(loaded, count=1)
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    gl.constexpr(0), q_s, do_s, k_s, v_s, loaded, full, empty, dq_ptr, lse_ptr,
                    delta_ptr, start_ptr, low1_ptr, high1_ptr, low2_ptr, high2_ptr, first,
                    token_end, head, pairs, tiles1, start1, full_low1, full_high1, tiles2, start2,
                    full_low2, full_high2, scale, scale_log2, T, H, K, SELECT, D, BN, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    gl.constexpr(1), q_s, do_s, k_s, v_s, loaded, full, empty, dq_ptr, lse_ptr,
                    delta_ptr, start_ptr, low1_ptr, high1_ptr, low2_ptr, high2_ptr, first,
                    token_end, head, pairs, tiles1, start1, full_low1, full_high1, tiles2, start2,
                    full_low2, full_high2, scale, scale_log2, T, H, K, SELECT, D, BN, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, do_desc, part_desc, k1_desc, v1_desc, k2_desc, v2_desc, q_s, do_s,
                    k_s, v_s, loaded, full, empty, first, first - token0, head, group, pairs,
                    tiles1, start1, full_low1, full_high1, tiles2, start2, full_low2, full_high2,
                    HG, K, D, BN, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@triton.jit(do_not_specialize=("token0", "token_end"))
def clear_unused_kernel(
    part_ptr,
    start_ptr,
    token0,
    token_end,
    G: tl.constexpr,
    K: tl.constexpr,
    SELECT: tl.constexpr,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
):
    """Zero the partials of slots that a query does not use and its tile of 128 queries does.

    0 times what lies there is added to dq, and must not be a NaN.
    """
    first = token0 + tl.program_id(0) // (128 // BM) * 128
    tile = first + tl.arange(0, 128)
    start = tl.load(start_ptr + tile, mask=tile < token_end, other=2147483647)
    # Slots come in pairs.
    most = tl.minimum((tl.max(tile - start, 0) // SELECT + 2) // 2 * 2, K)
    width = tl.arange(0, WIDTH)
    for r in range(BM):
        row = token0 + tl.program_id(0) * BM + r
        if row < token_end:
            used = tl.minimum((row - tl.load(start_ptr + row)) // SELECT + 1, K)
            for slot in range(used, most):
                at = ((row - token0).to(tl.int64) * G + tl.program_id(1)) * K + slot
                zero = tl.zeros((WIDTH,), part_ptr.dtype.element_ty)
                tl.store(part_ptr + at * WIDTH + width, zero)


def launch(
    dq_THD: Tensor,
    q_THD: Tensor,
    do_THD: Tensor,
    partials: Tensor | None,
    slots: int,
    start_T: Tensor,
    tokens: tuple[int, int],
    compressed: tuple[Tensor, Tensor, Tensor, Tensor],
    window: tuple[Tensor, Tensor, Tensor, Tensor],
    lse_2HT: Tensor,
    delta_2HT: Tensor,
    scale: float,
    select: int,
    stages: int,
    branches: tuple[bool, bool],
) -> None:
    """Write dq of the tokens [begin, end); see `interval_grad_q`."""
    T, H, D = q_THD.shape
    k1, v1, low1, high1 = compressed
    k2, v2, low2, high2 = window
    G = k1.shape[1]
    HG = H // G
    if partials is None:
        rows = q_THD
    else:
        rows = partials.view(-1, H * slots, D)
        clear_unused_kernel[(triton.cdiv(tokens[1] - tokens[0], 16), G)](
            partials, start_T, *tokens, G=G, K=slots, SELECT=select, WIDTH=HG * D, BM=16,
            num_warps=4,
        )  # fmt: skip
    BN = 128
    interval_grad_q_gluon[(H, triton.cdiv(tokens[1] - tokens[0], 128))](
        tile_descriptor(q_THD, 64),
        tile_descriptor(do_THD, 64),
        tile_descriptor(rows, 64),
        tile_descriptor(k1, BN),
        tile_descriptor(v1, BN),
        tile_descriptor(k2, BN),
        tile_descriptor(v2, BN),
        dq_THD,
        lse_2HT,
        delta_2HT,
        start_T,
        low1,
        high1,
        low2,
        high2,
        scale,
        scale * LOG2_E,
        T,
        *tokens,
        HG=HG,
        K=slots,
        SELECT=select,
        D=D,
        BN=BN,
        STAGES=stages,
        FIRST=branches[0],
        SECOND=branches[1],
        PARTIALS=partials is not None,
        num_warps=4,
    )
