"""Whole runs through the command line: trained, resumed exactly, refused when they cannot work."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.loader import PackedLoader
from launcher.checkpoint_verbs import main as checkpoint_verb
from launcher.config import load
from tests.launcher.test_metrics import events, scalar
from tests.launcher.tiny import (
    REPOSITORY,
    assert_same_run,
    finish,
    held,
    kill_after,
    rows,
    tiny_config,
    tiny_corpus,
    tiny_onn,
    until_line,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    code, output = finish(tiny_onn("pretrain", tiny_config(folder, corpus)))
    assert code == 0, output
    assert "bits per byte" in output and "tensorboard --logdir" in output
    return folder / "runs" / "tiny"


def test_a_run_leaves_what_it_promises(reference: Path) -> None:
    assert (reference / "DONE").exists()
    assert [r["step"] for r in rows(reference)] == list(range(1, 13))
    assert rows(reference)[-1]["loss"] < rows(reference)[0]["loss"]
    steps = sorted(p.name for p in (reference / "checkpoints").glob("step-*"))
    assert steps == ["step-00000004", "step-00000008", "step-00000012"]
    assert all((reference / "checkpoints" / s / "COMMITTED").exists() for s in steps)
    assert list((reference / "tensorboard").glob("events.out.tfevents.*"))


def test_table_numbers_are_those_of_all_ranks(reference: Path) -> None:
    data = load(reference / "config.yaml").data
    loader = PackedLoader(data, micro_batch=8, accumulation=1, rank=0, world=1)
    for row in rows(reference):
        distinct = torch.unique(loader.next_step()[0].ids_T).shape[0]
        assert row["tables"]["owned_rows"] == distinct
        assert row["tables"]["unique_rows"] > distinct
        assert row["tables"]["prefetch_misses"] == 0 or row["step"] == 1
    loader.close()
    assert json.loads((reference / "heartbeat").read_text())["step"] == 12


def test_a_run_shows_its_text_its_time_and_who_was_waited_for(reference: Path) -> None:
    found, reader = rows(reference), events(reference)
    samples = {e.step: e.tensor_proto.string_val[0] for e in reader.Tensors("samples/text_summary")}
    assert list(samples) == [6, 12] and all(samples.values())
    parts, measured = ("data", "tables", "forward", "backward", "optimizer"), []
    for row in found:
        step_seconds = row["tokens"] / row["step"] / row["tokens_per_s"]
        assert all(row["seconds"][part] > 0 for part in parts)
        measured.append(sum(row["seconds"][part] for part in parts) / step_seconds)
        shares = ("speed/slowest_share", "speed/data_stall_share")
        # Those of the step before, of which the first has none.
        assert all(
            (0 <= row["extra"][s] <= 1) if row["step"] > 1 else "extra" not in row for s in shares
        )
    # The parts are much of a step that was not held up between them, and no more than it.
    assert statistics.median(measured) > 0.3 and max(measured) <= 1
    for tag in (*(f"time/{part}" for part in (*parts, "checkpoint")), "train/loss", "train/lr"):
        assert list(scalar(reader, tag)) == list(range(1, 13)), tag
    for tag in ("speed/slowest_share", "speed/slowest_rank", "speed/data_stall_share"):
        assert list(scalar(reader, tag)) == list(range(2, 13)), tag
    assert list(scalar(reader, "validation/loss")) == [5, 10, 12]
    assert scalar(reader, "moe/experts_per_token").keys() == {3, 6, 9, 12}


def test_a_checkpoint_holds_training_up_for_its_copy_only(reference: Path) -> None:
    held_up = {row["step"]: row["seconds"]["checkpoint"] for row in rows(reference)}
    # Told with the step behind it; the one of the last step has none.
    assert [step for step, seconds in held_up.items() if seconds] == [5, 9]
    assert max(held_up.values()) < 30
    written = [row["seconds"]["checkpoint_write"] for row in rows(reference)]
    assert sum(map(bool, written)) >= 1
    (line,) = re.findall(r"checkpoint of step 12: .*", (reference / "logs/train.log").read_text())
    assert re.fullmatch(r".*waited \d+\.\d{3} s for the copy, writing took \d+\.\d{3} s", line)


def test_checkpoints_are_listed_the_unfinished_and_the_damaged_too(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference / "checkpoints", run / "checkpoints")
    (run / "checkpoints" / "step-00000008" / "COMMITTED").unlink()
    (run / "checkpoints" / "step-00000012").rename(run / "checkpoints" / "damaged-step-00000012")
    assert checkpoint_verb(["list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    size = sum(p.stat().st_size for p in (run / "checkpoints" / "step-00000004").iterdir()) / 2**20
    expected = (("4", "committed"), ("8", "unfinished, ignored"), ("12", "damaged, set aside"))
    for line, (step, state) in zip(lines, expected, strict=True):
        assert line.split()[:2] == ["step", step] and f" MiB  {state} " in line, line
        assert str(run / "checkpoints") in line
    assert f" {size:.1f} MiB" in lines[0]
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    assert checkpoint_verb(["list", str(empty)]) == 0
    assert "no checkpoint yet" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is no run folder"):
        checkpoint_verb(["list", str(tmp_path)])


def test_a_shard_that_changes_stops_the_run_with_a_checkpoint_and_mended_it_goes_on(
    reference: Path, corpus: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    path, run = tiny_config(tmp_path, copy), tmp_path / "runs" / "tiny"
    process = held(3, tmp_path / "damaged", "pretrain", path, "--checkpoint.every", "100")
    until_line(process, run, 3)
    shards = list((copy / "train").glob("*.mds"))
    good = [shard.read_bytes() for shard in shards]
    for shard, content in zip(shards, good, strict=True):
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (tmp_path / "damaged").touch()
    code, output = finish(process)
    assert code == 1
    assert "is damaged: SHA-256" in output
    done = len(rows(run))
    assert f"stopped after step {done}; a checkpoint of step {done} is kept" in output
    assert (run / "checkpoints" / f"step-{done:08}" / "COMMITTED").exists()
    for shard, content in zip(shards, good, strict=True):
        shard.write_bytes(content)
    code, output = finish(tiny_onn("pretrain", path))
    assert code == 0, output
    assert_same_run(run, reference)


def test_every_checkpoint_is_evaluated_once_beside_the_run_also_of_a_copy(
    reference: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(reference, tmp_path / "copy"))
    results = copy / "evaluation" / "evaluation.jsonl"
    for _ in range(2):
        code, output = finish(tiny_onn("eval", copy, "--follow"))
        assert code == 0, output
        assert "every committed checkpoint is evaluated" in output
        found = [json.loads(line) for line in results.read_text().splitlines()]
        assert [r["step"] for r in found] == [4, 8, 12]
    last = json.loads((reference / "validation.jsonl").read_text().splitlines()[-1])
    assert (found[-1]["loss"], found[-1]["labels"]) == (last["loss"], last["labels"])
    assert list((copy / "evaluation" / "tensorboard").glob("events.out.tfevents.*"))
    assert not (copy / "evaluation" / "held").exists()
    assert not (reference / "evaluation").exists()


def mount(options: str, folder: Path) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    subprocess.run(command, check=True, timeout=30)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system, as root")
def test_a_full_disk_and_a_read_only_one_are_told_and_mended_the_run_goes_on(
    reference: Path, corpus: Path, tmp_path: Path
) -> None:
    path, run = tiny_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    checkpoint = reference / "checkpoints" / "step-00000004"
    one = sum(p.stat().st_size for p in checkpoint.iterdir())
    run.parent.mkdir()
    # Room for one checkpoint and a half.
    mount(f"size={one * 3 // 2 + 2**20}", run.parent)
    try:
        code, output = finish(tiny_onn("pretrain", path))
        assert code == 1, output
        assert "No space left on device" in output and "bytes free there" in output
        # A log of the run may meet the full disk before the checkpoint that filled it does.
        assert f"{run}" in output and "Free some space" in output
        newest = max((run / "checkpoints").glob("step-*/COMMITTED")).parent.name
        assert newest in ("step-00000004", "step-00000008")
        mount("remount,ro", run.parent)
        code, output = finish(tiny_onn("pretrain", path))
        assert code == 1
        assert "Read-only file system" in output and str(run) in output
        assert "Traceback" not in output
        mount(f"remount,rw,size={100 * one}", run.parent)
        code, output = finish(tiny_onn("pretrain", path))
        assert code == 0, output
        assert f"resuming from step {int(newest[5:])}" in output
        assert_same_run(run, reference)
    finally:
        subprocess.run(["umount", str(run.parent)], check=True, timeout=30)


def test_a_taken_port_is_told_before_ranks_start(corpus: Path, tmp_path: Path) -> None:
    path = tiny_config(tmp_path, corpus)
    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        port = s.getsockname()[1]
        process = subprocess.Popen(
            ["bash", "slurm/pretrain.sh", str(path)],
            cwd=REPOSITORY,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
                "TINY_ONN_PYTHON": sys.executable,
                "NNODES": "2",
                "NODE_RANK": "0",
                "MASTER_ADDR": socket.gethostname(),
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        code, output = finish(process)
    assert code == 1
    assert f"port {port} of" in output
    assert f"is taken by process {os.getpid()}" in output
    assert not list((tmp_path / "runs" / "tiny" / "logs").glob("*-rank*.log"))


def test_a_second_call_says_that_the_run_is_done(reference: Path) -> None:
    code, output = finish(tiny_onn("pretrain", reference.parents[1] / "tiny.yaml"))
    assert code == 0 and "is done" in output and "validation loss" in output


@pytest.mark.slow
def test_killed_at_three_random_moments_it_ends_as_if_nothing_had_happened(
    reference: Path, corpus: Path, tmp_path: Path
) -> None:
    path, run = tiny_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    # In every other life the table is on disk, with a cache of fewer rows than a step has: they are
    # written back all the time.
    nvme = tmp_path / "nvme"
    words = ["--model.deepembed.tier", "nvme", "--model.deepembed.nvme_path", str(nvme)]
    words += ["--model.deepembed.cache_rows", "100", "--model.deepembed.direct", "false"]
    moments = sorted(random.sample(range(1, 12), 3))
    print("killed after the lines of steps", moments)
    for life, moment in enumerate(moments):
        options = words if life % 2 == 0 else ()
        kill_after(held("end", tmp_path / "never", "pretrain", path, *options), run, moment)
        assert len(list(nvme.glob("*-rank*.rows"))) == 2
    code, output = finish(tiny_onn("pretrain", path, *words))
    assert code == 0, output
    assert not list(nvme.iterdir())
    assert_same_run(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    "offload",
    [
        ["--engine.offload.optimizer", "cpu"],
        ["--engine.offload.optimizer", "cpu", "--engine.offload.params", "cpu"],
        ["--engine.offload.optimizer", "nvme", "--engine.offload.params", "nvme"],
    ],
    ids=["optimizer-cpu", "both-cpu", "both-nvme"],
)
def test_stopped_and_resumed_with_offload_it_ends_with_the_losses_of_a_run_without(
    reference: Path, corpus: Path, tmp_path: Path, offload: list[str]
) -> None:
    path, run = tiny_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    if "nvme" in offload:
        offload = [*offload, "--engine.offload.nvme_path", str(tmp_path / "nvme")]
        offload += ["--engine.offload.params_buffer_numel", "20000"]
    process = held(6, tmp_path / "never", "pretrain", path, *offload)
    until_line(process, run, 6)
    process.terminate()
    code, output = finish(process)
    assert code == 0 and "stopped" in output, output
    code, output = finish(tiny_onn("pretrain", path, *offload))
    assert code == 0 and "resum" in output.lower(), output
    for a, b in zip(rows(reference), rows(run), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_another_configuration_for_the_same_run_is_refused_with_the_difference(
    reference: Path, corpus: Path, tmp_path: Path
) -> None:
    path = tiny_config(tmp_path, corpus)
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(reference, run, ignore=shutil.ignore_patterns("DONE", "tensorboard"))
    before = sorted(str(p) for p in run.rglob("*"))
    code, output = finish(tiny_onn("pretrain", path, "--model.layers", "3"))
    assert code == 1
    assert "model.layers: the run has 2, now asked for 3" in output and "--name" in output
    # Nothing is touched; word is left that another try of a job cannot help.
    (word,) = {str(p) for p in run.rglob("*")} - set(before)
    assert word.endswith(".refused") and "model.layers" in Path(word).read_text()
    assert set(before) < {str(p) for p in run.rglob("*")}


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_is_used(
    reference: Path, corpus: Path, tmp_path: Path
) -> None:
    path, run = tiny_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    shutil.copytree(reference, run)
    (run / "DONE").unlink()
    shard = min((run / "checkpoints" / "step-00000012").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, output = finish(tiny_onn("checkpoint", "verify", run))
    assert code == 1 and shard.name in output
    code, output = finish(tiny_onn("pretrain", path))
    assert code == 0 and shard.name in output and "step 8" in output, output
    # What is left of it counts nowhere, and is not lost.
    assert (run / "checkpoints" / "damaged-step-00000012" / shard.name).exists()
    assert_same_run(run, reference)


def test_a_corpus_that_is_missing_or_damaged_is_named_before_ranks_start(
    corpus: Path, tmp_path: Path
) -> None:
    path = tiny_config(tmp_path, tmp_path / "nothing")
    code, output = finish(tiny_onn("pretrain", path))
    assert code == 1 and "holds no corpus" in output and "tiny-onn data build" in output
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus, damaged)
    shard = min(damaged.glob("train/*.mds"))
    shard.write_bytes(shard.read_bytes()[:-100])
    code, output = finish(tiny_onn("pretrain", tiny_config(tmp_path, damaged)))
    assert code == 1 and shard.name in output and "Traceback" not in output


def test_a_batch_that_does_not_divide_is_refused_with_what_would(
    corpus: Path, tmp_path: Path
) -> None:
    path = tiny_config(tmp_path, corpus)
    code, output = finish(tiny_onn("pretrain", path, "--train.global_batch", "6"))
    assert code == 1 and "multiple of 4" in output


@pytest.mark.slow
def test_eval_repeats_the_validation_and_generate_continues_a_prompt(reference: Path) -> None:
    code, output = finish(tiny_onn("eval", reference))
    assert code == 0, output
    result = json.loads(output.strip().splitlines()[-1])
    last = json.loads((reference / "validation.jsonl").read_text().splitlines()[-1])
    assert result["step"] == 12
    assert (result["loss"], result["labels"]) == (last["loss"], last["labels"])
    words = ("--prompt", "def ", "--tokens", "5", "--seed", "1")
    first = finish(tiny_onn("generate", reference, *words))
    assert first[0] == 0 and "def " in first[1], first[1]
