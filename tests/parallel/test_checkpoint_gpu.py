"""Saving beside steps on a GPU: written is the state of its step; the loop waits for the copy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parallel.checkpoint import CheckpointStore
from parallel.engine import OffloadConfig
from parallel.mesh import Mesh
from parallel.table_layout import TableConfig
from tests.parallel.table_runs import Run, save_beside_steps
from tests.parallel.tiny import TinyModel, build_engine, config, train
from tests.ranks import Ranks

pytest.importorskip("deepspeed")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

WIDTH = 4096


@pytest.fixture(scope="module")
def gpu_rank() -> Iterator[Ranks]:
    with Ranks(1, "cuda") as ranks:
        yield ranks


class Wide(TinyModel):
    """About 50 M weights: 600 MB of state."""

    def __init__(self) -> None:
        super().__init__(width=WIDTH)


def _save_beside(mesh: Mesh, root: Path) -> list[str]:
    lines = []
    for name, offload in (("device", OffloadConfig()), ("host", OffloadConfig("cpu"))):
        engine = build_engine(Wide, config(precision="bf16", offload=offload), mesh)
        train(engine, 0, 2)
        store = CheckpointStore(root / name, mesh)
        for save in (1, 2, 3):
            expected, _ = engine.local_state()
            torch.cuda.synchronize()
            start = time.perf_counter()
            buffers = store.host_buffers(engine.snapshot_bytes)
            assert buffers is not None
            source, meta = engine.snapshot(buffers)
            buffers.wait()
            blocked = time.perf_counter() - start
            store.start(save, {"dense": source}, {"dense": meta}, {})
            # Steps change every weight while the files are written.
            train(engine, 2 * save, 2 * save + 2)
            store.wait()
            found = store.newest()
            assert found is not None and found.step == save
            saved = found.load("dense")
            assert saved.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(saved[key], tensor), (name, save, key)
            lines.append(
                f"state on the {name}, {engine.snapshot_bytes / 2**20:.0f} MiB, save {save}: "
                f"waited {1000 * blocked:.1f} ms, wrote for {store.written_seconds():.2f} s"
            )
        store.close()
    return lines


def test_what_is_written_beside_steps_is_the_state_of_its_own(
    gpu_rank: Ranks, tmp_path: Path
) -> None:
    for line in gpu_rank.run(_save_beside, tmp_path, timeout=800)[0]:
        print(line)


def _tables(mesh: Mesh, root: Path) -> None:
    for tier in ("device", "host"):
        save_beside_steps(mesh, root / tier, Run(TableConfig(tier=tier)))  # type: ignore[arg-type]


def test_table_on_either_side_is_written_as_of_its_step(gpu_rank: Ranks, tmp_path: Path) -> None:
    gpu_rank.run(_tables, tmp_path, timeout=300)
