"""Scale every token's channels by 1 + its row's value, and add a residual; see `kernels.rows`.

A training step calls this for every layer twice (activation checkpointing) and its backward once,
so what matters beside the GPU's time is how little Python they run: only `x` is saved through
autograd (saved tensors pass Python hooks under checkpointing), and the rows' gradient may be handed
over at once (`sink`) instead of through a leaf's hook.

Shapes: T tokens, U unique rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.rows import RowIndex, row_index, segment_sum

Sink = Callable[[Tensor], None]
"""Takes the gradient of a batch's rows, [U, W] in their type."""

Keep = Callable[[Tensor], Callable[[], Tensor]]
"""Takes a tensor until the backward pass; returns what gives it back."""


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TW: Tensor,
        values_UW: Tensor,
        residual_TW: Tensor | None,
        index: RowIndex,
        sink: Sink | None,
        keep: Keep | None,
    ) -> Tensor:
        saved = [x_TW] if keep is None else []
        if sink is None:
            saved.append(values_UW)
        else:
            ctx.values_UW = values_UW.detach()
        ctx.save_for_backward(*saved)
        ctx.kept = None if keep is None else keep(x_TW.detach())
        ctx.index, ctx.sink = index, sink
        ctx.has_residual = residual_TW is not None
        if x_TW.is_cuda:
            from kernels.modulate_triton import modulate_triton

            return modulate_triton(x_TW, values_UW, index.inverse_T, residual_TW)
        delta_TW = values_UW.index_select(0, index.inverse_T).to(x_TW.dtype)
        y_TW = torch.addcmul(x_TW, x_TW, delta_TW)
        return y_TW if residual_TW is None else residual_TW + y_TW

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TW: Tensor) -> tuple[Tensor | None, ...]:
        index, sink = ctx.index, ctx.sink
        saved = [] if ctx.kept is None else [ctx.kept()]
        saved += ctx.saved_tensors
        x_TW, values_UW = saved if sink is None else (*saved, ctx.values_UW)
        if grad_TW.is_cuda:
            from kernels.modulate_triton import modulate_backward_triton

            grad_x_TW, grad_UW = modulate_backward_triton(
                grad_TW, x_TW, values_UW, index, over_values=sink is not None
            )
        else:
            delta_TW = values_UW.index_select(0, index.inverse_T).to(x_TW.dtype)
            grad_x_TW = torch.addcmul(grad_TW, grad_TW, delta_TW)
            product_TW = grad_TW.float() * x_TW.float()
            grad_UW = segment_sum(product_TW, index, dtype=torch.float32).to(values_UW.dtype)
            if sink is not None:
                values_UW.copy_(grad_UW)
                grad_UW = values_UW
        residual = grad_TW if ctx.has_residual else None
        if sink is None:
            return grad_x_TW, grad_UW, residual, None, None, None
        sink(grad_UW)
        return grad_x_TW, None, residual, None, None, None


def modulate(
    x_TW: Tensor,
    values_UW: Tensor,
    index: Tensor | RowIndex,
    residual_TW: Tensor | None = None,
    sink: Sink | None = None,
    keep: Keep | None = None,
) -> Tensor:
    """Return residual + x * (1 + value of the token's row), [T, W], differentiable in all three.

    Computed as x + x * value: in bf16 1 + value itself would lose every value below 1/256. On a GPU
    one kernel forward, with one rounding, and two backward; the rows' gradients are summed in the
    order of the tokens, by pieces of them on a GPU.

    Args:
        x_TW: fp32 or bf16.
        values_UW: rows, fp32 or bf16 [U, W], unit stride along W on a GPU.
        index: inverse_T int64 [T], or a `RowIndex` when several calls share it.
        residual_TW: added to the result, of the type of `x_TW`; None adds nothing.
        sink: gets the rows' gradient in place of autograd. It is written over the rows themselves,
            so that it takes no memory: nothing else may use these rows (a block that runs again for
            its backward pass may find the gradient there, and must not need the result).
        keep: keeps `x_TW` for the rows' gradient in place of autograd. Under activation
            checkpointing what is saved is recomputed, and x is the product of a whole matrix.
    """
    if not isinstance(index, RowIndex):
        index = row_index(index, values_UW.shape[0])
    return _Modulate.apply(x_TW, values_UW, residual_TW, index, sink, keep)  # type: ignore[no-any-return, no-untyped-call]
