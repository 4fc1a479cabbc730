"""The rows of one micro-batch on their way from the owner's memory to the model, part by part.

The owner's thread fills a `Staged` batch in transport type; behind an update it does so layer by
layer. `Parts` hands the layers to the model in turn: what is ready is copied to the device on a
stream of its own, and the block that uses a layer waits for just that.

Shapes: U unique ids of this rank, N rows asked of this one, L parts (layers) of w columns each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from kernels.rows import RowIndex
from kernels.rows_step import Counter
from parallel.table_exchange import Exchange, Plan

LOOK_SECONDS = 5e-5
"""How often a caller that waits for rows looks."""


class Gate:
    """Counts the parts that are ready, in order, for one waiting thread.

    It looks at a counter rather than being woken: kernels count without Python, and a thread that
    waits for rows has nothing else to do.

    Attributes:
        counter: parts that are ready.
    """

    def __init__(self) -> None:
        self.counter = Counter(0)

    @property
    def ready(self) -> int:
        """Parts that are ready."""
        return self.counter.value

    def post(self, ready: int) -> None:
        """Let through everything below part `ready`."""
        self.counter.value = ready

    def wait(self, k: int, check: Callable[[], None]) -> None:
        """Return when part `k` is ready; `check` raises what kept it from being so."""
        counter = self.counter
        while counter.value <= k:
            check()
            time.sleep(LOOK_SECONDS)


class Staged:
    """A micro-batch's rows in the owner's memory, in transport type.

    Attributes:
        ids_T: whose rows they are.
        plan: who needs which; this and what follows up to `gate` once `planned`.
        index: which row each token uses, on the device.
        wanted_N: distinct local rows asked of this rank, sorted, in the tier's memory.
        rows_LNw: their weights, filled by the tier's thread.
        deferred_N: positions in `wanted_N` that the step under way will fill, int64.
        indexed: CUDA event behind the copies of the indices to the device.
        gate: how many parts are filled.
        may_defer: rows may have been left to the step under way.
        reading: the rows are being read.
    """

    plan: Plan
    index: RowIndex
    wanted_N: Tensor
    rows_LNw: Tensor
    deferred_N: Tensor

    def __init__(self, ids_T: Tensor) -> None:
        self.ids_T = ids_T
        self.indexed: Any | None = None
        self.gate = Gate()
        self.may_defer = self.reading = False
        self.planned: Future[None] | None = None

    def fill(self, plan: Plan, index: RowIndex, wanted_N: Tensor, rows_LNw: Tensor) -> None:
        """Note what a plan has found, and where the rows will be."""
        self.plan, self.index, self.wanted_N, self.rows_LNw = plan, index, wanted_N, rows_LNw
        self.deferred_N = wanted_N.new_empty(0)
        if index.inverse_T.is_cuda:
            # The index and the plan's are on their way to the device; other streams wait for this.
            device = index.inverse_T.device
            self.indexed = torch.cuda.current_stream(device).record_event()

    def places_of(self, rows_P: Tensor) -> Tensor:
        """Return the position in `wanted_N` of each row, -1 for those not wanted; int64 [P]."""
        return places_in(self.wanted_N, rows_P)


def places_in(sorted_N: Tensor, rows_P: Tensor) -> Tensor:
    """Return where each of `rows_P` stands in `sorted_N`, -1 where it does not; int64 [P]."""
    if sorted_N.shape[0] == 0:
        return torch.full_like(rows_P, -1)
    place_P = torch.searchsorted(sorted_N, rows_P).clamp_(max=sorted_N.shape[0] - 1)
    return torch.where(sorted_N[place_P] == rows_P, place_P, -1)


def own_part(rows_LNw: Tensor, k: int) -> Tensor:
    """Return the memory of part `k` as a tensor that autograd does not link with the others.

    Views of one tensor share a version counter: writing a later part would then look to autograd as
    if the earlier ones, which the model has used and saved, had been changed.
    """
    return rows_LNw.data[k]


class DeviceBuffer:
    """Device memory that the rows of one micro-batch after another use."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory: Tensor | None = None
        self._free = True
        self._released: Any | None = None

    def take(self, shape: tuple[int, int, int], dtype: torch.dtype, stream: Any) -> Tensor:
        """Return memory that `stream` may write to; of its own when the buffer is in use."""
        numel = shape[0] * shape[1] * shape[2]
        if not self._free:
            fresh = torch.empty(shape, dtype=dtype, device=self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
            return fresh
        if self._memory is None or self._memory.numel() < numel or self._memory.dtype != dtype:
            self._memory = None
            # Batches differ by a few rows; a little room keeps the next one from growing it.
            self._memory = torch.empty(numel + numel // 16, dtype=dtype, device=self._device)
            stream.wait_stream(torch.cuda.current_stream(self._device))
        elif self._released is not None:
            stream.wait_event(self._released)
        self._free = False
        return self._memory[:numel].view(shape)

    def release(self, rows: Tensor) -> None:
        """Give back what `take` returned, once all work that uses it has been queued."""
        if self._memory is not None and rows.data_ptr() == self._memory.data_ptr():
            self._free = True
            self._released = torch.cuda.current_stream(self._device).record_event()


class Parts(Sequence[Tensor]):
    """The layers [U, w] of a micro-batch's rows; leaves that require grad while gradients are on.

    A layer is waited for when it is asked for. Between ranks that is a collective call: ask for
    layers in the same order everywhere.

    Attributes:
        arrived: gets every layer's gradient as the backward pass completes it; None without.
        shape: (L, U, w).
    """

    def __init__(
        self,
        staged: Staged,
        exchange: Exchange,
        check: Callable[[], None],
        *,
        stream: Any | None,
        buffer: DeviceBuffer | None,
        arrived: Callable[[int, Tensor], None] | None,
    ) -> None:
        """Hand out the layers of `staged`.

        Args:
            staged: being filled by the tier's thread.
            exchange: of the table.
            check: raises when the tier has failed.
            stream: CUDA stream of the copies; None where owner and model share a memory.
            buffer: device memory for them.
            arrived: see the class.
        """
        rows_LNw = staged.rows_LNw
        self._staged, self._exchange, self._check = staged, exchange, check
        self._rows_LNw, self._stream, self.arrived = rows_LNw, stream, arrived
        self._buffer = buffer
        if arrived is None and stream is not None:
            # Nobody says when such rows are done with; on one stream nobody needs to.
            self._stream, self._buffer = torch.cuda.current_stream(exchange.mesh.device), None
        count, wanted, width = rows_LNw.shape
        self._leaves: list[Tensor | None] = [None] * count
        self._sinks: set[int] = set()
        self._exchanged: list[Tensor] = []
        self._events: list[Any] = []
        self._waited: Any | None = None
        self._on_device: Tensor | None = None
        self.shape = (count, staged.plan.unique, width)
        if self._stream is not None:
            rows = staged.plan.unique if staged.plan.asked is not None else wanted
            shape = (count, rows, width)
            device = exchange.mesh.device
            if self._buffer is not None:
                self._on_device = self._buffer.take(shape, rows_LNw.dtype, self._stream)
            else:
                self._on_device = torch.empty(shape, dtype=rows_LNw.dtype, device=device)
                self._stream.wait_stream(torch.cuda.current_stream(device))

            if staged.indexed is not None:
                self._stream.wait_event(staged.indexed)

    def __len__(self) -> int:
        """Return L."""
        return len(self._leaves)

    @overload
    def __getitem__(self, k: int) -> Tensor: ...
    @overload
    def __getitem__(self, k: slice) -> list[Tensor]: ...
    def __getitem__(self, k: int | slice) -> Tensor | list[Tensor]:
        """Return layer `k`, [U, w], once it is there."""
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        if not 0 <= k < len(self):
            raise IndexError(f"layer {k} of {len(self)}")
        leaf = self._leaves[k]
        if leaf is None:
            leaf = self._leaves[k] = self._leaf(k)
        return leaf

    def sink(self, k: int) -> Callable[[Tensor], None] | None:
        """Return who takes layer `k`'s gradient in place of autograd; None without gradients.

        Ask before the layer itself, which then gets none from autograd. It spares the backward
        pass a hook per layer, and memory where the gradient is written over the layer (see
        `kernels.modulate`).
        """
        arrived = self.arrived
        if arrived is None:
            return None
        self._sinks.add(k)
        return partial(arrived, k)

    @property
    def memory(self) -> Tensor | None:
        """All layers side by side, [L, U, w], where the model uses them; None between ranks."""
        if self._stream is not None:
            return self._on_device
        return self._rows_LNw if self._staged.plan.asked is None else None

    def release(self) -> None:
        """End the use of the rows; every kernel that reads them has been queued.

        Hands out nothing any more. Who takes the gradients knows these parts and they know him:
        cut here, their (pinned) memory is free at once and not when Python next collects garbage.
        """
        self.arrived = None
        self._leaves = [None] * len(self._leaves)
        if self._stream is None or self._on_device is None:
            return
        torch.cuda.current_stream(self._on_device.device).wait_stream(self._stream)
        if self._buffer is not None:
            self._buffer.release(self._on_device)

    def _leaf(self, k: int) -> Tensor:
        # .data, not detach(): a version counter of its own, since copies of later layers write
        # beside this one while autograd keeps it.
        rows_Uw = self._deliver(k).data
        arrived = self.arrived
        if arrived is None:
            return rows_Uw
        rows_Uw.requires_grad_()
        if k in self._sinks:
            return rows_Uw

        def hook(leaf: Tensor) -> None:
            grad, leaf.grad = leaf.grad, None
            assert grad is not None
            arrived(k, grad)

        rows_Uw.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        return rows_Uw

    def _deliver(self, k: int) -> Tensor:
        plan = self._staged.plan
        self._staged.gate.wait(k, self._check)
        if self._stream is None:
            if plan.asked is None:
                return own_part(self._rows_LNw, k)
            while len(self._exchanged) <= k:
                part = self._rows_LNw[len(self._exchanged)]
                self._exchanged.append(self._exchange.deliver(plan, part))
            return self._exchanged[k]
        assert self._on_device is not None
        if plan.asked is None:
            # Whatever is ready goes along.
            last = max(k, self._staged.gate.ready - 1)
        else:
            # All ranks must exchange alike: the next layer travels while this one is in use.
            last = min(k + 1, len(self) - 1)
            self._staged.gate.wait(last, self._check)
        sent = len(self._events)
        if sent <= last:
            with torch.cuda.stream(self._stream):
                self._send(sent, last + 1)
        event = self._events[k]
        if event is not self._waited:
            self._waited = event
            torch.cuda.current_stream(self._on_device.device).wait_event(event)
        return own_part(self._on_device, k)

    def _send(self, start: int, stop: int) -> None:
        """Send parts start … stop - 1 to the device, or to the ranks that asked for them."""
        assert self._on_device is not None and self._stream is not None
        plan = self._staged.plan
        if plan.asked is None:
            target = self._on_device.data[start:stop]
            target.copy_(self._rows_LNw[start:stop], non_blocking=True)
            self._events += [self._stream.record_event()] * (stop - start)
            return
        for i in range(start, stop):
            self._exchange.deliver(plan, self._rows_LNw[i], out=own_part(self._on_device, i))
            self._events.append(self._stream.record_event())
