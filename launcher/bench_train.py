"""`tiny-onn bench train CONFIG`: tokens/s and memory of a configuration, whole and part by part.

Every variant is a real run of a few steps, in a folder of its own that is removed afterwards: the
same ranks, loader, tables and optimizer as in training. It is ended after its last step, before the
validation and the checkpoint of a run's end. The medians leave the first steps out, in which
kernels are compiled and caches fill.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from launcher.components import active_flops
from launcher.config import RunConfig, flat, load
from launcher.flops import MFU_FORMULA, mfu, peak_flops
from launcher.jsonl import read_rows
from launcher.options import variant, whole
from launcher.ranks import ranks_per_node, visible_gpus

VARIANTS: dict[str, list[str]] = {
    "sparse": [],
    "full attention": ["--model.attention.kind", "full"],
    "dense ffn": ["--model.ffn.kind", "dense"],
    "no surprise": ["--model.ffn.surprise", "off"],
    "no deepembed": ["--model.deepembed.kind", "off"],
    "zero3 deepembed": ["--model.deepembed.partition", "zero3"],
    "all dense": [
        *("--model.attention.kind", "full"),
        *("--model.ffn.kind", "dense"),
        *("--model.deepembed.kind", "off"),
    ],
}
"""What is measured: names, and the overrides that make them from the configuration."""

TRACED = 2
"""Steps that a trace records."""

ENDLESS = 1_000_000
"""Steps that a measured run believes to have before it."""

DESCRIBED = ("model.", "mesh.", "engine.", "data.seq_len", "train.micro_batch", "train.global")
"""Keys of the configuration that go with the figures."""


LONG = ("config", "losses", "grad_norms")
"""Figures for the file only."""


def measure(
    config: Path,
    overrides: Sequence[str],
    steps: int,
    skip: int,
    folder: Path,
    name: str,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Train `steps` steps and return medians over the steps after `skip`.

    With `trace`, the last `TRACED` steps are recorded into that folder and not counted: that slows
    them. Memory is that of the rank with the most.

    Raises:
        RuntimeError: the run failed; the message holds the end of its output.
    """
    words = [sys.executable, "-m", "launcher", "pretrain", str(config), *overrides]
    words += ["--runs", str(folder), "--name", name, "--train.steps", str(ENDLESS)]
    words += ["--engine.schedule.warmup", "1", "--train.evaluate_every", "0"]
    words += ["--train.sample_every", "0", "--checkpoint.every", "0", "--train.stats_every", "1000"]
    if trace is not None:
        words += ["--train.trace_at", str(steps - TRACED + 1), "--train.trace_steps", str(TRACED)]
    # A trace is written behind its last step and before the next one's line.
    rows = _run(words, folder / name, steps + (trace is not None))[:steps]
    if trace is not None:
        for file in (folder / name / "traces").iterdir():
            shutil.copy(file, trace / f"{name}{''.join(file.suffixes)}")
    cfg = config_of(folder / name)
    return summed_up(rows, skip, TRACED * (trace is not None), cfg, device_name())


def summed_up(
    rows: list[dict[str, Any]], skip: int, traced: int, cfg: RunConfig, device: str
) -> dict[str, Any]:
    """Return the figures of a run from the lines of its steps.

    Args:
        rows: of `metrics.jsonl`.
        skip: first steps whose time does not count.
        traced: last ones that do not.
        cfg: the run's configuration.
        device: name of what each rank computed on.
    """
    losses, norms = ([row[key] for row in rows] for key in ("loss", "grad_norm"))
    # A line knows the other ranks' memory of the step before.
    most = max(row.get("extra", {}).get("speed/memory_most_gib", 0.0) for row in rows)
    own = max(row["memory_bytes"] for row in rows) / 2**30
    rows = rows[skip : len(rows) - traced]
    speeds = [row["tokens_per_s"] for row in rows]
    speed = statistics.median(speeds)
    parts = rows[-1]["seconds"]
    ranks, flops = ranks_per_node(cfg.launch), active_flops(cfg)
    return {
        "ranks": ranks,
        "device": device,
        "config": {k: v for k, v in flat(cfg).items() if k.startswith(DESCRIBED)},
        "tokens_per_s": speed,
        "spread": (max(speeds) - min(speeds)) / speed,
        "flops_per_token": flops,
        "peak_flops": peak_flops(device),
        "mfu": mfu(speed, flops, device, ranks),
        "memory_gib": max(most, own),
        "seconds": {
            part: statistics.median(row["seconds"][part] for row in rows) for part in parts
        },
        "loss": losses[-1],
        "losses": losses,
        "grad_norms": norms,
    }


def _run(words: Sequence[str], run: Path, lines: int) -> list[dict[str, Any]]:
    """Run a training until its metrics have so many lines, end it, and return them."""
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        rows: list[dict[str, Any]] = []
        while len(rows) < lines and process.poll() is None:
            time.sleep(0.1)
            if (run / "metrics.jsonl").exists():
                rows = list(read_rows(run / "metrics.jsonl"))
        ranks = psutil.Process(process.pid).children() if process.poll() is None else []
        process.kill()
        process.wait()
        # The ranks follow their launcher; the next run needs their memory.
        deadline = time.monotonic() + 60
        while any(map(_alive, ranks)) and time.monotonic() < deadline:
            time.sleep(0.05)
        if len(rows) < lines:
            output.seek(0)
            raise RuntimeError(f"{run.name}: {output.read()[-3000:]}")
    return rows


def _alive(process: psutil.Process) -> bool:
    """Whether a process still holds memory; one that nobody has reaped does not."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def config_of(run: Path) -> RunConfig:
    """Return the resolved configuration of a run."""
    return load(run / "config.yaml")


def device_name() -> str:
    """Name the first GPU, or "cpu"."""
    if not visible_gpus():
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def main(argv: Sequence[str]) -> int:
    """Measure and print a table; returns 1 when a variant failed."""
    p = argparse.ArgumentParser(
        prog="tiny-onn bench train",
        description="Speed and memory of a configuration, and of it without each sparse part. "
        "Overrides (--dotted.key value) go to every variant.",
        epilog="example: tiny-onn bench train launcher/configs/125m.yaml --variants sparse "
        "'all dense' --json train.json --train.global_batch 8",
    )
    p.add_argument("config", type=Path)
    named = variant(VARIANTS)
    p.add_argument("--variants", nargs="+", type=named, default=[*map(named, VARIANTS)])
    p.add_argument("--steps", type=whole(1), default=20, help="steps of each run")
    p.add_argument("--skip", type=whole(0), default=5, help="first steps that do not count")
    p.add_argument("--json", type=Path, help="file for all figures")
    p.add_argument("--trace", type=Path, help="folder for a trace of each variant's last steps")
    a, overrides = p.parse_known_args(argv)
    require_counted(p, a.steps, a.skip, TRACED * (a.trace is not None))
    if a.trace is not None:
        a.trace.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    failed = False
    table = Table("variant", "tokens/s", "ratio", "spread", "mfu", "peak GiB", "loss")
    with tempfile.TemporaryDirectory() as scratch:
        for label, extra in a.variants:
            words = [*overrides, *extra]
            name = label.replace(" ", "-")
            try:
                found = measure(a.config, words, a.steps, a.skip, Path(scratch), name, a.trace)
            except RuntimeError as e:
                print(f"FAILED {e}", file=sys.stderr, flush=True)
                results[label], failed = {"error": str(e)}, True
                continue
            results[label] = found
            first = next(r["tokens_per_s"] for r in results.values() if "tokens_per_s" in r)
            mfu = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
            table.add_row(
                label,
                f"{found['tokens_per_s']:,.0f}",
                f"{found['tokens_per_s'] / first:.2f}",
                f"{found['spread']:.0%}",
                mfu,
                f"{found['memory_gib']:.2f}",
                f"{found['loss']:.3f}",
            )
            shown = {k: v for k, v in found.items() if k not in LONG}
            print(f"{label}: {json.dumps(shown)}", flush=True)
            if a.json is not None:
                a.json.write_text(json.dumps(results, indent=1))
    Console(width=100).print(table)
    print_formula(results)
    return int(failed)


def require_counted(p: argparse.ArgumentParser, steps: int, skip: int, traced: int = 0) -> None:
    """End with a usage error where no step would count."""
    if steps <= skip + traced:
        behind = f" and the {traced} of the trace" if traced else ""
        p.error(
            f"argument --skip: {skip} of --steps {steps} are left out{behind}, and none is left to "
            f"measure; set --steps to {skip + traced + 1} or more"
        )


def print_formula(results: Mapping[str, dict[str, Any]]) -> None:
    """Say how MFU is counted, and with which numbers."""
    print(MFU_FORMULA)
    for name, found in results.items():
        if "flops_per_token" in found:
            peak = found["peak_flops"]
            of = "no peak known" if peak is None else f"peak {peak / 1e12:,.0f} TFLOP/s"
            print(f"  {name}: {found['flops_per_token'] / 1e6:,.1f} MFLOP, {found['device']}: {of}")
