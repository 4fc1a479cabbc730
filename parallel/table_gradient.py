"""A step's gradient of the touched rows, part by part as the backward pass delivers it.

The parts of a row (its layers) are complete one after another, the last layer's first. They go to
their owners and on to the owner's memory on a stream of its own, while the backward goes on. Every
call of CUDA's is Python in the backward's thread: gradients that lie in the place of the rows
(`kernels.modulate` writes them there) travel a few parts at a time. A step of one micro-batch keeps
what arrives as it is; with more, the host adds them up in fp32 in their order, a part at a time,
behind the copies.

Shapes: U unique ids of this rank, N rows asked of this one, P rows touched in the step, L parts of
w columns each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.rows_step import RowKernels
from kernels.transfer import to_device
from parallel.table_batch import TOGETHER, RowMemory
from parallel.table_exchange import Exchange, Plan
from parallel.table_layout import TableError
from parallel.table_tiers import TierThread


class BatchGradient:
    """What arrives of one micro-batch's gradient at the owner of its rows.

    Attributes:
        plan: of the micro-batch.
        parts: per layer the gradients [N, w] of `plan.wanted_N` in the owner's memory, once there.
        sent: called with each part that is on its way there; None until the step has begun it.
    """

    sent: Callable[[int], None] | None = None

    def __init__(
        self, exchange: Exchange, plan: Plan, shape: tuple[int, int], stream: Any | None
    ) -> None:
        """Expect a gradient of (L, w).

        Args:
            exchange: of the table.
            plan: of the micro-batch.
            shape: L and w.
            stream: CUDA stream of the copies; None where owner and gradient share a memory.
        """
        self.plan, self._exchange, self._stream = plan, exchange, stream
        self.count, self.width = shape
        self.parts: list[Tensor | None] = [None] * self.count
        self._came: set[int] = set()
        self._norms: list[Tensor] = []
        self._copied: list[Any] = [None] * self.count
        self._normed: Any | None = None
        self._pinned_LNw: Tensor | None = None
        self._memory: RowMemory | None = None
        self._waiting: list[int] = []
        self._in_memory: list[int] = []

    @property
    def missing(self) -> list[int]:
        """Parts that have not come, the last layer first."""
        return [k for k in reversed(range(self.count)) if k not in self._came]

    def put(self, k: int, grad_Uw: Tensor, memory: RowMemory) -> None:
        """Send part `k` to its owners; a collective call.

        Args:
            k: which part; each comes once.
            grad_Uw: its gradient.
            memory: where the rows are. A gradient that lies in their place must stay there until
                `finish`; it waits for its neighbours, so that they travel together.

        Raises:
            TableError: the part came before.
        """
        if k in self._came:
            raise TableError(
                f"table {self._exchange.name!r}: a second gradient of part {k} of one micro-batch; "
                "use each layer's rows once, or gather from Rows.whole()"
            )
        self._came.add(k)
        if grad_Uw.data_ptr() != memory.part(k).data_ptr():
            self._move([k], grad_Uw[:, None])
            if self._stream is not None:
                grad_Uw.record_stream(self._stream)
            return
        self._memory = memory
        self._waiting.append(k)
        first = k // TOGETHER * TOGETHER
        group = range(first, min(first + TOGETHER, self.count))
        if all(i in self._waiting for i in group):
            self._send(list(group))

    def finish(self) -> None:
        """Send what waits for neighbours, and norm what was left in its place."""
        for k in sorted(self._waiting, reverse=True):
            self._send([k])
        memory, self._memory = self._memory, None
        if memory is None or memory.whole_LUw is None:
            return
        if self._stream is None:
            self._norm_in_place(memory.whole_LUw)
            return
        with torch.cuda.stream(self._stream):
            self._norm_in_place(memory.whole_LUw)
            self._normed = self._stream.record_event()

    def _send(self, group: list[int]) -> None:
        """Send neighbours that lie in the rows' place: all of a group, or a single part."""
        memory = self._memory
        assert memory is not None
        self._waiting = [k for k in self._waiting if k not in group]
        if memory.whole_LUw is None:
            whole = len(group) > 1
            rows_UGw = memory.groups_UGw[group[0] // TOGETHER] if whole else None
            self._move(group, memory.part(group[0])[:, None] if rows_UGw is None else rows_UGw)
            return
        self._in_memory += group
        parts_GUw = memory.whole_LUw[group[0] : group[-1] + 1]
        if self._stream is None:
            for k, part in zip(group, parts_GUw, strict=True):
                self.parts[k] = part
        else:
            if self._pinned_LNw is None:
                self._pinned_LNw = torch.empty(
                    memory.whole_LUw.shape, dtype=parts_GUw.dtype, pin_memory=True
                )
            self._stream.wait_stream(torch.cuda.current_stream(parts_GUw.device))
            with torch.cuda.stream(self._stream):
                pinned_GUw = self._pinned_LNw[group[0] : group[-1] + 1]
                pinned_GUw.copy_(parts_GUw, non_blocking=True)
                event = self._stream.record_event()
            for k, part in zip(group, pinned_GUw, strict=True):
                self.parts[k], self._copied[k] = part, event
        self._tell(group)

    def _move(self, group: list[int], grad_UGw: Tensor) -> None:
        """Bring parts to their owners, and from there to the owner's memory; a collective call."""
        if self._stream is None:
            grad_NGw = self._exchange.collect(self.plan, grad_UGw)
            self._norms.append(_norm(grad_NGw))
            for i, k in enumerate(group):
                self.parts[k] = grad_NGw[:, i]
        else:
            self._stream.wait_stream(torch.cuda.current_stream(grad_UGw.device))
            with torch.cuda.stream(self._stream):
                grad_NGw = self._exchange.collect(self.plan, grad_UGw)
                self._norms.append(_norm(grad_NGw))
                self._normed = self._stream.record_event()
                pinned_NGw = torch.empty(grad_NGw.shape, dtype=grad_NGw.dtype, pin_memory=True)
                pinned_NGw.copy_(grad_NGw, non_blocking=True)
                event = self._stream.record_event()
            for i, k in enumerate(group):
                self.parts[k], self._copied[k] = pinned_NGw[:, i], event
        self._tell(group)

    def _tell(self, group: list[int]) -> None:
        assert self.sent is not None
        for k in reversed(group):
            self.sent(k)

    def _norm_in_place(self, whole_LUw: Tensor) -> None:
        if len(self._in_memory) == self.count and whole_LUw.is_cuda:
            self._norms.append(_norm(whole_LUw))
        else:
            self._norms += [_norm(whole_LUw[k][:, None]) for k in sorted(self._in_memory)]
        self._in_memory = []

    def wait(self, k: int) -> Tensor:
        """Return part `k`, [N, w], once it is in the owner's memory."""
        if self._copied[k] is not None:
            self._copied[k].synchronize()
        part = self.parts[k]
        assert part is not None
        return part

    def squared_norm(self) -> Tensor:
        """Return the sum of squares, fp64 0-dim where the gradient was."""
        if self._normed is not None:
            torch.cuda.current_stream(self._norms[0].device).wait_event(self._normed)
        return torch.stack(self._norms).double().square().sum()


def _norm(grad_NGw: Tensor) -> Tensor:
    """Return the norm, 0-dim; on a CPU by row and then in fp64, whatever the threads."""
    if grad_NGw.is_cuda:
        norm: Tensor = torch.linalg.vector_norm(grad_NGw, dtype=torch.float32)
        return norm
    by_row: Tensor = torch.linalg.vector_norm(grad_NGw, dim=-1, dtype=torch.float32)
    return by_row.double().square().sum().sqrt()


def _nothing(k: int) -> None:
    """Leave a part where it is: the step has no other."""


class StepGradient:
    """Gradients of all rows that a step touches, over its micro-batches.

    Attributes:
        batches: micro-batches begun.
    """

    def __init__(
        self,
        local_rows: int,
        shape: tuple[int, int],
        device: torch.device,
        compute: torch.device,
        thread: TierThread,
        kernels: RowKernels,
    ) -> None:
        """Sum over rows 0 … `local_rows` of (L, w) columns in `device`'s memory, for `compute`."""
        self.batches = 0
        self._count, self._width = shape
        self._thread, self._kernels = thread, kernels
        self._device, self._mesh_device = device, compute
        self._first: BatchGradient | None = None
        self._begun: list[BatchGradient] = []
        self._folded = False
        # On the host, as plans are: to ask a GPU which rows are new would be to wait for it.
        self._place_of_row = torch.full((local_rows,), -1, dtype=torch.int64)
        self._rows: list[Tensor] = []
        self._used = 0
        # Owned by the tier's thread; kept from step to step, as fresh memory costs page faults.
        self._total_LPw = torch.empty(self._count, 0, self._width, device=device)
        self._squares_LP = torch.empty(self._count, 0, device=device)

    @property
    def touched(self) -> int:
        """Rows of this rank that the step touches so far."""
        assert self._first is not None
        return self._used if self._folded else self._first.plan.wanted_N.shape[0]

    def begin(self, batch: BatchGradient) -> None:
        """Take a micro-batch in, before its first part comes."""
        self.batches += 1
        self._begun.append(batch)
        if self.batches == 1:
            self._first = batch
            batch.sent = _nothing
            return
        if not self._folded:
            self._fold()
        places_N, fresh_N = self._places(batch.plan.wanted_N)
        batch.sent = lambda k: self._add(batch, k, places_N, fresh_N)

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of this rank's rows, fp64 0-dim."""
        assert self._first is not None
        self._finish()
        if not self._folded:
            return self._first.squared_norm()
        used = self._used
        squares = self._thread.submit(lambda: self._squares_LP[:, :used].double().sum())
        return squares.result().to(self._mesh_device)

    def rows(self) -> tuple[Tensor, Callable[[int], Tensor]]:
        """Return the touched local rows [P], and what gives part k of their gradients [P, w].

        The rows are on the host. The latter is for the tier's thread, behind everything submitted
        so far.
        """
        assert self._first is not None
        self._finish()
        if not self._folded:
            return self._first.plan.wanted_N, self._first.wait
        used = self._used
        return torch.cat(self._rows), lambda k: self._total_LPw[k, :used]

    def clear(self) -> None:
        """Forget the step's gradient."""
        for rows in self._rows:
            self._place_of_row[rows] = -1
        self._rows, self._used, self.batches = [], 0, 0
        self._first, self._folded = None, False
        self._begun.clear()

    def _finish(self) -> None:
        for batch in self._begun:
            batch.finish()

    def _fold(self) -> None:
        first = self._first
        assert first is not None
        first.finish()
        self._folded = True
        places_N, fresh_N = self._places(first.plan.wanted_N)
        for k in reversed(range(self._count)):
            self._add(first, k, places_N, fresh_N)

    def _places(self, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return where rows' sums are and which rows are new, [N] in the memory of the sums."""
        places_N = self._place_of_row[wanted_N]
        fresh_N = places_N < 0
        fresh_rows = wanted_N[fresh_N]
        end = self._used + fresh_rows.shape[0]
        new = torch.arange(self._used, end)
        places_N[fresh_N] = new
        self._place_of_row[fresh_rows] = new
        self._rows.append(fresh_rows)
        self._used = end
        self._thread.submit(lambda: self._reserve(end))
        return to_device(places_N, self._device), to_device(fresh_N, self._device)

    def _add(self, batch: BatchGradient, k: int, places_N: Tensor, fresh_N: Tensor) -> None:
        def work() -> None:
            part = batch.wait(k)
            self._kernels.add(self._total_LPw[k], places_N, fresh_N, part, self._squares_LP[k])

        self._thread.submit(work, "add")

    def _reserve(self, rows: int) -> None:
        before = self._total_LPw.shape[1]
        if rows <= before:
            return
        room = max(rows, before + before // 2)
        total = self._total_LPw.new_empty(self._count, room, self._width)
        squares = self._squares_LP.new_empty(self._count, room)
        total[:, :before] = self._total_LPw
        squares[:, :before] = self._squares_LP
        self._total_LPw, self._squares_LP = total, squares
