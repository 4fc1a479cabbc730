"""The nvme tier: one record per row in a file, and the rows in use cached in host memory.

A record holds a row's weights and optimizer state side by side, then its checksum, padded to whole
512-byte sectors. Reads and writes go straight between the file and the slots of the cache
(O_DIRECT, page-aligned memory, a pool of threads). Rows change in the cache and are written when
they leave it. The file is scratch: a run that starts makes it anew and fills it from a checkpoint,
so a process killed while writing loses nothing that was committed.

Shapes: N distinct rows of one call.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from kernels.rows_step import RowKernels
from parallel.table_cache import SlotCache
from parallel.table_exchange import Exchange
from parallel.table_layout import RowLayout, TableConfig, TableError
from parallel.table_memory import cores_near, host_memory, on_cores
from parallel.table_tiers import RESERVE, Fields, available_host_bytes, refuse_unless_fits

log = logging.getLogger(__name__)

SECTOR = 512

Move = Callable[[int, list[memoryview], int], int]
"""os.preadv or os.pwritev."""


class RecordFile:
    """Fixed-size records in a file that one rank owns alone; thread-safe for distinct rows."""

    def __init__(self, path: Path, rows: int, record_bytes: int, cfg: TableConfig) -> None:
        """Create the file with room for all records.

        Raises:
            TableError: another process holds the file, the disk lacks the room, or the file system
                refuses O_DIRECT.
        """
        self.path, self.rows, self.record_bytes = path, rows, record_bytes
        flags = os.O_RDWR | os.O_CREAT | (os.O_DIRECT if cfg.direct else 0)
        try:
            self._file = os.open(path, flags, 0o644)
        except OSError as error:
            if error.errno == errno.EINVAL and cfg.direct:
                raise TableError(
                    f"{path}: the file system has no O_DIRECT; put nvme_path on a local disk, or "
                    "set direct: false"
                ) from error
            raise TableError(
                f"{path}: {error.strerror}; set nvme_path to a writable folder"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._file, 0)
            if rows:
                # Blocks are taken now: a full disk shows before training, not in the middle of it.
                os.posix_fallocate(self._file, 0, rows * record_bytes)
        except OSError as error:
            os.close(self._file)
            raise TableError(
                f"{path}: another process uses this file; give each run its own nvme_path"
                if error.errno in (errno.EAGAIN, errno.EACCES)
                else f"{path}: no room for {rows * record_bytes:,} bytes: {error.strerror}; free "
                "disk space or choose another nvme_path"
            ) from error
        self._pool = ThreadPoolExecutor(cfg.io_threads, thread_name_prefix=path.stem)
        self._threads = cfg.io_threads

    def read(self, rows: list[int], buffer: memoryview, places: list[int]) -> None:
        """Read records `rows` to the given places (in records) of a page-aligned buffer.

        Raises:
            TableError: an error of the device, or fewer bytes than a record.
        """
        self.exchange([-1] * len(rows), rows, buffer, places)

    def write(self, rows: list[int], buffer: memoryview, places: list[int]) -> None:
        """Write records from the given places of a page-aligned buffer; raises TableError."""
        self.exchange(rows, [-1] * len(rows), buffer, places)

    def close(self) -> None:
        """End the threads and remove the file, which means nothing without this process."""
        self._pool.shutdown()
        self.path.unlink(missing_ok=True)
        os.close(self._file)

    def exchange(
        self, leaving: list[int], coming: list[int], buffer: memoryview, places: list[int]
    ) -> None:
        """Write record `leaving[i]` from a place, then read record `coming[i]` to it; -1 is none.

        Reads and writes of different places overlap.
        """
        size = self.record_bytes

        def part(start: int) -> None:
            for i in range(start, len(places), self._threads):
                piece = buffer[places[i] * size : (places[i] + 1) * size]
                if leaving[i] >= 0:
                    self._move("wrote", os.pwritev, leaving[i], piece)
                if coming[i] >= 0:
                    self._move("read", os.preadv, coming[i], piece)

        for done in [self._pool.submit(part, i) for i in range(min(self._threads, len(places)))]:
            done.result()

    def _move(self, verb: str, move: Move, row: int, piece: memoryview) -> None:
        size = self.record_bytes
        try:
            moved = move(self._file, [piece], row * size)
        except OSError as error:
            raise TableError(
                f"{self.path}: record of local row {row}: {error.strerror}; training stops, resume "
                "from the last checkpoint on a sound disk"
            ) from error
        if moved != size:
            raise TableError(
                f"{self.path}: {verb} {moved} of the {size} bytes of local row {row}; the file was "
                "cut or the disk is full: resume from the last checkpoint"
            )


class Checksums:
    """Checksums of records: multiply-add over 64-bit words, modulo 2**64, salted with the row.

    Every word has an odd factor of its own, so a change of one word never goes unseen, a record
    from another place neither; longer damage escapes once in about 2**64.
    """

    def __init__(self, words: int, kernels: RowKernels) -> None:
        """Check records of `words` 64-bit words, the last of which is the checksum."""
        self._kernels = kernels
        generator = torch.Generator().manual_seed(20261123)
        self._factors_R = torch.ones(words, dtype=torch.int64)
        self._factors_R[:-1] = (
            torch.randint(-(2**62), 2**62, (words - 1,), generator=generator, dtype=torch.int64)
            .mul_(2)
            .add_(1)
        )

    def of(self, index_N: Tensor, words_SR: Tensor, places_N: Tensor) -> Tensor:
        """Return the checksums int64 [N] of the records at these places, rows `index_N`."""
        salt_N = (index_N + 1) * 0x9E3779B97F4A7C1
        return self._kernels.checksum(words_SR, places_N, self._factors_R) + salt_N


class NvmeTier:
    """Rows of one owner in a `RecordFile`, reached through a `SlotCache` in host memory."""

    def __init__(
        self,
        path: Path,
        rows: int,
        layout: RowLayout,
        cfg: TableConfig,
        kernels: RowKernels,
        cores: frozenset[int] = frozenset(),
    ) -> None:
        """Make the file and the cache; every row is zero and takes no reading until it is written.

        Args:
            path: of the file.
            rows: local rows.
            layout: fields of a row.
            cfg: cache_rows, io_threads and direct.
            kernels: count checksums.
            cores: whose node the cache's memory is taken from; none to leave it to the kernel.
        """
        self.device = torch.device("cpu")
        self.layout, self.rows, self.path = layout, rows, path
        self.record_bytes = record_bytes(layout)
        cached = cache_rows(cfg, rows)
        self.chunk_rows = max(1, cached)
        self._file = RecordFile(path, rows, self.record_bytes, cfg)
        self._buffer, self._words_SR = self._records(cached)
        # Touched now, so that a lack of memory shows here.
        on_cores(cores, self._words_SR.zero_)
        self._checksums = Checksums(self._words_SR.shape[1], kernels)
        self._cache = SlotCache(rows, cached)
        self._written = torch.zeros(rows, dtype=torch.bool)
        self.fields: Fields = self._fields(self._words_SR)
        self.stats = {
            "cache_hits": 0,
            "cache_misses": 0,
            "disk_read_bytes": 0,
            "disk_write_bytes": 0,
        }

    def slots(self, index_N: Tensor, *, write: bool, held_N: Tensor | None = None) -> Tensor:
        """Bring rows into the cache; return their slots, int64 [N]."""
        if index_N.shape[0] > self.chunk_rows:
            raise ValueError(f"{index_N.shape[0]} rows at once, the cache takes {self.chunk_rows}")
        slots_N, absent_N = self._cache.find(index_N)
        absent = absent_N.nonzero()[:, 0]
        self.stats["cache_hits"] += index_N.shape[0] - absent.shape[0]
        self.stats["cache_misses"] += absent.shape[0]
        if absent.shape[0]:
            free_N, leaving_N, dirty_N = self._cache.evict(
                absent.shape[0], self._kept(slots_N[~absent_N], absent.shape[0], held_N)
            )
            coming_N = index_N[absent]
            self._exchange(torch.where(dirty_N, leaving_N, -1), coming_N, free_N)
            self._cache.put(coming_N, free_N)
            slots_N[absent] = free_N
        self._cache.touch(slots_N, write=write)
        return slots_N

    def _kept(self, used_N: Tensor, absent: int, held_N: Tensor | None) -> Tensor:
        """Return the slots that must stay: those in use and, where there is room, those held."""
        if held_N is None:
            return used_N
        held_slots = self._cache.find(held_N)[0]
        kept = torch.unique(torch.cat((used_N, held_slots[held_slots >= 0])))
        return kept if kept.shape[0] + absent <= self._cache.size else used_N

    def peek(self, index_N: Tensor) -> Fields:
        """Return copies of the rows' fields; what the cache holds does not change."""
        buffer, words_NR = self._records(index_N.shape[0])
        slots_N, absent_N = self._cache.find(index_N)
        absent = absent_N.nonzero()[:, 0]
        written = self._written[index_N[absent]]
        read, fresh = absent[written], absent[~written]
        self._file.read(index_N[read].tolist(), buffer, read.tolist())
        words_NR[fresh] = 0
        self._verify(index_N[read], words_NR, read)
        words_NR[~absent_N] = self._words_SR[slots_N[~absent_N]]
        return self._fields(words_NR)

    def poke(self, index_N: Tensor, fields: Fields) -> None:
        """Overwrite rows in the cache."""
        for at in range(0, index_N.shape[0], self.chunk_rows):
            part = slice(at, at + self.chunk_rows)
            slots = self.slots(index_N[part], write=True)
            for name, field in self.fields.items():
                field.index_copy_(0, slots, fields[name][part].to(self.device))

    def views(self) -> None:
        """Return nothing: most rows are on the disk."""

    def close(self) -> None:
        """Remove the file; the cache goes with the object."""
        self._file.close()

    def _exchange(self, leaving_N: Tensor, coming_N: Tensor, slots_N: Tensor) -> None:
        """Write rows from slots of the cache (-1: none) and read others in their place."""
        written_N = self._written[coming_N]
        out = (leaving_N >= 0).nonzero()[:, 0]
        if out.shape[0]:
            rows, slots = leaving_N[out], slots_N[out]
            self._words_SR[slots, -1] = self._checksums.of(rows, self._words_SR, slots)
            self.stats["disk_write_bytes"] += out.shape[0] * self.record_bytes
        self._file.exchange(
            leaving_N.tolist(),
            torch.where(written_N, coming_N, -1).tolist(),
            self._buffer,
            slots_N.tolist(),
        )
        self._written[leaving_N[out]] = True
        # What was never written is zero.
        self._words_SR[slots_N[~written_N]] = 0
        self._verify(coming_N[written_N], self._words_SR, slots_N[written_N])

    def _verify(self, index_N: Tensor, words_SR: Tensor, places_N: Tensor) -> None:
        self.stats["disk_read_bytes"] += index_N.shape[0] * self.record_bytes
        sums_N = self._checksums.of(index_N, words_SR, places_N)
        wrong = (sums_N != words_SR[places_N, -1]).nonzero()[:, 0]
        if wrong.shape[0]:
            row = int(index_N[wrong[0]])
            raise TableError(
                f"{self.path}: the record of local row {row} (byte {row * self.record_bytes}) does "
                f"not match its checksum, {wrong.shape[0]} of {index_N.shape[0]} read with it do "
                "not; training stops, resume from the last checkpoint and check the disk"
            )

    def _records(self, count: int) -> tuple[memoryview, Tensor]:
        """Return page-aligned memory of `count` records, as bytes and as words int64 [count, R]."""
        memory = host_memory(max(1, count) * self.record_bytes)
        words = torch.frombuffer(memory, dtype=torch.int64)
        return memoryview(memory), words.view(-1, self.record_bytes // 8)[:count]

    def _fields(self, words_NR: Tensor) -> Fields:
        numbers = words_NR.view(torch.float32)
        return {name: numbers[:, columns] for name, columns in self.layout.slices.items()}


def record_bytes(layout: RowLayout) -> int:
    """Return the bytes of a record: the fields, a 64-bit checksum, padded to whole sectors."""
    return -(-(4 * layout.columns + 8) // SECTOR) * SECTOR


def cache_rows(cfg: TableConfig, rows: int) -> int:
    """Return how many of a rank's `rows` are cached: as configured, else a quarter; at least 1."""
    return min(max(1, cfg.cache_rows or -(-rows // 4)), max(1, rows))


def open_nvme_tier(
    exchange: Exchange, layout: RowLayout, cfg: TableConfig, kernels: RowKernels
) -> NvmeTier:
    """Check that file and cache of all ranks fit, then make them. A collective call."""
    folder = Path(cfg.nvme_path)
    folder.mkdir(parents=True, exist_ok=True)
    rows, size = exchange.local_rows, record_bytes(layout)
    path = folder / f"{exchange.name}-rank{exchange.mesh.rank}.rows"
    # What an earlier run left behind gives its room to this one: the rank's own file is made anew,
    # those of ranks that this machine no longer has are removed.
    left = path.stat().st_blocks * 512 if path.exists() else 0
    dead = _left_by_others(exchange, folder)
    refuse_unless_fits(
        exchange,
        f"disk {folder.stat().st_dev}, which holds {folder}",
        rows * size - left - sum(other.stat().st_blocks * 512 for other in dead),
        shutil.disk_usage(folder).free,
        "free disk space, choose another nvme_path, a row-wise optimizer, or more machines",
    )
    for other in dead:
        log.info("%s: left by a run that was killed, removed", other)
        other.unlink(missing_ok=True)
    # Also the moment behind which all ranks may take the room: the next agreement of them all.
    refuse_unless_fits(
        exchange,
        "host memory for the cache",
        cache_rows(cfg, rows) * size,
        int(available_host_bytes() * (1 - RESERVE)),
        "set a smaller cache_rows",
    )
    return NvmeTier(path, rows, layout, cfg, kernels, cores_near(exchange.mesh.device))


def _left_by_others(exchange: Exchange, folder: Path) -> list[Path]:
    """Return the table's files of ranks that are not on this machine, if no process uses them.

    A run that was killed leaves its files, also those of ranks that a later one with fewer ranks,
    or with its ranks on other machines, never opens. The first rank of every machine looks. Where
    machines share the folder, files of ranks that are about to make theirs anew may be among them.
    """
    mesh = exchange.mesh
    if mesh.local_rank:
        return []
    ours = range(mesh.rank, mesh.rank + mesh.local_world)
    dead = []
    for path in sorted(folder.glob(f"{glob.escape(exchange.name)}-rank*.rows")):
        rank = re.search(r"-rank(\d+)\.rows$", path.name)
        if rank is not None and int(rank[1]) not in ours and not _in_use(path):
            dead.append(path)
    return dead


def _in_use(path: Path) -> bool:
    """Whether a process holds a file's lock; one that cannot be opened is left alone, too."""
    try:
        file = os.open(path, os.O_RDWR)
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
