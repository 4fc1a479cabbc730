"""Rows of a table are read from a checkpoint in the order of their ids, untouched ones as zero."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parallel.checkpoint import CheckpointStore
from parallel.checkpoint_read import TABLE, TableReader
from tests.parallel.table_runs import SINGLE, Run, make_table, train


def test_rows_that_no_step_has_touched_are_read_as_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(rows=500, tokens=20)
    table = make_table(SINGLE, run)
    train(SINGLE, run, table, last=2)
    store = CheckpointStore(tmp_path, SINGLE)
    store.save(1, {TABLE + "t": table.snapshot(None, chunk_bytes=700)}, {}, {})
    expected = {name: field.clone() for name, field in table.local_state().items()}
    table.close()
    assert 5 < int(expected["weight"].any(dim=1).sum()) < 100
    found = store.newest()
    assert found is not None
    (reader,) = TableReader.all(found)
    assert reader.rows == 500
    assert reader.widths == {n: f.shape[1] for n, f in expected.items() if n != "ids"}
    # Stretches that begin and end between the pieces' ids, and within them.
    monkeypatch.setattr("parallel.checkpoint_read.ROWS_BYTES", 4 * sum(reader.widths.values()) * 37)
    stretches = list(reader.stretches())
    assert [first for first, _ in stretches] == list(range(0, 500, 37))
    for name in reader.widths:
        assert torch.equal(torch.cat([fields[name] for _, fields in stretches]), expected[name])
