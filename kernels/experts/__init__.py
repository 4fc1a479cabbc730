"""Expert feed-forward: an oracle, grouped products for the GPU, a loop for the CPU."""

from kernels.experts.activation import ACTIVATIONS, Activation, activate, inner_width
from kernels.experts.api import Implementation, expert_ffn
from kernels.experts.surprise import SurpriseKind, SurpriseSpec

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Implementation",
    "SurpriseKind",
    "SurpriseSpec",
    "activate",
    "expert_ffn",
    "inner_width",
]
