"""Training runs on a row table and on a dense reference, on one rank or several."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint import CheckpointStore
from parallel.mesh import Mesh
from parallel.table_check import (
    Result,
    Run,
    batch_ids,
    dense_reference,
    make_table,
    train,
    train_one,
    whole,
)
from tests.ranks import run_ranks

__all__ = [
    "SINGLE",
    "Result",
    "Run",
    "batch_ids",
    "dense_reference",
    "gathered",
    "make_table",
    "run_all",
    "save_beside_steps",
    "train",
    "train_one",
    "whole",
]

SINGLE = Mesh(0, 1, 0, 1, torch.device("cpu"), 1, 1)


def train_all(mesh: Mesh, runs: list[Run]) -> list[Result]:
    """For run_ranks: several runs in one start of the processes."""
    return [train_one(mesh, run) for run in runs]


def run_all(runs: list[Run], world: int) -> list[list[Result]]:
    """Results [run][rank] of runs at this world size."""
    if world == 1:
        return [[train_one(SINGLE, run)] for run in runs]
    by_rank = run_ranks(train_all, world, runs)
    return [list(results) for results in zip(*by_rank, strict=True)]


def gathered(pieces: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Put the chunks of a snapshot together again; rows that were left out are zero.

    Args:
        pieces: "CHUNK/FIELD" as a snapshot names them; every id must come exactly once.
        rows: of the table.
    """
    fields: dict[str, list[Tensor]] = {}
    for name in sorted(pieces):
        fields.setdefault(name.rpartition("/")[2], []).append(pieces[name])
    joined = {name: torch.cat(parts) for name, parts in fields.items()}
    ids, untouched = joined.pop("ids"), joined.pop("untouched", torch.empty(0, dtype=torch.int64))
    assert sorted([*ids.tolist(), *untouched.tolist()]) == list(range(rows))
    out = {name: torch.zeros(rows, value.shape[1]) for name, value in joined.items()}
    for name, value in joined.items():
        out[name][ids] = value
    return {"ids": torch.arange(rows), **out}


def save_beside_steps(mesh: Mesh, root: Path, run: Run) -> None:
    """Write a checkpoint while steps go on; on the disk is the state of its own step."""
    table = make_table(mesh, run)
    store = CheckpointStore(root, mesh)
    buffers = store.host_buffers(0)
    assert buffers is not None
    train(mesh, run, table, 0, 3)
    expected = {name: value.cpu().clone() for name, value in table.local_state().items()}
    source = table.snapshot(buffers, chunk_bytes=700)
    buffers.wait()
    store.start(3, {"table-t": source}, {}, {})
    train(mesh, run, table, 3, 6)
    store.wait()
    found = store.newest()
    assert found is not None and found.step == 3
    shard = found.shard("table-t", 0)
    saved = gathered({name: shard[name] for name in shard}, run.rows)
    changed = {name: value.cpu() for name, value in table.local_state().items()}
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(saved[name], value), (run.cfg.tier, name)
        assert name == "ids" or not torch.equal(changed[name], value), (run.cfg.tier, name)
    table.close()
    store.close()
