"""Row-partitioned tables: V rows dealt over the ranks, of which only those a batch touches move.

A table lives outside the module's parameters. One optimizer step is, on every rank alike:

    rows = table.fetch(ids_T)            # per micro-batch; rows.parts[k] is a leaf for layer k
    table.prefetch(next_ids_T)           # the micro-batch after it, of this step or the next
    loss(rows).backward()                # each layer's gradient leaves as soon as it is complete
    table.accumulate(rows)               # the micro-batch is done
    norm = table.grad_sq_norm()          # once per step, for the global norm
    table.step(lr, clip_coefficient)     # or table.skip()

All of these are collective calls. Rows and gradients travel on the threads of forward and backward
only, in program order; who needs which is agreed on beside them (see `table_exchange`). A row is
worked on in L equal parts, its layers. Planning, reading and stepping happen on the table's own
thread, in the order of the calls: `step` returns at once; the update goes layer by layer from the
first on and writes the fresh rows of the batch read ahead in the same pass, and the model waits for
a layer only where it uses it. So an update runs beside the dense optimizer and the first layers of
the next forward pass, and never changes what a fetch returns: rows as of the last step, always.

Shapes: T tokens, U unique ids of the batch on this rank, N rows at their owner, V rows of the
table, W columns of a row, L parts of w = W / L columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.rows import RowIndex
from kernels.rows_step import Rule
from kernels.transfer import to_device
from parallel.mesh import Mesh
from parallel.table_batch import DeviceBuffer, Gate, Parts, Staged
from parallel.table_contents import StoredRows
from parallel.table_exchange import Plan
from parallel.table_gradient import BatchGradient, StepGradient
from parallel.table_layout import TableConfig, TableError
from parallel.table_work import RowWork


class Rows(NamedTuple):
    """The rows of one micro-batch.

    Attributes:
        parts: L leaves [U, w] in transport type on the mesh's device, waited for as they are used.
        inverse_T: which row each token uses, int64 [T], on the mesh's device.
        lookup: the same with the tokens sorted by row; give this to `kernels.rows.gather_rows`.
        plan: who owns which row.
        gradient: where the parts' gradients go.
    """

    parts: Parts
    inverse_T: Tensor
    lookup: RowIndex
    plan: Plan
    gradient: BatchGradient

    def whole(self) -> Tensor:
        """Return all parts side by side, [U, W]; a leaf where the row is one part."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(list(self.parts), dim=1)


class RowTable(StoredRows):
    """A table of V rows of W weights, dealt by id modulo the world size.

    Attributes:
        stats: of the last finished step on this rank: unique_rows, owned_rows (stepped here),
            id_bytes, row_bytes, grad_bytes (sent and received by this rank), prefetch_hits and
            prefetch_misses (rows read by fetches); and, since the start, what the nvme tier
            counts: cache_hits, cache_misses, disk_read_bytes, disk_write_bytes.
        dtype: what rows travel in.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        width: int,
        mesh: Mesh,
        cfg: TableConfig,
        *,
        dtype: torch.dtype = torch.float32,
        groups: int = 1,
        ids_from: str = "",
    ) -> None:
        """Allocate this rank's rows, all zero. A collective call.

        Args:
            name: one per table.
            rows: V.
            width: W.
            mesh: rank, world and device.
            cfg: tier, optimizer and transport.
            dtype: the run's compute type.
            groups: L, equal parts of a row that travel and are stepped one after another; each has
                a second moment of its own in the row-wise optimizers.
            ids_from: the tokenizer that the ids come from, by name or file, for messages.

        Raises:
            TableError: the table does not fit its tier (on all ranks, before anything is
                allocated).
            ValueError: a configuration that cannot be meant.
        """
        super().__init__(name, rows, width, mesh, cfg, groups, ids_from)
        self.dtype = torch.float32 if cfg.transport == "fp32" else dtype
        self.stats: dict[str, int] = {}
        self._work = RowWork(self._tier, self.layout, self._kernels, groups)
        self._pinned = mesh.device.type == "cuda" and self._tier.device.type == "cpu"
        self._stream: Any | None = None
        self._buffer: DeviceBuffer | None = None
        if self._pinned:
            self._stream = torch.cuda.Stream(mesh.device)  # type: ignore[no-untyped-call]
            self._buffer = DeviceBuffer(mesh.device)
        shape = (groups, width // groups)
        local = self._exchange.local_rows
        self._gradient = StepGradient(
            local, shape, self._tier.device, mesh.device, self._thread, self._kernels
        )
        self._ahead: Staged | None = None
        self._fetched: list[Staged] = []
        self._open: list[Parts] = []
        self._reset_counts()

    def prefetch(self, ids_T: Tensor) -> None:
        """Start reading the rows of the next micro-batch from the tier. A collective call.

        Give exactly what the next `fetch` with gradients will get: another batch starts from the
        beginning. One batch is kept ahead; a later one takes its place. Rows that the step under
        way has fetched are left to its update, which writes them on.

        Raises:
            TableError: an id outside the table, or earlier work of the tier failed.
        """
        self._thread.check()
        # Where the rows are in the device's memory, nothing is gained by reading early.
        early = self._tier.device.type == "cpu"
        staged = self._ahead = self._stage(ids_T, defer=early)
        if early:
            self._read(staged, "read ahead")

    def fetch(self, ids_T: Tensor) -> Rows:
        """Return the rows of this rank's micro-batch, as of the last step. A collective call.

        Without gradients (evaluation) a batch that was read ahead stays so.

        Args:
            ids_T: token ids, int64 [T], best on the host (a device is waited for).

        Raises:
            TableError: an id outside the table, or earlier work of the tier failed.
        """
        self._thread.check()
        grad = torch.is_grad_enabled()
        staged, hit = self._ahead, False
        if staged is not None and grad and torch.equal(staged.ids_T, ids_T):
            self._ahead, hit = None, staged.reading
            self._read_deferred(staged)
        else:
            staged = self._stage(ids_T, defer=False)
        if not staged.reading:
            self._read(staged, "read")
        if staged.planned is not None:
            staged.planned.result()
        plan = staged.plan
        self._count_ids(plan)
        gradient = BatchGradient(
            self._exchange, plan, (self.parts, self.width // self.parts), self._stream
        )

        def arrived(k: int, grad_Uw: Tensor) -> None:
            if gradient.sent is None:
                self._gradient.begin(gradient)
            gradient.put(k, grad_Uw, parts.memory)

        parts = Parts(
            staged,
            self._exchange,
            self._thread.check,
            stream=self._stream,
            buffer=self._buffer,
            arrived=arrived if grad else None,
        )
        if grad:
            self._fetched.append(staged)
            self._open.append(parts)
        wanted = staged.wanted_N.shape[0]
        self._counts["prefetch_hits"] += wanted if hit else 0
        self._counts["prefetch_misses"] += 0 if hit else wanted
        self._counts["unique_rows"] += plan.unique
        self._counts["row_bytes"] += self._moved(plan)
        return Rows(parts, staged.index.inverse_T, staged.index, plan, gradient)

    @torch.no_grad()
    def accumulate(self, rows: Rows) -> None:
        """End a micro-batch behind its backward pass. A collective call.

        Its gradients have left already; parts without one count as zero, which must be the same
        parts on every rank. The rows must not be used any more.
        """
        for k in rows.gradient.missing:
            part = rows.parts[k]
            arrived = rows.parts.arrived
            if arrived is None:
                raise TableError(
                    f"table {self.name!r}: accumulate of rows that were fetched without gradients"
                )
            arrived(k, torch.zeros_like(part))
        rows.gradient.finish()
        self._counts["grad_bytes"] += self._moved(rows.plan)
        rows.parts.release()
        if rows.parts in self._open:
            self._open.remove(rows.parts)

    @torch.no_grad()
    def grad_sq_norm(self) -> Tensor:
        """Return the squared norm of this step's gradient over all ranks, fp64 0-dim.

        Alike on all ranks. A collective call.
        """
        self._require_gradient("grad_sq_norm")
        return self._exchange.add_up(self._gradient.squared_norm())

    def step_numbers(self) -> dict[str, int]:
        """Return what `stats` will be behind this step, on this rank."""
        touched = self._gradient.touched if self._gradient.batches else 0
        return {**self._counts, "owned_rows": touched, **self._tier.stats}

    def step(self, lr: float, clip_coefficient: float | Tensor = 1.0) -> None:
        """Step the rows that this step's micro-batches touched, and no others.

        Args:
            lr: the run's learning rate; `cfg.lr_multiplier` is applied to it here.
            clip_coefficient: factor on all gradients, of the global norm's clipping.
        """
        self._require_gradient("step")
        cfg = self.cfg
        rule = Rule(
            cfg.optimizer,
            cfg.betas,
            cfg.eps,
            cfg.weight_decay,
            lr * cfg.lr_multiplier,
            float(clip_coefficient),
        )
        rows_P, part_of = self._gradient.rows()
        self._touched.index_fill_(0, rows_P, True)
        rows_P = to_device(rows_P, self._tier.device)
        ahead = self._ahead
        if ahead is not None and ahead.reading:
            ahead.gate, ahead.may_defer = Gate(), False
        else:
            ahead = None
        if self._snapshot is not None:
            self._snapshot.wait_for_room()
        self._thread.submit(
            partial(self._work.update, rule, rows_P, part_of, ahead, self._snapshot), "update"
        )
        self._finish_step()

    def skip(self) -> None:
        """Drop this step's gradients; the rows stay as they are."""
        if self._ahead is not None:
            self._read_deferred(self._ahead)
        self._gradient.clear()
        self._finish_step()

    def load_shards(self, shards: Iterable[dict[str, Tensor]]) -> None:
        """Take this rank's rows from pieces of `state_chunks`, of any number of ranks.

        Every rank reads all pieces and keeps its own rows. Pending gradients and prefetched rows
        are dropped.

        Raises:
            TableError: a piece of another layout, an id outside the table or met twice, or rows
                missing at the end.
        """
        self.flush()
        self._ahead = None
        self._gradient.clear()
        self._finish_step()
        super().load_shards(shards)

    def _moved(self, plan: Plan) -> int:
        """Bytes of rows that this rank sends to and receives from others, once through `plan`."""
        rank = self.mesh.rank
        rows = plan.unique + sum(plan.receive_counts) - 2 * plan.send_counts[rank]
        # One rank moves nothing between ranks; what counts then is the way to its tier and back.
        rows = plan.unique if self.mesh.world == 1 else rows
        return rows * self.width * self.dtype.itemsize

    def _count_ids(self, plan: Plan) -> None:
        if self.mesh.world > 1:
            own = plan.send_counts[self.mesh.rank]
            self._counts["id_bytes"] += 8 * (plan.unique + sum(plan.receive_counts) - 2 * own)

    def _require_gradient(self, call: str) -> None:
        self._thread.check()
        if self._gradient.batches == 0:
            raise TableError(
                f"table {self.name!r}: {call} without a gradient; call accumulate(rows) after "
                "every backward"
            )

    def _stage(self, ids_T: Tensor, *, defer: bool) -> Staged:
        """Have a micro-batch planned, on the tier's thread."""
        staged = Staged(ids_T)
        fetched = tuple(self._fetched) if defer else ()
        staged.may_defer = bool(fetched)
        if self.mesh.world == 1:
            # Between ranks the peers must hear of it; alone, the caller may at once.
            self._exchange.require(ids_T)
        staged.planned = self._thread.submit(partial(self._plan, staged, fetched), "plan")
        return staged

    def _plan(self, staged: Staged, fetched: Sequence[Staged]) -> None:
        plan, index = self._exchange.plan(staged.ids_T)
        device = self._tier.device
        wanted_N = to_device(plan.wanted_N, device)
        rows_LNw = torch.empty(
            (self.parts, wanted_N.shape[0], self.width // self.parts),
            dtype=self.dtype,
            device=device,
            pin_memory=self._pinned,
        )
        staged.fill(plan, index, wanted_N, rows_LNw)
        if fetched:
            touched = torch.cat([batch.wanted_N for batch in fetched])
            staged.deferred_N = torch.isin(wanted_N, touched).nonzero()[:, 0]

    def _read(self, staged: Staged, kind: str) -> None:
        """Have all rows of a batch read but those deferred."""
        staged.reading = True
        fetched, gate = tuple(self._fetched), staged.gate

        def work() -> None:
            places_N, held_N = None, None
            if staged.deferred_N.shape[0]:
                kept = torch.ones_like(staged.wanted_N, dtype=torch.bool)
                kept[staged.deferred_N] = False
                places_N = kept.nonzero()[:, 0]
            if fetched:
                # Rows of the step under way must not leave a cache for those of the next.
                held_N = torch.cat([batch.wanted_N for batch in fetched])
            self._work.gather(staged, places_N, gate, held_N)

        self._thread.submit(work, kind)

    def _read_deferred(self, staged: Staged) -> None:
        """Have the deferred rows read now, as no update will write them."""
        if not staged.may_defer:
            return
        staged.may_defer = False
        gate = staged.gate = Gate()

        def work() -> None:
            places_N, staged.deferred_N = staged.deferred_N, staged.deferred_N[:0]
            self._work.gather(staged, places_N, gate)

        self._thread.submit(work, "read")

    def _reset_counts(self) -> None:
        self._counts = dict.fromkeys(
            (
                "unique_rows",
                "id_bytes",
                "row_bytes",
                "grad_bytes",
                "prefetch_hits",
                "prefetch_misses",
            ),
            0,
        )

    def _finish_step(self) -> None:
        for parts in self._open:
            parts.release()
        self._open.clear()
        self._fetched.clear()
        self.stats = self.step_numbers()
        self._gradient.clear()
        self._reset_counts()
