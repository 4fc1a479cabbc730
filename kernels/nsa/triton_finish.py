"""End of the forward: the sliding branch, the merge of the selected partials, and the gates.

The merge is bound by memory and the sliding branch by arithmetic, so one kernel does both: while
one program reads partials, its neighbours on the same multiprocessor multiply. Partials are merged
by their log-sum-exp in slot order: everything is a sum in a fixed order.
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
from kernels.nsa.triton_interval import LOG2_E, attend_interval, tile_sources
from kernels.nsa.triton_layout import PackedLayout
from kernels.nsa.triton_select import BlockLists, cut_pieces
from kernels.nsa.triton_selected import new_partials, selected_partials


@triton.jit
def merge_partials(
    part_ptr,
    part_lse_ptr,
    selected_ptr,
    rows,
    inside,
    token0,
    group,
    head,
    G: tl.constexpr,
    HG: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
):
    """Return o [BM, BDV] in fp32 and the log-sum-exp [BM] of the rows' selected blocks together."""
    pair = ((rows - token0) * G + group).to(tl.int64)
    chosen_at = selected_ptr + (rows.to(tl.int64) * G + group) * K
    lse_at = part_lse_ptr + pair * (K * HG) + head % HG
    slot = tl.arange(0, BK)
    used = inside[:, None] & (slot < K)[None, :]
    used &= tl.load(chosen_at[:, None] + slot[None, :], mask=used, other=-1) >= 0
    lse = tl.load(lse_at[:, None] + slot[None, :] * HG, mask=used, other=float("-inf"))
    high = tl.maximum(tl.max(lse, 1), -1e30)
    total = tl.maximum(tl.sum(tl.exp2(lse - high[:, None]), 1), 1e-30)
    whole = high + tl.log2(total)
    dv = tl.arange(0, BDV)
    part_at = part_ptr + (pair * (K * HG) + head % HG)[:, None] * DV + dv[None, :]
    acc = tl.zeros((BM, BDV), tl.float32)
    for i in tl.range(K, loop_unroll_factor=2):
        some = inside & (tl.load(chosen_at + i, mask=inside, other=-1) >= 0)
        weight = tl.exp2(tl.load(lse_at + i * HG, mask=some, other=float("-inf")) - whole)
        part = tl.load(part_at + i * (HG * DV), mask=some[:, None] & (dv < DV)[None, :], other=0.0)
        acc += weight[:, None] * part.to(tl.float32)
    return acc, whole


@triton.jit(do_not_specialize=("token0", "token_end"))
def finish_forward_kernel(
    q_ptr,
    k_src,
    v_src,
    part_ptr,
    part_lse_ptr,
    selected_ptr,
    gates_ptr,
    compressed_ptr,
    window_ptr,
    slc_ptr,
    out_ptr,
    lse_win_ptr,
    lse_slc_ptr,
    low_ptr,
    high_ptr,
    scale_log2,
    T,
    token0,
    token_end,
    stride_qt,
    stride_qh,
    stride_kn,
    stride_kg,
    stride_vn,
    stride_vg,
    G: tl.constexpr,
    HG: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Window and selected output of the tokens [token0, token_end), and the gated sum of all three.

    Outputs are [T, H, DV]; the window's log-sum-exp is [H, T], the selected one's [T, H].
    """
    head = tl.program_id(0)
    group = head // HG
    first = token0 + tl.program_id(1) * BM
    last = tl.minimum(first + BM, token_end) - 1
    rows = first + tl.arange(0, BM)
    inside = rows <= last
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    q = tl.load(
        q_ptr + rows.to(tl.int64)[:, None] * stride_qt + head * stride_qh + d[None, :],
        mask=inside[:, None] & (d < D)[None, :],
        other=0.0,
    )
    o, lse = attend_interval(
        q, k_src, v_src, low_ptr, high_ptr, first, last, group, scale_log2,
        stride_kn, stride_kg, stride_vn, stride_vg, D, DV, BD, BDV, BM, BN, TMA,
    )  # fmt: skip
    tl.store(lse_win_ptr + head.to(tl.int64) * T + rows, lse, mask=inside)
    wide_row = rows.to(tl.int64) * (G * HG) + head
    at = wide_row[:, None] * DV + dv[None, :]
    mask = inside[:, None] & (dv < DV)[None, :]
    window = o.to(window_ptr.dtype.element_ty)
    tl.store(window_ptr + at, window, mask=mask)
    slc, lse = merge_partials(
        part_ptr, part_lse_ptr, selected_ptr, rows, inside, token0, group, head,
        G, HG, K, BK, DV, BDV, BM,
    )  # fmt: skip
    tl.store(lse_slc_ptr + wide_row, lse, mask=inside)
    tl.store(slc_ptr + at, slc.to(slc_ptr.dtype.element_ty), mask=mask)
    g0 = tl.load(gates_ptr + wide_row * 3, mask=inside, other=0.0).to(tl.float32)
    g1 = tl.load(gates_ptr + wide_row * 3 + 1, mask=inside, other=0.0).to(tl.float32)
    g2 = tl.load(gates_ptr + wide_row * 3 + 2, mask=inside, other=0.0).to(tl.float32)
    compressed = tl.load(compressed_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out = g0[:, None] * compressed + g1[:, None] * slc + g2[:, None] * window.to(tl.float32)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def finish_forward(
    q_THD: Tensor,
    slc: tuple[Tensor, Tensor],
    win: tuple[Tensor, Tensor],
    gates_TH3: Tensor,
    compressed_THD: Tensor,
    selected_TGK: Tensor,
    lists: BlockLists,
    lse_win_HT: Tensor,
    layout: PackedLayout,
    spec: NsaSpec,
    scale: float,
    configs: KernelConfigs,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gated sum of all branches, the selected output, the window's, and lse [T, H].

    `slc` and `win` are keys and values [T, G, D] of those branches. The base-2 log-sum-exp of the
    window goes to lse_win_HT, that of the selected branch is the last result.
    """
    T, H, D = q_THD.shape
    k_win, v_win = win
    G, DV = v_win.shape[1:]
    K, tile = spec.selected, configs.finish_forward
    pieces = cut_pieces(lists, G, layout.n_blocks, K, configs.piece_forward)
    partials = new_partials(q_THD, DV, lists, K)
    out, selected, window = (q_THD.new_empty(T, H, DV) for _ in range(3))
    lse = torch.empty(T, H, dtype=torch.float32, device=q_THD.device)
    (k, v), tma = tile_sources(tile.BN, k_win, v_win)
    for c in range(lists.n_chunks):
        token0 = c * lists.chunk_tokens
        end = min(T, token0 + lists.chunk_tokens)
        selected_partials(q_THD, *slc, partials, lists, pieces, c, layout, spec, scale, configs)
        finish_forward_kernel[(H, triton.cdiv(end - token0, tile.BM))](
            q_THD,
            k,
            v,
            partials.part,
            partials.lse,
            selected_TGK,
            gates_TH3,
            compressed_THD,
            window,
            selected,
            out,
            lse_win_HT,
            lse,
            layout.window[0],
            layout.window[1],
            scale * LOG2_E,
            T,
            token0,
            end,
            q_THD.stride(0),
            q_THD.stride(1),
            k_win.stride(0),
            k_win.stride(1),
            v_win.stride(0),
            v_win.stride(1),
            G=G,
            HG=H // G,
            K=K,
            BK=pow2(K),
            D=D,
            DV=DV,
            BD=pow2(D),
            BDV=pow2(DV),
            BM=tile.BM,
            BN=tile.BN,
            TMA=tma,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, selected, window, lse
