"""Row-partitioned tables: V rows dealt over the ranks, of which only those a batch touches move.

A table lives outside the module's parameters. One optimizer step is, on every rank alike:

    rows = table.fetch(ids_T)            # per micro-batch; rows.parts[k] is a leaf for layer k
    table.prefetch(next_ids_T)           # the micro-batch after it, of this step or the next
    loss(rows).backward()                # each layer's gradient leaves as soon as it is complete
    table.accumulate(rows)               # the micro-batch is done
    norm = table.grad_sq_norm()          # once per step, for the global norm
    table.step(lr, clip_coefficient)     # or table.skip()

All of these are collective calls and communicate on the threads of forward and backward only, in
program order. A row is worked on in L equal parts, its layers. Reading and stepping happens on the
table's own thread, in the order of the calls: `step` returns at once; the update goes layer by
layer from the first on and writes the fresh rows of the batch read ahead in the same pass, and the
model waits for a layer only where it uses it. So an update runs beside the dense optimizer and the
first layers of the next forward pass, and never changes what a fetch returns: rows as of the last
step, always.

Shapes: T tokens, U unique ids of the batch on this rank, N rows at their owner, V rows of the
table, W columns of a row, L parts of w = W / L columns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels.rows import RowIndex
from kernels.rows_host import row_kernels
from kernels.rows_step import Clock, Fields, RowKernels, Rule, TorchRows, Transport, tick
from parallel.host_buffers import HostBuffers
from parallel.mesh import Mesh, threads_per_rank
from parallel.table_batch import DeviceBuffer, Gate, Parts, Staged
from parallel.table_exchange import Exchange, Plan
from parallel.table_gradient import BatchGradient, StepGradient
from parallel.table_layout import RowLayout, TableConfig, TableError
from parallel.table_snapshot import CHUNK_BYTES, TableSnapshot
from parallel.table_state import OwnedRows
from parallel.table_tiers import Tier, TierThread, open_memory_tier
from parallel.tensor_file import TensorSource, TensorSpec

log = logging.getLogger(__name__)

STATE_CHUNK_BYTES = 256 * 2**20
DRAW_IDS = 512
"""Ids whose weights are drawn together; part of what a seed means."""


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


class RowTable:
    """A table of V rows of W weights, dealt by id modulo the world size.

    Attributes:
        name: in messages, stats and checkpoints.
        rows: V.
        width: W.
        cfg: see `TableConfig`.
        layout: fields of a row.
        stats: of the last finished step on this rank: unique_rows, owned_rows (stepped here),
            id_bytes, row_bytes, grad_bytes (sent and received by this rank), prefetch_hits and
            prefetch_misses (rows read by fetches); and, since the start, what the nvme tier
            counts: cache_hits, cache_misses, disk_read_bytes, disk_write_bytes.
        kernel: implementation that reads and steps rows, "compiled" or "torch".
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

        Raises:
            TableError: the table does not fit its tier (on all ranks, before anything is
                allocated).
            ValueError: a configuration that cannot be meant.
        """
        cfg.validate()
        if rows < 1 or width < 1 or groups < 1 or width % groups:
            raise ValueError(
                f"table {name!r}: {rows} rows of {width} columns in {groups} groups cannot be"
            )
        self.name, self.rows, self.width, self.cfg, self.mesh = name, rows, width, cfg, mesh
        self.layout = RowLayout.of(cfg.optimizer, width, groups)
        self.dtype = torch.float32 if cfg.transport == "fp32" else dtype
        self.stats: dict[str, int] = {}
        self._exchange = Exchange(name, rows, mesh)
        self._kernels = self._choose_kernels()
        self.kernel = self._kernels.name
        self._tier = self._open_tier()
        self._pinned = mesh.device.type == "cuda" and self._tier.device.type == "cpu"
        self._thread = TierThread(name, self._tier.device, mesh.device)
        self.parts = groups
        self._fields = self._slot_fields()
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
        self._snapshot: TableSnapshot | None = None
        # Rows that may be other than zero, by the work given to the tier's thread so far.
        self._touched = torch.zeros(local, dtype=torch.bool)
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
        self._touched[rows_P.cpu()] = True
        ahead = self._ahead
        if ahead is not None and ahead.reading:
            ahead.gate, ahead.may_defer = Gate(), False
        else:
            ahead = None
        if self._snapshot is not None:
            self._snapshot.wait_for_room()
        self._thread.submit(
            partial(self._update, rule, rows_P, part_of, ahead, self._snapshot), "update"
        )
        self._finish_step()

    def skip(self) -> None:
        """Drop this step's gradients; the rows stay as they are."""
        if self._ahead is not None:
            self._read_deferred(self._ahead)
        self._gradient.clear()
        self._finish_step()

    def snapshot(self, buffers: HostBuffers | None, chunk_bytes: int = CHUNK_BYTES) -> TensorSource:
        """Return this rank's rows as of the last step, to be written while training goes on.

        Rows of a host or nvme tier are read chunk by chunk beside the steps, without a second copy
        of the table (see `table_snapshot`). One snapshot at a time: close it before the next.

        Args:
            buffers: take a copy of a device tier's rows; with None these must be read before the
                next step, as the source says.
            chunk_bytes: size of the pieces, about.

        Returns:
            Tensors "CHUNK/ids" int64 [n] and "CHUNK/FIELD" fp32 [n, width], and "CHUNK/untouched"
            with the ids of rows that are zero.

        Raises:
            TableError: earlier work of the tier failed, or a snapshot is still being read.
        """
        if self._snapshot is not None and not self._snapshot.finished:
            raise TableError(f"table {self.name!r}: the snapshot before is still being read")
        mesh, rows = self.mesh, self._exchange.local_rows
        if self._tier.device.type == "cpu":
            self._thread.check()
            # Its reads queue behind the updates under way, and those to come know of it.
            self._snapshot = TableSnapshot(
                self._tier, self._thread, self._touched.clone(), chunk_bytes
            )
            return self._snapshot.source(mesh.rank, mesh.world)
        fields = self._tier.views() or {}
        if buffers is not None:
            fields = {n: buffers.copy(f"{self.name}/{n}", field) for n, field in fields.items()}
        ids = torch.arange(rows) * mesh.world + mesh.rank
        tensors = {"000000/ids": ids, **{f"000000/{n}": field for n, field in fields.items()}}
        specs = {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}
        return TensorSource(specs, lambda: iter(tensors.values()), in_memory=buffers is not None)

    def state_chunks(self, chunk_bytes: int = STATE_CHUNK_BYTES) -> Iterator[dict[str, Tensor]]:
        """Yield this rank's rows in pieces of about `chunk_bytes`, each with its row ids.

        Every piece holds "ids" int64 [n] and the fields fp32 [n, width]. Memory tiers yield views
        of their rows where they can (host and device tiers always): write them out, or copy them,
        before the next `step`.
        """
        self._thread.drain()
        local, views = self._exchange.local_rows, self._tier.views()
        count = max(1, chunk_bytes // (self.layout.columns * 4))
        for at in range(0, max(local, 1), count):
            index_N = torch.arange(at, min(at + count, local), device=self._tier.device)
            if views is not None:
                fields = {name: view[at : at + count] for name, view in views.items()}
            else:
                fields = self._thread.submit(partial(self._tier.peek, index_N)).result()
            yield {"ids": index_N.cpu() * self.mesh.world + self.mesh.rank, **fields}

    def local_state(self) -> dict[str, Tensor]:
        """Return all of this rank's rows as one piece of `state_chunks`."""
        chunks = list(self.state_chunks(max(1, self.rows) * self.layout.columns * 4))
        return chunks[0]

    def load_local_state(self, state: dict[str, Tensor]) -> None:
        """Take this rank's rows from one piece that holds them all; see `load_shards`."""
        self.load_shards([state])

    def load_shards(self, shards: Iterable[dict[str, Tensor]]) -> None:
        """Take this rank's rows from pieces of `state_chunks`, of any number of ranks.

        Every rank reads all pieces and keeps its own rows. Pending gradients and prefetched rows
        are dropped.

        Raises:
            TableError: a piece of another layout, an id outside the table or met twice, or rows
                missing at the end.
        """
        self._thread.drain()
        self._ahead = None
        self._gradient.clear()
        self._finish_step()
        owned = OwnedRows(self.name, self.rows, self.mesh, self.layout)
        for shard in shards:
            if "untouched" in shard:
                self._zero(owned.untouched(shard["untouched"].cpu()))
                continue
            local_N, fields = owned.of(shard)
            self._touched[local_N] = True
            index_N = local_N.to(self._tier.device)
            self._thread.submit(partial(self._tier.poke, index_N, fields)).result()
        owned.require_all()

    @property
    def busy_seconds(self) -> dict[str, float]:
        """Seconds that the table's own thread has worked since the start, by kind of work."""
        return dict(self._thread.seconds)

    def _zero(self, local_N: Tensor) -> None:
        """Make rows zero again; those that no step has touched are."""
        local_N = local_N[self._touched[local_N]]
        self._touched[local_N] = False
        count = max(1, STATE_CHUNK_BYTES // (self.layout.columns * 4))
        for at in range(0, local_N.shape[0], count):
            index_N = local_N[at : at + count].to(self._tier.device)
            fields = {
                name: torch.zeros(index_N.shape[0], width)
                for name, width in self.layout.widths.items()
            }
            self._thread.submit(partial(self._tier.poke, index_N, fields)).result()

    def draw_part(self, k: int, std: float, seed: int) -> None:
        """Draw part `k` of every row's weights from a normal distribution, alike at any world size.

        Args:
            k: 0 <= k < L.
            std: standard deviation.
            seed: every block of ids has a generator of its own.
        """
        mesh, w = self.mesh, self.width // self.parts
        generator = torch.Generator()
        for block, first in enumerate(range(0, self.rows, DRAW_IDS)):
            last = min(first + DRAW_IDS, self.rows)
            generator.manual_seed(1_000_003 * seed + block)
            drawn = torch.randn(last - first, w, generator=generator).mul_(std)
            ids = torch.arange(first, last)
            mine = (ids % mesh.world == mesh.rank).nonzero()[:, 0]
            local_N = ids[mine] // mesh.world
            self._touched[local_N] = True
            index_N = local_N.to(self._tier.device)
            fields = self._thread.submit(partial(self._tier.peek, index_N)).result()
            fields["weight"][:, k * w : (k + 1) * w] = drawn[mine].to(self._tier.device)
            self._thread.submit(partial(self._tier.poke, index_N, fields)).result()

    def flush(self) -> None:
        """Wait for all reads and updates under way; raises what failed among them."""
        self._thread.drain()

    def close(self) -> None:
        """Finish pending work and give back threads and files."""
        self._thread.close()
        self._tier.close()

    def _open_tier(self) -> Tier:
        if self.cfg.tier == "nvme":
            from parallel.table_nvme import open_nvme_tier

            return open_nvme_tier(self._exchange, self.layout, self.cfg, self._kernels)
        device = self.mesh.device if self.cfg.tier == "device" else torch.device("cpu")
        return open_memory_tier(self._exchange, self.layout, device)

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

    def _choose_kernels(self) -> RowKernels:
        choice = self.cfg.kernel
        if self.cfg.tier == "device" and self.mesh.device.type != "cpu":
            return TorchRows()
        if choice == "auto":
            choice = "compiled" if self.mesh.device.type == "cuda" else "torch"
        share = threads_per_rank(self.mesh.local_world)
        # Memory is what limits them, and the update has most of a step: more would only take
        # execution units from the threads that launch the model's kernels.
        on_gpu = self.mesh.device.type == "cuda"
        threads = self.cfg.threads or (max(1, min(8, share // 4)) if on_gpu else share)
        kernels = row_kernels(choice, threads)
        if self.mesh.is_first:
            log.info("table %r: %s row kernels, %d threads", self.name, kernels.name, threads)
        return kernels

    def _slot_fields(self) -> Fields:
        """Return the slot views of weights and optimizer state."""
        fields, names = self._tier.fields, list(self.layout.widths)
        first, second = ("weight", names[1]) if len(names) == 2 else (names[1], names[2])
        return Fields(fields["weight"], fields[first], fields[second])

    def _stage(self, ids_T: Tensor, *, defer: bool) -> Staged:
        """Plan a micro-batch; alone, a rank does it on the tier's thread."""
        staged = Staged(ids_T)
        fetched = tuple(self._fetched) if defer else ()
        staged.may_defer = bool(fetched)
        if self.mesh.world == 1:
            self._exchange.require(ids_T)
            work = partial(self._plan, staged, None, fetched)
            staged.planned = self._thread.submit(work, "plan")
        else:
            planned = self._exchange.plan(ids_T)
            self._count_ids(planned[0])
            self._plan(staged, planned, fetched)
        return staged

    def _plan(
        self,
        staged: Staged,
        planned: tuple[Plan, RowIndex] | None,
        fetched: Sequence[Staged],
    ) -> None:
        plan, index = planned or self._exchange.plan(staged.ids_T)
        device = self._tier.device
        wanted_N = plan.wanted_N.to(device)
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
            self._gather(staged, places_N, gate, held_N)

        self._thread.submit(work, kind)

    def _read_deferred(self, staged: Staged) -> None:
        """Have the deferred rows read now, as no update will write them."""
        if not staged.may_defer:
            return
        staged.may_defer = False
        gate = staged.gate = Gate()

        def work() -> None:
            places_N, staged.deferred_N = staged.deferred_N, staged.deferred_N[:0]
            self._gather(staged, places_N, gate)

        self._thread.submit(work, "read")

    def _gather(
        self,
        staged: Staged,
        places_N: Tensor | None,
        gate: Gate | None,
        held_N: Tensor | None = None,
    ) -> None:
        """Read rows at `places_N` of a batch (None is all); on the tier's thread."""
        rows_LNw = staged.rows_LNw
        wanted_N = staged.wanted_N if places_N is None else staged.wanted_N[places_N]
        for at in range(0, wanted_N.shape[0], self._tier.chunk_rows):
            part = slice(at, at + self._tier.chunk_rows)
            last = part.stop >= wanted_N.shape[0]
            slots_N = self._tier.slots(wanted_N[part], write=False, held_N=held_N)
            places = None if places_N is None else places_N[part]
            if places is None and not (part.start == 0 and last):
                places = torch.arange(part.start, min(part.stop, wanted_N.shape[0]))
            self._kernels.gather(
                self._fields.weight_SW,
                slots_N,
                rows_LNw,
                places,
                gate.counter if last and gate is not None else None,
            )
        if gate is not None:
            gate.post(self.parts)

    def _update(
        self,
        rule: Rule,
        rows_P: Tensor,
        part_of: Callable[[int], Tensor],
        ahead: Staged | None,
        snapshot: TableSnapshot | None,
    ) -> None:
        """Step rows part by part and write on what the batch ahead needs; on the tier's thread."""
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
                self._gather(ahead, left, None)
        grads = [part_of(k) for k in range(self.parts)]
        for at in range(0, rows_P.shape[0], self._tier.chunk_rows):
            part = slice(at, at + self._tier.chunk_rows)
            last = part.stop >= rows_P.shape[0]
            slots = self._tier.slots(rows_P[part], write=True)
            clock = Clock(torch.empty(0), torch.empty(0))
            if "steps" in self._tier.fields:
                clock = tick(rule, self._tier.fields["steps"], slots)
            out, ready = None, None
            if ahead is not None and places_P is not None:
                out = Transport(ahead.rows_LNw, places_P[part])
                ready = ahead.gate.counter if last else None
            self._kernels.step(
                rule, slots, self._fields, clock, [grad[part] for grad in grads], out, ready
            )
        if ahead is not None:
            ahead.gate.post(self.parts)

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
