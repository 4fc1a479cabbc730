"""Row-partitioned tables: V rows dealt over the ranks, of which only those a batch touches move.

A table lives outside the module's parameters. One optimizer step is, on every rank alike:

    rows = table.fetch(ids_T)            # per micro-batch; rows.values_UW is a leaf
    loss(rows).backward()                # fills rows.values_UW.grad
    table.accumulate(rows)               # gradients travel to the owners and add up there
    norm = table.grad_sq_norm()          # once per step, for the global norm
    table.step(lr, clip_coefficient)     # or table.skip()

All of these are collective calls and communicate on the calling thread only. Reading and stepping a
host or nvme tier happens on the table's own thread, in the order of the calls: `step` returns while
rows are still being written, and the next `fetch` waits for just that. `prefetch` reads the rows of
a later batch meanwhile; rows that a step changes are read again before they are used, so the result
never depends on whether or when something was prefetched.

Shapes: T tokens, U unique ids of the batch on this rank, N rows at their owner, V rows of the
table, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.rows import RowIndex
from parallel.host_buffers import HostBuffers
from parallel.mesh import Mesh
from parallel.table_exchange import Exchange, Plan
from parallel.table_layout import RowLayout, TableConfig, TableError
from parallel.table_optim import Fields, GradientSum, squared_norm, update_rows
from parallel.table_prefetch import ReadAhead
from parallel.table_snapshot import CHUNK_BYTES, TableSnapshot
from parallel.table_state import OwnedRows
from parallel.table_tiers import Tier, TierThread, open_memory_tier, step_rows
from parallel.tensor_file import TensorSource, TensorSpec

STATE_CHUNK_BYTES = 256 * 2**20


class Rows(NamedTuple):
    """The rows of one micro-batch.

    Attributes:
        values_UW: unique rows in transport type, a leaf that requires grad, on the mesh's device.
        inverse_T: which row each token uses, int64 [T], on the mesh's device.
        lookup: the same with the tokens sorted by row; give this to `kernels.rows.gather_rows`.
        plan: who owns which row, for `RowTable.accumulate`.
    """

    values_UW: Tensor
    inverse_T: Tensor
    lookup: RowIndex
    plan: Plan


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
            groups: second moments per row of the row-wise optimizers (such as one per layer).

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
        self._tier = self._open_tier()
        self._pinned = mesh.device.type == "cuda" and self._tier.device.type == "cpu"
        self._thread = TierThread(name, self._tier.device, mesh.device)
        self._ahead = ReadAhead(self._tier, self._thread, self.dtype, pinned=self._pinned)
        self._only_batch: Tensor | None = None
        self._batches = 0
        self._counts: dict[str, int] = {}
        self._snapshot: TableSnapshot | None = None
        self._reset_step()

    def prefetch(self, ids_T: Tensor) -> None:
        """Start reading the rows of a coming batch from the tiers. A collective call.

        The ids of a whole coming step may be given at once; its fetches then take their parts. At
        most two batches are kept ahead, the oldest gives way.

        Raises:
            TableError: an id outside the table, or earlier work of the tier failed.
        """
        plan, _ = self._exchange.plan(ids_T)
        self._count_ids(plan)
        self._ahead.start(plan.wanted_N.to(self._tier.device))

    def fetch(self, ids_T: Tensor) -> Rows:
        """Return the rows of this rank's micro-batch, as of the last step. A collective call.

        Args:
            ids_T: token ids, int64 [T], best on the host (a device is waited for).

        Raises:
            TableError: an id outside the table, or earlier work of the tier failed.
        """
        plan, index = self._exchange.plan(ids_T)
        self._count_ids(plan)
        rows_NW, hits = self._ahead.take(plan.wanted_N.to(self._tier.device))
        values_UW = self._exchange.deliver(plan, rows_NW)
        self._counts["prefetch_hits"] += hits
        self._counts["prefetch_misses"] += rows_NW.shape[0] - hits
        self._counts["unique_rows"] += plan.unique
        self._counts["row_bytes"] += self._moved(plan)
        return Rows(values_UW.requires_grad_(), index.inverse_T, index, plan)

    @torch.no_grad()
    def accumulate(self, rows: Rows) -> None:
        """Send the gradient of a micro-batch's rows to their owners. A collective call.

        Takes `rows.values_UW.grad` away; no gradient counts as zero.
        """
        grad_UW = rows.values_UW.grad
        rows.values_UW.grad = None
        if grad_UW is None:
            grad_UW = torch.zeros_like(rows.values_UW)
        grad_NW = self._exchange.collect(rows.plan, grad_UW)
        self._counts["grad_bytes"] += self._moved(rows.plan)
        total, index_N = self._gradient, rows.plan.wanted_N.to(self._tier.device)
        self._only_batch = grad_NW if self._batches == 0 else None
        self._batches += 1
        if not self._pinned:
            self._thread.submit(lambda: total.add(index_N, grad_NW))
            return
        host_NW = torch.empty(grad_NW.shape, dtype=grad_NW.dtype, pin_memory=True)
        host_NW.copy_(grad_NW, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()

        def add() -> None:
            copied.synchronize()
            total.add(index_N, host_NW)

        self._thread.submit(add)

    @torch.no_grad()
    def grad_sq_norm(self) -> Tensor:
        """Return the squared norm of this step's gradient over all ranks, fp64 0-dim on the host.

        Alike on all ranks. A collective call.
        """
        self._require_gradient("grad_sq_norm")
        if self._only_batch is not None:
            local = squared_norm(self._only_batch)
        else:
            total = self._gradient
            local = self._thread.submit(lambda: squared_norm(total.grad_NW)).result()
        return self._exchange.add_up(local)

    def step(self, lr: float, clip_coefficient: float | Tensor = 1.0) -> None:
        """Step the rows that this step's micro-batches touched, and no others.

        Args:
            lr: the run's learning rate; `cfg.lr_multiplier` is applied to it here.
            clip_coefficient: factor on all gradients, of the global norm's clipping.
        """
        self._require_gradient("step")
        total, clip, cfg = self._gradient, float(clip_coefficient), self.cfg
        table_lr = lr * cfg.lr_multiplier
        refresh = self._ahead.refresher(total)
        snapshot = self._snapshot
        if snapshot is not None:
            snapshot.wait_for_room()

        def update(fields: Fields, grad_NW: Tensor) -> None:
            update_rows(cfg, fields, grad_NW if clip == 1.0 else grad_NW * clip, table_lr)

        def work() -> None:
            if snapshot is not None:
                snapshot.before_update(total.index_N)
            step_rows(self._tier, total.index_N, total.grad_NW, update)
            refresh()

        self._ahead.wait_for(self._thread.submit(work))
        self._finish_step()

    def skip(self) -> None:
        """Drop this step's gradients; the rows stay as they are."""
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
            Tensors "CHUNK/ids" int64 [n] and "CHUNK/FIELD" fp32 [n, width].

        Raises:
            TableError: earlier work of the tier failed, or a snapshot is still being read.
        """
        if self._snapshot is not None and not self._snapshot.finished:
            raise TableError(f"table {self.name!r}: the snapshot before is still being read")
        mesh, rows = self.mesh, self._exchange.local_rows
        if self._tier.device.type == "cpu":
            self._thread.check()
            # Its reads queue behind the updates under way, and those to come know of it.
            self._snapshot = TableSnapshot(self._tier, self._thread, rows, chunk_bytes)
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
        self._ahead.clear()
        self._reset_step()
        owned = OwnedRows(self.name, self.rows, self.mesh, self.layout)
        for shard in shards:
            local_N, fields = owned.of(shard)
            index_N = local_N.to(self._tier.device)
            self._thread.submit(partial(self._tier.poke, index_N, fields)).result()
        owned.require_all()

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

            return open_nvme_tier(self._exchange, self.layout, self.cfg)
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
        if self._batches == 0:
            raise TableError(
                f"table {self.name!r}: {call} without a gradient; call accumulate(rows) after "
                "every backward"
            )

    def _reset_step(self) -> None:
        self._gradient = GradientSum(self.width, self._tier.device)
        self._only_batch = None
        self._batches = 0
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
        self._ahead.end_step()
        self.stats = {**self._counts, **self._tier.stats}
        self._reset_step()
