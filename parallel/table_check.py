"""Check of row tables against a dense table that is stepped row by row: `bench tables --check`.

A small regression with Zipf ids trains on a `RowTable` over the job's ranks; a dense [V, W] table
in one process, whose optimizer is a Python loop over rows in fp64, does the same. Losses of every
micro-batch and every row must agree. As a program it is one rank:

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m parallel.table_check
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.modulate import modulate
from kernels.rows import gather_rows
from parallel.mesh import Mesh, init_mesh
from parallel.table_layout import TableConfig
from parallel.tables import Rows, RowTable


@dataclass
class Run:
    """A small regression on table rows: sizes, configuration, and how it is driven.

    Attributes:
        cfg: of the table.
        rows: V.
        width: W.
        tokens: of each part of the global batch.
        steps: optimizer steps.
        accumulation: micro-batches per step.
        clip: bound on the gradient norm.
        lr: learning rate.
        groups: parts of a row.
        prefetch: when the next micro-batch is read: "off", "within" (behind the fetch),
            "before_step" (behind the backward) or "after_step".
        data_world: parts of the global batch, a multiple of the ranks.
        all_ids: every id comes once in every part.
        sink: gradients are handed over at once, as a model's layers do it, and not through leaves;
            only for `groups` above 1.
        dtype: compute type.
    """

    cfg: TableConfig = field(default_factory=TableConfig)
    rows: int = 97
    width: int = 12
    tokens: int = 48
    steps: int = 20
    accumulation: int = 1
    clip: float = 0.05
    lr: float = 0.03
    groups: int = 1
    prefetch: str = "off"
    data_world: int = 4
    all_ids: bool = False
    sink: bool = False
    dtype: torch.dtype = torch.float32

    def ids(self, step: int, batch: int, part: int) -> Tensor:
        """Zipf ids of one of `data_world` parts of the global batch; alike for every world."""
        generator = torch.Generator().manual_seed(1000 * step + 10 * batch + part)
        if self.all_ids:
            return torch.randperm(self.rows, generator=generator)
        u = torch.rand(self.tokens, generator=generator, dtype=torch.float64)
        return (float(self.rows) ** u - 1).long().clamp(0, self.rows - 1)

    def loss(self, scale_TW: Tensor, ids_T: Tensor) -> Tensor:
        """Mean distance to a target that depends on the id, with a cubic term."""
        columns = torch.arange(self.width, device=ids_T.device)
        target = torch.sin(ids_T[:, None] * 0.7 + columns * 1.3)
        return ((scale_TW - target).square() + 0.1 * scale_TW.pow(3)).mean()


class Result(NamedTuple):
    """What a rank has after a run."""

    losses: list[float]
    state: dict[str, Tensor]
    stats: dict[str, int]


def batch_ids(run: Run, step: int, batch: int, mesh: Mesh) -> Tensor:
    """Return the ids of this rank's share of a global batch."""
    parts = range(mesh.rank, run.data_world, mesh.world)
    return torch.cat([run.ids(step, batch, part) for part in parts])


def make_table(mesh: Mesh, run: Run) -> RowTable:
    """Return the table of a run; a collective call."""
    return RowTable("t", run.rows, run.width, mesh, run.cfg, dtype=run.dtype, groups=run.groups)


def train(
    mesh: Mesh, run: Run, table: RowTable, first: int = 0, last: int | None = None
) -> list[float]:
    """Train steps first..last; return this rank's loss of every micro-batch."""
    losses = []
    for step in range(first, run.steps if last is None else last):
        for batch in range(run.accumulation):
            ids = batch_ids(run, step, batch, mesh)
            rows = table.fetch(ids)
            after = (step, batch + 1) if batch + 1 < run.accumulation else (step + 1, 0)
            if run.prefetch == "within":
                table.prefetch(batch_ids(run, *after, mesh))
            scale = _scale(run, rows)
            loss = run.loss(scale, ids.to(scale.device))
            (loss / run.accumulation).backward()  # type: ignore[no-untyped-call]
            table.accumulate(rows)
            losses.append(float(loss.detach()))
            if run.prefetch == "before_step":
                table.prefetch(batch_ids(run, *after, mesh))
        norm = table.grad_sq_norm().sqrt()
        table.step(run.lr, min(1.0, run.clip / float(norm)))
        if run.prefetch == "after_step":
            table.prefetch(batch_ids(run, step + 1, 0, mesh))
    return losses


def _scale(run: Run, rows: Rows) -> Tensor:
    """Return 1 + value of every token, fp32 [T, W], part by part as a model's layers do."""
    if run.groups == 1:
        return 1 + gather_rows(rows.whole(), rows.lookup).float()
    tokens, width = rows.inverse_T.shape[0], run.width // run.groups
    ones_Tw = torch.ones(tokens, width, device=rows.inverse_T.device)
    scaled = []
    for k in range(run.groups):
        # Before the part itself, which then gets no gradient from autograd.
        sink = rows.parts.sink(k) if run.sink else None
        scaled.append(modulate(ones_Tw, rows.parts[k], rows.lookup, None, sink))
    return torch.cat(scaled, dim=1)


def train_one(mesh: Mesh, run: Run) -> Result:
    """Losses, state and stats of this rank after training."""
    table = make_table(mesh, run)
    losses = train(mesh, run, table)
    state = {name: value.clone() for name, value in table.local_state().items()}
    table.close()
    return Result(losses, state, table.stats)


def whole(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the ranks' states in order of ids."""
    joined = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    order = joined["ids"].argsort()
    return {name: value[order] for name, value in joined.items()}


def dense_reference(run: Run, world: int) -> tuple[list[list[float]], Tensor]:
    """Train a dense [V, W] table, row by row in Python; losses [world][micro-batch], weights."""
    weight: Any = torch.zeros(run.rows, run.width, requires_grad=True)
    moment1 = torch.zeros(run.rows, run.width, dtype=torch.float64)
    moment2 = torch.zeros(run.rows, run.width, dtype=torch.float64)
    touches = [0] * run.rows
    losses: list[list[float]] = [[] for _ in range(world)]
    cfg, clipped = run.cfg, 0
    for step in range(run.steps):
        touched: set[int] = set()
        weight.grad = None
        for batch in range(run.accumulation):
            for rank in range(world):
                place = Mesh(rank, world, rank, world, torch.device("cpu"), world, 1)
                ids = batch_ids(run, step, batch, place)
                touched |= set(ids.tolist())
                loss = run.loss(1 + weight[ids], ids)
                (loss / run.accumulation / world).backward()  # type: ignore[no-untyped-call]
                losses[rank].append(float(loss.detach()))
        assert weight.grad is not None
        grad = weight.grad.double()
        clip = min(1.0, run.clip / float(grad.norm()))
        clipped += clip < 1.0
        grad *= clip
        lr = run.lr * cfg.lr_multiplier
        for row in touched:
            g = grad[row]
            touches[row] += 1
            square = g**2
            if cfg.optimizer != "adam":
                parts = square.view(run.groups, -1).mean(1, keepdim=True)
                square = parts.expand(run.groups, run.width // run.groups).reshape(-1)
            with torch.no_grad():
                weight[row] *= 1 - lr * cfg.weight_decay
                if cfg.optimizer == "adagrad_rowwise":
                    moment2[row] += square
                    weight[row] -= (lr * g / (moment2[row].sqrt() + cfg.eps)).float()
                    continue
                b1, b2 = cfg.betas
                moment1[row] = b1 * moment1[row] + (1 - b1) * g
                moment2[row] = b2 * moment2[row] + (1 - b2) * square
                m = moment1[row] / (1 - b1 ** touches[row])
                v = moment2[row] / (1 - b2 ** touches[row])
                weight[row] -= (lr * m / (v.sqrt() + cfg.eps)).float()
    assert clipped > run.steps / 2, "clipping must be in play"
    return losses, weight.detach()


KINDS: tuple[Literal["adam"], Literal["adam_rowwise"], Literal["adagrad_rowwise"]] = (
    "adam",
    "adam_rowwise",
    "adagrad_rowwise",
)


def cases(folder: str) -> dict[str, Run]:
    """Return the runs of a check by name; the nvme tier's files go to `folder`."""
    base = Run(prefetch="within", accumulation=2, groups=3)
    runs: dict[str, Run] = {kind: replace(base, cfg=TableConfig(optimizer=kind)) for kind in KINDS}
    runs["one micro-batch"] = replace(base, accumulation=1)
    runs["handed over"] = replace(base, sink=True)
    runs["compiled kernel"] = replace(base, cfg=TableConfig(kernel="compiled"))
    disk = TableConfig(tier="nvme", nvme_path=folder, cache_rows=20, io_threads=4, direct=False)
    runs["nvme tier"] = replace(base, cfg=disk)
    return runs


def check(mesh: Mesh) -> list[dict[str, Any]]:
    """Run every case on all ranks together; rank 0 returns a row per case, others nothing.

    A row holds the largest difference of losses and weights, the largest weight, and whether all is
    within fp32 rounding.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, run in cases(folder).items():
            result = train_one(mesh, run)
            results: list[Any] = [None] * mesh.world
            dist.all_gather_object(results, result)
            if not mesh.is_first:
                continue
            losses, weight = dense_reference(run, mesh.world)
            state = whole([r.state for r in results])
            loss_gap = (torch.tensor([r.losses for r in results]) - torch.tensor(losses)).abs()
            gap = (state["weight"] - weight).abs()
            bound = 1e-4 * weight.abs() + 2e-6
            found.append(
                {
                    "ranks": mesh.world,
                    "case": name,
                    "loss_gap": float(loss_gap.max()),
                    "row_gap": float(gap.max()),
                    "largest": float(weight.abs().max()),
                    "passed": bool((gap <= bound).all()) and float(loss_gap.max()) < 2e-5,
                }
            )
    return found


if __name__ == "__main__":
    place = init_mesh("cpu")
    for row in check(place):
        sys.stdout.write(json.dumps(row) + "\n")
    dist.destroy_process_group()
