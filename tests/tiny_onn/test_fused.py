"""Compiled blocks compute what eager ones do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import Documents
from tiny_onn import fused
from tiny_onn.attention import AttentionConfig
from tiny_onn.deepembed import DeepEmbedConfig
from tiny_onn.dynmoe_config import DynMoeConfig
from tiny_onn.modular import ModelConfig, ModelOutput, TinyOnn

LENGTHS = (17, 1, 46)
DENSE = ModelConfig(
    vocab_size=40,
    width=32,
    layers=2,
    attention=AttentionConfig(kind="full", heads=4, groups=2, head_dim=8),
    ffn=DynMoeConfig(kind="dense", dense_hidden=48),
    deepembed=DeepEmbedConfig(kind="off"),
)
SPARSE = replace(
    DENSE,
    activation_checkpointing="recompute",
    attention=AttentionConfig(heads=4, groups=2, head_dim=8, selected=4, window=16),
    ffn=DynMoeConfig(experts=4, expert_hidden=16, max_experts=3, explore_share=0.1),
    deepembed=DeepEmbedConfig(kind="output", partition="zero3"),
)
PLAIN = replace(
    DENSE,
    attention=replace(DENSE.attention, qk_norm=False),
    ffn=replace(DENSE.ffn, activation="relu2"),
    deepembed=DeepEmbedConfig(kind="hidden", partition="zero3"),
)


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Capture and differentiate as the GPU's compiler does, then run operation by operation."""
    monkeypatch.setattr(fused, "BACKEND", "aot_eager")
    monkeypatch.setattr(fused, "ANYWHERE", True)
    fused.compiled.cache_clear()
    yield
    fused.compiled.cache_clear()


def run(cfg: ModelConfig) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = TinyOnn(cfg)
    T = sum(LENGTHS)
    ids = torch.randint(cfg.vocab_size, (T,), generator=torch.Generator().manual_seed(1))
    out = model(ids, ids.roll(-1), Documents(LENGTHS), torch.tensor(1 / T))
    assert isinstance(out, ModelOutput)
    out.loss.backward()  # type: ignore[no-untyped-call]
    return out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("cfg", [DENSE, SPARSE, PLAIN], ids=["dense", "sparse", "plain"])
def test_loss_and_gradients_are_those_of_eager_blocks(cfg: ModelConfig) -> None:
    loss, gradients = run(cfg)
    found_loss, found = run(replace(cfg, compile_blocks=True))
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    # One compiled function each, for all layers.
    assert 1 <= fused.compiled.cache_info().currsize <= 2


def test_other_lengths_compile_once_more_and_evaluation_never() -> None:
    """If every size did, torch's limit of recompilations would end the run."""
    torch.manual_seed(0)
    eager = TinyOnn(DENSE)
    model = TinyOnn(replace(DENSE, compile_blocks=True))
    model.load_state_dict(eager.state_dict())

    def compare(T: int) -> None:
        ids = torch.randint(DENSE.vocab_size, (T,))
        found, wanted = (
            m(ids, ids.roll(-1), Documents((T,)), torch.tensor(1.0)).nll_sum for m in (model, eager)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)

    model.eval()
    with torch.no_grad():
        compare(64)
    assert fused.compiled.cache_info().currsize == 0
    model.train()
    for T in (40, 33, 21, 64, 17, 50, 29, 38, 61, 45):
        compare(T)
