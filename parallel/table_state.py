"""Which rows of a saved table are a rank's own, whatever number of ranks saved it.

Shapes: N rows of a piece that this rank owns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.mesh import Mesh
from parallel.table_layout import RowLayout, TableError


class OwnedRows:
    """Picks a rank's rows out of pieces of state, and sees that each comes exactly once."""

    def __init__(self, name: str, rows: int, mesh: Mesh, layout: RowLayout) -> None:
        """Pick the rows of `mesh.rank` of the table `name` of `rows` rows."""
        self.name, self.rows, self.mesh, self.layout = name, rows, mesh, layout
        self._seen = torch.zeros(len(range(mesh.rank, rows, mesh.world)), dtype=torch.bool)

    def of(self, shard: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the local rows int64 [N] that this rank owns in `shard`, and their fields.

        Raises:
            TableError: another layout, an id outside the table, or a row that came before.
        """
        self._check(shard)
        ids = shard["ids"].cpu()
        mine = (ids % self.mesh.world == self.mesh.rank).nonzero()[:, 0]
        local_N = ids[mine] // self.mesh.world
        self._take(local_N)
        whole = mine.shape[0] == ids.shape[0]
        return local_N, {
            name: shard[name] if whole else shard[name].index_select(0, mine.to(shard[name].device))
            for name in self.layout.widths
        }

    def untouched(self, ids: Tensor) -> Tensor:
        """Return the local rows int64 [N] that this rank owns of those saved as zero.

        Raises:
            TableError: an id outside the table, or a row that came before.
        """
        self._check_ids(ids)
        mine = ids[ids % self.mesh.world == self.mesh.rank] // self.mesh.world
        self._take(mine)
        return mine

    def _take(self, local_N: Tensor) -> None:
        if bool(self._seen[local_N].any()) or torch.unique(local_N).shape[0] != local_N.shape[0]:
            raise TableError(
                f"table {self.name!r}: the state holds a row twice; give the pieces of one "
                "checkpoint only"
            )
        self._seen[local_N] = True

    def require_all(self) -> None:
        """Raise TableError when rows of this rank have not come."""
        if bool(self._seen.all()):
            return
        missing = (~self._seen).nonzero()[:, 0]
        raise TableError(
            f"table {self.name!r}: the state lacks {missing.shape[0]} of the "
            f"{self._seen.shape[0]} rows of rank {self.mesh.rank}, the first is id "
            f"{int(missing[0]) * self.mesh.world + self.mesh.rank}; give the pieces of all ranks "
            "of one checkpoint"
        )

    def _check(self, shard: dict[str, Tensor]) -> None:
        names = {"ids", *self.layout.widths}
        if set(shard) != names:
            raise TableError(
                f"table {self.name!r}: the state has the fields {sorted(shard)}, the optimizer "
                f"needs {sorted(names)}; resume with the optimizer it was saved with"
            )
        ids = shard["ids"]
        self._check_ids(ids)
        for name, width in self.layout.widths.items():
            if shard[name].shape != (ids.shape[0], width) or shard[name].dtype != torch.float32:
                raise TableError(
                    f"table {self.name!r}: field {name!r} of the state is {shard[name].dtype} "
                    f"{tuple(shard[name].shape)}, expected torch.float32 {(ids.shape[0], width)}; "
                    "resume with the sizes it was saved with"
                )

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.rows):
            raise TableError(
                f"table {self.name!r}: the state has ids {int(ids.min())}..{int(ids.max())}, the "
                f"table has {self.rows} rows; resume with the vocabulary it was saved with"
            )
