"""A saved dense state continues bitwise under every offload mode, and at any world size."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.engine import (
    Engine,
    EngineConfig,
    EngineError,
    OffloadConfig,
    OptimizerConfig,
    ZeroConfig,
)
from parallel.mesh import Mesh
from parallel.zero_state import KINDS, buffers_of, cut, full_tensors, partition_range
from tests.parallel.tiny import (
    Lengths,
    TinyModel,
    build_engine,
    config,
    global_batch,
    share,
    train,
)
from tests.ranks import RankError, Ranks

State = tuple[dict[str, Tensor], dict[str, Any]]

OFFLOADS = [
    OffloadConfig(),
    OffloadConfig(optimizer="cpu"),
    OffloadConfig(params="cpu"),
    OffloadConfig(optimizer="cpu", params="cpu"),
]


def logits_loss(engine: Engine) -> Tensor:
    """Return the loss of one fixed batch, without a step."""
    ids, labels = (share(t, engine.mesh).to(engine.device) for t in global_batch(99))
    one = torch.ones((), device=engine.device)
    engine.module.eval()
    with torch.no_grad():
        loss: Tensor = engine.forward(ids, labels, Lengths(ids.numel()), one).loss
    engine.module.train()
    return loss


def assert_same(found: State, expected: State, case: object) -> None:
    assert found[1] == expected[1], case
    assert found[0].keys() == expected[0].keys(), case
    for key, tensor in expected[0].items():
        assert torch.equal(found[0][key], tensor), (case, key)


def continue_exactly(mesh: Mesh, cfg: EngineConfig, width: int = 33, vocabulary: int = 50) -> None:
    """Assert that a run restored into a fresh engine and one rolled back equal one that went on."""

    def build() -> TinyModel:
        return TinyModel(width, vocabulary)

    first = build_engine(build, cfg, mesh, run="first")
    at_start = first.local_state()
    train(first, 0, 4, cfg.accumulation)
    saved, loss = first.local_state(), logits_loss(first)
    assert first.local_state()[1] == saved[1]
    json.dumps(saved[1])
    went_on = train(first, 4, 8, cfg.accumulation), first.local_state(), logits_loss(first)

    fresh = build_engine(build, cfg, mesh, seed=1, run="fresh")
    fresh.load_local_state(*saved)
    assert_same(fresh.local_state(), saved, cfg)
    assert torch.equal(logits_loss(fresh), loss), cfg
    for engine in (fresh, first):
        engine.load_local_state(*saved)
        again = train(engine, 4, 8, cfg.accumulation), engine.local_state(), logits_loss(engine)
        assert again[0] == went_on[0], cfg
        assert_same(again[1], went_on[1], cfg)
        assert torch.equal(again[2], went_on[2]), cfg
    first.load_local_state(*at_start)
    assert_same(first.local_state(), at_start, cfg)


def _continue_all(mesh: Mesh, precision: str) -> None:
    for offload in OFFLOADS:
        continue_exactly(mesh, config(precision=precision, offload=offload, accumulation=2))
    continue_exactly(mesh, config(precision=precision, zero=ZeroConfig(), accumulation=2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_restored_run_continues_bitwise(two_ranks: Ranks, precision: str) -> None:
    two_ranks.run(_continue_all, precision)


def _continue_on_cpu_adam(mesh: Mesh) -> None:
    offload = OffloadConfig(optimizer="cpu")
    optimizer = OptimizerConfig(kernel="deepspeed")
    cfg = config(precision="bf16", offload=offload, optimizer=optimizer)
    continue_exactly(mesh, cfg)
    engine = build_engine(TinyModel, cfg, mesh)
    assert type(engine._zero.optimizer).__name__ == "DeepSpeedCPUAdam"
    # A state of torch's kernel goes on under DeepSpeed's.
    other = build_engine(TinyModel, config(precision="bf16"), mesh)
    train(other, 0, 3)
    engine.load_local_state(*other.local_state())
    assert_same(engine.local_state(), other.local_state(), "kernel")
    one, two = (train(e, 3, 5)[-1].grad_norm for e in (engine, other))
    assert one == pytest.approx(two, rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_restored_run_continues_bitwise_with_the_compiled_cpu_kernel(two_ranks: Ranks) -> None:
    two_ranks.run(_continue_on_cpu_adam, timeout=1000)


def _move_between_offloads(mesh: Mesh) -> None:
    engine = build_engine(TinyModel, config(precision="bf16"), mesh)
    for offload in OFFLOADS[::-1]:
        train(engine, 0, 2)
        saved, loss = engine.local_state(), logits_loss(engine)
        engine = build_engine(TinyModel, config(precision="bf16", offload=offload), mesh)
        engine.load_local_state(*saved)
        assert_same(engine.local_state(), saved, offload)
        assert torch.equal(logits_loss(engine), loss)
    resident = build_engine(TinyModel, config(precision="bf16", zero=ZeroConfig()), mesh)
    resident.load_local_state(*saved)
    assert_same(resident.local_state(), saved, "resident")
    assert torch.equal(logits_loss(resident), loss)


def test_state_moves_between_offload_modes_bitwise(two_ranks: Ranks) -> None:
    two_ranks.run(_move_between_offloads)


def _save(mesh: Mesh, precision: str) -> tuple[State, list[float]]:
    engine = build_engine(TinyModel, config(precision=precision), mesh)
    train(engine, 0, 4)
    state = engine.local_state()
    return state, [r.grad_norm for r in train(engine, 4, 8)]


def _load(mesh: Mesh, precision: str, states: list[State]) -> tuple[State, list[float]]:
    engine = build_engine(TinyModel, config(precision=precision), mesh, seed=1)
    tensors, meta = states[mesh.rank % len(states)]
    if meta["world"] != mesh.world:
        with pytest.raises(EngineError, match="pass the shards of all saved ranks"):
            engine.load_local_state(tensors, meta)
    engine.load_local_state(tensors, meta, lambda rank: states[rank][0])
    state = engine.local_state()
    return state, [r.grad_norm for r in train(engine, 4, 8)]


def whole(states: list[State], kind: str) -> dict[str, Tensor]:
    return dict(full_tensors(states[0][1], lambda rank: states[rank][0], kind))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_of_two_ranks_loads_on_one_and_on_four_and_back(
    one_rank: Ranks, two_ranks: Ranks, precision: str
) -> None:
    found = two_ranks.run(_save, precision)
    states, norms = [state for state, _ in found], found[0][1]
    with Ranks(4) as four_ranks:
        for ranks in (one_rank, four_ranks):
            loaded = ranks.run(_load, precision, states)
            moved = [state for state, _ in loaded]
            for kind in KINDS:
                expected = whole(states, kind)
                for name, tensor in whole(moved, kind).items():
                    assert torch.equal(tensor, expected[name]), (kind, name)
            assert buffers_of(*moved[0]) == buffers_of(*states[0])
            assert loaded[0][1] == pytest.approx(norms, rel=1e-4 if precision == "fp32" else 0.05)
            back = [state for state, _ in two_ranks.run(_load, precision, moved)]
            for rank in range(2):
                for key, tensor in states[rank][0].items():
                    assert torch.equal(back[rank][0][key], tensor), key


class Wider(TinyModel):
    def __init__(self) -> None:
        super().__init__(width=35)


def _load_other_model(mesh: Mesh) -> None:
    saved = build_engine(TinyModel, config(), mesh).local_state()
    build_engine(Wider, config(), mesh).load_local_state(*saved)


def test_state_of_another_model_is_refused_by_parameter_name(one_rank: Ranks) -> None:
    with pytest.raises(RankError, match=r"blocks.0.norm.bias: saved \[33\], model has \[35\]"):
        one_rank.run(_load_other_model)


@pytest.mark.parametrize("numel", [1, 2, 3, 7, 12, 50])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_partitions_cover_every_element_once_and_can_be_cut_anew(numel: int, world: int) -> None:
    whole_tensor = torch.arange(float(numel))
    ranges = [partition_range(numel, rank, world) for rank in range(world)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(numel))
    assert max(stop - start for start, stop in ranges) == math.ceil(numel / world)
    shards = [{"fp32/w": whole_tensor[start:stop]} for start, stop in ranges]
    for other in (1, 2, 5):
        for rank in range(other):
            start, stop = partition_range(numel, rank, other)
            piece = cut("fp32/w", numel, start, stop, shards.__getitem__, world)
            assert torch.equal(piece, whole_tensor[start:stop])
    if numel > 1:
        shards[0]["fp32/w"] = shards[0]["fp32/w"][:-1]
        with pytest.raises(EngineError, match="'fp32/w' of saved rank 0"):
            cut("fp32/w", numel, 0, numel, shards.__getitem__, world)
