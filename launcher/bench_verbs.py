"""`tiny-onn bench attention|experts|routing|tables|train|step|scaling`: measure beside others."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

USAGE = """usage: tiny-onn bench attention [options]
       tiny-onn bench experts [options]
       tiny-onn bench tables [options]
       tiny-onn bench routing CONFIG [options] [--dotted.key value ...]
       tiny-onn bench train CONFIG [options] [--dotted.key value ...]
       tiny-onn bench step CONFIG [options] [--dotted.key value ...]
       tiny-onn bench scaling CONFIG [options] [--dotted.key value ...]

examples:
  tiny-onn bench attention --lengths 8192 32768 65536 --heads 64 --groups 4 --dim 128 --check
  tiny-onn bench experts --check --json experts.json
  tiny-onn bench tables --check --json tables.json
  tiny-onn bench routing launcher/configs/demo.yaml --variants param_grad off dense --seeds 0 1 2
  tiny-onn bench train launcher/configs/demo.yaml --variants sparse 'all dense'
  tiny-onn bench step launcher/configs/125m.yaml --settings gathered resident --gpus 2
  tiny-onn bench scaling launcher/configs/1b.yaml --gpus 2
"""

BENCHES = {
    "attention": "kernels.nsa.bench",
    "experts": "kernels.experts.bench",
    "tables": "launcher.bench_tables",
    "routing": "launcher.bench_routing",
    "train": "launcher.bench_train",
    "step": "launcher.bench_step",
    "scaling": "launcher.bench_scaling",
}


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; returns its exit code."""
    if argv and argv[0] in BENCHES:
        return int(importlib.import_module(BENCHES[argv[0]]).main(argv[1:]))
    asked = bool(argv) and argv[0] in ("-h", "--help")
    print(USAGE, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
