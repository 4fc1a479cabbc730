"""Small checkpoints for tests, and what they hold."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from parallel.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    CheckpointStore,
    list_checkpoints,
)
from parallel.mesh import Mesh

ALONE = Mesh(0, 1, 0, 1, torch.device("cpu"), 1, 1)


def tensors(step: int, rank: int = 0, size: int = 1000) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {
        "weight": torch.randn(size, generator=generator),
        "half": torch.randn(7, 3, generator=generator).bfloat16(),
        "empty": torch.empty(0),
        "scalar": torch.tensor(step),
    }


def save(store: CheckpointStore, step: int, **shards: dict[str, Tensor]) -> Path:
    rank = store.mesh.rank
    kinds = {"dense": tensors(step, rank), **shards}
    return store.save(step, kinds, {"cursor": [step, rank]}, {"step": step, "tokens": 10 * step})


def saved_alone(root: Path, *steps: int, **cfg: int) -> CheckpointStore:
    store = CheckpointStore(root, ALONE, CheckpointConfig(**cfg))
    for step in steps:
        save(store, step)
    return store


def steps_of(root: Path) -> list[int]:
    return [info.step for info in list_checkpoints(root) if info.committed]


def assert_loads(found: Checkpoint, step: int, rank: int) -> None:
    assert found.step == found.meta["step"] == step
    assert found.rank_meta == {"cursor": [step, rank]}
    loaded = found.load("dense")
    for name, tensor in tensors(step, rank).items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor), name
