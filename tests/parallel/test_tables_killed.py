"""A process killed while the nvme tier writes rows back loses nothing that was committed."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
from dataclasses import replace
from pathlib import Path

import torch

from parallel.checkpoint import CheckpointStore
from parallel.table_layout import TableConfig
from parallel.table_nvme import SECTOR, record_bytes
from tests.parallel.table_runs import SINGLE, Run, make_table, train, train_one

STEPS, EVERY = 24, 3


def run_in(folder: Path) -> Run:
    """A run whose cache holds a tenth of its rows: every step writes many back."""
    cfg = TableConfig(
        tier="nvme", nvme_path=str(folder / "nvme"), cache_rows=10, io_threads=4, direct=False
    )
    return Run(cfg, width=300, prefetch="within", accumulation=2, steps=STEPS)


def go_on(folder: Path) -> tuple[int, list[float], dict[str, torch.Tensor], int]:
    """Train from the newest checkpoint to the end, saving beside the steps.

    Returns:
        The step it began at, losses from there on, the rows, and the records written.
    """
    run = run_in(folder)
    store = CheckpointStore(folder / "checkpoints", SINGLE)
    buffers = store.host_buffers(0)
    table = make_table(SINGLE, run)
    found = store.newest()
    if found is not None:
        table.load_shards(found.pieces("table-t", [0]))
    first = 0 if found is None else found.step
    losses: list[float] = []
    for step in range(first, STEPS):
        losses += train(SINGLE, run, table, step, step + 1)
        if (step + 1) % EVERY == 0:
            store.wait()
            source = table.snapshot(buffers, chunk_bytes=5000)
            store.start(step + 1, {"table-t": source}, {}, {})
    store.wait()
    state = {name: value.clone() for name, value in table.local_state().items()}
    written = table._tier.stats["disk_write_bytes"] // record_bytes(table.layout)
    table.close()
    store.close()
    return first, losses, state, written


def die_at_write(folder: Path, moment: int) -> None:
    """Go on until a record is to be written for the `moment`-th time; die with half of it done."""
    count, write = itertools.count(1), os.pwritev

    def torn(file: int, pieces: list[memoryview], at: int) -> int:
        if next(count) < moment:
            return write(file, pieces, at)
        write(file, [pieces[0][:SECTOR]], at)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    os.pwritev = torn  # type: ignore[assignment]
    go_on(folder)


def test_killed_while_rows_are_written_back_it_ends_as_if_nothing_had_happened(
    tmp_path: Path,
) -> None:
    straight = train_one(SINGLE, replace(run_in(tmp_path), cfg=TableConfig()))
    whole = go_on(tmp_path / "whole")
    assert whole[0] == 0 and whole[1] == straight.losses
    writes = whole[3]
    assert writes > 5 * STEPS
    folder, begun = tmp_path / "killed", []
    context = multiprocessing.get_context("spawn")
    # What the second life may write, the first has left to it.
    moments = [random.randint(writes // 4, writes // 2), random.randint(1, writes // 4)]
    print(f"killed at writes {moments} of {writes}")
    for moment in moments:
        victim = context.Process(target=die_at_write, args=(folder, moment))
        victim.start()
        victim.join(400)
        assert victim.exitcode == -signal.SIGKILL
        (left,) = (folder / "nvme").iterdir()
        assert left.stat().st_size > 0
        store = CheckpointStore(folder / "checkpoints", SINGLE)
        found = store.newest()
        begun.append(0 if found is None else found.step)
    first, losses, state, _ = go_on(folder)
    assert first == begun[-1] >= begun[0]
    assert losses == straight.losses[2 * first :]
    assert all(torch.equal(state[name], value) for name, value in straight.state.items())
    assert list((folder / "nvme").iterdir()) == []
