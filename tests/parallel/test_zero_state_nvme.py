"""What holds for the engine in memory holds when its states and weights are swapped to disk.

All of it shares one build of DeepSpeed's async_io, minutes long on few cores, cached in
TORCH_EXTENSIONS_DIR.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallel.deepspeed_env import load_deepspeed, require_async_io
from parallel.engine import Engine, EngineConfig, EngineError, OffloadConfig
from parallel.mesh import Mesh
from tests.parallel.test_zero_state import assert_same, continue_exactly, logits_loss
from tests.parallel.tiny import Poisoned, TinyModel, build_engine, config, train
from tests.ranks import Ranks

pytestmark = [pytest.mark.nvme, pytest.mark.xdist_group("nvme"), pytest.mark.timeout(1800)]

# Two ranks' partitions of the embedding and of the two matrices exceed DeepSpeed's least size of a
# swap file (1 MiB), the former in bf16 too, and are no multiples of the alignment.
WIDTH, VOCABULARY = 515, 2051


def _build_op(mesh: Mesh) -> str:
    import importlib

    deepspeed = load_deepspeed(mesh)
    try:
        require_async_io(deepspeed)
    except RuntimeError as e:
        return str(e)
    importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder().load(verbose=False)
    return ""


@pytest.fixture(scope="module", autouse=True)
def async_io(two_ranks: Ranks) -> None:
    reason = two_ranks.run(_build_op, timeout=1500)[0]
    if reason:
        pytest.skip(reason)


def nvme_config(path: Path, **changes: Any) -> EngineConfig:
    offload: dict[str, Any] = {
        "nvme_path": str(path),
        "params_buffer_numel": 600_000,
        "params_buffers": 4,
    }
    wanted = {k: changes.pop(k) for k in ("optimizer", "params") if k in changes}
    return config(offload=OffloadConfig(**(offload | wanted)), **changes)


def _continue(mesh: Mesh, path: Path) -> None:
    for optimizer, params, precision in (
        ("nvme", "none", "fp32"),
        ("nvme", "nvme", "fp32"),
        ("none", "nvme", "bf16"),
        ("nvme", "nvme", "bf16"),
        ("nvme", "cpu", "bf16"),
    ):
        swap = path / f"{optimizer}-{params}-{precision}"
        cfg = nvme_config(swap, optimizer=optimizer, params=params, precision=precision)
        continue_exactly(mesh, cfg, WIDTH, VOCABULARY)


def test_restored_run_continues_bitwise_from_nvme(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(_continue, tmp_path, timeout=300)


def build() -> TinyModel:
    return TinyModel(WIDTH, VOCABULARY)


def _compare(mesh: Mesh, path: Path) -> tuple[list[bool], list[str]]:
    swapped = build_engine(build, nvme_config(path, optimizer="nvme", params="nvme"), mesh)
    resident = build_engine(build, config(offload=OffloadConfig(optimizer="cpu")), mesh)
    assert train(swapped, 0, 3) == train(resident, 0, 3)
    assert_same(swapped.local_state(), resident.local_state(), "nvme")
    assert torch.equal(logits_loss(swapped), logits_loss(resident))
    zero = swapped._zero
    groups = [zero._swappable_optimizer_subgroup(i) for i in range(len(zero.fp16_groups))]
    parameters: Any = dict(swapped.module.named_parameters())
    return groups, [n for n, p in parameters.items() if p.ds_tensor.final_location == "nvme"]


def test_nvme_equals_host_memory_bitwise_and_really_swaps(two_ranks: Ranks, tmp_path: Path) -> None:
    for groups, parameters in two_ranks.run(_compare, tmp_path, timeout=300):
        assert sum(groups) >= 2
        assert parameters == ["embedding.weight"] or len(parameters) > 1
    assert list(tmp_path.glob("tiny-onn-run/**/*.swp"))


class LargePoisoned(Poisoned):
    def __init__(self) -> None:
        super().__init__(WIDTH, VOCABULARY)


def dense(engine: Engine) -> dict[str, Tensor]:
    return {k: t for k, t in engine.local_state()[0].items() if not k.startswith("buffer/")}


def _skip(mesh: Mesh, path: Path) -> None:
    engine = build_engine(LargePoisoned, nvme_config(path, optimizer="nvme", params="nvme"), mesh)
    train(engine, 0, 2)
    before = dense(engine)
    engine.module.poison = float("nan") if mesh.rank == 1 else 0.0  # type: ignore[assignment]
    assert all(r.skipped for r in train(engine, 2, 4))
    assert all(torch.equal(t, before[k]) for k, t in dense(engine).items())
    engine.module.poison = 0.0  # type: ignore[assignment]
    results = train(engine, 4, 6)
    cfg = nvme_config(path, optimizer="nvme", params="nvme")
    clean = build_engine(LargePoisoned, cfg, mesh, run="clean")
    train(clean, 0, 2)
    assert train(clean, 4, 6) == results
    after = dense(clean)
    assert all(torch.equal(t, after[k]) for k, t in dense(engine).items())


def test_skipped_step_moves_nothing_on_nvme(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(_skip, tmp_path, timeout=300)


def _leftovers(mesh: Mesh, path: Path) -> None:
    mine, other = path / "tiny-onn-a", path / "tiny-onn-b"
    if mesh.rank == 0:
        for folder in (mine, other):
            folder.mkdir()
            (folder / "left.swp").touch()
    torch.distributed.barrier()
    engine = build_engine(build, nvme_config(path, optimizer="nvme"), mesh, run="a")
    assert not (mine / "left.swp").exists()
    assert (other / "left.swp").exists()
    with pytest.raises(EngineError, match=r"tiny-onn-a is in use by another process"):
        build_engine(build, nvme_config(path, optimizer="nvme"), mesh, run="a")
    train(engine, 0, 1)


def test_a_run_empties_its_own_swap_folder_and_no_other(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(_leftovers, tmp_path)


class ThreeMatrices(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            torch.nn.Parameter(torch.ones(VOCABULARY, WIDTH)) for _ in range(3)
        )


def _too_small(mesh: Mesh, path: Path) -> None:
    cfg = nvme_config(path, params="nvme")
    cfg.offload.params_buffer_numel = 100_000
    with pytest.raises(EngineError, match=r"'a' .* 528133 elements: raise .*params_buffer_numel"):
        build_engine(ThreeMatrices, cfg, mesh)
    cfg = nvme_config(path, params="nvme")
    cfg.offload.params_buffers = 2
    with pytest.raises(EngineError, match=r"holds 3 parameters .* raise offload.params_buffers"):
        build_engine(ThreeMatrices, cfg, mesh)


def test_swap_buffers_that_are_too_small_are_named(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(_too_small, tmp_path)
