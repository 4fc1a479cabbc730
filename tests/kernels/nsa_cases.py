"""Random inputs of NSA, and what a result may be off by, for the tests of every implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.nsa.naive import NaiveNsa, nsa_naive
from kernels.nsa.spec import NsaCall, NsaSpec, Phi

LENGTHS = (1, 15, 31, 32, 33, 63, 64, 65, 127, 1000)
NAMES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
PHI_NAMES = ("phi_k.weight", "phi_k.position", "phi_v.weight", "phi_v.position")


@dataclass
class Case:
    """Inputs of one call; `tensors` are in the order of NAMES, then PHI_NAMES when φ is learned."""

    tensors: list[Tensor]
    docs: Documents
    spec: NsaSpec

    @property
    def call(self) -> NsaCall:
        q, kc, vc, ks, vs, kw, vw, gates, *phi = self.tensors
        maps = (Phi(*phi[:2]), Phi(*phi[2:])) if phi else (None, None)
        return NsaCall(q, kc, vc, ks, vs, kw, vw, *maps, gates, self.docs, self.spec)

    @property
    def names(self) -> tuple[str, ...]:
        return (NAMES + PHI_NAMES)[: len(self.tensors)]

    def oracle(self) -> NaiveNsa:
        return nsa_naive(self.call)

    def to(self, device: str) -> Case:
        tensors = [x.detach().to(device).requires_grad_() for x in self.tensors]
        return Case(tensors, self.docs.to(device), self.spec)


def random_case(
    lengths, spec, *, H=4, G=2, D=16, E=16, learned=True, dtype=torch.float32, seed=0
) -> Case:
    g = torch.Generator().manual_seed(seed)
    docs = Documents(lengths)
    T = docs.total

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).mul(std).to(dtype)

    tensors = [draw(T, H, D), *(draw(T, G, width) for width in (D, E) * 3)]
    tensors.append(torch.rand(T, H, 3, generator=g, dtype=torch.float64).to(dtype))
    if learned:
        for width in (D, E):
            tensors.append(draw(spec.block, width, width, std=(spec.block * width) ** -0.5))
            tensors.append(draw(spec.block, width))
    return Case([x.requires_grad_() for x in tensors], docs, spec)


def relative(found: Tensor, wanted: Tensor) -> float:
    """Error over the oracle, root mean square; one below 0.1 (a cancelled sum) counts as 0.1."""
    wanted = wanted.detach().double()
    error = (found.detach().double() - wanted).square().mean().sqrt()
    return float(error / wanted.square().mean().sqrt().clamp(min=0.1))


def compare(case: Case, run: Callable[..., Tensor], tolerance: float) -> None:
    """Forward and every gradient of `run` against the oracle."""
    wanted = case.oracle().out_THE
    found = run(case.call)
    assert found.dtype == case.tensors[0].dtype
    assert found.shape == wanted.shape
    assert torch.isfinite(found).all()
    upstream = torch.randn(
        found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    upstream = upstream.to(found)
    assert relative(found, wanted) < tolerance, "output"
    found_grads = torch.autograd.grad(found, case.tensors, upstream)
    # Without a single whole block the oracle never touches φ; the fast paths give zeros.
    wanted_grads = torch.autograd.grad(
        wanted, case.tensors, upstream.double(), allow_unused=True, materialize_grads=True
    )
    for name, tensor, f, w in zip(case.names, case.tensors, found_grads, wanted_grads, strict=True):
        assert f.shape == tensor.shape
        assert f.dtype == tensor.dtype
        assert torch.isfinite(f).all(), name
        # The same change of all compressed keys, or of the only one, changes no softmax: both
        # sides are sums of rounding errors around 0 there.
        slack = {"phi_k.position": 1e3, "phi_k.weight": 10.0}.get(name, 1.0)
        assert relative(f, w) < tolerance * slack, name
