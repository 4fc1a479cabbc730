"""Training runs on a row table and on a dense reference, shared by the tests of tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.rows import gather_rows
from parallel.mesh import Mesh
from parallel.table_layout import TableConfig
from parallel.tables import RowTable
from tests.ranks import run_ranks

SINGLE = Mesh(0, 1, 0, 1, torch.device("cpu"), 1, 1)


@dataclass
class Run:
    """A small regression on table rows: sizes, configuration, and how it is driven."""

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
        target = torch.sin(ids_T[:, None] * 0.7 + torch.arange(self.width) * 1.3)
        return ((scale_TW - target).square() + 0.1 * scale_TW.pow(3)).mean()


class Result(NamedTuple):
    """What a rank has after a run."""

    losses: list[float]
    state: dict[str, Tensor]
    stats: dict[str, int]


def batch_ids(run: Run, step: int, batch: int, mesh: Mesh) -> Tensor:
    parts = range(mesh.rank, run.data_world, mesh.world)
    return torch.cat([run.ids(step, batch, part) for part in parts])


def make_table(mesh: Mesh, run: Run) -> RowTable:
    return RowTable("t", run.rows, run.width, mesh, run.cfg, dtype=run.dtype, groups=run.groups)


def train(
    mesh: Mesh, run: Run, table: RowTable, first: int = 0, last: int | None = None
) -> list[float]:
    """Train steps first..last; return this rank's loss of every micro-batch."""
    losses = []
    for step in range(first, run.steps if last is None else last):
        for batch in range(run.accumulation):
            if run.prefetch == "within" and batch == run.accumulation - 1:
                coming = [batch_ids(run, step + 1, b, mesh) for b in range(run.accumulation)]
                table.prefetch(torch.cat(coming))
            ids = batch_ids(run, step, batch, mesh)
            rows = table.fetch(ids)
            scale = 1 + gather_rows(rows.values_UW, rows.lookup).float()
            loss = run.loss(scale, ids)
            (loss / run.accumulation).backward()
            table.accumulate(rows)
            losses.append(float(loss.detach()))
            if run.prefetch == "before_step" and batch == run.accumulation - 1:
                table.prefetch(batch_ids(run, step + 1, 0, mesh))
        norm = table.grad_sq_norm().sqrt()
        table.step(run.lr, min(1.0, run.clip / float(norm)))
        if run.prefetch == "after_step":
            table.prefetch(batch_ids(run, step + 1, 0, mesh))
    return losses


def train_one(mesh: Mesh, run: Run) -> Result:
    """Losses, state and stats of this rank after training."""
    table = make_table(mesh, run)
    losses = train(mesh, run, table)
    state = {name: value.clone() for name, value in table.local_state().items()}
    table.close()
    return Result(losses, state, table.stats)


def train_all(mesh: Mesh, runs: list[Run]) -> list[Result]:
    """For run_ranks: several runs in one start of the processes."""
    return [train_one(mesh, run) for run in runs]


def run_all(runs: list[Run], world: int) -> list[list[Result]]:
    """Results [run][rank] of runs at this world size."""
    if world == 1:
        return [[train_one(SINGLE, run)] for run in runs]
    by_rank = run_ranks(train_all, world, runs)
    return [list(results) for results in zip(*by_rank, strict=True)]


def whole(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join the ranks' states in order of ids."""
    joined = {name: torch.cat([state[name] for state in states]) for name in states[0]}
    order = joined["ids"].argsort()
    return {name: value[order] for name, value in joined.items()}


def dense_reference(run: Run, world: int) -> tuple[list[list[float]], Tensor]:
    """Train a dense [V, W] table, row by row in Python; losses [world][micro-batch], weights."""
    weight = torch.zeros(run.rows, run.width, requires_grad=True)
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
                (loss / run.accumulation / world).backward()
                losses[rank].append(float(loss.detach()))
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
