"""`tiny-onn checkpoint list|verify|diff|export`: what a run can go on from, and what is in it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from parallel.checkpoint import Checkpoint, CheckpointError, list_checkpoints, verify
from parallel.checkpoint_files import list_set_aside

USAGE = """usage: tiny-onn checkpoint list RUN
       tiny-onn checkpoint verify RUN [--step N]
       tiny-onn checkpoint diff A B
       tiny-onn checkpoint export RUN OUT [--step N] [--dtype fp32|bf16|compute]

A and B are run folders (their newest checkpoint) or folders of checkpoints.

examples:
  tiny-onn checkpoint list runs/demo
  tiny-onn checkpoint verify runs/demo --step 200
  tiny-onn checkpoint diff runs/demo/checkpoints/step-00000200 runs/trial
  tiny-onn checkpoint export runs/demo exports/demo
"""


def _folder(run: Path) -> Path:
    folder = run / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{run} is no run folder: it has no checkpoints/")
    return folder


def _list(run: Path) -> int:
    found = list_checkpoints(_folder(run))
    aside = list_set_aside(_folder(run))
    for info in sorted([*found, *aside], key=lambda info: info.step):
        state = "committed" if info.committed else "unfinished, ignored"
        state = "damaged, set aside" if info in aside else state
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


def _open(place: Path, step: int | None = None) -> Checkpoint:
    """Open a checkpoint's folder, or the newest committed one of a run (or that of a step)."""
    if (place / "manifest.json").exists():
        return Checkpoint(place)
    found = [c for c in list_checkpoints(_folder(place)) if c.committed and step in (None, c.step)]
    if not found:
        what = "" if step is None else f" of step {step}"
        raise ValueError(f"{place}: no committed checkpoint{what}")
    return Checkpoint(found[-1].path)


def _diff(first: Path, second: Path) -> int:
    from launcher.checkpoint_diff import difference

    a, b = _open(first), _open(second)
    print(f"{a.path} (step {a.step}, {a.world} ranks) and {b.path} (step {b.step}, {b.world})")
    differences = 0
    for line in difference(a, b):
        differences += 1
        print(f"  {line}")
    print(f"{differences} differences" if differences else "no difference")
    return int(differences > 0)


def _export(run: Path, out: Path, step: int | None, dtype: str) -> int:
    from launcher.export import export

    checkpoint = _open(run, step)
    print(f"exporting {checkpoint.path}")
    for line in export(checkpoint, out, dtype):
        print(line)
    print(f"load it with tiny_onn.exported.load_exported(Path({str(out)!r}))")
    return 0


def _parsers() -> dict[str, tuple[argparse.ArgumentParser, Callable[[argparse.Namespace], int]]]:
    def parser(name: str, example: str) -> argparse.ArgumentParser:
        return argparse.ArgumentParser(
            prog=f"tiny-onn checkpoint {name}",
            epilog=f"example: tiny-onn checkpoint {name} {example}",
        )

    listing, verifying = parser("list", "runs/demo"), parser("verify", "runs/demo --step 200")
    for p in (listing, verifying):
        p.add_argument("run", type=Path, help="run folder")
    verifying.add_argument("--step", type=int, help="only this step; all if absent")
    diff = parser("diff", "runs/demo runs/trial")
    for name in ("a", "b"):
        diff.add_argument(name, type=Path, help="run folder (its newest) or checkpoint folder")
    export = parser("export", "runs/demo exports/demo")
    export.add_argument("run", type=Path, help="run folder, or folder of a checkpoint")
    export.add_argument("out", type=Path, help="folder to make")
    export.add_argument("--step", type=int, help="checkpoint to take; the newest if absent")
    export.add_argument(
        "--dtype", default="fp32", help="of the stored weights: fp32 (masters), bf16 or compute"
    )
    return {
        "list": (listing, lambda a: _list(a.run)),
        "verify": (verifying, lambda a: _verify(a.run, a.step)),
        "diff": (diff, lambda a: _diff(a.a, a.b)),
        "export": (export, lambda a: _export(a.run, a.out, a.step, a.dtype)),
    }


def main(argv: Sequence[str]) -> int:
    """Run a sub-command; returns 0, or 1 when a checkpoint is not intact or two differ."""
    verbs = _parsers()
    if not argv or argv[0] not in verbs:
        asked = bool(argv) and argv[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    parser, run = verbs[argv[0]]
    try:
        return run(parser.parse_args(argv[1:]))
    except CheckpointError as e:
        raise ValueError(str(e)) from e
