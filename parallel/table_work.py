"""What a table's own thread does with its rows: read them for a batch, and step them.

Shapes: S slots of the tier, N rows of a batch, P rows that a step touched, L parts of w columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.rows_step import Clock, Fields, RowKernels, Rule, Transport, tick
from parallel.table_batch import Gate, Staged
from parallel.table_layout import RowLayout
from parallel.table_snapshot import TableSnapshot
from parallel.table_tiers import Tier


class RowWork:
    """Works on the rows of one tier; for the tier's thread only."""

    def __init__(self, tier: Tier, layout: RowLayout, kernels: RowKernels, parts: int) -> None:
        """Work with `kernels` on rows of so many parts."""
        self.tier, self.parts = tier, parts
        self._kernels = kernels
        fields, names = tier.fields, list(layout.widths)
        first, second = ("weight", names[1]) if len(names) == 2 else (names[1], names[2])
        self._fields = Fields(fields["weight"], fields[first], fields[second])

    def gather(
        self,
        staged: Staged,
        places_N: Tensor | None,
        gate: Gate | None,
        held_N: Tensor | None = None,
    ) -> None:
        """Read rows at `places_N` of a batch (None is all)."""
        rows_LNw = staged.rows_LNw
        wanted_N = staged.wanted_N if places_N is None else staged.wanted_N[places_N]
        for at in range(0, wanted_N.shape[0], self.tier.chunk_rows):
            part = slice(at, at + self.tier.chunk_rows)
            last = part.stop >= wanted_N.shape[0]
            slots_N = self.tier.slots(wanted_N[part], write=False, held_N=held_N)
            places = None if places_N is None else places_N[part]
            if places is None and not (part.start == 0 and last):
                stop = min(part.stop, wanted_N.shape[0])
                places = torch.arange(part.start, stop, device=wanted_N.device)
            self._kernels.gather(
                self._fields.weight_SW,
                slots_N,
                rows_LNw,
                places,
                gate.counter if last and gate is not None else None,
            )
        if gate is not None:
            gate.post(self.parts)

    def update(
        self,
        rule: Rule,
        rows_P: Tensor,
        part_of: Callable[[int], Tensor],
        ahead: Staged | None,
        snapshot: TableSnapshot | None,
    ) -> None:
        """Step rows part by part and write on what the batch ahead needs."""
        if snapshot is not None:
            snapshot.before_update(rows_P.sort().values)
        places_P: Tensor | None = None
        if ahead is not None:
            places_P = ahead.places_of(rows_P)
            written = torch.zeros_like(ahead.wanted_N, dtype=torch.bool)
            written[places_P[places_P >= 0]] = True
            left = ahead.deferred_N[~written[ahead.deferred_N]]
            ahead.deferred_N = ahead.deferred_N[:0]
            if left.shape[0]:
                self.gather(ahead, left, None)
        grads = [part_of(k) for k in range(self.parts)]
        for at in range(0, rows_P.shape[0], self.tier.chunk_rows):
            part = slice(at, at + self.tier.chunk_rows)
            last = part.stop >= rows_P.shape[0]
            slots = self.tier.slots(rows_P[part], write=True)
            clock = Clock(torch.empty(0), torch.empty(0))
            if "steps" in self.tier.fields:
                clock = tick(rule, self.tier.fields["steps"], slots)
            out, ready = None, None
            if ahead is not None and places_P is not None:
                out = Transport(ahead.rows_LNw, places_P[part])
                ready = ahead.gate.counter if last else None
            self._kernels.step(
                rule, slots, self._fields, clock, [grad[part] for grad in grads], out, ready
            )
        if ahead is not None:
            ahead.gate.post(self.parts)
