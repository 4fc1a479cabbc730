"""Routing in plain torch: cosine scores, who fires, how much, and who explores.

Everything here works on [T, E] tables in fp32, whatever the model's dtype, and none of it draws
from a random generator: a recomputed forward (activation checkpointing) decides the same.
`triton_route.py` and `triton_lesson.py` do the same in registers.

Shapes: T tokens, C width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLOSED_Z = -1e3
"""An expert whose logit lies below does not exist yet."""


class _CosineScores(torch.autograd.Function):
    """Cosines that keep x as it came (bf16) for the backward instead of an fp32 copy."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, w_EC: Tensor) -> Tensor:
        wide = torch.promote_types(x_TC.dtype, torch.float32)
        x, w = x_TC.to(wide), w_EC.to(wide)
        x_inv_T, w_inv_E = _inverse_norm(x), _inverse_norm(w)
        s_TE = (x @ w.t()) * x_inv_T[:, None] * w_inv_E
        ctx.save_for_backward(x_TC, w_EC, s_TE, x_inv_T, w_inv_E)
        return s_TE

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TC, w_EC, s_TE, x_inv_T, w_inv_E = ctx.saved_tensors
        x, w = x_TC.to(s_TE.dtype), w_EC.to(s_TE.dtype)
        grad_s_TE = grad_TE * s_TE
        a_TE = grad_TE * x_inv_T[:, None] * w_inv_E
        dx = torch.addcmul(a_TE @ w, x, (grad_s_TE.sum(1) * x_inv_T.square())[:, None], value=-1)
        dw = torch.addcmul(
            a_TE.t() @ x, w, (grad_s_TE.sum(0) * w_inv_E.square())[:, None], value=-1
        )
        return dx.to(x_TC.dtype), dw.to(w_EC.dtype)


def _inverse_norm(rows: Tensor) -> Tensor:
    """1 / norm of every row; 0 for a zero row, which then scores 0 and receives no gradient."""
    norm = torch.linalg.vector_norm(rows, dim=1)
    return torch.where(norm > 1e-20, norm.reciprocal(), 0.0)


def cosine_scores(x_TC: Tensor, w_EC: Tensor) -> Tensor:
    """Cosine of every token with every expert's direction, fp32 [T, E] (fp64 for fp64 inputs).

    The product runs in fp32 under autocast too; pass the Parameter w_EC itself.
    """
    with torch.autocast(x_TC.device.type, enabled=False):
        return _CosineScores.apply(x_TC, w_EC)  # type: ignore[no-any-return, no-untyped-call]


class _FiredSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_TE: Tensor, fired_TE: Tensor, surrogate_width: float) -> Tensor:
        fired_z_TE = torch.where(fired_TE, z_TE, -torch.inf)
        share_TE = (z_TE - fired_z_TE.logsumexp(1, keepdim=True)).exp()
        p_TE = torch.where(fired_TE, share_TE, 0.0)
        ctx.surrogate_width = surrogate_width
        ctx.save_for_backward(z_TE, share_TE, p_TE)
        return p_TE

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None, None]:
        z_TE, share_TE, p_TE = ctx.saved_tensors
        gain_TE = grad_TE - (p_TE * grad_TE).sum(1, keepdim=True)
        dz_TE = p_TE * gain_TE
        if ctx.surrogate_width > 0:
            soft_TE = torch.sigmoid(z_TE / ctx.surrogate_width)
            near_TE = share_TE * soft_TE * (1 - soft_TE) / ctx.surrogate_width
            total_T1 = near_TE.sum(1, keepdim=True).clamp(min=1e-30)
            centre_T1 = (near_TE * gain_TE).sum(1, keepdim=True) / total_T1
            dz_TE = torch.addcmul(dz_TE, near_TE, gain_TE - centre_T1)
        return dz_TE, None, None


def fired_softmax(z_TE: Tensor, fired_TE: Tensor, surrogate_width: float) -> Tensor:
    """Softmax p of z over the fired experts, 0 elsewhere, with a gradient across the threshold.

    p_i = m_i exp(z_i) / sum_j m_j exp(z_j) with the hard mask m = [fired], whose derivative is
    taken straight through as that of sigmoid(z / surrogate_width). With G = dL/dp that makes

        A_i = G_i - sum_j p_j G_j,
        dL/dz_i = p_i A_i + n_i (A_i - mean of A with weights n),
        n_i = sigmoid'(z_i) exp(z_i) / sum over fired exp(z_j),

    where the mean is taken off because it would move all thresholds together: how many experts fire
    is the controller's business, and without this the two fight (the bias ran away and the count
    fell to 1 on a drifting stream). What remains says which of the experts near the threshold is
    the better one to have.

    An expert that did not fire thus learns too, also where a single one fired and p is constant.
    Its own G is known if it was explored, and counts as 0 (an output of zero) if it did not run: it
    is then called when the present output hurts, and kept away when it helps.

    Args:
        z_TE: logits; no unfired expert far above the fired ones.
        fired_TE: bool, at least one per token.
        surrogate_width: in units of z; 0 turns the surrogate off.
    """
    return _FiredSoftmax.apply(z_TE, fired_TE, surrogate_width)  # type: ignore[no-any-return, no-untyped-call]


def fire(z_TE: Tensor, min_experts: int, max_experts: int) -> Tensor:
    """Bool [T, E]: z > 0, at most the max_experts largest, at least the min_experts largest."""
    top = z_TE.topk(min(max_experts, z_TE.shape[1]), dim=1)
    fires_TK = top.values > 0
    fires_TK[:, :min_experts] = True
    return torch.zeros_like(z_TE, dtype=torch.bool).scatter_(1, top.indices, fires_TK)


def explored_capacity(tokens: int, stride: int, sequence: int = 0) -> int:
    """Most pairs that `explore` marks among so many tokens, wherever in a pass they begin."""
    # They touch at most so many sequences, and each may hold one explorer more than its share.
    pieces = (tokens + sequence - 2) // sequence + 1 if sequence else 1
    return min(tokens, (tokens + pieces * (stride - 1)) // stride)


def explore(
    z_TE: Tensor, fired_TE: Tensor, step_1: Tensor, stride: int, first: int = 0, sequence: int = 0
) -> Tensor:
    """Bool [T, E]: every stride-th token gets one expert that did not fire, all equally likely.

    The choice is a hash of the step and of the token's index in its own sequence, so that it needs
    no generator and no host, is the same when the forward is recomputed, and hangs neither on the
    last bit of a score nor on which sequences are packed into one pass, and in which order: however
    the work is spread over ranks and micro-batches, the same tokens explore the same experts. (All
    sequences of a step explore at the same indices.) A token for which every expert fired explores
    none, and an expert that is closed (z below CLOSED_Z) is none.

    Args:
        z_TE: logits that choose; only tells who is closed.
        fired_TE: bool, who fired.
        step_1: int64 [1], the optimizer step.
        stride: tokens per token that explores.
        first: index of the first of these tokens in the pass, which ranks may share.
        sequence: tokens of each of the sequences that the pass consists of; 0: it is one.
    """
    tokens, experts = z_TE.shape
    device = z_TE.device
    length = sequence or max(first + tokens, 1)
    # N sequences, of which the first and the last may reach out of these tokens.
    start_N1 = torch.arange(first // length, -(-(first + tokens) // length), device=device)[:, None]
    start_N1 = start_N1 * length - first
    index_NM = torch.arange(-(-min(length, tokens) // stride), device=device) * stride
    begin_N1 = (-start_N1).clamp(min=0)
    index_NM = index_NM + begin_N1 + (step_1 * 2654435761 - begin_N1) % stride
    index_M, token_M = index_NM.flatten(), (start_N1 + index_NM).flatten()
    inside_M = (index_M < length) & (token_M < tokens)
    safe_M = token_M.clamp(max=tokens - 1) if tokens else token_M
    seed_M1 = (index_M * 0x9E3779B1 + step_1 * 0x85EBCA6B)[:, None]
    hash_ME = (seed_M1 + 40503 * torch.arange(1, experts + 1, device=device)) & 0x7FFFFFFF
    for factor in (0x2C1B3C6D, 0x297A2D39):
        hash_ME = ((hash_ME ^ (hash_ME >> 15)) * factor) & 0x7FFFFFFF
    hash_ME = hash_ME ^ (hash_ME >> 15)
    shut_ME = fired_TE[safe_M] | (z_TE[safe_M] < CLOSED_Z)
    best_M = torch.where(shut_ME, -1, hash_ME).max(1)
    # Places that explore nothing go to a row past the end.
    target_M = torch.where(inside_M & (best_M.values >= 0), token_M, tokens)
    explored = torch.zeros(tokens + 1, experts, dtype=torch.bool, device=device)
    explored[target_M, best_M.indices] = True
    return explored[:tokens]


def route_stats(fired_TE: Tensor, p_TE: Tensor, most: int) -> dict[str, Tensor]:
    """Device tensors to log about a forward.

    experts_per_token, experts_per_token_counts [most + 1], expert_load [E] (share of the tokens),
    router_entropy (nats, of p).
    """
    tokens = max(fired_TE.shape[0], 1)
    fired_T = fired_TE.sum(1)
    bins_N = torch.arange(most + 1, device=fired_T.device)
    return {
        "experts_per_token": fired_T.sum() / tokens,
        "experts_per_token_counts": (fired_T[:, None] == bins_N).sum(0),
        "expert_load": fired_TE.sum(0) / tokens,
        "router_entropy": torch.special.entr(p_TE).sum() / tokens,
    }
