"""Tokens become whole KV groups and come back, evenly or not; what cannot be is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parallel.group_exchange import GroupExchange, require_degree, shard_edges, working_degrees
from parallel.mesh import Mesh
from tests.ranks import Ranks


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


def _attend(q_TH: Tensor, k_TG: Tensor, first: int) -> Tensor:
    """Mix every token's heads with the keys of their group up to it: [n, H]."""
    per_group = q_TH.shape[1] // k_TG.shape[1]
    k_TH = k_TG.cumsum(0).repeat_interleave(per_group, 1)[first : first + q_TH.shape[0]]
    return (q_TH * k_TH).sin()


def _exchange(mesh: Mesh, group: int, groups: int, total: int, dtype: torch.dtype) -> list[float]:
    """Errors of the output, and of the gradients of queries and keys, against one rank's."""
    mesh = replace(mesh, data=mesh.world // group, group=group)
    exchange = GroupExchange(mesh, groups)
    g = torch.Generator().manual_seed(mesh.data_rank)
    H = groups * 3
    q_TH, k_TG, up_TH = (
        torch.randn(total, n, generator=g, dtype=torch.float64).to(dtype) for n in (H, groups, H)
    )
    whole = [q_TH.clone().requires_grad_(), k_TG.clone().requires_grad_()]
    wanted = _attend(*whole, 0)
    wanted_grads = torch.autograd.grad(wanted, whole, up_TH)
    share = exchange.share(total)
    own = slice(share.first, share.stop)
    q, k = (x[own].clone().requires_grad_() for x in (q_TH, k_TG))
    t = share.stop - share.first
    R = exchange.row
    parts = (q.view(t, R, H // R), k.view(t, R, groups // R))
    q_nH, k_nG = exchange.to_heads(share, *parts)
    (k_TG_,) = exchange.gather_rows(share, k_nG)
    assert k_TG_.shape == (total, groups // R)
    (out,) = exchange.to_tokens(share, _attend(q_nH, k_TG_, share.row_first))
    out = out.reshape(t, H)
    grads = torch.autograd.grad(out, (q, k), up_TH[own])
    return [
        float((found - whole_[own]).abs().max()) if t else 0.0
        for found, whole_ in zip((out, *grads), (wanted, *wanted_grads), strict=True)
    ]


@pytest.mark.parametrize(
    ("group", "groups"), [(1, 3), (2, 2), (2, 4), (4, 4), (4, 8), (4, 2), (4, 1), (2, 1)]
)
def test_the_way_there_and_back_equals_one_rank(four_ranks: Ranks, group: int, groups: int) -> None:
    for total in (64, 61, 5, 3):
        for errors in four_ranks.run(_exchange, group, groups, total, torch.float64):
            assert max(errors) < 1e-12, (total, errors)


def _shared_gradient(mesh: Mesh, parts: tuple[float, ...]) -> list[float]:
    """Gradient of keys that four ranks share, in bf16, when rank r sends parts[r] for each."""
    exchange = GroupExchange(replace(mesh, data=1, group=4), 1)
    share = exchange.share(10)
    k_nG = torch.zeros(share.row_total, 1, dtype=torch.bfloat16, requires_grad=True)
    (k_TG,) = exchange.gather_rows(share, k_nG)
    (grad,) = torch.autograd.grad(k_TG, k_nG, torch.full_like(k_TG, parts[mesh.rank]))
    assert grad.dtype == torch.bfloat16
    return sorted(set(grad.flatten().tolist()))


def test_gradients_of_shared_keys_are_added_in_fp32(four_ranks: Ranks) -> None:
    """In bf16 256 + 1 is 256, and so is 256 + 1 + 1 + 1; 259 rounds to 260."""
    for grads in four_ranks.run(_shared_gradient, (256.0, 1.0, 1.0, 1.0)):
        assert grads == [260.0]
    for output, dq, dk in four_ranks.run(_exchange, 4, 1, 40, torch.bfloat16):
        assert output == 0.0 and dq == 0.0
        assert dk < 0.15


def test_shards_cover_the_sequence() -> None:
    assert shard_edges(64, 4) == [0, 16, 32, 48, 64]
    assert shard_edges(61, 4) == [0, 15, 30, 45, 61]
    assert shard_edges(2, 4) == [0, 0, 1, 1, 2]


def test_degrees_that_work_divide_the_groups_or_are_multiples() -> None:
    assert working_degrees(4, 16) == [1, 2, 4, 8, 16]
    assert working_degrees(3, 12) == [1, 3, 6, 12]
    assert working_degrees(6, 8) == [1, 2]
    for degree in working_degrees(4, 16):
        require_degree(degree, 4, 16, 8)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ((2, 3, 4, 4), r"neither divides the 3 KV groups.*split.*mesh\.group can be 1 here"),
        ((6, 4, 12, 12), r"neither divides the 4 KV groups.*can be 1, 2, 4, 12 here"),
        ((4, 4, 6, 6), r"does not divide the 6 ranks.*can be 1, 2 here"),
        ((4, 4, 12, 6), r"4 and the 6 ranks of a machine.*two machines.*can be 1, 2, 12 here"),
        ((0, 4, 4, 4), r"mesh\.group is 0; mesh\.group can be 1, 2, 4 here"),
    ],
)
def test_a_degree_that_cannot_be_is_refused_with_those_that_work(
    place: tuple[int, int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        require_degree(*place)
