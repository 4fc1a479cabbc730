"""A run goes on on any number of ranks, with any offload and tier: what it says stays the same."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.checkpoint_diff import difference
from launcher.checkpoint_verbs import main as checkpoint_verb
from launcher.export import export
from launcher.plan_verb import main as plan
from parallel.checkpoint import Checkpoint, CheckpointError
from parallel.checkpoint_read import TableReader
from parallel.mesh import Mesh
from tests.launcher.in_ranks import LENGTHS, tokens, trained, trainer_of
from tests.launcher.tiny import rows, tiny_config, tiny_corpus
from tests.ranks import Ranks
from tiny_onn.exported import ExportError, load_exported

STEPS = 8
EXACT = ("loss", "grad_norm", "lr", "tokens", "sample_cursor", "bits_per_byte")
SHORT = ["--train.steps", str(STEPS), "--train.evaluate_every", "0", "--train.sample_every", "0"]
SHORT += ["--checkpoint.every", "0"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def whole(
    two_ranks: Ranks, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder of an uninterrupted run of two ranks, and what came of it."""
    folder = tmp_path_factory.mktemp("whole")
    result = two_ranks.run(trained, tiny_config(folder, corpus), SHORT, timeout=400)[0]
    return folder / "runs" / "tiny", result


def last(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def modes(folder: Path) -> list[list[str]]:
    """Offload and table tier of the engine: resident, in host memory, on a disk."""
    nvme = ["--engine.offload.optimizer", "nvme", "--engine.offload.params", "nvme"]
    nvme += ["--engine.offload.nvme_path", str(folder / "swap")]
    nvme += ["--engine.offload.params_buffer_numel", "20000"]
    nvme += ["--model.deepembed.tier", "nvme", "--model.deepembed.direct", "false"]
    nvme += ["--model.deepembed.nvme_path", str(folder / "rows")]
    nvme += ["--model.deepembed.cache_rows", "100"]
    cpu = ["--engine.offload.optimizer", "cpu", "--engine.offload.params", "cpu"]
    return [[], cpu, nvme]


@pytest.mark.slow
def test_one_two_and_four_ranks_go_on_with_each_others_checkpoints_in_any_mode(
    two_ranks: Ranks, whole: tuple[Path, dict[str, Any]], corpus: Path, tmp_path: Path
) -> None:
    path = tiny_config(tmp_path, corpus)
    resident, cpu, nvme = modes(tmp_path)
    samples = two_ranks.run(trained, path, [*SHORT, *cpu], 3, timeout=400)[0]["samples"]
    with Ranks(1) as one:
        samples += one.run(trained, path, [*SHORT, *nvme], 5, timeout=400)[0]["samples"]
    grouped = [*SHORT, *resident, "--mesh.group", "2"]
    samples += two_ranks.run(trained, path, grouped, 6, timeout=400)[0]["samples"]
    with Ranks(4) as four:
        result = four.run(trained, path, [*SHORT, *cpu], timeout=500)[0]
    assert samples + result["samples"] == whole[1]["samples"]
    found, expected = rows(tmp_path / "runs" / "tiny"), rows(whole[0])
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    for a, b in zip(expected, found, strict=True):
        # Other sequences share a pass on other ranks, and still the same tokens explore.
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert {k: a[k] for k in ("lr", "tokens", "sample_cursor")} == {
            k: b[k] for k in ("lr", "tokens", "sample_cursor")
        }
    torch.testing.assert_close(result["logits"], whole[1]["logits"], rtol=2e-2, atol=2e-2)
    assert Checkpoint(last(tmp_path / "runs" / "tiny")).world == 4


@pytest.mark.slow
def test_every_offload_mode_goes_on_bitwise_at_the_same_number_of_ranks(
    two_ranks: Ranks, whole: tuple[Path, dict[str, Any]], corpus: Path, tmp_path: Path
) -> None:
    for name, mode in zip(("resident", "cpu", "nvme"), modes(tmp_path), strict=True):
        runs = []
        for cut in (0, 3):
            if name == "resident" and not cut:
                runs.append(whole[0])
                continue
            folder = tmp_path / f"{name}-{cut}"
            folder.mkdir()
            path = tiny_config(folder, corpus)
            if cut:
                # Once from the live state instead of a copy of it.
                waiting = ["--checkpoint.background", "false"] if name != "cpu" else []
                two_ranks.run(trained, path, [*SHORT, *mode, *waiting], cut, timeout=400)
            two_ranks.run(trained, path, [*SHORT, *mode], timeout=400)
            runs.append(folder / "runs" / "tiny")
        straight, resumed = (rows(run) for run in runs)
        for a, b in zip(straight, resumed, strict=True):
            assert {k: a[k] for k in EXACT} == {k: b[k] for k in EXACT}, name
        lines = list(difference(*map(_opened, runs)))
        assert all(line.startswith("config runs: ") for line in lines), (name, lines)


def _train_on_a_disk_that_fills(mesh: Mesh, path: Path, overrides: list[str]) -> tuple[str, int]:
    trainer = trainer_of(mesh, path, overrides)
    original, limits = trainer._save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save() -> None:
        if trainer.c.step == 4 and mesh.rank == 1:
            # The kernel then refuses to grow a file as it does on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        original()

    trainer._save = save  # type: ignore[method-assign]
    try:
        with pytest.raises(CheckpointError) as raised:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    trainer.c.close()
    return str(raised.value), trainer.c.step


@pytest.mark.slow
def test_disk_that_fills_while_saving_stops_all_ranks_after_the_same_step_and_costs_nothing(
    two_ranks: Ranks, whole: tuple[Path, dict[str, Any]], corpus: Path, tmp_path: Path
) -> None:
    path = tiny_config(tmp_path, corpus)
    every = [*SHORT, "--checkpoint.every", "2"]
    answers = two_ranks.run(_train_on_a_disk_that_fills, path, every, timeout=400)
    assert answers[0] == answers[1]
    message, step = answers[0]
    # The writing fails beside step 5 or a later one, and is known to all a step on.
    assert 5 <= step < STEPS
    assert "rank 1: " in message and "rank-00001.dense.safetensors: cannot be written" in message
    assert "bytes free there). Free some space" in message and "goes on from them" in message
    run = tmp_path / "runs" / "tiny"
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]
    two_ranks.run(trained, path, every, timeout=400)
    for a, b in zip(rows(whole[0]), rows(run), strict=True):
        assert {k: a[k] for k in EXACT} == {k: b[k] for k in EXACT}


def _opened(run: Path) -> Checkpoint:
    return Checkpoint(last(run))


def test_exported_model_gives_the_runs_logits_bit_for_bit(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, result = whole
    out = tmp_path / "exported"
    assert checkpoint_verb(["export", str(run), str(out), "--step", str(STEPS)]) == 0
    assert "512 rows of 64 numbers" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "deepembed.safetensors",
        "tokenizer.model",
    }
    exported = load_exported(out)
    assert exported.step == STEPS
    assert torch.equal(exported.logits(tokens(), LENGTHS), result["logits"])
    assert len(list(exported.generate([1, 5], 4))) == 4
    assert load_file(out / "deepembed.safetensors")["weight"].any()

    with pytest.raises(ValueError, match="is not empty"):
        export(_opened(run), out)
    half = tmp_path / "half"
    export(_opened(run), half, "bf16")
    assert load_file(half / "model.safetensors")["embedding.weight"].dtype == torch.bfloat16
    close = load_exported(half).logits(tokens(), LENGTHS)
    assert not torch.equal(close, result["logits"])
    torch.testing.assert_close(close, result["logits"], rtol=0.1, atol=0.05)


def test_input_embedding_in_the_rows_is_planned_and_exported_bit_for_bit(
    two_ranks: Ranks, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tiny_config(tmp_path, corpus), tmp_path / "exported"
    rows_too = ["--model.tie_embeddings", "false", "--model.embedding_partition", "rows"]
    assert plan([str(path), "--gpus-per-node", "2", *rows_too]) in (0, None)
    assert "in the table" in capsys.readouterr().out
    steps = [*SHORT, "--train.steps", "3"]
    result = two_ranks.run(trained, path, [*steps, *rows_too], timeout=400)[0]
    assert checkpoint_verb(["export", str(tmp_path / "runs" / "tiny"), str(out)]) == 0
    weight = load_file(out / "deepembed.safetensors")["weight"]
    exported = load_exported(out)
    assert weight.shape == (512, exported.cfg.row_width)
    assert weight[:, : exported.cfg.width].std() > 0.01
    assert torch.equal(exported.logits(tokens(), LENGTHS), result["logits"])
    assert len(list(exported.generate([1, 5], 4))) == 4


def test_damaged_checkpoint_or_export_is_refused_by_file(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    shard = last(run) / "rank-00001.dense.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"not exported, because .*{shard.name}: SHA-256"):
        export(_opened(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()

    out = tmp_path / "exported"
    export(_opened(whole[0]), out)
    weights = load_file(out / "model.safetensors")
    embedding = weights.pop("embedding.weight")
    save_file(weights, out / "model.safetensors")
    with pytest.raises(ExportError, match=r"model.safetensors: lacks \['embedding.weight'\]"):
        load_exported(out)
    save_file(weights | {"embedding.weight": embedding[:-1]}, out / "model.safetensors")
    with pytest.raises(ExportError, match=r"(?s)model.safetensors: cannot be loaded: .*size"):
        load_exported(out)
    (out / "config.json").write_text("[]")
    with pytest.raises(ExportError, match=r"config.json: is not of format 1"):
        load_exported(out)


def test_diff_names_what_differs_and_by_how_much(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = whole[0]
    assert checkpoint_verb(["diff", str(run), str(last(run))]) == 0
    assert "no difference" in capsys.readouterr().out
    other = tmp_path / "run"
    shutil.copytree(run, other)
    folder = last(other)
    change(folder / "rank-00001.dense.safetensors", "fp32/norm.weight", 0.25)
    table = folder / "rank-00000.table-deepembed.safetensors"
    touched = load_file(table)["000000/ids"].shape[0]
    assert 0 < touched < 256
    change(table, "000000/weight", 0.5)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["meta"]["config"]["model"]["norm_eps"] = 0.5
    (folder / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    (folder / "COMMITTED").write_text(digest)
    lines = list(difference(_opened(run), _opened(other)))
    assert len(lines) == 3
    assert lines[0] == "config model.norm_eps: 1e-05 and 0.5"
    assert lines[1].startswith("weight norm.weight: max abs difference 0.25 (largest value ")
    assert lines[2].startswith(
        f"table deepembed weight: {touched} of 512 rows differ, at most by 0.5 "
    )
    assert checkpoint_verb(["diff", str(run), str(other)]) == 1


def change(path: Path, key: str, by: float) -> None:
    tensors = load_file(path)
    tensors[key] = tensors[key] + by
    save_file(tensors, path)


def test_table_rows_of_any_ranks_and_pieces_come_in_the_order_of_their_ids(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world, count = 3, 20
    weights = torch.arange(count * 2, dtype=torch.float32).view(count, 2)

    class Saved:
        path, kinds = tmp_path, ["dense", "table-t"]

        def shard(self, kind: str, rank: int) -> Any:
            from parallel.tensor_file import ShardFile

            return ShardFile(tmp_path / f"{rank}.safetensors")

    saved: Any = Saved()
    saved.world = world
    for rank in range(world):
        ids = torch.arange(rank, count, world)
        pieces: dict[str, Tensor] = {}
        for number, part in enumerate(ids.split(3)):
            pieces |= {f"{number:06d}/ids": part, f"{number:06d}/weight": weights[part]}
        save_file(pieces, tmp_path / f"{rank}.safetensors")
    monkeypatch.setattr("parallel.checkpoint_read.ROWS_BYTES", 4 * 2 * 7)
    (reader,) = TableReader.all(saved)
    found = list(reader.stretches())
    assert [first for first, _ in found] == [0, 7, 14]
    assert torch.equal(torch.cat([fields["weight"] for _, fields in found]), weights)
    pieces.pop("000000/ids")
    save_file(pieces | {"000000/ids": torch.tensor([2, 5, 5])}, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match="table 't' lacks row 8"):
        list(TableReader(saved, "t").stretches())
