"""Training runs on a row table and on a dense reference, on one rank or several."""

from __future__ import annotations

import torch

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
    "make_table",
    "run_all",
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
