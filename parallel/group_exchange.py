"""GQA-group sequence parallelism: sequence shards become whole KV groups, and come back.

A group of P neighbouring ranks shares every packed sequence. Each rank holds the tokens
[T·r // P, T·(r+1) // P) for everything but attention. For attention the ranks trade tokens for
heads, so that a KV group stays together with all its query heads on one rank: compression,
importance and selection then need no communication at all.

P divides G: every rank gets G / P whole groups for all T tokens.

P = G·m: the tokens are cut into m chunks. The G ranks whose shards make up a chunk (a row) deal its
heads out among each other, a group to each; the m ranks that hold the same group (a column) then
give each other its keys and values. A rank attends with all query heads of its group, for the
queries of its chunk, to the whole sequence; NSA's Triton kernels also work through the part of the
chunk's first document that lies in front of it (`nsa_attention_part`), so that for one long
document m saves them nothing.

Every exchange is one collective of uneven counts, so that T need not divide by P, and is its own
gradient's reverse. Gradients of keys and values that a column shares are added in fp32, in rank
order.

Shapes: T tokens of the sequence, t those of this rank, n those of this rank's row (T when P divides
G), R ranks of a row, m rows, W numbers that a token sends to one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh


def working_degrees(groups: int, world: int) -> list[int]:
    """Return the group sizes that `groups` KV groups allow among `world` ranks, ascending."""
    return [p for p in range(1, world + 1) if world % p == 0 and not (groups % p and p % groups)]


def require_degree(group: int, groups: int, world: int, local_world: int) -> None:
    """Refuse a group size that would split a KV group's heads, the world or a machine unevenly.

    Args:
        group: P, ranks that share a sequence.
        groups: G of the attention.
        world: ranks of the job.
        local_world: ranks of one machine.

    Raises:
        ValueError: with the reason and the sizes that work here.
    """
    fitting = [
        p for p in working_degrees(groups, world) if not (p % local_world and local_world % p)
    ]
    remedy = f"mesh.group can be {', '.join(map(str, fitting))} here"
    if group < 1:
        raise ValueError(f"mesh.group is {group}; {remedy}")
    if groups % group and group % groups:
        raise ValueError(
            f"mesh.group {group} neither divides the {groups} KV groups of the attention "
            "(attention.groups) nor is a multiple of them: a KV group would be split between "
            "ranks, and each would select blocks by the importance of some of its heads only; "
            f"{remedy}"
        )
    if world % group:
        raise ValueError(f"mesh.group {group} does not divide the {world} ranks; {remedy}")
    if group % local_world and local_world % group:
        raise ValueError(
            f"mesh.group {group} and the {local_world} ranks of a machine do not divide each "
            f"other: some groups would lie across two machines for no reason; {remedy}"
        )


def shard_edges(total: int, parts: int) -> list[int]:
    """Return where each of `parts` shards of `total` tokens begins, and `total` at the end."""
    return [total * part // parts for part in range(parts + 1)]


@dataclass(frozen=True)
class Share:
    """Who holds which tokens of a sequence, seen from one rank.

    Attributes:
        total: T.
        first: first token of this rank's shard.
        stop: one past its last.
        row_counts: tokens of each rank of this rank's row, sum n.
        row_first: first token of the row.
        column_counts: tokens of each row, sum T.
    """

    total: int
    first: int
    stop: int
    row_counts: list[int]
    row_first: int
    column_counts: list[int]

    @property
    def row_total(self) -> int:
        """Tokens whose queries this rank attends with, n."""
        return sum(self.row_counts)


class GroupExchange:
    """The collectives of this rank's group.

    Attributes:
        degree: P.
        rank: this rank in its group.
        row: R, ranks among which heads are dealt out: min(P, G).
        column: m, ranks that hold the same KV groups: P / R.
    """

    def __init__(self, mesh: Mesh, groups: int) -> None:
        """Make the process groups; on all ranks together.

        Args:
            mesh: this rank's place; `mesh.group` is P.
            groups: G.

        Raises:
            ValueError: P does not fit G, the world or the machines.
        """
        require_degree(mesh.group, groups, mesh.world, mesh.local_world)
        self.degree, self.rank = mesh.group, mesh.group_rank
        self.row = min(mesh.group, groups)
        self.column = mesh.group // self.row
        base = mesh.rank - mesh.group_rank
        row_base = base + self.rank // self.row * self.row
        column_base = base + self.rank % self.row
        self._row_group = _new_group(range(row_base, row_base + self.row))
        stop = column_base + self.column * self.row
        self._column_group = _new_group(range(column_base, stop, self.row))
        self._share = Share(0, 0, 0, [], 0, [])

    def share(self, total: int) -> Share:
        """Return who holds which of `total` tokens."""
        if self._share.total != total:
            edges = shard_edges(total, self.degree)
            counts = [b - a for a, b in pairwise(edges)]
            row = self.rank // self.row
            rows = edges[:: self.row]
            self._share = Share(
                total,
                edges[self.rank],
                edges[self.rank + 1],
                counts[row * self.row : (row + 1) * self.row],
                rows[row],
                [b - a for a, b in pairwise(rows)],
            )
        return self._share

    def to_heads(self, share: Share, *parts_tRx: Tensor) -> tuple[Tensor, ...]:
        """Trade tokens for heads; a differentiable collective call.

        Args:
            share: of the sequence.
            parts_tRx: tensors [t, R, ...] of one type; index i of the second dimension goes to rank
                i of the row.

        Returns:
            For each part this rank's index of all tokens of the row, [n, ...], contiguous.
        """
        out: tuple[Tensor, ...] = _ToHeads.apply(self, share, *parts_tRx)  # type: ignore[no-untyped-call]
        return out

    def to_tokens(self, share: Share, *parts_nx: Tensor) -> tuple[Tensor, ...]:
        """Trade heads for tokens, the reverse of `to_heads`; a differentiable collective call.

        Args:
            share: of the sequence.
            parts_nx: tensors [n, ...] of one type.

        Returns:
            For each part [t, R, ...]: this rank's tokens, of every rank of the row.
        """
        out: tuple[Tensor, ...] = _ToTokens.apply(self, share, *parts_nx)  # type: ignore[no-untyped-call]
        return out

    def gather_rows(self, share: Share, *parts_nx: Tensor) -> tuple[Tensor, ...]:
        """Give every rank of the column the tokens of all rows; a differentiable collective call.

        Args:
            share: of the sequence.
            parts_nx: keys, values … [n, ...] of one type.

        Returns:
            For each part [T, ...], contiguous.
        """
        if self.column == 1:
            return parts_nx
        out: tuple[Tensor, ...] = _GatherRows.apply(self, share, *parts_nx)  # type: ignore[no-untyped-call]
        return out

    def _deal(self, share: Share, parts_tRx: Sequence[Tensor]) -> tuple[Tensor, ...]:
        t, R = parts_tRx[0].shape[:2]
        shapes = [x.shape[2:] for x in parts_tRx]
        widths = [prod(shape) for shape in shapes]
        send_RtW = parts_tRx[0].new_empty(R, t, sum(widths))
        for x_tRx, target_RtW in zip(parts_tRx, torch.split(send_RtW, widths, dim=2), strict=True):
            _shaped(target_RtW, x_tRx.shape[2:]).copy_(x_tRx.transpose(0, 1))
        received_nW = send_RtW.new_empty(share.row_total, sum(widths))
        self._row_exchange(received_nW, send_RtW.flatten(0, 1), share.row_counts, [t] * R)
        return tuple(
            _shaped(x_nW, shape).contiguous()
            for x_nW, shape in zip(torch.split(received_nW, widths, dim=1), shapes, strict=True)
        )

    def _collect(self, share: Share, parts_nx: Sequence[Tensor]) -> tuple[Tensor, ...]:
        R, t = self.row, share.stop - share.first
        shapes = [x.shape[1:] for x in parts_nx]
        widths = [prod(shape) for shape in shapes]
        send_nW = _side_by_side(parts_nx)
        received_RtW = send_nW.new_empty(R, t, sum(widths))
        self._row_exchange(received_RtW.flatten(0, 1), send_nW, [t] * R, share.row_counts)
        return tuple(
            _shaped(x_RtW, shape).transpose(0, 1).contiguous()
            for x_RtW, shape in zip(torch.split(received_RtW, widths, dim=2), shapes, strict=True)
        )

    def _row_exchange(
        self, output: Tensor, given: Tensor, out_counts: list[int], in_counts: list[int]
    ) -> None:
        dist.all_to_all_single(output, given, out_counts, in_counts, group=self._row_group)

    def _spread(self, share: Share, parts_nx: Sequence[Tensor]) -> tuple[Tensor, ...]:
        shapes = [x.shape[1:] for x in parts_nx]
        widths = [prod(shape) for shape in shapes]
        own_nW = _side_by_side(parts_nx)
        all_TW = own_nW.new_empty(share.total, own_nW.shape[1])
        send = own_nW.repeat(self.column, 1)
        counts = [own_nW.shape[0]] * self.column
        dist.all_to_all_single(all_TW, send, share.column_counts, counts, group=self._column_group)
        return tuple(
            _shaped(x_TW, shape).contiguous()
            for x_TW, shape in zip(torch.split(all_TW, widths, dim=1), shapes, strict=True)
        )

    def _add_rows(self, share: Share, grads_Tx: Sequence[Tensor]) -> tuple[Tensor, ...]:
        shapes = [x.shape[1:] for x in grads_Tx]
        widths = [prod(shape) for shape in shapes]
        send_TW = _side_by_side(grads_Tx)
        n = share.row_total
        received_mnW = send_TW.new_empty(self.column, n, sum(widths))
        dist.all_to_all_single(
            received_mnW.flatten(0, 1), send_TW, [n] * self.column, share.column_counts,
            group=self._column_group,
        )  # fmt: skip
        wide = torch.promote_types(send_TW.dtype, torch.float32)
        sum_nW = received_mnW.sum(0, dtype=wide).to(send_TW.dtype)
        return tuple(
            _shaped(x_nW, shape)
            for x_nW, shape in zip(torch.split(sum_nW, widths, dim=1), shapes, strict=True)
        )


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: GroupExchange, share: Share, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.share = exchange, share
        return exchange._deal(share, parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.exchange._collect(ctx.share, grads))


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: GroupExchange, share: Share, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.share = exchange, share
        return exchange._collect(share, parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.exchange._deal(ctx.share, grads))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, exchange: GroupExchange, share: Share, *parts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.share = exchange, share
        return exchange._spread(share, parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.exchange._add_rows(ctx.share, grads))


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Put tensors [n, ...] next to each other, [n, W]; a single contiguous one is not copied."""
    flat = [x.flatten(1) for x in parts]
    return flat[0].contiguous() if len(flat) == 1 else torch.cat(flat, dim=1)


def _shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """View the last dimension as `shape`."""
    return x.view(*x.shape[:-1], *shape)


def _new_group(ranks: Sequence[int]) -> Any:
    # Only the members meet: with thousands of groups a call of everyone for each would take long.
    return dist.new_group(list(ranks), use_local_synchronization=True)
