"""Under the real engine (ZeRO-3) DynMoE trains alike on one and two ranks, idle experts or not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.engine import Engine, EngineConfig, OptimizerConfig, ScheduleConfig, ZeroConfig
from parallel.mesh import Mesh
from tests.ranks import Ranks, run_ranks
from tiny_onn.dynmoe import DynMoe, update_controllers
from tiny_onn.dynmoe_config import DynMoeConfig

WIDTH, TOKENS, STEPS = 16, 24, 6


class Model(nn.Module):
    def __init__(self, recompute: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        cfg = DynMoeConfig(
            experts=6, expert_hidden=8, target_experts=1.5, explore_share=0.25, init_std=0.2,
            router_coefficient=0.1, shared_expert=True,
        )  # fmt: skip
        self.layers = nn.ModuleList(DynMoe(cfg, WIDTH) for _ in range(2))
        self.recompute = recompute

    def forward(self, x: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            if self.recompute is None:
                x = x + layer(x, None, scale)
            else:
                x = x + checkpoint(layer, x, None, scale, use_reentrant=self.recompute)
        total = (x - target).float().square().sum()
        return total * scale, total.detach()


def train(
    mesh: Mesh,
    precision: str,
    recompute: bool | None,
    shares: list[int],
    accumulation: int = 1,
    resident_gib: float = 8.0,
) -> tuple[list[float], list[Tensor]]:
    """Losses and buffers when every rank and micro-batch gets `shares` of each step's tokens."""
    cfg = EngineConfig(
        precision=precision,
        accumulation=accumulation,
        optimizer=OptimizerConfig(lr=0.01, clip=1.0),
        schedule=ScheduleConfig(warmup=1),
        zero=ZeroConfig(param_persistence_threshold=0, resident_gib=resident_gib),
    )
    engine = Engine(lambda: Model(recompute), cfg, mesh, STEPS)
    # Averaged over ranks by the engine; this makes it the mean over the tokens of the step.
    scale = torch.tensor(mesh.world / TOKENS)
    losses = []
    for step in range(STEPS):
        x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))
        target = torch.sin(3 * x)
        total = torch.zeros(())
        for micro in range(accumulation):
            part = slice(None)
            if len(shares) > 1:
                at = micro * mesh.world + mesh.rank
                part = slice(sum(shares[:at]), sum(shares[: at + 1]))
            inputs = x[part].to(engine.dtype).requires_grad_()
            loss, summed = engine.forward(inputs, target[part], scale)
            engine.backward(loss)
            total += summed
            engine.step()
        update_controllers(engine.module)
        torch.distributed.all_reduce(total)
        losses.append(float(total) / TOKENS)
    buffers = [b.clone() for _, b in engine.module.named_buffers()]
    assert all(b.dtype in (torch.float32, torch.int64, torch.bool) for b in buffers)
    return losses, buffers


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def alone() -> tuple[list[float], list[Tensor]]:
    (result,) = run_ranks(train, 1, "fp32", None, [TOKENS])
    return result


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputation_under_zero3_changes_nothing(two_ranks, precision):
    for resident_gib, reentrant in ((8.0, False), (0.0, False), (0.0, True)):
        plain = two_ranks.run(train, precision, None, [12, 12], 1, resident_gib)
        # Reentrant recomputation adds the parts of a layer's input gradient up before they meet the
        # residual's, as DeepSpeed's hooks around a layer do; without those the order is another.
        again = two_ranks.run(train, precision, reentrant, [12, 12], 1, resident_gib)
        for (losses, buffers), (others, other_buffers) in zip(plain, again, strict=True):
            assert losses == others
            assert all(torch.equal(a, b) for a, b in zip(buffers, other_buffers, strict=True))
    (_, first), (_, second) = plain
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("shares", "accumulation"), [([12, 12], 1), ([24, 0], 1), ([6] * 4, 2)])
def test_two_ranks_train_as_one(two_ranks, alone, shares, accumulation):
    """With an even split, with a rank that has no token at all, and with micro-batches."""
    (losses, buffers), _ = two_ranks.run(train, "fp32", None, shares, accumulation)
    assert losses == pytest.approx(alone[0], rel=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(buffers, alone[1], strict=True))
