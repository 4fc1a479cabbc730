"""Writing one checkpoint, every rank its part, on a thread beside training or on the caller's."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from parallel.agreement import Agreement
from parallel.checkpoint_files import (
    FORMAT,
    MANIFEST,
    MARKER,
    REPLACED,
    CheckpointError,
    digest,
    folders,
    is_committed,
    rank_file,
    rank_meta_file,
    remove,
    sync,
    write_error,
    write_json,
    write_tensors,
    write_text,
)
from parallel.tensor_file import TensorSource

log = logging.getLogger(__name__)

MEET_SECONDS = 10.0
"""While ranks still write, they tell each other so about this often: who has finished his part then
knows that the wait is not a hang."""

PROGRESS_SECONDS = 1.0
"""Least time between two calls of `progress`."""

NICENESS = 10
"""Of the writing thread: on a machine without a core to spare, training goes first."""


class CheckpointWriter:
    """One checkpoint on its way to the disk.

    Attributes:
        path: its folder.
        moved: bytes that this rank has written so far, and those that it knows its peers have.
        seconds: of the writing, once it is done.
        error: why it failed, the same on all ranks; None while it runs and when it went well.
        done: set when it is over, either way.
    """

    def __init__(
        self,
        path: Path,
        ranks: Agreement,
        shards: Mapping[str, TensorSource],
        rank_meta: Mapping[str, Any],
        manifest: Mapping[str, Any],
        *,
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[], None] = lambda: None,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Describe what to write; nothing is written yet.

        Args:
            path: folder of the step.
            ranks: all ranks; used from the writing thread until `done`.
            shards: this rank's tensors by kind, the same kinds on every rank; closed at the end.
            rank_meta: this rank's plain values, as JSON.
            manifest: step and meta; rank 0's are written.
            before_commit: rank 0 calls it before the commit marker is written.
            after_commit: rank 0 calls it behind that.
            progress: `run` calls it now and then while bytes still move, on its caller's thread;
                `start` does not.
        """
        self.path, self.moved, self.seconds = path, 0, 0.0
        self.error: Exception | None = None
        self.done = threading.Event()
        self._ranks, self._shards, self._rank_meta = ranks, shards, rank_meta
        self._manifest, self._before, self._after = manifest, before_commit, after_commit
        self._progress = progress
        self._written = self._peers = 0
        self._met = self._told = time.monotonic()

    def start(self) -> None:
        """Write on a thread of its own."""
        # A beat from there would hide that the thread that trains hangs.
        self._progress = lambda: None
        # A daemon: a run that fails must not wait for a peer that is gone.
        threading.Thread(target=self._run_aside, name="checkpoint", daemon=True).start()

    def run(self) -> None:
        """Write; what goes wrong is kept in `error`."""
        start = time.perf_counter()
        try:
            self._write()
        # Raised by `CheckpointStore.wait` on the thread that trains.
        except Exception as e:
            self.error = e
        finally:
            for source in self._shards.values():
                source.close()
            self.seconds = time.perf_counter() - start
            self.done.set()

    def _run_aside(self) -> None:
        thread = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, max(now, NICENESS))
        self.run()

    def _write(self) -> None:
        first = self._ranks.mesh.is_first
        self._all(lambda: self._begin() if first else None)
        entries = self._all(self._write_together)
        files = {name: entry for rank in entries for name, entry in sorted(rank.items())}
        self._all(lambda: self._commit(files) if first else None)
        if first:
            self._after()

    def _all(self, work: Callable[[], Any]) -> list[Any]:
        return self._ranks.all(work, self._undo)

    def _begin(self) -> None:
        path = self.path
        try:
            if is_committed(path):
                # Kept until the new one is durable.
                replaced = _replaced(path)
                if replaced.exists():
                    remove(replaced)
                os.replace(path, replaced)
            elif path.exists():
                remove(path)
            path.mkdir(parents=True)
            sync(path.parent)
        except OSError as e:
            raise write_error(path, e) from e

    def _write_together(self) -> dict[str, dict[str, Any]]:
        """Write this rank's part, and wait for the others' while they still write."""
        try:
            return self._write_rank()
        finally:
            while not self._meet(finished=True):
                pass

    def _write_rank(self) -> dict[str, dict[str, Any]]:
        rank = self._ranks.mesh.rank
        names = {kind: rank_file(rank, kind) for kind in self._shards}
        entries = {
            name: write_tensors(self.path / name, self._shards[kind], self._count)
            for kind, name in names.items()
        }
        name = rank_meta_file(rank)
        entries[name] = write_json(self.path / name, self._rank_meta)
        sync(self.path)
        return entries

    def _count(self, written: int) -> None:
        self._written += written
        self._move()
        if time.monotonic() - self._met > MEET_SECONDS:
            self._meet(finished=False)

    def _meet(self, finished: bool) -> bool:
        """Hear how far all ranks are; returns whether all of them have finished their part."""
        answers = self._ranks.gather((self._written, finished))
        self._peers = sum(written for written, _ in answers) - self._written
        self._met = time.monotonic()
        self._move()
        return all(done for _, done in answers)

    def _move(self) -> None:
        moved, self.moved = self.moved, self._written + self._peers
        if self.moved != moved and time.monotonic() - self._told > PROGRESS_SECONDS:
            self._told = time.monotonic()
            self._progress()

    def _commit(self, files: Mapping[str, Any]) -> None:
        world, kinds = self._ranks.mesh.world, sorted(self._shards)
        names = [rank_file(rank, kind) for rank in range(world) for kind in kinds]
        missing = [name for name in names if name not in files]
        if missing:
            raise CheckpointError(f"ranks saved different kinds of state: no {', '.join(missing)}")
        manifest = {"format": FORMAT, "world": world, "kinds": kinds, "files": files}
        write_json(self.path / MANIFEST, {**manifest, **self._manifest})
        sync(self.path)
        self._before()
        write_text(self.path / MARKER, digest(self.path / MANIFEST))
        sync(self.path)
        sync(self.path.parent)

    def _undo(self) -> str:
        """Remove the unfinished folder and put back what it was to replace; return what failed."""
        try:
            if self.path.exists():
                remove(self.path)
            if _replaced(self.path).exists():
                os.replace(_replaced(self.path), self.path)
        except OSError as e:
            return f"the unfinished folder could not be removed: {e}; it will be ignored"
        return ""


def _replaced(path: Path) -> Path:
    return path.with_name(path.name + REPLACED)


def prune(root: Path, keep_last: int, keep_every: int, newest: int) -> None:
    """Delete what need not be kept; a failure to delete does not spoil the one just written.

    Args:
        root: folder of the checkpoints.
        keep_last: newest checkpoints to keep.
        keep_every: those of every so many steps are kept; 0 keeps none of them.
        newest: step just written. Later ones neither count nor are deleted: the run went on from
            an earlier one.
    """
    committed: dict[int, Path] = {}
    surplus: list[Path] = []
    for step, path in folders(root):
        if step > newest or not is_committed(path):
            continue
        if step in committed:
            surplus.append(path)
        else:
            committed[step] = path
    kept = set(list(committed)[:keep_last])
    if keep_every:
        kept |= {step for step in committed if step % keep_every == 0}
    surplus += [path for step, path in committed.items() if step not in kept]
    for path in surplus:
        try:
            remove(path)
        except OSError as e:
            log.warning("old checkpoint %s cannot be deleted: %s", path, e)
