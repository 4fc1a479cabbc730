"""A cluster for the tests of this folder, and a way to submit a run to it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import SlurmCluster, missing

ROOT = Path(__file__).parents[2]

STAND_IN = """\
#!/usr/bin/env bash
if [[ "$1 $2 $3" != "-m launcher pretrain" ]]; then exec {python} "$@"; fi
run=$({python} -m launcher path "${{@:4}}")
save() {{ mkdir -p "$run/checkpoints/step-0$1"; touch "$run/checkpoints/step-0$1/COMMITTED"; }}
asked() {{ [[ -e $run/STOP || -e $run/logs/$TINY_ONN_TRY.stop ]]; }}
try=${{TINY_ONN_TRY##*-try}}
{body}
"""


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    if missing():
        pytest.skip(missing())
    with SlurmCluster(nodes=4) as cluster:
        yield cluster


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Show what Slurm's own daemons said with a test that failed."""
    outcome: Any = yield
    report = outcome.get_result()
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and cluster is not None:
        for log in sorted((cluster.folder / "log").glob("slurm*.log")):
            report.sections.append((log.name, log.read_text()[-6000:]))


@dataclass
class Submission:
    """One run on the cluster: its jobs, its folder, what they said."""

    cluster: SlurmCluster
    folder: Path
    config: Path
    python: Path = Path(sys.executable)
    job: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    run: Path = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.folder / "runs" / "trial"

    def submit(self, *options: str, overrides: tuple[str, ...] = (), **environment: str) -> int:
        """Submit from a folder that is not the checkout, as a user with an absolute path would."""
        self.job = self.cluster.sbatch(
            "--nodes=2", f"--output={self.folder}/%j.out", *options,
            str(ROOT / "slurm" / "pretrain.sh"), str(self.config),
            "--runs", str(self.run.parent), "--name", self.run.name, *overrides,
            cwd=self.folder,
            env={"TINY_ONN_PYTHON": str(self.python), **self.environment, **environment},
        )  # fmt: skip
        return self.job

    def evaluate(self) -> int:
        """Submit an evaluation of the run's checkpoints, on one node; returns the job's number."""
        script = str(ROOT / "slurm" / "eval.sh")
        return self.cluster.sbatch(
            f"--output={self.folder}/%j.out", "--nodelist=n4", script, str(self.run),
            cwd=self.folder,
            env={"TINY_ONN_PYTHON": str(self.python), **self.environment},
        )  # fmt: skip

    def output(self, job: int | None = None) -> str:
        """Everything that the job's tries wrote."""
        path = self.folder / f"{job or self.job}.out"
        return path.read_text() if path.exists() else ""

    def wait_finished(self, seconds: float = 60) -> str:
        """Wait until the job has left the queue; returns its state."""
        self.wait(lambda: self.cluster.finished(self.job), seconds, f"job {self.job} ends")
        return self.cluster.job(self.job)["JobState"]

    def wait(self, reached, seconds: float, what: str) -> None:  # type: ignore[no-untyped-def]
        """Wait for something; what the jobs wrote is in the message when it does not come."""
        try:
            self.cluster.wait(reached, seconds, what)
        except TimeoutError as e:
            logs = [p for p in [*self.folder.glob("*.out"), *self.run.glob("logs/*.log")]]
            text = "\n".join(f"== {p}\n{p.read_text()[-4000:]}" for p in logs)
            raise AssertionError(f"{e}\n{text}") from None

    def steps(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl that are complete."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [r for r in map(json.loads, lines) if "loss" in r]

    def committed(self) -> int:
        """The newest committed step."""
        markers = self.run.glob("checkpoints/step-*/COMMITTED")
        return max((int(m.parent.name.removeprefix("step-")) for m in markers), default=0)

    def cancel(self) -> None:
        """End whatever is left of the job."""
        self.cluster.run("scancel", "--user", "root")
        self.wait(lambda: not self.cluster.run("squeue", "-h").strip(), 60, "the queue is empty")


@pytest.fixture
def submission(cluster: SlurmCluster, tmp_path: Path) -> Iterator[Submission]:
    tmp_path.chmod(0o755)
    submission = Submission(cluster, tmp_path, ROOT / "launcher" / "configs" / "demo.yaml")
    yield submission
    submission.cancel()


def play(submission: Submission, body: str) -> Submission:
    """Let a few lines of shell, which write the same files, play the ranks' part."""
    submission.python = submission.folder / "python"
    submission.python.write_text(STAND_IN.format(python=sys.executable, body=body))
    submission.python.chmod(0o755)
    # The pre-flight loads torch on every node; test_preflight.py has it.
    submission.environment["TINY_ONN_PREFLIGHT"] = "0"
    return submission


def without_slurm() -> dict[str, str]:
    """The environment of a shell that is in no job."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TINY_ONN_"))}
