"""The rank that holds the others up is named, and by how much, without a wait of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from launcher import stragglers as module
from launcher.lifecycle import RunFolder, StopReason, StopRequest
from launcher.stragglers import Stragglers
from parallel.mesh import Mesh
from tests.ranks import run_ranks


class Clock:
    """Moves by what a rank does, and not while a busy machine lets it wait."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


class Slow(nn.Linear):
    def __init__(self, seconds: float) -> None:
        super().__init__(4, 4)
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        CLOCK.now += self.seconds
        return super().forward(x)


class Blocks(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        block = nn.Sequential(Slow(seconds), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Linear(4, 4), block, nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
            if dist.is_initialized():
                # As under ZeRO-3 the ranks meet in every layer: all steps take equally long.
                dist.barrier()
        return x


@mock.patch.object(module, "time", SimpleNamespace(perf_counter=CLOCK.perf_counter))
def train(mesh: Mesh, folder: str) -> list[dict[str, float]]:
    model = Blocks(0.06 if mesh.rank == 1 else 0.02)
    stragglers = Stragglers(model, mesh)
    stop = StopRequest(RunFolder(Path(folder)), mesh)
    shares = []
    for step in range(4):
        stragglers.begin()
        data = 0.05 if mesh.rank == 2 else 0.0
        dist.barrier()
        model(torch.ones(2, 4))
        # What is waited for in the layer, everyone waits for.
        seconds = 0.05 + 0.06
        shares.append(stragglers.shares(stop.heard()))
        memory = (mesh.rank == 2) * 2**32 + 2**30
        stop.tell(stragglers.facts(data, seconds, memory))
        assert stop.requested(step) is StopReason.NONE
    stop.finish()
    return shares


def test_all_ranks_know_who_was_slow_in_the_step_before(tmp_path: Path) -> None:
    for shares in run_ranks(train, 3, str(tmp_path)):
        assert shares[0] == {}
        for share in shares[1:]:
            assert share["speed/slowest_rank"] == 1
            # Work of 20, 60 and 20 ms: the mean is 33.
            assert share["speed/slowest_share"] == pytest.approx(4 / 9)
            assert share["speed/data_stall_rank"] == 2
            assert share["speed/data_stall_share"] == pytest.approx(5 / 11)
            assert (share["speed/memory_most_gib"], share["speed/memory_most_rank"]) == (5.0, 2)


def test_equal_ranks_have_no_slowest_share() -> None:
    assert Stragglers.shares([[0.1, 2.0, 2.0**30], [0.3, 2.0, 0.0]]) == {
        "speed/slowest_share": 0.0,
        "speed/slowest_rank": 0.0,
        "speed/data_stall_share": 0.3,
        "speed/data_stall_rank": 1.0,
        "speed/memory_most_gib": 1.0,
        "speed/memory_most_rank": 0.0,
    }
    assert Stragglers.shares([[0.0, 0.0, 0.0]])["speed/slowest_share"] == 0.0
    assert Stragglers.shares([]) == {}


@pytest.mark.gpu
def test_on_a_gpu_work_is_timed_by_events_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    mesh = Mesh(0, 1, 0, 1, device, 1, 1)
    model = Blocks(0.0).to(device)
    stragglers = Stragglers(model, mesh)
    for name in ("synchronize",):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("waited for the GPU"))
        monkeypatch.setattr(torch.cuda.Event, name, lambda *_: pytest.fail("waited for the GPU"))
    for _ in range(3):
        stragglers.begin()
        model(torch.ones(2, 4, device=device)).sum().item()
        stall, seconds, _ = stragglers.facts(1.0, 4.0, 0)
        assert stall == 0.25
        assert 0 < seconds < 1
