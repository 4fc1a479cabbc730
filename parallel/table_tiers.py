"""Where an owner keeps its rows: the memory tiers, and what every tier must offer.

A tier shows rows as `fields` addressed by slots. In memory a slot is the local row itself; the nvme
tier (`table_nvme.py`) first brings the rows into slots of its cache.

Shapes: N distinct rows of one call, W columns of their weights.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import psutil
import torch
from torch import Tensor

from parallel.table_exchange import Exchange
from parallel.table_layout import RowLayout, TableError
from parallel.table_memory import bind, cores_near, host_memory, on_cores

RESERVE = 0.1
"""Share of the free memory that tables leave to the rest of the run."""

Result = TypeVar("Result")

Fields = dict[str, Tensor]
"""Fp32 tensors of rows by name of the field."""


class Tier(Protocol):
    """Rows of one owner. Not thread-safe: one thread at a time, see `TierThread`.

    Attributes:
        device: where `fields` live.
        layout: fields of a row.
        fields: fp32 [slots, width] by name.
        chunk_rows: rows that one call of `slots` may ask for.
        stats: counters since the start, for what they are worth to this tier.
    """

    device: torch.device
    layout: RowLayout
    fields: Fields
    chunk_rows: int
    stats: dict[str, int]

    def slots(self, index_N: Tensor, *, write: bool, held_N: Tensor | None = None) -> Tensor:
        """Bring rows (distinct, at most `chunk_rows`) in; return their slots, int64 [N].

        The slots hold until the next call; with `write`, what is put there is kept. Rows `held_N`
        are needed soon and do not leave for these, where there is room for both.
        """

    def peek(self, index_N: Tensor) -> Fields:
        """Return copies of the rows' fields, without disturbing which rows are kept close."""

    def poke(self, index_N: Tensor, fields: Fields) -> None:
        """Overwrite rows (distinct) with these fields."""

    def views(self) -> Fields | None:
        """Return all rows' fields without a copy, in order of local rows, where they exist."""

    def close(self) -> None:
        """Give back files and threads."""


class MemoryTier:
    """All rows in one arena, in host or device memory; each field is contiguous."""

    def __init__(
        self,
        rows: int,
        layout: RowLayout,
        device: torch.device,
        cores: frozenset[int] = frozenset(),
    ) -> None:
        """Allocate `rows` zero rows; pages are touched, so that a lack of memory shows here.

        Args:
            rows: local rows.
            layout: fields of a row.
            device: whose memory.
            cores: whose node host memory is taken from; none to leave it to the kernel.
        """
        self.device = device
        self.layout = layout
        arena = zeros(rows * layout.columns, device, cores)
        parts = torch.split(arena, [rows * width for width in layout.widths.values()])
        self.fields: Fields = {
            name: part.view(rows, width)
            for (name, width), part in zip(layout.widths.items(), parts, strict=True)
        }
        self.chunk_rows = max(1, rows)
        self.stats: dict[str, int] = {}

    def slots(self, index_N: Tensor, *, write: bool, held_N: Tensor | None = None) -> Tensor:
        """Return the rows themselves: slot and row are the same here."""
        return index_N

    def peek(self, index_N: Tensor) -> Fields:
        """Return copies of the rows' fields."""
        return {name: field.index_select(0, index_N) for name, field in self.fields.items()}

    def poke(self, index_N: Tensor, fields: Fields) -> None:
        """Overwrite rows with these fields."""
        for name, field in self.fields.items():
            field.index_copy_(0, index_N, fields[name].to(self.device))

    def views(self) -> Fields:
        """Return the fields themselves."""
        return self.fields

    def close(self) -> None:
        """Do nothing: memory is freed with the object."""


def zeros(numel: int, device: torch.device, cores: frozenset[int]) -> Tensor:
    """Return fp32 zeros, touched; in host memory from `host_memory`, near these cores."""
    if device.type != "cpu" or numel == 0:
        return torch.zeros(numel, dtype=torch.float32, device=device)
    arena = torch.frombuffer(host_memory(4 * numel), dtype=torch.float32)
    return on_cores(cores, arena.zero_)


class TierThread:
    """Runs a tier's work one after another, in the order it was given, away from the caller.

    Order is what keeps prefetching exact: a read given after an update sees the update. After a
    failure nothing more runs, and every later call raises it, so that training stops.

    Attributes:
        seconds: time spent by kind of work, since the start.
    """

    def __init__(self, name: str, tier: torch.device, compute: torch.device) -> None:
        """Work for the table `name` whose fields live on `tier`, for a rank that uses `compute`.

        A device tier's work is queued on the GPU by the caller: the GPU keeps the order there. That
        of the others stays on the cores of the GPU's node.
        """
        self.failure: BaseException | None = None
        self.seconds: dict[str, float] = {}
        self._pool: ThreadPoolExecutor | None = None
        if tier.type == "cpu":
            self._pool = ThreadPoolExecutor(
                1,
                thread_name_prefix=f"table-{name}",
                initializer=partial(_begin, compute, cores_near(compute)),
            )

    def submit(self, work: Callable[[], Result], kind: str = "other") -> Future[Result]:
        """Queue `work`; raises the failure of earlier work. Its time counts as `kind`'s."""
        self.check()
        if self._pool is not None:
            return self._pool.submit(self._run, work, kind)
        done: Future[Result] = Future()
        done.set_result(self._run(work, kind))
        return done

    def check(self) -> None:
        """Raise when earlier work failed."""
        if self.failure is not None:
            raise self.failure

    def drain(self) -> None:
        """Wait until all work given so far is done; raises its failure."""
        self.submit(lambda: None).result()

    def close(self) -> None:
        """Wait for the work and end the thread; does not raise."""
        if self._pool is not None:
            self._pool.shutdown()

    def _run(self, work: Callable[[], Result], kind: str) -> Result:
        self.check()
        start = time.perf_counter()
        try:
            with torch.no_grad():
                return work()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start


def _begin(device: torch.device, cores: frozenset[int]) -> None:
    bind(cores)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def available_host_bytes() -> int:
    """Return host memory that this process may still take: the machine's, or its control group's.

    Slurm and containers limit a job below what the machine reports as free. Control groups of both
    versions are looked at; memory of files that can be dropped counts as free.
    """
    available = int(psutil.virtual_memory().available)
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = root / path.lstrip("/")
        # A parent's limit holds for its children too.
        for group in (folder, *folder.parents):
            available = min(available, _free_in_group(group, *files))
    return available


def _free_in_group(group: Path, limit_file: str, used_file: str, droppable: str) -> int:
    if not (group / limit_file).is_file() or not (group / used_file).is_file():
        return sys.maxsize
    limit = (group / limit_file).read_text().strip()
    if limit == "max":
        return sys.maxsize
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(limit) - int((group / used_file).read_text()) + int(stat.get(droppable, 0))


def refuse_unless_fits(
    exchange: Exchange, kind: str, needed: int, available: int, remedy: str
) -> None:
    """Raise TableError on all ranks when the ranks that share a resource ask more than it has.

    A collective call.

    Args:
        exchange: of the table.
        kind: the resource, such as "host memory"; ranks of one machine share it.
        needed: bytes that this rank will take.
        available: bytes that the resource still has for all of them together.
        remedy: what the user may change.
    """
    machine = socket.gethostname()
    answers = exchange.gather_objects((machine, kind, needed, available))
    for resource in sorted({answer[:2] for answer in answers}):
        same = [answer for answer in answers if answer[:2] == resource]
        wanted, free = sum(a[2] for a in same), min(a[3] for a in same)
        if wanted > free:
            raise TableError(
                f"table {exchange.name!r} does not fit: {len(same)} rank(s) on {resource[0]} need "
                f"{wanted:,} bytes ({wanted / 2**30:.2f} GiB) of {resource[1]}, {free:,} bytes "
                f"({free / 2**30:.2f} GiB) are available; {remedy}"
            )


def open_memory_tier(exchange: Exchange, layout: RowLayout, device: torch.device) -> MemoryTier:
    """Check that the rows of all ranks fit, then allocate. A collective call."""
    needed = exchange.local_rows * layout.columns * 4
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        kind, remedy = f"memory of {device}", "use tier host or nvme, or more ranks"
    else:
        free = available_host_bytes()
        kind, remedy = "host memory", "use tier nvme, a row-wise optimizer, or more machines"
    refuse_unless_fits(exchange, kind, needed, int(free * (1 - RESERVE)), remedy)
    return MemoryTier(exchange.local_rows, layout, device, cores_near(exchange.mesh.device))
