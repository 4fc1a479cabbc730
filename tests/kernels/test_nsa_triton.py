"""NSA's Triton kernels in the interpreter, and the reference that they are compared with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from kernels.nsa import sweep
from kernels.nsa.bench import main, visible_pairs
from kernels.nsa.naive import nsa_naive, select_naive
from kernels.nsa.spec import NsaSpec
from kernels.nsa.triton_api import supports
from kernels.nsa.triton_check import dense_reference, random_case
from kernels.nsa.triton_config import kernel_configs
from kernels.nsa.triton_layout import packed_layout
from tests.kernels.nsa_triton_worker import CASES, SMALL

ROOT = Path(__file__).parents[2]

# The interpreter takes minutes, and several times as many on a busy machine.
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="session")
def interpreted() -> dict[str, list[str]]:
    """Failures of every case; one process, because importing torch takes longer than a case."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.nsa_triton_worker"],
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
def test_interpreted_kernels_equal_the_reference_forward_and_backward(
    name: str, interpreted: dict[str, list[str]]
) -> None:
    assert interpreted[name] == []


@pytest.mark.parametrize("mean", [False, True])
def test_dense_reference_equals_the_oracle(mean: bool) -> None:
    case = random_case(
        [1, 20, 75], 4, 2, 8, spec=SMALL, mean=mean, dtype=torch.float64, device="cpu"
    )
    oracle = nsa_naive(case.call())
    selection = [select_naive(x, SMALL) for x in oracle.importance]
    out, importance = dense_reference(case, case.tensors, selection)
    do = torch.randn_like(out)
    torch.testing.assert_close(out, oracle.out_THE)
    for own, expected in zip(importance, oracle.importance, strict=True):
        torch.testing.assert_close(own, expected)
    grads = [
        torch.autograd.grad(o, case.tensors, do, allow_unused=True) for o in (out, oracle.out_THE)
    ]
    for name, own, expected in zip(case.names, *grads, strict=True):
        assert own is not None and expected is not None, name
        torch.testing.assert_close(own, expected, msg=lambda m, name=name: f"{name}: {m}")


def test_layout_intervals_never_decrease_and_are_built_once() -> None:
    case = random_case([1, 31, 32, 33, 200], 1, 1, 8, dtype=torch.float32, device="cpu")
    layout = packed_layout(case.docs, NsaSpec())
    assert packed_layout(case.docs, NsaSpec()) is layout
    for low, high in (layout.tokens[2:], layout.window[:2], layout.window[2:], layout.slots[2:4]):
        assert (low <= high).all()
        assert (low.diff() >= 0).all()
        assert (high.diff() >= 0).all()
    assert layout.n_slots == 4 * layout.n_blocks == 4 * (1 + 1 + 1 + 1 + 4)


def test_unsupported_calls_are_refused_with_the_reason() -> None:
    case = random_case([64], 6, 2, 8, dtype=torch.float32, device="cpu")
    reason = supports(case.call())
    assert reason is not None
    assert "cpu" in reason


def test_benchmark_counts_the_pairs_that_the_oracle_sees() -> None:
    case = random_case([5, 90], 1, 1, 8, spec=SMALL, dtype=torch.float64, device="cpu")
    oracle = nsa_naive(case.call())
    seen = [0, 0, 0]
    for n, p, chosen in zip(case.docs.lengths, oracle.p_compressed, oracle.selection, strict=True):
        t = torch.arange(n)
        causal = t[None] <= t[:, None]
        in_selected = chosen[:, 0].repeat_interleave(SMALL.select, 1)[:, :n]
        near = t[:, None] - t[None] < SMALL.window
        for i, mask in enumerate((p[:, 0] > 0, in_selected & causal, near & causal)):
            seen[i] += int(mask.sum())
    assert visible_pairs(case.docs, SMALL) == tuple(seen)


def test_sweep_varies_fields_of_the_table_and_takes_the_fastest() -> None:
    base = kernel_configs()
    assert set(sweep.VARIANTS) <= set(sweep.STAGE_OF)
    assert set(sweep.STAGE_OF) <= {field.name for field in fields(base)}
    plans = {("combine_rows", "8"): replace(base, combine_rows=8)}
    times = {"combine_rows": {"base": [2.0, 2.1, 9.0], "8": [1.0, 1.0, 9.0]}}
    assert sweep.fastest(base, plans, times) == plans["combine_rows", "8"]
    times["combine_rows"]["8"] = [3.0, 3.0, 1.0]
    assert sweep.fastest(base, plans, times) == base


@pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark would run")
def test_benchmark_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--lengths", "64"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().out
