"""Sizes and habits of the feed-forward layers, and which of them cannot be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kernels.experts import Activation, SurpriseSpec, inner_width

FfnKind = Literal["dynmoe", "dense"]
SurpriseMode = Literal["param_grad", "output_grad", "off"]
Normalise = Literal["mean", "none"]


@dataclass
class DynMoeConfig:
    """Sizes and habits of the feed-forward layers.

    Attributes:
        kind: `dynmoe`, or `dense` (one feed-forward of the same active FLOPs).
        experts: E, experts per layer.
        expert_hidden: F, hidden width of one expert.
        target_experts: mean number of experts that a token fires; with `surprise: off` their exact
            number.
        min_experts: fewest experts per token; they fire even below the threshold.
        max_experts: most experts per token.
        activation: `swiglu` or `relu2` (squared ReLU).
        shared_expert: one more expert of the same width that every token passes.
        dense_hidden: hidden width when dense; 0 takes the mean active width of the sparse layer.
        init_std: standard deviation of the initial expert weights.
        logit_std: standard deviation of the router logits z at initialisation.
        surrogate_width: how far, in units of z, the gradient reaches across the threshold.
        surprise: what the router learns from; `off` is balanced top-k.
        surprise_gated: S carries the gate probability.
        surprise_normalise: S relative to its `mean` over a token's evaluated experts, or `none`.
        router_temperature: T of the router's target softmax(-S / T).
        router_kl_weight: weight of KL(target || softmax(z)).
        router_ce_weight: weight of CE(z, argmin S).
        router_coefficient: weight of the router loss against the token's nll.
        explore_share: share of training tokens that also run one expert that did not fire: every
            round(1 / explore_share)-th token of a sequence does. A share that this misses by more
            than a tenth (0.7 would be 1) is refused.
        controller_gain: step of the bias, in units of z, when the mean count is off by 100 %.
        balance_gain: step of one expert's bias when it is idle (`surprise: off`: off balance).
        idle_share: an expert counts as idle below this share of the mean load.
        dead_window: optimizer steps without a token after which an expert is called dead, and
            between two looks at the pool.
        recycle: dead experts start anew where tokens are served worst.
        max_pool: experts that the pool may grow to; 0 keeps `experts`. Their weights exist, and
            cost memory, from the start.
        grow_share: the pool grows by an expert when a larger share of the tokens finds no expert
            above its threshold (and none is dead).
    """

    kind: FfnKind = "dynmoe"
    experts: int = 8
    expert_hidden: int = 256
    target_experts: float = 2.0
    min_experts: int = 1
    max_experts: int = 4
    activation: Activation = "swiglu"
    shared_expert: bool = False
    dense_hidden: int = 0
    init_std: float = 0.02
    logit_std: float = 1.0
    surrogate_width: float = 1.0
    surprise: SurpriseMode = "param_grad"
    surprise_gated: bool = True
    surprise_normalise: Normalise = "mean"
    router_temperature: float = 1.0
    router_kl_weight: float = 1.0
    router_ce_weight: float = 0.1
    router_coefficient: float = 0.01
    explore_share: float = 0.02
    controller_gain: float = 0.1
    balance_gain: float = 0.02
    idle_share: float = 0.25
    dead_window: int = 100
    recycle: bool = True
    max_pool: int = 0
    grow_share: float = 0.25

    def __post_init__(self) -> None:
        """Refuse what cannot work; raises ValueError naming the key."""
        for key, kinds in (("kind", FfnKind), ("surprise", SurpriseMode)):
            if getattr(self, key) not in get_args(kinds):
                raise ValueError(
                    f"ffn.{key} must be one of {', '.join(get_args(kinds))}, "
                    f"found {getattr(self, key)!r}"
                )
        inner_width(self.activation, self.expert_hidden)
        if self.expert_hidden < 1 or self.dense_hidden < 0:
            raise ValueError(
                f"ffn.expert_hidden must be at least 1 and ffn.dense_hidden at least 0, found "
                f"{self.expert_hidden} and {self.dense_hidden}"
            )
        if not 1 <= self.min_experts <= self.target_experts <= self.max_experts <= self.experts:
            raise ValueError(
                "ffn needs 1 <= min_experts <= target_experts <= max_experts <= experts, found "
                f"{self.min_experts}, {self.target_experts}, {self.max_experts}, {self.experts}"
            )
        if self.max_pool and self.max_pool < self.experts:
            raise ValueError(
                f"ffn.max_pool must be 0 or at least ffn.experts {self.experts}, found "
                f"{self.max_pool}"
            )
        if self.max_pool > self.experts and self.surprise == "off":
            raise ValueError(
                "ffn.max_pool lets the pool grow where tokens find no expert above its threshold, "
                "but with ffn.surprise off every token takes its best experts: set max_pool to 0"
            )
        if not 0 < self.grow_share <= 1:
            raise ValueError(f"ffn.grow_share must be above 0 and up to 1, found {self.grow_share}")
        if not 0 <= self.explore_share <= 1 or not 0 < self.idle_share <= 1:
            raise ValueError(
                "ffn.explore_share must lie in 0 … 1 and ffn.idle_share above 0 and up to 1, found "
                f"{self.explore_share} and {self.idle_share}"
            )
        self._check_whole_numbers()
        for key in ("init_std", "logit_std", "dead_window", "router_temperature"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"ffn.{key} must be above 0, found {getattr(self, key)}")
        for key in (
            "surrogate_width",
            "router_kl_weight",
            "router_ce_weight",
            "router_coefficient",
            "controller_gain",
            "balance_gain",
        ):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"ffn.{key} must not be negative, found {getattr(self, key)}")
        self.surprise_spec()

    @property
    def explore_stride(self) -> int:
        """Tokens per token that explores; 0 when none does."""
        return round(1 / self.explore_share) if self.explore_share else 0

    def _check_whole_numbers(self) -> None:
        """Refuse a number of experts or of tokens that would be rounded to another meaning."""
        if self.surprise == "off" and self.target_experts != round(self.target_experts):
            raise ValueError(
                "with ffn.surprise off every token fires the same number of experts, which "
                f"ffn.target_experts {self.target_experts} is not: set it to "
                f"{math.floor(self.target_experts)} or {math.ceil(self.target_experts)}"
            )
        stride = self.explore_stride
        if stride and abs(1 / stride - self.explore_share) > 0.1 * self.explore_share:
            below = math.ceil(1 / self.explore_share)
            raise ValueError(
                f"ffn.explore_share {self.explore_share} cannot be: one token in a whole number "
                f"explores; set it to {1 / (below - 1):.4g} or {1 / below:.4g}"
            )

    def surprise_spec(self) -> SurpriseSpec | None:
        """What the expert kernel measures and teaches; None when `surprise: off`."""
        if self.surprise == "off":
            return None
        return SurpriseSpec(
            kind=self.surprise,
            gated=self.surprise_gated,
            normalise=self.surprise_normalise,
            temperature=self.router_temperature,
            kl_weight=self.router_kl_weight,
            ce_weight=self.router_ce_weight,
            coefficient=self.router_coefficient,
        )

    @property
    def pool(self) -> int:
        """Experts that there is room for."""
        return max(self.experts, self.max_pool)

    @property
    def fired_bounds(self) -> tuple[int, int]:
        """Fewest and most experts per token; equal when `surprise: off` (plain top-k)."""
        if self.surprise == "off":
            return (int(self.target_experts),) * 2
        return self.min_experts, self.max_experts

    def hidden_width(self) -> int:
        """Hidden channels of the layer that DeepEmbed `hidden` scales.

        F of an expert (the experts share the factor), or the dense layer's hidden width.
        """
        if self.kind == "dynmoe":
            return self.expert_hidden
        shared = self.expert_hidden if self.shared_expert else 0
        return self.dense_hidden or round(self.target_experts * self.expert_hidden) + shared
