"""Oracle of the expert feed-forward: a loop per token and expert in fp64, surprise by autograd.

Written to be read beside the definitions, not to be fast: autograd does every gradient, and the
surprise of a pair is taken from a backward of that pair's contribution alone, with the expert's
weights as leaves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.experts.activation import Activation
from kernels.experts.surprise import SurpriseSpec


def expert_naive(
    x_C: Tensor, w_in_IC: Tensor, w_out_CF: Tensor, activation: Activation, delta_F: Tensor | None
) -> Tensor:
    """One expert on one token: W_out (a(W_in x) * (1 + delta)), [C]."""
    inner_I = w_in_IC @ x_C
    if activation == "swiglu":
        half = inner_I.shape[0] // 2
        h_F = inner_I[:half] * torch.sigmoid(inner_I[:half]) * inner_I[half:]
    else:
        h_F = torch.clamp(inner_I, min=0) ** 2
    return w_out_CF @ (h_F if delta_F is None else h_F * (1 + delta_F))


def surprise_naive(
    x_TC: Tensor,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    weight_TE: Tensor,
    run_TE: Tensor,
    g_TC: Tensor,
    activation: Activation,
    delta_TF: Tensor | None,
    kind: str,
) -> Tensor:
    """Surprise, fp64 [T, E], of the pairs that ran: norm of the gradient of weight * (g . o).

    `param_grad`: on that expert's weights, from this token alone; `output_grad`: on its output.
    weight_TE is the gate weight of each pair, g_TC the upstream gradient.
    """
    S_TE = torch.zeros_like(weight_TE, dtype=torch.float64)
    for t, e in run_TE.nonzero().tolist():
        w_in = w_in_EIC[e].detach().double().requires_grad_()
        w_out = w_out_ECF[e].detach().double().requires_grad_()
        delta = None if delta_TF is None else delta_TF[t].detach().double()
        with torch.enable_grad():
            o = expert_naive(x_TC[t].detach().double(), w_in, w_out, activation, delta)
            loss = weight_TE[t, e].detach().double() * (g_TC[t].double() @ o)
            leaves = (w_in, w_out) if kind == "param_grad" else (o,)
            grads = torch.autograd.grad(loss, leaves)
        S_TE[t, e] = torch.cat([grad.flatten() for grad in grads]).norm()
    return S_TE


def router_loss_naive(S_TE: Tensor, z_TE: Tensor, run_TE: Tensor, spec: SurpriseSpec) -> Tensor:
    """Router loss [T] of each token, differentiable in z; S already divided by the loss scale."""
    losses = []
    for t in range(z_TE.shape[0]):
        ran = run_TE[t].nonzero()[:, 0]
        S, z = S_TE[t, ran].detach(), z_TE[t, ran]
        if len(ran) < 2 or not S.sum() > 0:
            losses.append(z_TE[t].sum() * 0)
            continue
        cost = S / S.mean() if spec.normalise == "mean" else S
        q = torch.softmax(-cost / spec.temperature, dim=0)
        log_pi = torch.log_softmax(z, dim=0)
        kl = torch.nn.functional.kl_div(log_pi, q, reduction="sum")
        losses.append(spec.kl_weight * kl - spec.ce_weight * log_pi[S.argmin()])
    return torch.stack(losses)


class _Teach(torch.autograd.Function):
    """Identity on y whose backward hands z the gradient of the router loss."""

    @staticmethod
    def forward(ctx: Any, y_TC: Tensor, z_TE: Tensor, lesson: Any) -> Tensor:
        ctx.save_for_backward(z_TE)
        ctx.lesson = lesson
        return y_TC.clone()

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor, Tensor, None]:
        (z_TE,) = ctx.saved_tensors
        with torch.enable_grad():
            z_TE = z_TE.detach().requires_grad_()
            (dz_TE,) = torch.autograd.grad(ctx.lesson(grad_TC, z_TE), z_TE)
        return grad_TC, dz_TE, None


def expert_ffn_naive(
    x_TC: Tensor,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    p_TE: Tensor,
    fired_TE: Tensor,
    *,
    activation: Activation,
    hidden_delta_TF: Tensor | None = None,
    surprise: SurpriseSpec | None = None,
    z_TE: Tensor | None = None,
    loss_scale: Tensor | None = None,
    explored_TE: Tensor | None = None,
) -> Tensor:
    """Same meaning as `kernels.experts.expert_ffn`, [T, C]; give it fp64 tensors.

    The arguments that only size buffers or pick an implementation are left out.
    """
    run_TE = fired_TE if explored_TE is None else fired_TE | explored_TE
    deltas = hidden_delta_TF
    rows = []
    for t in range(x_TC.shape[0]):
        y_C = torch.zeros_like(x_TC[t])
        for e in run_TE[t].nonzero()[:, 0].tolist():
            delta = None if deltas is None else deltas[t]
            y_C = y_C + p_TE[t, e] * expert_naive(
                x_TC[t], w_in_EIC[e], w_out_ECF[e], activation, delta
            )
        rows.append(y_C)
    y_TC = torch.stack(rows) if rows else torch.zeros_like(x_TC)
    if surprise is None:
        return y_TC
    assert z_TE is not None
    assert loss_scale is not None
    spec, scale_of_loss = surprise, loss_scale

    def lesson(grad_TC: Tensor, z: Tensor) -> Tensor:
        weight_TE = torch.ones_like(p_TE)
        if spec.gated:
            weight_TE = p_TE.detach().clone()
            for t, e in (run_TE & ~fired_TE).nonzero().tolist():
                beside = torch.cat([z[t, e : e + 1], z[t][fired_TE[t]]]).detach()
                weight_TE[t, e] = torch.softmax(beside, dim=0)[0]
        S_TE = surprise_naive(
            x_TC, w_in_EIC, w_out_ECF, weight_TE, run_TE, grad_TC, activation, deltas, spec.kind
        )
        loss_T = router_loss_naive(S_TE / scale_of_loss, z, run_TE, spec)
        return loss_T.sum() * spec.coefficient * scale_of_loss

    return _Teach.apply(y_TC, z_TE, lesson)  # type: ignore[no-any-return, no-untyped-call]
