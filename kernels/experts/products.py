"""The two forms of an expert's forward and backward over sorted pairs.

`grouped` takes all pairs at once through `torch.nn.functional.grouped_mm`, with the group ends on
the device. `loop` walks over the experts with the ends on the host and takes each one through its
whole chain while its rows are in the cache. On a CPU, where reading the ends costs nothing, the
loop is faster and takes fp64.

Both work per pair at unit gate weight, so that an explored pair (p = 0) has its numbers too:

    inner = W_in x,  h = a(inner) * (1 + delta),  y = W_out h
    dh = W_out^T g,  dp = dh . h,  dinner = dh * (1 + delta) * a'(inner)
    dx = sum p W_in^T dinner,  dW_in = sum dinner (p x)^T,  dW_out = sum g (p h)^T

Shapes: P pairs, E experts, C width, F expert hidden, I inner channels (swiglu 2F, relu2 F).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.experts.activation import Activation, activate, hidden_backward


class PairInputs(NamedTuple):
    """Inputs of the products, gathered by pair or to be gathered.

    Attributes:
        kind: activation.
        x_TC: tokens.
        w_in_EIC: stacked input weights.
        w_out_ECF: stacked output weights.
        delta_TF: the hidden channels of each token are multiplied by 1 + delta; or None.
        token_P: token of each pair.
        ends_E: last row + 1 of every expert's group, int32.
    """

    kind: Activation
    x_TC: Tensor
    w_in_EIC: Tensor
    w_out_ECF: Tensor
    delta_TF: Tensor | None
    token_P: Tensor
    ends_E: Tensor


class PairGrads(NamedTuple):
    """Gradients of the products; rows at unit gate weight, weight gradients with p.

    Attributes:
        dx_PC: rows to be summed with weight p into the gradient of x.
        dw_in_EIC: gradient of the input weights.
        dw_out_ECF: gradient of the output weights.
        dp_P: g . expert output, in the dtype of p.
        ddelta_PF: rows to be summed with weight p into the gradient of delta; None without one.
        h_norm_P: |h|, or None when no surprise is wanted.
        dinner_norm_P: |dinner|, or None when no surprise is wanted.
    """

    dx_PC: Tensor
    dw_in_EIC: Tensor
    dw_out_ECF: Tensor
    dp_P: Tensor
    ddelta_PF: Tensor | None
    h_norm_P: Tensor | None
    dinner_norm_P: Tensor | None


def _rows(source_TW: Tensor | None, token_P: Tensor) -> Tensor | None:
    return None if source_TW is None else source_TW.index_select(0, token_P)


def row_norm(rows_PW: Tensor, dtype: torch.dtype) -> Tensor:
    """Euclidean norm [P] of every row, accumulated in `dtype`."""
    norm_P: Tensor = torch.linalg.vector_norm(rows_PW, dim=1, dtype=dtype)
    return norm_P


def grouped_forward(a: PairInputs) -> tuple[Tensor, Tensor]:
    """Inner rows [P, I] and expert outputs [P, C] of all pairs, by grouped products."""
    x_PC = a.x_TC.index_select(0, a.token_P)
    inner_PI = F.grouped_mm(x_PC, a.w_in_EIC.transpose(1, 2), offs=a.ends_E)
    h_PF = activate(a.kind, inner_PI, _rows(a.delta_TF, a.token_P))
    return inner_PI, F.grouped_mm(h_PF, a.w_out_ECF.transpose(1, 2), offs=a.ends_E)


def grouped_backward(
    a: PairInputs, inner_PI: Tensor, p_P: Tensor, grad_TC: Tensor, norms: bool
) -> PairGrads:
    """Go back through all pairs by grouped products; `norms` also measures |h| and |dinner|."""
    g_PC = grad_TC.index_select(0, a.token_P)
    p_P1 = p_P.to(g_PC.dtype)[:, None]
    dh_PF = F.grouped_mm(g_PC, a.w_out_ECF, offs=a.ends_E)
    grads = hidden_backward(a.kind, inner_PI, dh_PF, _rows(a.delta_TF, a.token_P))
    h_PF, dinner_PI, ddelta_PF = grads
    dp_P = (dh_PF * h_PF).sum(1, dtype=p_P.dtype)
    h_norm_P = row_norm(h_PF, p_P.dtype) if norms else None
    dinner_norm_P = row_norm(dinner_PI, p_P.dtype) if norms else None
    x_PC = a.x_TC.index_select(0, a.token_P).mul_(p_P1)
    return PairGrads(
        F.grouped_mm(dinner_PI, a.w_in_EIC, offs=a.ends_E),
        F.grouped_mm(dinner_PI.t(), x_PC, offs=a.ends_E),
        F.grouped_mm(g_PC.t(), h_PF.mul_(p_P1), offs=a.ends_E),
        dp_P,
        ddelta_PF,
        h_norm_P,
        dinner_norm_P,
    )


def loop_forward(a: PairInputs, ends: list[int]) -> tuple[Tensor, Tensor]:
    """Inner rows [P, I] and expert outputs [P, C] of all pairs, expert by expert."""
    inner_PI = a.x_TC.new_empty(ends[-1], a.w_in_EIC.shape[1])
    y_PC = a.x_TC.new_empty(ends[-1], a.x_TC.shape[1])
    for e, (lo, hi) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if lo == hi:
            continue
        token, inner = a.token_P[lo:hi], inner_PI[lo:hi]
        torch.mm(a.x_TC.index_select(0, token), a.w_in_EIC[e].t(), out=inner)
        h = activate(a.kind, inner, _rows(a.delta_TF, token))
        torch.mm(h, a.w_out_ECF[e].t(), out=y_PC[lo:hi])
    return inner_PI, y_PC


def loop_backward(
    a: PairInputs, ends: list[int], inner_PI: Tensor, p_P: Tensor, grad_TC: Tensor, norms: bool
) -> PairGrads:
    """Go back through all pairs, expert by expert; `norms` also measures |h| and |dinner|."""
    x_TC, delta_TF = a.x_TC, a.delta_TF
    out = PairGrads(
        x_TC.new_empty(ends[-1], x_TC.shape[1]),
        torch.empty_like(a.w_in_EIC),
        torch.empty_like(a.w_out_ECF),
        torch.empty_like(p_P),
        None if delta_TF is None else x_TC.new_empty(ends[-1], delta_TF.shape[1]),
        torch.empty_like(p_P) if norms else None,
        torch.empty_like(p_P) if norms else None,
    )
    for e, (lo, hi) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if lo == hi:
            out.dw_in_EIC[e].zero_()
            out.dw_out_ECF[e].zero_()
            continue
        token, p = a.token_P[lo:hi], p_P[lo:hi]
        g = grad_TC.index_select(0, token)
        dh = g @ a.w_out_ECF[e]
        h, dinner, ddelta = hidden_backward(a.kind, inner_PI[lo:hi], dh, _rows(delta_TF, token))
        torch.sum(dh.mul_(h), 1, dtype=p.dtype, out=out.dp_P[lo:hi])
        if out.ddelta_PF is not None and ddelta is not None:
            out.ddelta_PF[lo:hi] = ddelta
        if out.h_norm_P is not None and out.dinner_norm_P is not None:
            out.h_norm_P[lo:hi] = row_norm(h, p.dtype)
            out.dinner_norm_P[lo:hi] = row_norm(dinner, p.dtype)
        weight = p.to(x_TC.dtype)[:, None]
        torch.mm(dinner, a.w_in_EIC[e], out=out.dx_PC[lo:hi])
        torch.mm(dinner.t(), x_TC.index_select(0, token).mul_(weight), out=out.dw_in_EIC[e])
        torch.mm(g.t(), h.mul_(weight), out=out.dw_out_ECF[e])
    return out
