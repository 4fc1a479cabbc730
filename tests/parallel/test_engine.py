"""The engine computes what plain PyTorch does, whatever is partitioned, offloaded or skipped."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel.engine import (
    Engine,
    EngineError,
    OffloadConfig,
    OptimizerConfig,
    ZeroConfig,
)
from parallel.mesh import Mesh
from parallel.zero_setup import parameter_groups
from parallel.zero_state import full_tensors
from tests.parallel.tiny import (
    LR,
    Lengths,
    Poisoned,
    TinyModel,
    build_engine,
    config,
    global_batch,
    share,
    train,
)
from tests.ranks import RankError, Ranks

STEPS = 10


def weights(engine: Engine) -> dict[str, Tensor]:
    """Gather every whole fp32 weight on every rank."""
    tensors, meta = engine.local_state()
    everyone: list[Any] = [None] * engine.mesh.world
    torch.distributed.all_gather_object(everyone, tensors)
    return dict(full_tensors(meta, everyone.__getitem__))


def reference() -> tuple[dict[str, Tensor], list[float]]:
    """Train the model in one process with torch's own parts; returns weights and norms."""
    cfg = config()
    torch.manual_seed(0)
    model = TinyModel()
    groups = parameter_groups(model, cfg.optimizer.weight_decay)
    options = cfg.optimizer
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps)
    norms = []
    for step in range(STEPS):
        ids, labels = global_batch(step)
        output = model(ids, labels, Lengths(ids.numel()), torch.tensor(1 / ids.numel()))
        optimizer.zero_grad()
        output.loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), options.clip).item())
        for group in optimizer.param_groups:
            factor = min((step + 1) / 3, 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 3) / 97)))
            group["lr"] = options.lr * group["lr_multiplier"] * factor
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, norms


def _train_variants(mesh: Mesh, offload: OffloadConfig | None = None) -> dict[str, Any]:
    variants = {
        "fp32": (config(), 1),
        "persistent": (config(zero=ZeroConfig(resident_gib=0)), 1),
        "resident": (config(zero=ZeroConfig(sub_group_size=500), accumulation=3), 3),
        "buckets": (
            config(zero=ZeroConfig(reduce_bucket_size=300, sub_group_size=500, resident_gib=0)),
            1,
        ),
        "accumulation": (config(accumulation=3), 3),
        "cpu optimizer": (config(offload=OffloadConfig(optimizer="cpu"), accumulation=2), 2),
        "cpu both": (config(offload=OffloadConfig(optimizer="cpu", params="cpu")), 1),
    }
    found = {}
    for name, (cfg, accumulation) in variants.items():
        engine = build_engine(TinyModel, cfg, mesh)
        results = train(engine, 0, STEPS, accumulation)
        found[name] = (weights(engine), [r.grad_norm for r in results], results[-1].lr)
    return found


def test_two_ranks_equal_torch_adamw_in_one_process(two_ranks: Ranks) -> None:
    expected, norms = reference()
    assert max(norms) > 0.5, "clipping must matter in this test"
    for found in two_ranks.run(_train_variants):
        for variant, (tensors, found_norms, lr) in found.items():
            assert tensors.keys() == expected.keys(), variant
            for name, tensor in tensors.items():
                torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0, msg=variant)
            assert found_norms == pytest.approx(norms, rel=1e-5), variant
            assert lr == pytest.approx(LR * (0.1 + 0.45 * (1 + math.cos(math.pi * 6 / 97))))


def _train_alone(mesh: Mesh) -> tuple[dict[str, Tensor], list[float]]:
    engine = build_engine(TinyModel, config(), mesh)
    return weights(engine), [r.grad_norm for r in train(engine, 0, 2)]


def test_initial_weights_do_not_depend_on_the_world_size(one_rank: Ranks, two_ranks: Ranks) -> None:
    alone, norms = one_rank.run(_train_alone)[0]
    torch.manual_seed(0)
    for name, p in TinyModel().named_parameters():
        assert torch.equal(alone[name], p), name
    for together, other_norms in two_ranks.run(_train_alone):
        assert all(torch.equal(together[name], alone[name]) for name in alone)
        assert other_norms == pytest.approx(norms, rel=1e-5)


def _train_bf16(mesh: Mesh) -> dict[str, Any]:
    found = {}
    for reduce_dtype, resident in itertools.product(("fp32", "bf16"), (0, 8)):
        zero = ZeroConfig(
            param_persistence_threshold=0, reduce_dtype=reduce_dtype, resident_gib=resident
        )
        engine = build_engine(TinyModel, config(precision="bf16", zero=zero, accumulation=2), mesh)
        module: Any = engine.module
        types = module.gate.weight.dtype, module.seen.dtype, module.third.dtype
        ids, labels = global_batch(0)
        part = share(ids, mesh), share(labels, mesh)

        def loss(engine: Engine = engine, part: tuple[Tensor, Tensor] = part) -> float:
            with torch.no_grad():
                output = engine.forward(*part, Lengths(part[0].numel()), torch.tensor(1.0))
            return float(output.loss)

        before = loss()
        train(engine, 0, STEPS, 2)
        middle = loss()
        results = train(engine, STEPS, 3 * STEPS, 2)
        found[reduce_dtype, resident] = (
            types,
            before,
            middle,
            loss(),
            results[-1],
            weights(engine),
        )
    return found


def test_bf16_trains_with_fp32_masters_and_leaves_buffers_alone(two_ranks: Ranks) -> None:
    expected = (torch.bfloat16, torch.float64, torch.float32)
    for found in two_ranks.run(_train_bf16):
        for types, before, middle, after, result, tensors in found.values():
            assert types == expected
            assert before > middle > after
            assert not result.skipped
            rounded = {name: t.bfloat16().float() for name, t in tensors.items()}
            assert any(not torch.equal(t, rounded[name]) for name, t in tensors.items())


class FixedTable:
    """A table whose gradient norm is given; notes what it is told."""

    def __init__(self) -> None:
        self.squared = 9.0
        self.calls: list[Any] = []

    def grad_sq_norm(self) -> Tensor:
        return torch.tensor(self.squared, dtype=torch.float64)

    def step(self, lr: float, clip_coefficient: float) -> None:
        self.calls.append((lr, clip_coefficient))

    def skip(self) -> None:
        self.calls.append("skip")


def _train_with_tables(mesh: Mesh) -> list[tuple[Any, ...]]:
    found = []
    for clip in (0.5, 0.0):
        for offload in ("none", "cpu"):
            optimizer = OptimizerConfig(lr=LR, clip=clip)
            cfg = config(optimizer=optimizer, offload=OffloadConfig(optimizer=offload))
            alone = train(build_engine(TinyModel, cfg, mesh), 0, 1)[0]
            tables = [FixedTable(), FixedTable()]
            joined = train(build_engine(TinyModel, cfg, mesh, *tables), 0, 1)[0]
            found.append((clip, alone.grad_norm, joined.grad_norm, joined.lr, tables))
    return found


def test_tables_share_the_global_norm_and_the_clip_coefficient(two_ranks: Ranks) -> None:
    for found in two_ranks.run(_train_with_tables):
        for clip, alone, joined, lr, tables in found:
            assert joined == pytest.approx(math.sqrt(alone**2 + 18.0), rel=1e-6)
            coefficient = clip / (joined + 1e-6) if clip else 1.0
            for table in tables:
                assert table.calls == [(lr, pytest.approx(coefficient))]


SKIP_CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "cpu optimizer": {"offload": OffloadConfig(optimizer="cpu")},
    "cpu both, bf16": {
        "offload": OffloadConfig(optimizer="cpu", params="cpu"),
        "precision": "bf16",
    },
    "persistent, accumulation": {"zero": ZeroConfig(resident_gib=0), "accumulation": 2},
    "resident, accumulation": {"zero": ZeroConfig(), "accumulation": 2, "precision": "bf16"},
}


def _skip(mesh: Mesh) -> None:
    for name, changes in SKIP_CASES.items():
        table = FixedTable()
        engine = build_engine(Poisoned, config(**changes), mesh, table)
        accumulation = engine.cfg.accumulation
        train(engine, 0, 3, accumulation)
        before, meta = engine.local_state()
        lr = engine.lr
        for poison, squared in ((float("nan"), 9.0), (float("inf"), 9.0), (0.0, float("nan"))):
            table.calls.clear()
            table.squared = squared
            engine.module.poison = poison if mesh.rank == 1 else 0.0  # type: ignore[assignment]
            result = train(engine, 3, 4, accumulation)[0]
            assert result.skipped, (name, poison)
            assert not math.isfinite(result.grad_norm), name
            assert table.calls == ["skip"], name
            assert engine.lr == lr == result.lr, name
            after, after_meta = engine.local_state()
            for key, tensor in before.items():
                if not key.startswith("buffer/"):
                    assert torch.equal(tensor, after[key]), (name, key)
            assert after_meta["parameters"] == meta["parameters"], name
            assert after_meta["applied_steps"] == 3, name
        table.squared, engine.module.poison = 9.0, 0.0  # type: ignore[assignment]
        skipped = train(engine, 4, 7, accumulation)
        # The same run without the bad steps.
        clean = build_engine(Poisoned, config(**changes), mesh, FixedTable())
        train(clean, 0, 3, accumulation)
        assert [r.grad_norm for r in train(clean, 4, 7, accumulation)] == [
            r.grad_norm for r in skipped
        ], name
        for key, tensor in clean.local_state()[0].items():
            if not key.startswith("buffer/"):
                assert torch.equal(tensor, engine.local_state()[0][key]), (name, key)


def test_step_with_a_norm_that_is_not_finite_moves_nothing_anywhere(two_ranks: Ranks) -> None:
    two_ranks.run(_skip)


def _refuse(mesh: Mesh) -> None:
    for name, offload in (("resident", OffloadConfig()), ("offloaded", OffloadConfig("cpu"))):
        table = FixedTable()
        engine = build_engine(Poisoned, config(offload=offload), mesh, table)
        train(engine, 0, 3)
        before, lr = engine.local_state(), engine.lr
        table.calls.clear()
        norms: list[float] = []

        def refuse(norm: float, norms: list[float] = norms) -> bool:
            norms.append(norm)
            return False

        result = train(engine, 3, 4, accept=refuse)[0]
        assert result.skipped and table.calls == ["skip"], name
        assert math.isfinite(result.grad_norm) and norms == [result.grad_norm], name
        assert engine.lr == lr, name
        after = engine.local_state()
        for key, tensor in before[0].items():
            assert key.startswith("buffer/") or torch.equal(tensor, after[0][key]), (name, key)
        # Said yes to, it is the step that was refused.
        again = train(engine, 3, 4, accept=lambda norm: True)[0]
        assert (again.grad_norm, again.skipped) == (result.grad_norm, False), name


def test_step_that_is_not_accepted_moves_nothing_and_tells_its_norm(two_ranks: Ranks) -> None:
    two_ranks.run(_refuse)


def test_decay_is_for_matrices_and_marks_on_parameters_are_honoured() -> None:
    model = TinyModel()
    names = {id(p): name for name, p in model.named_parameters()}
    found = {
        (group["weight_decay"], group["lr_multiplier"]): {names[id(p)] for p in group["params"]}
        for group in parameter_groups(model, 0.1)
    }
    assert found == {
        (0.1, 1.0): {"blocks.0.up.weight", "blocks.1.up.weight"},
        (0.0, 0.5): {"blocks.0.scale", "blocks.1.scale"},
        (0.0, 1.0): {
            "embedding.weight",
            "gate.weight",
            "head.bias",
            "sharpness",
            *(f"blocks.{i}.norm.{part}" for i in range(2) for part in ("weight", "bias")),
        },
    }


def _marks(mesh: Mesh) -> list[tuple[float, float, int]]:
    engine = build_engine(TinyModel, config(), mesh)
    groups = parameter_groups(engine.module, 0.1)
    return [(g["weight_decay"], g["lr_multiplier"], len(g["params"])) for g in groups]


def test_marks_on_parameters_survive_partitioning(two_ranks: Ranks) -> None:
    expected = [
        (g["weight_decay"], g["lr_multiplier"], len(g["params"]))
        for g in parameter_groups(TinyModel(), 0.1)
    ]
    assert two_ranks.run(_marks) == [expected, expected]


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tau = nn.Parameter(torch.ones(()))


def _refusals(mesh: Mesh) -> None:
    with pytest.raises(EngineError, match="'weight' of Frozen does not require a gradient"):
        build_engine(Frozen, config(), mesh)
    with pytest.raises(EngineError, match=r"'tau' of Scalar is 0-dim.*shape \(1,\)"):
        build_engine(Scalar, config(), mesh)
    with pytest.raises(EngineError, match="kernel deepspeed is a CPU kernel"):
        build_engine(TinyModel, config(optimizer=OptimizerConfig(kernel="deepspeed")), mesh)
    with pytest.raises(ValueError, match=r"needs engine\.offload\.nvme_path"):
        build_engine(TinyModel, config(offload=OffloadConfig(optimizer="nvme")), mesh)
    engine = build_engine(TinyModel, config(accumulation=2), mesh)
    ids, labels = global_batch(0)
    output = engine.forward(ids, labels, Lengths(ids.numel()), torch.tensor(1.0))
    engine.backward(output.loss)
    assert engine.step() is None
    with pytest.raises(EngineError, match="after micro-batch 1 of 2"):
        engine.local_state()


def test_what_cannot_work_is_refused_with_the_reason(one_rank: Ranks) -> None:
    one_rank.run(_refusals)


class Unused(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(4, 4)


def _train_unused(mesh: Mesh, resident_gib: float) -> None:
    cfg = config(zero=ZeroConfig(resident_gib=resident_gib))
    train(build_engine(Unused, cfg, mesh), 0, 1)


@pytest.mark.parametrize("resident_gib", [0.0, 8.0])
def test_parameter_without_a_gradient_is_named(two_ranks: Ranks, resident_gib: float) -> None:
    with pytest.raises(RankError, match=r"no gradient for spare.bias, spare.weight"):
        two_ranks.run(_train_unused, resident_gib)
