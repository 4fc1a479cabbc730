"""`tiny-onn bench step CONFIG`: a training step alone, under several settings, in one process.

What `bench train` measures by whole runs, for the model, engine and tables only: random tokens, no
loader, records or checkpoints. Starting takes seconds instead of most of a minute, so that settings
can be compared beside each other on the same GPU, and their losses with them. One sequence is one
document; ids occur as often as words do (`word_law`).

Times are of the host: `forward`, `backward` and `optimizer` say where it waited, `ms` is the median
of whole steps, each of which ends with its gradient norm on the host; the peak of memory is that of
the rank with the most. With `--trace` one more step
is recorded: kernels' own time, launches and the 25 longest entries of host and device.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import Documents
from kernels.transfer import to_device
from launcher.bench_ranks import run_in_ranks
from launcher.bench_train import VARIANTS
from launcher.components import accumulation, active_flops
from launcher.config import RunConfig, load
from launcher.flops import MFU_FORMULA, mfu
from launcher.options import variant, whole
from launcher.word_law import frequencies
from parallel.engine import Engine
from parallel.group_exchange import GroupExchange
from parallel.mesh import Mesh, init_mesh
from parallel.tables import RowTable
from tiny_onn.dynmoe import update_controllers
from tiny_onn.modular import TinyOnn

SETTINGS: dict[str, list[str]] = {
    "gathered": ["--engine.zero.resident_gib", "0"],
    "resident": ["--engine.zero.resident_gib", "1000"],
    "compiled": ["--engine.zero.resident_gib", "1000", "--model.compile_blocks", "true"],
    "gathered, compiled": ["--engine.zero.resident_gib", "0", "--model.compile_blocks", "true"],
}
"""What is compared for each variant of the model: names and overrides."""

VOCABULARY = 32_768
"""Ids where the configuration takes their number from a corpus."""


class Subject:
    """One rank of a model that is trained on random tokens."""

    def __init__(self, cfg: RunConfig, mesh: Mesh) -> None:
        """Build engine and table as a run does."""
        group = cfg.mesh.group
        mesh = dataclasses.replace(mesh, data=mesh.world // group, group=group)
        self.cfg, self.mesh = cfg, mesh
        model = cfg.model
        torch.manual_seed(cfg.seed)
        self.table = None
        if model.row_parts:
            self.table = RowTable(
                "deepembed",
                model.vocab_size,
                model.row_width,
                mesh,
                model.deepembed,
                dtype=cfg.engine.dtype(mesh.device),
                groups=model.row_parts,
            )
        exchange = GroupExchange(mesh, model.attention.groups) if group > 1 else None
        self.micro_batches = accumulation(cfg, mesh.world, mesh.local_world)
        self.engine = Engine(
            lambda: TinyOnn(model, exchange, cfg.data.seq_len),
            dataclasses.replace(cfg.engine, accumulation=self.micro_batches),
            mesh,
            total_steps=1_000_000,
            tables=[] if self.table is None else [self.table],
        )
        self.count = 0
        self.cumulative_V = torch.from_numpy(frequencies(model.vocab_size).cumsum())
        self.passes: list[Tensor] = []

    def _draw(self) -> Tensor:
        """Ids of this rank's sequences in the next pass, int64 [micro_batch * seq_len]."""
        self.count += 1
        generator = torch.Generator().manual_seed(1000 * self.mesh.data_rank + self.count)
        tokens = self.cfg.train.micro_batch * self.cfg.data.seq_len
        share_T = torch.rand(tokens, generator=generator, dtype=torch.float64)
        return torch.searchsorted(self.cumulative_V, share_T).clamp_(max=len(self.cumulative_V) - 1)

    def step(self) -> tuple[float, float, dict[str, float]]:
        """Train one step; returns its loss, its seconds and the host's by part."""
        cfg, engine, mesh = self.cfg, self.engine, self.mesh
        # Off the clock; the table is told of the next step's first pass, too.
        while len(self.passes) <= self.micro_batches:
            self.passes.append(self._draw())
        started = time.perf_counter()
        labels = cfg.train.global_batch * cfg.data.seq_len
        scale = torch.full((), mesh.world / labels, device=engine.device)
        total = torch.zeros((), device=engine.device)
        parts = dict.fromkeys(("tables", "forward", "backward", "optimizer"), 0.0)
        at = time.perf_counter()

        def clock(part: str) -> None:
            nonlocal at
            now = time.perf_counter()
            parts[part] += now - at
            at = now

        for _ in range(self.micro_batches):
            ids = self.passes.pop(0)
            T = ids.shape[0]
            own = slice(T * mesh.group_rank // mesh.group, T * (mesh.group_rank + 1) // mesh.group)
            mine, wanted = ids[own], ids.roll(-1)[own]
            rows = None
            if self.table is not None:
                rows = self.table.fetch(mine)
                self.table.prefetch(self.passes[0][own])
            clock("tables")
            output = engine.forward(
                to_device(mine, engine.device),
                to_device(wanted, engine.device),
                Documents([cfg.data.seq_len] * cfg.train.micro_batch, engine.device),
                scale,
                None if rows is None else rows.parts,
                None if rows is None else rows.lookup,
            )
            clock("forward")
            engine.backward(output.loss)
            clock("backward")
            if self.table is not None and rows is not None:
                self.table.accumulate(rows)
            clock("tables")
            total += output.nll_sum
            engine.step()
            clock("optimizer")
        update_controllers(engine.module, engine.rewrite)
        dist.all_reduce(total)
        loss = float(total) / labels
        return loss, time.perf_counter() - started, parts

    def close(self) -> None:
        """Free what the device holds."""
        if self.table is not None:
            self.table.close()
        # DeepSpeed keeps a list of every module that it was given.
        offload = importlib.import_module("deepspeed.runtime.zero.parameter_offload")
        offload.FWD_MODULE_STACK.clear()
        self.engine._zero.destroy()
        del self.engine
        gc.collect()
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()


def measure(cfg: RunConfig, mesh: Mesh, a: argparse.Namespace, name: str) -> dict[str, Any]:
    """Build a subject, train `a.steps` steps behind `a.skip`, and return what was found."""
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    subject = Subject(cfg, mesh)
    built = time.perf_counter() - begun
    begun = time.perf_counter()
    losses = [subject.step()[0] for _ in range(a.skip)]
    first = time.perf_counter() - begun
    seconds, parts = [], []
    for _ in range(a.steps):
        loss, whole, part = subject.step()
        losses.append(loss)
        seconds.append(whole)
        parts.append(part)
    median = statistics.median(seconds)
    speed = cfg.train.global_batch * cfg.data.seq_len / median
    found: dict[str, Any] = {
        "ranks": mesh.world,
        "device": device_name(mesh),
        "ms": 1e3 * median,
        "spread": (max(seconds) - min(seconds)) / median,
        "tokens_per_s": speed,
        "mfu": mfu(speed, active_flops(cfg), mesh.device, mesh.world),
        "parts_ms": {k: 1e3 * statistics.median(p[k] for p in parts) for k in parts[0]},
        "built_s": built,
        "first_s": first,
        "losses": losses,
    }
    if mesh.device.type == "cuda":
        peak = torch.tensor(torch.cuda.max_memory_allocated())
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
        found["peak_gib"] = int(peak) / 2**30
    if a.trace is not None:
        found |= trace(subject, a.trace / f"{name.replace(' ', '-').replace(',', '')}.json.gz")
    subject.close()
    return found


def trace(subject: Subject, path: Path) -> dict[str, Any]:
    """Record one step on all ranks; rank 0 writes it and the longest entries beside it."""
    subject.step()
    with torch.profiler.profile() as profile:
        subject.step()
    if not subject.mesh.is_first:
        return {}
    path.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(path))
    averages = profile.key_averages()
    tables = [
        averages.table(sort_by=key, row_limit=25, max_name_column_width=70)
        for key in ("self_cpu_time_total", "self_device_time_total")
    ]
    path.with_suffix("").with_suffix(".txt").write_text("\n".join(tables))
    return {
        "kernels_ms": sum(e.self_device_time_total for e in averages) / 1e3,
        "launches": sum(e.count for e in averages if "LaunchKernel" in e.key),
    }


def device_name(mesh: Mesh) -> str:
    """Name this rank's device."""
    return torch.cuda.get_device_name(mesh.device) if mesh.device.type == "cuda" else "cpu"


def line(name: str, found: dict[str, Any]) -> str:
    """One line of the report."""
    if "error" in found:
        return f"{name:<36} failed: {found['error'][:300]}"
    parts = " ".join(f"{k[:3]} {v:.0f}" for k, v in found["parts_ms"].items())
    share = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
    text = (
        f"{name:<36} x{found['ranks']} {found['tokens_per_s']:>9,.0f} tok/s {found['ms']:8.1f} ms "
        f"±{found['spread']:.0%} mfu {share} peak {found.get('peak_gib', 0.0):.1f} [{parts}] "
        f"loss {found['losses'][-1]:.4f} first {found['first_s']:.0f} s"
    )
    if "launches" in found:
        text += f" kernels {found['kernels_ms']:.0f} ms, {found['launches']} launches"
    return text


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; returns the overrides apart."""
    p = argparse.ArgumentParser(
        prog="tiny-onn bench step",
        description="Time of a training step on random tokens under several settings. Overrides "
        "(--dotted.key value) go to every one.",
        epilog="example: tiny-onn bench step launcher/configs/125m.yaml --gpus 2 --variants "
        "sparse 'all dense' --settings gathered resident",
    )
    p.add_argument("config", type=Path)
    named = variant(VARIANTS)
    default = [named("sparse"), named("all dense")]
    p.add_argument("--variants", nargs="+", type=named, default=default)
    p.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS)[:3])
    p.add_argument("--gpus", type=whole(1), default=1, help="ranks (on the CPU, too)")
    p.add_argument("--steps", type=whole(1), default=8, help="steps that count")
    p.add_argument("--skip", type=whole(0), default=4, help="first steps that do not count")
    p.add_argument("--trace", type=Path, help="folder for a trace of a step of each")
    p.add_argument("--json", type=Path, help="file for all figures")
    return p.parse_known_args(argv)


def main(argv: Sequence[str]) -> int:
    """Measure; returns 1 when something failed."""
    a, overrides = arguments(argv)
    if a.gpus > 1 and "RANK" not in os.environ:
        return run_in_ranks(a.gpus, "launcher", ["bench", "step", *argv]).returncode
    mesh = init_mesh()
    results: dict[str, dict[str, Any]] = {}
    for label, extra in a.variants:
        for setting in a.settings:
            name = f"{label}, {setting}"
            cfg = load(a.config, [*overrides, *extra, *SETTINGS[setting]])
            if not cfg.model.vocab_size:
                cfg.model.vocab_size = VOCABULARY
            try:
                results[name] = measure(cfg, mesh, a, name)
            except (RuntimeError, ValueError) as e:
                if mesh.world > 1:
                    # The other ranks are elsewhere now.
                    raise
                results[name] = {"error": f"{type(e).__name__}: {e}"}
                gc.collect()
            if mesh.is_first:
                print(line(name, results[name]), flush=True)
                if a.json is not None:
                    a.json.write_text(json.dumps(results, indent=1))
    if mesh.is_first:
        print(MFU_FORMULA)
    return int(any("error" in found for found in results.values()))
