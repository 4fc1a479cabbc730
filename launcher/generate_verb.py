"""`tiny-onn generate RUN`: text from a run's checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from launcher.eval_verb import run_worker
from launcher.options import whole


def main(argv: Sequence[str]) -> int:
    """Generate; prints the prompt and its continuation."""
    p = argparse.ArgumentParser(
        prog="tiny-onn generate",
        description="Continue a text with a run's checkpoint.",
        epilog="example: tiny-onn generate runs/demo --prompt 'def main(' --tokens 64",
    )
    p.add_argument("run", type=Path, help="run folder")
    p.add_argument("--prompt", default="", help="what the text starts with")
    p.add_argument("--tokens", type=whole(1), default=128, help="most tokens to add")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    p.add_argument("--top-p", type=float, default=0.95, help="probability mass to draw from")
    p.add_argument("--seed", type=int, default=0, help="of the draw")
    p.add_argument(
        "--step", type=whole(1), help="checkpoint to take; the newest verified one if absent"
    )
    a = p.parse_args(argv)
    fields = ("prompt", "tokens", "temperature", "top_p", "seed", "step")
    return run_worker(a.run, "generate", {name: getattr(a, name) for name in fields})
