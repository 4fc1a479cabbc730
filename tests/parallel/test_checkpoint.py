"""A checkpoint holds what every rank gave it, and is durable before it counts; policy keeps it."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parallel.checkpoint_writer
from parallel.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    CheckpointError,
    CheckpointStore,
    verify,
)
from parallel.mesh import Mesh
from parallel.tensor_file import TensorSource, TensorSpec
from tests.parallel.checkpoints import ALONE, assert_loads, save, saved_alone, steps_of, tensors
from tests.ranks import Ranks

checkpoint: Any = parallel.checkpoint_writer


def _round_trip(mesh: Mesh, root: Path) -> Path:
    store = CheckpointStore(root, mesh)
    assert store.newest() is None
    table = {"rows": torch.full((3,), float(mesh.rank))}
    for step in (5, 10):
        path = save(store, step, **{"table.deepembed": table})
    found = store.newest()
    assert found is not None
    assert_loads(found, 10, mesh.rank)
    assert found.world == 2
    assert found.kinds == ["dense", "table.deepembed"]
    for rank in range(2):
        assert found.shard("table.deepembed", rank)["rows"].tolist() == [rank] * 3
        assert found.rank_meta_of(rank)["cursor"] == [10, rank]
    with pytest.raises(CheckpointError, match="saved by 2 ranks and has nothing of rank 2"):
        found.shard("dense", 2)
    with pytest.raises(CheckpointError, match=r"no 'rng' state, only dense, table.deepembed"):
        found.load("rng")
    return path


def test_every_rank_gets_back_what_it_saved(two_ranks: Ranks, tmp_path: Path) -> None:
    path = two_ranks.run(_round_trip, tmp_path / "checkpoints")[0]
    assert path.name == "step-00000010"
    assert verify(path) == []
    assert {f.name for f in path.iterdir()} == {
        "COMMITTED",
        "manifest.json",
        *(f"rank-0000{r}.{kind}" for r in range(2) for kind in ("dense.safetensors", "json")),
        *(f"rank-0000{r}.table.deepembed.safetensors" for r in range(2)),
    }
    found = Checkpoint(path)
    assert found.meta["tokens"] == 100
    assert_loads(found, 10, 0)


def test_saving_goes_on_beside_the_caller_and_counts_only_when_it_is_over(tmp_path: Path) -> None:
    store, gate = CheckpointStore(tmp_path, ALONE), threading.Event()

    def slow() -> Iterator[Tensor]:
        yield torch.arange(3)
        assert gate.wait(300)
        yield torch.ones(2)

    specs = {
        "a": TensorSpec(torch.int64, (3,)),
        "b": TensorSpec(torch.float32, (2,)),
    }
    closed: list[bool] = []
    source = TensorSource(specs, slow, close=lambda: closed.append(True))
    order: list[str] = []

    def before_commit() -> None:
        order.append(f"committed {steps_of(tmp_path)}")

    store.start(1, {"dense": source}, {}, {"step": 1}, before_commit)
    assert (steps_of(tmp_path), closed, store.written_seconds()) == ([], [], 0.0)
    gate.set()
    store.wait()
    assert (steps_of(tmp_path), closed, order) == ([1], [True], ["committed []"])
    assert store.written_seconds() > 0 == store.written_seconds()
    found = store.newest()
    assert found is not None
    assert [t.tolist() for t in found.load("dense").values()] == [[0, 1, 2], [1.0, 1.0]]


def test_rows_come_piece_by_piece_also_of_the_first_format(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE)
    parts = {"000001/ids": torch.tensor([2]), "000001/weight": torch.ones(1, 2)}
    parts |= {"000000/ids": torch.tensor([0, 1]), "000000/weight": torch.zeros(2, 2)}
    whole = {"ids": torch.arange(3), "weight": torch.ones(3, 2)}
    store.save(1, {"new": parts, "old": whole}, {}, {})
    found = store.newest()
    assert found is not None
    assert [piece["ids"].tolist() for piece in found.pieces("new", [0])] == [[0, 1], [2]]
    assert [piece["weight"].shape for piece in found.pieces("old", [0])] == [(3, 2)]
    found.world = 4
    # Rows of rank 1 of 6 come from those saved ranks whose ids can be 1 modulo 6.
    assert found.ranks_with_rows_of(1, 6) == [1, 3]
    assert found.ranks_with_rows_of(2, 4) == [2]
    assert found.ranks_with_rows_of(0, 3) == [0, 1, 2, 3]


def test_live_state_is_written_before_the_caller_goes_on(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ALONE)
    live = torch.ones(4)
    source = TensorSource({"a": TensorSpec.of(live)}, lambda: iter([live]), in_memory=False)
    store.start(1, {"dense": source}, {}, {"step": 1})
    live.zero_()
    assert steps_of(tmp_path) == [1]
    found = store.newest()
    assert found is not None
    assert found.load("dense")["a"].tolist() == [1.0] * 4


def test_what_is_not_json_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    store = saved_alone(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"manifest.json: only plain values"):
        store.save(2, {"dense": tensors(2)}, {}, {"step": torch.tensor(2)})
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    with pytest.raises(CheckpointError, match="kind 'a/b' cannot be part of a file name"):
        store.save(2, {"a/b": tensors(2)}, {}, {})


def test_keep_policy_keeps_the_last_and_the_round_ones(tmp_path: Path) -> None:
    saved_alone(tmp_path, *range(10, 110, 10), keep_last=2, keep_every=40)
    assert steps_of(tmp_path) == [40, 80, 90, 100]
    saved_alone(tmp_path / "other", *range(10, 60, 10), keep_last=1)
    assert steps_of(tmp_path / "other") == [50]


def test_rolled_back_run_discards_later_checkpoints(tmp_path: Path) -> None:
    store = saved_alone(tmp_path, 1, 2, 3)
    store.discard_after(1)
    assert steps_of(tmp_path) == [1]


def test_newer_format_is_refused_with_both_versions(tmp_path: Path) -> None:
    saved_alone(tmp_path, 1)
    path = tmp_path / "step-00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    entry = checkpoint.write_json(path / "manifest.json", manifest | {"format": 99})
    (path / "COMMITTED").write_text(entry["sha256"])
    with pytest.raises(CheckpointError, match="format 99; this version reads 1, 2, 3"):
        Checkpoint(path)


def test_files_follow_the_umask_and_nothing_is_pickled(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        saved_alone(tmp_path, 1)
    finally:
        os.umask(before)
    for path in (tmp_path / "step-00000001").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
        assert path.suffix in (".safetensors", ".json") or path.name == "COMMITTED"


@pytest.mark.parametrize(
    ("cfg", "key"),
    [({"every": -1}, "checkpoint.every -1"), ({"keep_last": 0}, "checkpoint.keep_last 0")],
)
def test_impossible_policies_are_refused_by_name(cfg: dict[str, int], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        CheckpointConfig(**cfg).validate()


def test_a_later_checkpoint_is_not_counted_when_old_ones_are_deleted(tmp_path: Path) -> None:
    store = saved_alone(tmp_path, 100, keep_last=1)
    for step in (60, 70):
        save(store, step)
        assert steps_of(tmp_path) == [step, 100]


def _save_slowly_on_one_rank(mesh: Mesh, root: Path, background: bool) -> int:
    """Save where rank 1 goes on writing until both have shown three times that they live.

    Returns:
        This rank's signs of life.
    """
    store = CheckpointStore(root, mesh, CheckpointConfig(background=background))
    count = 300 if mesh.rank == 1 else 1
    specs = {str(i): TensorSpec(torch.float32, (2,)) for i in range(count)}
    signs: list[float] = []

    def slowly() -> Iterator[Tensor]:
        for _ in range(count):
            if len(list(root.glob("alive-*"))) < mesh.world:
                time.sleep(0.1)
            yield torch.ones(2)

    def progress() -> None:
        signs.append(time.monotonic())
        if len(signs) == 3:
            (root / f"alive-{mesh.rank}").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("parallel.checkpoint.LOOK_SECONDS", 0.2)
        patch.setattr("parallel.checkpoint_writer.MEET_SECONDS", 0.2)
        patch.setattr("parallel.checkpoint_writer.PROGRESS_SECONDS", 0.2)
        store.start(1, {"dense": TensorSource(specs, slowly)}, {}, {}, progress=progress)
        store.wait(progress)
    return len(signs)


@pytest.mark.parametrize("background", [True, False])
def test_ranks_show_that_they_live_as_long_as_any_of_them_writes(
    two_ranks: Ranks, tmp_path: Path, background: bool
) -> None:
    signs = two_ranks.run(_save_slowly_on_one_rank, tmp_path, background)
    # Rank 0 has finished its own part at once.
    assert min(signs) >= 3
    assert steps_of(tmp_path) == [1]


def test_every_file_and_folder_is_on_the_disk_before_the_marker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        original(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        # With what the folder has at this moment, the file's whole size.
        inside = sorted(p.name for p in path.iterdir()) if path.is_dir() else path.stat().st_size
        synced.append(f"{path.relative_to(tmp_path)} {inside}")

    monkeypatch.setattr(os, "fsync", fsync)
    root = tmp_path / "checkpoints"
    save(CheckpointStore(root, ALONE), 1, table=tensors(2))
    folder = "checkpoints/step-00000001"
    sizes = {p.name: p.stat().st_size for p in (root / "step-00000001").iterdir()}
    assert len(sizes) == 5
    marker = synced.index(f"{folder}/COMMITTED {sizes['COMMITTED']}")
    files = sorted(name for name in sizes if name != "COMMITTED")
    durable = synced[:marker]
    for name in files:
        assert f"{folder}/{name} {sizes[name]}" in durable
    # The names, too: those of the files, that of the folder, and behind the marker its own.
    assert f"{folder} {files}" in durable
    assert "checkpoints ['step-00000001']" in durable
    assert f"{folder} {sorted(sizes)}" in synced[marker + 1 :]
