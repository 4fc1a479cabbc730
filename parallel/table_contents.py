"""The rows that a rank owns, as they stand: opened on a tier, drawn, saved and loaded.

Shapes: V rows of the table, W columns of a row, L parts of w = W / L columns, N rows at hand.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from kernels.rows_host import row_kernels
from kernels.rows_step import RowKernels, TorchRows
from parallel.host_buffers import HostBuffers
from parallel.mesh import Mesh, threads_per_rank
from parallel.table_exchange import Exchange
from parallel.table_layout import RowLayout, TableConfig, TableError
from parallel.table_snapshot import CHUNK_BYTES, TableSnapshot
from parallel.table_state import OwnedRows
from parallel.table_tiers import Tier, TierThread, open_memory_tier
from parallel.tensor_file import TensorSource, TensorSpec

log = logging.getLogger(__name__)

STATE_CHUNK_BYTES = 256 * 2**20
DRAW_IDS = 512
"""Ids whose weights are drawn together; part of what a seed means."""


class StoredRows:
    """One rank's rows of a table on their tier; `RowTable` trains them.

    Attributes:
        name: in messages, stats and checkpoints.
        rows: V.
        width: W.
        parts: L.
        cfg: see `TableConfig`.
        mesh: place of this rank.
        layout: fields of a row.
        kernel: implementation that reads and steps rows, "compiled" or "torch".
    """

    def __init__(
        self,
        name: str,
        rows: int,
        width: int,
        mesh: Mesh,
        cfg: TableConfig,
        groups: int,
        ids_from: str,
    ) -> None:
        """Allocate this rank's rows, all zero. A collective call; see `RowTable`."""
        cfg.validate()
        if rows < 1 or width < 1 or groups < 1 or width % groups:
            raise ValueError(
                f"table {name!r}: {rows} rows of {width} columns in {groups} groups cannot be"
            )
        self.name, self.rows, self.width, self.cfg, self.mesh = name, rows, width, cfg, mesh
        self.parts = groups
        self.layout = RowLayout.of(cfg.optimizer, width, groups)
        self._exchange = Exchange(name, rows, mesh, ids_from)
        self._kernels = self._choose_kernels()
        self.kernel = self._kernels.name
        self._tier = self._open_tier()
        self._thread = TierThread(name, self._tier.device, mesh.device)
        self._snapshot: TableSnapshot | None = None
        # Rows that may be other than zero, by the work given to the tier's thread so far.
        self._touched = torch.zeros(self._exchange.local_rows, dtype=torch.bool)

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

    @property
    def snapshot_bytes(self) -> int:
        """Host memory that `snapshot` takes for copies: all fields of rows in a GPU's memory.

        Rows of the other tiers are read where they are.
        """
        if self._tier.device.type == "cpu":
            return 0
        return self._exchange.local_rows * self.layout.columns * 4

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

        Every rank reads all pieces and keeps its own rows.

        Raises:
            TableError: a piece of another layout, an id outside the table or met twice, or rows
                missing at the end.
        """
        self._thread.drain()
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

    @property
    def busy_seconds(self) -> dict[str, float]:
        """Seconds that the table's own thread has worked since the start, by kind of work."""
        return dict(self._thread.seconds)

    def flush(self) -> None:
        """Wait for all reads and updates under way; raises what failed among them."""
        self._thread.drain()

    def close(self) -> None:
        """Finish pending work and give back threads and files."""
        self._thread.close()
        self._tier.close()

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

    def _open_tier(self) -> Tier:
        if self.cfg.tier == "nvme":
            from parallel.table_nvme import open_nvme_tier

            return open_nvme_tier(self._exchange, self.layout, self.cfg, self._kernels)
        device = self.mesh.device if self.cfg.tier == "device" else torch.device("cpu")
        return open_memory_tier(self._exchange, self.layout, device)

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
