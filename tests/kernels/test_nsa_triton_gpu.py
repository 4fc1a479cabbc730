"""NSA's Triton kernels on a Hopper GPU: errors against fp64, determinism, graphs, large offsets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from kernels.nsa import nsa_attention, triton_config
from kernels.nsa.checks import CHECKS, blocked, case_of
from kernels.nsa.triton_api import nsa_attention_triton
from kernels.nsa.triton_check import Case, compare, random_case
from kernels.nsa.triton_ops import OpInputs, nsa_forward

pytestmark = pytest.mark.gpu


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that an unwritten element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def run(case: Case, tensors: tuple[Tensor, ...] | None = None) -> Tensor:
    return nsa_attention_triton(case.call(tensors))


def gradients(case: Case, out: Tensor) -> tuple[Tensor, ...]:
    generator = torch.Generator(out.device).manual_seed(3)
    do = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
    return torch.autograd.grad(out, case.tensors, do)


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("arguments", CHECKS, ids=str)
def test_errors_stay_within_twice_those_of_plain_bf16(
    arguments: dict[str, Any], poisoned: None
) -> None:
    report = compare(case_of(arguments, "cuda"), nsa_attention_triton)
    assert report.failures() == []


@pytest.mark.parametrize(
    "arguments",
    [
        {"lengths": [33, 1300], "heads": 16, "groups": 4, "dim": 128, "layout": "model"},
        {"lengths": [1, 15, 63, 65, 1200], "heads": 4, "groups": 2, "dim": 64, "mean": True},
    ],
    ids=str,
)
def test_torch_operations_are_as_right_as_plain_bf16(arguments: dict[str, Any]) -> None:
    """What runs where the kernels do not."""
    assert compare(case_of(arguments, "cuda"), blocked).failures() == []


@pytest.mark.parametrize("tokens", [1024, 1000])
def test_many_chunks_of_tokens_are_as_right_as_one(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Partials of the selected branch are held for a chunk of tokens at a time: here for 256."""
    table = replace(triton_config.kernel_configs(), partial_rows=256 * 16 * 16)
    monkeypatch.setattr(triton_config, "_HOPPER", table)
    report = compare(random_case([100, tokens - 100], 16, 1, 128), nsa_attention_triton)
    assert report.failures() == []


def test_two_runs_are_bitwise_equal() -> None:
    case = random_case([3000, 70], 16, 1, 128)
    first, second = (gradients(case, run(case)) for _ in range(2))
    for name, a, b in zip(case.names, first, second, strict=True):
        assert torch.equal(a, b), name


def test_checkpointing_changes_no_bit() -> None:
    case = random_case([500], 8, 2, 64)
    plain = gradients(case, run(case))
    again = gradients(case, checkpoint(run, case, case.tensors, use_reentrant=False))
    for name, a, b in zip(case.names, plain, again, strict=True):
        assert torch.equal(a, b), name


def test_compiled_call_is_one_graph_and_changes_no_bit() -> None:
    case = random_case([500], 8, 2, 64)
    q, *others = OpInputs.of(case.call(), 0.125)

    def call(q: Tensor) -> Tensor:
        return nsa_forward(q * 1.0, *others)[0] * 2.0

    plain = call(q)
    compiled = torch.compile(call, fullgraph=True)(q)
    assert torch.equal(plain, compiled)
    for a, b in zip(gradients(case, plain), gradients(case, compiled), strict=True):
        assert torch.equal(a, b)


def test_public_call_compiles_as_one_graph_and_changes_no_bit() -> None:
    case = random_case([200, 300], 8, 2, 64, layout="model")

    def call(q: Tensor) -> Tensor:
        return nsa_attention(q * 1.0, *case.call()[1:]) * 2.0  # type: ignore[arg-type]

    plain = call(case.tensors[0])
    compiled = torch.compile(call, fullgraph=True)(case.tensors[0])
    assert torch.equal(plain, compiled)
    for a, b in zip(gradients(case, plain), gradients(case, compiled), strict=True):
        assert torch.equal(a, b)


def test_operator_is_registered_consistently() -> None:
    case = random_case([300], 4, 2, 64)
    arguments = tuple(OpInputs.of(case.call(), 0.125))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(nsa_forward, arguments, test_utils=checks)


def test_forward_and_backward_replay_in_a_cuda_graph() -> None:
    case = random_case([700, 100], 8, 2, 64)
    expected = gradients(case, run(case))
    do = torch.randn_like(run(case))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(run(case), case.tensors, do)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(run(case), case.tensors, do)
    generator = torch.Generator("cuda").manual_seed(3)
    do.copy_(torch.randn(do.shape, generator=generator, device="cuda"))
    graph.replay()
    for name, a, b in zip(case.names, captured, expected, strict=True):
        assert torch.equal(a, b), name


def test_documents_beyond_32_bit_offsets_are_computed_like_alone() -> None:
    """The last document starts past element 2^31 of q; it must not notice."""
    if torch.cuda.get_device_properties(0).total_memory < 70 * 2**30:
        pytest.skip("needs 70 GiB of GPU memory")
    heads, groups, dim, last = 64, 4, 128, 500
    first = 2**31 // (heads * dim) + 64
    packed = random_case([first, last], heads, groups, dim)
    alone = random_case([last], heads, groups, dim)
    tail = tuple(x[first:].detach().requires_grad_() for x in packed.tensors[:8])
    maps = tuple(packed.tensors[8:])
    alone = Case((*tail, *maps), alone.docs, alone.spec)
    out, expected = run(packed), run(alone)
    torch.testing.assert_close(out[first:], expected, rtol=2e-2, atol=2e-3)
    do = torch.zeros_like(out)
    do[first:] = torch.randn_like(expected)
    got = torch.autograd.grad(out, packed.tensors[:8], do)
    wanted = torch.autograd.grad(expected, alone.tensors[:8], do[first:])
    for name, a, b in zip(packed.names, got, wanted, strict=False):
        assert torch.count_nonzero(a[:first]) == 0, name
        error = (a[first:].double() - b.double()).norm() / b.double().norm()
        assert error < 1e-2, f"{name}: {error:.2e}"
