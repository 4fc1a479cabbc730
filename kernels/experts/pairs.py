"""Which (token, expert) pairs run, sorted by expert, and the sum back over a token's pairs.

Two forms of the same list:
- exact (CPU): P is the true number of pairs, read on the host, where that costs nothing;
- static (GPU): P is a capacity known beforehand, the pairs fill its head and the tail is padding
  that lies beyond the last group offset. Nothing is read back from the device.

A grouped matmul leaves the rows of the tail undefined. They stay harmless because rows are only
ever mixed in two places: the weight gradients, which stop at the last offset, and `combine`, which
reads valid rows only (a token's unused slots point at one of its own rows, with weight zero).

Shapes: T tokens, E experts, P pairs (or capacity), K most experts a token fires, W any row width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Pairs(NamedTuple):
    """Pairs sorted by expert, then token.

    Attributes:
        token_P: token of each pair, int64; padding holds 0.
        cell_P: index t * E + e into a flat [T, E] table, int64; padding holds T * E.
        ends_E: last row + 1 of every expert's group, int32.
        order_X: exact: the pairs in token order [P]; static: the pair in each slot [T, K].
        bound_X: exact: first entry of each token in order_X, int64 [T]; static: bool [T, K], which
            slots hold a fired pair.
    """

    token_P: Tensor
    cell_P: Tensor
    ends_E: Tensor
    order_X: Tensor
    bound_X: Tensor


def exact_pairs(run_TE: Tensor) -> Pairs:
    """List the pairs where run_TE (bool [T, E]) is set; reads their number on the host."""
    experts = run_TE.shape[1]
    expert_P, token_P = run_TE.t().nonzero(as_tuple=True)
    count_T = run_TE.sum(1)
    return Pairs(
        token_P,
        token_P * experts + expert_P,
        run_TE.sum(0).cumsum(0).to(torch.int32),
        token_P.argsort(stable=True),
        count_T.cumsum(0) - count_T,
    )


def static_pairs(run_TE: Tensor, fired_TE: Tensor, capacity: int, slots: int) -> Pairs:
    """List the pairs where run_TE is set into `capacity` places, without reading the device.

    Args:
        run_TE: bool [T, E], the pairs to compute; at most `capacity` in all.
        fired_TE: bool [T, E], those of them that reach the output, 1..slots per token.
        capacity: P, host int.
        slots: K, host int.
    """
    tokens, experts = run_TE.shape
    device = run_TE.device
    run_ET = run_TE.t().reshape(-1)
    place_ET = run_ET.cumsum(0) - 1
    # Cells that do not run all go to one place past the end, which is cut off again.
    target = torch.where(run_ET, place_ET, capacity)
    cell_ET = (
        torch.arange(tokens, device=device) * experts
        + torch.arange(experts, device=device)[:, None]
    ).reshape(-1)
    cell_P = torch.full((capacity + 1,), tokens * experts, dtype=torch.int64, device=device)
    cell_P = cell_P.scatter_(0, target, cell_ET)[:capacity]
    token_P = torch.where(cell_P < tokens * experts, cell_P // experts, 0)
    rank_TE = torch.where(fired_TE, torch.arange(experts, device=device), experts)
    expert_TK = rank_TE.topk(min(slots, experts), dim=1, largest=False).values
    used_TK = expert_TK < experts
    expert_TK = torch.where(used_TK, expert_TK, expert_TK[:, :1])
    slot_TK = place_ET.view(experts, tokens).t().gather(1, expert_TK)
    return Pairs(token_P, cell_P, run_TE.sum(0).cumsum(0).to(torch.int32), slot_TK, used_TK)


def from_table(table_TE: Tensor, pairs: Pairs) -> Tensor:
    """Entries [P] of a [T, E] table at the pairs; zero at padding."""
    flat = F.pad(table_TE.reshape(-1), (0, 1))
    return flat.index_select(0, pairs.cell_P)


def to_table(values_P: Tensor, pairs: Pairs, tokens: int, experts: int) -> Tensor:
    """Table [T, E] with the values of the pairs, zero elsewhere; what padding holds is dropped."""
    flat = values_P.new_zeros(tokens * experts + 1)
    return flat.scatter_(0, pairs.cell_P, values_P)[:-1].view(tokens, experts)


def combine(rows_PW: Tensor, weight_TE: Tensor, weight_P: Tensor, pairs: Pairs) -> Tensor:
    """Weighted sum [T, W] of every token's rows, in a fixed order (no atomics).

    Args:
        rows_PW: one row per pair.
        weight_TE: the weights as a table, for the static form; zero on pairs that did not fire.
        weight_P: the same weights by pair.
        pairs: exact or static pairs.
    """
    order_X, bound_X = pairs.order_X, pairs.bound_X
    if order_X.dim() == 1:
        if not order_X.numel():
            return rows_PW.new_zeros(bound_X.shape[0], rows_PW.shape[1])
        weight = weight_P.to(rows_PW.dtype).index_select(0, order_X)
        return F.embedding_bag(order_X, rows_PW, bound_X, mode="sum", per_sample_weights=weight)
    tokens, slots = order_X.shape
    cell_TK = pairs.cell_P.index_select(0, order_X.reshape(-1))
    weight_TK = weight_TE.reshape(-1).index_select(0, cell_TK).view(tokens, slots)
    weight_TK = torch.where(bound_X, weight_TK, 0.0).to(rows_PW.dtype)
    rows_TKW = rows_PW.index_select(0, order_X.reshape(-1)).view(tokens, slots, -1)
    return torch.bmm(weight_TK[:, None], rows_TKW)[:, 0]
