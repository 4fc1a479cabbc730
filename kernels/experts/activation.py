"""The hidden non-linearities of a feed-forward layer and their derivatives.

An inner row holds I channels: for `swiglu` F gate channels, then F up channels (I = 2F); for
`relu2` just the F channels (I = F). One matrix product then makes the whole inner row.

DeepEmbed `hidden` multiplies the hidden channels by 1 + delta. In bf16 that factor would be 1 for
every delta below 1/256, and so would be the effect of a delta below 1/512 on a value that is
rounded already. So the factor is made in fp32 and goes into a product that is rounded once.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Activation = Literal["swiglu", "relu2"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def inner_width(kind: Activation, hidden: int) -> int:
    """Channels I of an inner row for F hidden channels; raises ValueError on an unknown kind."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {kind!r}")
    return 2 * hidden if kind == "swiglu" else hidden


def activate(kind: Activation, inner_PI: Tensor, delta_PF: Tensor | None = None) -> Tensor:
    """Hidden activations [P, F] of inner rows [P, I]: silu(gate) * up, or relu(inner)^2.

    They are multiplied by 1 + delta where there is one.
    """
    if delta_PF is not None:
        return _Modulated.apply(kind, inner_PI, delta_PF)  # type: ignore[no-any-return, no-untyped-call]
    if kind == "swiglu":
        gate_PF, up_PF = inner_PI.chunk(2, dim=-1)
        return F.silu(gate_PF) * up_PF
    return F.relu(inner_PI).square()


class _Modulated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: Activation, inner_PI: Tensor, delta_PF: Tensor) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(inner_PI, delta_PF)
        if kind == "swiglu":
            gate_PF, right_PF = inner_PI.chunk(2, dim=-1)
            left_PF = F.silu(gate_PF)
        else:
            left_PF = right_PF = F.relu(inner_PI)
        return _rounded_product(left_PF, right_PF * _factor(inner_PI, delta_PF))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PF: Tensor) -> tuple[None, Tensor, Tensor | None]:
        inner_PI, delta_PF = ctx.saved_tensors
        _, dinner_PI, ddelta_PF = hidden_backward(ctx.kind, inner_PI, grad_PF, delta_PF)
        return None, dinner_PI, ddelta_PF


def _factor(inner_PI: Tensor, delta_PF: Tensor) -> Tensor:
    """1 + delta, fp32 (fp64 beside fp64)."""
    return 1 + delta_PF.to(torch.promote_types(inner_PI.dtype, torch.float32))


def _rounded_product(narrow_PF: Tensor, wide_PF: Tensor) -> Tensor:
    """Product in the type of the first."""
    out_PF = torch.empty(wide_PF.shape, dtype=narrow_PF.dtype, device=narrow_PF.device)
    return torch.mul(narrow_PF, wide_PF, out=out_PF)


class HiddenGrads(NamedTuple):
    """What the backward needs between the two products of an expert.

    Attributes:
        h_PF: hidden activations, times 1 + delta.
        dinner_PI: gradient on the inner rows.
        ddelta_PF: gradient on the delta of each row; None without one.
    """

    h_PF: Tensor
    dinner_PI: Tensor
    ddelta_PF: Tensor | None


def hidden_backward(
    kind: Activation, inner_PI: Tensor, dh_PF: Tensor, delta_PF: Tensor | None
) -> HiddenGrads:
    """Recompute the hidden activations and go back through them.

    Args:
        kind: activation.
        inner_PI: inner rows as the forward made them.
        dh_PF: gradient on the hidden activations as they are after the factor 1 + delta.
        delta_PF: delta of each row, or None.
    """
    factor_PF = None if delta_PF is None else _factor(inner_PI, delta_PF)
    da_PF = dh_PF if factor_PF is None else dh_PF * factor_PF
    dinner_PI = torch.empty_like(inner_PI)
    if kind == "swiglu":
        gate_PF, right_PF = inner_PI.chunk(2, dim=-1)
        dgate_PF, dup_PF = dinner_PI.chunk(2, dim=-1)
        left_PF = F.silu(gate_PF)
        torch.mul(left_PF, da_PF, out=dup_PF)
        gate_PF = gate_PF.to(da_PF.dtype)
        torch.ops.aten.silu_backward.grad_input(da_PF * right_PF, gate_PF, grad_input=dgate_PF)
    else:
        left_PF = right_PF = F.relu(inner_PI)
        torch.mul(left_PF, da_PF, out=dinner_PI).mul_(2)
    if factor_PF is None:
        return HiddenGrads(left_PF.mul_(right_PF), dinner_PI, None)
    ddelta_PF = left_PF * right_PF * dh_PF
    h_PF = _rounded_product(left_PF, right_PF * factor_PF)
    return HiddenGrads(h_PF, dinner_PI, ddelta_PF)
