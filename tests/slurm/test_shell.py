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


# As `scontrol show job` of Slurm 22.05 writes it; braces are what a test fills in.
JOB = """\
JobId=7 JobName=my own run
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   Priority=4294901757 Nice=0 Account=(null) QOS=normal
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=0 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:10 TimeLimit=1-00:00:00 TimeMin=N/A
   PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None SuspendTime=None SecsPreSuspend=0
   Partition=gpu AllocNode:Sid=login:4242
   ReqNodeList=(null) ExcNodeList=n9
   NodeList=n[1-2]
   NumNodes=2 NumCPUs=32 NumTasks=2 CPUs/Task={cpus} ReqB:S:C:T=0:0:*:*
   Socks/Node=* NtasksPerN:B:S:C={tasks}:0:*:* CoreSpec=*
   MinCPUsNode=16 MinMemory{memory} MinTmpDiskNode=0
   Features=(null) DelayBoot=00:00:00
   OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null)
   Command=/home/my code/slurm/pretrain.sh my.yaml
   WorkDir=/home/my code
   StdErr=/home/my runs/{error}
   StdIn=/dev/null
   StdOut=/home/my runs/out-7.txt
{tres}   Power=
"""
BASIC = {
    "--dependency=afterany:7", "--nodes=2", "--chdir=/home/my code", "--parsable", "--no-requeue",
    "--exclude=n9", "--job-name=my own run", "--partition=gpu", "--time=1-00:00:00",
    "--output=/home/my runs/out-%j.txt",
}  # fmt: skip


def successor(shell: Shell, **fields: str) -> tuple[set[str], list[str]]:
    """The options beyond the ordinary ones, and the command, of the successor of such a job."""
    shown = {"cpus": "16", "tasks": "1", "memory": "Node=0", "error": "out-7.txt", "tres": ""}
    (shell.folder / "job").write_text(JOB.format(**{**shown, **fields}))
    shell.program("scontrol", f'[[ "$*" == "show job 7" ]] && cat {shell.folder}/job')
    shell.program("sbatch", f"printf '%s\\n' \"$@\" >{shell.folder}/asked; env >{shell.folder}/env")
    environment = {"NNODES": "2", "SLURM_SUBMIT_DIR": "/home/my code", "MASTER_PORT": "1"}
    done = shell.sourced("submit_successor; submit_successor", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    inherited = (shell.folder / "env").read_text()
    assert "SLURM_JOB_ID" not in inherited and "MASTER_PORT" not in inherited
    words = (shell.folder / "asked").read_text().splitlines()
    options = {w for w in words if w.startswith("--")}
    assert options >= BASIC, BASIC - options
    return options - BASIC, [w for w in words if not w.startswith("--")]


NODE = {"--ntasks-per-node=1", "--cpus-per-task=16", "--mem=0"}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, NODE),
        ({"memory": "Node=64G"}, NODE - {"--mem=0"} | {"--mem=64G"}),
        ({"memory": "CPU=4G"}, NODE - {"--mem=0"} | {"--mem-per-cpu=4G"}),
        ({"tres": "   TresPerNode=gres:gpu:8,gres:nvme:1\n"}, NODE | {"--gres=gpu:8,nvme:1"}),
        ({"tres": "   TresPerNode=gres/gpu:h100:8\n"}, NODE | {"--gres=gpu:h100:8"}),
        ({"tres": "   TresPerJob=gres:gpu:16\n"}, NODE | {"--gpus=16"}),
        ({"tres": "   TresPerJob=gres:gpu:h100:16\n"}, NODE | {"--gpus=h100:16"}),
        ({"tres": "   TresPerTask=gres:gpu:8\n"}, NODE | {"--gpus-per-task=8"}),
        ({"tres": "   TresPerTask=cpu=16,gres/gpu=8\n"}, NODE | {"--gpus-per-task=8"}),
        ({"tres": "   TresPerTask=cpu=16\n"}, NODE),
        (
            {"tres": "   CpusPerTres=gres:gpu:4\n   MemPerTres=gres:gpu:9000\n"},
            {"--ntasks-per-node=1", "--cpus-per-gpu=4", "--mem-per-gpu=9000"},
        ),
        ({"error": "err-7.txt"}, NODE | {"--error=/home/my runs/err-%j.txt"}),
        ({"tasks": "8", "cpus": "2"}, {"--ntasks-per-node=8", "--cpus-per-task=2", "--mem=0"}),
        ({"tasks": "0"}, NODE - {"--ntasks-per-node=1"}),
    ],
)
def test_a_successor_is_asked_for_with_the_same_resources(
    shell: Shell, fields: dict[str, str], expected: set[str]
) -> None:
    options, command = successor(shell, **fields)
    assert options == expected
    assert command == [str(ROOT / "slurm" / "pretrain.sh"), "my.yaml"]


def test_a_successor_is_told_of_its_end_as_the_job_was_where_the_accounting_knows(
    shell: Shell,
) -> None:
    line = "sbatch --nodes=2 --signal=B:USR1@600 slurm/pretrain.sh my.yaml"
    shell.program("sacct", f'[[ "$*" == *"-j 7 -o SubmitLine" ]] && echo "{line}"')
    options, _ = successor(shell)
    assert options == NODE | {"--signal=B:USR1@600"}


def test_a_successor_needs_no_accounting(shell: Shell) -> None:
    shell.program("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert successor(shell)[0] == NODE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("JobName", "my own run"),
        ("StdOut", "/home/my runs/out-7.txt"),
        ("WorkDir", "/home/my code"),
        ("Reason", ""),
        ("Requeue", "0"),
        ("PreemptTime", ""),
        ("NoSuchField", ""),
    ],
)
def test_a_field_of_the_job_is_read_whole(shell: Shell, field: str, value: str) -> None:
    (shell.folder / "job").write_text(JOB)
    shell.program("scontrol", f"cat {shell.folder}/job")
    done = shell.sourced(f"job_field {field}")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, value, "")
