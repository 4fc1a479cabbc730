"""`tiny-onn bench scaling CONFIG`: a sequence on one GPU, one on several, several on several.

Three parts, each of real runs on a corpus made on the spot from the standard library:

- `parity`: the same steps on one rank, on N ranks with sequences of their own (data: N) and on N
  ranks that share each sequence (group: N); all at once, so that they are not timed. The losses of
  group: N must be as close to one rank's as rounding allows: data: N, which differs from one rank
  in nothing but rounding, is the yardstick.
- `speed`: tokens/s of one rank at `--seq-len`, of data: N at as many tokens per rank, and of
  group: N on one such sequence; and whether tokens/s per rank are what `BARS` asks for.
- `long`: group: N on sequences of `--long-seq-len`, with the configuration as it is.

In the timed parts every sequence is a piece of one document, in the same order in all runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data.build import build
from data.config import BuildConfig, DataConfig
from data.index import TOKENIZER
from data.loader import PackedLoader
from data.tokenizer import Tokenizer
from launcher.bench_train import LONG, measure, print_formula, require_counted
from launcher.options import whole
from launcher.ranks import visible_gpus

PARTS = ("parity", "speed", "long")
PARITY_STEPS = 10
PARITY = [
    *("--model.layers", "4", "--model.vocab_size", "0", "--data.seq_len", "4096"),
    *("--model.activation_checkpointing", "none"),
]
"""Overrides that make a small model of the configuration."""

BARS = {"data": 0.95, "group": 0.90}
"""Least tokens/s per rank of N ranks over one rank's, by kind of run: of data: N at the same tokens
per rank (weak scaling), of group: N on the same sequence (strong scaling)."""

PARITY_LIMIT = 4.0
"""How many times further from one rank than data: N the losses of group: N may be."""


def library_text(characters: int) -> str:
    """Source text of the standard library, over again where it is shorter than asked for."""
    parts: list[str] = []
    size = 0
    sources = sorted(Path(os.__file__).parent.rglob("*.py"))
    sources = [path for path in sources if "site-packages" not in path.parts]
    for path in itertools.cycle(sources):
        parts.append(path.read_text(errors="ignore"))
        size += len(parts[-1])
        if size >= characters:
            return "".join(parts)[:characters]
    raise RuntimeError(f"{os.__file__} has no source text beside it to make a corpus of")


def documents(folder: Path, size: int, count: int) -> list[str]:
    """Write `count` documents of `size` characters each from the standard library."""
    folder.mkdir(parents=True)
    text = library_text(size * count)
    for i in range(count):
        (folder / f"{i:04d}.txt").write_text(text[i * size : (i + 1) * size])
    return [str(folder)]


def packed_corpus(folder: Path, vocab: int, count: int) -> Path:
    """Build a corpus of `count` documents of about 3,000 tokens, packed at 4,096."""
    config = BuildConfig(
        input=documents(folder / "packed-text", 9_000, count),
        vocab_size=vocab,
        tokenizer_sample_mb=2,
        validation_fraction=0,
    )
    build(config, folder / "packed", seq_len=4096)
    return folder / "packed"


def whole_corpus(folder: Path, tokenizer: Path, seq_len: int, sequences: int) -> Path:
    """Build a corpus whose first sequences, in order, are pieces of one document and nothing else.

    Its attention then costs the same in every sequence, and in every run.

    Args:
        folder: for the text and the corpus.
        tokenizer: model file.
        seq_len: S.
        sequences: how many are needed.

    Raises:
        RuntimeError: one of them is not S tokens of one document.
    """
    some = library_text(1_000_000)
    model = Tokenizer.load(tokenizer)
    per_token = len(some) / len(model.encode(some))
    # Text differs from place to place; the document's end, in the last sequence, is not needed.
    characters = int(1.25 * per_token * seq_len * (sequences + 1))
    config = BuildConfig(
        input=documents(folder / "text", characters, 1),
        vocab_size=model.size,
        tokenizer=str(tokenizer),
        validation_fraction=0,
    )
    build(config, folder / "corpus", seq_len=seq_len)
    cfg = DataConfig(path=str(folder / "corpus"), seq_len=seq_len, shuffle=False, canonical_nodes=1)
    loader = PackedLoader(cfg, micro_batch=1, accumulation=sequences, rank=0, world=1)
    try:
        lengths = [batch.lengths for batch in loader.next_step()]
    finally:
        loader.close()
    if lengths != [[seq_len]] * sequences:
        raise RuntimeError(
            f"{folder}: of {sequences} sequences {sum(n != [seq_len] for n in lengths)} are not "
            f"{seq_len} tokens of one document: {lengths}"
        )
    return folder / "corpus"


IN_ORDER = ["--data.shuffle", "false", "--data.canonical_nodes", "1"]
"""Overrides under which runs take a corpus's sequences one after the other."""


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
    p.add_argument("--gpus", type=whole(1), default=visible_gpus() or 2, help="N")
    p.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--seq-len", type=whole(2), default=65536)
    p.add_argument("--long-seq-len", type=whole(2), default=131072)
    p.add_argument("--long-overrides", nargs="*", default=[], metavar="KEY=VALUE")
    p.add_argument("--vocab", type=whole(260), default=8192, help="ids of the corpora's tokenizer")
    p.add_argument("--steps", type=whole(1), default=6, help="steps of each timed run")
    p.add_argument("--skip", type=whole(0), default=2, help="first steps that do not count")
    p.add_argument("--json", type=Path, help="file for all figures")
    a, overrides = p.parse_known_args(argv)
    require_counted(p, a.steps, a.skip)
    return a, overrides


def verdicts(results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare tokens/s per rank with one rank's, and with `BARS`; empty without both runs.

    Returns:
        For each run of several ranks its name ("run"), "share", "bar" and whether it "holds".
    """
    alone = results.get("one", {}).get("tokens_per_s")
    out = []
    for name, found in results.items():
        bar = BARS.get(name.partition(" ")[0])
        if alone is None or bar is None or "tokens_per_s" not in found:
            continue
        share = found["tokens_per_s"] / found["ranks"] / alone
        out.append({"run": name, "share": share, "bar": bar, "holds": share >= bar})
    return out


def make_corpora(folder: Path, a: argparse.Namespace) -> dict[str, Path]:
    """Build the corpora of the parts that are asked for; the tokenizer is the first one's."""
    packed = packed_corpus(folder, a.vocab, 700 if "parity" in a.parts else 250)
    out = {"packed": packed}
    for kind, seq_len in (("speed", a.seq_len), ("long", a.long_seq_len)):
        if kind in a.parts:
            # Those of data: N; the step behind the last is read ahead.
            sequences = a.gpus * (a.steps + 1)
            out[kind] = whole_corpus(folder / kind, packed / TOKENIZER, seq_len, sequences)
    return out


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
        name: [
            *(*words, *IN_ORDER, "--data.path", str(corpora[kind])),
            *("--data.seq_len", str(lengths[kind])),
        ]
        for name, (kind, words) in runs.items()
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print a table of the timed runs."""
    table = Table("run", "tokens/s", "per rank, ratio", "spread", "mfu", "peak GiB", "loss")
    bars = verdicts(results)
    ratios = {bar["run"]: bar["share"] for bar in bars}
    for name, f in results.items():
        if "tokens_per_s" not in f:
            continue
        ratio = ratios.get(name)
        table.add_row(
            name,
            f"{f['tokens_per_s']:,.0f}",
            "-" if ratio is None else f"{ratio:.3f}",
            f"{f['spread']:.0%}",
            "-" if f["mfu"] is None else f"{f['mfu']:.1%}",
            f"{f['memory_gib']:.2f}",
            f"{f['loss']:.3f}",
        )
    Console(width=100).print(table)
    for bar in bars:
        word = "holds" if bar["holds"] else "MISSED"
        print(
            f"{bar['run']}: {bar['share']:.1%} of one rank's tokens/s per rank, at least "
            f"{bar['bar']:.0%}: {word}"
        )
    print_formula(results)


def main(argv: Sequence[str]) -> int:
    """Measure; returns 1 when a part failed. A bar that is missed is said, and no failure."""
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
            bars = verdicts(results)
            a.json.write_text(json.dumps(results | ({"bars": bars} if bars else {}), indent=1))

    with tempfile.TemporaryDirectory() as scratch:
        corpora = make_corpora(Path(scratch), a)

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
