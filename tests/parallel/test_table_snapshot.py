"""A table is saved as it was at one moment, while its rows go on changing, with no second copy."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.host_buffers import HostBuffers
from parallel.table_layout import TableConfig, TableError
from parallel.table_snapshot import TableSnapshot
from parallel.tables import RowTable
from tests.parallel.table_runs import (
    SINGLE,
    Run,
    gathered,
    make_table,
    save_beside_steps,
    train,
)

LAST = 12


def configurations(folder: Path) -> list[TableConfig]:
    return [
        TableConfig(),
        TableConfig(optimizer="adam"),
        TableConfig(tier="nvme", nvme_path=str(folder), cache_rows=9, direct=False),
    ]


def state_of(table: RowTable) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in table.local_state().items()}


def test_rows_that_change_while_they_are_read_are_saved_as_they_were(tmp_path: Path) -> None:
    for cfg in configurations(tmp_path):
        run = Run(cfg, rows=61)
        table = make_table(SINGLE, run)
        train(SINGLE, run, table, last=4)
        before = state_of(table)
        source = table.snapshot(HostBuffers(SINGLE), chunk_bytes=700)
        assert source.in_memory
        assert len(source.specs) > 5 * len(before)
        pieces = {}
        step = 4
        for name, tensor in source:
            pieces[name] = tensor.clone()
            # Between any two tensors of the file a whole step changes rows of all ages.
            if step < LAST:
                train(SINGLE, run, table, first=step, last=step + 1)
                step += 1
        source.close()
        saved = gathered(pieces, run.rows)
        assert saved.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(saved[name], value), (cfg.tier, cfg.optimizer, name)
        # What was trained meanwhile is what it would have been.
        after = state_of(table)
        table.close()
        straight = make_table(SINGLE, run)
        train(SINGLE, run, straight, last=LAST)
        for name, value in state_of(straight).items():
            assert torch.equal(after[name], value), name
        straight.close()


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_checkpoint_written_beside_steps_is_the_state_of_its_own(tier: str, tmp_path: Path) -> None:
    cfg = TableConfig(tier=tier, nvme_path=str(tmp_path), cache_rows=9, direct=False)  # type: ignore[arg-type]
    save_beside_steps(SINGLE, tmp_path / "checkpoints", Run(cfg))


def test_an_update_under_way_belongs_to_the_snapshot_behind_it() -> None:
    table, run = make_table(SINGLE, Run()), Run()
    train(SINGLE, run, table, last=1)
    before = state_of(table)
    rows = table.fetch(run.ids(1, 0, 0))
    rows.whole().sum().backward()
    table.accumulate(rows)
    table.grad_sq_norm()
    gate = threading.Event()
    table._thread.submit(gate.wait)
    table.step(run.lr)
    source = table.snapshot(None, chunk_bytes=700)
    gate.set()
    saved = gathered({name: tensor.clone() for name, tensor in source}, run.rows)
    source.close()
    assert not torch.equal(saved["weight"], before["weight"])
    for name, value in state_of(table).items():
        assert torch.equal(saved[name], value), name
    table.close()


def test_second_snapshot_waits_its_turn_and_a_closed_one_holds_nothing() -> None:
    table = make_table(SINGLE, Run())
    train(SINGLE, Run(), table, last=1)
    first = table.snapshot(None)
    with pytest.raises(TableError, match="snapshot before is still being read"):
        table.snapshot(None)
    first.close()
    train(SINGLE, Run(), table, first=1, last=2)
    assert table._snapshot is not None
    assert table._snapshot._copies == []
    second = table.snapshot(None)
    assert len(list(second)) == len(second.specs)
    second.close()
    table.close()


def test_copy_made_while_the_reader_leaves_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(all_ids=True)
    table = make_table(SINGLE, run)
    train(SINGLE, run, table, last=1)
    source = table.snapshot(None, chunk_bytes=700)
    peek = table._tier.peek

    def leave(index_N: Tensor) -> dict[str, Tensor]:
        copies = peek(index_N)
        source.close()
        return copies

    monkeypatch.setattr(table._tier, "peek", leave)
    train(SINGLE, run, table, first=1, last=2)
    table.flush()
    assert table._snapshot is not None and table._snapshot.finished
    assert table._snapshot._copies == [] and table._snapshot._held == 0
    table.close()


def test_memory_of_a_snapshot_is_that_of_rows_in_a_gpus_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for cfg in configurations(tmp_path):
        table = make_table(SINGLE, Run(cfg))
        assert table.snapshot_bytes == 0
        table.close()
    table = make_table(SINGLE, Run(TableConfig(tier="device")))
    # As a GPU's, of which a snapshot copies all fields to buffers that stay.
    monkeypatch.setattr(table._tier, "device", torch.device("cuda"))
    buffers = HostBuffers(SINGLE)
    table.snapshot(buffers)
    held = sum(buffer.nbytes for buffer in buffers._buffers.values())
    assert table.snapshot_bytes == held == 4 * 97 * table.layout.columns


def test_step_waits_while_a_slow_reader_lets_copies_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("parallel.table_snapshot.COPIES_FLOOR", 0)
    monkeypatch.setattr("parallel.table_snapshot.COPIES_SHARE", 0.0)
    run = Run(all_ids=True)
    table = make_table(SINGLE, run)
    train(SINGLE, run, table, last=1)
    before = state_of(table)
    source = table.snapshot(None, chunk_bytes=700)
    train(SINGLE, run, table, first=1, last=2)
    late = threading.Thread(target=train, args=(SINGLE, run, table, 2, 3))
    late.start()
    late.join(0.5)
    assert late.is_alive()
    # Every row has changed since.
    saved = gathered({name: tensor.clone() for name, tensor in source}, run.rows)
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    late.join(200)
    assert not late.is_alive()
    source.close()
    table.close()


def test_empty_share_of_a_table_is_one_empty_piece() -> None:
    table = make_table(SINGLE, Run(rows=1))
    snapshot = TableSnapshot(table._tier, table._thread, torch.zeros(0, dtype=torch.bool), 100)
    pieces = dict(snapshot.source(1, 2))
    assert pieces["000000/ids"].shape == (0,)
    assert pieces["000000/weight"].shape == (0, 12)
    table.close()


def test_untouched_rows_take_no_room_and_come_back_as_zero() -> None:
    run = Run(rows=5000, tokens=20)
    table = make_table(SINGLE, run)
    train(SINGLE, run, table, last=2)
    before = state_of(table)
    pieces: dict[str, dict[str, Tensor]] = {}
    source = table.snapshot(None, chunk_bytes=700)
    for name, tensor in source:
        number, _, field = name.partition("/")
        pieces.setdefault(number, {})[field] = tensor.clone()
    source.close()
    saved = sum(piece["ids"].shape[0] for piece in pieces.values() if "ids" in piece)
    assert saved == int((before["steps"] > 0).sum()) < 200
    # Rolled back in place, and into a table of its own.
    train(SINGLE, run, table, first=2, last=4)
    fresh = make_table(SINGLE, run)
    for other in (table, fresh):
        other.load_shards(pieces.values())
        assert all(torch.equal(state_of(other)[name], value) for name, value in before.items())
        other.close()
    with pytest.raises(TableError, match="lacks 4"):
        again = make_table(SINGLE, run)
        again.load_shards([piece for piece in pieces.values() if "ids" in piece])
