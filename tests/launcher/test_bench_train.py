"""`bench train`, `bench scaling` and `bench step` run as documented; `plan` reads their figures.

Each is started once, with a tiny model on the CPU; what they make of their figures is tested on
figures of its own.
"""

from __future__ import annotations

import gzip
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from data.loader import PackedLoader
from launcher import bench_scaling, bench_train, config, plan_verb
from launcher.bench_train import summed_up
from launcher.components import active_flops
from launcher.plan_job import Machine
from launcher.plan_search import measured_points
from tests.launcher.tiny import finish, tiny_config, tiny_corpus, tiny_onn

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


def on_a_gpu(figures: Path) -> dict[str, Any]:
    """Return a benchmark's figures as if a GPU had made them, which `plan` asks for."""
    found: dict[str, Any] = json.loads(figures.read_text())
    for run in found.values():
        if "device" in run:
            run["device"] = H100
    figures.write_text(json.dumps(found))
    return found


def test_bench_train_measures_a_run_and_plan_reads_it(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, figures = tiny_config(tmp_path, corpus), tmp_path / "train.json"
    words = [str(path), "--variants", "all dense", "--steps", "4", "--skip", "1"]
    words += ["--trace", str(tmp_path / "traces"), "--json", str(figures), "--launch.processes"]
    assert bench_train.main([*words, "1"]) == 0
    said = capsys.readouterr().out
    assert "MFU = tokens/s x FLOPs per token" in said and "cpu: no peak known" in said
    found = on_a_gpu(figures)["all dense"]
    assert (found["ranks"], found["mfu"], found["peak_flops"]) == (1, None, None)
    assert found["tokens_per_s"] > 0 and found["memory_gib"] > 0.05
    assert len(found["losses"]) == len(found["grad_norms"]) == 4
    assert {"forward", "backward", "optimizer"} <= found["seconds"].keys()
    with gzip.open(tmp_path / "traces" / "all-dense.json.gz", "rt") as f:
        assert json.load(f)["traceEvents"]
    # Nothing of the run is left, and nothing is where the configuration's own runs are.
    assert not (tmp_path / "runs").exists()
    (point,) = measured_points({"all dense": found}, Machine())
    assert point.job.world == 1 and point.gib == found["memory_gib"]
    assert point.seconds == pytest.approx(8 * 64 / found["tokens_per_s"])
    plan = ["--model.vocab_size", "512", "--gpus-per-node", "1", "--measured", str(figures)]
    assert plan_verb.main([str(path), *plan, "--model.attention.kind", "full",
                           "--model.ffn.kind", "dense"]) == 0  # fmt: skip
    assert "as 'all dense' was measured" in " ".join(capsys.readouterr().out.split())


def row(step: int, speed: float, gib: float, most: float | None = None) -> dict[str, Any]:
    out = {
        "step": step, "loss": 1.0 / step, "grad_norm": 1.0, "tokens_per_s": speed, "mfu": speed,
        "memory_bytes": int(gib * 2**30), "seconds": {"forward": 1.0},
    }  # fmt: skip
    return out if most is None else out | {"extra": {"speed/memory_most_gib": most}}


def test_mfu_is_that_of_the_median_and_memory_the_fullest_ranks(tmp_path: Path) -> None:
    cfg = config.load(tiny_config(tmp_path, tmp_path), ["--model.vocab_size", "512"])
    speeds = [1.0, 900.0, 1100.0, 1000.0, 50.0, 10.0]
    rows = [row(i + 1, speed, 1.0, None if i == 0 else 2.5) for i, speed in enumerate(speeds)]
    # The first compiles, the last two are recorded.
    found = summed_up(rows, 1, 2, cfg, H100)
    assert found["tokens_per_s"] == statistics.median(speeds[1:4]) == 1000.0
    assert found["spread"] == pytest.approx(0.2)
    assert found["mfu"] == pytest.approx(1000.0 * active_flops(cfg) / (2 * 989e12))
    assert (found["flops_per_token"], found["peak_flops"]) == (active_flops(cfg), 989e12)
    assert found["memory_gib"] == 2.5
    assert summed_up(rows[:1], 0, 0, cfg, H100)["memory_gib"] == 1.0


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (bench_train.main, ["--skip", "20"], "20 of --steps 20 are left out, and none"),
        (bench_train.main, ["--steps", "3"], "set --steps to 6 or more"),
        (bench_train.main, ["--steps", "7", "--trace", "x"], "and the 2 of the trace"),
        (bench_train.main, ["--steps", "0"], "argument --steps: 0 must be at least 1"),
        (bench_train.main, ["--skip", "-1"], "argument --skip: -1 must be at least 0"),
        (bench_scaling.main, ["--steps", "2"], "set --steps to 3 or more"),
        (bench_scaling.main, ["--gpus", "0"], "argument --gpus: 0 must be at least 1"),
        (bench_scaling.main, ["--seq-len", "x"], "expected a whole number, found 'x'"),
    ],
)
def test_what_leaves_no_step_to_measure_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Any, words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as e:
        main([str(tmp_path / "none.yaml"), *words])
    assert e.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_bench_scaling_shares_sequences_and_plan_reads_it(tmp_path: Path, corpus: Path) -> None:
    path, figures = tiny_config(tmp_path, corpus), tmp_path / "scaling.json"
    words = ["bench", "scaling", str(path), "--gpus", "2", "--parts", "long", "--vocab", "512"]
    words += ["--long-seq-len", "256", "--steps", "2", "--skip", "1", "--json", str(figures)]
    words += ["--long-overrides", "model.ffn.kind=dense"]
    code, output = finish(tiny_onn(*words))
    assert code == 0, output
    found = on_a_gpu(figures)
    assert list(found) == ["long"] and found["long"]["ranks"] == 2
    described = found["long"]["config"]
    assert (described["mesh.group"], described["data.seq_len"]) == (2, 256)
    assert described["model.ffn.kind"] == "dense"
    (point,) = measured_points(found, Machine())
    assert (point.job.world, point.job.group, point.job.shard) == (2, 2, 128)
    assert point.gib == found["long"]["memory_gib"] > 0.05


def test_every_timed_sequence_is_a_piece_of_one_document_in_every_layout(tmp_path: Path) -> None:
    a, _ = bench_scaling.arguments(
        ["none.yaml", "--parts", "speed", "--seq-len", "512", "--vocab", "512", "--gpus", "2"]
    )
    corpora = bench_scaling.make_corpora(tmp_path, a)
    taken = {}
    for name, words in bench_scaling.timed_runs(a, corpora).items():
        cfg = config.load(
            Path(config.__file__).parent / "configs" / "demo.yaml", ["--data.build", "null", *words]
        )
        world = cfg.launch.processes // cfg.mesh.group
        loader = PackedLoader(
            cfg.data, micro_batch=1, accumulation=cfg.train.global_batch, rank=0, world=1
        )
        batches = [batch for _ in range(a.steps) for batch in loader.next_step()]
        loader.close()
        assert [batch.lengths for batch in batches] == [[512]] * world * a.steps
        taken[name] = [batch.sample_ids[0] for batch in batches]
    assert taken["one"] == taken["group 2"] == list(range(6))
    assert taken["data 2"] == list(range(12))


def test_a_corpus_of_several_documents_a_sequence_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    whole = bench_scaling.documents

    def broken(folder: Path, size: int, count: int) -> list[str]:
        return whole(folder, size // 50, 50)

    monkeypatch.setattr(bench_scaling, "documents", broken)
    with pytest.raises(RuntimeError, match="are not 128 tokens of one document"):
        bench_scaling.whole_corpus(tmp_path / "x", corpus / "tokenizer.model", 128, 40)


def test_scaling_says_whether_its_bars_hold(capsys: pytest.CaptureFixture[str]) -> None:
    figures = {"spread": 0.1, "mfu": None, "memory_gib": 1.0, "loss": 1.0}
    one = figures | {"ranks": 1, "tokens_per_s": 100.0}
    data, group = (figures | {"ranks": 2, "tokens_per_s": speed} for speed in (191.0, 179.0))
    results = {"parity": {"passed": True}, "one": one, "group 2": group, "data 2": data}
    results["long"] = group
    found = {bar["run"]: (bar["share"], bar["bar"], bar["holds"])
             for bar in bench_scaling.verdicts(results)}  # fmt: skip
    assert found == {"group 2": (0.895, 0.9, False), "data 2": (0.955, 0.95, True)}
    bench_scaling.show(results)
    said = capsys.readouterr().out
    assert "data 2: 95.5% of one rank's tokens/s per rank, at least 95%: holds" in said
    assert "group 2: 89.5% of one rank's tokens/s per rank, at least 90%: MISSED" in said
    assert bench_scaling.verdicts({"group 2": group}) == []


def test_bench_step_compares_settings_on_two_ranks(tmp_path: Path, corpus: Path) -> None:
    path, figures = tiny_config(tmp_path, corpus), tmp_path / "step.json"
    words = ["bench", "step", str(path), "--gpus", "2", "--variants", "sparse", "--steps", "2"]
    words += ["--settings", "gathered", "resident", "--skip", "1", "--json", str(figures)]
    words += ["--trace", str(tmp_path / "traces"), "--model.vocab_size", "512"]
    code, output = finish(tiny_onn(*words))
    assert code == 0, output
    assert "MFU = tokens/s x FLOPs per token" in output
    found = json.loads(figures.read_text())
    assert list(found) == ["sparse, gathered", "sparse, resident"]
    for run in found.values():
        assert run["ranks"] == 2 and run["tokens_per_s"] == pytest.approx(8 * 64e3 / run["ms"])
        assert set(run["parts_ms"]) == {"tables", "forward", "backward", "optimizer"}
        # Weights that stay are the same weights: so are the losses, of the step traced, too.
        assert run["losses"] == found["sparse, gathered"]["losses"] and len(run["losses"]) == 3
    assert (tmp_path / "traces" / "sparse-resident.json.gz").exists()
    assert "aten::mm" in (tmp_path / "traces" / "sparse-resident.txt").read_text()
