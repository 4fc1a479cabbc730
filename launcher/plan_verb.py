"""`tiny-onn plan CONFIG --nodes N … --gpus-per-node M`: will it fit, what moves, how long it takes.

Nothing is started: the figures follow from the configuration and the machines by the formulas in
`plan_memory` and `plan_time`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.stored import is_remote
from launcher import config
from launcher.config import RunConfig
from launcher.flops import flops_per_token
from launcher.options import above_zero, whole
from launcher.plan_job import GIB, Job, Machine
from launcher.plan_memory import disk_bytes, gpu_memory, host_memory
from launcher.plan_search import (
    Point,
    correction_for,
    measured_points,
    problems,
    remedies,
    with_batch,
)
from launcher.plan_time import communication, step_seconds

ASSUMED_VOCABULARY = 32_768


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; returns the overrides apart."""
    machine = Machine()
    p = argparse.ArgumentParser(
        prog="tiny-onn plan",
        description="Memory per GPU and node, traffic per link and the time of a step, without "
        "running anything. Overrides (--dotted.key value) change the configuration.",
        epilog="example: tiny-onn plan launcher/configs/7b.yaml --nodes 8 64 512 "
        "--gpus-per-node 8 --measured train.json",
    )
    p.add_argument("config", type=Path)
    p.add_argument(
        "--nodes", type=whole(1), nargs="+", default=[1], help="one plan for each number"
    )
    p.add_argument("--gpus-per-node", type=whole(1), default=8)
    p.add_argument("--gpu-memory", type=above_zero, default=machine.gpu_gib, help="GiB of a GPU")
    p.add_argument("--host-memory", type=above_zero, default=machine.host_gib, help="GiB of a node")
    p.add_argument(
        "--peak", type=above_zero, default=machine.peak_flops, help="bf16 FLOP/s of a GPU"
    )
    p.add_argument(
        "--nvlink", type=above_zero, default=machine.nvlink / 1e9, help="GB/s into a GPU"
    )
    p.add_argument(
        "--network", type=above_zero, default=machine.network / 1e9, help="GB/s into a GPU"
    )
    p.add_argument("--measured", type=Path, help="JSON of bench train or bench scaling")
    p.add_argument("--json", type=Path, help="file for all figures")
    return p.parse_known_args(argv)


def resolve_vocabulary(cfg: RunConfig) -> str:
    """Set model.vocab_size where it is left to the corpus; say where the number is from."""
    if cfg.model.vocab_size:
        return "model.vocab_size"
    index = Path(cfg.data.path) / "index.json"
    if not is_remote(cfg.data.path) and index.exists():
        cfg.model.vocab_size = int(json.loads(index.read_text())["vocab_size"])
        return str(index)
    if cfg.data.build is not None:
        cfg.model.vocab_size = cfg.data.build.vocab_size
        return "data.build.vocab_size"
    cfg.model.vocab_size = ASSUMED_VOCABULARY
    return f"assumed, as {cfg.data.path} holds no corpus; set --model.vocab_size"


def plan(job: Job, points: list[Point]) -> dict[str, Any]:
    """Return all figures of a job as plain values.

    Raises:
        ValueError: ranks, groups and batch do not fit together.
    """
    job.micro_batches  # noqa: B018  (refuses what cannot be)
    point = correction_for(job, points)
    correction = point.correction if point is not None else 1.0
    seconds = step_seconds(job, correction)
    tokens = job.cfg.train.global_batch * job.cfg.data.seq_len
    speed = tokens / sum(seconds.values())
    found = problems(job)
    flops = sum(flops_per_token(job.shape).values())
    return {
        "nodes": job.nodes,
        "gpus": job.world,
        "data": job.world // job.group,
        "group": job.group,
        "global_batch": job.cfg.train.global_batch,
        "accumulation": job.micro_batches,
        "parameters": job.parameters,
        "table_parameters": job.counts.table,
        "active_parameters": sum(job.counts.active.values()),
        "gpu_bytes": gpu_memory(job),
        "host_bytes": host_memory(job),
        "disk_bytes": disk_bytes(job),
        "communication": {k: dataclasses.asdict(v) for k, v in communication(job).items()},
        "seconds": seconds,
        "correction": correction,
        "corrected_by": None if point is None else point.name,
        "step_seconds": sum(seconds.values()),
        "tokens_per_s": speed,
        "mfu": speed * flops / job.world / job.machine.peak_flops,
        "problems": found,
        "remedies": [
            {"changes": dict(changes), "relative_cost": cost} for changes, cost in remedies(job)
        ]
        if found
        else [],
    }


def _rows(table: Table, title: str, plans: list[dict[str, Any]], key: str, unit: float) -> None:
    names = list(dict.fromkeys(name for p in plans for name in p[key]))
    for name in names:
        values = [p[key].get(name, 0.0) for p in plans]
        if any(values):
            table.add_row(name, *(f"{v / unit:,.2f}" for v in values))
    totals = (sum(p[key].values()) / unit for p in plans)
    table.add_row(f"[b]{title}[/b]", *(f"[b]{v:,.2f}[/b]" for v in totals), end_section=True)


def show(plans: list[dict[str, Any]], console: Console) -> None:
    """Print the plans side by side."""
    table = Table("", *(f"{p['nodes']} x {p['gpus'] // p['nodes']} GPUs" for p in plans))
    for name in ("data", "group", "global_batch", "accumulation"):
        table.add_row(name, *(f"{p[name]:,}" for p in plans), end_section=name == "accumulation")
    _rows(table, "GPU, GiB", plans, "gpu_bytes", GIB)
    _rows(table, "node's memory, GiB", plans, "host_bytes", GIB)
    if any(sum(p["disk_bytes"].values()) for p in plans):
        _rows(table, "node's disk, GiB", plans, "disk_bytes", GIB)
    for link in ("nvlink", "network"):
        flows = [{k: v[link] for k, v in p["communication"].items()} for p in plans]
        _rows(table, f"into a GPU by {link}, GB a step", [{"f": f} for f in flows], "f", 1e9)
    _rows(table, "step, s", plans, "seconds", 1.0)
    table.add_row("tokens/s", *(f"{p['tokens_per_s']:,.0f}" for p in plans))
    table.add_row("MFU", *(f"{p['mfu']:.1%}" for p in plans))
    table.add_row("fits", *("no" if p["problems"] else "yes" for p in plans))
    console.print(table)
    for p in plans:
        for problem in p["problems"]:
            console.print(f"{p['gpus']} GPUs do not fit. {problem}", highlight=False)
        for remedy in p["remedies"]:
            words = " ".join(f"--{k} {v}" for k, v in remedy["changes"].items())
            cost = f"{remedy['relative_cost']:.2f}x GPU time per token"
            console.print(f"  would fit: {words}  ({cost})", highlight=False)
        if p["problems"] and not p["remedies"]:
            console.print("  no three changes known here make it fit", highlight=False)


def show_points(points: list[Point], console: Console) -> None:
    """Print measured runs beside their prediction."""
    table = Table("measured", "GPUs", "GiB", "plan", "off", "step s", "plan", "off")
    for p in points:
        table.add_row(
            p.name, str(p.job.world),
            f"{p.gib:.1f}", f"{p.predicted_gib:.1f}", f"{p.predicted_gib / p.gib - 1:+.0%}",
            f"{p.seconds:.2f}", f"{p.predicted_seconds:.2f}",
            f"{p.predicted_seconds / p.seconds - 1:+.0%}",
        )  # fmt: skip
    console.print(table)


def main(argv: Sequence[str]) -> int:
    """Plan and print; returns 1 when a plan does not fit."""
    a, overrides = arguments(argv)
    cfg = config.load(a.config, overrides)
    config.validate(cfg)
    vocabulary = resolve_vocabulary(cfg)
    machine = Machine(
        gpu_gib=a.gpu_memory, host_gib=a.host_memory, peak_flops=a.peak,
        nvlink=a.nvlink * 1e9, network=a.network * 1e9,
    )  # fmt: skip
    points = [] if a.measured is None else measured_points(
        json.loads(a.measured.read_text()), machine
    )  # fmt: skip
    plans = []
    for nodes in a.nodes:
        fitted = with_batch(cfg, nodes * a.gpus_per_node)
        plans.append(plan(Job(fitted, nodes, a.gpus_per_node, machine), points))
    console = Console(width=max(100, 36 + 16 * len(plans)))
    names = ("parameters", "active_parameters", "table_parameters")
    total, active, table = (plans[0][name] / 1e9 for name in names)
    console.print(
        f"{cfg.name}: {total:.2f} B parameters, {active:.2f} B active, {table:.2f} B in the table; "
        f"{cfg.data.seq_len:,} tokens a sequence; vocabulary {cfg.model.vocab_size:,} "
        f"({vocabulary})",
        highlight=False,
    )
    show(plans, console)
    assumed = dataclasses.asdict(machine)
    shares = assumed.pop("efficiency")
    for what, values in (("assumed", assumed), ("share of the peak", shares)):
        text = ", ".join(f"{k} {v:g}" for k, v in values.items())
        console.print(f"{what}: {text}", highlight=False)
    if points:
        show_points(points, console)
        used = plans[0]["corrected_by"]
        console.print(
            f"compute times {plans[0]['correction']:.2f}, as '{used}' was measured"
            if used is not None
            else "no measured run has the configuration's kinds: times are uncorrected"
        )
    if a.json is not None:
        shown = [dataclasses.asdict(p) | {"job": None} for p in points]
        assumed["efficiency"] = shares
        figures = {"assumed": assumed, "plans": plans, "measured": shown}
        a.json.write_text(json.dumps(figures, indent=1))
    return int(any(p["problems"] for p in plans))
