"""Gradients of attention to the selected blocks, in one pass over the block lists.

A program keeps a block and its dk and dv on chip while the queries of a piece of its list pass by,
and leaves a partial dq per (query, slot), which `triton_interval_grad_q` sums. Pieces are summed in
list order.
"""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.nsa.spec import NsaSpec
from kernels.nsa.triton_config import KernelConfigs, pow2
from kernels.nsa.triton_interval import LOG2_E
from kernels.nsa.triton_layout import PackedLayout
from kernels.nsa.triton_parts import (
    add_parts,
    add_product,
    gather_parts,
    load_rows,
    part_widths,
    row_products,
    scale_parts,
    store_parts,
    zero_parts,
)
from kernels.nsa.triton_select import BlockLists, cut_pieces, first_piece
from kernels.nsa.triton_selected import entries, gluon_takes, offsets


@triton.jit
def _store_partial(part_ptr, row_at, k, dst, ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store columns of a tile's partial dq."""
    # Transposed, dst would be the register operand of the product: Triton 3.4 to 3.7 were seen to
    # get that wrong on Hopper. As the right operand it passes shared memory.
    dqt = tl.dot(tl.trans(k), dst, input_precision="ieee")
    d = tl.arange(0, BLOCK)
    tl.store(
        part_ptr + row_at[:, None] + d[None, :],
        tl.trans(dqt.to(part_ptr.dtype.element_ty)),
        mask=ok[:, None] & (d < WIDTH)[None, :],
        cache_modifier=".cs",
    )


@triton.jit
def _backward_tile(
    dk,
    dv,
    q_ptr,
    k,
    v,
    do_ptr,
    lse_ptr,
    delta_ptr,
    part_ptr,
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
    stride_dt,
    stride_dh,
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
    q_at = offsets(t, stride_qt, WIDE) + head * stride_qh
    q = gather_parts(q_ptr, q_at, ok, D, BD, BX)
    do = load_rows(do_ptr, offsets(t, stride_dt, WIDE) + head * stride_dh, ok, DV, BDV)
    at = t * (G * HG) + head
    lse = tl.load(lse_ptr + at, mask=ok, other=0.0)
    delta = tl.load(delta_ptr + at, mask=ok, other=0.0)
    st = row_products(k, q)
    # Rows beyond the piece have q = do = 0 and add nothing.
    pt = tl.exp2(st * scale_log2 - lse[None, :])
    if MASKED:
        pt = tl.where((key[:, None] <= t[None, :]) & own[:, None], pt, 0.0)
    dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")
    dpt = tl.dot(v, tl.trans(do), input_precision="ieee")
    dst = (pt * (dpt - delta[None, :])).to(do.dtype)
    dk = add_product(dst, q, dk)
    row_at = offsets((entry - token0 * (G * K)) * HG + head % HG, D, WIDE)
    if BX == 0:
        _store_partial(part_ptr, row_at, k[0], dst, ok, D, BD)
    else:
        _store_partial(part_ptr, row_at, k[0], dst, ok, BD, BD)
        _store_partial(part_ptr + BD, row_at, k[1], dst, ok, D - BD, BX)
    return dk, dv


# Sizes that change with every pack of documents must not each compile a kernel anew.
@triton.jit(do_not_specialize=("piece0", "NB", "token0"))
def selected_backward_kernel(
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
    RESUME: tl.constexpr,
):
    """One pass over a piece: its fp32 share of dk and dv, and dq of every (query, slot).

    A list of one piece adds to the running sums itself; the pieces of a longer one are left to
    `merge_grad_kv_kernel`.
    """
    number = tl.program_id(0)
    at = piece_ptr + (piece0 + number) * 4
    begin = tl.load(at)
    end = tl.load(at + 1)
    if begin < end:
        block = tl.load(at + 2)
        tag = tl.load(at + 3)
        group = tag // 2
        wide_group = group.to(tl.int64)
        key0 = tl.load(block_ptr + block)
        key_end = tl.load(block_ptr + NB + block)
        key = key0 + tl.arange(0, SELECT)
        own = key < key_end
        wide = key.to(tl.int64)
        k = gather_parts(k_ptr + wide_group * stride_kg, wide * stride_kt, own, D, BD, BX)
        v = load_rows(v_ptr + wide_group * stride_vg, wide * stride_vt, own, DV, BDV)
        sum_row = wide * G + group
        dk = zero_parts(SELECT, BD, BX)
        dv = tl.zeros((SELECT, BDV), tl.float32)
        own_end = begin
        if tl.load(order_ptr + begin) // (G * K) < key0 + SELECT:
            own_end = tl.minimum(begin + tl.cdiv(SELECT, BM // HG) * (BM // HG), end)
        for i in range(begin, own_end, BM // HG):
            dk, dv = _backward_tile(
                dk, dv, q_ptr, k, v, do_ptr, lse_ptr, delta_ptr, part_ptr, order_ptr, i, end, group,
                key, own, scale_log2, token0, stride_qt, stride_qh, stride_dt, stride_dh,
                G, HG, K, D, DV, BD, BX, BDV, BM, WIDE, True,
            )  # fmt: skip
        for i in range(own_end, end, BM // HG):
            dk, dv = _backward_tile(
                dk, dv, q_ptr, k, v, do_ptr, lse_ptr, delta_ptr, part_ptr, order_ptr, i, end, group,
                key, own, scale_log2, token0, stride_qt, stride_qh, stride_dt, stride_dh,
                G, HG, K, D, DV, BD, BX, BDV, BM, WIDE, False,
            )  # fmt: skip
        dk = scale_parts(dk, scale)
        if tag % 2 == 1:
            if RESUME:
                dk = add_parts(dk, gather_parts(dk_sum_ptr, sum_row * D, own, D, BD, BX))
                dv += load_rows(dv_sum_ptr, sum_row * DV, own, DV, BDV)
            store_parts(dk_sum_ptr, sum_row * D, dk, own, D, BD, BX)
            store_parts(dv_sum_ptr, sum_row * DV, (dv,), own, DV, BDV, 0)
        else:
            row = number.to(tl.int64) * SELECT + tl.arange(0, SELECT)
            every = row >= 0
            store_parts(dk_part_ptr, row * D, dk, every, D, BD, BX)
            store_parts(dv_part_ptr, row * DV, (dv,), every, DV, BDV, 0)


@triton.jit(do_not_specialize=("list0", "NB"))
def merge_grad_kv_kernel(
    part_ptr,
    sum_ptr,
    bounds_ptr,
    block_ptr,
    list0,
    NB,
    G: tl.constexpr,
    SIZE: tl.constexpr,
    SELECT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    RESUME: tl.constexpr,
):
    """Add the pieces of a list of several, in order, to what earlier chunks of queries left."""
    block = tl.program_id(0)
    group = tl.program_id(1)
    local = group * NB + block
    count = tl.load(bounds_ptr + list0 + local + 1) - tl.load(bounds_ptr + list0 + local)
    low = first_piece(bounds_ptr, list0, local, SIZE)
    high = low + tl.cdiv(count, SIZE)
    key = tl.load(block_ptr + block) + tl.arange(0, SELECT)
    own = key < tl.load(block_ptr + NB + block)
    d = tl.arange(0, BD)
    at = (key.to(tl.int64)[:, None] * G + group) * D + d[None, :]
    mask = own[:, None] & (d < D)[None, :]
    if high - low > 1:
        if RESUME:
            acc = tl.load(sum_ptr + at, mask=mask, other=0.0)
        else:
            acc = tl.zeros((SELECT, BD), tl.float32)
        for piece in range(low, high):
            row = (piece + tl.zeros((SELECT,), tl.int64)) * SELECT + tl.arange(0, SELECT)
            acc += tl.load(
                part_ptr + row[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0
            )
        tl.store(sum_ptr + at, acc, mask=mask)
    elif high == low and not RESUME:
        tl.store(sum_ptr + at, tl.zeros((SELECT, BD), tl.float32), mask=mask)


class SelectedGrad:
    """Gradients of the selected branch, chunk by chunk: running fp32 sums of dk and dv.

    `partials` is dq of every (query, slot, head) of the last chunk, not yet times the scale.
    """

    def __init__(
        self,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        do_THD: Tensor,
        lse_TH: Tensor,
        delta_TH: Tensor,
        lists: BlockLists,
        layout: PackedLayout,
        spec: NsaSpec,
        scale: float,
        configs: KernelConfigs,
    ) -> None:
        """Allocate; nothing is computed before `chunk`. lse is base 2 and folded with the gate."""
        T, H, D = q_THD.shape
        G, DV = v_TGD.shape[1:]
        self._tensors = (q_THD, k_TGD, v_TGD, do_THD, lse_TH, delta_TH)
        self._lists, self._layout, self._spec = lists, layout, spec
        self._scale, self._tile = scale, configs.selected_backward
        NB, SELECT, device, f32 = layout.n_blocks, spec.select, q_THD.device, torch.float32
        self._pieces = cut_pieces(lists, G, NB, spec.selected, configs.piece_backward)
        self.partials = q_THD.new_empty(min(T, lists.chunk_tokens) * H * spec.selected, D)
        most = self._pieces.most_per_chunk
        self._dk_part = torch.empty(most, SELECT, D, dtype=f32, device=device)
        self._dv_part = torch.empty(most, SELECT, DV, dtype=f32, device=device)
        self._dk_sum = torch.empty(T, G, D, dtype=f32, device=device)
        self._dv_sum = torch.empty(T, G, DV, dtype=f32, device=device)

    def chunk(self, c: int) -> None:
        """Write the partial dq of chunk c and add its share to dk and dv; chunks come in order."""
        q, k, v, do, lse, delta = self._tensors
        T, H, D = q.shape
        G, DV = v.shape[1:]
        pieces, layout, spec, tile = self._pieces, self._layout, self._spec, self._tile
        NB = layout.n_blocks
        arguments = (
            q, k, v, do, lse, delta, self.partials, self._dk_part, self._dv_part, self._dk_sum,
            self._dv_sum, self._lists.order, pieces.table, layout.blocks, self._scale,
            self._scale * LOG2_E, c * pieces.most_per_chunk, NB, c * self._lists.chunk_tokens,
            q.stride(0), q.stride(1), do.stride(0), do.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1),
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
            "WIDE": max(T * H, self.partials.shape[0]) * max(D, DV) >= 2**31,
            "RESUME": c > 0,
        }
        self._launch(arguments, sizes, c)
        for source, total in ((self._dk_part, self._dk_sum), (self._dv_part, self._dv_sum)):
            width = total.shape[2]
            merge_grad_kv_kernel[(NB, G)](
                source,
                total,
                self._lists.bounds,
                layout.blocks,
                c * G * NB,
                NB,
                G=G,
                SIZE=pieces.size,
                SELECT=spec.select,
                D=width,
                BD=pow2(width),
                RESUME=c > 0,
                num_warps=4,
            )

    def _launch(self, arguments: tuple[Any, ...], sizes: dict[str, Any], c: int) -> None:
        """Launch the kernel that takes this call."""
        q, k, v, do, lse, delta = self._tensors
        pieces, layout, spec, tile = self._pieces, self._layout, self._spec, self._tile
        grid = (pieces.most_per_chunk,)
        if tile.gluon and gluon_takes(q, k, v, spec, sizes["BM"]):
            from kernels.nsa.gluon_selected_grad import selected_backward_gluon
            from kernels.nsa.gluon_selected_grad_tma import launch_backward
            from kernels.nsa.gluon_selected_tma import tma_takes

            if tile.stages > 2 and tma_takes(q, v, self.partials, do):
                others = (
                    lse, delta, self._dk_part, self._dv_part, self._dk_sum, self._dv_sum,
                    self._lists.order, pieces.table, layout.blocks,
                )  # fmt: skip
                launch_backward(
                    q, k, v, do, self.partials, others, self._scale, self._scale * LOG2_E,
                    c * pieces.most_per_chunk, layout.n_blocks, c * self._lists.chunk_tokens,
                    *grid, spec.selected, spec.select, c > 0,
                )  # fmt: skip
            else:
                selected_backward_gluon[grid](*arguments, **sizes, num_warps=4)
            return
        selected_backward_kernel[grid](
            *arguments,
            **sizes,
            **part_widths(sizes["D"]),
            BDV=pow2(sizes["DV"]),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Return dk [T, G, D] and dv [T, G, DV] in the inputs' dtype, after the last chunk."""
        k, v = self._tensors[1:3]
        return self._dk_sum.to(k.dtype), self._dv_sum.to(v.dtype)
