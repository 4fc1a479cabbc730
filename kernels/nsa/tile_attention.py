"""Softmax attention of one tile of queries under an additive mask, forward and backward.

On a CPU this is torch's fused flash kernel, which needs q, k and v of one head dim; elsewhere, and
for values of another head dim, plain batched matmuls. Neither keeps the scores for the backward
pass.

Shapes: G KV groups, R query heads of a group, B queries, C keys, D head dim of q and k, E of v.
"""

from __future__ import annotations

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _fused(q_GRBD: Tensor, v_CGE: Tensor) -> bool:
    return q_GRBD.device.type == "cpu" and q_GRBD.shape[-1] == v_CGE.shape[-1]


def _per_head(x_CGD: Tensor, heads: int) -> Tensor:
    """View [C, G, D] as [G, R, C, D]; the heads of a group share memory."""
    C, G, D = x_CGD.shape
    return x_CGD.transpose(0, 1)[:, None].expand(G, heads, C, D)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(x_GRBD: Tensor) -> Tensor:
    """[G, R, B, D] to [G, R·B, D], at least fp32."""
    return _wide(x_GRBD).flatten(1, 2)


def scores(q_GRBD: Tensor, k_CGD: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Scaled and masked scores [G, R, B, C], at least fp32; the scale never sees bf16."""
    G, R, B, _ = q_GRBD.shape
    s = torch.bmm(_rows(q_GRBD) * scale, _wide(k_CGD).permute(1, 2, 0))
    return s.view(G, R, B, -1).add_(mask)


def attend(
    q_GRBD: Tensor, k_CGD: Tensor, v_CGE: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend; a query whose whole row is masked gets 0 and a log-sum-exp of 0.

    Args:
        q_GRBD: queries.
        k_CGD: keys.
        v_CGE: values.
        mask: additive, 0 or -inf, fp32 (fp64 with fp64 inputs), broadcasts to [G, R, B, C].
        scale: of the scores.

    Returns:
        outputs [G, R, B, E] in q's dtype, log-sum-exp [G, R, B] at least fp32.
    """
    if _fused(q_GRBD, v_CGE):
        R = q_GRBD.shape[1]
        k, v = _per_head(k_CGD, R), _per_head(v_CGE, R)
        out, lse = _flash(q_GRBD, k, v, 0.0, False, attn_mask=mask, scale=scale)
        return out, lse
    G, R, B, _ = q_GRBD.shape
    s = scores(q_GRBD, k_CGD, mask, scale)
    lse = torch.logsumexp(s, dim=-1)
    lse = lse.masked_fill_(lse == float("-inf"), 0.0)
    p = s.sub_(lse[..., None]).exp_()
    out = torch.bmm(p.flatten(1, 2), _wide(v_CGE).transpose(0, 1))
    return out.view(G, R, B, -1).to(q_GRBD.dtype), lse


def attend_backward(
    grad_GRBE: Tensor,
    q_GRBD: Tensor,
    k_CGD: Tensor,
    v_CGE: Tensor,
    out_GRBE: Tensor,
    lse_GRB: Tensor,
    mask: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of q [G, R, B, D], k [C, G, D] and v [C, G, E], recomputing the scores."""
    if _fused(q_GRBD, v_CGE):
        R = q_GRBD.shape[1]
        k, v = _per_head(k_CGD, R), _per_head(v_CGE, R)
        dq, dk, dv = _flash_backward(
            grad_GRBE, q_GRBD, k, v, out_GRBE, lse_GRB, 0.0, False, attn_mask=mask, scale=scale
        )
        wide = torch.promote_types(dk.dtype, torch.float32)
        return dq, dk.sum(1, dtype=wide).transpose(0, 1), dv.sum(1, dtype=wide).transpose(0, 1)
    G, R, B, D = q_GRBD.shape
    q, k, v = _rows(q_GRBD), _wide(k_CGD).transpose(0, 1), _wide(v_CGE).transpose(0, 1)
    grad = _rows(grad_GRBE)
    p = scores(q_GRBD, k_CGD, mask, scale).sub_(lse_GRB[..., None]).exp_().flatten(1, 2)
    dv = torch.bmm(p.transpose(1, 2), grad)
    delta = (grad * _rows(out_GRBE)).sum(-1, keepdim=True)
    ds = torch.bmm(grad, v.transpose(1, 2)).sub_(delta).mul_(p).mul_(scale)
    dq = torch.bmm(ds, k).view(G, R, B, D)
    dk = torch.bmm(ds.transpose(1, 2), q)
    return dq, dk.transpose(0, 1), dv.transpose(0, 1)
