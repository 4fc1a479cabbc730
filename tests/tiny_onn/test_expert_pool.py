"""The pool of experts: dead ones start anew, it grows, and ranks and resumed runs agree on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from parallel.engine import (
    Engine,
    EngineConfig,
    EngineError,
    OffloadConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from parallel.engine_config import ZeroConfig
from parallel.mesh import Mesh
from tests.ranks import Ranks
from tiny_onn.dynmoe import DynMoe, update_controllers
from tiny_onn.dynmoe_config import DynMoeConfig
from tiny_onn.expert_pool import look, plain_rewrite

WIDTH, TOKENS, WINDOW = 16, 48, 4
ONE = torch.tensor(1.0)


def layer(**changes: object) -> DynMoe:
    torch.manual_seed(0)
    base: dict[str, Any] = {
        "experts": 6, "expert_hidden": 8, "target_experts": 1.5, "explore_share": 0.25,
        "dead_window": WINDOW, "init_std": 0.2,
    }  # fmt: skip
    return DynMoe(DynMoeConfig(**{**base, **changes}), WIDTH)


def tokens(step: int) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))


def step(m: DynMoe, number: int, shift: Tensor | float = 0.0) -> None:
    m(tokens(number) + shift, None, ONE).sum().backward()
    m.zero_grad()
    update_controllers(m)


def test_a_dead_expert_starts_anew_where_tokens_are_served_worst() -> None:
    m = layer(balance_gain=0.0)
    with torch.no_grad():
        m.theta_E[3] = 60.0
    before = {name: p.detach().clone() for name, p in m.named_parameters()}
    m.record = True
    lonely = torch.zeros(WIDTH)
    lonely[0] = 30.0
    for number in range(WINDOW):
        assert int(m.recycled_1) == 0
        # Half of the tokens lie where no expert's direction points.
        step(m, number, torch.where(torch.arange(TOKENS)[:, None] % 2 == 0, lonely, 0.0))
    assert int(m.recycled_1) == 1
    assert int(m.idle_steps_E[3]) == 0
    assert m.theta_E[3].item() == 0
    others = torch.arange(6) != 3
    for name in ("direction_EC", "theta_E", "w_in_EIC", "w_out_ECF"):
        now = m.get_parameter(name)
        assert torch.equal(now[others], before[name][others]), name
        assert not torch.equal(now[3], before[name][3]), name
    assert m.controller_bias_E[3] == m.controller_bias_E[others].mean()
    assert 0.7 < float(m.direction_EC[3].norm()) / WIDTH**0.5 < 1.4
    m(tokens(99), None, ONE)
    assert m.stats["expert_load"][3] > 0
    assert m.stats["recycled_experts"] == 1


def test_the_look_points_at_the_worst_served_tokens() -> None:
    x = torch.eye(4)[[0, 1, 2, 3]] * torch.tensor([1.0, 5.0, 2.0, 7.0])[:, None]
    biased = torch.tensor([[2.0, 1.0], [3.0, 0.0], [-4.0, -5.0], [1.0, 1.0]])
    seen = look(biased, x)
    assert seen[:4].argmax() == 2
    assert seen[0] == seen[1] == 0
    assert seen[4:].tolist() == [1.0, 4.0]
    assert torch.equal(look(biased[:0], x[:0]), torch.zeros(6))


def test_recycling_can_be_switched_off() -> None:
    m = layer(recycle=False, balance_gain=0.0)
    with torch.no_grad():
        m.theta_E[3] = 60.0
    for number in range(3 * WINDOW):
        step(m, number)
    assert int(m.recycled_1) == 0
    assert float(m.theta_E[3]) == 60.0


def test_experts_that_do_not_exist_yet_neither_fire_nor_explore_nor_learn() -> None:
    m = layer(max_pool=10, explore_share=1.0)
    m.record = True
    m(tokens(0), None, ONE).pow(2).sum().backward()
    assert m.stats["expert_load"][6:].tolist() == [0.0] * 4
    assert m.stats["active_experts"] == 6
    assert torch.isnan(m.stats["expert_surprise"][6:]).all()
    for name in ("w_in_EIC", "w_out_ECF", "direction_EC", "theta_E"):
        assert m.get_parameter(name).grad[6:].abs().max() == 0, name
    alone = layer(explore_share=1.0)
    assert alone.theta_0 == m.theta_0
    update_controllers(m)
    assert (m.controller_bias_E[6:] == 1e4).all()
    assert not m.idle_steps_E[6:].any()


def test_the_pool_grows_while_tokens_stay_unserved_and_never_beyond_its_limit() -> None:
    m = layer(max_pool=8, grow_share=0.05, controller_gain=0.0)
    m.record = True
    sizes = []
    for number in range(5 * WINDOW):
        step(m, number)
        sizes.append(int(m.active_E.sum()))
    assert sizes[WINDOW - 2] == 6
    assert sizes[WINDOW - 1] == 7
    assert sizes[-1] == 8
    assert m.stats["expert_load"][6] > 0
    served = layer(max_pool=8, grow_share=1.0)
    for number in range(WINDOW):
        step(served, number)
    assert int(served.active_E.sum()) == 6


class Model(nn.Module):
    """Two layers, one with an expert that nobody reaches, both with room to grow."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            layer(max_pool=8, grow_share=0.02, expert_hidden=hidden) for _ in range(2)
        )
        # From a constructor only: under ZeRO-3 the weights are partitioned right after it.
        self.layers[0].controller_bias_E[2] = 60.0

    def forward(self, x: Tensor, target: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = x.to(self.layers[0].w_in_EIC.dtype)
        for part in self.layers:
            x = x + part(x, None, scale)
        total = (x - target).float().square().sum()
        return total * scale, total.detach()


class Mode(NamedTuple):
    """Where weights and states are, and of which type; and how large the experts are."""

    resident_gib: float = 0
    precision: Literal["bf16", "fp32"] = "fp32"
    home: Literal["none", "cpu", "nvme"] = "none"
    hidden: int = 8
    folder: str = ""


def _engine(mesh: Mesh, mode: Mode) -> Engine:
    offload = OffloadConfig(
        optimizer=mode.home, params=mode.home, nvme_path=mode.folder,
        params_buffers=6, params_buffer_numel=1_200_000,
    )  # fmt: skip
    cfg = EngineConfig(
        precision=mode.precision,
        offload=offload,
        optimizer=OptimizerConfig(lr=0.01, clip=1.0),
        schedule=ScheduleConfig(warmup=1),
        zero=ZeroConfig(param_persistence_threshold=20, resident_gib=mode.resident_gib),
    )
    return Engine(lambda: Model(mode.hidden), cfg, mesh, 20)


def _train(engine: Engine, mesh: Mesh, first: int, last: int) -> list[float]:
    losses = []
    scale = torch.tensor(mesh.world / TOKENS)
    for number in range(first, last):
        x = tokens(number)
        target = torch.sin(3 * x)
        mine = slice(mesh.rank * TOKENS // mesh.world, (mesh.rank + 1) * TOKENS // mesh.world)
        loss, total = engine.forward(x[mine].requires_grad_(), target[mine], scale)
        engine.backward(loss)
        engine.step()
        update_controllers(engine.module, engine.rewrite)
        torch.distributed.all_reduce(total)
        losses.append(float(total))
    return losses


def _whole_run(mesh: Mesh, stop: int, mode: Mode) -> dict[str, Any]:
    """Train through two looks at the pool; also go on from a copy of the state at `stop`."""
    engine = _engine(mesh, mode)
    losses = _train(engine, mesh, 0, WINDOW)
    tensors, meta = engine.local_state()
    losses += _train(engine, mesh, WINDOW, stop)
    saved = engine.local_state()
    losses += _train(engine, mesh, stop, 3 * WINDOW)
    buffers = {name: b.clone() for name, b in engine.module.named_buffers()}
    # Frees its swap folder for the next one.
    engine.close()
    resumed = _engine(mesh, mode)
    resumed.load_local_state(*saved)
    again = _train(resumed, mesh, stop, 3 * WINDOW)
    resumed.close()
    return {
        "losses": losses,
        "again": again,
        "tensors": tensors,
        "shapes": {name: entry["shape"] for name, entry in meta["parameters"].items()},
        "buffers": buffers,
        "resumed": {name: b.clone() for name, b in resumed.module.named_buffers()},
    }


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


# Straight after a look what is computed with has to be the new masters already. Partitions of the
# large experts exceed the size from which DeepSpeed swaps one (1 MiB), in bf16 too.
MODES = {
    "gathered": (2 * WINDOW - 1, Mode()),
    "resident": (2 * WINDOW + 1, Mode(8)),
    "bf16": (WINDOW, Mode(8, "bf16")),
    "bf16, gathered": (2 * WINDOW, Mode(0, "bf16")),
    "cpu": (WINDOW, Mode(home="cpu")),
    "cpu, bf16": (2 * WINDOW, Mode(0, "bf16", "cpu")),
    "nvme, bf16": (WINDOW, Mode(0, "bf16", "nvme", 4112)),
}


@pytest.mark.parametrize("kind", MODES)
def test_ranks_and_a_resumed_run_agree_on_the_pool(
    two_ranks: Ranks, kind: str, tmp_path: Path
) -> None:
    stop, mode = MODES[kind]
    mode = mode._replace(folder=str(tmp_path))
    first, second = two_ranks.run(_whole_run, stop, mode, timeout=400.0)
    for a, b in ((first["buffers"], second["buffers"]), (first["buffers"], first["resumed"])):
        for name, value in a.items():
            assert torch.equal(value, b[name]), name
    assert first["again"] == first["losses"][stop:]
    assert int(first["buffers"]["layers.0.recycled_1"]) >= 1
    assert int(first["buffers"]["layers.1.active_E"].sum()) == 8
    # The state right after the first look: fresh masters without moments for the recycled expert.
    for name in ("w_in_EIC", "w_out_ECF", "direction_EC", "theta_E"):
        key = f"layers.0.{name}"
        shape = first["shapes"][key]
        whole = {
            kind: torch.cat([r["tensors"][f"{kind}/{key}"] for r in (first, second)]).view(shape)
            for kind in ("fp32", "exp_avg", "exp_avg_sq")
        }
        assert not whole["exp_avg"][2].any(), name
        assert not whole["exp_avg_sq"][2].any(), name
        assert whole["exp_avg_sq"][[0, 1, 3, 4, 5]].any(), name
        if name == "theta_E":
            assert whole["fp32"][2] == 0


def _bad_rewrites(mesh: Mesh) -> list[str]:
    engine, found = _engine(mesh, Mode(8)), []
    for changes in ({"nobody": [(0, torch.zeros(1))]}, {"layers.0.theta_E": [(8, torch.zeros(1))]}):
        try:
            engine.rewrite(changes)
        except EngineError as e:
            found.append(str(e))
    try:
        plain_rewrite(engine.module)({"layers.0.theta_E": [(0, torch.zeros(1))]})
    except RuntimeError as e:
        found.append(str(e))
    return found


def test_what_cannot_be_rewritten_is_refused_by_name(two_ranks: Ranks) -> None:
    nobody, beyond, partitioned = two_ranks.run(_bad_rewrites, timeout=300.0)[0]
    assert "nobody" in nobody
    assert "layers.0.theta_E" in beyond
    assert "engine's rewrite" in partitioned
