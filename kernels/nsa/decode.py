"""Native Sparse Attention one token at a time, with a cache per sequence.

A step appends the token's keys and values, compresses a block when its last token has come, and
then attends as the forward pass does: importance, ranking and the choice of blocks are the same
functions.

Shapes: H query heads, G KV groups, R = H / G, D head dim of q and k, E of v, N compressed blocks,
J selection blocks, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.nsa.compression import compress_block
from kernels.nsa.selection import block_importance, choose_blocks, rank_bias, sum_heads
from kernels.nsa.spec import NsaSpec, Phi
from kernels.nsa.tile_attention import attend, scores
from kernels.token_buffer import TokenBuffer


class NsaCache:
    """Keys and values of one sequence: per token for each branch, and compressed.

    Attributes:
        spec: the sizes.
        length: tokens so far.
    """

    def __init__(self, spec: NsaSpec) -> None:
        """Start empty; memory is taken as tokens come."""
        self.spec = spec
        self.k_cmp, self.v_cmp = TokenBuffer(), TokenBuffer()
        self.k_slc, self.v_slc = TokenBuffer(), TokenBuffer()
        self.k_win, self.v_win = TokenBuffer(), TokenBuffer()
        self.k_compressed, self.v_compressed = TokenBuffer(), TokenBuffer()

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.k_slc.length

    def append(
        self,
        k_cmp: Tensor,
        v_cmp: Tensor,
        k_slc: Tensor,
        v_slc: Tensor,
        k_win: Tensor,
        v_win: Tensor,
        phi_k: Phi | None,
        phi_v: Phi | None,
    ) -> None:
        """Add one token's keys and values, each [1, G, D*], and the block that it completes."""
        for buffer, rows in (
            (self.k_cmp, k_cmp), (self.v_cmp, v_cmp), (self.k_slc, k_slc), (self.v_slc, v_slc),
            (self.k_win, k_win), (self.v_win, v_win),
        ):  # fmt: skip
            buffer.append(rows)
        blocks, end = self.k_compressed.length, self.length
        if self.spec.compressed_blocks(end) > blocks:
            for compressed, tokens, phi in (
                (self.k_compressed, self.k_cmp, phi_k),
                (self.v_compressed, self.v_cmp, phi_v),
            ):
                block_lGD = tokens.view(end - self.spec.block, end)
                compressed.append(compress_block(block_lGD, phi)[None])


def _select(q_GR1D: Tensor, cache: NsaCache, scale: float) -> Tensor:
    """Selected blocks of the newest token, booleans [G, J] over its past and its own block."""
    spec, device = cache.spec, q_GR1D.device
    J, N = spec.selection_blocks(cache.length), cache.k_compressed.length
    slots = J * spec.select // spec.stride
    j = torch.arange(J, device=device)
    bias = rank_bias(j >= 0, (j < spec.initial) | (j >= J - spec.local))
    if N == 0:
        importance = torch.zeros(q_GR1D.shape[0], J, device=device)
        return choose_blocks(importance, bias, spec.selected)
    k = cache.k_compressed.view(0, slots)
    dtype = torch.promote_types(q_GR1D.dtype, torch.float32)
    mask = torch.zeros(1, 1, 1, slots, dtype=dtype, device=device)
    mask[..., N:] = float("-inf")
    p = torch.softmax(scores(q_GR1D, k, mask, scale), dim=-1)
    return choose_blocks(block_importance(sum_heads(p)[:, 0], spec), bias, spec.selected)


def nsa_decode(
    q_1HD: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    phi_k: Phi | None,
    phi_v: Phi | None,
    gates_1H3: Tensor,
    cache: NsaCache,
    *,
    scale: float | None = None,
) -> Tensor:
    """Append one token and attend with it: the last row of the full forward over all tokens so far.

    Args:
        q_1HD: query of the new token, [1, H, D].
        k_cmp: its key of the compressed branch before compression, [1, G, D]; likewise k_slc,
            k_win.
        v_cmp: its value of the compressed branch, [1, G, E]; likewise v_slc, v_win.
        k_slc: its key of the selected branch.
        v_slc: its value of the selected branch.
        k_win: its key of the window branch.
        v_win: its value of the window branch.
        phi_k: compression of keys; None takes the mean.
        phi_v: compression of values; None takes the mean.
        gates_1H3: gates after the sigmoid, [1, H, 3].
        cache: of this sequence; it grows by the token.
        scale: of the scores; 1/sqrt(D) by default.

    Returns:
        [1, H, E] in q's dtype. Not differentiable.
    """
    _, H, D = q_1HD.shape
    G, E = v_slc.shape[1:]
    if q_1HD.shape[0] != 1:
        raise ValueError(f"nsa_decode takes one token at a time, got {q_1HD.shape[0]}")
    scale = D**-0.5 if scale is None else scale
    spec = cache.spec
    with torch.no_grad():
        cache.append(k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, phi_k, phi_v)
        n, N = cache.length, cache.k_compressed.length
        q = q_1HD.view(G, H // G, 1, D)
        dtype = torch.promote_types(q.dtype, torch.float32)
        nothing = torch.zeros(1, 1, 1, 1, dtype=dtype, device=q.device)

        chosen_GJ = _select(q, cache, scale)
        taken = min(spec.selected, chosen_GJ.shape[1])
        # Stable: the chosen blocks in ascending order, without reading anything back.
        order = chosen_GJ.byte().argsort(dim=-1, descending=True, stable=True)[:, :taken]
        inside = torch.arange(spec.select, device=q.device)
        tokens_GC = (order[..., None] * spec.select + inside).flatten(1)
        room = chosen_GJ.shape[1] * spec.select
        group = torch.arange(G, device=q.device)
        k = cache.k_slc.view(0, room)[tokens_GC.t(), group]
        v = cache.v_slc.view(0, room)[tokens_GC.t(), group]
        ahead = nothing.expand(G, 1, 1, tokens_GC.shape[1]).masked_fill(
            (tokens_GC >= n)[:, None, None], float("-inf")
        )
        selected, _ = attend(q, k, v, ahead, scale)

        near = (max(0, n - spec.window), n)
        mask = nothing.expand(1, 1, 1, near[1] - near[0])
        window, _ = attend(q, cache.k_win.view(*near), cache.v_win.view(*near), mask, scale)

        gates = gates_1H3.view(G, H // G, 1, 3).to(dtype)
        out = gates[..., 1, None] * selected + gates[..., 2, None] * window
        if N > 0:
            mask = nothing.expand(1, 1, 1, N)
            k, v = cache.k_compressed.view(0, N), cache.v_compressed.view(0, N)
            compressed, _ = attend(q, k, v, mask, scale)
            out += gates[..., 0, None] * compressed
        return out.to(q.dtype).view(1, H, E)
