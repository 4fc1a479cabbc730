"""A checkpoint counts only when complete and intact; nothing that goes wrong costs an older one."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
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
    list_checkpoints,
    verify,
)
from parallel.mesh import Mesh
from parallel.tensor_file import TensorSource, TensorSpec
from tests.ranks import RankError, Ranks

checkpoint: Any = parallel.checkpoint_writer
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


def truncate(path: Path) -> str:
    os.truncate(path, path.stat().st_size - 1)
    return r"bytes instead of"


def flip_a_bit(path: Path) -> str:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)
    return r"SHA-256 \w+… is not \w+…"


def delete(path: Path) -> str:
    path.unlink()
    return "missing"


DAMAGES = [truncate, flip_a_bit, delete]


def _newest(mesh: Mesh, root: Path) -> tuple[int, tuple[str, ...]]:
    found = CheckpointStore(root, mesh).newest()
    assert found is not None
    assert_loads(found, found.step, mesh.rank)
    return found.step, found.passed_over


def _save_three(mesh: Mesh, root: Path) -> None:
    store = CheckpointStore(root, mesh)
    for step in (1, 2, 3):
        save(store, step)


def test_damaged_shard_is_named_and_the_one_before_is_used_by_all_ranks(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    two_ranks.run(_save_three, tmp_path / "whole")
    for damage in DAMAGES:
        root = tmp_path / damage.__name__
        shutil.copytree(tmp_path / "whole", root)
        name = "rank-00001.dense.safetensors"
        problem = damage(root / "step-00000003" / name)
        answers = two_ranks.run(_newest, root)
        assert answers[0] == answers[1]
        step, passed_over = answers[0]
        assert step == 2
        with pytest.raises(AssertionError, match=rf"step-00000003/{name}: .*{problem}"):
            raise AssertionError(*passed_over)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["rank-00000.json", "manifest.json"])
def test_damage_anywhere_is_found_by_verify_and_warned_of(
    tmp_path: Path, damage: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = saved_alone(tmp_path, 1, 2)
    file = tmp_path / "step-00000002" / name
    damage(file)
    problems = verify(file.parent)
    assert len(problems) == 1
    assert problems[0].startswith(str(file))
    with caplog.at_level(logging.WARNING):
        found = store.newest()
    assert found is not None
    assert_loads(found, 1, 0)
    assert f"checkpoint passed over: {file}" in caplog.text


def test_run_with_only_damaged_checkpoints_never_starts_again_from_zero(tmp_path: Path) -> None:
    store = saved_alone(tmp_path, 1, 2)
    for step in (1, 2):
        truncate(tmp_path / f"step-0000000{step}" / "rank-00000.dense.safetensors")
    with pytest.raises(
        CheckpointError, match=r"(?s)none of 2 committed .*step-00000001/rank-.*Restore the named"
    ):
        store.newest()


def test_folder_without_marker_is_ignored_and_reported_and_replaced_when_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = saved_alone(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "COMMITTED").unlink()
    (tmp_path / "step-00000002" / "left-over").touch()
    assert [(i.step, i.committed) for i in list_checkpoints(tmp_path)] == [(1, True), (2, False)]
    found = store.newest()
    assert found is not None
    assert found.step == 1
    assert "step-00000002: has no COMMITTED marker" in caplog.text
    save(store, 2)
    assert not (tmp_path / "step-00000002" / "left-over").exists()
    again = store.newest()
    assert again is not None
    assert_loads(again, 2, 0)


def test_folder_without_marker_alone_is_a_new_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = saved_alone(tmp_path, 1)
    (tmp_path / "step-00000001" / "COMMITTED").unlink()
    assert store.newest() is None
    assert "checkpoint ignored" in caplog.text


def _kill_before_marker(mesh: Mesh, root: Path, victim: str) -> None:
    """Die, as by SIGKILL, when the file of this name is about to be written."""
    original = checkpoint.write_text, checkpoint.write_tensors, checkpoint.write_json

    def deadly(write: Any) -> Any:
        def run(path: Path, *args: Any) -> Any:
            if path.name == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, *args)

        return run

    checkpoint.write_text, checkpoint.write_tensors, checkpoint.write_json = map(deadly, original)
    save(CheckpointStore(root, mesh), 4)


@pytest.mark.parametrize(
    "victim", ["COMMITTED", "manifest.json", "rank-00001.json", "rank-00000.dense.safetensors"]
)
def test_rank_killed_while_saving_leaves_the_checkpoint_before(
    two_ranks: Ranks, tmp_path: Path, victim: str
) -> None:
    two_ranks.run(_save_three, tmp_path)
    with pytest.raises(RankError, match="ended without a result"):
        two_ranks.run(_kill_before_marker, tmp_path, victim, timeout=60)
    assert steps_of(tmp_path) == [1, 2, 3]
    answers = two_ranks.run(_newest, tmp_path)
    assert [step for step, _ in answers] == [3, 3]


def _save_on_full_disk(mesh: Mesh, root: Path) -> str:
    store = CheckpointStore(root, mesh)
    save(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mesh.rank == 1:
        # The kernel then refuses to grow a file as it does on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as raised:
            save(store, 2, large=tensors(2, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps_of(root) == [1]
    save(store, 3)
    found = store.newest()
    assert found is not None
    assert found.step == 3
    return str(raised.value)


def test_full_disk_is_told_on_every_rank_and_costs_no_other_checkpoint(
    two_ranks: Ranks, tmp_path: Path
) -> None:
    for message in two_ranks.run(_save_on_full_disk, tmp_path):
        with pytest.raises(
            AssertionError,
            match=r"^rank 1: .*step-00000002/rank-00001.large.safetensors: cannot be written: "
            r"File too large \([\d,]+ bytes free there\)\. Free some space",
        ):
            raise AssertionError(message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_saving_goes_on_beside_the_caller_and_counts_only_when_it_is_over(tmp_path: Path) -> None:
    store, gate = CheckpointStore(tmp_path, ALONE), threading.Event()

    def slow() -> Iterator[Tensor]:
        yield torch.arange(3)
        assert gate.wait(30)
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


def test_failure_beside_the_caller_is_told_by_the_next_call(tmp_path: Path) -> None:
    store = saved_alone(tmp_path, 1)
    (tmp_path / "step-00000002").touch()
    store.start(2, {"dense": tensors(2)}, {}, {})
    deadline = time.monotonic() + 30
    while not store.failed and time.monotonic() < deadline:
        time.sleep(0.01)
    with pytest.raises(
        CheckpointError, match=r"step-00000002: cannot be written: .* the checkpoints before are "
    ):
        store.start(3, {"dense": tensors(3)}, {}, {})
    assert steps_of(tmp_path) == [1]
    (tmp_path / "step-00000002").unlink()
    save(store, 3)
    assert steps_of(tmp_path) == [1, 3]


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = CheckpointStore(tmp_path / "file" / "checkpoints", ALONE)
    with pytest.raises(
        CheckpointError,
        match=r"rank 0: .*/file/checkpoints/step-00000002: cannot be written: Not a directory",
    ):
        save(store, 2)


def test_read_only_folder_is_named_with_its_own_remedy() -> None:
    # A file system that root cannot write to, either.
    store = CheckpointStore(Path("/sys/tiny-onn/checkpoints"), ALONE)
    with pytest.raises(
        CheckpointError,
        match=r"/sys/.*/step-00000002: cannot be written: .*Make the folder writable",
    ):
        save(store, 2)


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


def test_saving_a_step_again_keeps_the_old_one_until_the_new_one_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = saved_alone(tmp_path, 1, 2)

    def full(*_: Any) -> None:
        raise CheckpointError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", full)
        with pytest.raises(CheckpointError, match="no space"):
            save(store, 2)
    assert steps_of(tmp_path) == [1, 2]
    assert verify(tmp_path / "step-00000002") == []

    # Killed between the files and the marker: the one that was to be replaced still counts.
    os.replace(tmp_path / "step-00000002", tmp_path / "step-00000002.replaced")
    shutil.copytree(tmp_path / "step-00000002.replaced", tmp_path / "step-00000002")
    (tmp_path / "step-00000002" / "COMMITTED").unlink()
    found = store.newest()
    assert found is not None
    assert_loads(found, 2, 0)

    save(store, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert verify(tmp_path / "step-00000002") == []


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


def test_damaged_newest_ones_are_set_aside_and_cost_no_new_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = saved_alone(tmp_path, 10, 20, keep_last=1, keep_every=10)
    truncate(tmp_path / "step-00000020" / "rank-00000.dense.safetensors")
    found = store.newest()
    assert found is not None and found.step == 10
    # Whoever only reads changes nothing.
    assert steps_of(tmp_path) == [10, 20]
    store.set_aside_newer(found)
    assert steps_of(tmp_path) == [10]
    assert (tmp_path / "damaged-step-00000020" / "COMMITTED").exists()
    assert "step-00000020 is set aside as damaged-step-00000020" in caplog.text
    for step in (13, 16):
        save(store, step)
        assert steps_of(tmp_path) == [10, step]
    # The same step again.
    save(store, 20)
    truncate(tmp_path / "step-00000020" / "rank-00000.dense.safetensors")
    again = store.newest()
    assert again is not None
    store.set_aside_newer(again)
    assert {p.name for p in tmp_path.iterdir()} == {
        "step-00000010",
        "damaged-step-00000020",
        "damaged-step-00000020.2",
    }


def test_a_later_checkpoint_is_not_counted_when_old_ones_are_deleted(tmp_path: Path) -> None:
    store = saved_alone(tmp_path, 100, keep_last=1)
    for step in (60, 70):
        save(store, step)
        assert steps_of(tmp_path) == [step, 100]


def _save_slowly_on_one_rank(mesh: Mesh, root: Path, background: bool) -> int:
    """Save where rank 1 takes two seconds longer; returns the signs of life that came meanwhile."""
    store = CheckpointStore(root, mesh, CheckpointConfig(background=background))
    count = 20 if mesh.rank == 1 else 1
    specs = {str(i): TensorSpec(torch.float32, (2,)) for i in range(count)}
    signs: list[float] = []

    def slowly() -> Iterator[Tensor]:
        for _ in range(count):
            time.sleep(0.1)
            yield torch.ones(2)

    def progress() -> None:
        signs.append(time.monotonic())

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
    # Rank 0 has finished its own part after 0.1 s.
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
