"""Sparse kernels: for every operation an oracle, fast paths, and one public function that picks."""

from kernels.documents import Documents
from kernels.experts import expert_ffn
from kernels.full_attention import full_attention
from kernels.modulate import modulate
from kernels.nsa import NsaSpec, nsa_attention, nsa_decode
from kernels.rows import (
    RowIndex,
    gather_rows,
    row_index,
    segment_sum,
    split_layers,
    unique_ids,
)

__all__ = [
    "Documents",
    "NsaSpec",
    "RowIndex",
    "expert_ffn",
    "full_attention",
    "gather_rows",
    "modulate",
    "nsa_attention",
    "nsa_decode",
    "row_index",
    "segment_sum",
    "split_layers",
    "unique_ids",
]
