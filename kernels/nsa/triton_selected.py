"""Attention to the selected blocks, one program per block and piece of its list of queries.

The block's keys and values stay on chip while the queries that chose it pass by, all heads of the
group together: a (query, block) pair moves one row of q and one partial output instead of the
whole block. `triton_finish` merges the partials of a chunk of queries.
"""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.nsa.spec import NsaSpec
from kernels.nsa.triton_config import KernelConfigs, pow2
from kernels.nsa.triton_interval import LOG2_E
from kernels.nsa.triton_layout import PackedLayout
from kernels.nsa.triton_parts import gather_parts, load_rows, part_widths, row_products
from kernels.nsa.triton_select import BlockLists, Pieces


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
    BX: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):
    ok, entry, t, head = entries(order_ptr, i, end, group, G, HG, K, BM)
    dv = tl.arange(0, BDV)
    at = offsets(t, stride_qt, WIDE) + head * stride_qh
    q = gather_parts(q_ptr, at, ok, D, BD, BX)
    s = row_products(q, k)
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
@triton.jit(do_not_specialize=("piece0", "NB", "token0"))
def selected_forward_kernel(
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
    G: tl.constexpr,
    HG: tl.constexpr,
    K: tl.constexpr,
    SELECT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BD: tl.constexpr,
    BX: tl.constexpr,
    BDV: tl.constexpr,
    BM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Partial output of every (query, slot) of one piece, normalised, with its log-sum-exp."""
    at = piece_ptr + (piece0 + tl.program_id(0)) * 4
    begin = tl.load(at)
    end = tl.load(at + 1)
    if begin < end:
        block = tl.load(at + 2)
        group = tl.load(at + 3) // 2
        wide_group = group.to(tl.int64)
        key0 = tl.load(block_ptr + block)
        key_end = tl.load(block_ptr + NB + block)
        key = key0 + tl.arange(0, SELECT)
        own = key < key_end
        wide = key.to(tl.int64)
        k = gather_parts(k_ptr + wide_group * stride_kg, wide * stride_kt, own, D, BD, BX)
        v = load_rows(v_ptr + wide_group * stride_vg, wide * stride_vt, own, DV, BDV)
        # A list is in token order, so the block's own queries, the only ones that do not see all of
        # its keys, come first.
        own_end = begin
        if tl.load(order_ptr + begin) // (G * K) < key0 + SELECT:
            own_end = tl.minimum(begin + tl.cdiv(SELECT, BM // HG) * (BM // HG), end)
        for i in range(begin, own_end, BM // HG):
            _forward_tile(
                q_ptr, k, v, part_ptr, part_lse_ptr, order_ptr, i, end, group, key, own, scale_log2,
                token0, stride_qt, stride_qh, G, HG, K, D, DV, BD, BX, BDV, BM, WIDE, True,
            )  # fmt: skip
        for i in range(own_end, end, BM // HG):
            _forward_tile(
                q_ptr, k, v, part_ptr, part_lse_ptr, order_ptr, i, end, group, key, own, scale_log2,
                token0, stride_qt, stride_qh, G, HG, K, D, DV, BD, BX, BDV, BM, WIDE, False,
            )  # fmt: skip


def gluon_takes(q_THD: Tensor, k_TGD: Tensor, v_TGD: Tensor, spec: NsaSpec, BM: int) -> bool:
    """Tell whether the Gluon kernels serve this call; Triton's take the rest.

    They copy 16-byte pieces of rows of 64 or 128 elements, blocks and tiles of 64.
    """
    if spec.select != 64 or BM != 64:
        return False
    return all(
        x.shape[2] in {64, 128} and x.stride(1) % 16 == 0 and x.stride(0) % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in (q_THD, k_TGD, v_TGD)
    )  # fmt: skip


@dataclass(frozen=True)
class Partials:
    """Outputs of a chunk's (query, slot, head) rows and their base-2 log-sum-exps.

    Attributes:
        part: [chunk_tokens * G * K * HG, DV], normalised, in q's dtype.
        lse: fp32 [chunk_tokens * G * K * HG].
    """

    part: Tensor
    lse: Tensor


def new_partials(q_THD: Tensor, width: int, lists: BlockLists, slots: int) -> Partials:
    """Allocate the partials of one chunk; every chunk overwrites them."""
    T, H, _ = q_THD.shape
    rows = min(T, lists.chunk_tokens) * H * slots
    lse = torch.empty(rows, dtype=torch.float32, device=q_THD.device)
    return Partials(q_THD.new_empty(rows, width), lse)


def selected_partials(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    partials: Partials,
    lists: BlockLists,
    pieces: Pieces,
    chunk: int,
    layout: PackedLayout,
    spec: NsaSpec,
    scale: float,
    configs: KernelConfigs,
) -> None:
    """Attend every query of a chunk to each of its selected blocks apart."""
    T, H, D = q_THD.shape
    G, DV = v_TGD.shape[1:]
    tile = configs.selected_forward
    arguments = (
        q_THD, k_TGD, v_TGD, partials.part, partials.lse, lists.order, pieces.table, layout.blocks,
        scale * LOG2_E, chunk * pieces.most_per_chunk, layout.n_blocks, chunk * lists.chunk_tokens,
        q_THD.stride(0), q_THD.stride(1), k_TGD.stride(0), k_TGD.stride(1), v_TGD.stride(0),
        v_TGD.stride(1),
    )  # fmt: skip
    BM = max(tile.BM, H // G)
    sizes = {
        "G": G,
        "HG": H // G,
        "K": spec.selected,
        "SELECT": spec.select,
        "D": D,
        "DV": DV,
        "BM": BM,
        "WIDE": max(T * H, partials.part.shape[0]) * max(D, DV) >= 2**31,
    }
    if tile.gluon and gluon_takes(q_THD, k_TGD, v_TGD, spec, BM):
        from kernels.nsa.gluon_selected import selected_forward_gluon
        from kernels.nsa.gluon_selected_tma import launch_forward, tma_takes

        if tile.stages > 2 and tma_takes(q_THD, v_TGD, partials.part):
            launch_forward(
                q_THD, k_TGD, v_TGD, partials.part, partials.lse, lists.order, pieces.table,
                layout.blocks, scale * LOG2_E, chunk * pieces.most_per_chunk, layout.n_blocks,
                chunk * lists.chunk_tokens, pieces.most_per_chunk, spec.selected, spec.select,
                tile.stages,
            )  # fmt: skip
            return

        selected_forward_gluon[(pieces.most_per_chunk,)](*arguments, **sizes, num_warps=4)
        return
    selected_forward_kernel[(pieces.most_per_chunk,)](
        *arguments,
        **sizes,
        **part_widths(D),
        BDV=pow2(DV),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
