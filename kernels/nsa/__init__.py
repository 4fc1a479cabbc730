"""Native Sparse Attention (arXiv 2502.11089): oracle, blocked torch path, Triton, and decoding."""

from kernels.nsa.api import nsa_attention
from kernels.nsa.decode import NsaCache, nsa_decode
from kernels.nsa.part import KeysValues, nsa_attention_part
from kernels.nsa.spec import NsaSpec, Phi

__all__ = [
    "KeysValues",
    "NsaCache",
    "NsaSpec",
    "Phi",
    "nsa_attention",
    "nsa_attention_part",
    "nsa_decode",
]
