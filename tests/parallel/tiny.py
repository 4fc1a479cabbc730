"""A language model of four layers and its data, for tests of the engine."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.mesh import Mesh

VOCABULARY = 50


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
    """Odd sizes, so that partitions need padding; a tied head; a buffer that forward changes."""

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
        nll = nn.functional.cross_entropy(self.head(x).float(), labels_T, reduction="sum")
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
