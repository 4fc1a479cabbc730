"""Sharded checkpoints of a run: every rank writes its part, the commit marker comes last.

    store = CheckpointStore(run / "checkpoints", mesh, CheckpointConfig())
    store.start(step, {"dense": source}, rank_meta, meta)   # goes on beside training
    store.wait()                            # until it is committed; raises what went wrong
    checkpoint = store.newest()             # verified, the same on every rank; None in a new run
    tensors = checkpoint.load("dense")

What a folder looks like is described in `checkpoint_files`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from parallel.agreement import Agreement
from parallel.checkpoint_files import (
    CheckpointError,
    CheckpointInfo,
    check_file,
    folder_name,
    folders,
    is_committed,
    list_checkpoints,
    rank_file,
    rank_meta_file,
    read_json,
    read_manifest,
    remove,
    set_aside,
    verify,
)
from parallel.checkpoint_writer import CheckpointWriter, prune
from parallel.host_buffers import HostBuffers
from parallel.mesh import Mesh
from parallel.tensor_file import ShardFile, TensorSource

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

LOOK_SECONDS = 1.0
"""How often `CheckpointStore.wait` looks whether bytes still move."""


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept.

    Attributes:
        every: optimizer steps between two checkpoints; 0 saves only when the run ends or stops.
        keep_last: newest checkpoints that are kept.
        keep_every: those of every so many steps are kept for good; 0 keeps none of them.
        background: training goes on while a checkpoint is written, from a copy of the weights and
            optimizer states in host memory. Turn off where host memory is short: training then
            waits for the disk. It waits anyway where the copy would not fit, and says so.
    """

    every: int = 100
    keep_last: int = 3
    keep_every: int = 0
    background: bool = True

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
        self._open: dict[Path, ShardFile] = {}

    def shard(self, kind: str, rank: int) -> ShardFile:
        """Open a saved rank's tensors of one kind, read one by one as they are asked for.

        Raises:
            CheckpointError: no such kind or rank, or a file that is no safetensors file.
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
        path = self.path / rank_file(rank, kind)
        if path not in self._open:
            try:
                self._open[path] = ShardFile(path)
            except OSError as e:
                raise CheckpointError(f"{path}: cannot be read: {e}") from e
        return self._open[path]

    def load(self, kind: str) -> dict[str, Tensor]:
        """Read this rank's tensors of one kind; raises CheckpointError like `shard`."""
        return dict(self.shard(kind, self._rank))

    def pieces(self, kind: str, ranks: Iterable[int]) -> Iterator[dict[str, Tensor]]:
        """Yield the rows of a table piece by piece, of the given saved ranks.

        Every piece holds "ids" and the fields of its rows; only one is in memory at a time.
        """
        for rank in ranks:
            shard = self.shard(kind, rank)
            names: dict[str, list[str]] = {}
            for key in shard:
                names.setdefault(key.rpartition("/")[0], []).append(key)
            for piece in sorted(names):
                yield {key.rpartition("/")[2]: shard[key] for key in names[piece]}

    def ranks_with_rows_of(self, rank: int, world: int) -> list[int]:
        """Return the saved ranks that hold rows which now are `rank`'s, of `world` ranks.

        Rows are dealt by id modulo the number of ranks, so that most ranks have none.
        """
        common = math.gcd(self.world, world)
        return [saved for saved in range(self.world) if (saved - rank) % common == 0]

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
        self._ranks = Agreement(mesh)
        self._buffers: HostBuffers | None = None
        self._writing: CheckpointWriter | None = None
        self._seconds = 0.0
        self._aside = self.cfg.background

    def host_buffers(self, needed: int) -> HostBuffers | None:
        """Return memory for copies of `needed` bytes; None when training has to wait instead."""
        if self._buffers is None and self._aside:
            buffers = HostBuffers(self.mesh)
            if buffers.has_room(needed):
                self._buffers = buffers
            else:
                log.warning(
                    "rank %d: no host memory for a copy of %d bytes: training waits while "
                    "checkpoints are written (checkpoint.background: false says so from the start)",
                    *(self.mesh.rank, needed),
                )
                self._aside = False
        return self._buffers

    def start(
        self,
        step: int,
        shards: Mapping[str, TensorSource | Mapping[str, Tensor]],
        rank_meta: Mapping[str, Any],
        meta: Mapping[str, Any],
        before_commit: Callable[[], None] = lambda: None,
        progress: Callable[[], None] = lambda: None,
    ) -> Path:
        """Begin to write a checkpoint; on all ranks together, after `wait`.

        It is written beside training unless a source can only be read now. Checkpoints that need
        not be kept are deleted once it is committed.

        Args:
            step: optimizer steps taken so far.
            shards: this rank's tensors by kind (the same kinds on every rank).
            rank_meta: this rank's plain values, as JSON.
            meta: the run's plain values, as JSON; rank 0's are written.
            before_commit: rank 0 calls it before the checkpoint counts, on the writing thread.
            progress: called now and then while bytes still move, where the caller has to wait.

        Returns:
            The folder that is being written.

        Raises:
            CheckpointError: the checkpoint before could not be written.
        """
        self.wait()
        sources = {
            kind: shard if isinstance(shard, TensorSource) else TensorSource.of(shard)
            for kind, shard in shards.items()
        }
        self._writing = CheckpointWriter(
            self.root / folder_name(step),
            self._ranks,
            sources,
            rank_meta,
            {"step": step, "meta": dict(meta)},
            before_commit=before_commit,
            after_commit=partial(prune, self.root, self.cfg.keep_last, self.cfg.keep_every, step),
            progress=progress,
        )
        if self._aside and all(source.in_memory for source in sources.values()):
            self._writing.start()
        else:
            self._writing.run()
        return self._writing.path

    def wait(self, progress: Callable[[], None] = lambda: None) -> None:
        """Wait until the checkpoint under way is committed and durable.

        Args:
            progress: called now and then while bytes still move, also those of other ranks.

        Raises:
            CheckpointError: on every rank, naming each rank's file and reason (a full disk, a
                read-only folder …). The unfinished folder is gone, earlier ones are untouched.
        """
        writing = self._writing
        if writing is None:
            return
        moved = -1
        while not writing.done.wait(LOOK_SECONDS):
            if writing.moved != moved:
                progress()
            moved = writing.moved
        self._writing = None
        self._seconds += writing.seconds
        if writing.error is not None:
            raise writing.error

    @property
    def failed(self) -> bool:
        """Whether the checkpoint under way could not be written; `wait` says why."""
        return self._writing is not None and self._writing.error is not None

    def written_seconds(self) -> float:
        """Return the seconds of writing that ended since the last call, 0 when none did."""
        if self._writing is not None and self._writing.done.is_set() and not self.failed:
            self.wait()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def save(
        self,
        step: int,
        shards: Mapping[str, TensorSource | Mapping[str, Tensor]],
        rank_meta: Mapping[str, Any],
        meta: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint and wait for it: `start` and `wait`; returns its folder."""
        path = self.start(step, shards, rank_meta, meta)
        self.wait()
        return path

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is complete and intact; on all ranks together.

        Every file is hashed, each by one rank. What is passed over is logged as a warning that
        names the bad file, and told in the result's `passed_over`.

        Returns:
            The same checkpoint on every rank; None when none was ever committed.

        Raises:
            CheckpointError: checkpoints were committed, but none is intact; or the one under way
                could not be written.
        """
        return self.newest_before(None)

    def newest_before(self, step: int | None) -> Checkpoint | None:
        """Return the newest intact checkpoint of an earlier step than `step`; see `newest`."""
        self.wait()
        found = self._ranks.gather([(s, str(p)) for s, p in folders(self.root)])[0]
        passed_over: list[str] = []
        damaged = 0
        for path in [Path(p) for s, p in found if step is None or s < step]:
            problems = self._verify_together(path)
            if not problems:
                for text in passed_over:
                    self._warn(f"checkpoint passed over: {text}")
                return Checkpoint(path, self.mesh.rank, tuple(passed_over))
            damaged += any(self._ranks.gather(is_committed(path)))
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

    def set_aside_newer(self, checkpoint: Checkpoint) -> None:
        """Rename the committed folders that `newest` passed over; on all ranks together.

        The run goes on from `checkpoint`, and soon has others of the same steps: a damaged one must
        not be counted among them when old ones are deleted.

        Raises:
            CheckpointError: one cannot be renamed.
        """

        def work() -> None:
            for _, path in folders(self.root):
                if path == checkpoint.path:
                    return
                if is_committed(path):
                    self._warn(
                        f"{path} is set aside as {set_aside(path).name}: delete it when you have "
                        "no more use for it"
                    )

        self.together(lambda: work() if self.mesh.is_first else None)

    def discard_after(self, step: int) -> None:
        """Delete every checkpoint of a later step, as a run that is rolled back must."""
        self.wait()

        def discard() -> None:
            for found, path in folders(self.root):
                if found > step:
                    remove(path)

        self._ranks.all(lambda: discard() if self.mesh.is_first else None)

    def together(self, work: Callable[[], None]) -> None:
        """Do each rank's part of some work on files; raises CheckpointError on all if one fails."""
        self.wait()
        self._ranks.all(work)

    def close(self) -> None:
        """Give the host memory back; raises what `wait` raises."""
        self.wait()
        if self._buffers is not None:
            self._buffers.close()
            self._buffers = None

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
        return [text for rank in self._ranks.gather(problems) for text in rank]

    def _warn(self, text: str) -> None:
        if self.mesh.is_first:
            log.warning(text)
