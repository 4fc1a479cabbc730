"""The trace of a few steps: recorded where asked for, readable, and nothing otherwise."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from launcher.trace import Trace


def _train(trace: Trace, steps: int) -> None:
    x = torch.randn(8, 8)
    for finished in range(steps):
        trace.step(finished)
        for _ in range(finished + 1):
            x = x @ x.softmax(1)
    trace.close()


def test_exactly_the_steps_asked_for_are_recorded(tmp_path: Path) -> None:
    _train(Trace(tmp_path / "traces", 3, 2, torch.device("cpu")), 6)
    with gzip.open(tmp_path / "traces" / "step-00000003.json.gz", "rt") as f:
        events = json.load(f)["traceEvents"]
    products = [e for e in events if e.get("name") == "aten::mm" and e.get("ph") == "X"]
    # Steps 3 and 4, of 3 and 4 products.
    assert len(products) == 7
    table = (tmp_path / "traces" / "step-00000003.txt").read_text()
    assert "host:" in table and "aten::mm" in table


def test_a_run_that_ends_early_leaves_what_was_recorded(tmp_path: Path) -> None:
    _train(Trace(tmp_path, 2, 100, torch.device("cpu")), 3)
    assert "aten::mm" in (tmp_path / "step-00000002.txt").read_text()


def test_nothing_is_recorded_unless_asked_for(tmp_path: Path) -> None:
    _train(Trace(tmp_path / "traces", 0, 2, torch.device("cpu")), 4)
    assert not (tmp_path / "traces").exists()
