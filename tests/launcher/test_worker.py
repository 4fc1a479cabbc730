"""Evaluation and generation read the run folder that they are given, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher import config, worker
from launcher.lifecycle import RunFolder
from launcher.resume import restore_to_read
from parallel.checkpoint import CheckpointError, CheckpointStore
from parallel.mesh import Mesh
from tests.launcher.tiny import tiny_config


class BuiltError(Exception):
    """Ends a worker where it would build the model."""


@pytest.mark.parametrize("verb", ["evaluate", "follow", "generate"])
def test_a_run_that_was_moved_is_read_where_it_is(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_config(tmp_path, tmp_path / "corpus")
    moved = RunFolder(tmp_path / "elsewhere").create()
    config.save(config.load(path), moved.config)
    asked: list[Path] = []

    def build(cfg: config.RunConfig, folder: RunFolder, checkpoints: Path) -> Any:
        asked.extend((folder.root, checkpoints))
        raise BuiltError

    monkeypatch.setattr(worker, "build", build)
    with pytest.raises(BuiltError):
        worker.run([str(moved.config), verb, json.dumps({"step": None})])
    held = moved.root / "evaluation" / "held"
    assert asked == [
        moved.root / "evaluation",
        held if verb == "follow" else moved.checkpoints,
    ]
    assert not (tmp_path / "runs").exists()


def test_a_run_without_a_checkpoint_has_no_model(tmp_path: Path) -> None:
    mesh = Mesh(0, 1, 0, 1, torch.device("cpu"), 1, 1)
    store = CheckpointStore(tmp_path, mesh)
    run: Any = SimpleNamespace(store=store, mesh=mesh)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no committed checkpoint, so there is"):
        restore_to_read(run)
