"""A step costs what its batch's rows do: it looks at no more of the table, nor waits for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels.rows import gather_rows
from kernels.rows_step import TorchRows
from parallel.table_exchange import Exchange, Plan
from parallel.table_gradient import BatchGradient, StepGradient
from parallel.table_layout import TableConfig
from parallel.table_tiers import TierThread
from parallel.tables import RowTable
from tests.parallel.table_runs import SINGLE, Run

BY_INDEX = ("index", "index_select", "index_copy_", "index_fill_", "index_put_", "_index_put_impl_")
"""Operations that reach into their first tensor by index: the rest of it costs nothing."""


class Touched(TorchDispatchMode):
    """Counts the elements that operations of this thread read and write, by name.

    Views cost nothing, and what is indexed as much as is taken from it or put there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Run the operation and count."""
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            name = func.overloadpacket.__name__
            read = tree_leaves((args[1:] if name in BY_INDEX else args, kwargs))
            written = [leaf for leaf in tree_leaves(out) if not args or leaf is not args[0]]
            count = sum(leaf.numel() for leaf in [*read, *written] if isinstance(leaf, Tensor))
            self.elements[name] = self.elements.get(name, 0) + count
        return out


@contextmanager
def opened(cfg: TableConfig, rows: int) -> Iterator[RowTable]:
    """A table whose own work is done by the caller, so that it is counted, too."""
    table = RowTable("t", rows, 64, SINGLE, cfg, groups=2)
    table.flush()
    pool, table._thread._pool = table._thread._pool, None
    yield table
    table._thread._pool = pool
    table.close()


def train(table: RowTable, run: Run, steps: int) -> dict[str, int]:
    """Take steps of two micro-batches each, one of them skipped; return what they touched."""
    with Touched() as touched:
        for step in range(steps):
            for batch in range(2):
                rows = table.fetch(run.ids(step, batch, 0))
                table.prefetch(run.ids(step + batch, 1 - batch, 0))
                gather_rows(rows.whole(), rows.lookup).square().sum().backward()
                table.accumulate(rows)
            table.grad_sq_norm()
            if step == 1:
                table.skip()
            else:
                table.step(0.01)
    return touched.elements


@pytest.mark.parametrize("tier", ["host", "device", "nvme"])
@pytest.mark.parametrize("optimizer", ["adam", "adagrad_rowwise"])
def test_a_step_touches_no_more_of_a_table_16_times_as_large(
    tier: str, optimizer: str, tmp_path: Path
) -> None:
    cfg = TableConfig(
        optimizer=optimizer,  # type: ignore[arg-type]
        tier=tier,  # type: ignore[arg-type]
        nvme_path=str(tmp_path),
        cache_rows=300,
        direct=False,
    )
    run, counts = Run(rows=1024, tokens=300), []
    for rows in (1024, 16 * 1024):
        with opened(cfg, rows) as table:
            counts.append(train(table, run, 4))
            with Touched() as canary:
                table._touched.sum()
            assert canary.elements["sum"] > rows
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 4 * 300 * 64


def test_rows_of_micro_batches_find_their_place_without_a_question_to_the_device() -> None:
    # Tensors of "meta" have no numbers: whoever asks for one, as which rows are new, fails.
    device, shape = torch.device("meta"), (3, 2)
    thread = TierThread("t", device, device)
    gradient = StepGradient(9, shape, device, device, thread, TorchRows())
    for wanted in ([2, 5], [2], [1, 5]):
        plan = Plan(len(wanted), [], [], torch.tensor(wanted), None)
        batch = BatchGradient(Exchange("t", 9, SINGLE), plan, shape, None)
        gradient.begin(batch)
        for k in (2, 1, 0):
            batch.parts[k] = torch.empty(len(wanted), 2, device=device)
            batch.sent(k)
    rows_P, part_of = gradient.rows()
    assert rows_P.tolist() == [2, 5, 1]
    assert [part_of(k).shape for k in range(3)] == [(3, 2)] * 3
    gradient.clear()
    assert bool((gradient._place_of_row == -1).all())
