"""The mesh finds its place from torchrun's environment, and says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Mesh, MeshError, _place, threads_per_rank
from tests.ranks import RankError, run_ranks

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1234",
}


def _describe(mesh: Mesh, word: str) -> tuple[int, int, int, str, float]:
    total = torch.tensor(float(mesh.rank + 1))
    dist.all_reduce(total)
    return mesh.rank, mesh.world, mesh.data_rank, word, total.item()


def test_ranks_meet_and_return_results_in_rank_order() -> None:
    assert run_ranks(_describe, 2, "x") == [(0, 2, 0, "x", 3.0), (1, 2, 1, "x", 3.0)]


def _fail_on_rank_1(mesh: Mesh) -> None:
    if mesh.rank == 1:
        raise ValueError("rank one is unhappy")
    dist.barrier()


def test_failure_of_a_rank_is_raised_with_its_traceback_and_without_waiting() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1: Traceback.*_fail_on_rank_1.*is unhappy"):
        run_ranks(_fail_on_rank_1, 2, timeout=500)
    assert time.monotonic() - start < 300


def _hang(mesh: Mesh) -> None:
    if mesh.rank == 1:
        time.sleep(600)


def test_hang_ends_at_the_timeout() -> None:
    with pytest.raises(RankError, match=r"ranks \[.*1\] not done"):
        run_ranks(_hang, 2, timeout=15)


def test_place_is_read_from_the_launcher() -> None:
    assert _place(TORCHRUN) == (1, 4, 1, 2)
    assert _place({}) is None
    assert _place({"MASTER_ADDR": "somewhere"}) is None


@pytest.mark.parametrize("name", sorted(TORCHRUN))
def test_missing_rendezvous_variable_is_named(name: str) -> None:
    environment = {k: v for k, v in TORCHRUN.items() if k != name}
    with pytest.raises(MeshError, match=f"lacks {name} "):
        _place(environment)


def test_impossible_rank_is_refused() -> None:
    with pytest.raises(MeshError, match="RANK 4 of WORLD_SIZE 4"):
        _place(TORCHRUN | {"RANK": "4"})
    with pytest.raises(MeshError, match="WORLD_SIZE='four'"):
        _place(TORCHRUN | {"WORLD_SIZE": "four"})


def test_single_process_needs_no_launcher() -> None:
    script = (
        "import torch, torch.distributed as dist\n"
        "from parallel.mesh import init_mesh\n"
        "mesh = init_mesh('cpu')\n"
        "x = torch.ones(2); dist.all_reduce(x)\n"
        "print(mesh.rank, mesh.world, mesh.device, x.sum().item())\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "1", "cpu", "2.0"]


def test_threads_are_shared_among_local_ranks() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_rank(1) == cores
    assert threads_per_rank(10 * cores) == 1
