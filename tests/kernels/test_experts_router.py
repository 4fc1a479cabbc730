"""Routing in torch: fp32 cosines, who fires within the bounds, gradients for all experts."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.experts.router import (
    cosine_scores,
    explore,
    explored_capacity,
    fire,
    fired_softmax,
)


def test_scores_and_their_gradients_are_those_of_normalised_vectors():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 16, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 16, generator=g, dtype=torch.float64, requires_grad=True)
    s = cosine_scores(x, w)
    expected = F.normalize(x) @ F.normalize(w).t()
    torch.testing.assert_close(s, expected)
    assert torch.autograd.gradcheck(cosine_scores, (x, w))


def test_scores_are_fp32_for_bf16_inputs_and_under_autocast():
    x, w = torch.randn(9, 64, dtype=torch.bfloat16), torch.randn(5, 64, dtype=torch.bfloat16)
    exact = F.normalize(x.double()) @ F.normalize(w.double()).t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = cosine_scores(x, w)
    assert s.dtype == torch.float32
    torch.testing.assert_close(s.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_zero_token_scores_zero_and_gets_no_gradient():
    x = torch.zeros(1, 8, requires_grad=True)
    s = cosine_scores(x, torch.randn(3, 8))
    s.sum().backward()
    assert torch.equal(s, torch.zeros(1, 3))
    assert torch.equal(x.grad, torch.zeros(1, 8))


def test_fire_keeps_to_the_threshold_within_its_bounds():
    z = torch.tensor(
        [
            [0.5, -1.0, 0.2, -3.0],  # threshold decides
            [3.0, 2.0, 1.0, 4.0],  # capped to the best
            [-2.0, -1.0, -3.0, -4.0],  # fallback to the best
        ]
    )
    fired = fire(z, 1, 3)
    assert fired.tolist() == [
        [True, False, True, False],
        [True, True, False, True],
        [False, True, False, False],
    ]
    assert fire(z, 2, 2).sum(1).tolist() == [2, 2, 2]


def straight_through(z: Tensor, mask: Tensor) -> Tensor:
    weights = mask * z.exp()
    return weights / weights.sum(1, keepdim=True)


def test_gate_weights_and_gradient_are_those_of_a_straight_through_mask():
    g = torch.Generator().manual_seed(1)
    z = torch.randn(20, 6, generator=g, dtype=torch.float64, requires_grad=True)
    fired = fire(z.detach(), 1, 3)
    grad = torch.randn(20, 6, generator=g, dtype=torch.float64)
    for width in (0.5, 1.0):
        p = fired_softmax(z, fired, width)
        mask = fired.to(z).requires_grad_()
        reference = straight_through(z, mask)
        torch.testing.assert_close(p, reference)
        (ours,) = torch.autograd.grad(p, z, grad)
        through_exp, through_mask = torch.autograd.grad(reference, (z, mask), grad)
        soft = torch.sigmoid(z.detach() / width)
        near = soft * (1 - soft) / width
        share = near * z.detach().exp()
        surrogate = through_mask * near
        surrogate = surrogate - share * surrogate.sum(1, keepdim=True) / share.sum(1, keepdim=True)
        torch.testing.assert_close(ours, through_exp + surrogate)
        torch.testing.assert_close(ours.sum(1), torch.zeros(20, dtype=torch.float64))


def test_experts_that_did_not_fire_learn_even_when_a_single_one_did():
    z = torch.tensor([[0.3, -0.1, -2.0, -8.0]], requires_grad=True)
    fired = fire(z.detach(), 1, 4)
    p = fired_softmax(z, fired, 1.0)
    assert p.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    # The loss falls when the output of the fired expert shrinks: the others are called, the nearer
    # to the threshold the more.
    p.backward(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert z.grad[0, 1] < z.grad[0, 2] < z.grad[0, 3] < 0 < z.grad[0, 0]
    plain = z.detach().clone().requires_grad_()
    fired_softmax(plain, fired, 0.0).backward(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert torch.equal(plain.grad, torch.zeros(1, 4))


def test_exploration_marks_the_share_one_each_and_only_what_did_not_fire():
    z = torch.randn(1000, 8)
    fired = fire(z, 1, 4)
    step = torch.tensor([3])
    explored = explore(z, fired, step, 20)
    assert int(explored.sum()) == 50 <= explored_capacity(1000, 20)
    assert int(explored.sum(1).max()) == 1
    assert not (explored & fired).any()
    assert torch.equal(explored, explore(z, fired, step, 20))
    later = explore(z, fired, step + 1, 20)
    assert not (explored.any(1) & later.any(1)).any()


def test_exploration_is_uniform_over_the_experts_that_did_not_fire():
    z = torch.randn(40000, 8, generator=torch.Generator().manual_seed(0))
    fired = torch.zeros_like(z, dtype=torch.bool)
    fired[:, 0] = True
    counts = explore(z, fired, torch.tensor([0]), 1).sum(0)
    assert counts[0] == 0
    expected = 40000 / 7
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 22.5  # chi-squared, 6 dof, p = 0.001


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("sequence", [0, 1, 3, 7])
def test_exploration_of_few_tokens(tokens, sequence):
    z = torch.randn(tokens, 3)
    for step in range(7):
        explored = explore(z, fire(z, 1, 1), torch.tensor([step]), 4, 2, sequence)
        assert explored.shape == (tokens, 3)
        assert int(explored.sum()) <= explored_capacity(tokens, 4, sequence)


def test_a_sequence_explores_alike_wherever_in_a_pass_it_stands_and_whoever_shares_it():
    length, stride, experts = 23, 4, 5
    z = torch.randn(3 * length, experts)
    fired = fire(z, 1, 2)
    marked = 0
    for number in range(stride):
        step = torch.tensor([number])
        pack = explore(z, fired, step, stride, 0, length)
        for own in torch.arange(3 * length).split(length):
            alone = explore(z[own], fired[own], step, stride)
            assert torch.equal(pack[own], alone)
            assert alone.any()
        for ranks in (2, 4, 5):
            cuts = [3 * length * rank // ranks for rank in range(ranks + 1)]
            shares = [slice(a, b) for a, b in itertools.pairwise(cuts)]
            parts = [explore(z[s], fired[s], step, stride, s.start, length) for s in shares]
            assert torch.equal(torch.cat(parts), pack)
            for part in parts:
                assert int(part.sum()) <= explored_capacity(len(part), stride, length)
        marked += int(pack.sum())
    # Over so many steps each token had its turn.
    assert marked == 3 * length


def test_nothing_is_explored_where_every_expert_fired():
    z = torch.ones(8, 3)
    assert not explore(z, fire(z, 1, 3), torch.tensor([0]), 2).any()
