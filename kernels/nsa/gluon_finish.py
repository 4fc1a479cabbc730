"""End of the forward for Hopper in Gluon: the sliding branch, the merge of the partials, the gates.

The merge is bound by memory and the sliding branch by arithmetic. One warp copies keys and values
and then, through the same buffers, the partials of two slots at a time; two groups of four warps,
each with 64 queries of its own, multiply. A product with a matrix that holds the slots' weights on
its diagonals merges partials: that takes no registers, and the copies run far ahead.
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

from kernels.nsa.gluon_interval import softmax_step, tile_descriptor, tile_range, tile_start
from kernels.nsa.gluon_interval_grad_q import clear_unused_kernel
from kernels.nsa.triton_interval import LOG2_E


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, part_desc, q_s, k_s, v_s, loaded, full, empty, first, local, head,
    group, start, full_low, full_high, tiles, pairs, HG: gl.constexpr, K: gl.constexpr,
    D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(loaded, 2 * q_desc.block_type.nbytes)
    for c in gl.static_range(2):
        tma.async_copy_global_to_shared(q_desc, [first + c * 64, head * D], loaded, q_s.index(c))
    for i in range(0, tiles):
        n0, _ = tile_start(i, start, full_low, full_high, BN)
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, 2 * k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [n0, group * D], bar, k_s.index(stage))
        tma.async_copy_global_to_shared(v_desc, [n0, group * D], bar, v_s.index(stage))
    for j in range(0, pairs):
        i = tiles + j
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, 4 * part_desc.block_type.nbytes)
        for h in gl.static_range(2):
            column = ((group * K + 2 * j + h) * HG + head % HG) * D
            tma.async_copy_global_to_shared(
                part_desc, [local, column], bar, k_s.index(stage).slice(h * 64, 64)
            )
            tma.async_copy_global_to_shared(
                part_desc, [local + 64, column], bar, v_s.index(stage).slice(h * 64, 64)
            )


@gluon.jit
def _consumer(  # noqa: PLR0915  (one kernel)
    c: gl.constexpr,
    q_s, k_s, v_s, loaded, full, empty, part_lse_ptr, gates_ptr, compressed_ptr, window_ptr,
    slc_ptr, out_ptr, lse_win_ptr, lse_slc_ptr, start_ptr, low_ptr, high_ptr, first, local0,
    token_end, head, group, H, start, full_low, full_high, tiles, pairs, scale_log2, T,
    HG: gl.constexpr, K: gl.constexpr, SELECT: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_s.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, wide)
    local = gl.arange(0, 64, gl.SliceLayout(1, scores))
    rows = first + c * 64 + local
    inside = rows < token_end
    low = gl.load(low_ptr + rows, mask=inside, other=0)
    high = gl.load(high_ptr + rows, mask=inside, other=0)

    # Log-sum-exp over the slots of a query, which are used from the first on.
    used = (rows - gl.load(start_ptr + rows, mask=inside, other=0)) // SELECT + 1
    used = gl.where(inside, gl.minimum(used, K), 0)
    pair = (local0 + c * 64 + local) * (H // HG) + group
    part_lse = part_lse_ptr + pair.to(gl.int64) * (K * HG) + head % HG
    top = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, scores))
    sums = gl.zeros([64], gl.float32, gl.SliceLayout(1, scores))
    for j in gl.static_range(K):
        x = gl.load(part_lse + j * HG, mask=j < used, other=float("-inf"))
        new_top = gl.maximum(top, x)
        sums = sums * gl.exp2(top - new_top) + gl.exp2(x - new_top)
        top = new_top
    lse_slc = top + gl.log2(gl.maximum(sums, 1e-30))
    gl.store(lse_slc_ptr + rows.to(gl.int64) * H + head, lse_slc, mask=inside)

    # Finite, so that a row that sees nothing never computes inf - inf.
    high_water = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, scores))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, scores))
    zero = gl.zeros([64, BN], gl.float32, scores)
    o = gl.zeros([64, D], gl.float32, wide)
    q = q_s.index(c)
    mbarrier.wait(loaded, 0)
    for i in range(0, tiles):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        s = warpgroup_mma(q, k_s.index(stage).permute([1, 0]), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        p, high_water, total, shrink = softmax_step(
            s, high_water, total, i, start, full_low, full_high, low, high, scale_log2, BN, scores
        )
        o = o * gl.convert_layout(shrink, by_row)[:, None]
        p16 = gl.convert_layout(p.to(dtype), operand)
        o = warpgroup_mma(p16, v_s.index(stage), o, is_async=True)
        o = warpgroup_mma_wait(0, deps=(o,))
        mbarrier.arrive(empty.index(stage), count=1)
    some = total > 0
    safe = gl.where(some, total, 1.0)
    lse = gl.where(some, high_water + gl.log2(safe), 0.0)
    gl.store(lse_win_ptr + head.to(gl.int64) * T + rows, lse, mask=inside)
    o = o * gl.convert_layout(1.0 / safe, by_row)[:, None]

    # Rows leave in 16-byte pieces, through the queries' tile.
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    t = first + c * 64 + gl.arange(0, 64, gl.SliceLayout(1, flat))
    d = gl.arange(0, D, gl.SliceLayout(0, flat))
    wide_row = t.to(gl.int64) * H + head
    at = wide_row[:, None] * D + d[None, :]
    mask = (t < token_end)[:, None]
    q.store(o.to(dtype))
    window = q.load(flat)
    gl.store(window_ptr + at, window, mask=mask)

    slc = gl.zeros([64, D], gl.float32, wide)
    column = gl.arange(0, BN, gl.SliceLayout(0, scores))
    for j in range(0, pairs):
        i = tiles + j
        stage = i % STAGES
        x0 = gl.load(part_lse + 2 * j * HG, mask=2 * j < used, other=float("-inf"))
        x1 = gl.load(part_lse + (2 * j + 1) * HG, mask=2 * j + 1 < used, other=float("-inf"))
        w0 = gl.exp2(x0 - lse_slc)
        w1 = gl.exp2(x1 - lse_slc)
        same = (column % 64)[None, :] == local[:, None]
        weight = gl.where((column < 64)[None, :], w0[:, None], w1[:, None])
        a = gl.convert_layout(gl.where(same, weight, 0.0).to(dtype), operand)
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        if c == 0:
            slc = warpgroup_mma(a, k_s.index(stage), slc, is_async=True)
        else:
            slc = warpgroup_mma(a, v_s.index(stage), slc, is_async=True)
        slc = warpgroup_mma_wait(0, deps=(slc,))
        mbarrier.arrive(empty.index(stage), count=1)

    q.store(slc.to(dtype))
    selected = q.load(flat)
    gl.store(slc_ptr + at, selected, mask=mask)
    compressed = gl.load(compressed_ptr + at, mask=mask, other=0.0)
    gate = gates_ptr + wide_row * 3
    g0 = gl.load(gate, mask=t < token_end, other=0.0).to(gl.float32)
    g1 = gl.load(gate + 1, mask=t < token_end, other=0.0).to(gl.float32)
    g2 = gl.load(gate + 2, mask=t < token_end, other=0.0).to(gl.float32)
    out = g0[:, None] * compressed.to(gl.float32) + g1[:, None] * selected.to(gl.float32)
    out += g2[:, None] * window.to(gl.float32)
    gl.store(out_ptr + at, out.to(dtype), mask=mask)


# Sizes that change with every pack of documents must not each compile a kernel anew.
@gluon.jit(do_not_specialize=("T", "token0", "token_end"))
def finish_forward_gluon(
    q_desc,
    k_desc,
    v_desc,
    part_desc,
    part_lse_ptr,
    gates_ptr,
    compressed_ptr,
    window_ptr,
    slc_ptr,
    out_ptr,
    lse_win_ptr,
    lse_slc_ptr,
    start_ptr,
    low_ptr,
    high_ptr,
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
):
    """Window and selected output of the tokens [token0, token_end), and the gated sum of all three.

    Outputs are [T, H, D]; the window's log-sum-exp is [H, T], the selected one's [T, H].
    """
    head = gl.program_id(0)
    H = gl.num_programs(0)
    group = head // HG
    first = token0 + gl.program_id(1) * 128
    last = gl.minimum(first + 128, token_end) - 1
    rows = first + gl.arange(0, 128, gl.BlockedLayout([1], [32], [4], [0]))
    position = rows - gl.load(start_ptr + rows, mask=rows <= last, other=2147483647)
    pairs = (gl.minimum(gl.max(position, 0) // SELECT + 1, K) + 1) // 2
    start, stop, full_low, full_high = tile_range(low_ptr, high_ptr, first, last, BN)
    tiles = gl.cdiv(gl.maximum(stop - full_high, 0), BN) + (full_high - start) // BN
    dtype: gl.constexpr = q_desc.dtype
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], q_desc.layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], k_desc.layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], v_desc.layout)
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
                    gl.constexpr(0), q_s, k_s, v_s, loaded, full, empty, part_lse_ptr, gates_ptr,
                    compressed_ptr, window_ptr, slc_ptr, out_ptr, lse_win_ptr, lse_slc_ptr,
                    start_ptr, low_ptr, high_ptr, first, first - token0, token_end, head, group,
                    H, start, full_low, full_high, tiles, pairs, scale_log2, T, HG, K, SELECT, D,
                    BN, STAGES,
                ),
            ),
            (
                _consumer,
                (
                    gl.constexpr(1), q_s, k_s, v_s, loaded, full, empty, part_lse_ptr, gates_ptr,
                    compressed_ptr, window_ptr, slc_ptr, out_ptr, lse_win_ptr, lse_slc_ptr,
                    start_ptr, low_ptr, high_ptr, first, first - token0, token_end, head, group,
                    H, start, full_low, full_high, tiles, pairs, scale_log2, T, HG, K, SELECT, D,
                    BN, STAGES,
                ),
            ),
            (
                _producer,
                (
                    q_desc, k_desc, v_desc, part_desc, q_s, k_s, v_s, loaded, full, empty, first,
                    first - token0, head, group, start, full_low, full_high, tiles, pairs, HG, K,
                    D, BN, STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def launch(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    part: Tensor,
    part_lse: Tensor,
    gates_TH3: Tensor,
    compressed_THD: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    lse_win_HT: Tensor,
    lse_slc_TH: Tensor,
    start_T: Tensor,
    interval: tuple[Tensor, Tensor],
    tokens: tuple[int, int],
    slots: int,
    select: int,
    scale: float,
    stages: int,
) -> None:
    """Write the tokens [begin, end) of `outputs`, the window's, the selected and the gated sum.

    k and v are the window's, `interval` what a token sees of them; see `finish_forward`.
    """
    T, H, D = q_THD.shape
    G = k_TGD.shape[1]
    HG = H // G
    clear_unused_kernel[(triton.cdiv(tokens[1] - tokens[0], 16), G)](
        part, start_T, *tokens, G=G, K=slots, SELECT=select, WIDTH=HG * D, BM=16, num_warps=4,
    )  # fmt: skip
    finish_forward_gluon[(H, triton.cdiv(tokens[1] - tokens[0], 128))](
        tile_descriptor(q_THD, 64),
        tile_descriptor(k_TGD, 128),
        tile_descriptor(v_TGD, 128),
        tile_descriptor(part.view(-1, H * slots, D), 64),
        part_lse,
        gates_TH3,
        compressed_THD,
        *outputs,
        lse_win_HT,
        lse_slc_TH,
        start_T,
        *interval,
        scale * LOG2_E,
        T,
        *tokens,
        HG=HG,
        K=slots,
        SELECT=select,
        D=D,
        BN=128,
        STAGES=stages,
        num_warps=4,
    )
