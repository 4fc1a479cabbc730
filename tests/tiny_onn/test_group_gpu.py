"""On two GPUs: sharing sequences gives the losses of not sharing them.

With TINY_ONN_TIMES=1 both are timed on long sequences, too; `tiny-onn bench scaling` does more.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kernels import Documents
from parallel.engine import Engine, EngineConfig, OptimizerConfig, ScheduleConfig
from parallel.group_exchange import GroupExchange
from parallel.mesh import Mesh
from tests.ranks import Ranks
from tiny_onn.attention import AttentionConfig
from tiny_onn.deepembed import DeepEmbedConfig
from tiny_onn.dynmoe import update_controllers
from tiny_onn.dynmoe_config import DynMoeConfig
from tiny_onn.modular import ModelConfig, TinyOnn

V, STEPS, LENGTHS = 8192, 8, (1777, 33, 1, 2000, 285)
LONG, TIMED = 65_536, 2
MODEL = ModelConfig(
    vocab_size=V,
    width=2048,
    layers=2,
    activation_checkpointing="recompute",
    attention=AttentionConfig(heads=16, groups=4, head_dim=128),
    ffn=DynMoeConfig(kind="dense", dense_hidden=4096),
    deepembed=DeepEmbedConfig(kind="off"),
)


class Share:
    """One rank's part of the sequences of a step."""

    def __init__(self, engine: Engine, mesh: Mesh) -> None:
        self.engine, self.mesh = engine, mesh

    def step(self, sequences: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, float]:
        """Train on int64 [B, T + 1]; returns the mean loss and the gradient norm."""
        mesh, engine = self.mesh, self.engine
        T = sequences.shape[1] - 1
        own = slice(T * mesh.group_rank // mesh.group, T * (mesh.group_rank + 1) // mesh.group)
        labels = sequences.shape[0] * T
        scale = torch.tensor(mesh.world / labels, device=engine.device)
        total, result = torch.zeros((), device=engine.device), None
        for i in range(engine.cfg.accumulation):
            row = sequences[i * mesh.data + mesh.data_rank].to(engine.device)
            docs = Documents(lengths, engine.device)
            output = engine.forward(row[:-1][own], row[1:][own], docs, scale, None, None)
            engine.backward(output.loss)
            result = engine.step()
            total += output.nll_sum
        update_controllers(engine.module)
        assert result is not None
        dist.all_reduce(total)
        return total / labels, result.grad_norm


def sequences(step: int, count: int, tokens: int) -> Tensor:
    """Random text in which every third token says what the next one is."""
    g = torch.Generator().manual_seed(step)
    out = torch.randint(0, V, (count, tokens + 1), generator=g)
    out[:, 1::3] = (out[:, 0:-1:3] * 7 + 1)[:, : out[:, 1::3].shape[1]] % V
    return out


def train(mesh: Mesh, group: int) -> dict[str, Any]:
    """Train on packed documents of odd lengths; if asked for, time steps on long documents."""
    mesh = replace(mesh, data=mesh.world // group, group=group)
    torch.manual_seed(0)
    exchange = GroupExchange(mesh, MODEL.attention.groups) if group > 1 else None
    accumulation = 2 // mesh.data
    cfg = EngineConfig(
        precision="bf16", accumulation=accumulation,
        optimizer=OptimizerConfig(lr=3e-4), schedule=ScheduleConfig(warmup=3),
    )  # fmt: skip
    share = Share(Engine(lambda: TinyOnn(MODEL, exchange), cfg, mesh, 1000), mesh)
    out: dict[str, Any] = {"losses": [], "norms": []}
    say(mesh, f"group {group}: built")
    for step in range(STEPS):
        loss, norm = share.step(sequences(step, 2, sum(LENGTHS)), LENGTHS)
        out["losses"].append(float(loss))
        out["norms"].append(norm)
        if step == 0:
            say(mesh, f"group {group}: kernels compiled, first step done")
    say(mesh, f"group {group}: losses {[round(x, 4) for x in out['losses']]}")
    if "TINY_ONN_TIMES" not in os.environ:
        return out
    long = sequences(0, 2, LONG)
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(1 + TIMED):
        start = time.perf_counter()
        loss, _ = share.step(long, (LONG,))
        float(loss)
        seconds.append(time.perf_counter() - start)
    out["tokens_per_s"] = 2 * LONG / sorted(seconds[1:])[TIMED // 2]
    out["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    out["seconds"] = seconds
    say(mesh, f"group {group} at {LONG}: {json.dumps({k: out[k] for k in list(out)[2:]})}")
    return out


def say(mesh: Mesh, text: str) -> None:
    if mesh.rank == 0:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@pytest.mark.gpu
def test_two_gpus_that_share_sequences_train_as_two_that_do_not() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    with Ranks(2, "cuda") as ranks:
        shared = ranks.run(train, 2, timeout=300)[0]
        apart = ranks.run(train, 1, timeout=300)[0]
    for key, limit in (("losses", 2e-3), ("norms", 3e-2)):
        off = max(abs(s - a) / abs(a) for s, a in zip(shared[key], apart[key], strict=True))
        print(f"{key}: off by {off:.2e} at most")
        assert off < limit, (key, shared[key], apart[key])
    if "TINY_ONN_TIMES" not in os.environ:
        return
    ratio = shared["tokens_per_s"] / apart["tokens_per_s"]
    print(f"group 2 / data 2 at {LONG} tokens: {ratio:.3f}", flush=True)
    if "OUT" in os.environ:
        figures = {"group": shared, "data": apart}
        (Path(os.environ["OUT"]) / "group.json").write_text(json.dumps(figures, indent=1))
