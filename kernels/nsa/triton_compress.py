"""Compression φ of overlapping blocks as Triton GEMMs that read the tokens in place.

No [N, G, l * D] copy exists: the reduction runs over the l tokens of the block, and the tokens of
many blocks form a strided tile. Gradients are gathered per token from the at most l / d blocks
that hold it, and the weight gradient is a fixed-order sum of splits: nothing is atomic.
"""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.nsa.spec import NsaSpec
from kernels.nsa.triton_layout import PackedLayout
from kernels.nsa.triton_parts import tile_width


@triton.jit
def compress_kernel(
    x_ptr,
    w_ptr,
    position_ptr,
    out_ptr,
    slot_block_ptr,
    NC,
    stride_xt,
    stride_xg,
    stride_on,
    stride_og,
    L: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    MEAN: tl.constexpr,
):
    """out[n, g] = sum_i (x[token(n) + i, g] + pos[i]) @ W[i]; mean when MEAN; padding is 0."""
    group = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    token = tl.load(slot_block_ptr + slot, mask=slot < NC, other=-1)
    e = tl.program_id(2) * BE + tl.arange(0, BE)
    rows = x_ptr + group * stride_xg + token.to(tl.int64)[:, None] * stride_xt
    real = (token >= 0)[:, None]
    acc = tl.zeros((BN, BE), tl.float32)
    for i in range(L):
        if MEAN:
            x = tl.load(rows + i * stride_xt + e[None, :], mask=real & (e < E)[None, :], other=0.0)
            acc += x.to(tl.float32)
        else:
            for first in tl.static_range(0, D, BD):
                d = first + tl.arange(0, BD)
                x = tl.load(
                    rows + i * stride_xt + d[None, :], mask=real & (d < D)[None, :], other=0.0
                )
                w = tl.load(
                    w_ptr + (i * D + d)[:, None] * E + e[None, :],
                    mask=(d < D)[:, None] & (e < E)[None, :],
                    other=0.0,
                )
                shift = tl.load(position_ptr + i * D + d, mask=d < D, other=0.0)
                shifted = (x.to(tl.float32) + shift.to(tl.float32)[None, :]).to(x.dtype)
                acc = tl.dot(shifted, w, acc, input_precision="ieee")
    if MEAN:
        acc = acc / L
    acc = tl.where((token >= 0)[:, None], acc, 0.0)
    out = out_ptr + group * stride_og + slot.to(tl.int64)[:, None] * stride_on + e[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(slot < NC)[:, None] & (e < E)[None, :])


@triton.jit
def compress_grad_x_kernel(
    dout_ptr,
    w_ptr,
    dx_ptr,
    slot_chunk_ptr,
    slot_end_ptr,
    slot_first_ptr,
    NC,
    stride_on,
    stride_og,
    stride_xt,
    stride_xg,
    L: tl.constexpr,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    MEAN: tl.constexpr,
):
    """dx[chunk(n) + r] = sum_m dout[n - m] @ W[r + m * stride]^T over blocks of one document."""
    r = tl.program_id(1)
    tiles: tl.constexpr = (D + BD - 1) // BD
    group = (tl.program_id(2) // tiles).to(tl.int64)
    slot = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = slot < NC
    token = tl.load(slot_chunk_ptr + slot, mask=inside, other=0) + r
    end = tl.load(slot_end_ptr + slot, mask=inside, other=0)
    first = tl.load(slot_first_ptr + slot, mask=inside, other=0)
    d = tl.program_id(2) % tiles * BD + tl.arange(0, BD)
    acc = tl.zeros((BN, BD), tl.float32)
    for m in range(L // STRIDE):
        source = slot - m
        rows = dout_ptr + group * stride_og + source.to(tl.int64)[:, None] * stride_on
        real = inside & (source >= first)
        if MEAN:
            g = tl.load(rows + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
            acc += g.to(tl.float32) / L
        else:
            for start in tl.static_range(0, E, BE):
                e = start + tl.arange(0, BE)
                g = tl.load(rows + e[None, :], mask=real[:, None] & (e < E)[None, :], other=0.0)
                w = tl.load(
                    w_ptr + ((r + m * STRIDE) * D + d)[:, None] * E + e[None, :],
                    mask=(d < D)[:, None] & (e < E)[None, :],
                    other=0.0,
                )
                acc = tl.dot(g, tl.trans(w), acc, input_precision="ieee")
    out = dx_ptr + group * stride_xg + token.to(tl.int64)[:, None] * stride_xt + d[None, :]
    mask = (inside & (token < end))[:, None] & (d < D)[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def compress_grad_w_kernel(
    x_ptr,
    position_ptr,
    dout_ptr,
    dw_ptr,
    slot_block_ptr,
    NC,
    stride_xt,
    stride_xg,
    stride_on,
    stride_og,
    G: tl.constexpr,
    L: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
):
    """dw[split, i] = sum of (x[token(n) + i, g] + pos[i])^T @ dout[n, g] over the split's tiles."""
    i = tl.program_id(0)
    split = tl.program_id(1)
    across: tl.constexpr = (E + BE - 1) // BE
    d = tl.program_id(2) // across * BD + tl.arange(0, BD)
    e = tl.program_id(2) % across * BE + tl.arange(0, BE)
    shift = tl.load(position_ptr + i * D + d, mask=d < D, other=0.0).to(tl.float32)
    tiles = tl.cdiv(NC, BN)
    acc = tl.zeros((BD, BE), tl.float32)
    for item in range(split, tiles * G, tl.num_programs(1)):
        group = tl.cast(item % G, tl.int64)
        slot = (item // G) * BN + tl.arange(0, BN)
        token = tl.load(slot_block_ptr + slot, mask=slot < NC, other=-1)
        real = (token >= 0)[:, None]
        x = tl.load(
            x_ptr + group * stride_xg + (token + i).to(tl.int64)[:, None] * stride_xt + d[None, :],
            mask=real & (d < D)[None, :],
            other=0.0,
        )
        g = tl.load(
            dout_ptr + group * stride_og + slot.to(tl.int64)[:, None] * stride_on + e[None, :],
            mask=real & (e < E)[None, :],
            other=0.0,
        )
        # Slots without a block have no gradient, so shifting their zeros changes nothing.
        shifted = (x.to(tl.float32) + shift[None, :]).to(x.dtype)
        acc = tl.dot(tl.trans(shifted), g, acc, input_precision="ieee")
    out = dw_ptr + ((split * L + i) * D + d)[:, None] * E + e[None, :]
    tl.store(out, acc, mask=(d < D)[:, None] & (e < E)[None, :])


def compress(
    x_TGD: Tensor,
    weight_lDE: Tensor | None,
    position_lD: Tensor | None,
    layout: PackedLayout,
    spec: NsaSpec,
) -> Tensor:
    """Compress every overlapping block of every document: [T, G, D] to [NC, G, E] in x's dtype.

    weight None is mean pooling. Slots without a full block are zero. Paper eq. 7.
    """
    _, G, D = x_TGD.shape
    E = D if weight_lDE is None else weight_lDE.shape[2]
    out = x_TGD.new_empty(layout.n_slots, G, E)
    if weight_lDE is None or position_lD is None:
        weight, position = x_TGD, x_TGD
    else:
        weight, position = weight_lDE.to(x_TGD.dtype).contiguous(), position_lD.contiguous()
    BN, BE = 64, tile_width(E)
    compress_kernel[(triton.cdiv(layout.n_slots, BN), G, triton.cdiv(E, BE))](
        x_TGD,
        weight,
        position,
        out,
        layout.slots[1],
        layout.n_slots,
        x_TGD.stride(0),
        x_TGD.stride(1),
        out.stride(0),
        out.stride(1),
        L=spec.block,
        D=D,
        E=E,
        BD=tile_width(D),
        BE=BE,
        BN=BN,
        MEAN=weight_lDE is None,
        num_warps=4,
        num_stages=3,
    )
    return out


def compress_backward(
    dout_NGE: Tensor,
    x_TGD: Tensor,
    weight_lDE: Tensor | None,
    position_lD: Tensor | None,
    layout: PackedLayout,
    spec: NsaSpec,
    *,
    keys: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of `compress` with respect to x, weight and position, each in its own dtype.

    With `keys` the position's is zero: its term moves all compressed keys alike, so every score of
    a query by the same amount, which no softmax notices. A sum over dout is rounding errors only,
    which Adam would scale to whole steps.
    """
    T, G, D = x_TGD.shape
    E = dout_NGE.shape[2]
    NC, BN = layout.n_slots, 64
    dout = dout_NGE.to(x_TGD.dtype).contiguous()
    dx = x_TGD.new_empty(T, G, D)
    mean = weight_lDE is None or position_lD is None
    weight = x_TGD if weight_lDE is None else weight_lDE.to(x_TGD.dtype).contiguous()
    BD, BE = tile_width(D), tile_width(E)
    sizes = {"D": D, "E": E, "BD": BD, "BE": BE, "BN": BN}
    compress_grad_x_kernel[(triton.cdiv(NC, BN), spec.stride, G * triton.cdiv(D, BD))](
        dout,
        weight,
        dx,
        layout.slots[0],
        layout.slots[3],
        layout.slots[4],
        NC,
        dout.stride(0),
        dout.stride(1),
        dx.stride(0),
        dx.stride(1),
        L=spec.block,
        STRIDE=spec.stride,
        **sizes,
        MEAN=mean,
        num_warps=4,
        num_stages=2,
    )
    if weight_lDE is None or position_lD is None:
        return dx, None, None
    splits = max(1, min(8, triton.cdiv(NC, BN) * G))
    partial = torch.empty(splits, spec.block, D, E, dtype=torch.float32, device=x_TGD.device)
    compress_grad_w_kernel[(spec.block, splits, triton.cdiv(D, BD) * triton.cdiv(E, BE))](
        x_TGD,
        position_lD.contiguous(),
        dout,
        partial,
        layout.slots[1],
        NC,
        x_TGD.stride(0),
        x_TGD.stride(1),
        dout.stride(0),
        dout.stride(1),
        G=G,
        L=spec.block,
        **sizes,
        num_warps=8,
        num_stages=3,
    )
    dweight = partial.sum(0).to(weight_lDE.dtype)
    if keys:
        return dx, dweight, torch.zeros_like(position_lD)
    # Padding slots are seen by no query, so their gradient rows are zero and may join the sum.
    total_E = dout_NGE.sum((0, 1), dtype=torch.float32)
    dposition = (weight.flatten(0, 1) @ total_E.to(weight.dtype)).view(position_lD.shape)
    return dx, dweight, dposition.to(position_lD.dtype)
