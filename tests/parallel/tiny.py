"""A small language model, its data and its training, for tests of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.engine import (
    Engine,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
    StepResult,
    ZeroConfig,
)
from parallel.mesh import Mesh

VOCABULARY = 50
LR = 1e-3


class Output(NamedTuple):
    loss: Tensor
    nll_sum: Tensor


class Lengths:
    """A plain object among the inputs, as the description of packed documents is."""

    def __init__(self, count: int) -> None:
        self.count = count


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.scale.lr_multiplier = 0.5  # type: ignore[attr-defined]

    def forward(self, x: Tensor, lengths: Lengths) -> Tensor:
        assert lengths.count == x.shape[0]
        return x + self.scale * torch.relu(self.up(self.norm(x)))


class TinyModel(nn.Module):
    """Odd sizes, so that partitions need padding, and one element, which all ranks but one lack.

    The head is tied, and forward changes a buffer.
    """

    seen: Tensor
    third: Tensor

    def __init__(
        self, width: int = 33, vocabulary: int = VOCABULARY, reentrant: bool | None = None
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.gate = Linear(width, width)
        self.gate.weight.no_decay = True  # type: ignore[attr-defined]
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.embedding.weight
        self.sharpness = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.register_buffer("third", torch.full((3,), 1 / 3), persistent=False)
        self.reentrant = reentrant

    def forward(self, ids_T: Tensor, labels_T: Tensor, lengths: Lengths, scale: Tensor) -> Output:
        if self.training:
            self.seen += ids_T.shape[0]
        x = self.embedding(ids_T)
        for block in self.blocks:
            if self.reentrant is not None and torch.is_grad_enabled():
                x = checkpoint(block, x, lengths, use_reentrant=self.reentrant)
            else:
                x = block(x, lengths)
        x = x * torch.sigmoid(self.gate(x))
        logits = self.head(x).float() * self.sharpness
        nll = nn.functional.cross_entropy(logits, labels_T, reduction="sum")
        return Output(nll * scale, nll.detach())


def global_batch(
    step: int, tokens: int = 24, vocabulary: int = VOCABULARY
) -> tuple[Tensor, Tensor]:
    """Return the same ids and labels of a step on every rank, int64 [tokens] each."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    return ids, (ids * 7 + 3) % vocabulary


def share(tensor: Tensor, mesh: Mesh, micro_batch: int = 0, accumulation: int = 1) -> Tensor:
    """Return this rank's part of a micro-batch."""
    return tensor.chunk(mesh.world * accumulation)[micro_batch * mesh.world + mesh.rank]


class Poisoned(TinyModel):
    """Gives gradients that are not finite on one rank only, when told to."""

    poison = 0.0

    def forward(self, *args: Any) -> Any:
        output = super().forward(*args)
        return output._replace(loss=output.loss + self.poison * self.gate.weight.sum())


def config(**changes: Any) -> EngineConfig:
    base: dict[str, Any] = {
        "precision": "fp32",
        "optimizer": OptimizerConfig(lr=LR, clip=0.5),
        "schedule": ScheduleConfig(warmup=3),
        # Everything is partitioned, however small.
        "zero": ZeroConfig(param_persistence_threshold=0, resident_gib=0),
    }
    return EngineConfig(**(base | changes))


def build_engine(model: Any, cfg: EngineConfig, mesh: Mesh, *tables: Any, **more: Any) -> Engine:
    """Build an engine for a run of 100 steps, its weights drawn under seed 0."""
    torch.manual_seed(more.pop("seed", 0))
    return Engine(model, cfg, mesh, 100, tables, **more)


def train(
    engine: Engine,
    first: int,
    last: int,
    accumulation: int = 1,
    accept: Callable[[float], bool] | None = None,
) -> list[StepResult]:
    """Take steps [first, last) on the global batches of these numbers."""
    results = []
    for step in range(first, last):
        ids, labels = global_batch(step)
        for micro_batch in range(accumulation):
            part = [
                share(t, engine.mesh, micro_batch, accumulation).to(engine.device)
                for t in (ids, labels)
            ]
            scale = torch.tensor(engine.mesh.world / ids.numel(), device=engine.device)
            output = engine.forward(*part, Lengths(part[0].numel()), scale)
            assert type(output).__name__ == "Output"
            engine.backward(output.loss)
            result = engine.step(accept)
        assert result is not None
        results.append(result)
    return results
