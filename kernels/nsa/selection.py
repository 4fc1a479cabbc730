"""Which blocks a query reads: block importance (eq. 9) and top-k with forced blocks (eq. 11).

Training and decoding call the same two functions, so that equal probabilities select equal blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.nsa.spec import NsaSpec


def sum_heads(p_GRBN: Tensor) -> Tensor:
    """Eq. 10: sum over the R heads of a group, one after the other; [G, R, B, N] to [G, B, N].

    torch.sum may add different columns in different orders; equal columns must stay equal (ties).
    """
    total = p_GRBN[:, 0].clone()
    for r in range(1, p_GRBN.shape[1]):
        total += p_GRBN[:, r]
    return total


def block_importance(p_N: Tensor, spec: NsaSpec) -> Tensor:
    """Eq. 9 over the last dimension.

    Args:
        p_N: probabilities [..., N] of compressed slots, N = J·l'/d; 0 where there is no block.
        spec: the sizes.

    Returns:
        [..., J]; every block sums its terms in the same order.
    """
    per_block = spec.select // spec.stride
    lead = spec.block // spec.stride - 1
    N = p_N.shape[-1]
    padded = torch.nn.functional.pad(p_N, (lead, per_block))
    importance: Tensor | None = None
    for offset, weight in zip(spec.importance_offsets, spec.importance_weights, strict=True):
        begin = lead + offset
        part = padded[..., begin : begin + N : per_block]
        importance = part * weight if importance is None else importance.add_(part, alpha=weight)
    assert importance is not None
    return importance


def rank_bias(allowed_J: Tensor, forced_J: Tensor) -> Tensor:
    """What to add to importance before ranking: inf where forced, -inf where not allowed; fp32.

    Args:
        allowed_J: blocks of the query's document up to its own.
        forced_J: initial and local blocks, a subset of allowed.
    """
    bias = torch.zeros(allowed_J.shape, device=allowed_J.device)
    return bias.masked_fill_(forced_J, float("inf")).masked_fill_(~allowed_J, float("-inf"))


def choose_blocks(importance_J: Tensor, bias_J: Tensor, selected: int) -> Tensor:
    """Eq. 11: the forced blocks, then the most important allowed ones; ties go to the lowest index.

    Args:
        importance_J: [..., J], finite.
        bias_J: `rank_bias`, broadcasts against it.
        selected: n, how many to take in all.

    Returns:
        Booleans [..., J], fewer than n set where fewer are allowed.
    """
    rank = importance_J + bias_J
    order = rank.sort(dim=-1, descending=True, stable=True).indices[..., :selected]
    chosen = torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, order, True)
    return chosen.logical_and_(bias_J != float("-inf"))


def block_indices(chosen_J: Tensor, first: int, selected: int) -> Tensor:
    """Numbers of the chosen blocks, ascending, then -1: as the Triton kernels give them, but order.

    Args:
        chosen_J: booleans [..., J], at most `selected` of them true.
        first: number of block 0 of the J.
        selected: n, how many numbers to return.

    Returns:
        int64 [..., selected].
    """
    order = chosen_J.byte().argsort(dim=-1, descending=True, stable=True)[..., :selected]
    numbers = torch.where(chosen_J.gather(-1, order), first + order, -1)
    return torch.nn.functional.pad(numbers, (0, selected - numbers.shape[-1]), value=-1)
