"""A run that saves, ends and is started again goes on as if it had never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint import CheckpointStore
from parallel.engine import OffloadConfig
from parallel.mesh import Mesh
from tests.parallel.tiny import TinyModel, build_engine, config, train
from tests.ranks import Ranks, run_ranks


def _run(mesh: Mesh, root: Path, steps: int, seed: int, offload: OffloadConfig) -> dict[str, Any]:
    """Go on from the newest checkpoint to `steps`, and save there."""
    cfg = config(precision="bf16", offload=offload)
    engine = build_engine(TinyModel, cfg, mesh, seed=seed)
    store = CheckpointStore(root, mesh)
    found = store.newest()
    first = 0
    if found is not None:
        own = mesh.rank if found.world == mesh.world else 0
        engine.load_local_state(
            found.shard("dense", own),
            found.rank_meta_of(own)["dense"],
            lambda rank: found.shard("dense", rank),
        )
        first = found.step
    results = train(engine, first, steps)
    tensors, meta = engine.local_state()
    store.save(steps, {"dense": tensors}, {"dense": meta}, {})
    return {"norms": [r.grad_norm for r in results], "lr": engine.lr, "tensors": tensors}


@pytest.mark.parametrize(
    "offload", [OffloadConfig(), OffloadConfig("cpu", "cpu")], ids=["resident", "offloaded"]
)
def test_new_processes_go_on_bitwise(
    two_ranks: Ranks, tmp_path: Path, offload: OffloadConfig
) -> None:
    whole = two_ranks.run(_run, tmp_path / "whole", 6, 0, offload)
    two_ranks.run(_run, tmp_path / "cut", 3, 0, offload)
    resumed = run_ranks(_run, 2, tmp_path / "cut", 6, 1, offload)
    for rank in range(2):
        assert resumed[rank]["norms"] == whole[rank]["norms"][3:]
        assert resumed[rank]["lr"] == whole[rank]["lr"]
        for key, tensor in whole[rank]["tensors"].items():
            assert torch.equal(resumed[rank]["tensors"][key], tensor), key


def test_another_number_of_ranks_goes_on_within_reduction_noise(
    one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    offload = OffloadConfig()
    whole = two_ranks.run(_run, tmp_path / "whole", 6, 0, offload)
    two_ranks.run(_run, tmp_path / "cut", 2, 0, offload)
    one_rank.run(_run, tmp_path / "cut", 4, 1, OffloadConfig("cpu"))
    last = two_ranks.run(_run, tmp_path / "cut", 6, 1, offload)
    assert last[0]["norms"] == pytest.approx(whole[0]["norms"][4:], rel=0.02)
