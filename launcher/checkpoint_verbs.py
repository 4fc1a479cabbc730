"""`tiny-onn checkpoint list|verify RUN`: what a run can go on from."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from parallel.checkpoint import list_checkpoints, verify

USAGE = """usage: tiny-onn checkpoint list RUN
       tiny-onn checkpoint verify RUN [--step N]

examples:
  tiny-onn checkpoint list runs/demo
  tiny-onn checkpoint verify runs/demo --step 200
"""


def _folder(run: Path) -> Path:
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{run} is no run folder: it has no checkpoints/")
    return folder


def _list(run: Path) -> int:
    found = list_checkpoints(_folder(run))
    for info in found:
        state = "committed" if info.committed else "unfinished, ignored"
        print(f"step {info.step:>8}  {info.size / 2**20:10.1f} MiB  {state:<20}  {info.path}")
    if not found:
        print(f"{run}: no checkpoint yet")
    return 0


def _verify(run: Path, step: int | None) -> int:
    wanted = [c for c in list_checkpoints(_folder(run)) if step in (None, c.step)]
    if not wanted:
        raise ValueError(f"{run}: no checkpoint" + ("" if step is None else f" of step {step}"))
    bad = 0
    for info in wanted:
        problems = verify(info.path)
        bad += bool(problems)
        print(f"{info.path}: {'intact' if not problems else 'NOT usable'}")
        for problem in problems:
            print(f"  {problem}")
    return int(bad > 0)


def main(argv: Sequence[str]) -> int:
    """Run a sub-command; returns 0, or 1 when a checkpoint is not intact."""
    if not argv or argv[0] not in ("list", "verify"):
        asked = bool(argv) and argv[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    p = argparse.ArgumentParser(
        prog=f"tiny-onn checkpoint {argv[0]}",
        epilog=f"example: tiny-onn checkpoint {argv[0]} runs/demo",
    )
    p.add_argument("run", type=Path, help="run folder")
    if argv[0] == "verify":
        p.add_argument("--step", type=int, help="only this step; all if absent")
    a = p.parse_args(argv[1:])
    return _list(a.run) if argv[0] == "list" else _verify(a.run, a.step)
