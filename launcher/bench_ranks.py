"""Run a module of this checkout on several ranks of this machine, for benchmarks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from parallel.mesh import threads_per_rank


def run_in_ranks(
    world: int,
    module: str,
    words: Sequence[str],
    environment: Mapping[str, str] | None = None,
    *,
    capture: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE WORDS` on `world` ranks and wait.

    Args:
        world: ranks.
        module: with a main program that reads torchrun's environment.
        words: its arguments.
        environment: variables beside this process's.
        capture: keep its output instead of showing it.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*command, "--nproc-per-node", str(world), "-m", module, *words],
        env={**os.environ, "OMP_NUM_THREADS": str(threads_per_rank(world)), **(environment or {})},
        capture_output=capture,
        text=True,
        check=False,
    )
