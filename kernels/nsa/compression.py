"""Compression φ of overlapping blocks (eq. 7), forward and backward, without copying the overlap.

A block of l tokens is l/d chunks of d tokens. Every chunk is multiplied once by the l/d slices of
the weight that it can meet, [d·D] x [d·D, l/d·D], and a block adds up its chunks' products: the
same arithmetic as unfolding the blocks, with l/d times less memory.

Shapes: T tokens packed, G KV groups, D head dim, N compressed slots (see plan.py), M = l/d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.nsa.plan import Plan
from kernels.nsa.spec import NsaSpec, Phi


def _shift_up(x_N: Tensor, by: int) -> Tensor:
    """x[i + by], zeros past the end."""
    return torch.cat([x_N[by:], x_N.new_zeros(by, *x_N.shape[1:])]) if by else x_N


def _shift_down(x_N: Tensor, by: int) -> Tensor:
    """x[i - by], zeros before the start."""
    return torch.cat([x_N.new_zeros(by, *x_N.shape[1:]), x_N[:-by]]) if by else x_N


def _chunks(x_TGD: Tensor, plan: Plan) -> Tensor:
    """Lay the tokens out in chunks, [N, G, d·D]."""
    _, G, D = x_TGD.shape
    d = plan.spec.stride
    slots = x_TGD.index_select(0, plan.token_of_slot)
    return slots.view(-1, d, G, D).transpose(1, 2).reshape(-1, G, d * D)


def _chunk_weight(weight_lDD: Tensor, spec: NsaSpec) -> Tensor:
    """[l, D, D] to [d·D, M·D]: what a chunk contributes as the first, second … chunk of a block."""
    D, out = weight_lDD.shape[1:]
    d = spec.stride
    return weight_lDD.view(-1, d * D, out).transpose(0, 1).reshape(d * D, -1)


class _Compress(torch.autograd.Function):
    """Learned map. Saves the parameters themselves, not views: ZeRO-3 swaps their data."""

    @staticmethod
    def forward(
        ctx: Any, x_TGD: Tensor, weight_lDD: Tensor, position_lD: Tensor, plan: Plan, keys: bool
    ) -> Tensor:
        chunks = _chunks(x_TGD, plan)
        N, G, _ = chunks.shape
        M = plan.spec.block // plan.spec.stride
        products = (chunks.flatten(0, 1) @ _chunk_weight(weight_lDD, plan.spec)).view(N, G, M, -1)
        out = position_lD.reshape(1, -1) @ weight_lDD.flatten(0, 1)
        out = out.to(torch.promote_types(x_TGD.dtype, torch.float32)).expand(N, G, -1)
        for m in range(M):
            out = out + _shift_up(products[:, :, m], m)
        ctx.save_for_backward(x_TGD, weight_lDD, position_lD)
        ctx.plan, ctx.keys = plan, keys
        return out.to(x_TGD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_NGD: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x_TGD, weight_lDD, position_lD = ctx.saved_tensors
        plan: Plan = ctx.plan
        _, G, D = x_TGD.shape
        d, out = plan.spec.stride, weight_lDD.shape[2]
        M = plan.spec.block // d
        chunks = _chunks(x_TGD, plan)
        N = chunks.shape[0]
        grad_products = torch.stack([_shift_down(grad_NGD, m) for m in range(M)], dim=2)
        grad_products = grad_products.view(N * G, M * out)
        grad_chunks = grad_products @ _chunk_weight(weight_lDD, plan.spec).t()
        slots = grad_chunks.view(N, G, d, D).transpose(1, 2).reshape(N * d, G, D)
        grad_x = slots.index_select(0, plan.slot_of_token)

        grad_weight = chunks.flatten(0, 1).t() @ grad_products
        grad_weight = grad_weight.view(d * D, M, out).transpose(0, 1).reshape(weight_lDD.shape)
        if ctx.keys:
            return grad_x, grad_weight, torch.zeros_like(position_lD), None, None
        total = grad_NGD.sum(dim=(0, 1), dtype=torch.promote_types(grad_NGD.dtype, torch.float32))
        total = total.to(grad_NGD.dtype)
        grad_weight = grad_weight + position_lD[:, :, None] * total
        grad_position = (weight_lDD.flatten(0, 1) @ total).view_as(position_lD)
        return grad_x, grad_weight, grad_position, None, None


class _CompressMean(torch.autograd.Function):
    """Mean over the block."""

    @staticmethod
    def forward(ctx: Any, x_TGD: Tensor, plan: Plan) -> Tensor:
        _, G, D = x_TGD.shape
        d, block = plan.spec.stride, plan.spec.block
        slots = x_TGD.index_select(0, plan.token_of_slot)
        wide = torch.promote_types(x_TGD.dtype, torch.float32)
        sums = slots.view(-1, d, G, D).sum(dim=1, dtype=wide)
        out = sums
        for m in range(1, block // d):
            out = out + _shift_up(sums, m)
        ctx.plan = plan
        return (out / block).to(x_TGD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_NGD: Tensor) -> tuple[Tensor, None]:
        plan: Plan = ctx.plan
        grad = grad_NGD.to(torch.promote_types(grad_NGD.dtype, torch.float32)) / plan.spec.block
        chunk_grad = grad
        for m in range(1, plan.spec.block // plan.spec.stride):
            chunk_grad = chunk_grad + _shift_down(grad, m)
        chunk = plan.slot_of_token // plan.spec.stride
        return chunk_grad.to(grad_NGD.dtype).index_select(0, chunk), None


def compress(x_TGD: Tensor, phi: Phi | None, plan: Plan, *, keys: bool = False) -> Tensor:
    """Compress every complete block of every document.

    Args:
        x_TGD: keys or values of the compressed branch, one per token.
        phi: the learned map; None takes the mean.
        plan: layout of the documents.
        keys: x are keys. The position term then moves every score of a query by the same amount,
            which no softmax notices: its gradient is zero, where a sum over all blocks would be
            rounding errors only, which Adam would scale to whole steps.

    Returns:
        [N, G, D] by compressed slot; slots without a complete block hold numbers of no meaning that
        no query sees and that send no gradient back.
    """
    out: Tensor
    if phi is None:
        out = _CompressMean.apply(x_TGD, plan)  # type: ignore[no-untyped-call]
    else:
        out = _Compress.apply(  # type: ignore[no-untyped-call]
            x_TGD, phi.weight_lDD, phi.position_lD, plan, keys
        )
    return out


def compress_block(x_lGD: Tensor, phi: Phi | None) -> Tensor:
    """Compress one block of l tokens; returns [G, D]."""
    if phi is None:
        return x_lGD.mean(dim=0)
    shifted_lGD = x_lGD + phi.position_lD[:, None]
    l, G, D = x_lGD.shape  # noqa: E741
    return shifted_lGD.transpose(0, 1).reshape(G, l * D) @ phi.weight_lDD.flatten(0, 1)
