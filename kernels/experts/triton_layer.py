"""The whole DynMoE layer on a GPU as one differentiable function: router, experts, Surprise.

    forward    route, place | spread x, W_in, activation | W_out | combine
    backward   spread g, W_out^T, activation with norms | three products | |g| | lesson |
               combine dx | directions, finish

A grouped product is torch's, or our own with the gather and the activation inside it
(`triton_products.py`), as `LayerSpec.products` says.

The gates are in the rows that the backward's products read (gate * dinner, gate * h), so that no
row is scaled for itself, dx needs no weights, and an explored pair (gate 0) costs nothing but its
row. The router's gradient is added to the experts' in the kernel that sums dx.

Nothing is read back from the device. A capacity of T * most rows is allocated, but rows behind the
last group are neither computed nor moved.

Shapes: T tokens, E experts, C width, F hidden, I inner (swiglu 2F, relu2 F), P rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.experts.activation import inner_width
from kernels.experts.spec import LayerSpec
from kernels.experts.triton_activation import (
    HiddenRows,
    activation_backward_triton,
    activation_triton,
)
from kernels.experts.triton_lesson import direction_grads_triton, lesson_triton
from kernels.experts.triton_products import (
    down_product,
    dx_product,
    hidden_gradients,
    up_product,
    weight_gradient,
)
from kernels.experts.triton_route import Routing, route_triton
from kernels.experts.triton_rows import (
    combine_dx_triton,
    combine_triton,
    norm_triton,
    spread_triton,
)


def supports(x_TC: Tensor, w_out_ECF: Tensor) -> str | None:
    """Say why the Triton layer cannot take these tensors; None when it can."""
    if x_TC.device.type != "cuda":
        return f"it needs a CUDA device, found {x_TC.device}"
    if x_TC.dtype not in (torch.bfloat16, torch.float32) or w_out_ECF.dtype != x_TC.dtype:
        return f"it takes bf16 or fp32 throughout, found {x_TC.dtype} and {w_out_ECF.dtype}"
    row = 16 // x_TC.element_size()
    if w_out_ECF.shape[1] % row or w_out_ECF.shape[2] % row:
        return (
            f"grouped products need rows of a multiple of 16 bytes: width {w_out_ECF.shape[1]} and "
            f"hidden {w_out_ECF.shape[2]} in {x_TC.dtype} are not multiples of {row}"
        )
    if x_TC.shape[0] == 0:
        return "there are no tokens"
    return None


def route(
    x_TC: Tensor,
    direction_EC: Tensor,
    log_tau: Tensor,
    theta_E: Tensor,
    bias_E: Tensor,
    step_1: Tensor,
    first: int,
    spec: LayerSpec,
) -> Routing:
    """Decide which experts every token runs; see `route_triton`."""
    return route_triton(
        x_TC.detach().contiguous(), direction_EC.detach().contiguous(), log_tau.detach(),
        theta_E.detach(), bias_E, step_1, first, spec.route, spec.products.align,
    )  # fmt: skip


def _spread(x_TW: Tensor, r: Routing, spec: LayerSpec) -> Tensor:
    return spread_triton(x_TW, r.slot_TK, r.token_P, r.ends_E, spec.products.align)


def _forward(
    x_TC: Tensor,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    delta_TF: Tensor | None,
    r: Routing,
    spec: LayerSpec,
) -> tuple[Tensor, Tensor]:
    """Inner rows [P, I] and expert outputs [P, C]."""
    tiles = spec.products
    if tiles.up is not None:
        inner_PI, h_PF = up_product(spec.activation, x_TC, w_in_EIC, delta_TF, r, tiles.up)
    else:
        x_PC = _spread(x_TC, r, spec)
        inner_PI = F.grouped_mm(x_PC, w_in_EIC.transpose(1, 2), offs=r.ends_E)
        del x_PC
        h_PF = activation_triton(spec.activation, inner_PI, delta_TF, r.token_P, r.ends_E)
    if tiles.down is not None:
        return inner_PI, down_product(h_PF, w_out_ECF, r, tiles.down)
    return inner_PI, F.grouped_mm(h_PF, w_out_ECF.transpose(1, 2), offs=r.ends_E)


def _backward(
    x_TC: Tensor,
    g_TC: Tensor,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    delta_TF: Tensor | None,
    inner_PI: Tensor,
    unit: Tensor | None,
    r: Routing,
    spec: LayerSpec,
) -> tuple[HiddenRows, Tensor, Tensor, Tensor]:
    """Hidden rows, dx rows [P, C] and the weights' gradients."""
    tiles = spec.products
    g_PC = g_TC
    if tiles.dh is None or tiles.dw_out is None:
        g_PC = _spread(g_TC, r, spec)
    if tiles.dh is not None:
        hidden = hidden_gradients(
            spec.activation, g_TC, w_out_ECF, inner_PI, delta_TF, r, unit, tiles.dh
        )
    else:
        dh_PF = F.grouped_mm(g_PC, w_out_ECF, offs=r.ends_E)
        hidden = activation_backward_triton(
            spec.activation, inner_PI, dh_PF, delta_TF, r.token_P, r.gate_P, r.ends_E, unit
        )
        del dh_PF
    if tiles.dw_out is not None:
        dw_out_ECF = weight_gradient(
            g_TC, hidden.h_PF, r, tiles.dw_out, gather_a=True, gather_b=False
        )
    else:
        dw_out_ECF = F.grouped_mm(g_PC.t(), hidden.h_PF, offs=r.ends_E)
    del g_PC
    if tiles.dw_in is not None:
        dw_in_EIC = weight_gradient(
            hidden.dinner_PI, x_TC, r, tiles.dw_in, gather_a=False, gather_b=True
        )
    else:
        x_PC = _spread(x_TC, r, spec)
        dw_in_EIC = F.grouped_mm(hidden.dinner_PI.t(), x_PC, offs=r.ends_E)
        del x_PC
    if tiles.dx is not None:
        dx_PC = dx_product(hidden.dinner_PI, w_in_EIC, r, tiles.dx)
    else:
        dx_PC = F.grouped_mm(hidden.dinner_PI, w_in_EIC, offs=r.ends_E)
    return hidden, dx_PC, dw_in_EIC, dw_out_ECF


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        direction_EC: Tensor,
        log_tau: Tensor,
        theta_E: Tensor,
        w_in_EIC: Tensor,
        w_out_ECF: Tensor,
        delta_TF: Tensor | None,
        loss_scale: Tensor | None,
        counts_X: Tensor | None,
        routing: Routing,
        spec: LayerSpec,
        stats: dict[str, Tensor] | None,
    ) -> Tensor:
        inner_PI, y_PC = _forward(x_TC, w_in_EIC, w_out_ECF, delta_TF, routing, spec)
        ctx.spec, ctx.stats, ctx.counts_X = spec, stats, counts_X
        ctx.save_for_backward(
            x_TC, direction_EC, log_tau, theta_E, w_in_EIC, w_out_ECF, delta_TF, loss_scale,
            inner_PI, *routing,
        )  # fmt: skip
        return combine_triton(y_PC, routing.slot_TK, routing.gate_TK, weighted=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor | None, ...]:
        (
            x_TC, direction_EC, log_tau, theta_E, w_in_EIC, w_out_ECF, delta_TF, loss_scale,
            inner_PI, *rest,
        ) = ctx.saved_tensors  # fmt: skip
        r, spec = Routing(*rest), ctx.spec
        teach = spec.surprise
        grad_TC = grad_TC.contiguous()
        unit = loss_scale if teach is not None and teach.kind == "param_grad" else None
        hidden, dx_PC, dw_in_EIC, dw_out_ECF = _backward(
            x_TC, grad_TC, w_in_EIC, w_out_ECF, delta_TF, inner_PI, unit, r, spec
        )
        g_norm_T = norm_triton(grad_TC) if teach is not None else None
        grads = lesson_triton(r, hidden, g_norm_T, loss_scale, log_tau, spec)
        dx_TC = combine_dx_triton(
            dx_PC, r.slot_TK, r.gate_TK, x_TC, grads.a_TE, grads.centre_T, direction_EC
        )
        own = direction_grads_triton(
            grads, x_TC, direction_EC, theta_E, log_tau, r.w_inv_E, ctx.counts_X
        )
        ddelta_TF = None
        if hidden.ddelta_PF is not None:
            ddelta_TF = combine_triton(hidden.ddelta_PF, r.slot_TK, r.gate_TK, weighted=False)
        if teach is not None and ctx.stats is not None:
            surprise, router_loss, agreement = own.scalars_3.unbind()
            ctx.stats.update(
                expert_surprise=own.expert_surprise_E, surprise=surprise, router_loss=router_loss,
                agreement=agreement,
            )  # fmt: skip
        return (
            dx_TC, own.ddirection_EC, own.dlog_tau_1, own.dtheta_E, dw_in_EIC, dw_out_ECF,
            ddelta_TF, None, None, None, None, None,
        )  # fmt: skip


def dynmoe_triton(
    x_TC: Tensor,
    direction_EC: Tensor,
    log_tau: Tensor,
    theta_E: Tensor,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    routing: Routing,
    spec: LayerSpec,
    *,
    hidden_delta_TF: Tensor | None = None,
    loss_scale: Tensor | None = None,
    counts_X: Tensor | None = None,
    stats: dict[str, Tensor] | None = None,
) -> Tensor:
    """Sum of the fired experts of every token, [T, C]; the backward teaches the router, too.

    Args:
        x_TC: tokens, bf16 or fp32.
        direction_EC: the experts' directions.
        log_tau: [1].
        theta_E: thresholds on top of the calibrated one.
        w_in_EIC: stacked input weights; pass the Parameter itself.
        w_out_ECF: stacked output weights; pass the Parameter itself.
        routing: from `route`, of the same x and router.
        spec: what the layer does.
        hidden_delta_TF: the hidden activations of each token are multiplied by 1 + delta, dtype of
            x; or None.
        loss_scale: 0-dim fp32, d(loss passed to backward)/d(nll of one token); needed with
            Surprise.
        counts_X: int64 [E + 1]; the backward adds the tokens fired per expert and, last, T.
        stats: dict that the backward fills as `lesson_stats` would.

    Raises:
        ValueError: shapes that do not fit, or Surprise without a loss scale.
    """
    E, C, hidden = w_out_ECF.shape
    inner = inner_width(spec.activation, hidden)
    if w_in_EIC.shape != (E, inner, C) or direction_EC.shape != (E, C) or x_TC.shape[1] != C:
        raise ValueError(
            f"{spec.activation} experts {[E, C, hidden]} need w_in {[E, inner, C]} and directions "
            f"{[E, C]}, found {list(w_in_EIC.shape)} and {list(direction_EC.shape)}"
        )
    if spec.surprise is not None and loss_scale is None:
        raise ValueError("surprise needs loss_scale")
    return _Layer.apply(  # type: ignore[no-any-return, no-untyped-call]
        x_TC.contiguous(), direction_EC.contiguous(), log_tau, theta_E, w_in_EIC, w_out_ECF,
        None if hidden_delta_TF is None else hidden_delta_TF.contiguous(), loss_scale, counts_X,
        routing, spec, stats,
    )  # fmt: skip
