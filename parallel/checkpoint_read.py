"""Whole tensors and table rows of a checkpoint, read without a process group, a part at a time.

Whatever number of ranks saved it, a parameter is put together from the ranks' partitions and a
table's rows come in the order of their ids. Host memory holds one parameter, or one stretch of
rows and the ids of all, at a time.

Shapes: N rows of one stretch, V rows of the table, W columns of a field.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate
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
        for first in range(0, self.rows, count):
            last = min(first + count, self.rows)
            # Rows that no step has touched are zero, and only their ids are saved.
            out = {name: torch.zeros(last - first, self.widths[name]) for name in names}
            seen_N = torch.zeros(last - first, dtype=torch.bool)
            for rank in self._ranks:
                place_N, untouched_N = rank.between(first, last)
                seen_N[untouched_N - first] = True
                if place_N.stop > place_N.start:
                    ids_N = rank.ids[place_N] - first
                    seen_N[ids_N] = True
                    for name in names:
                        out[name][ids_N] = rank.read(name, place_N.start, place_N.stop)
            if not bool(seen_N.all()):
                missing = first + int((~seen_N).nonzero()[0])
                raise CheckpointError(f"{self._path}: table '{self.name}' lacks row {missing}")
            yield first, out


class _RankRows:
    """The rows that one rank saved, in pieces or in one.

    Attributes:
        ids: of the saved rows, ascending.
        untouched: ids of rows that are zero, ascending.
        rows: saved and untouched ones.
        widths: columns of each field by name.
    """

    def __init__(self, shard: ShardFile) -> None:
        self._shard = shard
        fields: dict[str, set[str]] = {}
        for key in shard:
            piece, _, field = key.rpartition("/")
            fields.setdefault(piece, set()).add(field)
        self._pieces = sorted(piece for piece, names in fields.items() if "ids" in names)
        ids = [shard[self._key(piece, "ids")] for piece in self._pieces]
        self._starts = [0, *accumulate(part.shape[0] for part in ids)][:-1]
        self.ids = torch.cat(ids)
        none = [torch.empty(0, dtype=torch.int64)]
        zero = [key for key in sorted(shard) if key.rpartition("/")[2] == "untouched"]
        self.untouched = torch.cat([*none, *(shard[key] for key in zero)])
        self.rows = self.ids.shape[0] + self.untouched.shape[0]
        first = self._pieces[0]
        # The weights first, as in the layout of a row.
        self.widths = {
            name: shard.shape(self._key(first, name))[1]
            for name in sorted(fields[first] - {"ids"}, key=lambda name: (name != "weight", name))
        }

    def between(self, first: int, last: int) -> tuple[slice, Tensor]:
        """Return which of the saved rows have ids first <= id < last, and those untouched."""
        ends = torch.tensor([first, last])
        low, high = torch.searchsorted(self.ids, ends).tolist()
        start, stop = torch.searchsorted(self.untouched, ends).tolist()
        return slice(low, high), self.untouched[start:stop]

    def read(self, field: str, start: int, stop: int) -> Tensor:
        """Read the saved rows start … stop - 1 of a field."""
        parts = []
        at = max(bisect_right(self._starts, start) - 1, 0)
        while at < len(self._pieces) and self._starts[at] < stop:
            key, first = self._key(self._pieces[at], field), self._starts[at]
            parts.append(self._shard.rows(key, max(start - first, 0), stop - first))
            at += 1
        return torch.cat(parts)

    @staticmethod
    def _key(piece: str, field: str) -> str:
        return f"{piece}/{field}" if piece else field
