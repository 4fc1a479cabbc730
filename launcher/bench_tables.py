"""`tiny-onn bench tables`: what a DeepEmbed table costs a training step, by partition and tier.

One dense model (full attention, dense feed-forward, activation checkpointing) trains by turns
without a table and with one; ratios are of neighbouring turns. The ids are words of the standard
library's own text, numbered by frequency, in short spans drawn from all over it: Zipf as text has
it. A turn's clock starts when its first step is done, so that work which a table leaves to the next
step counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import Documents
from parallel.checkpoint_files import write_tensors
from parallel.engine import Engine, EngineConfig, OffloadConfig, OptimizerConfig
from parallel.mesh import Mesh, init_mesh, threads_per_rank
from parallel.schedule import ScheduleConfig
from parallel.tables import RowTable
from tiny_onn.attention import AttentionConfig
from tiny_onn.deepembed import DeepEmbedConfig
from tiny_onn.dynmoe import DynMoeConfig
from tiny_onn.modular import ModelConfig, TinyOnn

ROWS = ("rows-host", "rows-device", "rows-nvme")
VARIANTS = (*ROWS, "zero3", "zero3-cpu")
DOCUMENT = 1024


def text_ids(vocab: int, stop_bytes: int = 40_000_000) -> Tensor:
    """Return the words of the standard library's text as ids by frequency, int64."""
    words: list[str] = []
    read = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts and read < stop_bytes:
            text = path.read_text(errors="ignore")
            read += len(text)
            words += re.findall(r"\w+", text)
    rank = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
    return torch.tensor([rank[word] % vocab for word in words])


class Batches:
    """Batches of a rank by step: `tokens` ids in spans of `span` words from anywhere."""

    def __init__(self, ids: Tensor, tokens: int, span: int, rank: int) -> None:
        self._ids, self._tokens, self._span, self._rank = ids, tokens, span, rank

    def at(self, step: int) -> Tensor:
        """Return the ids of a step, int64 [tokens]."""
        generator = torch.Generator().manual_seed(10_007 * step + self._rank)
        count = -(-self._tokens // self._span)
        starts = torch.randint(self._ids.shape[0] - self._span, (count,), generator=generator)
        return self._ids[(starts[:, None] + torch.arange(self._span)).reshape(-1)[: self._tokens]]


@dataclasses.dataclass
class Subject:
    """An engine, perhaps with a table, that takes steps.

    Attributes:
        engine: of the model.
        table: rows beside it; None where there is none.
        spread: the table sees every id times this, as if the vocabulary were so much larger.
    """

    engine: Engine
    batches: Batches
    table: RowTable | None = None
    spread: int = 1
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    next_step: int = 0
    loss: float = 0.0

    def step(self) -> Tensor:
        """Take one optimizer step; returns the loss, fp32 0-dim."""
        engine, table, device = self.engine, self.table, self.engine.device
        ids_T = self.batches.at(self.next_step)
        labels_T = torch.cat((ids_T[1:], torch.tensor([-100])))
        tokens = ids_T.shape[0]
        documents = [DOCUMENT] * (tokens // DOCUMENT)
        if tokens % DOCUMENT:
            documents.append(tokens % DOCUMENT)
        scale = torch.tensor(1.0 / tokens, device=device)
        self.next_step += 1
        layers = index = rows = None
        start = time.perf_counter()

        def lap(part: str) -> None:
            nonlocal start
            now = time.perf_counter()
            self.seconds[part] = self.seconds.get(part, 0.0) + now - start
            start = now

        if table is not None:
            rows = table.fetch(ids_T * self.spread)
            layers, index = rows.parts, rows.lookup
            lap("fetch")
            table.prefetch(self.batches.at(self.next_step) * self.spread)
            lap("prefetch")
        output = engine.forward(
            ids_T.to(device),
            labels_T.to(device),
            Documents(documents, device),
            scale,
            layers,
            index,
        )
        lap("forward")
        engine.backward(output.loss)
        lap("backward")
        if table is not None and rows is not None:
            table.accumulate(rows)
            lap("accumulate")
        engine.step()
        lap("step")
        loss: Tensor = output.nll_sum * scale
        return loss

    def warm(self, steps: int) -> None:
        """Touch the rows of `steps` batches, so that a cache is as full as in a long run."""
        table = self.table
        assert table is not None
        for _ in range(steps):
            rows = table.fetch(self.batches.at(self.next_step) * self.spread)
            self.next_step += 1
            table.accumulate(rows)
            table.step(0.0)
        table.flush()

    def turn(self, steps: int) -> dict[str, float]:
        """Take one step, then `steps` more on the clock; returns seconds and bytes."""
        engine = self.engine
        engine.tables = () if self.table is None else (self.table,)
        module: Any = engine.module
        plain = dataclasses.replace(module.cfg.deepembed, kind="off")
        before = module.cfg
        if self.table is None and before.deepembed.partition == "rows":
            module.cfg = dataclasses.replace(before, deepembed=plain)
        try:
            self.step()
            _synchronise(engine.device)
            self.seconds.clear()
            busy = {} if self.table is None else dict(self.table.busy_seconds)
            if engine.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(engine.device)
            start = time.perf_counter()
            for _ in range(steps):
                loss = self.step()
            _synchronise(engine.device)
            seconds = (time.perf_counter() - start) / steps
        finally:
            module.cfg = before
        self.loss = float(loss)
        found = {"seconds": seconds, "peak": _peak(engine.device)}
        found |= {f"host {part}": total / steps for part, total in self.seconds.items()}
        if self.table is not None:
            self.table.flush()
            for kind, total in self.table.busy_seconds.items():
                found[f"thread {kind}"] = (total - busy.get(kind, 0.0)) / steps
            found |= {k: float(v) for k, v in self.table.stats.items()}
        return found


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0


def model_config(a: argparse.Namespace, deepembed: DeepEmbedConfig) -> ModelConfig:
    """Return the dense model of the benchmark."""
    heads = max(1, a.width // 128)
    return ModelConfig(
        vocab_size=a.vocab,
        width=a.width,
        layers=a.layers,
        tie_embeddings=False,
        activation_checkpointing=True,
        attention=AttentionConfig(
            kind="full", heads=heads, groups=heads, head_dim=min(128, a.width)
        ),
        ffn=DynMoeConfig(kind="dense", dense_hidden=8 * a.width // 3 // 64 * 64),
        deepembed=deepembed,
    )


def build_engine(
    a: argparse.Namespace, mesh: Mesh, deepembed: DeepEmbedConfig, offload: str = "none"
) -> Engine:
    """Return an engine of the model; a collective call."""
    torch.manual_seed(0)
    return Engine(
        lambda: TinyOnn(model_config(a, deepembed)),
        EngineConfig(
            optimizer=OptimizerConfig(lr=3e-4),
            schedule=ScheduleConfig(warmup=10),
            offload=OffloadConfig(optimizer=offload),  # type: ignore[arg-type]
        ),
        mesh,
        total_steps=100_000,
    )


def table_config(a: argparse.Namespace, variant: str, spread: int) -> DeepEmbedConfig:
    """Return the configuration of a variant's table."""
    if variant.startswith("zero3"):
        return DeepEmbedConfig(partition="zero3")
    tier: Any = variant.removeprefix("rows-")
    return DeepEmbedConfig(
        tier=tier,
        kernel=a.kernel,
        threads=a.threads,
        nvme_path=a.nvme,
        cache_rows=round(a.cache * a.vocab * spread / int(os.environ.get("WORLD_SIZE", "1"))),
    )


def compare(plain: Subject, other: Subject, a: argparse.Namespace) -> dict[str, Any]:
    """Take turns and return medians, spreads and the ratio of neighbouring turns."""
    turns: list[tuple[dict[str, float], dict[str, float]]] = []
    other.turn(2)
    for _ in range(a.turns):
        turns.append((plain.turn(a.steps), other.turn(a.steps)))
    ratios = sorted(theirs["seconds"] / ours["seconds"] for ours, theirs in turns)
    times = [theirs["seconds"] for _, theirs in turns]
    base = [ours["seconds"] for ours, _ in turns]
    last = {k: statistics.median(t[1].get(k, 0.0) for t in turns) for k in turns[-1][1]}
    return {
        "ms": 1e3 * statistics.median(times),
        "plain_ms": 1e3 * statistics.median(base),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "spread": (max(times) - min(times)) / statistics.median(times),
        "peak_gib": max(t["peak"] for _, t in turns) / 2**30,
        "loss": other.loss,
        "parts": last,
    }


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
    engine = build_engine(a, mesh, DeepEmbedConfig(kind="output", partition="rows"))
    plain = Subject(engine, batches)
    plain.turn(2)
    alone = [plain.turn(a.steps) for _ in range(2)]
    results["none"] = {
        "ms": 1e3 * statistics.median(t["seconds"] for t in alone),
        "peak_gib": max(t["peak"] for t in alone) / 2**30,
        "parts": alone[-1],
    }
    wanted = [
        (variant, spread if variant in ROWS else 1)
        for variant in a.variants
        for spread in (a.spreads if variant in ROWS else a.spreads[:1])
    ]
    for variant, spread in wanted:
        name = variant if spread == 1 else f"{variant} x{spread}"
        try:
            found = _measure_variant(a, mesh, plain, variant, spread)
        except (RuntimeError, OSError, ValueError) as error:
            if mesh.world > 1:
                raise
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        results[name] = found
        extra = found["peak_gib"] - results["none"]["peak_gib"]
        found["extra_gib"] = extra
        found["extra_over_unique"] = extra * 2**30 / row_bytes
        if mesh.is_first:
            print(name, json.dumps(found), flush=True)
    return results


def _measure_variant(
    a: argparse.Namespace, mesh: Mesh, plain: Subject, variant: str, spread: int
) -> dict[str, Any]:
    cfg = table_config(a, variant, spread)
    if cfg.partition == "zero3":
        offload = "cpu" if variant == "zero3-cpu" else "none"
        engine = build_engine(a, mesh, cfg, offload)
        return compare(plain, Subject(engine, plain.batches), a)
    start = time.perf_counter()
    table = RowTable(
        "deepembed",
        a.vocab * spread,
        a.layers * a.width,
        mesh,
        cfg,
        dtype=plain.engine.dtype,
        groups=a.layers,
    )
    opened = time.perf_counter() - start
    try:
        other = Subject(plain.engine, plain.batches, table, spread, next_step=100)
        if variant == "rows-nvme":
            other.warm(a.warm)
        found = compare(plain, other, a)
        if a.save is not None:
            found["save"] = _save_beside(other, a)
        if a.trace is not None and mesh.is_first:
            _trace(plain, a.trace / "plain.json.gz")
            _trace(other, a.trace / f"{variant}.json.gz")
        gib = table.rows * table.layout.columns * 4 / 2**30
        return {**found, "open_seconds": opened, "kernel": table.kernel, "table_gib": gib}
    finally:
        table.close()


def _save_beside(subject: Subject, a: argparse.Namespace) -> dict[str, float]:
    """Write and sync a checkpoint of the table while steps go on; returns bytes and seconds."""
    table = subject.table
    assert table is not None
    source = table.snapshot(None)
    path = a.save / f"table-rank{table.mesh.rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write_tensors, path, source)
        turns = [subject.turn(a.steps)["seconds"]]
        while not writing.done():
            turns.append(subject.turn(a.steps)["seconds"])
        entry = writing.result()
    seconds = time.perf_counter() - start
    source.close()
    path.unlink()
    return {"bytes": entry["size"], "seconds": seconds, "step_ms": 1e3 * statistics.median(turns)}


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


def report(results: dict[str, Any]) -> str:
    """Return the results as a table."""
    setting = results["setting"]
    lines = [
        f"{setting['device']} x {setting['world']}, {setting['layers']} layers of "
        f"{setting['width']}, "
        f"V = {setting['vocab']}, {setting['tokens']} tokens, "
        f"{setting['unique_rows']:.0f} unique rows ({setting['unique_bytes'] / 1e6:.0f} MB)",
        f"{'variant':<14} {'ms':>8} {'plain':>8} {'ratio':>7} {'min':>6} {'max':>6} {'peak':>7} "
        f"{'extra':>7} {'/rows':>6}  host thread ms",
    ]
    for name, found in results.items():
        if name == "setting":
            continue
        if "error" in found:
            lines.append(f"{name:<14} failed: {found['error'][:100]}")
            continue
        threads = "  ".join(
            f"{k.removeprefix('thread ')} {1e3 * v:.1f}"
            for k, v in found["parts"].items()
            if k.startswith(("thread ", "host "))
        )
        ratios = found.get("ratios", [1.0])
        lines.append(
            f"{name:<14} {found['ms']:8.1f} {found.get('plain_ms', found['ms']):8.1f} "
            f"{found.get('ratio', 1.0):7.4f} {ratios[0]:6.3f} {ratios[-1]:6.3f} "
            f"{found['peak_gib']:7.2f} {found.get('extra_gib', 0.0):7.3f} "
            f"{found.get('extra_over_unique', 0.0):6.2f}  {threads}"
        )
        if "table_gib" in found:
            saved = found.get("save", {})
            lines.append(
                f"{'':<14} table of {found['table_gib']:.1f} GiB, opened in "
                f"{found['open_seconds']:.1f} s, {found['kernel']} kernels"
                + (
                    f"; {saved['bytes'] / 1e9:.2f} GB saved in {saved['seconds']:.1f} s beside "
                    f"steps of {saved['step_ms']:.1f} ms"
                    if saved
                    else ""
                )
            )
    return "\n".join(lines)


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
    p.add_argument("--turns", type=int, default=6, help="pairs of turns, without and with table")
    p.add_argument("--steps", type=int, default=6, help="steps of a turn")
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--kernel", choices=("auto", "compiled", "torch"), default="auto")
    p.add_argument("--threads", type=int, default=0)
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
