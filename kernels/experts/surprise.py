"""The router's lesson from Surprise: a target over the experts that ran, its loss and gradient.

Surprise S of a pair (token, expert) is the norm of that token's gradient contribution to the
expert's own weights (`param_grad`), known once the expert's backward has run:

    o = W_out h,  h = a(W_in x),  y = sum_e p_e o_e,  g = dL/dy
    S^2 = (p |g| |h|)^2 + (|d_inner| |x|)^2,   d_inner = p (W_out^T g) * a'

Each weight matrix receives an outer product from one token, and the norm of an outer product is the
product of the norms; for a gated unit d_inner holds the gate's and the up projection's part.

How it becomes a target. S is first divided by `loss_scale`, so that loss scaling, the mean over
tokens and accumulation drop out. Then, with `normalise: mean`, by its mean over the token's
evaluated experts: a temperature of 1 then means the same in every layer, at every width and at
every stage of training (gradient norms shrink by orders of magnitude while training), and says how
sharply the *relative* surprise is judged: an expert at twice the token's mean gets exp(-1/T) of the
target weight of one at the mean. `none` takes S as it is, for experiments.

An expert that did not run has unknown surprise, not zero: it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

SurpriseKind = Literal["param_grad", "output_grad"]
Normalise = Literal["mean", "none"]


@dataclass(frozen=True)
class SurpriseSpec:
    """How Surprise is measured and taught.

    Attributes:
        kind: `param_grad`: norm of the gradient contribution to the expert's weights;
            `output_grad`: p |g|, which says nothing about the expert (kept for comparison).
        gated: S carries the gate probability p (an explored expert: the p it would have had);
            without it S is what it would be at p = 1.
        normalise: see the top of this file.
        temperature: T of the target softmax(-S / T).
        kl_weight: weight of KL(target || softmax(z)).
        ce_weight: weight of CE(z, argmin S).
        coefficient: factor on the router loss relative to one token's nll.
    """

    kind: SurpriseKind = "param_grad"
    gated: bool = True
    normalise: Normalise = "mean"
    temperature: float = 1.0
    kl_weight: float = 1.0
    ce_weight: float = 0.1
    coefficient: float = 0.01

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; raises ValueError."""
        if self.kind not in get_args(SurpriseKind):
            raise ValueError(
                f"surprise kind must be param_grad or output_grad, found {self.kind!r}"
            )
        if self.normalise not in get_args(Normalise):
            raise ValueError(f"surprise normalise must be mean or none, found {self.normalise!r}")
        if self.temperature <= 0:
            raise ValueError(f"surprise temperature must be above 0, found {self.temperature}")


class RouterLesson(NamedTuple):
    """What the surprise of a batch teaches the router.

    Attributes:
        grad_TE: gradient of each token's router loss on z, without coefficient and loss scale;
            0 outside the evaluated experts and for tokens that are not counted.
        target_TE: softmax(-S / T) over the evaluated experts.
        belief_TE: softmax(z) over the evaluated experts.
        best_T1: argmin S over the evaluated experts.
        counted_T: bool, tokens with at least two evaluated experts and a finite surprise above 0;
            the rows of the others mean nothing.
    """

    grad_TE: Tensor
    target_TE: Tensor
    belief_TE: Tensor
    best_T1: Tensor
    counted_T: Tensor


def pair_weights(p_TE: Tensor, z_TE: Tensor, fired_TE: Tensor, run_TE: Tensor) -> Tensor:
    """Gate weights [T, E] that enter S; 0 where nothing ran.

    That of a fired pair is p; that of an explored one the share it would have had beside the fired,
    exp(z) / (exp(z) + sum over fired exp(z)).
    """
    total_T1 = torch.where(fired_TE, z_TE, -torch.inf).logsumexp(1, keepdim=True)
    share_TE = torch.sigmoid(z_TE - total_T1)
    return torch.where(fired_TE, p_TE, torch.where(run_TE, share_TE, 0.0))


def _softmax(values_TE: Tensor) -> Tensor:
    # torch's own is several times slower on a CPU when a row holds a handful of values.
    share_TE = (values_TE - values_TE.amax(1, keepdim=True)).exp_()
    return share_TE.div_(share_TE.sum(1, keepdim=True))


def router_lesson(S_TE: Tensor, z_TE: Tensor, run_TE: Tensor, spec: SurpriseSpec) -> RouterLesson:
    """Target and gradient of the router from the surprise of the pairs that ran.

    The loss is kl_weight * KL(target || belief) + ce_weight * CE(belief, best); its gradient on z
    has the closed form kl_weight * (belief - target) + ce_weight * (belief - onehot(best)).

    Args:
        S_TE: surprise divided by the loss scale, [T, E]; read only where run_TE is set.
        z_TE: router logits [T, E].
        run_TE: bool [T, E], the evaluated experts.
        spec: temperature, weights and normalisation.
    """
    count_T = run_TE.sum(1)
    mean_T = torch.where(run_TE, S_TE, 0.0).sum(1) / count_T
    counted_T = (count_T >= 2) & (mean_T > 0) & (mean_T < torch.inf)
    cost_TE = torch.where(run_TE, S_TE, torch.inf)
    best_T1 = cost_TE.argmin(1, keepdim=True)
    unit = mean_T[:, None] * spec.temperature if spec.normalise == "mean" else spec.temperature
    target_TE = _softmax(-cost_TE / unit)
    belief_TE = _softmax(torch.where(run_TE, z_TE, -torch.inf))
    grad_TE = (spec.kl_weight + spec.ce_weight) * belief_TE - spec.kl_weight * target_TE
    onehot = grad_TE.new_full((1, 1), -spec.ce_weight).expand_as(best_T1)
    grad_TE.scatter_add_(1, best_T1, onehot)
    grad_TE = torch.where(run_TE & counted_T[:, None], grad_TE, 0.0)
    return RouterLesson(grad_TE, target_TE, belief_TE, best_T1, counted_T)


def router_loss(lesson: RouterLesson, spec: SurpriseSpec) -> Tensor:
    """Router loss of every token in nats [T]; 0 for tokens that are not counted."""
    target_TE, belief_TE = lesson.target_TE, lesson.belief_TE
    log_belief_TE = belief_TE.clamp(min=1e-30).log()
    kl_T = -(torch.special.entr(target_TE) + target_TE * log_belief_TE).sum(1)
    ce_T = -log_belief_TE.gather(1, lesson.best_T1)[:, 0]
    return torch.where(lesson.counted_T, spec.kl_weight * kl_T + spec.ce_weight * ce_T, 0.0)


def lesson_stats(
    S_TE: Tensor, fired_TE: Tensor, lesson: RouterLesson, spec: SurpriseSpec
) -> dict[str, Tensor]:
    """Device tensors to log.

    expert_surprise [E] (mean S over the tokens each expert fired for, NaN for none), surprise (over
    all fired pairs), router_loss (nats) and agreement (the largest z is the least S), both means
    over the tokens that could be taught.
    """
    fired_S_TE = torch.where(fired_TE, S_TE, 0.0)
    count_E = fired_TE.sum(0)
    counted = lesson.counted_T.sum().clamp(min=1)
    agree_T = lesson.counted_T & (lesson.belief_TE.argmax(1) == lesson.best_T1[:, 0])
    return {
        "expert_surprise": fired_S_TE.sum(0) / count_E,
        "surprise": fired_S_TE.sum() / count_E.sum().clamp(min=1),
        "router_loss": router_loss(lesson, spec).sum() / counted,
        "agreement": agree_T.sum() / counted,
    }
