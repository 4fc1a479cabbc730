"""`bench routing` trains every variant on the same batches and says what came of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.bench_routing import main
from tests.launcher.tiny import tiny_config, tiny_corpus


def test_every_variant_and_seed_is_trained_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tmp_path, tiny_corpus(tmp_path))
    figures = tmp_path / "routing.json"
    words = [str(config), "--seeds", "0", "1", "--every", "2", "--sequences", "4"]
    words += ["--json", str(figures), "--variants", "param_grad", "dense"]
    words += ["again=--model.ffn.surprise param_grad", "--train.steps", "6"]
    # Two looks at the pool: experts that nothing reaches must not upset a run without an engine.
    words += ["--model.ffn.dead_window", "3", "--model.ffn.max_pool", "6"]
    assert main(words) == 0
    results = json.loads(figures.read_text())
    assert set(results) == {"param_grad", "dense", "again"}
    for name, runs in results.items():
        assert [run["seed"] for run in runs] == [0, 1]
        assert all(3 < run["validation"] < 8 for run in runs)
        assert len(runs[0]["curve"]) == 3
        assert bool(runs[0]["experts_per_token"]) == (name != "dense")
    # The same words make the same run, and another seed another one.
    losses = {name: [run["validation"] for run in runs] for name, runs in results.items()}
    assert losses["param_grad"] == losses["again"]
    assert losses["param_grad"][0] != losses["param_grad"][1]
    assert "moe/surprise" in results["param_grad"][0]["curve"][0]
    assert "nats per label" in capsys.readouterr().out
