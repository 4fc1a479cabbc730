"""Whole tensors and table rows of a checkpoint, read without a process group, a part at a time.

Whatever number of ranks saved it, a parameter is put together from the ranks' partitions and a
table's rows come in the order of their ids. Host memory holds one parameter, or one stretch of
rows, at a time.

Shapes: N rows of one stretch, V rows of the table, W columns of a field.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from parallel.checkpoint import Checkpoint, CheckpointError
from parallel.tensor_file import ShardFile
from parallel.zero_state import full_tensors

TABLE = "table-"
"""Kind of a table's rows in a checkpoint, before its name."""

ROWS_BYTES = 64 * 2**20
"""Bytes of rows that are in memory at a time."""


class DenseReader:
    """The dense weights, moments and buffers of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, kind: str = "dense") -> None:
        """Read the state saved under `kind`; raises CheckpointError when there is none."""
        self._checkpoint, self._kind = checkpoint, kind
        self.meta: Mapping[str, Any] = checkpoint.rank_meta_of(0)[kind]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Sizes of every parameter by name."""
        return {name: tuple(entry["shape"]) for name, entry in self.meta["parameters"].items()}

    def parameters(self, moment: str = "fp32") -> Iterator[tuple[str, Tensor]]:
        """Yield (name, fp32 tensor) of every parameter: "fp32", "exp_avg" or "exp_avg_sq"."""
        return full_tensors(
            self.meta, lambda rank: self._checkpoint.shard(self._kind, rank), moment
        )

    def buffers(self) -> dict[str, Tensor]:
        """Return the module's persistent buffers; every rank saved the same."""
        shard = self._checkpoint.shard(self._kind, 0)
        return {name: shard[f"buffer/{name}"] for name in self.meta["buffers"]}


class TableReader:
    """The rows of a table, in the order of their ids.

    Attributes:
        name: of the table.
        rows: V.
        widths: columns of each field by name.
    """

    def __init__(self, checkpoint: Checkpoint, name: str) -> None:
        """Open the shards of every rank that saved; raises CheckpointError."""
        self.name = name
        self._path = checkpoint.path
        self._ranks = [
            _RankRows(checkpoint.shard(TABLE + name, rank)) for rank in range(checkpoint.world)
        ]
        self.rows = sum(rank.rows for rank in self._ranks)
        self.widths = self._ranks[0].widths

    @classmethod
    def all(cls, checkpoint: Checkpoint) -> list[TableReader]:
        """Open every table of a checkpoint."""
        kinds = [kind for kind in checkpoint.kinds if kind.startswith(TABLE)]
        return [cls(checkpoint, kind.removeprefix(TABLE)) for kind in kinds]

    def stretches(self, fields: list[str] | None = None) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield (first id, fields fp32 [N, W]) of stretches of rows, from id 0 on.

        Args:
            fields: which; all of them when None.

        Raises:
            CheckpointError: a row is missing.
        """
        names = list(self.widths) if fields is None else fields
        count = max(1, ROWS_BYTES // (4 * sum(self.widths[name] for name in names)))
        world = len(self._ranks)
        for first in range(0, self.rows, count):
            last = min(first + count, self.rows)
            out = {name: torch.empty(last - first, self.widths[name]) for name in names}
            seen_N = torch.zeros(last - first, dtype=torch.bool)
            for number, rank in enumerate(self._ranks):
                # Local row k of a rank is id k * world + rank: ceil((id - rank) / world).
                low, high = (-((number - id_) // world) for id_ in (first, last))
                place_N = rank.read("ids", low, high) - first
                seen_N[place_N] = True
                for name in names:
                    out[name][place_N] = rank.read(name, low, high)
            if not bool(seen_N.all()):
                missing = first + int((~seen_N).nonzero()[0])
                raise CheckpointError(f"{self._path}: table '{self.name}' lacks row {missing}")
            yield first, out


class _RankRows:
    """The rows that one rank saved, in pieces or in one."""

    def __init__(self, shard: ShardFile) -> None:
        self._shard = shard
        self._pieces = sorted({key.rpartition("/")[0] for key in shard})
        self._starts, self.rows = [], 0
        for piece in self._pieces:
            self._starts.append(self.rows)
            self.rows += shard.shape(self._key(piece, "ids"))[0]
        names = {key.rpartition("/")[2] for key in shard} - {"ids"}
        first = self._pieces[0]
        # The weights first, as in the layout of a row.
        self.widths = {
            name: shard.shape(self._key(first, name))[1]
            for name in sorted(names, key=lambda name: (name != "weight", name))
        }

    def read(self, field: str, start: int, stop: int) -> Tensor:
        """Read local rows [start, stop) of a field, as far as there are any."""
        stop = min(stop, self.rows)
        parts = []
        at = max(bisect_right(self._starts, start) - 1, 0)
        while at < len(self._pieces) and self._starts[at] < stop:
            key, first = self._key(self._pieces[at], field), self._starts[at]
            parts.append(self._shard.rows(key, max(start - first, 0), stop - first))
            at += 1
        if parts:
            return torch.cat(parts)
        width = () if field == "ids" else (self.widths[field],)
        return torch.empty(0, *width, dtype=torch.int64 if field == "ids" else torch.float32)

    @staticmethod
    def _key(piece: str, field: str) -> str:
        return f"{piece}/{field}" if piece else field
