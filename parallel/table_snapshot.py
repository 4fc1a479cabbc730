"""A table's rows as they were at one moment, read while training goes on.

Rows that no step has touched since they were made are zero: only their ids are written, so that the
checkpoint of a huge table is as large as what it has learnt. The others are read in order, chunk by
chunk, on the table's own thread, between its other work. A row that a step is about to change
before it was read is copied first, so what is read is the state of the moment at which the snapshot
was taken. Ids are sorted by frequency: the rows that change at every step are read first, and few
copies are ever held.

Shapes: N distinct rows of one call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from parallel.table_tiers import Fields, Tier, TierThread
from parallel.tensor_file import TensorSource, TensorSpec

CHUNK_BYTES = 16 * 2**20
"""Bytes read at a time: a few milliseconds during which a step's rows wait."""

COPIES_SHARE = 0.25
"""Copies of changed rows, relative to the rows themselves, above which a step waits for the
reader."""

COPIES_FLOOR = 64 * 2**20
"""Bytes of copies that are always allowed."""


class TableSnapshot:
    """Rows of one owner as of now; see the module's text.

    Everything but `wait_for_room` and `finish` runs on the tier's thread.
    """

    def __init__(self, tier: Tier, thread: TierThread, touched: Tensor, chunk_bytes: int) -> None:
        """Take the moment: work given to `thread` later does not count.

        Args:
            tier: where the rows are.
            thread: which works on the tier.
            touched: which local rows may be other than zero, bool.
            chunk_bytes: bytes to read at a time.
        """
        self._tier, self._thread = tier, thread
        self._rows_N = touched.nonzero()[:, 0]
        self._untouched_N = (~touched).nonzero()[:, 0]
        self.rows = self._rows_N.shape[0]
        row_bytes = 4 * tier.layout.columns
        self.chunk_rows = max(1, chunk_bytes // row_bytes)
        self._row_bytes = row_bytes
        self._most_copies = (
            max(COPIES_FLOOR, int(COPIES_SHARE * self.rows * row_bytes)) // row_bytes
        )
        self._next = 0
        # Rows that need no copy: those that have one, and those that are not saved.
        self._copied = ~touched
        self._copies: list[tuple[Tensor, Fields]] = []
        self._held = 0
        self._room = threading.Condition()
        self.finished = False

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """[start, stop) among the saved rows of every chunk; one empty chunk for no rows."""
        step = self.chunk_rows
        return [(at, min(at + step, self.rows)) for at in range(0, max(self.rows, 1), step)]

    def before_update(self, index_N: Tensor) -> None:
        """Copy those of the sorted rows that were not read yet, as a step will change them."""
        if self.finished:
            return
        late_N = index_N[index_N >= self._next]
        late_N = late_N[~self._copied[late_N]]
        if late_N.shape[0] == 0:
            return
        self._copied[late_N] = True
        copies = self._tier.peek(late_N)
        with self._room:
            # Nothing is kept for a reader that has left meanwhile.
            if not self.finished:
                self._copies.append((late_N, copies))
                self._held += late_N.shape[0]

    def read(self, start: int, stop: int) -> Fields:
        """Return copies of the next chunk's fields."""
        rows_N = self._rows_N[start:stop]
        views = self._tier.views()
        if views is not None:
            fields = {name: view.index_select(0, rows_N) for name, view in views.items()}
        else:
            fields = self._tier.peek(rows_N)
        end = int(rows_N[-1]) + 1 if stop > start else 0
        kept = []
        for index_N, copies in self._copies:
            low, high = torch.searchsorted(index_N, torch.tensor([self._next, end])).tolist()
            places = torch.searchsorted(rows_N, index_N[low:high])
            for name, field in fields.items():
                field[places] = copies[name][low:high]
            if high < index_N.shape[0]:
                kept.append((index_N, copies))
        self._next = end
        with self._room:
            self._copies = [] if self.finished else kept
            self._held = sum(index_N.shape[0] for index_N, _ in self._copies)
            self._room.notify_all()
        return fields

    def wait_for_room(self) -> None:
        """Wait, on the caller's thread, while too many copies are held."""
        with self._room:
            while not self.finished and self._held > self._most_copies:
                self._room.wait()

    def finish(self) -> None:
        """Hold nothing any more; nothing will be read."""
        with self._room:
            self.finished = True
            self._copies, self._held = [], 0
            self._room.notify_all()

    def source(self, first_id: int, id_step: int) -> TensorSource:
        """Return the rows as tensors of a file: "CHUNK/ids" int64 [n] and "CHUNK/FIELD" [n, width].

        Behind them come the ids of the rows that are zero, as "CHUNK/untouched".

        Args:
            first_id: id of local row 0.
            id_step: from one local row's id to the next.
        """
        specs: dict[str, TensorSpec] = {}
        for number, (start, stop) in enumerate(self.chunks):
            specs[f"{number:06d}/ids"] = TensorSpec(torch.int64, (stop - start,))
            for name, width in self._tier.layout.widths.items():
                specs[f"{number:06d}/{name}"] = TensorSpec(torch.float32, (stop - start, width))

        untouched = f"{len(self.chunks):06d}/untouched"
        specs[untouched] = TensorSpec(torch.int64, (self._untouched_N.shape[0],))

        def tensors() -> Iterator[Tensor]:
            for start, stop in self.chunks:
                fields = self._thread.submit(partial(self.read, start, stop), "snapshot").result()
                yield self._rows_N[start:stop] * id_step + first_id
                yield from (fields[name] for name in self._tier.layout.widths)
            yield self._untouched_N * id_step + first_id

        return TensorSource(specs, tensors, close=self.finish)
