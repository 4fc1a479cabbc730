"""What modules may do under ZeRO-3: custom functions, activation checkpointing, plain objects."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from parallel.engine import EngineConfig, OptimizerConfig, ZeroConfig
from parallel.mesh import Mesh
from tests.parallel.tiny import Block, Lengths, TinyModel, build_engine, global_batch
from tests.ranks import Ranks

Saved = Literal["parameter", "view"]

# Weights are released as soon as a module is done with them.
EAGER = ZeroConfig(
    param_persistence_threshold=0, max_reuse_distance=0, max_live_parameters=1, resident_gib=0
)


class SavesParameter(torch.autograd.Function):
    """x @ wᵀ that keeps the Parameter for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].t() @ x


class SavesView(torch.autograd.Function):
    """x @ wᵀ that keeps a view of the Parameter for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight.t())
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, transposed = ctx.saved_tensors
        return grads[0] @ transposed.t(), grads[0].t() @ x


class CustomLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int, saved: Saved) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.function = SavesParameter if saved == "parameter" else SavesView

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.function.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return product


class CustomModel(TinyModel):
    def __init__(self, saved: Saved, reentrant: bool | None) -> None:
        super().__init__(reentrant=reentrant)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.up = CustomLinear(33, 33, saved)  # type: ignore[assignment]


def loss_of(model: Any) -> Tensor:
    ids, labels = global_batch(0)
    output = model(ids, labels, Lengths(ids.numel()), torch.tensor(1 / ids.numel()))
    assert type(output).__name__ == "Output"
    loss: Tensor = output.loss
    return loss


def _gradients(mesh: Mesh, saved: Saved, reentrant: bool | None) -> list[bool]:
    """Check gradients against one process; return which custom weights live after forward."""
    torch.manual_seed(0)
    reference = CustomModel(saved, None)
    loss_of(reference).backward()  # type: ignore[no-untyped-call]
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}

    # Moments of a first AdamW step hold the gradient: exp_avg = (1 - beta1) * grad.
    optimizer = OptimizerConfig(clip=0.0, betas=(0.0, 0.95))
    cfg = EngineConfig(precision="fp32", optimizer=optimizer, zero=EAGER)
    engine = build_engine(lambda: CustomModel(saved, reentrant), cfg, mesh)
    weights: list[Any] = []
    weak_reference: Any = StorageWeakRef

    def note(module: CustomLinear, *_: Any) -> None:
        weights.append(weak_reference(module.weight.untyped_storage()))

    module: Any = engine.module
    for block in module.blocks:
        block.up.register_forward_hook(note, prepend=True)
    loss = loss_of(engine.forward)
    alive = [not ref.expired() for ref in weights]
    engine.backward(loss)
    engine.step()
    tensors, meta = engine.local_state()
    for name in meta["parameters"]:
        found = tensors[f"exp_avg/{name}"]
        size = -(-expected[name].numel() // mesh.world)
        part = expected[name].flatten()[size * mesh.rank :][: found.numel()]
        torch.testing.assert_close(found, part, atol=1e-6, rtol=1e-5, msg=name)
    return alive


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("saved", ["parameter", "view"])
def test_custom_functions_are_right_with_and_without_activation_checkpointing(
    two_ranks: Ranks, saved: Saved, reentrant: bool | None
) -> None:
    # A saved view keeps the whole gathered weight in memory until the backward pass.
    kept = saved == "view" and reentrant is None
    assert two_ranks.run(_gradients, saved, reentrant) == [[kept, kept], [kept, kept]]
