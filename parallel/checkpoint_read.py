"""Whole tensors and table rows of a checkpoint, read without a process group, a part at a time.

Whatever number of ranks saved it, a parameter is put together from the ranks' partitions and a
table's rows come in the order of their ids. Host memory holds one parameter, or one stretch of
rows, at a time.

Shapes: N rows of one stretch, V rows of the table, W columns of a field.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from parallel.checkpoint import Checkpoint, CheckpointError
from parallel.tensor_file import ShardFile
from parallel.zero_state import full_tensors

TABLE = "table-"
"""Kind of a table's rows in a checkpoint, before its name."""

UNTOUCHED = "untouched"
"""Name of the ids, in a piece of their own, of rows that are zero and take no other room."""

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
        for first in range(0, self.rows, count):
            last = min(first + count, self.rows)
            # Rows of which only the ids are saved are zero.
            out = {name: torch.zeros(last - first, self.widths[name]) for name in names}
            seen_N = torch.zeros(last - first, dtype=torch.bool)
            for rank in self._ranks:
                for ids_N, rows in rank.between(first, last, names):
                    place_N = ids_N - first
                    seen_N[place_N] = True
                    for name, rows_NW in rows.items():
                        out[name][place_N] = rows_NW
            if not bool(seen_N.all()):
                missing = first + int((~seen_N).nonzero()[0])
                raise CheckpointError(f"{self._path}: table '{self.name}' lacks row {missing}")
            yield first, out


class _RankRows:
    """The rows that one rank saved, in pieces or in one, each in the order of its ids.

    Rows that no step has touched have their ids alone, in pieces of their own.
    """

    def __init__(self, shard: ShardFile) -> None:
        self._shard = shard
        split = [key.rpartition("/") for key in shard]
        self._ids = [
            _Ids(shard, key)
            for key, (_, _, name) in sorted(zip(shard, split, strict=True))
            if name in ("ids", UNTOUCHED) and shard.shape(key)[0]
        ]
        self.rows = sum(map(len, self._ids))
        sizes = {
            name: shard.shape(key)[1]
            for key, (_, _, name) in zip(shard, split, strict=True)
            if name not in ("ids", UNTOUCHED)
        }
        # The weights first, as in the layout of a row.
        self.widths = dict(sorted(sizes.items(), key=lambda entry: (entry[0] != "weight", entry)))

    def between(
        self, first: int, last: int, fields: list[str]
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield (ids int64 [N], fields [N, W]) of the rows first <= id < last; no field is zero."""
        for ids in self._ids:
            if ids.first < last and ids.last >= first:
                start, stop = bisect_left(ids, first), bisect_left(ids, last)
                piece, slash, name = ids.key.rpartition("/")
                yield (
                    self._shard.rows(ids.key, start, stop),
                    {
                        field: self._shard.rows(f"{piece}{slash}{field}", start, stop)
                        for field in fields
                        if name != UNTOUCHED
                    },
                )


class _Ids(Sequence[int]):
    """The sorted ids of a piece, one at least; those that are asked for are read one by one."""

    def __init__(self, shard: ShardFile, key: str) -> None:
        self.key, self._shard, self._count = key, shard, shard.shape(key)[0]
        self.first, self.last = self[0], self[self._count - 1]

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return int(self._shard.rows(self.key, index, index + 1))
