"""Expert feed-forward over the pairs that fired, with Surprise as a by-product of its backward.

Dropless: tokens are sorted by expert and go through grouped products with the stacked weights. The
backward works per pair at unit gate weight and applies p last (see products.py), which gives dp
without keeping the expert outputs, and the surprise S in closed form, also for explored pairs whose
weight in the output is zero. The router's own gradient is added to the one of z right there: no
second backward.

Because all of this happens in the backward, it happens once per token also when activation
checkpointing runs the forward twice; the load counters are kept there for the same reason.

Shapes: T tokens, E experts, P pairs, C width, F expert hidden, I inner (swiglu 2F, relu2 F).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kernels.experts.activation import Activation, inner_width
from kernels.experts.pairs import (
    Pairs,
    combine,
    exact_pairs,
    from_table,
    static_pairs,
    to_table,
)
from kernels.experts.products import (
    PairGrads,
    PairInputs,
    grouped_backward,
    grouped_forward,
    loop_backward,
    loop_forward,
    row_norm,
)
from kernels.experts.surprise import SurpriseSpec, lesson_stats, pair_weights, router_lesson

Implementation = Literal["auto", "loop", "grouped"]


@dataclass(frozen=True)
class _Plan:
    """What the function needs besides tensors."""

    activation: Activation
    surprise: SurpriseSpec | None
    loop: bool
    capacity: int
    slots: int
    stats: dict[str, Tensor] | None


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TC: Tensor,
        w_in_EIC: Tensor,
        w_out_ECF: Tensor,
        p_TE: Tensor,
        z_TE: Tensor | None,
        delta_TF: Tensor | None,
        fired_TE: Tensor,
        explored_TE: Tensor | None,
        loss_scale: Tensor | None,
        counts_X: Tensor | None,
        plan: _Plan,
    ) -> Tensor:
        run_TE = fired_TE if explored_TE is None else fired_TE | explored_TE
        ends = None
        if plan.loop:
            pairs = exact_pairs(run_TE)
            ends = pairs.ends_E.tolist()
        else:
            pairs = static_pairs(run_TE, fired_TE, plan.capacity, plan.slots)
        inputs = PairInputs(
            plan.activation, x_TC, w_in_EIC, w_out_ECF, delta_TF, pairs.token_P, pairs.ends_E
        )
        inner_PI, y_PC = loop_forward(inputs, ends) if ends is not None else grouped_forward(inputs)
        ctx.plan, ctx.ends, ctx.counts_X = plan, ends, counts_X
        ctx.save_for_backward(
            x_TC, w_in_EIC, w_out_ECF, p_TE, z_TE, delta_TF, fired_TE, run_TE, loss_scale,
            inner_PI, *pairs,
        )  # fmt: skip
        return combine(y_PC, p_TE, from_table(p_TE, pairs), pairs)

    @staticmethod
    def backward(ctx: Any, grad_TC: Tensor) -> tuple[Tensor | None, ...]:
        (
            x_TC, w_in_EIC, w_out_ECF, p_TE, z_TE, delta_TF, fired_TE, run_TE, loss_scale,
            inner_PI, *rest,
        ) = ctx.saved_tensors  # fmt: skip
        plan: _Plan = ctx.plan
        spec = plan.surprise
        pairs = Pairs(*rest)
        if ctx.counts_X is not None:
            ctx.counts_X[:-1] += fired_TE.sum(0)
            ctx.counts_X[-1] += fired_TE.shape[0]

        inputs = PairInputs(
            plan.activation, x_TC, w_in_EIC, w_out_ECF, delta_TF, pairs.token_P, pairs.ends_E
        )
        p_P = from_table(p_TE, pairs)
        norms = spec is not None and spec.kind == "param_grad"
        if ctx.ends is not None:
            grads = loop_backward(inputs, ctx.ends, inner_PI, p_P, grad_TC, norms)
        else:
            grads = grouped_backward(inputs, inner_PI, p_P, grad_TC, norms)
        dx_TC = combine(grads.dx_PC, p_TE, p_P, pairs)
        ddelta_TF = None
        if grads.ddelta_PF is not None:
            ddelta_TF = combine(grads.ddelta_PF, p_TE, p_P, pairs)
        dz_TE = None
        if spec is not None:
            S_TE = _surprise(spec, grads, pairs, x_TC, grad_TC, p_TE) / loss_scale
            if spec.gated:
                S_TE = S_TE * pair_weights(p_TE, z_TE, fired_TE, run_TE)
            lesson = router_lesson(S_TE, z_TE, run_TE, spec)
            dz_TE = lesson.grad_TE * (spec.coefficient * loss_scale)
            if plan.stats is not None:
                plan.stats.update(lesson_stats(S_TE, fired_TE, lesson, spec))
        dp_TE = to_table(grads.dp_P, pairs, *p_TE.shape)
        return (
            dx_TC, grads.dw_in_EIC, grads.dw_out_ECF, dp_TE, dz_TE, ddelta_TF,
            None, None, None, None, None,
        )  # fmt: skip


def _surprise(
    spec: SurpriseSpec,
    grads: PairGrads,
    pairs: Pairs,
    x_TC: Tensor,
    grad_TC: Tensor,
    p_TE: Tensor,
) -> Tensor:
    """S of every pair that ran at gate weight 1 as a table [T, E], loss scale included."""
    wide = p_TE.dtype
    g_T1 = row_norm(grad_TC, wide)[:, None]
    if spec.kind == "output_grad":
        return g_T1.expand_as(p_TE)
    assert grads.h_norm_P is not None
    assert grads.dinner_norm_P is not None
    out_TE = g_T1 * to_table(grads.h_norm_P, pairs, *p_TE.shape)
    inner_TE = to_table(grads.dinner_norm_P, pairs, *p_TE.shape)
    return torch.hypot(out_TE, inner_TE * row_norm(x_TC, wide)[:, None])


def expert_ffn(
    x_TC: Tensor,
    w_in_EIC: Tensor,
    w_out_ECF: Tensor,
    p_TE: Tensor,
    fired_TE: Tensor,
    *,
    activation: Activation,
    max_fired: int,
    hidden_delta_TF: Tensor | None = None,
    surprise: SurpriseSpec | None = None,
    z_TE: Tensor | None = None,
    loss_scale: Tensor | None = None,
    explored_TE: Tensor | None = None,
    max_explored: int = 0,
    counts_X: Tensor | None = None,
    stats: dict[str, Tensor] | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """y[t] = sum over fired experts e of p[t, e] * W_out[e] (a(W_in[e] x[t]) * (1 + delta[t])).

    Args:
        x_TC: tokens [T, C], bf16 or fp32 (fp64 with `loop`).
        w_in_EIC: stacked input weights, same dtype; pass the Parameter itself. For `swiglu` I = 2F,
            gate rows first, then up rows.
        w_out_ECF: stacked output weights, same dtype; pass the Parameter itself.
        p_TE: gate probabilities [T, E], fp32 (fp64 when x is), 0 where an expert did not fire.
        fired_TE: bool [T, E], 1..max_fired per token.
        activation: `swiglu` or `relu2`.
        max_fired: upper bound on the experts a token fires, host int.
        hidden_delta_TF: the hidden activations of each token are multiplied by 1 + delta [T, F],
            dtype of x; 1 + delta is never rounded to it.
        surprise: measure S in the backward and add the router's gradient to the one of z; None
            leaves both out.
        z_TE: router logits [T, E], dtype of p; needed with `surprise`.
        loss_scale: 0-dim fp32, d(loss passed to backward)/d(nll of one token); needed with
            `surprise`. S is divided by it and the injected gradient multiplied with it.
        explored_TE: bool [T, E], further pairs to run with weight 0 in the output, so that their
            surprise (and dp) is known; disjoint from fired_TE.
        max_explored: upper bound on the number of explored pairs, host int.
        counts_X: int64 [E + 1] counter; the backward adds the tokens fired per expert and, last, T.
        stats: dict that the backward fills; see `lesson_stats`.
        implementation: `grouped` (torch grouped_mm, static capacity T * max_fired + max_explored,
            no host sync; bf16 needs C and F divisible by 8), `loop` (over experts, exact number of
            pairs, syncs), `auto`: loop on a CPU, else grouped.

    Returns:
        y [T, C] in the dtype of x. The gradient of p is also given for explored pairs, and is zero
        for pairs that did not run.

    Raises:
        ValueError: shapes that do not fit, a missing z or loss_scale, or a size that grouped_mm
            cannot take.
    """
    tokens, width = x_TC.shape
    experts, _, hidden = w_out_ECF.shape
    inner = inner_width(activation, hidden)
    if w_in_EIC.shape != (experts, inner, width) or w_out_ECF.shape[1] != width:
        raise ValueError(
            f"{activation} experts of hidden width {hidden} need w_in [E, {inner}, {width}] and "
            f"w_out [E, {width}, {hidden}], found {list(w_in_EIC.shape)}, {list(w_out_ECF.shape)}"
        )
    if p_TE.shape != (tokens, experts) or fired_TE.shape != (tokens, experts):
        raise ValueError(
            f"p and fired must be [{tokens}, {experts}], found {list(p_TE.shape)}, "
            f"{list(fired_TE.shape)}"
        )
    if surprise is not None and (z_TE is None or loss_scale is None):
        raise ValueError("surprise needs z_TE and loss_scale")
    if implementation not in get_args(Implementation):
        raise ValueError(f"implementation must be auto, loop or grouped, found {implementation!r}")
    loop = implementation == "loop" or (implementation == "auto" and x_TC.device.type == "cpu")
    if not loop and (width * x_TC.element_size() % 16 or hidden * x_TC.element_size() % 16):
        raise ValueError(
            f"grouped_mm needs rows of a multiple of 16 bytes: width {width} and hidden {hidden} "
            f"in {x_TC.dtype} are not; take multiples of {16 // x_TC.element_size()}"
        )
    plan = _Plan(
        activation,
        surprise,
        # An empty rank has nothing to group; the loop handles it without a product.
        loop or tokens == 0,
        tokens * min(max_fired, experts) + max_explored,
        max_fired,
        stats,
    )
    return _ExpertFfn.apply(  # type: ignore[no-any-return, no-untyped-call]
        x_TC, w_in_EIC, w_out_ECF, p_TE, z_TE if surprise is not None else None, hidden_delta_TF,
        fired_TE, explored_TE, loss_scale if surprise is not None else None, counts_X, plan,
    )  # fmt: skip
