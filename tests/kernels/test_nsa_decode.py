"""Decoding token by token equals the forward pass over the whole document, row for row."""

from __future__ import annotations

import pytest
import torch

from kernels.nsa import NsaCache, NsaSpec, nsa_decode
from kernels.nsa.blocked import nsa_blocked
from tests.kernels.nsa_cases import Case, random_case, relative

SPEC = NsaSpec(selected=4, window=100)


def decode(case: Case) -> tuple[torch.Tensor, NsaCache]:
    q, kc, vc, ks, vs, kw, vw, phi_k, phi_v, gates, _, spec = case.call
    cache = NsaCache(spec)
    rows = []
    for t in range(q.shape[0]):
        own = [x[t : t + 1] for x in (q, kc, vc, ks, vs, kw, vw)]
        rows.append(nsa_decode(*own, phi_k, phi_v, gates[t : t + 1], cache))
    return torch.cat(rows), cache


@pytest.mark.parametrize("length", [1, 15, 31, 32, 33, 63, 64, 65, 127, 700])
def test_decoding_equals_the_forward_pass(length):
    case = random_case([length], SPEC)
    found, cache = decode(case)
    assert cache.length == length
    assert not found.requires_grad
    wanted = nsa_blocked(case.call)
    for t in range(length):
        assert relative(found[t], wanted[t]) < 3e-6, f"token {t}"


@pytest.mark.parametrize("group", [1, 4, 16])
def test_decoding_equals_the_forward_pass_for_other_groups(group):
    case = random_case([300], SPEC, H=2 * group, G=2, D=8, E=12)
    assert relative(decode(case)[0], nsa_blocked(case.call)) < 2e-6


@pytest.mark.parametrize(
    "spec",
    [
        NsaSpec(),
        NsaSpec(block=64, stride=16, select=32, selected=5, initial=2, local=1, window=7),
        NsaSpec(block=128, stride=16, select=16, selected=3, initial=1, local=1, window=40),
    ],
)
def test_decoding_equals_the_forward_pass_for_other_sizes(spec):
    case = random_case([300], spec, learned=False)
    assert relative(decode(case)[0], nsa_blocked(case.call)) < 2e-6


def test_decoding_breaks_ties_as_the_forward_pass_does():
    case = random_case([600], SPEC)
    with torch.no_grad():
        case.tensors[0].zero_()
    assert relative(decode(case)[0], nsa_blocked(case.call)) < 2e-6


def test_decoding_in_bf16_stays_bf16():
    case = random_case([100], SPEC, dtype=torch.bfloat16)
    found, _ = decode(case)
    assert found.dtype == torch.bfloat16
    assert relative(found, nsa_blocked(case.call)) < 0.02


def test_two_tokens_at_once_are_refused():
    q, *rest = random_case([2], SPEC).call
    with pytest.raises(ValueError, match="one token at a time, got 2"):
        nsa_decode(q, *rest[:9], NsaCache(SPEC))
