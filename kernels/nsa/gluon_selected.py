"""`selected_forward_kernel` for Hopper in Gluon: the same sums, with the copies in flight early.

Stock Triton issues a tile's gathered copies at the end of the previous tile and waits for them at
once. Here the rows of tile i + 1 and the list entries of tile i + 2 are on their way while tile i
is multiplied, and the partial outputs leave through the buffer that their queries came in.
"""

# Arguments of @gluon.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def row_offsets(index, stride, WIDE: gl.constexpr):
    if WIDE:
        return index.to(gl.int64) * stride
    else:
        return index * stride


@gluon.jit
def load_entries(order_ptr, i, end, r, HG: gl.constexpr):
    """List entries of the rows r of the tile from entry i; 0 and False beyond the piece."""
    e = i + r // HG
    ok = e < end
    return gl.load(order_ptr + e, mask=ok, other=0), ok


@gluon.jit
def copy_rows(shared, ptr, t, head, d, ok, stride_t, stride_h, WIDE: gl.constexpr):
    """Start copying one row per (query, head) into shared memory; rows that are not ok are zero."""
    at = row_offsets(t, stride_t, WIDE) + head * stride_h
    async_copy.async_copy_global_to_shared(shared, ptr + at[:, None] + d[None, :], mask=ok[:, None])


# Sizes that change with every pack of documents must not each compile a kernel anew.
@gluon.jit(do_not_specialize=("piece0", "NB", "token0"))
def selected_forward_gluon(  # noqa: PLR0915  (one kernel)
    q_ptr,
    k_ptr,
    v_ptr,
    part_ptr,
    part_lse_ptr,
    order_ptr,
    piece_ptr,
    block_ptr,
    scale_log2,
    piece0,
    NB,
    token0,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kg,
    stride_vt,
    stride_vg,
    G: gl.constexpr,
    HG: gl.constexpr,
    K: gl.constexpr,
    SELECT: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    BM: gl.constexpr,
    WIDE: gl.constexpr,
):
    """Partial output of every (query, slot) of one piece, normalised, with its log-sum-exp."""
    at = piece_ptr + (piece0 + gl.program_id(0)) * 4
    begin = gl.load(at)
    end = gl.load(at + 1)
    block = gl.load(at + 2)
    group = gl.load(at + 3) // 2
    if begin < end:
        QUERIES: gl.constexpr = BM // HG
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SELECT, 16])
        wide_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
        rows_k: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        rows_v: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
        tile_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], dtype)
        tile_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, DV], dtype)

        k_s = gl.allocate_shared_memory(dtype, [SELECT, D], tile_k)
        v_s = gl.allocate_shared_memory(dtype, [SELECT, DV], tile_v)
        q_s = gl.allocate_shared_memory(dtype, [2, BM, D], tile_k)

        d = gl.arange(0, D, gl.SliceLayout(0, rows_k))
        f = gl.arange(0, DV, gl.SliceLayout(0, rows_v))
        rk = gl.arange(0, BM, gl.SliceLayout(1, rows_k))
        rs = gl.arange(0, BM, gl.SliceLayout(1, scores))
        head_k = group * HG + rk % HG
        entry_k, ok_k = load_entries(order_ptr, begin, end, rk, HG)
        entry_s, ok_s = load_entries(order_ptr, begin, end, rs, HG)

        key0 = gl.load(block_ptr + block)
        key_end = gl.load(block_ptr + NB + block)
        key_k = key0 + gl.arange(0, SELECT, gl.SliceLayout(1, rows_k))
        key_v = key0 + gl.arange(0, SELECT, gl.SliceLayout(1, rows_v))
        wide_group = group.to(gl.int64)
        copy_rows(
            k_s, k_ptr + wide_group * stride_kg, key_k, 0, d, key_k < key_end, stride_kt, 0, True
        )
        copy_rows(
            v_s, v_ptr + wide_group * stride_vg, key_v, 0, f, key_v < key_end, stride_vt, 0, True
        )
        copy_rows(
            q_s.index(0), q_ptr, entry_k // (G * K), head_k, d, ok_k, stride_qt, stride_qh, WIDE
        )
        async_copy.commit_group()

        # A list is in token order, so the block's own queries, the only ones that do not see all of
        # its keys, come first.
        own_end = begin
        if gl.load(order_ptr + begin) // (G * K) < key0 + SELECT:
            own_end = begin + gl.cdiv(SELECT, QUERIES) * QUERIES
        next_k, next_ok_k = load_entries(order_ptr, begin + QUERIES, end, rk, HG)
        no_scores = gl.zeros([BM, SELECT], gl.float32, scores)
        no_out = gl.zeros([BM, DV], gl.float32, wide_v)
        buffer = 0
        for i in range(begin, end, QUERIES):
            async_copy.wait_group(0)
            other = 1 - buffer
            copy_rows(
                q_s.index(other), q_ptr, next_k // (G * K), head_k, d, next_ok_k, stride_qt,
                stride_qh, WIDE,
            )  # fmt: skip
            async_copy.commit_group()
            q = q_s.index(buffer)
            s = warpgroup_mma(q, k_s.permute([1, 0]), no_scores, use_acc=False, is_async=True)
            after = i + 2 * QUERIES
            later_k, later_ok_k = load_entries(order_ptr, after, end, rk, HG)
            next_s, next_ok_s = load_entries(order_ptr, i + QUERIES, end, rs, HG)
            s = warpgroup_mma_wait(0, deps=(s,))
            if i < own_end:
                key = key0 + gl.arange(0, SELECT, gl.SliceLayout(0, scores))
                seen = (key[None, :] <= (entry_s // (G * K))[:, None]) & (key < key_end)[None, :]
                s = gl.where(seen, s, float("-inf"))
            # Rows beyond the piece may see nothing.
            high = gl.maximum(gl.max(s, 1) * scale_log2, -1e30)
            p = gl.exp2(s * scale_log2 - high[:, None])
            total = gl.maximum(gl.sum(p, 1), 1e-30)
            p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, wide_v, 2))
            o = warpgroup_mma(p16, v_s, no_out, use_acc=False, is_async=True)
            row_s = (entry_s - token0 * (G * K)) * HG + rs % HG
            gl.store(part_lse_ptr + row_s, high + gl.log2(total), mask=ok_s)
            share = gl.convert_layout(1.0 / total, gl.SliceLayout(1, wide_v))
            o = warpgroup_mma_wait(0, deps=(o,))
            row_k = (entry_k - token0 * (G * K)) * HG + rk % HG
            if D == DV:
                q.store((o * share[:, None]).to(dtype))
                leaving = q.load(rows_k)
            else:
                leaving = gl.convert_layout((o * share[:, None]).to(dtype), rows_v)
                row_k = gl.convert_layout(row_k, gl.SliceLayout(1, rows_v))
            gl.store(
                part_ptr + row_offsets(row_k, DV, WIDE)[:, None] + f[None, :],
                leaving,
                mask=gl.convert_layout(ok_k, gl.SliceLayout(1, rows_v))[:, None],
                cache_modifier=".cs",
            )
            buffer = other
            entry_k, ok_k = next_k, next_ok_k
            next_k, next_ok_k = later_k, later_ok_k
            entry_s, ok_s = next_s, next_ok_s
        async_copy.wait_group(0)
