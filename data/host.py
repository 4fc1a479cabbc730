"""Which ranks share this host's memory, and agreement between ranks before anything is opened."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from data.index import DataError

T = TypeVar("T")


def environment_rank() -> tuple[int, int]:
    """Return (rank, world size) from torchrun's environment, (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def gather(value: T) -> list[T]:
    """Return every rank's value, by rank; a collective call."""
    _, world = environment_rank()
    if world == 1:
        return [value]
    values: list[T] = [value] * world
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """Do something on every rank; either all get their result, or all fail. A collective call.

    Without this a rank that fails alone would leave the others waiting in the next collective call.

    Raises:
        DataError: another rank failed; the message is that of the first one.
        Exception: what `work` raised on this rank.
    """
    error: Exception | None = None
    try:
        result = work()
    except Exception as e:
        error = e
    messages = gather(None if error is None else str(error) or repr(error))
    if error is not None:
        raise error
    for rank, message in enumerate(messages):
        if message is not None:
            raise DataError(f"rank {rank}: {message}")
    return result


def ranks_on_host() -> int:
    """Return how many ranks share this rank's memory; a collective call.

    torchrun's LOCAL_WORLD_SIZE counts the ranks of one agent; two agents on one machine (a test
    cluster, a node cut into parts) still share /dev/shm, where streaming keeps its state.

    Raises:
        DataError: ranks on one host are not numbered in a row, or hosts have different numbers.
    """
    hosts = gather(_memory_identity())
    size = hosts.count(hosts[0])
    blocks = [set(hosts[i : i + size]) for i in range(0, len(hosts), size)]
    if any(len(b) > 1 for b in blocks) or len(set(hosts)) != len(blocks):
        raise DataError(
            f"ranks must be numbered in a row on each host, the same number on all; found them on "
            f"hosts {[sorted(set(hosts)).index(h) for h in hosts]}: start every node with the "
            f"same --nproc-per-node"
        )
    return size


@contextmanager
def local_world(ranks: int) -> Iterator[None]:
    """Make torchrun's environment say that `ranks` ranks are on this host, for the block."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_WORLD_SIZE"]
        else:
            os.environ["LOCAL_WORLD_SIZE"] = before


def _memory_identity() -> tuple[str, int]:
    """The same for two processes exactly when they see the same /dev/shm."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    kernel = boot.read_text() if boot.exists() else socket.gethostname()
    return kernel, os.stat("/dev/shm").st_dev
