"""A table's host memory lies on huge pages, is nobody else's, and is near the GPU that uses it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from parallel import table_memory
from parallel.table_layout import TableConfig
from parallel.table_memory import cores_near, on_cores
from parallel.tables import RowTable
from tests.parallel.table_runs import SINGLE

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
PCI = "0000:4f:00.0"
FREE = sorted(os.sched_getaffinity(0))
NEAR = set(FREE[: max(1, len(FREE) // 2)])
LIST = ",".join(map(str, NEAR))


def mapping_of(address: int) -> dict[str, str]:
    """What the kernel says of the mapping that holds an address."""
    found: dict[str, str] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            if found:
                break
            first, last = (int(end, 16) for end in name.split("-"))
            if first <= address < last:
                found["access"] = rest.split()[0]
        elif found:
            found[name[:-1]] = rest.strip()
    return found


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_rows_lie_on_huge_pages_that_no_other_process_shares(tier: str, tmp_path: Path) -> None:
    cfg = TableConfig(tier=tier, nvme_path=str(tmp_path), cache_rows=3000, direct=False)  # type: ignore[arg-type]
    table = RowTable("t", 4000, 512, SINGLE, cfg)
    weight = table._tier.fields["weight"]
    assert weight.shape[0] * table.layout.columns * 4 > 4 * 2**21
    found = mapping_of(weight[weight.shape[0] // 2].data_ptr())
    assert found["access"] == "rw-p"
    # "dc": children of this process do not get it.
    assert "dc" in found["VmFlags"].split()
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if huge.is_file() and "[never]" not in huge.read_text():
        assert found["THPeligible"] == "1"
    table.close()


def machine(root: Path, nodes: list[str], gpu_node: str | None) -> Path:
    """Describe a machine as /sys does: its nodes' cores, and the node of its GPU."""
    for node, cores in enumerate(nodes):
        folder = root / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(cores + "\n")
    (root / "devices/system/node/online").write_text(f"0-{len(nodes) - 1}\n")
    if gpu_node is not None:
        folder = root / "bus/pci/devices" / PCI
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(gpu_node + "\n")
    return root


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty /sys, on a machine whose GPU 0 has an address."""
    monkeypatch.setattr(table_memory, "SYS", tmp_path)
    monkeypatch.setattr(table_memory, "pci_address", lambda d: PCI if d == GPU else None)
    return tmp_path


def test_cores_are_those_of_the_gpus_node(elsewhere: Path) -> None:
    machine(elsewhere, ["100000-100007", f"{LIST},100008-100009,100012"], "1")
    assert cores_near(GPU) == NEAR
    assert cores_near(CPU) == frozenset()


@pytest.mark.parametrize(
    ("nodes", "gpu_node"),
    [
        ([LIST], "0"),
        ([LIST, "100000"], "-1"),
        ([LIST, "100000"], None),
        # Memory without cores, and cores that are another job's.
        ([LIST, ""], "1"),
        ([LIST, "100000-100003"], "1"),
    ],
    ids=["one node", "not said", "no such device", "no cores", "others' cores"],
)
def test_nothing_is_bound_where_nothing_says_where(
    elsewhere: Path, nodes: list[str], gpu_node: str | None
) -> None:
    machine(elsewhere, nodes, gpu_node)
    assert cores_near(GPU) == frozenset()
    assert on_cores(frozenset(), lambda: os.sched_getaffinity(0)) == set(FREE)


def test_one_core_of_many_is_no_place_for_many_threads(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(elsewhere, ["0-15", "16-31"], "1")
    for allowed, near in ((range(16, 24), 8), (range(10, 20), 4), (range(17), 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=allowed: set(cores))
        assert len(cores_near(GPU)) == near


@pytest.mark.parametrize("tier", ["host", "nvme"])
def test_a_tables_thread_and_memory_are_near_the_gpu_and_the_caller_stays_free(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, tier: str
) -> None:
    machine(elsewhere / "sys", [LIST, "100000"], "0")
    monkeypatch.setattr(table_memory, "SYS", elsewhere / "sys")
    monkeypatch.setattr(table_memory, "pci_address", lambda _: PCI)
    touched_on = []
    zero = torch.Tensor.zero_

    def touch(tensor: torch.Tensor) -> torch.Tensor:
        touched_on.append(os.sched_getaffinity(0))
        return zero(tensor)

    monkeypatch.setattr(torch.Tensor, "zero_", touch)
    cfg = TableConfig(tier=tier, nvme_path=str(elsewhere), direct=False)  # type: ignore[arg-type]
    table = RowTable("t", 97, 12, SINGLE, cfg)
    assert touched_on == [NEAR]
    assert table._thread.submit(lambda: os.sched_getaffinity(0)).result() == NEAR
    assert os.sched_getaffinity(0) == set(FREE)
    table.close()


def test_a_failure_near_the_gpu_is_the_callers() -> None:
    with pytest.raises(MemoryError):
        on_cores(frozenset(NEAR), lambda: bytearray(1 << 62))
