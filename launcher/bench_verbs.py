"""`tiny-onn bench attention|train`: measure on this machine, beside what it is compared with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

USAGE = """usage: tiny-onn bench attention [options]
       tiny-onn bench train CONFIG [options] [--dotted.key value ...]

examples:
  tiny-onn bench attention --lengths 8192 32768 65536 --heads 64 --groups 4 --dim 128 --check
  tiny-onn bench train launcher/configs/demo.yaml --variants sparse 'all dense'
"""


def _attention(argv: Sequence[str]) -> int:
    p = argparse.ArgumentParser(
        prog="tiny-onn bench attention",
        description="Check NSA's kernels against the fp64 oracle and time them beside dense causal "
        "attention (needs a GPU).",
        epilog="example: tiny-onn bench attention --lengths 8192 65536 --check --json times.json",
    )
    p.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536], help="tokens")
    p.add_argument("--heads", type=int, default=64, help="query heads")
    p.add_argument("--groups", type=int, default=4, help="KV groups")
    p.add_argument("--dim", type=int, default=128, help="head dim")
    p.add_argument("--check", action="store_true", help="compare with the oracle; rc 1 when off")
    p.add_argument("--json", type=Path, help="file for all figures")
    a = p.parse_args(argv)
    from kernels.nsa.bench import bench_attention

    return bench_attention(
        lengths=a.lengths, heads=a.heads, groups=a.groups, dim=a.dim, check=a.check, json=a.json
    )


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; returns its exit code."""
    from launcher.bench_train import main as bench_train

    benches = {"attention": _attention, "train": bench_train}
    if argv and argv[0] in benches:
        return benches[argv[0]](argv[1:])
    asked = bool(argv) and argv[0] in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
