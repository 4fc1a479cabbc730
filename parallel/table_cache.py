"""Which rows are in which slots of a cache, and which leave when others come: a clock with counts.

Ids follow Zipf: a row used often must survive many that are used once. Every slot counts its recent
uses up to a small bound; a hand goes round, takes slots whose count is 0 and lowers the others. All
of it is vectorised over the slots that the hand passes, so the cost grows with the evictions, not
with the cache.

Shapes: N rows or slots of one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_USES = 3
PINNED = 127
"""Count of a slot that the hand leaves alone for now."""
SPAN = 4096
"""Least number of slots that the hand looks at in one go."""


class SlotCache:
    """Bookkeeping only: the caller keeps the contents of the slots."""

    def __init__(self, rows: int, slots: int) -> None:
        """Map `rows` rows to `slots` slots, all empty."""
        self.size = slots
        self._slot_of = torch.full((rows,), -1, dtype=torch.int32)
        self._row_in = torch.full((slots,), -1, dtype=torch.int64)
        self._uses = torch.zeros(slots, dtype=torch.int8)
        self._dirty = torch.zeros(slots, dtype=torch.bool)
        self._hand = 0

    def find(self, index_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slots int64 [N] of rows, and which rows are absent, bool [N] (slot -1)."""
        slots_N = self._slot_of[index_N].long()
        return slots_N, slots_N < 0

    def evict(self, count: int, keep_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Empty `count` slots, none of them in `keep_N`; needs count + len(keep) <= size.

        Returns:
            (slots int64, the rows that were in them or -1, whether those must be written), each
            [count].
        """
        if count + keep_N.shape[0] > self.size:
            raise ValueError(
                f"{count + keep_N.shape[0]} rows at once do not fit a cache of {self.size}"
            )
        kept_uses = self._uses[keep_N]
        self._uses[keep_N] = PINNED
        taken = torch.empty(0, dtype=torch.int64)
        while taken.shape[0] < count:
            want = count - taken.shape[0]
            passed = torch.arange(self._hand, self._hand + min(self.size, max(SPAN, 2 * want)))
            passed %= self.size
            victims = (self._uses[passed] == 0).nonzero()[:want, 0]
            if victims.shape[0] == want:
                # The hand stops behind the last slot it takes.
                passed = passed[: int(victims[-1]) + 1]
            chosen, uses = passed[victims], self._uses[passed]
            self._uses[passed] = torch.where(uses < PINNED, (uses - 1).clamp_(min=0), uses)
            self._uses[chosen] = PINNED
            taken = torch.cat((taken, chosen))
            self._hand = (int(passed[-1]) + 1) % self.size
        self._uses[taken] = 0
        self._uses[keep_N] = kept_uses
        rows = self._row_in[taken]
        dirty = self._dirty[taken]
        self._slot_of[rows[rows >= 0]] = -1
        self._row_in[taken] = -1
        self._dirty[taken] = False
        return taken, rows, dirty

    def put(self, index_N: Tensor, slots_N: Tensor) -> None:
        """Note that rows are now in these slots, which `evict` emptied."""
        self._row_in[slots_N] = index_N
        self._slot_of[index_N] = slots_N.int()

    def touch(self, slots_N: Tensor, *, write: bool) -> None:
        """Count a use of slots; with `write` their contents must be written when they leave."""
        self._uses[slots_N] = (self._uses[slots_N] + 1).clamp_(max=MOST_USES)
        if write:
            self._dirty[slots_N] = True
