"""Expert layers: an oracle, torch on any device, and Triton around grouped products on a GPU."""

from kernels.experts.activation import ACTIVATIONS, Activation, activate, inner_width
from kernels.experts.api import Implementation, expert_ffn
from kernels.experts.layer import LayerImplementation, Router, dynmoe_layer
from kernels.experts.spec import LayerSpec, RouteSpec
from kernels.experts.surprise import SurpriseKind, SurpriseSpec

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Implementation",
    "LayerImplementation",
    "LayerSpec",
    "RouteSpec",
    "Router",
    "SurpriseKind",
    "SurpriseSpec",
    "activate",
    "dynmoe_layer",
    "expert_ffn",
    "inner_width",
]
