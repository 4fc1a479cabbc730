"""The engine on a GPU: bf16 under every offload mode continues bitwise; fp32 equals the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from parallel.engine import OffloadConfig, OptimizerConfig
from parallel.mesh import Mesh
from tests.parallel.test_zero_state import continue_exactly
from tests.parallel.tiny import LR, TinyModel, build_engine, config, train
from tests.ranks import Ranks

pytest.importorskip("deepspeed")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def gpu_rank() -> Iterator[Ranks]:
    with Ranks(1, "cuda") as ranks:
        yield ranks


def _continue(mesh: Mesh, optimizer: str, params: str, kernel: str) -> None:
    assert mesh.device.type == "cuda"
    offload = OffloadConfig(optimizer, params)  # type: ignore[arg-type]
    options = OptimizerConfig(lr=LR, clip=0.5, kernel=kernel)  # type: ignore[arg-type]
    continue_exactly(
        mesh, config(precision="auto", offload=offload, optimizer=options, accumulation=2)
    )


@pytest.mark.parametrize(
    ("optimizer", "params", "kernel"),
    [
        ("none", "none", "auto"),
        ("cpu", "none", "torch"),
        ("cpu", "cpu", "torch"),
        ("none", "cpu", "torch"),
        ("cpu", "cpu", "auto"),
    ],
)
def test_restored_run_continues_bitwise_on_a_gpu(
    gpu_rank: Ranks, optimizer: str, params: str, kernel: str
) -> None:
    gpu_rank.run(_continue, optimizer, params, kernel, timeout=900)


def _norms(mesh: Mesh, first_weights: dict[str, torch.Tensor] | None) -> object:
    engine = build_engine(TinyModel, config(), mesh)
    tensors, meta = engine.local_state()
    if first_weights is not None:
        engine.load_local_state(first_weights, meta)
    return tensors, [r.grad_norm for r in train(engine, 0, 5)]


def test_fp32_on_a_gpu_equals_the_cpu_within_rounding(gpu_rank: Ranks, one_rank: Ranks) -> None:
    weights, expected = one_rank.run(_norms, None)[0]
    _, found = gpu_rank.run(_norms, weights)[0]
    assert found == pytest.approx(expected, rel=1e-3)
