"""Row tables on a GPU: every tier trains as on the CPU, and repeats bit for bit."""

from dataclasses import replace

import pytest
import torch

from parallel.mesh import Mesh
from parallel.table_check import Run, train_one
from parallel.table_layout import TableConfig
from tests.parallel.table_runs import SINGLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MESH = Mesh(0, 1, 0, 1, torch.device("cuda", 0), 1, 1)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("tier", ["host", "nvme", "device"])
def test_tiers_train_as_on_the_cpu_and_repeat_bitwise(tmp_path, tier, accumulation):
    cfg = TableConfig(tier=tier, nvme_path=str(tmp_path), cache_rows=30, direct=False)
    run = Run(cfg, groups=3, width=96, prefetch="within", accumulation=accumulation, steps=30)
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


def test_bf16_rows_come_from_fp32_ones():
    run = Run(dtype=torch.bfloat16, groups=3, width=96, prefetch="within")
    low, high = train_one(MESH, run), train_one(MESH, replace(run, dtype=torch.float32))
    torch.testing.assert_close(
        torch.tensor(low.losses), torch.tensor(high.losses), rtol=2e-2, atol=2e-2
    )
