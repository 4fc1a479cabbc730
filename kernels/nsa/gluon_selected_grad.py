"""`selected_backward_kernel` for Hopper in Gluon: the same sums, with the copies in flight early.

Stock Triton issues a tile's gathered copies at the end of the previous tile and waits for them at
once. Here the rows of tile i + 1 and the list entries of tile i + 2 are on their way while tile i
is multiplied, and the partial dq leaves through the buffer that its queries came in.
"""

# Arguments of @gluon.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.nsa.gluon_selected import copy_rows, load_entries, row_offsets


# Sizes that change with every pack of documents must not each compile a kernel anew.
@gluon.jit(do_not_specialize=("piece0", "NB", "token0"))
def selected_backward_gluon(  # noqa: PLR0912, PLR0915  (one kernel)
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    part_ptr,
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
    stride_qt,
    stride_qh,
    stride_dt,
    stride_dh,
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
    RESUME: gl.constexpr,
):
    number = gl.program_id(0)
    at = piece_ptr + (piece0 + number) * 4
    begin = gl.load(at)
    end = gl.load(at + 1)
    block = gl.load(at + 2)
    tag = gl.load(at + 3)
    if begin < end:
        QUERIES: gl.constexpr = BM // HG
        dtype: gl.constexpr = q_ptr.dtype.element_ty
        scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
        wide_k: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
        wide_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
        rows_k: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        rows_v: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [4, 1], [1, 0])
        flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        tile_k: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, D], dtype)
        tile_v: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, DV], dtype)
        tile_s: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SELECT, BM], dtype)

        group = tag // 2
        k_s = gl.allocate_shared_memory(dtype, [SELECT, D], tile_k)
        v_s = gl.allocate_shared_memory(dtype, [SELECT, DV], tile_v)
        q_s = gl.allocate_shared_memory(dtype, [2, BM, D], tile_k)
        do_s = gl.allocate_shared_memory(dtype, [2, BM, DV], tile_v)
        ds_s = gl.allocate_shared_memory(dtype, [SELECT, BM], tile_s)
        lse_s = gl.allocate_shared_memory(gl.float32, [2, BM], plain)
        delta_s = gl.allocate_shared_memory(gl.float32, [2, BM], plain)

        d = gl.arange(0, D, gl.SliceLayout(0, rows_k))
        f = gl.arange(0, DV, gl.SliceLayout(0, rows_v))
        rk = gl.arange(0, BM, gl.SliceLayout(1, rows_k))
        rv = gl.arange(0, BM, gl.SliceLayout(1, rows_v))
        rf = gl.arange(0, BM, flat)
        head_k = group * HG + rk % HG
        head_v = group * HG + rv % HG
        head_f = group * HG + rf % HG
        entry_k, ok_k = load_entries(order_ptr, begin, end, rk, HG)
        if D == DV:
            entry_v, ok_v = entry_k, ok_k
        else:
            entry_v, ok_v = load_entries(order_ptr, begin, end, rv, HG)
        entry_f, ok_f = load_entries(order_ptr, begin, end, rf, HG)

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
        t_k = entry_k // (G * K)
        copy_rows(q_s.index(0), q_ptr, t_k, head_k, d, ok_k, stride_qt, stride_qh, WIDE)
        t_v = entry_v // (G * K)
        copy_rows(do_s.index(0), do_ptr, t_v, head_v, f, ok_v, stride_dt, stride_dh, WIDE)
        at_f = entry_f // (G * K) * (G * HG) + head_f
        async_copy.async_copy_global_to_shared(lse_s.index(0), lse_ptr + at_f, mask=ok_f)
        async_copy.async_copy_global_to_shared(delta_s.index(0), delta_ptr + at_f, mask=ok_f)
        async_copy.commit_group()

        own_end = begin
        if gl.load(order_ptr + begin) // (G * K) < key0 + SELECT:
            own_end = begin + gl.cdiv(SELECT, QUERIES) * QUERIES
        next_k, next_ok_k = load_entries(order_ptr, begin + QUERIES, end, rk, HG)
        if D == DV:
            next_v, next_ok_v = next_k, next_ok_k
        else:
            next_v, next_ok_v = load_entries(order_ptr, begin + QUERIES, end, rv, HG)
        next_f, next_ok_f = load_entries(order_ptr, begin + QUERIES, end, rf, HG)

        dk = gl.zeros([SELECT, D], gl.float32, wide_k)
        dv = gl.zeros([SELECT, DV], gl.float32, wide_v)
        no_scores = gl.zeros([SELECT, BM], gl.float32, scores)
        no_dq = gl.zeros([BM, D], gl.float32, wide_k)
        buffer = 0
        for i in range(begin, end, QUERIES):
            async_copy.wait_group(0)
            other = 1 - buffer
            t_k = next_k // (G * K)
            copy_rows(
                q_s.index(other), q_ptr, t_k, head_k, d, next_ok_k, stride_qt, stride_qh, WIDE
            )
            t_v = next_v // (G * K)
            copy_rows(
                do_s.index(other), do_ptr, t_v, head_v, f, next_ok_v, stride_dt, stride_dh, WIDE
            )
            at_f = next_f // (G * K) * (G * HG) + head_f
            async_copy.async_copy_global_to_shared(
                lse_s.index(other), lse_ptr + at_f, mask=next_ok_f
            )
            async_copy.async_copy_global_to_shared(
                delta_s.index(other), delta_ptr + at_f, mask=next_ok_f
            )
            async_copy.commit_group()

            q = q_s.index(buffer)
            do = do_s.index(buffer)
            st = warpgroup_mma(k_s, q.permute([1, 0]), no_scores, use_acc=False, is_async=True)
            dpt = warpgroup_mma(v_s, do.permute([1, 0]), no_scores, use_acc=False, is_async=True)
            row_k = (entry_k - token0 * (G * K)) * HG + rk % HG
            row_ok = ok_k
            entry_k, ok_k = next_k, next_ok_k
            i_next = i + 2 * QUERIES
            next_k, next_ok_k = load_entries(order_ptr, i_next, end, rk, HG)
            if D == DV:
                next_v, next_ok_v = next_k, next_ok_k
            else:
                next_v, next_ok_v = load_entries(order_ptr, i_next, end, rv, HG)
            next_f, next_ok_f = load_entries(order_ptr, i_next, end, rf, HG)
            st = warpgroup_mma_wait(1, deps=(st,))
            lse = lse_s.index(buffer).load(gl.SliceLayout(0, scores))
            # Rows beyond the piece have q = do = 0 and add nothing.
            pt = gl.exp2(st * scale_log2 - lse[None, :])
            if i < own_end:
                column = gl.arange(0, BM, gl.SliceLayout(0, scores))
                entry, _ = load_entries(order_ptr, i, end, column, HG)
                t = entry // (G * K)
                key = key0 + gl.arange(0, SELECT, gl.SliceLayout(1, scores))
                seen = (key[:, None] <= t[None, :]) & (key < key_end)[:, None]
                pt = gl.where(seen, pt, 0.0)
            p16 = gl.convert_layout(pt.to(dtype), gl.DotOperandLayout(0, wide_v, 2))
            dv = warpgroup_mma(p16, do, dv, is_async=True)
            dpt = warpgroup_mma_wait(1, deps=(dpt,))
            delta = delta_s.index(buffer).load(gl.SliceLayout(0, scores))
            ds16 = (pt * (dpt - delta[None, :])).to(dtype)
            ds_s.store(ds16)
            fence_async_shared()
            dv = warpgroup_mma_wait(0, deps=(dv,))
            dk = warpgroup_mma(ds_s, q, dk, is_async=True)
            dq = warpgroup_mma(ds_s.permute([1, 0]), k_s, no_dq, use_acc=False, is_async=True)
            dq, dk = warpgroup_mma_wait(0, deps=(dq, dk))
            q.store(dq.to(dtype))
            leaving = q.load(rows_k)
            gl.store(
                part_ptr + row_offsets(row_k, D, WIDE)[:, None] + d[None, :],
                leaving,
                mask=row_ok[:, None],
                cache_modifier=".cs",
            )
            buffer = other
        async_copy.wait_group(0)
        dk *= scale
        key_dk = gl.arange(0, SELECT, gl.SliceLayout(1, wide_k))
        key_dv = gl.arange(0, SELECT, gl.SliceLayout(1, wide_v))
        d_dk = gl.arange(0, D, gl.SliceLayout(0, wide_k))
        f_dv = gl.arange(0, DV, gl.SliceLayout(0, wide_v))
        if tag % 2 == 1:
            own_k = (key0 + key_dk < key_end)[:, None]
            own_v = (key0 + key_dv < key_end)[:, None]
            sum_k = (key0 + key_dk).to(gl.int64) * G + group
            sum_v = (key0 + key_dv).to(gl.int64) * G + group
            dk_at = dk_sum_ptr + sum_k[:, None] * D + d_dk[None, :]
            dv_at = dv_sum_ptr + sum_v[:, None] * DV + f_dv[None, :]
            if RESUME:
                dk += gl.load(dk_at, mask=own_k, other=0.0)
                dv += gl.load(dv_at, mask=own_v, other=0.0)
            gl.store(dk_at, dk, mask=own_k)
            gl.store(dv_at, dv, mask=own_v)
        else:
            wide_row = number.to(gl.int64) * SELECT
            gl.store(dk_part_ptr + (wide_row + key_dk)[:, None] * D + d_dk[None, :], dk)
            gl.store(dv_part_ptr + (wide_row + key_dv)[:, None] * DV + f_dv[None, :], dv)
