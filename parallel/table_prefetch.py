"""Rows read ahead of their batch, and how they stay exact.

Reads and updates of a tier run on one thread in the order they were given. What was read before an
update is read again, as far as the update touched it, right behind it on the same thread; a batch
read ahead is used only after that. So a fetch sees the rows as of the last step, always.

Shapes: N distinct rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from parallel.table_optim import GradientSum
from parallel.table_tiers import Tier, TierThread, read_weights


@dataclass
class _Batch:
    """Local rows (sorted), their values once `ready`, and the steps that ended since."""

    index_N: Tensor
    ready: Future[Any]
    values_NW: list[Tensor] = field(default_factory=list)
    age: int = 0


class ReadAhead:
    """Reads rows of a tier now or ahead of time."""

    def __init__(self, tier: Tier, thread: TierThread, dtype: torch.dtype, *, pinned: bool) -> None:
        """Read rows of `tier` on `thread` in the transport type `dtype`."""
        self._tier, self._thread, self._dtype, self._pinned = tier, thread, dtype, pinned
        self._batches: list[_Batch] = []

    def start(self, index_N: Tensor) -> None:
        """Begin to read sorted distinct rows; of earlier batches only the last is kept beside."""
        values: list[Tensor] = []
        ready = self._thread.submit(lambda: values.append(self._read(index_N)))
        self._batches = [*self._batches[-1:], _Batch(index_N, ready, values)]

    def take(self, index_N: Tensor) -> tuple[Tensor, int]:
        """Return the weights [N, W] of sorted distinct rows and how many had been read ahead."""
        self._thread.check()
        for batch in self._batches:
            if torch.equal(batch.index_N, index_N):
                batch.ready.result()
                # The caller owns the values now: no later step may write into them.
                self._batches.remove(batch)
                return batch.values_NW[0], index_N.shape[0]
        missing = torch.ones(index_N.shape[0], dtype=torch.bool, device=index_N.device)
        found: list[tuple[_Batch, Tensor, Tensor]] = []
        for batch in self._batches:
            here, there = _matches(index_N, batch.index_N)
            fresh = missing[here]
            here, there = here[fresh], there[fresh]
            if here.shape[0]:
                missing[here] = False
                found.append((batch, here, there))
        absent = missing.nonzero()[:, 0]
        read = self._thread.submit(lambda: self._read(index_N[absent]))
        if not found:
            return read.result(), 0
        read_NW = read.result()
        out_NW = torch.empty(
            (index_N.shape[0], read_NW.shape[1]),
            dtype=self._dtype,
            device=index_N.device,
            pin_memory=self._pinned,
        )
        for batch, here, there in found:
            batch.ready.result()
            out_NW.index_copy_(0, here, batch.values_NW[0].index_select(0, there))
        return out_NW.index_copy_(0, absent, read_NW), index_N.shape[0] - absent.shape[0]

    def refresher(self, total: GradientSum) -> Callable[[], None]:
        """Return the work that reads again what a step over `total`'s rows has changed.

        To be run on the tier's thread behind the update.
        """
        # Chosen now, on the caller's thread: batches of the step that ends are not needed again.
        batches = tuple(batch for batch in self._batches if batch.age == 0)

        def work() -> None:
            for batch in batches:
                there, _ = _matches(batch.index_N, total.index_N)
                batch.values_NW[0].index_copy_(0, there, self._read(batch.index_N[there]))

        return work

    def wait_for(self, update: Future[Any]) -> None:
        """Use no batch before `update`, which holds the work of `refresher`, is done."""
        for batch in self._batches:
            batch.ready = update

    def end_step(self) -> None:
        """Let go what was read ahead for the step that ends."""
        for batch in self._batches:
            batch.age += 1
        self._batches = [batch for batch in self._batches if batch.age < 2]

    def clear(self) -> None:
        """Forget everything read ahead."""
        self._batches = []

    def _read(self, index_N: Tensor) -> Tensor:
        return read_weights(self._tier, index_N, self._dtype, pinned=self._pinned)


def _matches(a_N: Tensor, b_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions in `a_N` and in the sorted `b_N` of what both hold."""
    if b_N.shape[0] == 0:
        empty = a_N.new_empty(0)
        return empty, empty
    place_N = torch.searchsorted(b_N, a_N).clamp_(max=b_N.shape[0] - 1)
    here = (b_N[place_N] == a_N).nonzero()[:, 0]
    return here, place_N[here]
