"""`bench tables`: its check passes and can fail, and what it saves is the table of one moment."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher import bench_tables
from launcher.bench_tables import check
from parallel.table_layout import TableConfig
from parallel.tables import RowTable
from parallel.tensor_file import TensorSource
from tests.parallel.table_runs import SINGLE


def test_check_compares_every_case_with_the_dense_reference(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check((1,))
    lines = capsys.readouterr().out.splitlines()
    cases = {line.split("rank(s), ")[1].split("  ")[0] for line in lines}
    assert {"adam", "adam_rowwise", "adagrad_rowwise", "nvme tier", "compiled kernel"} <= cases
    assert all(line.startswith("check 1 rank(s)") and line.endswith(" ok") for line in lines)


def test_check_fails_with_the_message_of_ranks_that_fail(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {1: '{"ranks": 1, "case": "adam", "passed": false, ' + ROW, 2: ""}

    def ranks(world: int, *_: Any) -> SimpleNamespace:
        return SimpleNamespace(returncode=world - 1, stdout=answers[world], stderr="no such rank")

    monkeypatch.setattr(bench_tables, "_ranks", ranks)
    assert not check((1,)) and "WRONG" in capsys.readouterr().out
    assert not check((2,)) and "no such rank" in capsys.readouterr().out


ROW = '"loss_gap": 1.0, "row_gap": 1.0, "largest": 2.0}'


def test_rows_on_the_device_are_saved_as_they_were_when_saving_began(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = RowTable("t", 97, 12, SINGLE, TableConfig(tier="device"))
    weight = table._tier.fields["weight"]
    weight.fill_(1.0)
    # As a GPU's: not read beside the steps but copied, or live.
    monkeypatch.setattr(table._tier, "device", torch.device("cuda"))
    stepped = threading.Event()

    def turn(_: int) -> dict[str, float]:
        weight.add_(1.0)
        stepped.set()
        return {"seconds": 0.1}

    saved: dict[str, torch.Tensor] = {}

    def write(path: Path, source: TensorSource) -> dict[str, int]:
        assert stepped.wait(300)
        saved.update((name, tensor.clone()) for name, tensor in source)
        path.touch()
        return {"size": sum(tensor.nbytes for tensor in saved.values())}

    monkeypatch.setattr(bench_tables, "write_tensors", write)
    subject: Any = SimpleNamespace(table=table, turn=turn)
    found = bench_tables._save_beside(subject, argparse.Namespace(save=tmp_path, steps=1))
    assert found["bytes"] == 97 * (8 + 4 * table.layout.columns)
    assert bool((weight > 1).all()) and bool((saved["000000/weight"] == 1).all())
    assert list(tmp_path.iterdir()) == []
