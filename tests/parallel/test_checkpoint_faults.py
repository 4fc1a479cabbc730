"""A checkpoint counts only when complete and intact; nothing that goes wrong costs an older one."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import parallel.checkpoint_writer
from parallel.checkpoint import (
    CheckpointError,
    CheckpointStore,
    list_checkpoints,
    verify,
)
from parallel.mesh import Mesh
from tests.parallel.checkpoints import ALONE, assert_loads, save, saved_alone, steps_of, tensors
from tests.ranks import RankError, Ranks

checkpoint: Any = parallel.checkpoint_writer


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
        two_ranks.run(_kill_before_marker, tmp_path, victim)
    assert steps_of(tmp_path) == [1, 2, 3]
    answers = two_ranks.run(_newest, tmp_path)
    assert [step for step, _ in answers] == [3, 3]


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


def test_failure_beside_the_caller_is_told_by_the_next_call(tmp_path: Path) -> None:
    store = saved_alone(tmp_path, 1)
    (tmp_path / "step-00000002").touch()
    store.start(2, {"dense": tensors(2)}, {}, {})
    deadline = time.monotonic() + 120
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
