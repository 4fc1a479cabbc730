"""Whatever is kept of a block, outputs and gradients are the same to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_onn.activations import Activations

LAYERS = 6


class Block(nn.Module):
    """Products and element-wise operations only: nothing in it depends on the order of threads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_TC: Tensor, factor: float) -> Tensor:
        return x_TC + factor * self.down(torch.relu(self.up(x_TC)))


def run(kind: Any, device: str, tokens: int, width: int) -> tuple[list[Tensor], int]:
    """Two passes; returns the output and all gradients, and the peak of a GPU's memory."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(width) for _ in range(LAYERS)).to(device)
    x = torch.randn(tokens, width).to(device).requires_grad_()
    peak = 0
    for _ in range(2):
        for tensor in (x, *blocks.parameters()):
            tensor.grad = None
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            peak = -torch.cuda.memory_allocated()
        activations, y = Activations(kind), x * 1.0
        for block in blocks:
            y = activations.run(block, y, 0.5)
        y.square().sum().backward()
    if device != "cpu":
        peak += torch.cuda.max_memory_allocated()
    return [y.detach(), *(t.grad for t in (x, *blocks.parameters()) if t.grad is not None)], peak


def test_what_is_kept_changes_nothing() -> None:
    wanted, _ = run("none", "cpu", 33, 16)
    assert len(wanted) == 2 + 4 * LAYERS
    for kind in ("recompute", "offload"):
        found, _ = run(kind, "cpu", 33, 16)
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True)), kind


def test_without_gradients_nothing_is_kept() -> None:
    with torch.no_grad():
        assert Activations("offload").kind == "none"


@pytest.mark.gpu
def test_offloaded_inputs_come_back_bitwise_and_free_the_gpu() -> None:
    recomputed, whole = run("recompute", "cuda", 32_768, 512)
    offloaded, less = run("offload", "cuda", 32_768, 512)
    for name, (f, w) in enumerate(zip(offloaded, recomputed, strict=True)):
        assert torch.equal(f, w), name
    # Of six inputs of 64 MiB two are there at a time.
    assert less < whole - 2 * 32_768 * 512 * 4


@pytest.mark.gpu
def test_kept_tensors_come_back_bitwise_and_free_the_gpu() -> None:
    shape, count = (32_768, 512), 6
    mib = 64 * 2**20
    activations = Activations("recompute")
    tensors = [torch.randn(shape, device="cuda") for _ in range(2)]
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        taken = []
        for i in range(count):
            taken.append(activations.keep(tensors[i % 2] * (i + 1)))
        for i in reversed(range(count)):
            assert torch.equal(taken[i](), tensors[i % 2] * (i + 1)), i
        torch.cuda.synchronize()
        # The newest, and two on their way.
        assert torch.cuda.max_memory_allocated() - before < 4.5 * mib
