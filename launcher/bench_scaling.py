"""`tiny-onn bench scaling CONFIG`: a sequence on one GPU, one on several, several on several.

Three parts, each of real runs on a corpus made on the spot from the standard library:

- `parity`: the same steps on one rank, on N ranks with sequences of their own (data: N) and on N
  ranks that share each sequence (group: N); all at once, so that they are not timed. The losses of
  group: N must be as close to one rank's as rounding allows: data: N, which differs from one rank
  in nothing but rounding, is the yardstick.
- `speed`: tokens/s of one rank at `--seq-len`, of data: N at as many tokens per rank, and of
  group: N on one such sequence.
- `long`: group: N on sequences of `--long-seq-len`, with the configuration as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.build import build
from data.config import BuildConfig
from launcher.bench_train import LONG, measure
from launcher.ranks import visible_gpus

PARTS = ("parity", "speed", "long")
PARITY_STEPS = 10
PARITY = [
    *("--model.layers", "4", "--model.vocab_size", "0", "--data.seq_len", "4096"),
    *("--model.activation_checkpointing", "none"),
]
"""Overrides that make a small model of the configuration."""

PARITY_LIMIT = 4.0
"""How many times further from one rank than data: N the losses of group: N may be."""


def long_documents(folder: Path, size: int, count: int) -> list[str]:
    """Write `count` documents of about `size` characters each from the standard library."""
    folder.mkdir(parents=True)
    sources = sorted(Path(os.__file__).parent.rglob("*.py"))
    written, text = 0, ""
    for path in sources:
        if "site-packages" in path.parts:
            continue
        text += path.read_text(errors="ignore")
        while len(text) >= size and written < count:
            (folder / f"{written:04d}.txt").write_text(text[:size])
            text, written = text[size:], written + 1
        if written == count:
            break
    return [str(folder)]


def make_corpora(folder: Path, lengths: dict[str, int], vocab: int) -> dict[str, Path]:
    """Build a corpus of short documents at 4,096 tokens, and one of long ones at each length."""
    out = {"packed": folder / "packed"}
    short = long_documents(folder / "short-text", 9_000, 700)
    config = BuildConfig(
        input=short, vocab_size=vocab, tokenizer_sample_mb=2, validation_fraction=0
    )
    build(config, out["packed"], seq_len=4096)
    for name, seq_len in lengths.items():
        # About 3 characters per token: every sequence lies inside one document.
        text = long_documents(folder / f"{name}-text", 8 * seq_len, max(6, 2**21 // seq_len))
        tokenizer = str(out["packed"] / "tokenizer.model")
        config = BuildConfig(
            input=text, vocab_size=vocab, tokenizer=tokenizer, validation_fraction=0
        )
        out[name] = folder / name
        build(config, out[name], seq_len=seq_len)
    return out


def ranks(count: int, group: int, batch: int) -> list[str]:
    """Overrides for `count` ranks in groups, one sequence per pass and `batch` per step."""
    return [
        *("--launch.processes", str(count), "--mesh.group", str(group)),
        *("--train.global_batch", str(batch), "--train.micro_batch", "1"),
    ]


def furthest(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(f - w) / abs(w) for f, w in zip(found, wanted, strict=True))


def parity(run: Callable[..., dict[str, Any]], gpus: int, corpus: Path) -> dict[str, Any]:
    """Compare losses and gradient norms; see the top of the file."""
    words = [*PARITY, "--data.path", str(corpus)]
    layouts = {"one": (1, 1), "data": (gpus, 1), "group": (gpus, gpus)}
    with ThreadPoolExecutor() as pool:
        futures = {
            name: pool.submit(
                run, f"parity-{name}", [*words, *ranks(count, group, 2 * gpus)], PARITY_STEPS, 0
            )
            for name, (count, group) in layouts.items()
        }
    found = {name: future.result() for name, future in futures.items()}
    out: dict[str, Any] = {"losses": {name: f["losses"] for name, f in found.items()}}
    for key in ("losses", "grad_norms"):
        for name in ("data", "group"):
            out[f"{name}_{key}_off"] = furthest(found[name][key], found["one"][key])
    out["passed"] = out["group_losses_off"] <= PARITY_LIMIT * max(out["data_losses_off"], 1e-4)
    return out


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; returns the overrides apart."""
    p = argparse.ArgumentParser(
        prog="tiny-onn bench scaling",
        description="Parity and speed of N ranks that share each sequence against one rank and "
        "against N ranks with sequences of their own. Overrides (--dotted.key value) go to every "
        "run but the small ones' sizes.",
        epilog="example: tiny-onn bench scaling launcher/configs/1b.yaml --gpus 2 --json out.json "
        "--model.ffn.experts 8",
    )
    p.add_argument("config", type=Path)
    p.add_argument("--gpus", type=int, default=visible_gpus() or 2, help="N")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--seq-len", type=int, default=65536)
    p.add_argument("--long-seq-len", type=int, default=131072)
    p.add_argument("--long-overrides", nargs="*", default=[], metavar="KEY=VALUE")
    p.add_argument("--vocab", type=int, default=8192, help="ids of the corpora's tokenizer")
    p.add_argument("--steps", type=int, default=6, help="steps of each timed run")
    p.add_argument("--skip", type=int, default=2, help="first steps that do not count")
    p.add_argument("--json", type=Path, help="file for all figures")
    return p.parse_known_args(argv)


def timed_runs(a: argparse.Namespace, corpora: dict[str, Path]) -> dict[str, list[str]]:
    """Overrides of each run whose time counts, by name."""
    lengths = {"speed": a.seq_len, "long": a.long_seq_len}
    runs: dict[str, tuple[str, list[str]]] = {}
    if "speed" in a.parts:
        runs["one"] = ("speed", ranks(1, 1, 1))
        runs[f"group {a.gpus}"] = ("speed", ranks(a.gpus, a.gpus, 1))
        runs[f"data {a.gpus}"] = ("speed", ranks(a.gpus, 1, a.gpus))
    if "long" in a.parts:
        words = [word for pair in a.long_overrides for word in f"--{pair}".split("=", 1)]
        runs["long"] = ("long", [*ranks(a.gpus, a.gpus, 1), *words])
    return {
        name: [*words, "--data.path", str(corpora[kind]), "--data.seq_len", str(lengths[kind])]
        for name, (kind, words) in runs.items()
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print a table of the timed runs."""
    table = Table("run", "tokens/s", "per rank, ratio", "spread", "mfu", "peak GiB", "loss")
    one = results.get("one", {}).get("tokens_per_s")
    for name, f in results.items():
        if "tokens_per_s" not in f:
            continue
        ratio = f["tokens_per_s"] / f["ranks"] / one if one else None
        table.add_row(
            name,
            f"{f['tokens_per_s']:,.0f}",
            "-" if ratio is None or name == "long" else f"{ratio:.3f}",
            f"{f['spread']:.0%}",
            "-" if f["mfu"] is None else f"{f['mfu']:.1%}",
            f"{f['memory_gib']:.2f}",
            f"{f['loss']:.3f}",
        )
    Console(width=100).print(table)


def main(argv: Sequence[str]) -> int:
    """Measure; returns 1 when a part failed."""
    a, overrides = arguments(argv)
    results: dict[str, dict[str, Any]] = {}
    failed = False

    def record(name: str, work: Callable[[], dict[str, Any]]) -> None:
        nonlocal failed
        try:
            results[name] = work()
        except RuntimeError as e:
            results[name], failed = {"error": str(e)}, True
            print(f"FAILED {e}", file=sys.stderr, flush=True)
        else:
            shown = {k: v for k, v in results[name].items() if k not in LONG}
            print(f"{name}: {json.dumps(shown)}", flush=True)
        if a.json is not None:
            a.json.write_text(json.dumps(results, indent=1))

    with tempfile.TemporaryDirectory() as scratch:
        lengths = {"speed": a.seq_len, "long": a.long_seq_len}
        wanted = {k: v for k, v in lengths.items() if k in a.parts}
        corpora = make_corpora(Path(scratch), wanted, a.vocab)

        def run(name: str, words: Sequence[str], steps: int, skip: int) -> dict[str, Any]:
            given = ["--data.validation_split", "train", *overrides, *words]
            return measure(a.config, given, steps, skip, Path(scratch) / "runs", name)

        if "parity" in a.parts:
            record("parity", lambda: parity(run, a.gpus, corpora["packed"]))
            failed |= not results["parity"].get("passed", False)
        for name, words in timed_runs(a, corpora).items():
            work = partial(run, name.replace(" ", "-"), words, a.steps, a.skip)
            record(name, work)
    show(results)
    return int(failed)
