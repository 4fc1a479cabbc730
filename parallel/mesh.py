"""The process mesh: which rank this is, and how ranks reach each other.

World = data × group. Ranks of one group share a sequence (GQA-group parallelism); ZeRO-3 partitions
over the whole world.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for every process that it starts."""


@dataclass
class MeshConfig:
    """How the ranks are arranged.

    Attributes:
        group: ranks that share every sequence: each holds a part of its tokens, and whole KV groups
            in attention. Divides attention.groups or is a multiple of them; 1 shares nothing.
    """

    group: int = 1

    def __post_init__(self) -> None:
        """Refuse a group of nobody; which sizes fit depends on model and ranks."""
        if self.group < 1:
            raise ValueError(f"mesh.group is {self.group}: set it to 1 (no group) or more")


class MeshError(RuntimeError):
    """The process cannot take its place among its peers; the message says what to change."""


@dataclass(frozen=True)
class Mesh:
    """The place of one process in the job.

    Attributes:
        rank: index of this process, 0 <= rank < world.
        world: processes of the job.
        local_rank: index among the processes of this machine.
        local_world: processes on this machine.
        device: where this rank computes: its GPU, or the CPU.
        data: ranks along the data axis.
        group: ranks along the GQA-group axis (adjacent ranks); data * group == world.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    data: int
    group: int

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this rank works on, 0 <= data_rank < data."""
        return self.rank // self.group

    @property
    def group_rank(self) -> int:
        """Which part of a sequence this rank holds, 0 <= group_rank < group."""
        return self.rank % self.group

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes what the whole job needs once."""
        return self.rank == 0


def init_mesh(
    device: str = "auto", *, group: int = 1, timeout: timedelta = timedelta(minutes=30)
) -> Mesh:
    """Join the job that the environment describes, or make one of a single process.

    Collectives run over gloo for CPU tensors and over NCCL for CUDA tensors; on a GPU machine both
    are available. Without any of torchrun's variables the process is a world of its own and needs
    no port.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        group: ranks that share a sequence; divides the world size.
        timeout: how long a collective may wait for its peers.

    Raises:
        MeshError: rendezvous variables missing, more ranks than GPUs, or a group that does not
            divide the world.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise MeshError(f"device {device!r} is none of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise MeshError("device cuda was asked for, but torch sees no CUDA device; use auto or cpu")
    if dist.is_initialized():
        raise MeshError("torch.distributed is initialised already: call init_mesh() once, first")
    place = _place(os.environ)
    rank, world, local_rank, local_world = place or (0, 1, 0, 1)
    if group < 1 or world % group:
        raise MeshError(f"group {group} does not divide the world size {world}")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and local_rank >= torch.cuda.device_count():
        raise MeshError(
            f"rank {rank} (LOCAL_RANK {local_rank}) has no GPU: this machine shows "
            f"{torch.cuda.device_count()}; start one process per GPU (torchrun --nproc-per-node)"
        )
    place_device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(place_device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if place is None:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    return Mesh(rank, world, local_rank, local_world, place_device, world // group, group)


def _place(environment: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    """Return (rank, world, local rank, local world), or None when nothing launched this process."""
    # The others are left behind in many shells and say nothing by themselves.
    if not any(name in environment for name in RENDEZVOUS[:2]):
        return None
    missing = [name for name in RENDEZVOUS if not environment.get(name)]
    if missing:
        raise MeshError(
            f"the environment lacks {', '.join(missing)} although it has "
            f"{', '.join(n for n in RENDEZVOUS if environment.get(n))}: start the ranks with "
            "torchrun (slurm/pretrain.sh does), or unset all of them to run a single process"
        )
    numbers = []
    for name in RENDEZVOUS[:4]:
        if not environment[name].isdigit():
            raise MeshError(f"{name}={environment[name]!r} is not a number; torchrun sets it")
        numbers.append(int(environment[name]))
    rank, world, local_rank, local_world = numbers
    if not (rank < world and local_rank < local_world <= world):
        raise MeshError(
            f"RANK {rank} of WORLD_SIZE {world} with LOCAL_RANK {local_rank} of LOCAL_WORLD_SIZE "
            f"{local_world} cannot be; start the ranks with torchrun"
        )
    return rank, world, local_rank, local_world


def threads_per_rank(local_world: int) -> int:
    """Return how many OpenMP threads each of this machine's ranks should use, at least 1.

    torchrun sets OMP_NUM_THREADS=1 whenever it starts several processes, which slows host-side
    optimizers several times; the cores this process may run on, shared among the ranks, are right.
    """
    return max(1, len(os.sched_getaffinity(0)) // local_world)
