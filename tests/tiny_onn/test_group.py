"""Training is the same however many ranks share a sequence: losses, gradient norms, experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.distributed as dist

from data.packing import Batch
from kernels import Documents
from parallel.engine import Engine, EngineConfig, OptimizerConfig, ScheduleConfig, ZeroConfig
from parallel.group_exchange import GroupExchange
from parallel.mesh import Mesh
from parallel.tables import RowTable
from tests.ranks import Ranks
from tiny_onn.activations import Checkpointing
from tiny_onn.attention import AttentionConfig
from tiny_onn.deepembed import DeepEmbedConfig
from tiny_onn.dynmoe import update_controllers
from tiny_onn.dynmoe_config import DynMoeConfig
from tiny_onn.modular import ModelConfig, TinyOnn

V, STEPS, SEQUENCES = 97, 20, 2
LENGTHS = ((61,), (1, 17, 30, 13), (5, 1, 1, 47, 7), (23, 38))
"""Documents of sequences of 61 tokens, which neither 2 nor 4 ranks share evenly."""

SPARSE = ModelConfig(
    vocab_size=V,
    width=32,
    layers=2,
    attention=AttentionConfig(
        heads=8, groups=4, head_dim=8, compress_block=8, compress_stride=4, select_block=8,
        selected=3, window=12,
    ),
    ffn=DynMoeConfig(
        experts=4, expert_hidden=16, target_experts=2.0, max_experts=3, explore_share=0.2
    ),
    deepembed=DeepEmbedConfig(kind="output"),
)  # fmt: skip
TWO_GROUPS = replace(
    SPARSE,
    attention=replace(SPARSE.attention, groups=2, shared_kv=True),
    deepembed=DeepEmbedConfig(kind="hidden"),
)
FULL = replace(SPARSE, attention=replace(SPARSE.attention, kind="full", groups=2))
MODELS = {"four groups": SPARSE, "two groups, hidden": TWO_GROUPS, "full": FULL}
KEPT = replace(
    FULL,
    ffn=replace(FULL.ffn, kind="dense"),
    deepembed=replace(FULL.deepembed, keep_output=True),
    activation_checkpointing="recompute",
)
"""Under activation checkpoints its blocks leave a second thing for the backward pass."""

Result = tuple[list[float], list[float], list[float]]


def batches(step: int) -> list[Batch]:
    """Return the sequences of a step; every third token predicts nothing, one sequence hardly."""
    g = torch.Generator().manual_seed(step)
    out = []
    for i in range(SEQUENCES):
        lengths = LENGTHS[(step + i) % len(LENGTHS)]
        total = sum(lengths)
        ids = torch.randint(0, V, (total,), generator=g)
        labels = (ids * 5 + 1) % V
        labels[::3] = -100
        if (step + i) % 4 == 0:
            labels[10:] = -100
        out.append(Batch(ids, labels, list(lengths), [i], int((labels != -100).sum())))
    return out


def train(mesh: Mesh, cfg: ModelConfig, group: int, steps: int = STEPS) -> Result:
    """Return losses and gradient norms of each step, and the mean gradient norm of the table."""
    mesh = replace(mesh, data=mesh.world // group, group=group)
    torch.manual_seed(0)
    exchange = GroupExchange(mesh, cfg.attention.groups) if group > 1 else None
    accumulation = SEQUENCES // mesh.data
    table = RowTable("deepembed", V, cfg.row_width, mesh, cfg.deepembed,
                     dtype=torch.float32, groups=cfg.row_parts)  # fmt: skip
    engine = Engine(
        lambda: TinyOnn(cfg, exchange),
        EngineConfig(
            precision="fp32",
            accumulation=accumulation,
            optimizer=OptimizerConfig(lr=3e-3, clip=0.5),
            schedule=ScheduleConfig(warmup=3),
            zero=ZeroConfig(param_persistence_threshold=0),
        ),
        mesh,
        STEPS,
        [table],
    )
    losses, norms, rows = [], [], []
    for step in range(steps):
        whole = batches(step)
        labels = sum(b.n_labels for b in whole)
        scale = torch.tensor(mesh.world / labels)
        total = torch.zeros(())
        result = None
        for i in range(accumulation):
            batch = whole[i * mesh.data + mesh.data_rank].part(mesh.group_rank, group)
            fetched = table.fetch(batch.ids_T)
            output = engine.forward(
                batch.ids_T, batch.labels_T, Documents(batch.lengths), scale,
                fetched.parts, fetched.lookup,
            )  # fmt: skip
            engine.backward(output.loss)
            table.accumulate(fetched)
            if i == accumulation - 1:
                rows.append(float(table.grad_sq_norm()))
            result = engine.step()
            total += output.nll_sum
        assert result is not None and not result.skipped
        update_controllers(engine.module)
        dist.all_reduce(total)
        losses.append(float(total) / labels)
        norms.append(result.grad_norm)
    table.close()
    return losses, norms, rows


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def alone() -> dict[str, Result]:
    """What one rank does with all of it."""
    with Ranks(1) as ranks:
        return {model: ranks.run(train, cfg, 1, timeout=400)[0] for model, cfg in MODELS.items()}


def worst(found: list[float], wanted: list[float]) -> float:
    return max(abs(f - w) / abs(w) for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("model", "group"),
    [("four groups", 2), ("four groups", 4), ("two groups, hidden", 4), ("full", 4)],
)
def test_losses_and_norms_are_those_of_one_rank(
    four_ranks: Ranks, alone: dict[str, Result], model: str, group: int
) -> None:
    for result in four_ranks.run(train, MODELS[model], group, timeout=400):
        for name, found, wanted in zip(("loss", "norm", "rows"), result, alone[model], strict=True):
            assert worst(found, wanted) < 1e-5, (name, found, wanted)


def checkpointed(mesh: Mesh, cfg: ModelConfig, group: int) -> list[Result]:
    """Train alike with every kind of activation checkpoints."""
    results = []
    for kind in get_args(Checkpointing):
        # Where nothing runs again, there is no output to keep.
        kept = replace(cfg.deepembed, keep_output=cfg.deepembed.keep_output and kind != "none")
        model = replace(cfg, activation_checkpointing=kind, deepembed=kept)
        results.append(train(mesh, model, group, steps=4))
    return results


@pytest.mark.parametrize(
    ("cfg", "group"), [(SPARSE, 2), (TWO_GROUPS, 4), (KEPT, 4)], ids=["P < G", "P > G", "kept"]
)
def test_blocks_that_run_again_exchange_the_same(
    four_ranks: Ranks, cfg: ModelConfig, group: int
) -> None:
    for kept, *others in four_ranks.run(checkpointed, cfg, group, timeout=400):
        assert len(others) == 2 and kept[0][0] != kept[0][-1]
        assert all(other == kept for other in others)
