"""A step's gradient of the touched rows, part by part as the backward pass delivers it.

The parts of a row (its layers) are complete one after another, the last layer's first. They go to
their owners and on to the owner's memory on a stream of its own, while the backward goes on. Every
call of CUDA's is Python in the backward's thread: parts that lie side by side in the rows' own
memory (`kernels.modulate` writes them there) are copied a few at a time, and normed at the end.
A step of one micro-batch keeps what arrives as it is; with more, the host adds them up in fp32 in
their order, a part at a time, behind the copies.

Shapes: U unique ids of this rank, N rows asked of this one, P rows touched in the step, L parts of
w columns each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.rows_step import RowKernels
from parallel.table_exchange import Exchange, Plan
from parallel.table_layout import TableError
from parallel.table_tiers import TierThread

TOGETHER = 4
"""Parts that are copied at a time."""


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
        self._norms: list[Tensor | None] = [None] * self.count
        self._copied: list[Any] = [None] * self.count
        self._normed: Any | None = None
        self._pinned: Tensor | None = None
        self._memory: Tensor | None = None
        self._waiting: list[int] = []

    @property
    def missing(self) -> list[int]:
        """Parts that have not come, the last layer first."""
        return [k for k in reversed(range(self.count)) if self.parts[k] is None]

    def put(self, k: int, grad_Uw: Tensor, memory: Tensor | None = None) -> None:
        """Send part `k` to its owners; a collective call.

        Args:
            k: which part; each comes once.
            grad_Uw: its gradient.
            memory: [L, U, w], of which `grad_Uw` may be part k; then it must stay as it is until
                `finish`.

        Raises:
            TableError: the part came before.
        """
        if self.parts[k] is not None:
            raise TableError(
                f"table {self._exchange.name!r}: a second gradient of part {k} of one micro-batch; "
                "use each layer's rows once, or gather from Rows.whole()"
            )
        alone = self.plan.asked is None
        if memory is not None and alone and grad_Uw.data_ptr() == memory[k].data_ptr():
            self._memory = memory
            if self._stream is None:
                self.parts[k] = grad_Uw
                self._sent(k)
                return
            self.parts[k] = self._host(grad_Uw)[k]
            self._waiting.append(k)
            if len(self._waiting) == TOGETHER:
                self._send()
            return
        if self._stream is None:
            grad_Nw = self._exchange.collect(self.plan, grad_Uw)
            self._norms[k], self.parts[k] = _norm(grad_Nw), grad_Nw
            self._sent(k)
            return
        self._stream.wait_stream(torch.cuda.current_stream(grad_Uw.device))
        with torch.cuda.stream(self._stream):
            grad_Nw = self._exchange.collect(self.plan, grad_Uw)
            self._norms[k] = _norm(grad_Nw)
            self._normed = self._stream.record_event()
            part = self.parts[k] = self._host(grad_Nw)[k]
            part.copy_(grad_Nw, non_blocking=True)
            self._copied[k] = self._stream.record_event()
        grad_Uw.record_stream(self._stream)
        self._sent(k)

    def finish(self) -> None:
        """Send what waits for company, and norm what was left in its memory."""
        if self._waiting:
            self._send()
        memory, self._memory = self._memory, None
        if memory is None:
            return
        if self._stream is None:
            self._norm_together(memory)
            return
        with torch.cuda.stream(self._stream):
            self._norm_together(memory)
            self._normed = self._stream.record_event()

    def _sent(self, k: int) -> None:
        assert self.sent is not None
        self.sent(k)

    def _norm_together(self, memory: Tensor) -> None:
        left = [
            k for k in range(self.count) if self._norms[k] is None and self.parts[k] is not None
        ]
        if len(left) == self.count and memory.is_cuda:
            self._norms[0] = _norm(memory)
            return
        for k in left:
            self._norms[k] = _norm(memory[k])

    def _send(self) -> None:
        """Copy the parts that wait, neighbours in one go."""
        assert self._stream is not None and self._memory is not None and self._pinned is not None
        sent, self._waiting = self._waiting, []
        low, high = min(sent), max(sent) + 1
        runs = [slice(low, high)] if high - low == len(sent) else [slice(k, k + 1) for k in sent]
        self._stream.wait_stream(torch.cuda.current_stream(self._memory.device))
        with torch.cuda.stream(self._stream):
            for run in runs:
                self._pinned[run].copy_(self._memory[run], non_blocking=True)
            event = self._stream.record_event()
        for k in sent:
            self._copied[k] = event
            self._sent(k)

    def _host(self, grad_Nw: Tensor) -> Tensor:
        """Return pinned memory for all parts, the same at every call."""
        if self._pinned is None:
            shape = (self.count, *grad_Nw.shape)
            self._pinned = torch.empty(shape, dtype=grad_Nw.dtype, pin_memory=True)
        return self._pinned

    def wait(self, k: int) -> Tensor:
        """Return part `k`, [N, w], once it is in the owner's memory."""
        if self._copied[k] is not None:
            self._copied[k].synchronize()
        part = self.parts[k]
        assert part is not None
        return part

    def squared_norm(self) -> Tensor:
        """Return the sum of squares, fp64 0-dim where the gradient was."""
        norms = [norm for norm in self._norms if norm is not None]
        if self._normed is not None:
            torch.cuda.current_stream(norms[0].device).wait_event(self._normed)
        return torch.stack(norms).double().square().sum()


def _norm(grad_Nw: Tensor) -> Tensor:
    """Return the norm, 0-dim; on a CPU by row and then in fp64, whatever the threads."""
    if grad_Nw.is_cuda:
        norm: Tensor = torch.linalg.vector_norm(grad_Nw, dtype=torch.float32)
        return norm
    by_row: Tensor = torch.linalg.vector_norm(grad_Nw, dim=1, dtype=torch.float32)
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
        self._place_of_row = torch.full((local_rows,), -1, dtype=torch.int64, device=device)
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
        places_N, fresh_N = self._places(batch.plan.wanted_N.to(self._device))
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

        The latter is for the tier's thread, behind everything submitted so far.
        """
        assert self._first is not None
        self._finish()
        if not self._folded:
            return self._first.plan.wanted_N.to(self._device), self._first.wait
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
        places_N, fresh_N = self._places(first.plan.wanted_N.to(self._device))
        for k in reversed(range(self._count)):
            self._add(first, k, places_N, fresh_N)

    def _places(self, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
        places_N = self._place_of_row[wanted_N]
        fresh_N = places_N < 0
        fresh_rows = wanted_N[fresh_N]
        end = self._used + fresh_rows.shape[0]
        new = torch.arange(self._used, end, device=self._device)
        places_N[fresh_N] = new
        self._place_of_row[fresh_rows] = new
        self._rows.append(fresh_rows)
        self._used = end
        self._thread.submit(lambda: self._reserve(end))
        return places_N, fresh_N

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
