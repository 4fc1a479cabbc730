"""Ops are compiled once per machine, whoever was killed while compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BUILDER = """
import pathlib, sys, types
from torch.utils import cpp_extension
from parallel.deepspeed_env import compile_op

class Builder:
    def load(self, verbose):
        baton = cpp_extension.FileBaton(cpp_extension._get_build_directory("toy", False) + "/lock")
        if not baton.try_acquire():
            baton.wait()
        print("compiled")

sys.modules["deepspeed.ops.op_builder"] = types.SimpleNamespace(Builder=Builder)
compile_op("Builder", "toy")
"""


def test_a_lock_that_a_killed_compiler_left_does_not_hold_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "lock").touch()
    done = subprocess.run(
        [sys.executable, "-c", BUILDER],
        env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "PYTHONPATH": "."},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stdout == "compiled\n", done.stderr
