"""`tiny-onn data build|inspect`: make a corpus of shards, or look into one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jsonargparse

from data.build import build
from data.config import BuildConfig
from data.report import inspect, table, verify

USAGE = """usage: tiny-onn data build --input SOURCE [SOURCE ...] --out DIR [--seq_len N] [options]
       tiny-onn data inspect DIR [--verify]

examples:
  tiny-onn data build --input stdlib --out corpus/stdlib --vocab_size 4096 --seq_len 512
  tiny-onn data build --input 'texts/*.jsonl.zst' --out corpus/mine --vocab_size 32768
  tiny-onn data inspect corpus/mine --verify
"""


def _build(argv: Sequence[str]) -> int:
    p = jsonargparse.ArgumentParser(
        prog="tiny-onn data build",
        allow_abbrev=False,
        exit_on_error=True,
        description="Train or reuse a tokenizer, tokenise, pack, and write MDS shards.",
    )
    p.add_argument("--input", nargs="+", required=True, help="folders, globs, files, or stdlib")
    p.add_argument("--out", type=str, required=True, help="folder to make")
    p.add_argument("--seq_len", type=int, default=512, help="tokens per sample")
    p.add_class_arguments(BuildConfig, skip={"input"})
    a = vars(p.parse_args(_dashes(argv)))
    out, seq_len = Path(a.pop("out")), int(a.pop("seq_len"))
    index = build(BuildConfig(**a), out, seq_len=seq_len)
    print(f"{out}: {len(index.splits)} splits, tokenizer {index.tokenizer_sha256[:12]}")
    return 0


def _dashes(argv: Sequence[str]) -> list[str]:
    """Take --vocab-size for --vocab_size."""
    return [
        "--" + w[2:].partition("=")[0].replace("-", "_") + "".join(w[2:].partition("=")[1:])
        if w.startswith("--")
        else w
        for w in argv
    ]


def _inspect(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(
        prog="tiny-onn data inspect",
        description="Show what a corpus holds.",
        epilog="example: tiny-onn data inspect corpus/stdlib --verify",
    )
    p.add_argument("path", help="folder of the corpus")
    p.add_argument("--verify", action="store_true", help="read every shard and compare its hash")
    a = p.parse_args(argv)
    print(table(inspect(a.path)))
    if a.verify:
        print(f"verified {verify(a.path):,} bytes: every shard is as it was built")
    return 0


def main(argv: Sequence[str]) -> int:
    """Run a sub-command; returns the exit code."""
    commands = {"build": _build, "inspect": _inspect}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    asked = bool(argv) and argv[0] in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
