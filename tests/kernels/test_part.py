"""Attention with the queries of a part of the sequence gives the rows of the whole."""

from __future__ import annotations

import pytest
import torch

from kernels.documents import Documents
from kernels.full_attention import full_attention
from kernels.nsa import nsa_attention, nsa_attention_part
from kernels.nsa.spec import NsaSpec
from tests.kernels.nsa_cases import random_case

LENGTHS = (70, 1, 33, 300, 16)
SPEC = NsaSpec(block=8, stride=4, select=16, selected=3, window=24)
PARTS = [(0, 1), (0, 70), (1, 69), (69, 72), (71, 71 + 140), (150, 420), (403, 420), (0, 420)]


@pytest.mark.parametrize(("first", "stop"), PARTS)
def test_a_part_of_nsa_is_its_rows_of_the_whole(first: int, stop: int) -> None:
    case = random_case(LENGTHS, SPEC, dtype=torch.float64)
    q, kc, vc, ks, vs, kw, vw, phi_k, phi_v, gates, docs, spec = case.call
    rows = slice(first, stop)
    whole = nsa_attention(*case.call, implementation="blocked")[rows]
    found = nsa_attention_part(
        q[rows], (kc, vc, ks, vs, kw, vw), phi_k, phi_v, gates[rows], docs, spec, first
    )
    assert torch.allclose(found, whole, atol=1e-12)
    upstream = torch.randn_like(whole)
    for f, w in zip(
        torch.autograd.grad(found, case.tensors, upstream, allow_unused=True),
        torch.autograd.grad(whole, case.tensors, upstream),
        strict=True,
    ):
        assert torch.allclose(torch.zeros_like(w) if f is None else f, w, atol=1e-10)


def test_distances_of_a_part_are_of_its_own_queries() -> None:
    spec = NsaSpec(block=8, stride=4, select=16, selected=4, window=24)
    case = random_case((300, 20), spec, dtype=torch.float64)
    q, *kv, phi_k, phi_v, gates, docs, _ = case.call
    for first in (0, 100, 250):
        found: dict[str, torch.Tensor] = {}
        wanted: dict[str, torch.Tensor] = {}
        late = (q[first:], *kv, phi_k, phi_v, gates[first:], docs, spec)
        out = nsa_attention(*late, first=first, implementation="naive", stats=wanted)
        part = nsa_attention_part(
            q[first:], kv, phi_k, phi_v, gates[first:], docs, spec, first, stats=found
        )
        assert torch.allclose(out, part)
        assert torch.allclose(found["selected_distance"], wanted["selected_distance"])


def test_a_part_of_nsa_that_does_not_fit_is_refused_by_name() -> None:
    case = random_case(LENGTHS, SPEC)
    q, *kv, phi_k, phi_v, gates, docs, spec = case.call
    rest = (phi_k, phi_v, gates[90:120], docs, spec, 90)
    assert nsa_attention_part(q[90:120], kv, *rest).shape == (30, 4, 16)
    with pytest.raises(
        ValueError, match=r"gates_TH3 has shape \(29, 4, 3\), expected \(30, 4, 3\)"
    ):
        nsa_attention_part(q[90:120], kv, phi_k, phi_v, gates[90:119], docs, spec, 90)
    with pytest.raises(ValueError, match=r"v_win has shape \(49, 2, 8\), expected"):
        nsa_attention_part(q[90:120], (*kv[:5], kv[5][..., :8]), *rest)
    with pytest.raises(ValueError, match="3 query heads cannot be shared evenly by 2 KV groups"):
        nsa_attention_part(q[90:120, :3], kv, *rest)
    with pytest.raises(ValueError, match=r"values of \[420, .*419\] tokens, documents of 420"):
        nsa_attention_part(q[90:120], (*kv[:5], kv[5][1:]), *rest)
    with pytest.raises(ValueError, match=r"tokens 1\.\.421 of documents of 420"):
        nsa_attention_part(q, kv, phi_k, phi_v, gates, docs, spec, 1)
    with pytest.raises(ValueError, match="q has 30 tokens from token 91 on, the documents have"):
        nsa_attention(q[90:120], *kv, phi_k, phi_v, gates[90:120], docs, spec, first=91)


@pytest.mark.parametrize(("first", "stop"), PARTS)
def test_a_part_of_full_attention_is_its_rows_of_the_whole(first: int, stop: int) -> None:
    docs = Documents(LENGTHS)
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(docs.total, heads, 8, generator=g, dtype=torch.float64).requires_grad_()
        for heads in (4, 2, 2)
    )
    whole = full_attention(q, k, v, docs)[first:stop]
    found = full_attention(q[first:stop], k, v, docs, first=first)
    assert torch.allclose(found, whole, atol=1e-12)
    upstream = torch.randn_like(whole)
    for f, w in zip(
        torch.autograd.grad(found, (q, k, v), upstream),
        torch.autograd.grad(whole, (q, k, v), upstream),
        strict=True,
    ):
        assert torch.allclose(f, w, atol=1e-12)


def test_what_a_part_sees_begins_with_its_first_document_and_ends_with_its_last_token() -> None:
    docs = Documents(LENGTHS)
    begin, seen = docs.seen_by(75, 110)
    assert (begin, seen.lengths) == (71, (33, 6))
    assert docs.seen_by(75, 110)[1] is seen
    assert docs.seen_by(0, 70)[1].lengths == (70,)
    with pytest.raises(ValueError, match=r"tokens 400\.\.421 of documents of 420"):
        docs.seen_by(400, 421)


@pytest.mark.gpu
def test_parts_on_a_gpu_equal_the_whole() -> None:
    spec = NsaSpec(selected=4, window=64)
    case = random_case((300, 20, 900), spec, D=64, E=64, dtype=torch.bfloat16).to("cuda:0")
    q, kc, vc, ks, vs, kw, vw, phi_k, phi_v, gates, docs, _ = case.call
    for first, stop in ((0, 610), (610, 1220)):
        rows = slice(first, stop)
        whole = nsa_attention(*case.call)[rows]
        kv = (kc, vc, ks, vs, kw, vw)
        found = nsa_attention_part(q[rows], kv, phi_k, phi_v, gates[rows], docs, spec, first)
        # Other tiles, other rounding; a selection that a near tie turns may move single rows.
        assert float((found - whole).float().norm() / whole.float().norm()) < 2e-2
        full = full_attention(q, kw, vw, docs)[rows]
        part = full_attention(q[rows], kw, vw, docs, first=first)
        assert torch.allclose(part.float(), full.float(), atol=2e-2)
        grads = torch.autograd.grad(part.float().square().sum(), (q, kw, vw))
        wanted = torch.autograd.grad(full.float().square().sum(), (q, kw, vw))
        for f, w in zip(grads, wanted, strict=True):
            assert float((f - w).float().norm() / w.float().norm()) < 2e-2
