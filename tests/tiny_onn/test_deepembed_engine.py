"""Under the real engine both partitions of DeepEmbed train alike, with clipping and averaging."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.rows import RowIndex, split_layers
from parallel.engine import Engine, EngineConfig, OptimizerConfig, ScheduleConfig, ZeroConfig
from parallel.mesh import Mesh
from parallel.tables import RowTable
from tests.ranks import run_ranks
from tiny_onn.deepembed import DeepEmbedConfig, DeepEmbedScale, DeepEmbedTable

LAYERS, WIDTH, VOCABULARY, STEPS = 3, 8, 20, 8


class Layer(nn.Module):
    def __init__(self, layer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.scale = DeepEmbedScale(layer, WIDTH)

    def forward(self, x: Tensor, values: Tensor, index: RowIndex) -> Tensor:
        return x + self.scale.modulate((x @ self.weight).tanh(), values, index)


class Model(nn.Module):
    def __init__(self, cfg: DeepEmbedConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(i) for i in range(LAYERS))
        self.table = (
            DeepEmbedTable(VOCABULARY, LAYERS * WIDTH, cfg) if cfg.partition == "zero3" else None
        )

    def forward(
        self,
        ids: Tensor,
        x: Tensor,
        parts: Sequence[Tensor] | None = None,
        index: RowIndex | None = None,
    ) -> Tensor:
        if self.table is not None:
            values, index = self.table(ids)
            parts = split_layers(values, LAYERS)
        assert parts is not None
        for i, layer in enumerate(self.layers):
            x = checkpoint(layer, x, parts[i], index, use_reentrant=False)
        return (x - torch.sin(ids)[:, None]).square().mean()


def train(mesh: Mesh, partition: str, accumulation: int) -> tuple[list[float], list[float]]:
    cfg = DeepEmbedConfig(partition=partition, optimizer="adam", lr_multiplier=2.0)
    engine_cfg = EngineConfig(
        precision="fp32",
        accumulation=accumulation,
        optimizer=OptimizerConfig(lr=0.01, clip=0.2, betas=cfg.betas, eps=cfg.eps),
        schedule=ScheduleConfig(warmup=2),
        zero=ZeroConfig(param_persistence_threshold=0),
    )
    table = None
    if partition == "rows":
        table = RowTable("deepembed", VOCABULARY, LAYERS * WIDTH, mesh, cfg, groups=LAYERS)
    engine = Engine(lambda: Model(cfg), engine_cfg, mesh, STEPS, [table] if table else [])
    losses, norms = [], []
    for step in range(STEPS):
        for batch in range(accumulation):
            # Every row is touched: only then is dense Adam the same as one of touched rows.
            generator = torch.Generator().manual_seed(100 * step + 10 * batch + mesh.rank)
            ids = torch.randperm(VOCABULARY, generator=generator)
            x = torch.randn(VOCABULARY, WIDTH, generator=generator)
            rows = table.fetch(ids) if table else None
            extra = (rows.parts, rows.lookup) if rows else ()
            loss = engine.forward(ids, x, *extra)
            engine.backward(loss / accumulation)
            if table and rows:
                table.accumulate(rows)
            result = engine.step()
            losses.append(float(loss.detach()))
        assert result is not None
        norms.append(float(result.grad_norm))
    return losses, norms


def both(mesh: Mesh, accumulation: int) -> list[tuple[list[float], list[float]]]:
    return [train(mesh, partition, accumulation) for partition in ("zero3", "rows")]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_both_partitions_give_the_same_losses_and_norms_on_two_ranks(accumulation: int) -> None:
    for (losses, norms), (losses2, norms2) in run_ranks(both, 2, accumulation):
        assert max(norms) > 0.2
        torch.testing.assert_close(
            torch.tensor(losses2), torch.tensor(losses), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(torch.tensor(norms2), torch.tensor(norms), rtol=1e-4, atol=1e-6)
