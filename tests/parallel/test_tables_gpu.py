"""Row tables on a GPU: every tier trains as on the CPU, and repeats bit for bit."""

import os
import re
from dataclasses import replace

import pytest
import torch

from parallel.mesh import Mesh
from parallel.table_check import Run, train_one
from parallel.table_layout import TableConfig
from parallel.table_memory import cores_near, pci_address
from parallel.table_tiers import TierThread
from tests.parallel.table_runs import SINGLE, run_all, train_all, whole
from tests.ranks import Ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MESH = Mesh(0, 1, 0, 1, torch.device("cuda", 0), 1, 1)


@pytest.mark.parametrize("sink", [False, True], ids=["leaves", "handed over"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("tier", ["host", "nvme", "device"])
def test_tiers_train_as_on_the_cpu_and_repeat_bitwise(tmp_path, tier, accumulation, sink):
    cfg = TableConfig(tier=tier, nvme_path=str(tmp_path), cache_rows=30, direct=False)
    run = Run(
        cfg,
        # More parts than travel together, and not a multiple of them.
        groups=6,
        width=96,
        prefetch="within",
        accumulation=accumulation,
        steps=30,
        sink=sink,
    )
    first, again = train_one(MESH, run), train_one(MESH, run)
    assert first.losses == again.losses
    assert all(torch.equal(first.state[n], again.state[n]) for n in first.state)
    plain = train_one(MESH, replace(run, prefetch="off"))
    assert first.losses == plain.losses
    cpu = train_one(SINGLE, replace(run, cfg=TableConfig()))
    torch.testing.assert_close(
        torch.tensor(first.losses), torch.tensor(cpu.losses), rtol=1e-4, atol=1e-5
    )
    for name in cpu.state:
        torch.testing.assert_close(first.state[name].cpu(), cpu.state[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sink", [False, True], ids=["leaves", "handed over"])
def test_bf16_rows_come_from_fp32_ones(sink):
    run = Run(dtype=torch.bfloat16, groups=3, width=96, prefetch="within", sink=sink)
    low, high = train_one(MESH, run), train_one(MESH, replace(run, dtype=torch.float32))
    torch.testing.assert_close(
        torch.tensor(low.losses), torch.tensor(high.losses), rtol=2e-2, atol=2e-2
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_train_as_two_ranks_on_the_cpu_and_repeat_bitwise(tmp_path):
    disk = TableConfig(tier="nvme", nvme_path=str(tmp_path), cache_rows=30, direct=False)
    base = Run(groups=6, width=96, prefetch="within", accumulation=2, steps=20)
    runs = [
        replace(base, cfg=cfg, sink=sink)
        for cfg in (TableConfig(), TableConfig(tier="device"), disk)
        for sink in (False, True)
    ]
    runs.append(replace(base, prefetch="before_step", accumulation=1, sink=True))
    with Ranks(2, "cuda") as ranks:
        first, again = (ranks.run(train_all, runs, timeout=300) for _ in range(2))
    on_cpu = [replace(run, cfg=TableConfig()) for run in runs]
    for i, expected in enumerate(run_all(on_cpu, 2)):
        found = [results[i] for results in first]
        for a, b, c in zip(found, (results[i] for results in again), expected, strict=True):
            assert a.losses == b.losses
            assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)
            torch.testing.assert_close(
                torch.tensor(a.losses), torch.tensor(c.losses), rtol=1e-4, atol=1e-5
            )
        state, cpu = (
            whole([{k: v.cpu() for k, v in result.state.items()} for result in results])
            for results in (found, expected)
        )
        for name in cpu:
            torch.testing.assert_close(state[name], cpu[name], rtol=1e-3, atol=1e-5)


def test_a_tables_thread_runs_where_the_machine_says_that_the_gpu_is():
    device = torch.device("cuda", 0)
    address = pci_address(device)
    assert re.fullmatch(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.0", address or "")
    thread = TierThread("t", torch.device("cpu"), device)
    cores = thread.submit(lambda: os.sched_getaffinity(0)).result()
    assert cores == (cores_near(device) or os.sched_getaffinity(0))
    thread.close()
