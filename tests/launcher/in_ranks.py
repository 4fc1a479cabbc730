"""Whole runs inside the processes of `tests.ranks`, which saves the start of new ones."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from data.loader import Batch
from kernels import Documents
from launcher import config, pretrain
from launcher.evaluate import evaluating
from launcher.lifecycle import RunFolder, StopReason
from launcher.train import Trainer
from parallel.mesh import Mesh

LENGTHS = [40, 1, 23]


def tokens() -> Tensor:
    """Return some ids to ask a model about, int64 [64]."""
    return torch.randint(512, (64,), generator=torch.Generator().manual_seed(3))


def trainer_of(mesh: Mesh, path: Path, overrides: Sequence[str] = ()) -> Trainer:
    """Do what `tiny-onn pretrain` does until training begins."""
    cfg = pretrain.resolved(config.load(path, list(overrides)))
    folder = RunFolder(Path(cfg.runs) / cfg.name).create()
    pretrain.agree_with_saved(cfg, folder)
    dist.barrier()
    if mesh.is_first:
        config.save(cfg, folder.config)

    def placed(group: int = 1) -> Mesh:
        return dataclasses.replace(mesh, data=mesh.world // group, group=group)

    with mock.patch("launcher.components.init_mesh", placed):
        return Trainer(cfg, folder)


def trained(
    mesh: Mesh, path: Path, overrides: Sequence[str] = (), stop_at: int = 0
) -> dict[str, Any]:
    """Do what `tiny-onn pretrain` does until the end, or until asked to stop after a step.

    Returns:
        The ids of the samples of each step over all ranks ("samples"), and fp32 logits of
        `tokens()` in documents of LENGTHS by the run's own model ("logits"; None where ranks share
        a sequence).
    """
    trainer = trainer_of(mesh, path, overrides)
    c, samples = trainer.c, []
    original = c.loader.next_step

    def next_step() -> list[Batch]:
        batches = original()
        everyone: list[Any] = [None] * mesh.world
        dist.all_gather_object(everyone, [i for batch in batches for i in batch.sample_ids])
        samples.append(sorted({i for ids in everyone for i in ids}))
        return batches

    def requested(step: int) -> StopReason:
        return StopReason.SIGNAL if step == stop_at else StopReason.NONE

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(c.loader, "next_step", next_step))
        stack.enter_context(mock.patch.object(c.stop, "requested", requested))
        assert trainer.train() == ("stopped" if stop_at else "done")
    if c.mesh.group > 1:
        # Its ranks have parts of a sequence only.
        c.close()
        return {"samples": samples, "logits": None}
    ids_T = tokens()
    rows = c.fetch_rows(ids_T)
    with evaluating(c):
        logits = c.engine.forward(
            ids_T,
            None,
            Documents(LENGTHS, torch.device("cpu")),
            torch.ones(()),
            None if rows is None else rows.parts,
            None if rows is None else rows.lookup,
        )
    c.close()
    dist.barrier()
    return {"samples": samples, "logits": logits}
