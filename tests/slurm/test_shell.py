"""What the scripts work out for themselves, beside programs of Slurm that answer as told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, without_slurm


class Shell:
    """A job's script that has sourced nodes.sh and queue.sh, and Slurm's programs as told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "runs" / "trial"
        self.programs = folder / "bin"
        for path in (self.run / "logs", self.programs):
            path.mkdir(parents=True)

    def program(self, name: str, text: str) -> None:
        """Let the lines of shell be a program on PATH."""
        path = self.programs / name
        path.write_text(f"#!/usr/bin/env bash\n{text}\n")
        path.chmod(0o755)

    def sourced(self, lines: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run lines of shell behind the two files."""
        head = "set -euo pipefail; source slurm/nodes.sh; source slurm/queue.sh; "
        head += "SCRIPT=slurm/pretrain.sh ARGUMENTS=(my.yaml) ARRAY_IS_ONE_RUN=1; "
        return subprocess.run(
            ["bash", "-c", f"{head}\n{lines}"],
            cwd=ROOT,
            env={
                **without_slurm(),
                "PATH": f"{self.programs}:/usr/bin:/bin",
                "REPO": str(ROOT),
                "RUN": str(self.run),
                "PYTHON": sys.executable,
                "SLURM_JOB_ID": "7",
                "TINY_ONN_TRY": "job7-try0",
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ([], "0"),
        (["step-00000090", "step-00000100.replaced"], "100"),
        (["step-00000090", "step-00000100.damaged", "step-x"], "90"),
        (["step-00000008", "step-00000100", "step-00000100.replaced"], "100"),
    ],
)
def test_the_newest_committed_step_is_told_whatever_lies_beside_it(
    shell: Shell, folders: list[str], expected: str
) -> None:
    for name in folders:
        folder = shell.run / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "COMMITTED").touch()
    (shell.run / "checkpoints" / "step-00000999").mkdir(parents=True)
    done = shell.sourced("committed_step")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected}\n", "")
