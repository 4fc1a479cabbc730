"""What a token costs in arithmetic, how well the machine is used, and where the parameters are.

Active floating point operations of a token, forward and backward (a multiply-add is 2):

- matmul weights that the token really passes: 2 forward, 4 backward, so 6 per weight. An expert
  counts as often as it fires on average; embedding and DeepEmbed rows are look-ups and count 0.
- full causal attention, S tokens a document: the mean query sees (S + 1) / 2 keys, and q·k and p·v
  cost 4·H·D forward per key, three times that with the backward: 12·H·D·(S + 1)/2.
- NSA (arXiv 2502.11089): the same 12·H·D per visible key of each branch: compressed blocks that end
  at or before the query, tokens of the selected blocks, tokens of the window; all averaged exactly
  over the S queries of a document. Block scoring repeats q·k over the compressed blocks, because a
  fused kernel never keeps the probabilities: 2·H·D, forward only (no gradient through top-k).
  The learned compression maps l tokens by l matrices [D, D] every d tokens, for keys and values.

Recomputation (activation checkpointing, flash backward) is not counted: this is model FLOPs, so the
utilisation is MFU and not HFU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Shape:
    """The numbers of a model that decide its cost; plain, so that no other class is needed.

    Attributes:
        layers: blocks L.
        width: residual width C.
        vocab: ids V.
        seq_len: tokens S of a document (or packed sequence) for the attention's mean.
        heads: query heads H.
        groups: KV groups G.
        head_dim: D.
        attention: `nsa` or `full`.
        shared_kv: the NSA branches share one K and V instead of owning one each.
        learned_compression: the compression is a learned map; otherwise a mean.
        compress_block: l, tokens.
        compress_stride: d, tokens.
        select_block: l', tokens.
        selected: n, blocks.
        window: w, tokens.
        ffn: `dynmoe` or `dense`.
        hidden: hidden width F of one expert, or of the dense feed-forward.
        experts: experts E in a layer; 1 when dense.
        target_experts: experts that a token fires on average; 1 when dense.
        shared_hidden: hidden width of an expert that every token passes; 0 for none.
        gated: three matrices an expert (SwiGLU) instead of two.
        tied: head and embedding share one matrix.
        qk_norm: per-head RMSNorm weights on queries and keys.
        deepembed: `off`, `output` (rows of width C) or `hidden` (rows of width F).
    """

    layers: int
    width: int
    vocab: int
    seq_len: int
    heads: int
    groups: int
    head_dim: int
    hidden: int
    attention: Literal["nsa", "full"] = "nsa"
    shared_kv: bool = False
    learned_compression: bool = True
    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    selected: int = 16
    window: int = 512
    ffn: Literal["dynmoe", "dense"] = "dynmoe"
    experts: int = 1
    target_experts: float = 1.0
    shared_hidden: int = 0
    gated: bool = True
    tied: bool = True
    qk_norm: bool = False
    deepembed: Literal["off", "output", "hidden"] = "output"

    @property
    def kv_branches(self) -> int:
        """How many K/V projections a layer has."""
        return 3 if self.attention == "nsa" and not self.shared_kv else 1

    @property
    def matrices(self) -> int:
        """Weight matrices of one expert."""
        return 3 if self.gated else 2


@dataclass(frozen=True)
class VisibleKeys:
    """Mean number of keys that a query attends to, by branch, over the queries of one document."""

    full: float
    compressed: float
    selected: float
    window: float


def visible_keys(shape: Shape) -> VisibleKeys:
    """Average the visible keys over all queries t = 0 … S-1 of a document of `seq_len` tokens."""
    S = shape.seq_len
    t = torch.arange(S, dtype=torch.float64)
    stride, block = shape.compress_stride, shape.compress_block
    blocks = torch.clamp((t + 1 - block) / stride, min=-1.0).floor() + 1
    # All blocks up to the query's own one, which is only visible up to the query.
    within = t % shape.select_block + 1
    earlier = torch.clamp((t / shape.select_block).floor(), max=shape.selected - 1)
    return VisibleKeys(
        full=(S + 1) / 2,
        compressed=float(blocks.clamp(min=0).mean()),
        selected=float((earlier * shape.select_block + within).mean()),
        window=float(torch.clamp(t + 1, max=shape.window).mean()),
    )


def _active_weights(shape: Shape) -> dict[str, float]:
    """Return the matmul weights that one token passes, over all layers, by component."""
    s = shape
    attention = 2 * s.width * s.heads * s.head_dim
    attention += 2 * s.kv_branches * s.width * s.groups * s.head_dim
    if s.attention == "nsa":
        attention += s.width * 3 * s.heads
    per_expert = s.matrices * s.width
    out = {"attention_projections": float(attention * s.layers)}
    if s.ffn == "dynmoe":
        out["router"] = float(s.width * s.experts * s.layers)
        fired = s.target_experts * s.hidden + s.shared_hidden
        out["experts"] = per_expert * fired * s.layers
    else:
        out["dense_ffn"] = float(per_expert * s.hidden * s.layers)
    out["head"] = float(s.width * s.vocab)
    return out


def flops_per_token(shape: Shape) -> dict[str, float]:
    """Return active FLOPs of one token, forward and backward, by component."""
    out = {name: 6.0 * weights for name, weights in _active_weights(shape).items()}
    keys = visible_keys(shape)
    per_key = 12.0 * shape.heads * shape.head_dim * shape.layers
    if shape.attention == "full":
        out["attention_full"] = per_key * keys.full
        return out
    if shape.learned_compression:
        block_macs = 2 * shape.compress_block * shape.groups * shape.head_dim**2
        out["compression"] = 6.0 * block_macs / shape.compress_stride * shape.layers
    out["attention_compressed"] = per_key * keys.compressed
    out["attention_scoring"] = per_key / 6 * keys.compressed
    out["attention_selected"] = per_key * keys.selected
    out["attention_window"] = per_key * keys.window
    return out


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by component.

    Attributes:
        total: every trainable number, DeepEmbed table excluded.
        active: those that one token uses (one embedding row, the experts that fire on average).
        table: numbers in the DeepEmbed table, V·L·W.
        table_active: those of one token, L·W.
    """

    total: dict[str, int]
    active: dict[str, int]
    table: int
    table_active: int


def parameter_counts(shape: Shape) -> ParameterCounts:
    """Count parameters by component, total and active per token; the table stands apart."""
    s = shape
    attention = 2 * s.width * s.heads * s.head_dim
    attention += 2 * s.kv_branches * s.width * s.groups * s.head_dim
    norms = (2 * s.layers + 1) * s.width + (2 * s.head_dim * s.layers if s.qk_norm else 0)
    total = {"embedding": s.vocab * s.width, "attention": attention * s.layers, "norms": norms}
    active = {"embedding": s.width, "attention": attention * s.layers, "norms": norms}
    if s.attention == "nsa":
        total["gates"] = active["gates"] = s.layers * 3 * s.heads * (s.width + 1)
        if s.learned_compression:
            maps = 2 * (s.compress_block * s.head_dim**2 + s.compress_block * s.head_dim)
            total["compression"] = active["compression"] = maps * s.layers
    expert = s.matrices * s.width
    if s.ffn == "dynmoe":
        # Directions, thresholds and one temperature.
        router = s.layers * (s.width * s.experts + s.experts + 1)
        total["router"] = active["router"] = router
        total["experts"] = s.layers * expert * (s.experts * s.hidden + s.shared_hidden)
        active["experts"] = round(
            s.layers * expert * (s.target_experts * s.hidden + s.shared_hidden)
        )
    else:
        total["dense_ffn"] = active["dense_ffn"] = s.layers * expert * s.hidden
    if not s.tied:
        total["head"] = s.vocab * s.width
    active["head"] = s.vocab * s.width
    row = s.layers * {"off": 0, "output": s.width, "hidden": s.hidden}[s.deepembed]
    return ParameterCounts(total, active, s.vocab * row, row)


PEAK_BF16_FLOPS = (
    ("GH200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("B100", 1750e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A40", 150e12),
    ("A10G", 70e12),
    ("A10", 125e12),
)
"""Dense bf16 tensor-core peak in FLOP/s by words of torch.cuda's device name, from NVIDIA's data
sheets; the first match counts, so the more special name comes first."""


def peak_flops(device: torch.device | str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of one device, None on a CPU or an unknown GPU.

    Args:
        device: a torch device, or the name that torch.cuda.get_device_name gives.
    """
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    words = device.replace("-", " ").split()
    for name, peak in PEAK_BF16_FLOPS:
        parts = name.split()
        if any(words[i : i + len(parts)] == parts for i in range(len(words))):
            return peak
    return None


MFU_FORMULA = (
    "MFU = tokens/s x FLOPs per token / (GPUs x dense bf16 peak). FLOPs per token, forward and "
    "backward: 6 x matmul weights that it passes (an expert's as often as it fires on average) + "
    "12 x heads x head_dim per key that each branch of attention sees + 2 x heads x head_dim per "
    "compressed block that is scored. What is computed again is not counted."
)
"""How `mfu` and `flops_per_token` count, for whoever reads a benchmark."""


def mfu(
    tokens_per_s: float, per_token: float, device: torch.device | str, devices: int = 1
) -> float | None:
    """Return model FLOP utilisation in 0 … 1, None where the peak is not known.

    Args:
        tokens_per_s: tokens per second of the whole run.
        per_token: sum of `flops_per_token`, forward and backward.
        device: one of the (alike) devices, or its name.
        devices: how many work on the run.
    """
    peak = peak_flops(device)
    return None if peak is None else tokens_per_s * per_token / (peak * devices)
