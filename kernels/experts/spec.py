"""What a DynMoE layer does besides tensors: how experts are chosen, and what the router learns."""

from __future__ import annotations

from dataclasses import dataclass, field

from kernels.experts.activation import Activation
from kernels.experts.surprise import SurpriseSpec


@dataclass(frozen=True)
class RouteSpec:
    """How a token's experts are chosen.

    Attributes:
        tau_0: initial scale of the cosines; log_tau starts at 0 on top of it.
        theta_0: initial threshold, in units of z.
        fewest: experts that fire even below the threshold.
        most: experts that fire at most.
        bias_weighs: the controller's bias is part of z, and so of the gates, not only of the
            choice.
        stride: every stride-th token explores one expert that did not fire; 0 for none.
    """

    tau_0: float
    theta_0: float
    fewest: int
    most: int
    bias_weighs: bool = True
    stride: int = 0

    def explored(self, tokens: int) -> int:
        """Most pairs that exploration adds."""
        return -(-tokens // self.stride) if self.stride else 0

    def slots(self, experts: int) -> int:
        """K: most pairs of one token."""
        return min(self.most, experts) + (1 if self.stride else 0)

    def capacity(self, tokens: int, experts: int, align: int) -> int:
        """P: rows that any routing of so many tokens fits into, padding included."""
        pairs = tokens * min(self.most, experts) + self.explored(tokens)
        return -(-(pairs + experts * (align - 1)) // align) * align


@dataclass(frozen=True)
class LayerSpec:
    """What the layer does.

    Attributes:
        activation: `swiglu` or `relu2`.
        route: how experts are chosen.
        surprise: what the router learns from Surprise; None when evaluating or switched off.
        surrogate_width: how far, in units of z, the gradient reaches across the threshold.
    """

    activation: Activation
    route: RouteSpec
    surprise: SurpriseSpec | None = field(default_factory=SurpriseSpec)
    surrogate_width: float = 1.0
