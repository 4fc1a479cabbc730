"""Native Sparse Attention (arXiv 2502.11089): oracle, blocked torch path, Triton, and decoding."""

from kernels.nsa.spec import NsaSpec, Phi

__all__ = ["NsaSpec", "Phi"]
