"""End of the forward: the sliding branch, the merge of the selected partials, and the gates.

Partials are merged by their log-sum-exp in slot order: everything is a sum in a fixed order.
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
from kernels.nsa.triton_interval import interval_forward
from kernels.nsa.triton_layout import PackedLayout
from kernels.nsa.triton_select import BlockLists, cut_pieces
from kernels.nsa.triton_selected import new_partials, selected_partials


# Sizes that change with every pack of documents must not each compile a kernel anew.
@triton.jit(do_not_specialize=("token0", "token_end"))
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
    T, H, _ = q_THD.shape
    k_slc, v_slc = slc
    G, DV = v_slc.shape[1:]
    K, low, high = spec.selected, layout.window[0], layout.window[1]
    pieces = cut_pieces(lists, G, layout.n_blocks, K, configs.piece_forward)
    partials = new_partials(q_THD, DV, lists, K)
    out, selected = q_THD.new_empty(T, H, DV), q_THD.new_empty(T, H, DV)
    lse = torch.empty(T, H, dtype=torch.float32, device=q_THD.device)
    window = interval_forward(q_THD, *win, low, high, lse_win_HT, scale, configs.window_forward)
    for c in range(lists.n_chunks):
        token0 = c * lists.chunk_tokens
        end = min(T, token0 + lists.chunk_tokens)
        selected_partials(
            q_THD, k_slc, v_slc, partials, lists, pieces, c, layout, spec, scale, configs
        )
        merge_forward_kernel[(triton.cdiv((end - token0) * H, configs.combine_rows),)](
            partials.part,
            partials.lse,
            selected_TGK,
            gates_TH3,
            compressed_THD,
            window,
            selected,
            lse,
            out,
            token0,
            end,
            G=G,
            HG=H // G,
            K=K,
            BK=pow2(K),
            DV=DV,
            BDV=pow2(DV),
            ROWS=configs.combine_rows,
            num_warps=4,
        )
    return out, selected, window, lse
