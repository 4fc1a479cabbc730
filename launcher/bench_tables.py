"""`tiny-onn bench tables`: what a DeepEmbed table costs a training step, by partition and tier.

One dense model (full attention, dense feed-forward, activation checkpointing) trains by turns
without a table and with one (`bench_turns`). A turn's clock starts when its first step is done, so
that work which a table leaves to the next step counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.bench_tables_report import report
from launcher.bench_tables_subject import (
    Batches,
    Subject,
    build_engine,
    table_config,
    text_ids,
)
from launcher.bench_turns import compare, quiet
from parallel.checkpoint_files import write_tensors
from parallel.engine import EngineConfig
from parallel.host_buffers import HostBuffers
from parallel.mesh import Mesh, init_mesh, threads_per_rank
from parallel.tables import RowTable
from tiny_onn.deepembed import DeepEmbedConfig

ROWS = ("rows-host", "rows-device", "rows-nvme")
VARIANTS = (*ROWS, "zero3", "zero3-cpu")


def measure(a: argparse.Namespace, mesh: Mesh) -> dict[str, Any]:
    """Measure every variant; returns results by name, on every rank."""
    device = mesh.device
    ids = text_ids(a.vocab)
    batches = Batches(ids, a.tokens, a.span, mesh.rank)
    unique = statistics.mean(float(torch.unique(batches.at(i)).shape[0]) for i in range(20))
    itemsize = torch.empty((), dtype=EngineConfig().dtype(device)).element_size()
    row_bytes = unique * a.layers * a.width * itemsize
    results: dict[str, Any] = {
        "setting": {
            **{k: v for k, v in vars(a).items() if isinstance(v, int | float | str)},
            "world": mesh.world,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "unique_rows": unique,
            "unique_bytes": row_bytes,
        }
    }
    engine = build_engine(a, mesh, DeepEmbedConfig(keep_output=a.keep_output))
    plain = Subject(engine, batches)
    plain.turn(2)
    with quiet():
        alone = plain.turn(a.steps)
    results["none"] = {"ms": 1e3 * alone["seconds"], "peak_gib": alone["peak"] / 2**30}

    def note(name: str, found: dict[str, Any], beside: float) -> None:
        results[name] = found
        extra = found["peak_gib"] - results["none"]["peak_gib"] - beside
        found["extra_gib"] = extra
        found["extra_over_unique"] = extra * 2**30 / row_bytes
        if mesh.is_first:
            print(name, json.dumps(found), flush=True)

    for variant in a.variants:
        try:
            if variant in ROWS:
                for name, found, beside in _measure_rows(a, mesh, plain, variant):
                    note(name, found, beside)
            else:
                note(variant, _measure_zero3(a, mesh, plain, variant), 0.0)
        except (RuntimeError, OSError, ValueError) as error:
            if mesh.world > 1:
                raise
            results[variant] = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def _measure_zero3(
    a: argparse.Namespace, mesh: Mesh, plain: Subject, variant: str
) -> dict[str, Any]:
    cfg = table_config(a, variant, 1)
    engine = build_engine(a, mesh, cfg, "cpu" if variant == "zero3-cpu" else "none")
    other = Subject(engine, plain.batches)
    other.turn(2)
    return _compare(plain, other, a)


def _measure_rows(
    a: argparse.Namespace, mesh: Mesh, plain: Subject, variant: str
) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Yield (name, figures, GiB of the table itself on the device) for tables of every spread.

    The first table stays open, so that the larger ones are compared with it directly, too.
    """
    first: Subject | None = None
    with ExitStack() as tables:
        for spread in a.spreads:
            name = variant if spread == 1 else f"{variant} x{spread}"
            opened = time.perf_counter()
            table = tables.enter_context(_table(a, mesh, plain, variant, spread))
            opened = time.perf_counter() - opened
            other = Subject(plain.engine, plain.batches, table, spread, next_step=100)
            if variant == "rows-nvme":
                other.warm(a.warm)
            other.turn(2)
            found = _compare(plain, other, a)
            gib = table.rows * table.layout.columns * 4 / 2**30
            found |= {"open_seconds": opened, "kernel": table.kernel, "table_gib": gib}
            if a.save is not None:
                found["save"] = _save_beside(other, a)
            if a.trace is not None and mesh.is_first and first is None:
                _trace(plain, a.trace / "plain.json.gz")
                _trace(other, a.trace / f"{variant}.json.gz")
            on_device = gib / mesh.world if variant == "rows-device" else 0.0
            yield name, found, on_device
            if first is not None:
                yield f"{name} / x{a.spreads[0]}", _compare(first, other, a), on_device
            first = first or other


@contextmanager
def _table(
    a: argparse.Namespace, mesh: Mesh, plain: Subject, variant: str, spread: int
) -> Iterator[RowTable]:
    table = RowTable(
        f"deepembed-x{spread}",
        a.vocab * spread,
        a.layers * a.width,
        mesh,
        table_config(a, variant, spread),
        dtype=plain.engine.dtype,
        groups=a.layers,
    )
    try:
        yield table
    finally:
        table.close()


def _compare(ours: Subject, theirs: Subject, a: argparse.Namespace) -> dict[str, Any]:
    found = compare(partial(ours.turn, a.steps), partial(theirs.turn, a.steps), a.turns)
    return {**found, "loss": theirs.loss}


def _save_beside(subject: Subject, a: argparse.Namespace) -> dict[str, float]:
    """Write and sync a checkpoint of the table while steps go on; returns bytes and seconds."""
    table = subject.table
    assert table is not None
    path = a.save / f"table-rank{table.mesh.rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    buffers = HostBuffers(table.mesh)
    source = table.snapshot(buffers)
    buffers.wait()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_tensors, path, source)
        turns = [subject.turn(a.steps)["seconds"]]
        while not _everywhere(writing.done(), table.mesh):
            turns.append(subject.turn(a.steps)["seconds"])
        entry = writing.result()
    seconds = time.perf_counter() - start
    source.close()
    buffers.close()
    path.unlink()
    return {"bytes": entry["size"], "seconds": seconds, "step_ms": 1e3 * statistics.median(turns)}


def _everywhere(done: bool, mesh: Mesh) -> bool:
    """Whether all ranks are done: none may take a turn that another does not."""
    if mesh.world == 1:
        return done
    flag = torch.tensor(int(done))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _trace(subject: Subject, path: Path) -> None:
    """Record two steps; the first steps of a turn are left out."""
    subject.turn(1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        subject.turn(1)
    profile.export_chrome_trace(str(path))
    summary = profile.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60
    )
    path.with_suffix("").with_suffix(".txt").write_text(summary)


def check(worlds: Sequence[int] = (1, 2, 4)) -> bool:
    """Compare row tables with a dense reference on CPU ranks; prints a line per case."""
    passed = True
    for world in worlds:
        done = _ranks(world, "parallel.table_check", [], {"CUDA_VISIBLE_DEVICES": ""})
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not rows:
            print(f"check at {world} ranks failed:\n{(done.stdout + done.stderr)[-3000:]}")
            passed = False
        for row in rows:
            passed &= row["passed"]
            print(
                f"check {row['ranks']} rank(s), {row['case']:<16} largest gap: losses "
                f"{row['loss_gap']:.1e}, rows {row['row_gap']:.1e} (of {row['largest']:.2f}) "
                f"{'ok' if row['passed'] else 'WRONG'}",
                flush=True,
            )
    return passed


def _ranks(
    world: int, module: str, words: Sequence[str], environment: dict[str, str], capture: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a module on so many ranks of this machine."""
    threads = str(threads_per_rank(world))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(world), "-m", module, *words],
        env={**os.environ, "OMP_NUM_THREADS": threads, **environment},
        capture_output=capture,
        text=True,
        check=False,
    )


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="tiny-onn bench tables",
        description="Step time and memory with a DeepEmbed table, against the same model without.",
        epilog="example: tiny-onn bench tables --check --json tables.json --nvme /local/scratch",
    )
    p.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    p.add_argument("--layers", type=int, default=12)
    p.add_argument("--width", type=int, default=2048)
    p.add_argument("--vocab", type=int, default=65536)
    p.add_argument(
        "--spreads", type=int, nargs="+", default=[1], help="rows of the tables per id: V x this"
    )
    p.add_argument("--tokens", type=int, default=8192, help="per rank and step")
    p.add_argument("--span", type=int, default=32, help="words of text that follow each other")
    p.add_argument("--turns", type=int, default=10, help="pairs of turns, without and with table")
    p.add_argument("--steps", type=int, default=6, help="steps of a turn, after one off the clock")
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--kernel", choices=("auto", "compiled", "torch"), default="auto")
    p.add_argument("--threads", type=int, default=0)
    p.add_argument(
        "--keep-output", action="store_true", help="layers' outputs in host memory, not redone"
    )
    p.add_argument("--nvme", default="", help="folder for the nvme tier; a temporary one if empty")
    p.add_argument(
        "--cache", type=float, default=0.25, help="share of rows cached by the nvme tier"
    )
    p.add_argument("--warm", type=int, default=60, help="batches that fill the cache beforehand")
    p.add_argument(
        "--trace", type=Path, help="folder for a trace of two steps of each rows variant"
    )
    p.add_argument("--save", type=Path, help="folder to checkpoint each table to, beside steps")
    p.add_argument("--check", action="store_true", help="compare with a dense reference first")
    p.add_argument("--json", type=Path, help="file for all figures")
    return p


def main(argv: Sequence[str]) -> int:
    """Check and measure as asked; returns 1 when a check or a variant failed."""
    a = _parser().parse_args(argv)
    started = "RANK" in os.environ
    if a.check and not started and not check():
        return 1
    if a.ranks > 1 and not started:
        words = [word for word in argv if word != "--check"]
        done = _ranks(a.ranks, "launcher", ["bench", "tables", *words], {}, capture=False)
        return done.returncode
    if not a.variants:
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    mesh = init_mesh()
    with tempfile.TemporaryDirectory() as scratch:
        a.nvme = a.nvme or scratch
        results = measure(a, mesh)
    if mesh.is_first:
        print(report(results), flush=True)
        if a.json is not None:
            a.json.write_text(json.dumps(results, indent=1, default=str))
    return int(any("error" in found for found in results.values()))
