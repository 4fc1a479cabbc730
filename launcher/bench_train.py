"""`tiny-onn bench train CONFIG`: tokens/s and memory of a configuration, whole and part by part.

Every variant is a real run of a few steps, in a folder of its own that is removed afterwards: the
same ranks, loader, tables and optimizer as in training. The medians leave the first steps out, in
which kernels are compiled and caches fill.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launcher.jsonl import read_rows

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

    With `trace`, the last two steps are recorded into that folder (and counted all the same: leave
    their slowness to the median).

    Raises:
        RuntimeError: the run failed; the message holds the end of its output.
    """
    words = [sys.executable, "-m", "launcher", "pretrain", str(config), *overrides]
    words += ["--runs", str(folder), "--name", name, "--train.steps", str(steps)]
    words += ["--engine.schedule.warmup", "1", "--train.evaluate_every", "0"]
    words += ["--train.sample_every", "0", "--checkpoint.every", "0", "--train.stats_every", "1000"]
    if trace is not None:
        words += ["--train.trace_at", str(steps - 1), "--train.trace_steps", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    rows = list(read_rows(folder / name / "metrics.jsonl"))
    if done.returncode or len(rows) < steps:
        raise RuntimeError(f"{name}: {(done.stdout + done.stderr)[-3000:]}")
    if trace is not None:
        for file in (folder / name / "traces").iterdir():
            shutil.copy(file, trace / f"{name}{''.join(file.suffixes)}")
    rows = rows[skip:]
    speeds = [row["tokens_per_s"] for row in rows]
    parts = rows[-1]["seconds"]
    return {
        "tokens_per_s": statistics.median(speeds),
        "spread": (max(speeds) - min(speeds)) / statistics.median(speeds),
        "mfu": rows[-1].get("mfu"),
        "memory_gib": max(row["memory_bytes"] for row in rows) / 2**30,
        "seconds": {
            part: statistics.median(row["seconds"][part] for row in rows) for part in parts
        },
        "loss": rows[-1]["loss"],
    }


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
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument("--steps", type=int, default=20, help="steps of each run")
    p.add_argument("--skip", type=int, default=5, help="first steps that do not count")
    p.add_argument("--json", type=Path, help="file for all figures")
    p.add_argument("--trace", type=Path, help="folder for a trace of each variant's last steps")
    a, overrides = p.parse_known_args(argv)
    if a.trace is not None:
        a.trace.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    failed = False
    table = Table("variant", "tokens/s", "ratio", "spread", "mfu", "peak GiB", "loss")
    with tempfile.TemporaryDirectory() as scratch:
        for variant in a.variants:
            words = [*overrides, *VARIANTS[variant]]
            name = variant.replace(" ", "-")
            try:
                found = measure(a.config, words, a.steps, a.skip, Path(scratch), name, a.trace)
            except RuntimeError as e:
                print(f"FAILED {e}", file=sys.stderr, flush=True)
                results[variant], failed = {"error": str(e)}, True
                continue
            results[variant] = found
            first = next(r["tokens_per_s"] for r in results.values() if "tokens_per_s" in r)
            mfu = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
            table.add_row(
                variant,
                f"{found['tokens_per_s']:,.0f}",
                f"{found['tokens_per_s'] / first:.2f}",
                f"{found['spread']:.0%}",
                mfu,
                f"{found['memory_gib']:.2f}",
                f"{found['loss']:.3f}",
            )
            print(f"{variant}: {json.dumps(found)}", flush=True)
            if a.json is not None:
                a.json.write_text(json.dumps(results, indent=1))
    Console(width=100).print(table)
    return int(failed)
