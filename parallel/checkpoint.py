"""Sharded checkpoints of a run: every rank writes its part, the commit marker comes last.

    store = CheckpointStore(run / "checkpoints", mesh, CheckpointConfig())
    store.save(step, {"dense": tensors}, rank_meta, meta)
    checkpoint = store.newest()             # verified, the same on every rank; None in a new run
    tensors = checkpoint.load("dense")

What a folder looks like is described in `checkpoint_files`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from parallel.checkpoint_files import (
    FORMAT,
    MANIFEST,
    MARKER,
    REPLACED,
    CheckpointError,
    CheckpointInfo,
    ShardFile,
    check_file,
    digest,
    folder_name,
    folders,
    is_committed,
    list_checkpoints,
    rank_file,
    rank_meta_file,
    read_json,
    read_manifest,
    remove,
    sync,
    verify,
    write_json,
    write_tensors,
    write_text,
)
from parallel.mesh import Mesh

__all__ = [
    "Checkpoint",
    "CheckpointConfig",
    "CheckpointError",
    "CheckpointInfo",
    "CheckpointStore",
    "list_checkpoints",
    "verify",
]

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
        every: optimizer steps between two checkpoints; 0 saves only when the run ends or stops.
        keep_last: newest checkpoints that are kept.
        keep_every: those of every so many steps are kept for good; 0 keeps none of them.
    """

    every: int = 100
    keep_last: int = 3
    keep_every: int = 0

    def validate(self) -> None:
        """Raise ValueError, naming the key, when a value cannot be meant."""
        if self.every < 0 or self.keep_every < 0:
            raise ValueError(
                f"checkpoint.every {self.every} and checkpoint.keep_every {self.keep_every} must "
                "not be negative"
            )
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last {self.keep_last} must be at least 1")


class Checkpoint:
    """A committed checkpoint, seen from one rank (or from none, as by the command line).

    Attributes:
        path: its folder.
        step: optimizer steps it was saved after.
        world: ranks that saved it.
        meta: what the run saved once.
        kinds: kinds of tensors that every rank saved.
    """

    def __init__(self, path: Path, rank: int = 0, passed_over: tuple[str, ...] = ()) -> None:
        """Open a committed folder; files are not verified here.

        Args:
            path: the folder.
            rank: whose part `load` and `rank_meta` give.
            passed_over: why newer checkpoints were not taken.

        Raises:
            CheckpointError: no marker, or a damaged manifest.
        """
        manifest = read_manifest(path)
        self.path, self._rank, self.passed_over = path, rank, passed_over
        self.step: int = manifest["step"]
        self.world: int = manifest["world"]
        self.meta: dict[str, Any] = manifest["meta"]
        self.kinds: list[str] = manifest["kinds"]

    def shard(self, kind: str, rank: int) -> ShardFile:
        """Open a saved rank's tensors of one kind, read one by one as they are asked for.

        Raises:
            CheckpointError: no such kind or rank.
        """
        if kind not in self.kinds:
            raise CheckpointError(
                f"{self.path}: holds no '{kind}' state, only {', '.join(self.kinds)}"
            )
        if rank >= self.world:
            raise CheckpointError(
                f"{self.path}: was saved by {self.world} ranks and has nothing of rank {rank}: "
                "assemble its state from the shards of all saved ranks"
            )
        return ShardFile(self.path / rank_file(rank, kind))

    def load(self, kind: str) -> dict[str, Tensor]:
        """Read this rank's tensors of one kind; raises CheckpointError like `shard`."""
        return dict(self.shard(kind, self._rank))

    @property
    def rank_meta(self) -> dict[str, Any]:
        """What this rank saved as plain values."""
        return self.rank_meta_of(self._rank)

    def rank_meta_of(self, rank: int) -> dict[str, Any]:
        """Return what a saved rank saved as plain values."""
        if rank >= self.world:
            raise CheckpointError(f"{self.path}: was saved by {self.world} ranks, not by {rank}")
        return read_json(self.path / rank_meta_file(rank))


class CheckpointStore:
    """The checkpoints of a run, on a file system that all ranks share."""

    def __init__(self, root: Path, mesh: Mesh, cfg: CheckpointConfig | None = None) -> None:
        """Describe the store; on all ranks together. Nothing is created yet.

        Args:
            root: the run's `checkpoints` folder.
            mesh: this rank's place.
            cfg: which checkpoints are kept.
        """
        self.root, self.mesh, self.cfg = root, mesh, cfg or CheckpointConfig()
        self.cfg.validate()
        # A group of its own over the CPU, so that saving never waits in a queue of GPU collectives.
        self._group = dist.new_group(backend="gloo") if mesh.world > 1 else None

    def save(
        self,
        step: int,
        shards: Mapping[str, Mapping[str, Tensor]],
        rank_meta: Mapping[str, Any],
        meta: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint and delete those that need not be kept; on all ranks together.

        Args:
            step: optimizer steps taken so far.
            shards: this rank's tensors by kind (the same kinds on every rank), on the host.
            rank_meta: this rank's plain values, as JSON.
            meta: the run's plain values, as JSON; rank 0's are written.

        Returns:
            The folder, committed and durable.

        Raises:
            CheckpointError: on every rank, naming each rank's file and reason (a full disk, a
                read-only folder …). The unfinished folder is gone, earlier ones are untouched.
        """
        path = self.root / folder_name(step)
        self._all(path, lambda: self._begin(path) if self.mesh.is_first else None)
        ranks = self._all(path, lambda: self._write_rank(path, shards, rank_meta))
        manifest = {
            "format": FORMAT,
            "step": step,
            "world": self.mesh.world,
            "kinds": sorted(shards),
            "files": {name: entry for files in ranks for name, entry in sorted(files.items())},
            "meta": dict(meta),
        }
        self._all(path, lambda: self._commit(path, manifest) if self.mesh.is_first else None)
        if self.mesh.is_first:
            self._prune()
        return path

    def _begin(self, path: Path) -> None:
        if is_committed(path):
            # Kept until the new one is durable.
            replaced = _replaced(path)
            if replaced.exists():
                remove(replaced)
            os.replace(path, replaced)
        elif path.exists():
            remove(path)
        path.mkdir(parents=True)
        sync(self.root)

    def _write_rank(
        self,
        path: Path,
        shards: Mapping[str, Mapping[str, Tensor]],
        rank_meta: Mapping[str, Any],
    ) -> dict[str, dict[str, Any]]:
        rank = self.mesh.rank
        names = {kind: rank_file(rank, kind) for kind in shards}
        entries = {name: write_tensors(path / name, shards[kind]) for kind, name in names.items()}
        name = rank_meta_file(rank)
        entries[name] = write_json(path / name, rank_meta)
        sync(path)
        return entries

    def _commit(self, path: Path, manifest: dict[str, Any]) -> None:
        missing = [
            name
            for rank in range(self.mesh.world)
            for name in (rank_file(rank, kind) for kind in manifest["kinds"])
            if name not in manifest["files"]
        ]
        if missing:
            raise CheckpointError(f"ranks saved different kinds of state: no {', '.join(missing)}")
        write_json(path / MANIFEST, manifest)
        sync(path)
        write_text(path / MARKER, digest(path / MANIFEST))
        sync(path)
        sync(self.root)

    def _prune(self) -> None:
        """Delete what need not be kept; a failure to delete does not spoil the one just written."""
        committed: dict[int, Path] = {}
        surplus: list[Path] = []
        for step, path in folders(self.root):
            if not is_committed(path):
                continue
            if step in committed:
                surplus.append(path)
            else:
                committed[step] = path
        kept = set(list(committed)[: self.cfg.keep_last])
        if self.cfg.keep_every:
            kept |= {step for step in committed if step % self.cfg.keep_every == 0}
        surplus += [path for step, path in committed.items() if step not in kept]
        for path in surplus:
            try:
                remove(path)
            except OSError as e:
                log.warning("old checkpoint %s cannot be deleted: %s", path, e)

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is complete and intact; on all ranks together.

        Every file is hashed, each by one rank. What is passed over is logged as a warning that
        names the bad file, and told in the result's `passed_over`.

        Returns:
            The same checkpoint on every rank; None when none was ever committed.

        Raises:
            CheckpointError: checkpoints were committed, but none is intact.
        """
        found = self._gather([str(p) for _, p in folders(self.root)])[0]
        passed_over: list[str] = []
        damaged = 0
        for path in map(Path, found):
            problems = self._verify_together(path)
            if not problems:
                for text in passed_over:
                    self._warn(f"checkpoint passed over: {text}")
                return Checkpoint(path, self.mesh.rank, tuple(passed_over))
            damaged += any(self._gather(is_committed(path)))
            passed_over.append(problems[0])
        if damaged:
            raise CheckpointError(
                f"{self.root}: none of {damaged} committed checkpoints is intact: "
                f"{'; '.join(passed_over)}. Restore the named files from a copy, or move the "
                "folder away to start again from step 0"
            )
        for text in passed_over:
            self._warn(f"checkpoint ignored: {text}")
        return None

    def discard_after(self, step: int) -> None:
        """Delete every checkpoint of a later step, as a run that is rolled back must."""

        def discard() -> None:
            for found, path in folders(self.root):
                if found > step:
                    remove(path)

        self._all(None, lambda: discard() if self.mesh.is_first else None)

    def _verify_together(self, path: Path) -> list[str]:
        """Return all ranks' problems with a folder, the same list on every rank."""
        problems = []
        try:
            files = read_manifest(path)["files"]
        except CheckpointError as e:
            problems.append(str(e))
        else:
            # Large files first, so that ranks get equal shares.
            names = sorted(files, key=lambda name: (-files[name]["size"], name))
            for name in names[self.mesh.rank :: self.mesh.world]:
                problem = check_file(path / name, files[name])
                if problem:
                    problems.append(problem)
        return [text for rank in self._gather(problems) for text in rank]

    def _warn(self, text: str) -> None:
        if self.mesh.is_first:
            log.warning(text)

    def _gather(self, value: T) -> list[T]:
        """Return every rank's value, by rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _all(self, path: Path | None, work: Callable[[], T]) -> list[T]:
        """Do each rank's part; when any fails, remove `path` and raise on all."""
        result: T | None = None
        error = ""
        try:
            result = work()
        # Whatever it is, the peers must hear of it, or they would wait for ever.
        except Exception as e:
            what = str(e) if isinstance(e, CheckpointError) else f"{type(e).__name__}: {e}"
            error = f"rank {self.mesh.rank}: {what}"
        answers = self._gather((result, error))
        errors = [text for _, text in answers if text]
        if not errors:
            return [value for value, _ in answers]  # type: ignore[misc]
        undone = self._undo(path) if path is not None and self.mesh.is_first else ""
        # No rank goes on before the folder is gone.
        errors += [text for text in self._gather(undone) if text]
        raise CheckpointError("\n".join(errors))

    @staticmethod
    def _undo(path: Path) -> str:
        """Remove an unfinished folder and put back what it was to replace; return what failed."""
        try:
            if path.exists():
                remove(path)
            if _replaced(path).exists():
                os.replace(_replaced(path), path)
        except OSError as e:
            return f"the unfinished folder could not be removed: {e}; it will be ignored"
        return ""


def _replaced(path: Path) -> Path:
    return path.with_name(path.name + REPLACED)
