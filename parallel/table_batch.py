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
from dataclasses import dataclass
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


TOGETHER = 4
"""Parts that travel at a time: every copy and every collective is Python in the caller's thread."""


@dataclass
class RowMemory:
    """Where the model finds the rows of a micro-batch, and a backward pass may leave gradients.

    Attributes:
        whole_LUw: all parts one behind the other, where they came from no other rank.
        groups_UGw: else `TOGETHER` parts side by side (the last ones may be fewer).
    """

    whole_LUw: Tensor | None
    groups_UGw: list[Tensor]

    def part(self, k: int) -> Tensor:
        """Return part `k`, [U, w], as a tensor that autograd does not link with the others.

        Views of one tensor share a version counter: writing a later part would then look to
        autograd as if the earlier ones, which the model has used and saved, had been changed.
        """
        if self.whole_LUw is not None:
            return self.whole_LUw.data[k]
        return self.groups_UGw[k // TOGETHER].data[:, k % TOGETHER]


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
        memory: where the layers are, those asked for so far.
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
        count, _, width = rows_LNw.shape
        self._leaves: list[Tensor | None] = [None] * count
        self._sinks: set[int] = set()
        self._events: list[Any] = []
        self._waited: Any | None = None
        alone = staged.plan.asked is None
        self.memory = RowMemory(rows_LNw if alone else None, [])
        self.shape = (count, staged.plan.unique, width)
        self._on_device: Tensor | None = None
        if self._stream is None:
            return
        device = exchange.mesh.device
        if self._buffer is not None:
            self._on_device = self._buffer.take(self.shape, rows_LNw.dtype, self._stream)
        else:
            self._on_device = torch.empty(self.shape, dtype=rows_LNw.dtype, device=device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        if alone:
            self.memory.whole_LUw = self._on_device
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
        self._deliver(k)
        rows_Uw = self.memory.part(k)
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

    def _deliver(self, k: int) -> None:
        """Have part `k` where the model uses it; its stream waits for it."""
        gate, last = self._staged.gate, len(self) - 1
        gate.wait(k, self._check)
        if self._staged.plan.asked is not None:
            # All ranks must exchange alike: the next parts travel while these are in use.
            groups = min(-(-k // TOGETHER), last // TOGETHER) + 1
            while len(self.memory.groups_UGw) < groups:
                first = len(self.memory.groups_UGw) * TOGETHER
                gate.wait(min(first + TOGETHER - 1, last), self._check)
                self._exchange_parts(first, min(first + TOGETHER, last + 1))
        elif self._stream is not None and len(self._events) <= k:
            # Whatever is ready goes along.
            assert self._on_device is not None
            parts = slice(len(self._events), max(k + 1, gate.ready))
            with torch.cuda.stream(self._stream):
                self._on_device.data[parts].copy_(self._rows_LNw[parts], non_blocking=True)
                event = self._stream.record_event()
            self._events += [event] * (parts.stop - parts.start)
        if self._stream is None:
            return
        event = self._events[k]
        if event is not self._waited:
            self._waited = event
            torch.cuda.current_stream(self._exchange.mesh.device).wait_event(event)

    def _exchange_parts(self, start: int, stop: int) -> None:
        """Get parts start … stop - 1 from their owners; a collective call."""
        plan, rows_GNw = self._staged.plan, self._rows_LNw[start:stop]
        if self._stream is None:
            self.memory.groups_UGw.append(self._exchange.deliver(plan, rows_GNw))
            return
        assert self._on_device is not None
        _, unique, width = self.shape
        out_UGw = self._on_device[start:stop].view(unique, stop - start, width)
        with torch.cuda.stream(self._stream):
            self.memory.groups_UGw.append(self._exchange.deliver(plan, rows_GNw, out_UGw))
            self._events += [self._stream.record_event()] * (stop - start)
