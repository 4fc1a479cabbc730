"""What a DynMoE layer does besides tensors: how experts are chosen, and what the router learns."""

from __future__ import annotations

from dataclasses import dataclass, field

from kernels.experts.activation import Activation
from kernels.experts.router import explored_capacity
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
        sequence: tokens of each of the sequences that a pass consists of, within which tokens are
            counted for that; 0: a pass is one sequence.
    """

    tau_0: float
    theta_0: float
    fewest: int
    most: int
    bias_weighs: bool = True
    stride: int = 0
    sequence: int = 0

    def explored(self, tokens: int) -> int:
        """Most pairs that exploration adds."""
        return explored_capacity(tokens, self.stride, self.sequence) if self.stride else 0

    def slots(self, experts: int) -> int:
        """K: most pairs of one token."""
        return min(self.most, experts) + (1 if self.stride else 0)

    def capacity(self, tokens: int, experts: int, align: int) -> int:
        """P: rows that any routing of so many tokens fits into, padding included."""
        pairs = tokens * min(self.most, experts) + self.explored(tokens)
        return -(-(pairs + experts * (align - 1)) // align) * align


@dataclass(frozen=True)
class Tiles:
    """How one grouped product of ours is tiled.

    Attributes:
        n: columns of a tile.
        k: depth of a step.
        warps: of a program.
        stages: of the software pipeline.
        flatten: pipeline across the tiles of a program, too.
        per_unit: programs per multiprocessor.
        m: rows of a weight gradient's tile; rows of pairs come in tiles of 128.
    """

    n: int = 256
    k: int = 64
    warps: int = 8
    stages: int = 4
    flatten: bool = True
    per_unit: int = 1
    m: int = 128


@dataclass(frozen=True)
class ProductTiles:
    """Which grouped products are our own, and their tiles; None leaves one to torch.

    Attributes:
        up: gather of x, W_in and the activation in one kernel.
        down: W_out.
        dh: gather of the upstream gradient, W_out^T and the activation's backward in one kernel.
        dx: W_in^T.
        dw_in: gradient of W_in, with the gather of x.
        dw_out: gradient of W_out, with the gather of the upstream gradient.
    """

    up: Tiles | None = None
    down: Tiles | None = None
    dh: Tiles | None = None
    dx: Tiles | None = None
    dw_in: Tiles | None = None
    dw_out: Tiles | None = None

    @property
    def align(self) -> int:
        """Rows that groups are padded to: whole tiles for our own products, none for torch's."""
        own = (self.up, self.down, self.dh, self.dx, self.dw_in, self.dw_out)
        return 128 if any(tiles is not None for tiles in own) else 1


MEASURED = ProductTiles(
    up=Tiles(n=128, stages=3, flatten=False),
    dh=Tiles(n=128, stages=4, flatten=False),
    dw_in=Tiles(stages=5),
    dw_out=Tiles(stages=5),
)
"""Ours where one was faster alone on an H100 (bf16, width 2,048, 64 experts of 1,024; `sweep.py`).

As a whole layer another set was 2 % faster in that one sweep: measure before relying on it.
"""


@dataclass(frozen=True)
class LayerSpec:
    """What the layer does.

    Attributes:
        activation: `swiglu` or `relu2`.
        route: how experts are chosen.
        surprise: what the router learns from Surprise; None when evaluating or switched off.
        surrogate_width: how far, in units of z, the gradient reaches across the threshold.
        products: which grouped products of the Triton layer are our own.
    """

    activation: Activation
    route: RouteSpec
    surprise: SurpriseSpec | None = field(default_factory=SurpriseSpec)
    surrogate_width: float = 1.0
    products: ProductTiles = field(default_factory=ProductTiles)
