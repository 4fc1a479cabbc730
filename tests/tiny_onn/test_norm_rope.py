"""RMSNorm is computed in fp32, and RoPE makes scores depend on distances only."""

from __future__ import annotations

import pytest
import torch

from tiny_onn.norm_rope import RMSNorm, apply_rope, rope_tables


def test_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(8, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8.0))
    x = torch.randn(5, 8)
    wanted = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * torch.arange(8.0)
    assert torch.allclose(norm(x), wanted, atol=1e-6)


def test_norm_of_bf16_is_computed_in_fp32():
    norm = RMSNorm(64)
    x = (torch.randn(7, 64) * 300).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, norm(x.float()).bfloat16())
    assert torch.equal(norm.bfloat16()(x), out)


def test_rotation_keeps_lengths_and_leaves_position_zero_alone():
    cos, sin = rope_tables(torch.tensor([0, 1, 70000]), 16)
    x = torch.randn(3, 2, 16)
    y = apply_rope(x, cos, sin)
    assert torch.equal(y[0], x[0])
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert not torch.allclose(y[2], x[2])


@pytest.mark.parametrize("shift", [1, 50, 100_000])
def test_scores_depend_on_the_distance_only(shift):
    q, k = torch.randn(2, 1, 1, 32, dtype=torch.float64)
    scores = []
    for at in (0, shift):
        cos, sin = rope_tables(torch.tensor([at + 13, at]), 32, theta=10000.0)
        turned_q, turned_k = apply_rope(q, cos[:1], sin[:1]), apply_rope(k, cos[1:], sin[1:])
        scores.append((turned_q * turned_k).sum())
    assert torch.allclose(*scores, atol=1e-5)


def test_channel_pairs_turn_by_the_papers_angles():
    theta, D = 500.0, 8
    cos, sin = rope_tables(torch.tensor([3]), D, theta)
    assert cos.dtype == sin.dtype == torch.float32
    angle = 3 * theta ** (-2 * torch.arange(4, dtype=torch.float64) / D)
    assert torch.allclose(cos[0].double(), angle.cos().repeat(2), atol=1e-7)
    assert torch.allclose(sin[0].double(), angle.sin().repeat(2), atol=1e-7)


def test_bf16_comes_back_as_bf16_and_an_odd_width_is_refused():
    cos, sin = rope_tables(torch.arange(4), 6)
    assert apply_rope(torch.randn(4, 1, 6).bfloat16(), cos, sin).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="head_dim must be even, got 5"):
        rope_tables(torch.arange(4), 5)


def test_gradient_of_the_rotation_equals_finite_differences():
    cos, sin = (t.double() for t in rope_tables(torch.tensor([0, 5, 9]), 6))
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x, cos, sin), (x,))
