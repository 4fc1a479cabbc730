"""`tiny-onn eval RUN`: the validation loss of a run's checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import config
from launcher.lifecycle import RunError, RunFolder
from launcher.options import whole
from launcher.ranks import launch


def run_worker(root: Path, what: str, arguments: dict[str, Any]) -> int:
    """Load a run's checkpoint on ranks of its own, beside a training if need be; returns the rc."""
    folder = RunFolder(root)
    if not folder.config.exists():
        raise RunError(f"{root} is no run folder: it has no config.yaml")
    cfg = config.load(folder.config)
    words = ["-m", "launcher.worker", str(folder.config), what, json.dumps(arguments)]
    return launch(words, RunFolder(root / "evaluation"), cfg.launch)


def main(argv: Sequence[str]) -> int:
    """Evaluate; prints one JSON line."""
    p = argparse.ArgumentParser(
        prog="tiny-onn eval",
        description="Validation loss of a checkpoint, on the ranks of the run's configuration.",
        epilog="examples: tiny-onn eval runs/demo --step 200; tiny-onn eval runs/demo --follow",
    )
    p.add_argument("run", type=Path, help="run folder")
    p.add_argument(
        "--step", type=whole(1), help="checkpoint to take; the newest verified one if absent"
    )
    p.add_argument(
        "--follow",
        action="store_true",
        help="evaluate every checkpoint once, new ones as they appear, until the run is DONE",
    )
    p.add_argument("--once", action="store_true", help="with --follow: only those that are there")
    p.add_argument(
        "--patience",
        type=float,
        default=3600.0,
        help="with --follow: seconds without a new checkpoint after which to end",
    )
    p.add_argument("--sequences", type=whole(0), default=0, help="held-out sequences; 0 takes all")
    a = p.parse_args(argv)
    if a.follow:
        if a.step is not None:
            p.error("--follow evaluates every step, so it cannot have a --step")
        how = {"until_done": not a.once, "patience": a.patience, "sequences": a.sequences}
        return run_worker(a.run, "follow", how)
    return run_worker(a.run, "evaluate", {"step": a.step, "sequences": a.sequences})
