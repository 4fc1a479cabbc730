"""What the training loop does when a rank cannot read its data, at the end, and behind spikes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from data.index import DataError
from data.loader import Batch
from launcher import train
from launcher.spikes import SpikeError
from launcher.summary import facts
from launcher.train import Trainer
from parallel.mesh import Mesh
from tests.launcher.in_ranks import trainer_of
from tests.launcher.test_metrics import events, scalar
from tests.launcher.tiny import rows, tiny_config, tiny_corpus
from tests.ranks import run_ranks
from tiny_onn.dynmoe import DynMoe

OPTIONS = ["--train.steps", "9", "--train.evaluate_every", "2", "--train.sample_every", "0"]
OPTIONS += ["--checkpoint.every", "2", "--checkpoint.keep_last", "9", "--spikes.patience", "3"]
# Training waits for the disk.
OPTIONS += ["--checkpoint.background", "false"]


def _train_without_held_out_data(trainer: Trainer) -> tuple[str, int]:
    """Train where rank 1 cannot read its second held-out batch.

    Returns:
        What is said, and how often a sign of life came from the one checkpoint that is written.
    """
    loader, watchdog = trainer.c.loader, trainer.c.watchdog
    original, beat, signs = loader.evaluation_batches, watchdog.beat, list[str]()

    def noted(step: int, doing: str = "step") -> None:
        signs.append(doing)
        beat(step, doing)

    def broken(sequences: int = 0) -> Iterator[Batch]:
        yield next(original(sequences))
        raise DataError("validation/shard.00000.mds is damaged")

    with contextlib.ExitStack() as stack:
        if trainer.c.mesh.rank == 1:
            stack.enter_context(mock.patch.object(loader, "evaluation_batches", broken))
        stack.enter_context(mock.patch.object(watchdog, "beat", noted))
        stack.enter_context(mock.patch("parallel.checkpoint_writer.PROGRESS_SECONDS", 0.0))
        with pytest.raises(DataError) as raised:
            trainer.train()
    return str(raised.value), signs.count("checkpoint")


def _spiking(trainer: Trainer, *steps: int) -> Any:
    """Take these steps for spikes, once each."""
    c, coming = trainer.c, list(steps)

    def judge(loss: float, norm: float) -> str:
        if c.step + 1 in coming:
            coming.remove(c.step + 1)
            return "made up"
        return ""

    return mock.patch.object(c.spikes, "_judge", judge)


def _controllers(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Copy what the experts' controllers hold, and what they have counted of a step."""
    state, counts = [], []
    for layer in (m for m in model.modules() if isinstance(m, DynMoe)):
        for name, value in layer.named_buffers(recurse=False):
            (counts if name in ("counts_X", "seen_X") else state).append(value.clone())
    return state, counts


def _roll_back_and_lose_the_data(
    trainer: Trainer,
) -> tuple[str, dict[int, list[int]], list[tuple[bool, bool]]]:
    """Go back behind spikes, over a checkpoint, and lose a shard before the next one.

    Returns:
        What is said; this rank's samples of the first time that each step was taken; and of each
        step whether it was skipped and whether the experts' controllers moved.
    """
    loader, taken = trainer.c.loader, dict[int, list[int]]()
    original, update = loader.next_step, train.update_controllers
    moves: list[tuple[bool, bool]] = []

    def update_controllers(model: nn.Module, rewrite: Any, *, skipped: bool) -> None:
        before, counted = _controllers(model)
        assert any(bool(count.any()) for count in counted)
        update(model, rewrite, skipped=skipped)
        after, left = _controllers(model)
        if skipped:
            assert not any(bool(count.any()) for count in left)
        moves.append((skipped, not all(map(torch.equal, before, after))))

    def next_step() -> list[Batch]:
        step = trainer.c.step + 1
        if trainer.c.mesh.rank == 1 and step == 6 and 6 in taken:
            raise DataError("train/shard.00000.mds is damaged")
        batches = original()
        taken.setdefault(step, [i for batch in batches for i in batch.sample_ids])
        return batches

    with (
        _spiking(trainer, 5, 6, 7),
        mock.patch.object(loader, "next_step", next_step),
        mock.patch.object(train, "update_controllers", update_controllers),
        pytest.raises(DataError) as raised,
    ):
        trainer.train()
    return str(raised.value), taken, moves


def _give_up(trainer: Trainer) -> str:
    """Spike again where going back is not allowed; returns what is said."""
    trainer.c.cfg.spikes.max_rollbacks = 0
    with _spiking(trainer, 7, 8, 9), pytest.raises(SpikeError) as raised:
        trainer.train()
    return str(raised.value)


def _train(mesh: Mesh, path: Path) -> dict[str, Any]:
    trainer = trainer_of(mesh, path, OPTIONS)
    out: dict[str, Any] = {}
    said, out["signs"] = _train_without_held_out_data(trainer)
    out["held_out"] = said, trainer.c.step
    said, out["taken"], out["moves"] = _roll_back_and_lose_the_data(trainer)
    out["lost"] = said, trainer.c.step
    out["gave_up"] = _give_up(trainer)
    # The last try was killed between its last checkpoint and its end.
    out["ends"] = [trainer.train(), trainer.train()]
    trainer.c.close()
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("train")
    path = tiny_config(folder, tiny_corpus(folder / "text"))
    return folder / "runs" / "tiny", run_ranks(_train, 2, path, timeout=300)


def committed(run: Path) -> list[int]:
    return sorted(int(p.parent.name[5:]) for p in run.glob("checkpoints/step-*/COMMITTED"))


def test_held_out_data_that_a_rank_cannot_read_stops_all_with_a_checkpoint(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    run, results = trained
    kept = "\nstopped after step 2; a checkpoint of step 2 is kept"
    assert results[0]["held_out"] == (f"another rank cannot read its held-out data{kept}", 2)
    assert results[1]["held_out"] == (f"validation/shard.00000.mds is damaged{kept}", 2)
    assert 2 in committed(run)


def test_a_run_that_waits_for_the_disk_shows_that_it_lives(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    # One would come when all is written, anyway.
    assert all(result["signs"] > 2 for result in trained[1])


def test_data_that_is_lost_behind_a_rollback_costs_no_step(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    run, results = trained
    for result in results:
        assert result["lost"][0].endswith("stopped after step 5; a checkpoint of step 5 is kept")
        assert result["lost"][1] == 5
    assert committed(run) == [2, 4, 5, 6, 8, 9]


def test_every_validation_is_recorded_once_also_one_that_failed_and_that_of_the_end(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    run, results = trained
    assert results[0]["ends"] == ["done", "done"]
    lines = (run / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 9]
    assert [row["step"] for row in rows(run)] == list(range(1, 10))


def test_controllers_of_experts_stand_still_while_a_step_is_skipped(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    for result in trained[1]:
        # Steps 3 and 4, the spikes of 5 to 7, and 5 again.
        skipped = [False, False, True, True, True, False]
        assert result["moves"] == [(skip, not skip) for skip in skipped]


def happened(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_rollback_tells_its_samples_and_the_skipped_steps_that_it_undid(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    run, results = trained
    samples = {
        step: sorted(i for result in results for i in result["taken"][step]) for step in (5, 6, 7)
    }
    skipped = happened(run, "skipped")
    assert [line["step"] for line in skipped] == [5, 6, 7, 7, 8, 9]
    assert [sorted(line["sample_ids"]) for line in skipped[:3]] == [*samples.values()]
    (rollback,) = happened(run, "rollback")
    assert rollback["sample_ids"] == sorted(i for ids in samples.values() for i in ids)
    assert rollback["skipped"] == rollback["spikes"] == [5, 6, 7]
    found = rows(run)
    # Their lines went with the steps, but the step behind the rollback tells of them …
    assert [row["step"] for row in found if row["skipped"]] == [7, 8, 9]
    assert found[4]["event"]["skipped"] == [5, 6, 7]
    # … and they count for good.
    counted = scalar(events(run), "train/skipped_steps")
    assert [counted[step] for step in range(1, 10)] == [0, 0, 0, 0, 3, 3, 4, 5, 6]
    assert dict(facts(run))["steps"] == "9 of 9 (6 skipped)"


def test_giving_up_is_an_event(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    run, results = trained
    (event,) = happened(run, "gave_up")
    assert (event["step"], event["spikes"]) == (9, [7, 8, 9])
    assert event["reason"] in results[0]["gave_up"] == results[1]["gave_up"]
    assert "A checkpoint of step 9 is saved" in results[0]["gave_up"]
