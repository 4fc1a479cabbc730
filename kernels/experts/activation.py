"""The hidden non-linearities of a feed-forward layer and their derivatives.

An inner row holds I channels: for `swiglu` F gate channels, then F up channels (I = 2F); for
`relu2` just the F channels (I = F). One matrix product then makes the whole inner row.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["swiglu", "relu2"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def inner_width(kind: Activation, hidden: int) -> int:
    """Channels I of an inner row for F hidden channels; raises ValueError on an unknown kind."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, found {kind!r}")
    return 2 * hidden if kind == "swiglu" else hidden


def activate(kind: Activation, inner_PI: Tensor) -> Tensor:
    """Hidden activations [P, F] of inner rows [P, I]: silu(gate) * up, or relu(inner)^2."""
    if kind == "swiglu":
        gate_PF, up_PF = inner_PI.chunk(2, dim=-1)
        return F.silu(gate_PF) * up_PF
    return F.relu(inner_PI).square()


class HiddenGrads(NamedTuple):
    """What the backward needs between the two products of an expert.

    Attributes:
        h_PF: hidden activations, hidden scale included.
        dinner_PI: gradient on the inner rows.
        dscale_PF: gradient on the hidden scale of each row; None without one.
    """

    h_PF: Tensor
    dinner_PI: Tensor
    dscale_PF: Tensor | None


def hidden_backward(
    kind: Activation, inner_PI: Tensor, dh_PF: Tensor, scale_PF: Tensor | None
) -> HiddenGrads:
    """Recompute the hidden activations and go back through them.

    Args:
        kind: activation.
        inner_PI: inner rows as the forward made them.
        dh_PF: gradient on the hidden activations, scale included.
        scale_PF: hidden scale of each row, or None.
    """
    da_PF = dh_PF if scale_PF is None else dh_PF * scale_PF
    dinner_PI = torch.empty_like(inner_PI)
    if kind == "swiglu":
        gate_PF, up_PF = inner_PI.chunk(2, dim=-1)
        dgate_PF, dup_PF = dinner_PI.chunk(2, dim=-1)
        silu_PF = F.silu(gate_PF)
        torch.mul(silu_PF, da_PF, out=dup_PF)
        torch.ops.aten.silu_backward.grad_input(da_PF * up_PF, gate_PF, grad_input=dgate_PF)
        h_PF = silu_PF.mul_(up_PF)
    else:
        relu_PF = F.relu(inner_PI)
        torch.mul(relu_PF, da_PF, out=dinner_PI).mul_(2)
        h_PF = relu_PF.square_()
    if scale_PF is None:
        return HiddenGrads(h_PF, dinner_PI, None)
    dscale_PF = h_PF * dh_PF
    return HiddenGrads(h_PF.mul_(scale_PF), dinner_PI, dscale_PF)
