"""A rank alone, as a process that dies as by SIGKILL at a chosen moment: POINT CONFIG.

POINT is none, or "before NAME" or "after NAME" with NAME one of POINTS; the process kills itself
when that function is called, or has returned, for the first time.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

from launcher import config, pretrain, worker
from launcher.lifecycle import RunFolder

POINTS = {
    "discard": ("parallel.checkpoint", "CheckpointStore.discard_after"),
    "window": ("launcher.rollback", "_write"),
}


def arm(point: str) -> None:
    """Replace a function by one that dies."""
    when, name = point.split()
    module, path = POINTS[name]
    owner: Any = importlib.import_module(module)
    *outer, last = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original = getattr(owner, last)

    def deadly(*args: Any, **kwargs: Any) -> None:
        if when == "after":
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, last, deadly)


def main(point: str, path: Path) -> int:
    """Train like one rank of `tiny-onn pretrain`."""
    if point != "none":
        arm(point)
    cfg = pretrain.resolved(config.load(path))
    folder = RunFolder(Path(cfg.runs) / cfg.name).create()
    config.save(cfg, folder.config)
    return worker.main([str(folder.config), "train"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
