"""Row tables equal a dense table, at any number of ranks, and repeat bit for bit."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from kernels.modulate import modulate
from kernels.rows import gather_rows
from parallel.mesh import Mesh
from parallel.table_batch import Parts
from parallel.table_exchange import Exchange
from parallel.table_layout import TableConfig, TableError
from parallel.tables import RowTable
from tests.parallel.table_runs import (
    SINGLE,
    Result,
    Run,
    batch_ids,
    dense_reference,
    make_table,
    run_all,
    train,
    train_one,
    whole,
)
from tests.ranks import run_ranks

OPTIMIZERS = ["adam", "adam_rowwise", "adagrad_rowwise"]
PLAIN = Run(accumulation=2, steps=8)
AHEAD = [replace(PLAIN, prefetch=when) for when in ("within", "before_step", "after_step")]
PARTS = replace(PLAIN, prefetch="within", groups=3)
LOW = replace(PLAIN, dtype=torch.bfloat16)


def assert_same_bits(ours: list[Result], others: list[Result]) -> None:
    for a, b in zip(ours, others, strict=True):
        assert a.losses == b.losses
        assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)


@pytest.fixture(scope="module", params=[1, 2])
def runs(request):
    """The same run plain, with every way of prefetching, and in bf16, at 1 and 2 ranks."""
    return request.param, run_all([PLAIN, *AHEAD, LOW], request.param)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 3), (2, 3), (4, 1)])
def test_losses_and_rows_equal_the_dense_reference(world, accumulation):
    decay = 0.1 if accumulation == 3 else 0.0
    cases = [
        Run(
            TableConfig(optimizer=name, weight_decay=decay, lr_multiplier=1.5),
            accumulation=accumulation,
        )
        for name in OPTIMIZERS
    ]
    cases += [replace(cases[1], groups=3), replace(cases[1], groups=3, sink=True)]
    for run, results in zip(cases, run_all(cases, world), strict=True):
        losses, weight = dense_reference(run, world)
        got = torch.tensor([result.losses for result in results])
        torch.testing.assert_close(got, torch.tensor(losses), rtol=2e-5, atol=2e-6)
        state = whole([result.state for result in results])
        assert torch.equal(state["ids"], torch.arange(run.rows))
        torch.testing.assert_close(state["weight"], weight, rtol=1e-4, atol=2e-6)
        assert float(weight.abs().max()) > 0.1


def test_adam_is_torch_adam_bit_for_bit_when_every_row_is_touched():
    run = Run(TableConfig(optimizer="adam"), all_ids=True, data_world=1)
    state = train_one(SINGLE, run).state
    weight = torch.nn.Parameter(torch.zeros(run.rows, run.width))
    adam = torch.optim.Adam(
        [weight], lr=run.lr, betas=run.cfg.betas, eps=run.cfg.eps, foreach=False
    )
    for step in range(run.steps):
        ids = batch_ids(run, step, 0, SINGLE)
        run.loss(1 + weight[ids], ids).backward()
        norm = torch.linalg.vector_norm(weight.grad, dim=1).double().square().sum().sqrt()
        weight.grad *= min(1.0, run.clip / float(norm))
        adam.step()
        adam.zero_grad()
    assert torch.equal(state["weight"], weight.detach())


def test_same_world_size_repeats_bit_for_bit(runs):
    world, (plain, *_) = runs
    assert_same_bits(plain, run_all([PLAIN], world)[0])


def test_prefetching_changes_no_bit(runs):
    _, (plain, *ahead, _) = runs
    for results in ahead:
        assert_same_bits(plain, results)
        assert all(result.stats["prefetch_hits"] > 0 for result in results)


def test_bf16_transport_stays_near_fp32_and_keeps_fp32_rows(runs):
    _, (plain, *_, low) = runs
    for a, b in zip(plain, low, strict=True):
        assert b.state["weight"].dtype == torch.float32
        torch.testing.assert_close(
            torch.tensor(b.losses), torch.tensor(a.losses), rtol=2e-2, atol=2e-2
        )
        assert b.stats["row_bytes"] * 2 == a.stats["row_bytes"]


def resume(mesh, run, shards):
    table = make_table(mesh, run)
    table.load_shards(iter(shards))
    loaded = {name: value.clone() for name, value in table.local_state().items()}
    pieces = list(table.state_chunks(500))
    assert len(pieces) > 3
    losses = train(mesh, run, table, first=run.steps, last=run.steps + 4)
    return losses, loaded, {name: value.clone() for name, value in table.local_state().items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saved_rows_load_bit_for_bit_on_one_rank_and_continue(optimizer):
    run = Run(TableConfig(optimizer=optimizer), steps=5)
    straight = train_one(SINGLE, replace(run, steps=9))
    losses, _, state = resume(SINGLE, run, [train_one(SINGLE, run).state])
    assert losses == straight.losses[5:]
    assert all(torch.equal(state[name], straight.state[name]) for name in state)


def test_rows_saved_by_two_ranks_load_on_one_and_on_four(runs):
    world, (plain, *_) = runs
    shards = [result.state for result in plain]
    saved = whole(shards)
    for others in (1, 4) if world == 2 else (2,):
        results = (
            [resume(SINGLE, PLAIN, shards)]
            if others == 1
            else run_ranks(resume, others, PLAIN, shards)
        )
        loaded = whole([result[1] for result in results])
        assert all(torch.equal(loaded[name], saved[name]) for name in saved)
        # The rows of the same global batch; only the order of summation differs.
        ours = whole([result[2] for result in results])["weight"]
        again = resume(SINGLE, PLAIN, shards)[2]["weight"]
        torch.testing.assert_close(ours, again, rtol=1e-4, atol=1e-5)


def test_row_updated_between_prefetch_and_fetch_is_read_again():
    table = make_table(SINGLE, Run())
    ids = torch.tensor([3, 5, 5, 8])
    rows = table.fetch(ids)
    table.prefetch(torch.tensor([5, 7, 8]))
    rows.whole().sum().backward()
    table.accumulate(rows)
    table.step(0.1)
    ahead = table.fetch(torch.tensor([5, 7, 8])).whole()
    assert table._counts["prefetch_hits"] == 3
    assert bool((ahead[0] != 0).all()) and bool((ahead[2] != 0).all())
    assert bool((ahead[1] == 0).all())
    assert torch.equal(ahead, table.fetch(torch.tensor([5, 7, 8])).whole())


def filled_table():
    table = make_table(SINGLE, Run(groups=3))
    state = {
        name: torch.randn_like(value)
        for name, value in table.local_state().items()
        if name != "ids"
    }
    table.load_local_state({"ids": torch.arange(97), **state})
    return table, state["weight"]


def test_rows_left_to_an_update_that_does_not_come_are_read():
    table, weight = filled_table()
    for end in ("same step", "skip", "no gradient"):
        first, second = torch.tensor([9, 1, 2]), torch.tensor([2, 9, 60, 4])
        rows = table.fetch(first)
        table.prefetch(second)
        table.flush()
        assert table._ahead.deferred_N.shape[0] == 2
        if end == "skip":
            rows.whole().sum().backward()
            table.accumulate(rows)
            table.skip()
        elif end == "no gradient":
            # Only other rows are stepped, and by nothing.
            other = table.fetch(torch.tensor([50]))
            table.prefetch(second)
            table.accumulate(other)
            table.step(0.0)
        after = table.fetch(second)
        assert table._counts["prefetch_hits"] == 4
        assert torch.equal(after.whole()[after.inverse_T], weight[second])
        table.skip()


def test_evaluation_leaves_what_was_read_ahead():
    table, weight = filled_table()
    coming = torch.tensor([9, 1, 2, 60])
    table.prefetch(coming)
    with torch.no_grad():
        rows = table.fetch(torch.tensor([3, 4]))
        assert torch.equal(rows.whole(), weight[3:5])
        assert not rows.parts[0].requires_grad
    table.skip()
    rows = table.fetch(coming)
    assert table._counts["prefetch_hits"] == 4
    assert torch.equal(rows.whole()[rows.inverse_T], weight[coming])


def test_parts_may_arrive_while_earlier_ones_are_in_use():
    table = RowTable("t", 9, 6, SINGLE, TableConfig(), groups=3)
    ids = torch.tensor([1, 4, 4])
    staged = table._stage(ids, defer=False)
    table.flush()
    arrived = []
    parts = Parts(
        staged,
        table._exchange,
        lambda: None,
        stream=None,
        buffer=None,
        arrived=lambda k, grad: arrived.append((k, grad)),
    )
    x = torch.ones(3, 2)
    for k in range(3):
        # As the update writes it: after the parts before went into the graph.
        staged.rows_LNw[k].fill_(k + 1)
        staged.gate.post(k + 1)
        x = modulate(x, parts[k], staged.index)
    assert bool((x == 2 * 3 * 4).all())
    x.sum().backward()
    assert [k for k, _ in arrived] == [2, 1, 0]
    assert [grad[:, 0].tolist() for _, grad in arrived] == [[6, 12], [8, 16], [12, 24]]
    table.close()


def test_drawn_weights_are_alike_at_every_world_size():
    def drawn(rank, world):
        mesh = Mesh(rank, world, rank, world, torch.device("cpu"), world, 1)
        table = RowTable.__new__(RowTable)
        # Only what the ranks decide together is left out.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Exchange, "gather_objects", lambda _, value: [value])
            patch.setattr(torch.distributed, "new_group", lambda **_: None)
            table.__init__("t", 1100, 6, mesh, TableConfig(), groups=3)
        table.draw_part(1, 0.5, 7)
        return {name: value.clone() for name, value in table.local_state().items()}

    alone = drawn(0, 1)
    parts = whole([drawn(rank, 3) for rank in range(3)])
    assert all(torch.equal(parts[name], alone[name]) for name in alone)
    weight = alone["weight"]
    assert 0.45 < float(weight[:, 2:4].std()) < 0.55
    assert not weight[:, :2].any() and not weight[:, 4:].any()


def fetch_lopsided(mesh, run):
    # A table of fewer rows than ranks leaves two ranks without any.
    assert len(train_one(mesh, Run(rows=2, steps=2)).state["ids"]) == (mesh.rank < 2)
    table = make_table(mesh, run)
    # Rank 0 has one id, owned by the last rank; the others ask only for rows of rank 0.
    ids = torch.tensor([mesh.world - 1] * 3) if mesh.rank == 0 else torch.tensor([0, mesh.world])
    for _ in range(3):
        rows = table.fetch(ids)
        loss = run.loss(1 + gather_rows(rows.whole(), rows.lookup), ids)
        loss.backward()
        table.accumulate(rows)
        table.grad_sq_norm()
        table.step(0.1)
    return {name: value.clone() for name, value in table.local_state().items()}


def test_ranks_that_own_no_row_of_the_batch_keep_step():
    state = whole(run_ranks(fetch_lopsided, 4, Run()))
    touched = (state["weight"] != 0).any(dim=1).nonzero()[:, 0]
    assert touched.tolist() == [0, 3, 4]
    assert state["steps"][touched].flatten().tolist() == [3, 3, 3]


def test_skip_leaves_every_row_as_it_is():
    run = Run()
    table = make_table(SINGLE, run)
    train(SINGLE, run, table, last=3)
    before = {name: value.clone() for name, value in table.local_state().items()}
    ids = batch_ids(run, 3, 0, SINGLE)
    rows = table.fetch(ids)
    (rows.whole() * float("nan")).sum().backward()
    table.accumulate(rows)
    assert not torch.isfinite(table.grad_sq_norm())
    table.skip()
    assert all(torch.equal(before[n], value) for n, value in table.local_state().items())
    train(SINGLE, run, table, first=3)
    uninterrupted = train_one(SINGLE, run).state
    assert all(torch.equal(uninterrupted[n], v) for n, v in table.local_state().items())


def test_activation_checkpointing_fetches_nothing_twice():
    run = Run(steps=1)
    table = make_table(SINGLE, run)
    ids = batch_ids(run, 0, 0, SINGLE)
    rows = table.fetch(ids)
    fetched = dict(table._counts)

    def forward(values, lookup):
        return run.loss(1 + gather_rows(values, lookup), ids)

    torch.utils.checkpoint.checkpoint(
        forward, rows.whole(), rows.lookup, use_reentrant=False
    ).backward()
    assert table._counts == fetched
    plain = table.fetch(ids)
    forward(plain.whole(), plain.lookup).backward()
    assert torch.equal(rows.gradient.wait(0), plain.gradient.wait(0))


def test_memory_of_a_batch_is_free_behind_its_step_without_garbage_collection():
    table = make_table(SINGLE, Run(groups=3))
    gone = []
    gc.collect()
    gc.disable()
    try:
        for step in range(3):
            ids = batch_ids(Run(), step, 0, SINGLE)
            rows = table.fetch(ids)
            table.prefetch(batch_ids(Run(), step + 1, 0, SINGLE))
            sinks = [rows.parts.sink(k) for k in (0, 1)]
            parts = list(rows.parts)
            x = torch.ones(len(ids), 4, requires_grad=True)
            for part, sink in zip(parts, [*sinks, None], strict=True):
                x = modulate(x, part, rows.lookup, None, sink)
            x.sum().backward()
            table.accumulate(rows)
            table.step(0.1)
            table.flush()
            gone += [weakref.ref(o) for o in (rows.parts, rows.gradient, rows.parts._staged)]
            del rows, parts, part, x, sinks, sink
        assert [ref() for ref in gone] == [None] * 9
    finally:
        gc.enable()
    table.close()


def test_second_gradient_of_a_layer_is_refused():
    table = make_table(SINGLE, Run(groups=3))
    rows = table.fetch(torch.tensor([1, 2]))
    sink = rows.parts.sink(1)
    x = torch.ones(2, 4, requires_grad=True)
    for _ in range(2):
        x = modulate(x, rows.parts[1], rows.lookup, None, sink)
    with pytest.raises(TableError, match="second gradient of part 1"):
        x.sum().backward()
    table.close()


def test_gradients_handed_over_at_once_are_those_of_autograd():
    results = []
    for direct in (False, True):
        table, run = make_table(SINGLE, Run(groups=3)), Run(groups=3)
        for step in range(4):
            for batch in range(2):
                rows = table.fetch(ids := batch_ids(run, step, batch, SINGLE))
                x = torch.ones(len(ids), 4, requires_grad=True)
                for k in range(3):
                    sink = rows.parts.sink(k) if direct and k else None
                    x = modulate(x, rows.parts[k], rows.lookup, x, sink)
                x.square().mean().backward()
                table.accumulate(rows)
            table.step(run.lr, 1.0 / (1.0 + float(table.grad_sq_norm())))
        results.append({name: value.clone() for name, value in table.local_state().items()})
        table.close()
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_fp32_transport_ignores_the_compute_type():
    table = make_table(SINGLE, Run(TableConfig(transport="fp32"), dtype=torch.bfloat16))
    assert table.fetch(torch.tensor([1])).whole().dtype == torch.float32


def test_gradients_of_micro_batches_add_up_by_row():
    table = RowTable("t", 9, 2, SINGLE, TableConfig())
    for ids, grads in (([2, 5], [1.0, 2.0]), ([2], [4.0]), ([1, 5], [8.0, 16.0])):
        rows = table.fetch(torch.tensor(ids))
        (rows.whole() * torch.tensor(grads)[:, None]).sum().backward()
        table.accumulate(rows)
    index, part_of = table._gradient.rows()
    table.flush()
    assert index.tolist() == [2, 5, 1]
    assert part_of(0)[:, 0].tolist() == [5.0, 18.0, 8.0]
    assert float(table.grad_sq_norm()) == 2 * (25 + 324 + 64)
