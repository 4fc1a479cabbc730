"""Weights that stay whole train as partitioned ones do, without DeepSpeed's hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.engine import Engine, EngineConfig, EngineError, OffloadConfig, ZeroConfig
from parallel.mesh import Mesh
from parallel.resident import ALIGNMENT
from tests.parallel.tiny import Block, TinyModel, build_engine, config, train
from tests.ranks import Ranks

STEPS = 4


class WholeBlock(Block):
    gathered_whole = True


class WholeBlocks(TinyModel):
    """Layers whose gradients are reduced together, and parameters outside of them."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__(reentrant=reentrant)
        self.blocks = nn.ModuleList(WholeBlock(33) for _ in range(3))


class IdleBlock(WholeBlock):
    """Has a weight that gets no gradient."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.spare = nn.Parameter(torch.ones(4))


class Idle(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(33) for kind in (WholeBlock, IdleBlock))


def resident(**changes: Any) -> EngineConfig:
    return config(zero=ZeroConfig(sub_group_size=500), **changes)


def trained(
    mesh: Mesh, cfg: EngineConfig, reentrant: bool | None = None
) -> tuple[Engine, list[Any], dict[str, Tensor]]:
    engine = build_engine(lambda: WholeBlocks(reentrant), cfg, mesh)
    results = train(engine, 0, STEPS, cfg.accumulation)
    return engine, [r.grad_norm for r in results], engine.local_state()[0]


def _same(mesh: Mesh) -> None:
    for precision, accumulation, reentrant in (("fp32", 1, None), ("bf16", 3, False)):
        changes: dict[str, Any] = {"precision": precision, "accumulation": accumulation}
        expected = trained(mesh, config(**changes), reentrant)
        found = trained(mesh, resident(**changes), reentrant)
        assert expected[0].resident is None and found[0].resident is not None
        assert found[1] == pytest.approx(expected[1], rel=1e-12)
        for name, tensor in expected[2].items():
            # The norm is summed in another order, in fp64: a rounding of the clip coefficient.
            torch.testing.assert_close(found[2][name], tensor, rtol=1e-6, atol=1e-9, msg=name)
        names = (name for name, _ in found[0].module.named_parameters())
        for name, p, whole in zip(
            names, found[0].module.parameters(), _whole(found[0]), strict=True
        ):
            assert torch.equal(p, whole), name


def _whole(engine: Engine) -> list[Tensor]:
    """Every weight as the ranks' partitions give it."""
    out = []
    for p in engine.module.parameters():
        part = p.ds_tensor  # type: ignore[attr-defined]
        parts = [torch.empty_like(part) for _ in range(engine.mesh.world)]
        torch.distributed.all_gather(parts, part.contiguous())
        out.append(torch.cat(parts)[: p.numel()].view(p.shape))
    return out


@pytest.mark.parametrize("ranks", ["one_rank", "two_ranks"])
def test_training_equals_that_of_partitioned_weights(
    ranks: str, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(ranks).run(_same)


def _memory_and_hooks(mesh: Mesh) -> None:
    engine = build_engine(WholeBlocks, resident(), mesh)
    train(engine, 0, 1)
    for module in engine.module.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert not module._backward_hooks
        assert type(module._parameters) is dict
    for name, p in engine.module.named_parameters():
        assert p.data_ptr() % ALIGNMENT == 0, name
        own = p.ds_tensor.data_ptr()  # type: ignore[attr-defined]
        # On one rank a weight is its partition, unless that lies badly.
        assert (p.data_ptr() == own) == (mesh.world == 1 and own % ALIGNMENT == 0), name
    assert torch.nn.functional.linear.__name__ == "linear"


def test_no_hook_is_left_and_weights_are_aligned(one_rank: Ranks, two_ranks: Ranks) -> None:
    one_rank.run(_memory_and_hooks)
    two_ranks.run(_memory_and_hooks)


def _who_stays(mesh: Mesh) -> None:
    engine = build_engine(WholeBlocks, resident(), mesh)
    size = sum(p.numel() for p in engine.module.parameters()) * 4 / 2**30
    for gib, stays in ((0.0, False), (0.9 * size, mesh.world == 1), (1.1 * size, True)):
        built = build_engine(WholeBlocks, config(zero=ZeroConfig(resident_gib=gib)), mesh)
        assert (built.resident is not None) == stays, gib
    offloaded = resident(offload=OffloadConfig(optimizer="cpu"))
    assert build_engine(WholeBlocks, offloaded, mesh).resident is None
    with pytest.raises(ValueError, match=r"zero.resident_gib -1\.0 must not be negative"):
        build_engine(WholeBlocks, config(zero=ZeroConfig(resident_gib=-1.0)), mesh)


def test_weights_stay_where_they_fit_the_budget(one_rank: Ranks, two_ranks: Ranks) -> None:
    one_rank.run(_who_stays)
    two_ranks.run(_who_stays)


def _idle(mesh: Mesh) -> None:
    with pytest.raises(EngineError, match=r"no gradient for blocks.1.spare: under ZeRO-3"):
        train(build_engine(Idle, resident(), mesh), 0, 1)


def test_weight_of_a_layer_without_a_gradient_is_named(one_rank: Ranks) -> None:
    one_rank.run(_idle)
