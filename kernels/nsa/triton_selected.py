"""Attention to the selected blocks, one program per block and piece of its list of queries.

The block's keys and values stay on chip while the queries that chose it pass by, all heads of the
group together: a (query, block) pair moves one row of q and one partial output instead of the
whole block. Partials of a chunk of queries are merged by their log-sum-exp in slot order, and the
merge also gates and adds the three branches. Everything is a sum in a fixed order.
"""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.nsa.spec import NsaSpec
from kernels.nsa.triton_config import KernelConfigs, pow2
from kernels.nsa.triton_interval import LOG2_E
from kernels.nsa.triton_layout import PackedLayout
from kernels.nsa.triton_select import BlockLists, cut_pieces


@triton.jit
def load_rows(ptr, at, d, ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    if BLOCK == WIDTH:
        return tl.load(ptr + at[:, None] + d[None, :], mask=ok[:, None], other=0.0)
    return tl.load(
        ptr + at[:, None] + d[None, :], mask=ok[:, None] & (d < WIDTH)[None, :], other=0.0
    )


@triton.jit
def entries(
    order_ptr, i, end, group, G: tl.constexpr, HG: tl.constexpr, K: tl.constexpr, BM: tl.constexpr
):
    """Rows of a tile: its (query, slot) entries times the heads of the group."""
    r = tl.arange(0, BM)
    e = i + r // HG
    ok = e < end
    entry = tl.load(order_ptr + e, mask=ok, other=0)
    return ok, entry, entry // (G * K), group * HG + r % HG


@triton.jit
def offsets(index, stride, WIDE: tl.constexpr):
    """Element offsets; 64 bits wide only for tensors that need it, since rows are gathered."""
    if WIDE:
        return index.to(tl.int64) * stride
    else:
        return index * stride


@triton.jit
def _forward_tile(
    q_ptr,
    k,
    v,
    part_ptr,
    part_lse_ptr,
    order_ptr,
    i,
    end,
    group,
    key,
    own,
    scale_log2,
    token0,
    stride_qt,
    stride_qh,
    G: tl.constexpr,
    HG: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    ok, entry, t, head = entries(order_ptr, i, end, group, G, HG, K, BM)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    at = offsets(t, stride_qt, WIDE) + head * stride_qh
    q = load_rows(q_ptr, at, d, ok, D, BD)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        s = tl.where((key[None, :] <= t[:, None]) & own[None, :], s, float("-inf"))
    # Rows beyond the piece may see nothing.
    high = tl.maximum(tl.max(s, 1) * scale_log2, -1e30)
    p = tl.exp2(s * scale_log2 - high[:, None])
    total = tl.maximum(tl.sum(p, 1), 1e-30)
    o = tl.dot(p.to(v.dtype), v, input_precision="ieee") * (1.0 / total)[:, None]
    row = (entry - token0 * (G * K)) * HG + head % HG
    tl.store(part_lse_ptr + row, high + tl.log2(total), mask=ok)
    tl.store(
        part_ptr + offsets(row, DV, WIDE)[:, None] + dv[None, :],
        o.to(part_ptr.dtype.element_ty),
        mask=ok[:, None] & (dv < DV)[None, :],
        cache_modifier=".cs",
    )


# Sizes that change with every pack of documents must not each compile a kernel anew.
@triton.jit(do_not_specialize=("list0", "NB", "token0"))
def selected_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    part_ptr,
    part_lse_ptr,
    order_ptr,
    bounds_ptr,
    owner_ptr,
    first_ptr,
    block_ptr,
    scale_log2,
    list0,
    NB,
    token0,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kg,
    stride_vt,
    stride_vg,
    G: tl.constexpr,
    HG: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    SELECT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Partial output of every (query, slot) of one piece, normalised, with its log-sum-exp."""
    piece = tl.load(first_ptr + list0) + tl.program_id(0)
    if piece < tl.load(first_ptr + list0 + G * NB):
        owner = tl.load(owner_ptr + piece)
        begin = tl.load(bounds_ptr + owner) + (piece - tl.load(first_ptr + owner)) * SIZE
        end = tl.minimum(begin + SIZE, tl.load(bounds_ptr + owner + 1))
        group = (owner - list0) // NB
        wide_group = group.to(tl.int64)
        block = (owner - list0) % NB
        key0 = tl.load(block_ptr + block)
        key_end = tl.load(block_ptr + NB + block)
        key = key0 + tl.arange(0, SELECT)
        d = tl.arange(0, BD)
        dv = tl.arange(0, BDV)
        own = key < key_end
        wide = key.to(tl.int64)
        k = load_rows(k_ptr + wide_group * stride_kg, wide * stride_kt, d, own, D, BD)
        v = load_rows(v_ptr + wide_group * stride_vg, wide * stride_vt, dv, own, DV, BDV)
        # A list is in token order, so the block's own queries, the only ones that do not see all of
        # its keys, come first.
        own_end = begin
        if tl.load(order_ptr + begin) // (G * K) < key0 + SELECT:
            own_end = tl.minimum(begin + tl.cdiv(SELECT, BM // HG) * (BM // HG), end)
        for i in range(begin, own_end, BM // HG):
            _forward_tile(
                q_ptr, k, v, part_ptr, part_lse_ptr, order_ptr, i, end, group, key, own, scale_log2,
                token0, stride_qt, stride_qh, G, HG, K, D, DV, BD, BDV, BM, WIDE, True,
            )  # fmt: skip
        for i in range(own_end, end, BM // HG):
            _forward_tile(
                q_ptr, k, v, part_ptr, part_lse_ptr, order_ptr, i, end, group, key, own, scale_log2,
                token0, stride_qt, stride_qh, G, HG, K, D, DV, BD, BDV, BM, WIDE, False,
            )  # fmt: skip


@triton.jit
def merge_forward_kernel(
    part_ptr,
    part_lse_ptr,
    selected_ptr,
    gates_ptr,
    compressed_ptr,
    window_ptr,
    slc_ptr,
    lse_ptr,
    out_ptr,
    token0,
    token_end,
    G: tl.constexpr,
    HG: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Merge a query's partials, then out = gated sum of the three branches. Rows are (t, head)."""
    local = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = local < (token_end - token0) * (G * HG)
    t = local // (G * HG)
    head = local % (G * HG)
    group = head // HG
    pair = (t * G + group).to(tl.int64)
    wide_row = tl.cast(token0, tl.int64) * (G * HG) + local
    wide_pair = tl.cast(token0, tl.int64) * G + pair
    slot = tl.arange(0, BK)
    chosen = tl.load(
        selected_ptr + wide_pair[:, None] * K + slot[None, :],
        mask=inside[:, None] & (slot < K)[None, :],
        other=-1,
    )
    lse = tl.load(
        part_lse_ptr + (pair[:, None] * K + slot[None, :]) * HG + (head % HG)[:, None],
        mask=chosen >= 0,
        other=float("-inf"),
    )
    high = tl.maximum(tl.max(lse, 1), -1e30)
    weight = tl.exp2(lse - high[:, None])
    total = tl.maximum(tl.sum(weight, 1), 1e-30)
    weight = weight / total[:, None]
    dv = tl.arange(0, BDV)
    acc = tl.zeros((ROWS, BDV), tl.float32)
    for i in range(K):
        pick = slot[None, :] == i
        w = tl.sum(tl.where(pick, weight, 0.0), 1)
        some = tl.sum(tl.where(pick & (chosen >= 0), 1, 0), 1) > 0
        at = (pair * K + i) * HG + head % HG
        part = tl.load(
            part_ptr + at[:, None] * DV + dv[None, :],
            mask=some[:, None] & (dv < DV)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        acc += w[:, None] * part.to(tl.float32)
    at = wide_row[:, None] * DV + dv[None, :]
    mask = inside[:, None] & (dv < DV)[None, :]
    g0 = tl.load(gates_ptr + wide_row * 3, mask=inside, other=0.0).to(tl.float32)
    g1 = tl.load(gates_ptr + wide_row * 3 + 1, mask=inside, other=0.0).to(tl.float32)
    g2 = tl.load(gates_ptr + wide_row * 3 + 2, mask=inside, other=0.0).to(tl.float32)
    compressed = tl.load(compressed_ptr + at, mask=mask, other=0.0).to(tl.float32)
    window = tl.load(window_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out = g0[:, None] * compressed + g1[:, None] * acc + g2[:, None] * window
    tl.store(slc_ptr + at, acc.to(slc_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + wide_row, high + tl.log2(total), mask=inside)


def selected_forward(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    gates_TH3: Tensor,
    compressed_THD: Tensor,
    window_THD: Tensor,
    selected_TGK: Tensor,
    lists: BlockLists,
    layout: PackedLayout,
    spec: NsaSpec,
    scale: float,
    configs: KernelConfigs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gated sum of all branches, the selected branch's output and its lse [T, H]."""
    T, H, D = q_THD.shape
    G, DV = v_TGD.shape[1:]
    HG, K, tile = H // G, spec.selected, configs.selected_forward
    pieces = cut_pieces(lists, G, layout.n_blocks, K, configs.piece_forward)
    rows = min(T, lists.chunk_tokens) * H * K
    part = q_THD.new_empty(rows, DV)
    part_lse = torch.empty(rows, dtype=torch.float32, device=q_THD.device)
    out, slc = q_THD.new_empty(T, H, DV), q_THD.new_empty(T, H, DV)
    lse = torch.empty(T, H, dtype=torch.float32, device=q_THD.device)
    BM = max(tile.BM, HG)
    wide = max(T * H, part.shape[0]) * max(D, DV) >= 2**31
    for c in range(lists.n_chunks):
        token0, list0 = c * lists.chunk_tokens, c * G * layout.n_blocks
        end = min(T, token0 + lists.chunk_tokens)
        selected_forward_kernel[(pieces.most_per_chunk,)](
            q_THD,
            k_TGD,
            v_TGD,
            part,
            part_lse,
            lists.order,
            lists.bounds,
            pieces.owner,
            pieces.first,
            layout.blocks,
            scale * LOG2_E,
            list0,
            layout.n_blocks,
            token0,
            q_THD.stride(0),
            q_THD.stride(1),
            k_TGD.stride(0),
            k_TGD.stride(1),
            v_TGD.stride(0),
            v_TGD.stride(1),
            G=G,
            HG=HG,
            K=K,
            SIZE=pieces.size,
            SELECT=spec.select,
            D=D,
            DV=DV,
            BD=pow2(D),
            BDV=pow2(DV),
            BM=BM,
            WIDE=wide,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        merge_forward_kernel[(triton.cdiv((end - token0) * H, configs.combine_rows),)](
            part,
            part_lse,
            selected_TGK,
            gates_TH3,
            compressed_THD,
            window_THD,
            slc,
            lse,
            out,
            token0,
            end,
            G=G,
            HG=HG,
            K=K,
            BK=pow2(K),
            DV=DV,
            BDV=pow2(DV),
            ROWS=configs.combine_rows,
            num_warps=4,
        )
    return out, slc, lse
