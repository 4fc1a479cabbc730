"""The records of a run: one line per step whatever happens, and the same numbers in TensorBoard."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import launcher.jsonl
from launcher.jsonl import read_rows
from launcher.load_image import LoadHistory, colour
from launcher.metrics import Metrics, StepRecord, memory_bytes
from launcher.tensorboard_layout import layout

REPOSITORY = Path(__file__).parents[2]


def record(step: int, **changes: object) -> StepRecord:
    values: dict[str, object] = {
        "step": step,
        "loss": 5.0 - step / 100 + 1e-9 / 3,
        "bits_per_byte": 2.5 - step / 200,
        "lr": 1e-3,
        "tokens": step * 1000,
        "tokens_per_s": 2000.0,
        "grad_norm": 0.5,
        "sample_cursor": step * 8,
        "seconds": {"data": 0.1, "forward": 0.2},
        "memory_bytes": 2**30,
        "tables": {"unique_rows": 100.0 + step},
    }
    return StepRecord(**(values | changes))  # type: ignore[arg-type]


@dataclass
class Validation:
    loss: float
    bits_per_byte: float
    labels: int


def model_stats(step: int) -> dict[str, dict[str, torch.Tensor]]:
    out = {}
    for layer in range(2):
        load = torch.tensor([3.0, 1.0, 0.0, float(step)], dtype=torch.float64)
        out[f"blocks.{layer}.ffn"] = {
            "expert_load": load,
            "expert_surprise": torch.tensor([1.0, math.nan, 2.0, 0.5], dtype=torch.float64),
            "experts_per_token": torch.tensor(2.0 + layer, dtype=torch.float64),
            "experts_per_token_counts": torch.tensor([0.0, 5.0, 10.0, 5.0], dtype=torch.float64),
            "surprise": torch.tensor(0.7, dtype=torch.float64),
        }
        out[f"blocks.{layer}.attention"] = {"gate_window": torch.tensor(0.4 + layer)}
    out["head"] = {"entropy": torch.tensor(4.0)}
    return out


def events(folder: Path) -> event_accumulator.EventAccumulator:
    keep_all = dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    reader = event_accumulator.EventAccumulator(str(folder / "tensorboard"), keep_all)
    return reader.Reload()


def scalar(reader: event_accumulator.EventAccumulator, tag: str) -> dict[int, float]:
    found = reader.Scalars(tag)
    assert len({e.step for e in found}) == len(found), f"{tag} shows a step twice"
    return {e.step: e.value for e in found}


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def test_every_step_is_one_json_line_that_gives_the_exact_loss_back(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in range(1, 4):
            metrics.step(record(step, sample_ids=[step, 7]))
            lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
            assert len(lines) == step, "a line must be in the file as soon as its step is recorded"
    rows = list(read_rows(tmp_path / "metrics.jsonl"))
    assert [r["loss"] for r in rows] == [record(s).loss for s in range(1, 4)]
    assert rows[2]["sample_ids"] == [3, 7] and rows[2]["tables"] == {"unique_rows": 103.0}
    assert "mfu" not in rows[2], "what is unknown is left out"


def test_a_bad_number_is_null_in_the_strict_json_of_its_line(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.step(record(1, loss=math.nan, grad_norm=math.inf, skipped=True))
    line = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(line, parse_constant=refuse)
    assert row["loss"] is None and row["grad_norm"] is None and row["skipped"] is True


def test_going_on_removes_later_and_torn_lines(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in range(1, 8):
            metrics.step(record(step))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines(keepends=True)[0][:40])
    with Metrics(tmp_path, resume_step=4) as metrics:
        assert steps(tmp_path) == [1, 2, 3, 4]
        metrics.step(record(5, loss=9.0))
    rows = list(read_rows(path))
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5] and rows[-1]["loss"] == 9.0
    assert not list(tmp_path.glob("*.partial"))


def test_a_validation_is_known_to_the_run_that_goes_on_until_its_step_is_undone(
    tmp_path: Path,
) -> None:
    with Metrics(tmp_path) as metrics:
        assert not metrics.validated(0)
        for step in (1, 2):
            metrics.step(record(step))
            metrics.validation(step, Validation(4.0, 2.0, 7))
            assert metrics.validated(step)
    with Metrics(tmp_path, resume_step=1) as metrics:
        assert metrics.validated(1) and not metrics.validated(2)
    assert not Metrics(tmp_path, rank=1).validated(1)


def test_starting_anew_leaves_nothing_of_the_run_before(tmp_path: Path) -> None:
    for _ in range(2):
        with Metrics(tmp_path) as metrics:
            metrics.step(record(1))
            metrics.step(record(2))
    assert steps(tmp_path) == [1, 2]


def test_a_step_out_of_order_is_refused(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.step(record(1))
        for wrong in (1, 3):
            with pytest.raises(ValueError, match=f"step {wrong} cannot be recorded after step 1"):
                metrics.step(record(wrong))


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: "):
        list(read_rows(path))


def test_a_full_disk_is_told_with_the_file_and_leaves_no_torn_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = os.write

    def write_a_part_then_fail(fd: int, data: bytes) -> int:
        if len(data) > 10:
            return real_write(fd, data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    rows = launcher.jsonl.JsonLines(tmp_path / "metrics.jsonl", 0)
    rows.append({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_a_part_then_fail)
        with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl") as caught:
            rows.append({"step": 2, "long": "x" * 4})
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    rows.append({"step": 2})
    assert [r["step"] for r in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


WRITER = """
import sys
from pathlib import Path
from tests.launcher.test_metrics import record
from launcher.metrics import Metrics

folder, resume, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
metrics = Metrics(folder, resume_step=resume)
print("ready", flush=True)
for step in range(resume + 1, last + 1):
    metrics.step(record(step, extra={"filler/" + "x" * 9000: 1.0}))
    if step % 10 == 0:
        metrics.flush()
        scratch = folder / "saved.new"
        scratch.write_text(str(step))
        scratch.replace(folder / "saved")
metrics.close()
"""


def test_one_line_per_step_after_kill_9_in_the_middle_of_writing(tmp_path: Path) -> None:
    last, resume = 100_000, 0
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for attempt in range(2):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(resume), str(last)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 200
            while not (tmp_path / "saved").exists() or (
                int((tmp_path / "saved").read_text()) <= resume
            ):
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.002)
            time.sleep(random.Random(attempt).uniform(0.0, 0.05))
            process.send_signal(signal.SIGKILL)
        resume = int((tmp_path / "saved").read_text())
    # A torn line is rare to hit, so that one is also made by hand.
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(b'{"step": 99')
    with Metrics(tmp_path, resume_step=resume) as metrics:
        metrics.step(record(resume + 1))
    assert steps(tmp_path) == list(range(1, resume + 2))
    assert sorted(scalar(events(tmp_path), "train/loss")) == list(range(1, resume + 2))


def test_tensorboard_shows_the_numbers_of_the_records(tmp_path: Path) -> None:
    with Metrics(tmp_path, configuration="name: demo") as metrics:
        for step in range(1, 4):
            metrics.step(record(step, mfu=0.25, extra={"spike/z": 1.0, "clipped": 2.0}))
    reader = events(tmp_path)
    for tag, value in {
        "train/loss": lambda s: record(s).loss,
        "train/bits_per_byte": lambda s: record(s).bits_per_byte,
        "train/lr": lambda s: 1e-3,
        "train/grad_norm": lambda s: 0.5,
        "train/tokens": lambda s: 1000.0 * s,
        "train/clipped": lambda s: 2.0,
        "spike/z": lambda s: 1.0,
        "speed/tokens_per_s": lambda s: 2000.0,
        "speed/mfu": lambda s: 0.25,
        "speed/memory_gib": lambda s: 1.0,
        "time/forward": lambda s: 0.2,
        "tables/unique_rows": lambda s: 100.0 + s,
    }.items():
        assert scalar(reader, tag) == pytest.approx({s: value(s) for s in (1, 2, 3)}), tag
    shown = reader.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]
    assert b"name: demo" in shown


def test_tensorboard_shows_the_model_per_layer_and_overall(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.step(record(1), model_stats(1))
        metrics.step(record(2))
    reader = events(tmp_path)
    assert scalar(reader, "moe/layer_01/experts_per_token") == {1: 3.0}
    assert scalar(reader, "moe/experts_per_token") == {1: 2.5}
    assert scalar(reader, "moe/layer_00/dead_experts") == {1: 1.0}
    assert scalar(reader, "moe/dead_experts") == {1: 2.0}
    assert scalar(reader, "nsa/gate_window") == pytest.approx({1: 0.9})
    share = np.array([0.6, 0.2, 0.2])
    entropy = -(share * np.log(share)).sum() / math.log(4)
    assert scalar(reader, "moe/layer_00/load_entropy") == pytest.approx({1: entropy})
    integrity = math.exp(-(0.5 * record(1).loss / 4.0 + 0.5 * 0.7))
    assert scalar(reader, "pi/value") == pytest.approx({1: integrity}, rel=1e-4)
    counts = reader.Histograms("moe/experts_per_token_counts")[0].histogram_value
    assert counts.num == 40 and counts.sum == 2 * (5 * 1 + 10 * 2 + 5 * 3)
    surprise = reader.Histograms("moe/layer_00/expert_surprise")[0].histogram_value
    assert surprise.num == 3, "an expert that did not run has no surprise to show"
    assert "moe/layer_00/expert_load_over_time" in reader.Tags()["images"]
    row = next(read_rows(tmp_path / "metrics.jsonl"))
    assert row["stats"]["moe/experts_per_token"] == 2.5
    assert row["expert_load"]["moe/layer_01/expert_load"] == [3.0, 1.0, 0.0, 1.0]


def test_the_dashboard_has_exactly_the_charts_with_something_to_show(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.step(record(1))
        metrics.step(record(2), model_stats(1))
    shown = events(tmp_path).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    found = layout_pb2.Layout.FromString(shown)
    charts = {c.title: [chart.title for chart in c.chart] for c in found.category}
    assert list(charts) == ["Loss", "Speed & step time", "Experts", "Attention", "Tables"]
    assert "model FLOP utilisation" not in charts["Speed & step time"]
    assert "dead experts" in charts["Experts"]
    assert layout(["nothing/known"]) == {}


def test_tensorboard_hides_what_a_killed_run_wrote_after_its_checkpoint(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in range(1, 7):
            metrics.step(record(step), model_stats(step))
            metrics.text(step, f"sample {step}")
    with Metrics(tmp_path, resume_step=3) as metrics:
        metrics.step(record(4, loss=7.0))
    reader = events(tmp_path)
    assert scalar(reader, "train/loss") == pytest.approx(
        {1: record(1).loss, 2: record(2).loss, 3: record(3).loss, 4: 7.0}
    )
    assert sorted(scalar(reader, "moe/surprise")) == [1, 2, 3]
    assert [e.step for e in reader.Tensors("samples/text_summary")] == [1, 2, 3]
    assert reader.Images("moe/layer_00/expert_load_over_time")[-1].step <= 3
    # What TensorBoard's own server reads, which ignores the purge mark.
    server = plugin_event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in server.Tensors("train/loss")] == [1, 2, 3, 4]


def test_a_torn_event_file_is_mended_and_read_on(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in range(1, 4):
            metrics.step(record(step))
    (file,) = (tmp_path / "tensorboard").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    os.chmod(file, 0o640)
    with Metrics(tmp_path, resume_step=3) as metrics:
        metrics.step(record(4))
    assert file.stat().st_mode & 0o777 == 0o640
    assert sorted(scalar(events(tmp_path), "train/loss")) == [1, 2, 3, 4]
    untouched = file.stat().st_mtime_ns
    Metrics(tmp_path, resume_step=4).close()
    assert file.stat().st_mtime_ns == untouched, "files with nothing to remove are left alone"


def test_counts_and_pictures_go_on_over_a_resume(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in range(1, 6):
            metrics.step(record(step, skipped=step in (2, 5)), model_stats(step))
    with Metrics(tmp_path, resume_step=4) as metrics:
        metrics.step(record(5), model_stats(5))
        metrics.step(record(6, skipped=True), model_stats(6))
        history = metrics._histories["moe/layer_00/expert_load"]
        assert [step for step, _ in history.columns] == [1, 2, 3, 4, 5, 6]
    assert scalar(events(tmp_path), "train/skipped_steps") == {
        1: 0.0,
        2: 1.0,
        3: 1.0,
        4: 1.0,
        5: 1.0,
        6: 2.0,
    }


def test_validations_are_kept_and_resumed_like_steps(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in range(1, 5):
            metrics.step(record(step))
            metrics.validation(step, Validation(3.0 - step / 10, 1.5, 64))
    with Metrics(tmp_path, resume_step=2) as metrics:
        metrics.step(record(3))
        metrics.validation(3, Validation(1.0, 0.5, 64))
    assert list(read_rows(tmp_path / "validation.jsonl")) == [
        {"step": 1, "loss": 2.9, "bits_per_byte": 1.5, "labels": 64},
        {"step": 2, "loss": 2.8, "bits_per_byte": 1.5, "labels": 64},
        {"step": 3, "loss": 1.0, "bits_per_byte": 0.5, "labels": 64},
    ]
    found = scalar(events(tmp_path), "validation/loss")
    assert found == pytest.approx({1: 2.9, 2: 2.8, 3: 1.0})


def test_lines_lost_with_the_machine_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.step(record(1))
    Metrics(tmp_path, resume_step=5).close()
    assert "holds 1 lines for 5 steps" in caplog.text


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Metrics(tmp_path, rank=1, configuration="x") as metrics:
        metrics.step(record(1), model_stats(1))
        metrics.validation(1, record(1))
        metrics.text(1, "text")
        metrics.note("note")
        metrics.flush()
    assert not list(tmp_path.iterdir())


def test_the_load_picture_stays_bounded_and_shows_dead_and_new_experts() -> None:
    history = LoadHistory(most=8)
    for step in range(1, 101):
        history.add(step, [1.0, 0.0] if step <= 60 else [1.0, 1.0, 2.0])
    assert len(history.columns) <= 8
    picture = history.image()
    height, width, channels = picture.shape
    assert channels == 3 and height >= 200 and width >= 400
    third = height // 3
    assert (picture[third + 5, 0] == 0).all(), "a dead expert is black"
    assert (picture[2 * third + 5, 0] == 128).all(), "an expert that is not there yet is grey"
    assert (colour(np.array([1.0, 2.0])).astype(int).sum(-1) > 0).all()


def test_experts_of_a_pool_that_can_grow_are_shown_once_they_exist(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for step in range(1, 4):
            exist = 4 if step < 3 else 5
            load = torch.tensor([0.5] * exist + [0.0] * (8 - exist), dtype=torch.float64)
            # Dead at the end: it exists, and nobody comes.
            load[3] = 0.0 if step == 3 else 0.5
            values = {"expert_load": load, "active_experts": torch.tensor(float(exist))}
            metrics.step(record(step), {"blocks.0.ffn": values})
    picture = metrics._histories["moe/layer_00/expert_load"].image()
    tall, wide = picture.shape[0] // 5, picture.shape[1] // 3
    cells = picture[tall // 2 :: tall, wide // 2 :: wide]
    assert cells.shape == (5, 3, 3), "an expert that never existed has no row"
    balanced = colour(np.array([1.0, 5 / 4]))
    assert (cells[:4, :2] == balanced[0]).all() and (cells[[0, 1, 2, 4], 2] == balanced[1]).all()
    assert (cells[3, 2] == 0).all() and (cells[4, :2] == 128).all()
    reader = events(tmp_path)
    for tag in ("moe/layer_00/expert_load", "moe/expert_load"):
        assert [e.histogram_value.num for e in reader.Histograms(tag)] == [4, 4, 5], tag
    assert scalar(reader, "moe/layer_00/load_max") == {1: 1.0, 2: 1.0, 3: 1.25}
    assert scalar(reader, "moe/layer_00/dead_experts") == {1: 0.0, 2: 0.0, 3: 1.0}
    rows = [row["expert_load"] for row in read_rows(tmp_path / "metrics.jsonl")]
    assert [len(row["moe/layer_00/expert_load"]) for row in rows] == [4, 4, 5]


def test_memory_is_that_of_this_process() -> None:
    assert memory_bytes(torch.device("cpu")) > 50 * 2**20
