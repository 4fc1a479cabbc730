"""Ranks that agree on the outcome of work on files, over a process group of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from parallel.checkpoint_files import CheckpointError
from parallel.mesh import Mesh

T = TypeVar("T")


class Agreement:
    """Tells every rank what the others have to say.

    One thread at a time may use it, alike on all ranks; it need not be the main thread: the group
    is over the CPU and nobody else's, so nothing here waits for, or crosses, a collective of
    training.
    """

    def __init__(self, mesh: Mesh) -> None:
        """Make the group; on all ranks together."""
        self.mesh = mesh
        self._group = dist.new_group(backend="gloo") if mesh.world > 1 else None

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def all(self, work: Callable[[], T], undo: Callable[[], str] = lambda: "") -> list[T]:
        """Do each rank's part; return all results by rank.

        Args:
            work: this rank's part.
            undo: rank 0's, when any rank failed; returns what could not be undone.

        Raises:
            CheckpointError: on every rank when any failed, with each one's reason.
        """
        result: T | None = None
        error = ""
        try:
            result = work()
        # Whatever it is, the peers must hear of it, or they would wait for ever.
        except Exception as e:
            what = str(e) if isinstance(e, CheckpointError) else f"{type(e).__name__}: {e}"
            error = f"rank {self.mesh.rank}: {what}"
        answers = self.gather((result, error))
        errors = [text for _, text in answers if text]
        if not errors:
            return [value for value, _ in answers]  # type: ignore[misc]
        undone = undo() if self.mesh.is_first else ""
        # No rank goes on before all is undone.
        errors += [text for text in self.gather(undone) if text]
        raise CheckpointError("\n".join(errors))
