"""Host memory of row tables: on huge pages, and close to the GPU that uses it.

On a machine of several sockets memory belongs to one of them, and so does a GPU. The kernel puts a
page on the node of the thread that touches it first: so arenas are touched, and rows worked on, by
threads that run on the cores of the GPU's node. Threads that these start inherit that, OpenMP's and
those of a pool too.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

SYS = Path("/sys")


def host_memory(nbytes: int) -> mmap.mmap:
    """Return zeroed pages of this process alone, huge ones where the machine has them.

    Slices of rows are read all over an arena: with small pages every one would miss the TLB. Shared
    memory, which Python maps unless told otherwise, has none on a machine as it is installed.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A child would share the pages until written to, and training would copy them one by one.
    memory.madvise(mmap.MADV_DONTFORK)
    if (SYS / "kernel/mm/transparent_hugepage").is_dir():
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def cores_near(device: torch.device) -> frozenset[int]:
    """Return the cores of `device`'s node that this thread may run on; empty for no preference.

    There is none on a machine of one node, for a CPU, where the machine does not say where a GPU
    is, and where the process may use hardly any core of the node (less than half of an even share):
    threads would then wait for each other.
    """
    pci = pci_address(device)
    nodes = len(list((SYS / "devices/system/node").glob("node[0-9]*")))
    if pci is None or nodes < 2:
        return frozenset()
    said = SYS / "bus/pci/devices" / pci / "numa_node"
    node = int(said.read_text()) if said.is_file() else -1
    cores = SYS / f"devices/system/node/node{node}/cpulist"
    if node < 0 or not cores.is_file():
        return frozenset()
    own = os.sched_getaffinity(0)
    near = frozenset(_cpulist(cores.read_text()) & own)
    return near if 2 * nodes * len(near) >= len(own) else frozenset()


def on_cores(cores: frozenset[int], work: Callable[[], Result]) -> Result:
    """Return what `work` does on a thread that is bound to these cores; here where none is said."""
    if not cores:
        return work()
    with ThreadPoolExecutor(1, initializer=partial(bind, cores)) as pool:
        return pool.submit(work).result()


def bind(cores: frozenset[int]) -> None:
    """Keep the calling thread, and those that it starts from now on, on these cores."""
    if cores:
        os.sched_setaffinity(0, cores)


def pci_address(device: torch.device) -> str | None:
    """Return a GPU's name below /sys/bus/pci/devices, None for a CPU."""
    if device.type != "cuda":
        return None
    found: Any = torch.cuda.get_device_properties(device)
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def _cpulist(text: str) -> set[int]:
    """Return the cores of a list such as "0-3,8"."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cores |= set(range(int(first), int(last or first) + 1))
    return cores
