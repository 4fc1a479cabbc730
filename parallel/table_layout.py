"""What a row of a table consists of: its weights and its optimizer state, by name and width.

Shapes: N rows at hand, W columns of a row's weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from kernels.rows_step import KINDS

OPTIMIZERS = KINDS
TIERS = ("device", "host", "nvme")


class TableError(RuntimeError):
    """A table cannot be built, fed, read or written; the message names it and says what to do."""


@dataclass
class TableConfig:
    """How a row-partitioned table is kept, moved and stepped.

    Attributes:
        optimizer: "adam" (a second moment per element), "adam_rowwise" (one second moment per row)
            or "adagrad_rowwise" (no first moment, one sum of squares per row).
        lr_multiplier: factor on the run's learning rate, for this table.
        betas: decay of the first and second moment of both Adams.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay of touched rows, times the learning rate; 0 is none.
        tier: where an owner keeps its rows: "device" (GPU memory), "host" (machine memory) or
            "nvme" (a file per rank, with the rows in use cached in machine memory).
        transport: what rows and their gradients travel in: "compute" (the run's compute type) or
            "fp32". Master rows and optimizer state are fp32 always.
        nvme_path: folder of the nvme tier's files, on a local disk of every machine.
        cache_rows: rows that the nvme tier keeps in host memory, on each rank; 0 takes a quarter.
        io_threads: threads that read and write the nvme tier.
        kernel: what reads and steps rows in host memory: "compiled" (C++, built once on first use,
            into TORCH_EXTENSIONS_DIR), "torch" (nothing to compile, many times slower) or "auto"
            (compiled on a GPU machine, else torch). Rows on the device always take torch.
        threads: of the compiled kernel; 0 takes the rank's share of the cores, on a GPU machine a
            quarter of it (8 at most).
        direct: open the nvme tier with O_DIRECT. Turn off only where the file system has no
            O_DIRECT (tmpfs): the page cache then takes memory beside the cache of rows.
    """

    optimizer: Literal["adam", "adam_rowwise", "adagrad_rowwise"] = "adam_rowwise"
    lr_multiplier: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    tier: Literal["device", "host", "nvme"] = "host"
    transport: Literal["compute", "fp32"] = "compute"
    nvme_path: str = ""
    cache_rows: int = 0
    io_threads: int = 16
    kernel: Literal["auto", "compiled", "torch"] = "auto"
    threads: int = 0
    direct: bool = True

    def validate(self, name: str = "table") -> None:
        """Raise ValueError, naming the key behind `name`, when a value cannot be meant."""
        for key, value, allowed in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("tier", self.tier, TIERS),
            ("transport", self.transport, ("compute", "fp32")),
            ("kernel", self.kernel, ("auto", "compiled", "torch")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: {key} {value!r} is none of {', '.join(allowed)}")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"{name}: betas {self.betas} must lie in [0, 1)")
        finite = max(self.eps, self.lr_multiplier, self.weight_decay) < math.inf
        if not (finite and self.eps > 0 and self.lr_multiplier >= 0 and self.weight_decay >= 0):
            raise ValueError(
                f"{name}: eps {self.eps} must be positive, lr_multiplier {self.lr_multiplier} and "
                f"weight_decay {self.weight_decay} must not be negative, and all finite"
            )
        if self.cache_rows < 0 or self.io_threads < 1 or self.threads < 0:
            raise ValueError(
                f"{name}: cache_rows {self.cache_rows} and threads {self.threads} must be >= 0, "
                f"io_threads {self.io_threads} must be >= 1"
            )
        if self.tier == "nvme" and not self.nvme_path:
            raise ValueError(f"{name}: tier nvme needs nvme_path, a folder on a local disk")


@dataclass(frozen=True)
class RowLayout:
    """The fp32 fields of a row, in order; "weight" is the first.

    Attributes:
        widths: columns of each field by name.
    """

    widths: Mapping[str, int]

    @classmethod
    def of(cls, optimizer: str, width: int, groups: int) -> RowLayout:
        """Return the fields that `optimizer` needs for rows of `width` weights.

        Args:
            optimizer: one of OPTIMIZERS.
            width: W.
            groups: equal parts of a row, each of which has a second moment of its own in the
                row-wise optimizers; divides `width`.
        """
        return cls(
            {
                "adam": {"weight": width, "exp_avg": width, "exp_avg_sq": width, "steps": 1},
                "adam_rowwise": {
                    "weight": width,
                    "exp_avg": width,
                    "exp_avg_sq": groups,
                    "steps": 1,
                },
                "adagrad_rowwise": {"weight": width, "sum_sq": groups},
            }[optimizer]
        )

    @property
    def columns(self) -> int:
        """Fp32 numbers of one row, all fields together."""
        return sum(self.widths.values())

    @property
    def slices(self) -> dict[str, slice]:
        """Columns of each field when the fields of a row lie side by side."""
        ends = list(accumulate(self.widths.values()))
        return {
            name: slice(end - width, end)
            for (name, width), end in zip(self.widths.items(), ends, strict=True)
        }
