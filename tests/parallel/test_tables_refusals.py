"""Row tables refuse what cannot be right, name it, and stop after a failure."""

import re
from types import SimpleNamespace

import pytest
import torch

from parallel import table_tiers
from parallel.table_layout import TableConfig, TableError
from parallel.tables import RowTable
from tests.parallel.table_runs import SINGLE, Run, make_table
from tests.ranks import RankError, run_ranks


@pytest.mark.parametrize(
    ("ids", "text"),
    [([0, 1, 97], "id 97 at position 2"), ([4, -1], "id -1 at position 1"), ([], "no ids")],
)
def test_ids_outside_the_table_are_refused_with_their_position(ids, text):
    table = make_table(SINGLE, Run())
    with pytest.raises(TableError, match=f"table 't'.*{text}"):
        table.fetch(torch.tensor(ids, dtype=torch.int64))


def test_refused_id_is_told_with_the_tokenizer_it_comes_from():
    source = "corpus/mine/tokenizer.model (98 ids)"
    table = RowTable("t", 97, 12, SINGLE, TableConfig(), ids_from=source)
    text = rf"id 97 at position 1 of rank 0's batch .*0\.\.96.*from {re.escape(source)}"
    with pytest.raises(TableError, match=text):
        table.prefetch(torch.tensor([3, 97]))


def fetch_bad_id_on_rank_1(mesh, run):
    table = make_table(mesh, run)
    try:
        table.fetch(torch.tensor([5, 97 if mesh.rank == 1 else 6]))
    except TableError as error:
        return str(error)
    return ""


def test_peers_of_a_rank_with_a_bad_id_stop_too():
    peer, culprit = run_ranks(fetch_bad_id_on_rank_1, 2, Run())
    assert "rank 1 refused its batch" in peer
    assert "id 97 at position 1 of rank 1" in culprit


def test_step_without_a_gradient_is_refused():
    table = make_table(SINGLE, Run())
    with pytest.raises(TableError, match="call accumulate"):
        table.step(0.1)
    with pytest.raises(TableError, match="call accumulate"):
        table.grad_sq_norm()


def test_rows_without_a_gradient_count_as_zero():
    table = make_table(SINGLE, Run())
    table.accumulate(table.fetch(torch.tensor([1])))
    assert float(table.grad_sq_norm()) == 0.0


def test_table_that_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(table_tiers, "available_host_bytes", lambda: 2**20)
    monkeypatch.setattr(table_tiers, "MemoryTier", lambda *_: pytest.fail("allocated"))
    needed = 4 * 1000 * (2 * 512 + 2)
    with pytest.raises(TableError, match=f"need {needed:,} bytes.*host memory, 943,718 bytes"):
        RowTable("big", 1000, 512, SINGLE, TableConfig())


def build_too_large(mesh, available):
    table_tiers.available_host_bytes = lambda: available
    RowTable("big", 1000, 512, mesh, TableConfig())


def test_ranks_of_one_machine_must_fit_together():
    alone = int(4 * 1000 * (2 * 512 + 2) / 2 / 0.8)
    with pytest.raises(RankError, match=r"2 rank\(s\) on .* need 4,104,000 bytes"):
        run_ranks(build_too_large, 2, alone)


def test_limits_of_control_groups_count_as_available_memory(tmp_path):
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    names = ("memory.max", "memory.current", "inactive_file")
    assert table_tiers._free_in_group(tmp_path, *names) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert table_tiers._free_in_group(tmp_path, *names) > 2**60
    assert 0 < table_tiers.available_host_bytes() < 2**50


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "sgd"},
        {"tier": "tape"},
        {"betas": (0.9, 1.0)},
        {"eps": 0.0},
        {"transport": "fp8"},
        {"tier": "nvme"},
    ],
)
def test_configurations_that_cannot_be_meant_are_refused_by_key(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TableConfig(**change).validate()


def test_failure_on_the_tier_thread_stops_every_later_call():
    table = make_table(SINGLE, Run())
    rows = table.fetch(torch.tensor([1, 2]))
    rows.whole().sum().backward()
    table.accumulate(rows)
    table._work.tier = SimpleNamespace(**vars(table._tier), slots=None)
    table.step(0.1)
    for call in (lambda: table.fetch(torch.tensor([1])), table.flush, table.local_state):
        with pytest.raises(TypeError):
            call()


def test_state_that_does_not_belong_to_the_table_is_refused():
    table = make_table(SINGLE, Run())
    good = {name: value.clone() for name, value in table.local_state().items()}
    for change, text in (
        ({"ids": good["ids"] + 1}, "ids 1..97, the table has 97 rows"),
        ({"ids": good["ids"].clamp(max=95)}, "holds a row twice"),
        ({"weight": good["weight"][:, :5].clone()}, r"field 'weight'.*\(97, 5\)"),
        ({"weight": good["weight"].bfloat16()}, "field 'weight' of the state is torch.bfloat16"),
        ({"sum_sq": good["steps"]}, "the optimizer needs"),
    ):
        with pytest.raises(TableError, match=text):
            table.load_local_state({**good, **change})
    with pytest.raises(TableError, match="lacks 96 of the 97 rows of rank 0, the first is id 1"):
        table.load_local_state({name: value[:1] for name, value in good.items()})
