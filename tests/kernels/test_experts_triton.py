"""The Triton layer in the interpreter equals the torch layer in fp64; on a GPU also in bf16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels.experts import Router, RouteSpec, SurpriseSpec, dynmoe_layer
from kernels.experts.bench import CHECKS, check_case, check_failures, main
from kernels.experts.triton_check import decide, random_case, run_triton
from kernels.experts.triton_layer import supports
from tests.kernels.experts_triton_worker import CASES

ROOT = Path(__file__).parents[2]

# The interpreter takes minutes, and several times as many on a busy machine.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="session")
def interpreted() -> dict[str, list[str]]:
    """Failures of every case; one process, because importing torch takes longer than a case."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.experts_triton_worker"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", CASES)
def test_interpreted_layer_equals_fp64_forward_and_backward(
    name: str, interpreted: dict[str, list[str]]
) -> None:
    assert interpreted[name] == []


def test_capacity_holds_any_routing() -> None:
    spec = RouteSpec(1.0, 0.0, 1, 4, stride=10)
    assert spec.slots(8) == 5
    assert spec.capacity(95, 8, 1) == 95 * 4 + 10
    assert spec.capacity(95, 8, 16) >= 95 * 4 + 10 + 8 * 15
    assert spec.capacity(95, 8, 16) % 16 == 0
    assert spec.capacity(95, 2, 1) == 95 * 2 + 10
    packed = replace(spec, sequence=19)
    # Six sequences at most, of which each may explore once more than its share.
    assert packed.capacity(95, 8, 1) == 95 * 4 + (95 + 6 * 9) // 10


def test_what_triton_cannot_take_is_refused_with_the_reason() -> None:
    case = random_case(8, 4, 16, 16, device="cpu")
    x, direction, log_tau, theta, w_in, w_out = case.leaves
    reason = supports(x, w_out)
    assert reason is not None
    assert "cpu" in reason
    router = Router(direction, log_tau, theta, case.bias_E, case.step_1)
    with pytest.raises(ValueError, match="CUDA"):
        dynmoe_layer(x, router, w_in, w_out, case.spec, implementation="triton")
    with pytest.raises(ValueError, match="auto, torch or triton"):
        dynmoe_layer(x, router, w_in, w_out, case.spec, implementation="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CHECKS)
def test_gpu_layer_is_as_near_to_fp64_as_torch(name: str, dtype: torch.dtype) -> None:
    bad, _ = check_failures(name, dtype)
    assert bad == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["swiglu", "one expert"])
def test_gpu_layer_repeats_bit_for_bit_and_never_waits_for_the_device(name: str) -> None:
    case = check_case(name, torch.bfloat16)

    def once() -> list[Tensor]:
        routing = decide(case)
        y = run_triton(case, routing)
        return [y, *routing, *torch.autograd.grad(y, case.leaves, case.grad_TC)]

    first = once()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    used = int(first[12][-1])
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        # Rows behind the last group are undefined in the two lists by row.
        stop = used if i in (10, 11) else None
        assert torch.equal(a[:stop], b[:stop]), i


@pytest.mark.gpu
def test_gpu_layer_launches_few_kernels() -> None:
    case = random_case(
        512, 8, 256, 128, surprise=SurpriseSpec(), stride=50, dtype=torch.bfloat16, device="cuda"
    )
    torch.autograd.grad(run_triton(case, decide(case)), case.leaves, case.grad_TC)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.autograd.grad(run_triton(case, decide(case)), case.leaves, case.grad_TC)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    assert len(kernels) < 40, kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark would run")
def test_benchmark_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shapes", "64,4,16,16"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().out
