"""The token-wise parts of a block as two functions, which torch.compile makes few kernels of.

    project       x -> queries, keys, values, gates: norm, joint projection, norms of heads, RoPE
    add_and_norm  attention's heads -> the residual stream, and its norm for the feed-forward

Eagerly they are some thirty launches in the forward pass and twice as many in the backward, most of
them over memory that is read and written again at once. `Block` calls them where
`model.compile_blocks` says so; its other path is the oracle.

Shapes: T tokens, C width, H query heads, G KV groups, b branches with K and V of their own, D head
dim, Q = (H + 2·b·G)·D, F hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.experts import Activation, activate

BACKEND = "inductor"
"""Of torch.compile; a test takes one that captures and differentiates, and compiles nothing."""

ANYWHERE = False
"""Compile on the CPU, too (a test does)."""


class Heads(NamedTuple):
    """Sizes of the joint projection: H, b, G, D, and epsilon of the norms of heads."""

    heads: int
    branches: int
    groups: int
    dim: int
    eps: float


def project(
    x_TC: Tensor,
    w_norm_C: Tensor,
    eps: float,
    w_qkv_QC: Tensor,
    w_q_D: Tensor | None,
    w_k_D: Tensor | None,
    w_gate_GC: Tensor | None,
    b_gate_G: Tensor | None,
    cos_TD: Tensor,
    sin_TD: Tensor,
    sizes: Heads,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q [T, H, D], k and v [T, b, G, D], all turned and normed, and gates [T, H, 3].

    Args:
        x_TC: residual stream.
        w_norm_C: weight of the norm in front of attention.
        eps: its epsilon.
        w_qkv_QC: joint projection.
        w_q_D: weight of the queries' norm; None does not norm queries and keys.
        w_k_D: of the keys'.
        w_gate_GC: projection of the gates; None for full attention.
        b_gate_G: their bias.
        cos_TD: `rope_tables` of the tokens' positions.
        sin_TD: likewise.
        sizes: how the projection is cut.
    """
    T = x_TC.shape[0]
    h_TC = _norm(x_TC, w_norm_C, eps)
    H, b, G, D, head_eps = sizes
    q, k, v = torch.split(F.linear(h_TC, w_qkv_QC), [H * D, b * G * D, b * G * D], dim=-1)
    q, k = q.reshape(T, H, D), k.reshape(T, b * G, D)
    if w_q_D is not None and w_k_D is not None:
        q, k = _norm(q, w_q_D, head_eps), _norm(k, w_k_D, head_eps)
    cos, sin = cos_TD[:, None, : D // 2], sin_TD[:, None, : D // 2]
    q, k = _turn(q, cos, sin), _turn(k, cos, sin).view(T, b, G, D)
    gates = None
    if w_gate_GC is not None:
        gates = torch.sigmoid(F.linear(h_TC, w_gate_GC, b_gate_G)).view(T, H, 3)
    return q, k, v.reshape(T, b, G, D), gates


def add_and_norm(
    x_TC: Tensor, heads_TQ: Tensor, w_out_CQ: Tensor, w_norm_C: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return x + heads · w_outᵀ and its norm, [T, C] each."""
    x_TC = x_TC + F.linear(heads_TQ, w_out_CQ)
    return x_TC, _norm(x_TC, w_norm_C, eps)


def add_and_feed(
    x_TC: Tensor,
    heads_TQ: Tensor,
    w_out_CQ: Tensor,
    w_norm_C: Tensor,
    eps: float,
    activation: Activation,
    w_in_IC: Tensor,
    w_down_CF: Tensor,
) -> Tensor:
    """Return the residual stream behind a dense feed-forward layer, [T, C]."""
    x_TC, h_TC = add_and_norm(x_TC, heads_TQ, w_out_CQ, w_norm_C, eps)
    return x_TC + F.linear(activate(activation, F.linear(h_TC, w_in_IC)), w_down_CF)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps).to(x.dtype)


def _turn(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE with cosines and sines [T, 1, D / 2]."""
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    a, b = x_THD.to(wide).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_THD.dtype)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled, once for all layers: weights are arguments.

    Raises at its first call when the machine cannot compile; `model.compile_blocks: false` then
    trains without.
    """
    result: Callable[..., Any] = torch.compile(function, backend=BACKEND, fullgraph=True)
    return result
