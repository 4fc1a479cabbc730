"""RMSNorm and rotary position embedding (RoPE, arXiv 2104.09864).

Shapes: T tokens packed, C width, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in fp32 inside (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        """Start with weight 1; `eps` is added to the mean square."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., C]; returns x's dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        shape = self.weight.shape
        out = nn.functional.rms_norm(x.to(wide), shape, self.weight.to(wide), self.eps)
        return out.to(x.dtype)


def rope_tables(
    positions_T: Tensor, head_dim: int, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, position · theta^(-2i/D), fp32.

    Args:
        positions_T: position of each token in its own document, integers [T].
        head_dim: D, even.
        theta: base of the wavelengths.

    Returns:
        cos and sin, fp32 [T, D]; channel i and i + D/2 turn by the same angle.

    Raises:
        ValueError: head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"RoPE turns pairs of channels: head_dim must be even, got {head_dim}")
    exponent = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float64)
    frequency = theta ** -(exponent / head_dim)
    angle_TD = (positions_T[:, None] * frequency).repeat(1, 2)
    return angle_TD.cos().float(), angle_TD.sin().float()


class _Rope(torch.autograd.Function):
    """Backward is the rotation by the opposite angle: no activation is kept."""

    @staticmethod
    def forward(ctx: Any, x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _turn(x_THD, cos_TD, sin_TD, 1)

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor, None, None]:
        cos_TD, sin_TD = ctx.saved_tensors
        return _turn(grad_THD, cos_TD, sin_TD, -1), None, None


def _turn(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor, sign: int) -> Tensor:
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    x, half = x_THD.to(wide), x_THD.shape[-1] // 2
    cos, sin = cos_TD[:, None].to(wide), sin_TD[:, None, :half].to(wide)
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin, value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin, value=sign)
    return out.to(x_THD.dtype)


def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of [T, H, D] by the tables' angles, in fp32.

    Returns:
        [T, H, D] in x's dtype; differentiable in x, not in the tables.
    """
    out: Tensor = _Rope.apply(x_THD, cos_TD, sin_TD)  # type: ignore[no-untyped-call]
    return out
