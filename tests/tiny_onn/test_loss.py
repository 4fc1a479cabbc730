"""The head's cross entropy is torch's, whatever the chunk, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tiny_onn import loss
from tiny_onn.loss import IGNORE, Head, cross_entropy_sum


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_chunked_cross_entropy_equals_torchs_with_every_gradient(chunk: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(33, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 33, (50,), generator=generator)
    labels[::5] = IGNORE
    ours = cross_entropy_sum(x, w, labels, chunk)
    (ours * 0.37).backward()
    dx, dw = x.grad, w.grad
    x.grad = w.grad = None
    expected = nn.functional.cross_entropy(x @ w.t(), labels, ignore_index=IGNORE, reduction="sum")
    (expected * 0.37).backward()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dw, w.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, -5])
def test_no_token_in_a_chunk_is_refused_and_not_a_loss_of_zero(chunk: int) -> None:
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    with pytest.raises(ValueError, match=f"chunks of {chunk} tokens: at least 1"):
        cross_entropy_sum(x, w, torch.zeros(4, dtype=torch.int64), chunk)


def test_no_label_at_all_gives_zero_loss_and_zero_gradient() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    w = torch.randn(5, 8, requires_grad=True)
    total = cross_entropy_sum(x, w, torch.full((4,), IGNORE), 2)
    total.backward()
    assert total.item() == 0.0
    assert x.grad is not None and not x.grad.any()
    assert w.grad is not None and not w.grad.any()


def test_a_tied_head_shares_the_embeddings_parameter_and_adds_its_gradient() -> None:
    weight = nn.Parameter(torch.randn(11, 8))
    head = Head(11, 8, 0.02, weight, 4)
    assert head.weight is weight
    head(torch.randn(6, 8), torch.randint(0, 11, (6,))).backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_recorded_entropy_is_that_of_the_predictions() -> None:
    head = Head(7, 8, 1.0, None, 4)
    head.record = True
    x = torch.randn(20, 8)
    head(x, torch.randint(0, 7, (20,)))
    p = torch.softmax(x @ head.weight.t(), dim=-1)
    torch.testing.assert_close(head.stats["entropy"], torch.special.entr(p).sum(-1).mean())


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False], ids=["liger", "chunked"])
def test_on_a_gpu_both_ways_equal_fp64_up_to_bf16(
    monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    if fused:
        assert loss._liger_is_installed(), "liger-kernel is missing: pip install tiny-onn[gpu]"
    monkeypatch.setattr(loss, "_liger_is_installed", lambda: fused)
    T, V, C, scale = 3000, 20_001, 256, 2.0 / 3000
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(T, C, generator=generator, device="cuda").bfloat16().requires_grad_()
    w = torch.randn(V, C, generator=generator, device="cuda").mul(0.1).bfloat16().requires_grad_()
    labels = torch.randint(0, V, (T,), generator=generator, device="cuda")
    labels[::3] = IGNORE
    found = cross_entropy_sum(x, w, labels, 1000)
    assert found.dtype == torch.float32
    gradients = torch.autograd.grad(found * scale, (x, w))
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    wanted = nn.functional.cross_entropy(x64 @ w64.t(), labels, reduction="sum")
    assert float(found) == pytest.approx(float(wanted), rel=1e-4)
    for f, e in zip(gradients, torch.autograd.grad(wanted * scale, (x64, w64)), strict=True):
        assert float((f.double() - e).norm() / e.norm()) < 1e-2
    nothing = cross_entropy_sum(x, w, torch.full_like(labels, IGNORE), 1000)
    assert float(nothing) == 0.0
    assert not any(g.any() for g in torch.autograd.grad(nothing, (x, w)))
